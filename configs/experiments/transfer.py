"""Does sharing help? Three skills on the simulated table: together, alone, and each left out.

    octolike transfer --config transfer                     every run, 3 seeds
    octolike transfer --config transfer --stage before      the data alone
    octolike train --config transfer:variant=together,seed=1    one run
    ... --config transfer:debug                                      a quick check

Expect runs/transfer/transfer/report.html. With a budget of S steps per skill: `together` has 3 S
steps of all skills, `together_short` S; `only_<skill>` has S steps of one, `without_<skill>` 2 S of
the two others. All runs use the same demonstrations; RESULTS.md has the results.
"""

from octolike.config import Component, Config, ConfigError, base_config, parse_arg, unknown

SKILLS = {"touch": 400, "push": 400, "lift": 400}  # demonstrations of each
STEPS = 1000  # the budget of each
GROUPS = tuple(f"tabletop_{skill}" for skill in SKILLS)

# variant: (datasets of its mixture, multiple of the budget)
VARIANTS = {
    "together": (GROUPS, len(GROUPS)),
    "together_short": (GROUPS, 1),
    **{f"only_{g}": ((g,), 1) for g in GROUPS},
    **{f"without_{g}": (tuple(x for x in GROUPS if x != g), len(GROUPS) - 1) for g in GROUPS},
}


def get_config(arg: str = "") -> Config:
    """Return the config; arguments: variant, seed, debug."""
    args = parse_arg(arg, variant="together", seed=0, debug=False)
    if args.variant not in VARIANTS:
        raise ConfigError(unknown("variant", args.variant, VARIANTS))
    groups, budgets = VARIANTS[args.variant]
    config, skills = base(), [g.removeprefix("tabletop_") for g in groups]
    runs = "runs/transfer-debug" if args.debug else "runs/transfer"
    config.workdir, config.seed = f"{runs}/{args.variant}-{args.seed}", args.seed
    config.data.root, config.data.mix = f"{runs}/data", ",".join(groups)
    # only_<dataset> collects a dataset; the others use the collected ones
    config.collect.dataset = groups[0]
    config.collect.skills = {s: 6 if args.debug else SKILLS[s] for s in skills}
    config.evaluate.skills = tuple(skills)
    config.train.steps = budgets * (10 if args.debug else STEPS)
    if args.debug:
        config.collect.episodes_per_shard = 6
        config.train.log_every, config.train.conflicts_every, config.optim.warmup = 5, 5, 2
        config.evaluate.episodes = 2
    if len(groups) < 2:
        config.train.conflicts_every = 0  # a single group has no conflict
    return config


def base() -> Config:
    """Return the config that all variants share: network and settings of compare.py."""
    config = base_config("compare.py", relative_to=__file__)
    config.collect.validation_share = 0.08
    config.data.sampling = Component(kind="uniform")
    config.train.checkpoint_every, config.train.conflicts_every = 1000, 50
    config.evaluate.episodes, config.evaluate.splits = 50, ("train",)
    return config
