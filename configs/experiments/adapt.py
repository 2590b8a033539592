"""Few demonstrations of a new skill: alone, co-trained with other skills, finetuned from them.

    octolike collect --config adapt:variant=prior        touching and pushing
    octolike collect --config adapt:variant=alone_20     lifting, the new skill
    octolike compare --config adapt                      every variant, 3 seeds

alone_N learns lifting from N demonstrations from scratch; cotrain_N from N demonstrations together
with the data of the other skills; finetune_N from N demonstrations, starting from the policy of the
other skills (`prior`). Network and settings are those of compare.py. RESULTS.md has the results.
"""

from octolike.config import Component, Config, ConfigError, base_config, parse_arg, unknown

COUNTS = {"alone": (5, 10, 20, 50, 80), "cotrain": (5, 10, 20, 50), "finetune": (5, 10, 20, 50)}
VARIANTS = ("prior", *(f"{way}_{n}" for way, counts in COUNTS.items() for n in counts))
PRIOR, TARGET = {"touch": 600, "push": 400}, {"lift": 80}


def get_config(arg: str = "") -> Config:
    """Return the config; arguments: variant, seed, debug."""
    args = parse_arg(arg, variant="cotrain_20", seed=0, debug=False)
    if args.variant not in VARIANTS:
        raise ConfigError(unknown("variant", args.variant, VARIANTS))
    here = "runs/adapt-debug" if args.debug else "runs/adapt"
    config = base_config("compare.py", "debug" if args.debug else "", relative_to=__file__)
    config.workdir, config.seed = f"{here}/{args.variant}-{args.seed}", args.seed
    config.data.root, config.data.mix = f"{here}/data", "tabletop_target"
    config.collect.dataset, config.collect.skills = "tabletop_target", dict(TARGET)
    config.collect.validation_share, config.collect.episodes_per_shard = 0.25, 20
    config.evaluate.skills, config.evaluate.embodiment = ("lift",), "tabletop_target"
    config.evaluate.splits, config.evaluate.episodes = ("train",), 30

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
        config.optim.learning_rate, config.train.steps = 3e-4, min(config.train.steps, 750)
        config.train.checkpoint_every = config.train.steps
    if args.debug:
        config.collect.skills = dict.fromkeys(config.collect.skills, 2)
        config.collect.episodes_per_shard, config.evaluate.episodes = 2, 2
    return config
