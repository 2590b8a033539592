"""How many demonstrations is other tasks' data worth? Alone, beside it, after it.

    octolike compare --config adapt --collect --seeds 8     every variant
    octolike compare --config adapt --collect --seeds 8 --variants prior,alone_20,…    some
    octolike compare --config adapt:steps=6000 ...           four times the steps, to convergence

alone_N learns lifting from N demonstrations; cotrain_N from N demonstrations and the `prior` data,
touching and pushing, half of every batch each; finetune_N from N demonstrations after the policy of
the prior, in half the steps and with a lower learning rate.

The steps of prior, alone_N and cotrain_N are equal for every N, 1,500, and those of finetune_N half
of them, after the prior's. So cotrain_N and finetune_N see as many examples of lifting, half of
those of alone_N. `steps` scales all stages and keeps these ratios; with other steps the runs are in
runs/adapt-<steps>, on the same demonstrations.

A seed changes the parameters, the order of the data and the demonstrations. The comparisons stated
beforehand are cotrain_20 and finetune_20 with alone_80 ("20 = 80") and with alone_20 (--against
alone_20); the table's notes name the number of demonstrations alone that each variant is worth.
RESULTS.md has the results.
"""

from octolike.config import Component, Config, ConfigError, base_config, parse_arg, unknown
from octolike.evaluation.suites import BLOCKS

COUNTS = (5, 10, 20, 40, 80, 160)
VARIANTS = ("prior", *(f"{way}_{n}" for way in ("alone", "cotrain", "finetune") for n in COUNTS))
REFERENCE = "alone_80"  # with which octolike compare compares the variants
PRIOR, TARGET = {"touch": 600, "push": 400}, {"lift": max(COUNTS)}
STEPS = 1500  # with 3,000, a trial with one seed succeeded less often: it overfits 20 episodes


def get_config(arg: str = "") -> Config:
    """Return the config; arguments: variant, seed (0 to 9), steps, debug."""
    args = parse_arg(arg, variant="cotrain_20", seed=0, steps=STEPS, debug=False)
    if args.variant not in VARIANTS:
        raise ConfigError(unknown("variant", args.variant, VARIANTS))
    data = "runs/adapt-debug" if args.debug else "runs/adapt"
    here = data if args.debug or args.steps == STEPS else f"{data}-{args.steps}"
    config = base_config("compare.py", "debug" if args.debug else "", relative_to=__file__)
    config.workdir, config.seed = f"{here}/{args.variant}-{args.seed}", args.seed
    config.data.root, config.data.mix = f"{data}/data/{args.seed}", "tabletop_target"
    config.collect.dataset, config.collect.skills = "tabletop_target", dict(TARGET)
    config.collect.draw, config.collect.validation_share = args.seed, 0.1
    config.collect.episodes_per_shard = 20
    config.train.steps = config.train.steps if args.debug else args.steps
    config.evaluate.skills, config.evaluate.embodiment = ("lift",), "tabletop_target"
    config.evaluate.splits, config.evaluate.episodes = ("train",), 60
    config.evaluate.seed = BLOCKS["test"] + 1000  # no setting was chosen by these scenes

    way, _, count = args.variant.partition("_")
    if way == "prior":
        config.data.mix, config.collect.dataset = "tabletop", "tabletop"
        config.collect.skills, config.collect.validation_share = dict(PRIOR), 0.05
        config.collect.episodes_per_shard = 100
        config.evaluate.skills, config.evaluate.embodiment = tuple(PRIOR), "tabletop"
    else:
        config.data.limits = {"tabletop_target": int(count)}
    if way == "cotrain":
        config.data.mix = "tabletop_target,tabletop"
        config.data.sampling = Component(kind="cotrain", target="tabletop_target", share=0.5)
    if way == "finetune":
        config.train.init_from = f"{here}/prior-{args.seed}"
        config.train.steps, config.optim.learning_rate = config.train.steps // 2, 3e-4
    config.train.checkpoint_every = config.train.steps
    if args.debug:
        config.collect.skills = dict.fromkeys(config.collect.skills, 2)
        config.collect.episodes_per_shard, config.evaluate.episodes = 2, 2
    return config
