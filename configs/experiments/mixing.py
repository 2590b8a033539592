"""An unbalanced mixture: three skills, one with a twentieth of the demonstrations of the others.

    octolike collect --config mixing
    octolike compare --config mixing                          every variant
    octolike compare --config mixing --variants default,uniform --seeds 1
    ... --config mixing:debug                                a quick check

Every variant is `default` (examples in proportion to the steps of a skill) with another
data.sampling over skills. Expect runs/mixing/comparison.md with success per skill, the worst skill
and the mean; a run takes two to four minutes on one core. RESULTS.md has the results.
"""

from octolike.config import Component, Config, ConfigError, base_config, parse_arg, unknown

SKILLS = {"touch": 600, "push": 600, "lift": 30}
VALIDATE = 250  # steps between updates of the sampling weights


def get_config(arg: str = "") -> Config:
    """Return the config; arguments: variant, seed, debug."""
    args = parse_arg(arg, variant="default", seed=0, debug=False)
    if args.variant not in VARIANTS:
        raise ConfigError(unknown("variant", args.variant, VARIANTS))
    config = base_config("compare.py", relative_to=__file__)
    runs = "runs/mixing-debug" if args.debug else "runs/mixing"
    config.workdir, config.seed = f"{runs}/{args.variant}-{args.seed}", args.seed
    config.data.root, config.data.mix = f"{runs}/data", "tabletop_by_skill"
    config.collect.dataset, config.collect.skills = config.data.mix, dict(SKILLS)
    config.collect.validation_share = 0.1
    config.evaluate.splits, config.evaluate.episodes = ("train",), 40
    config.data.sampling = Component(over="task", **VARIANTS[args.variant])
    follows = config.data.sampling["kind"] == "difficulty"
    config.train.validate_every = VALIDATE if follows else 0
    if args.debug:
        config.collect.skills = {"touch": 4, "push": 4, "lift": 2}
        config.collect.episodes_per_shard = 2
        config.data.batch_size, config.train.steps, config.train.log_every = 4, 20, 5
        config.train.validate_every, config.optim.warmup = (10 if follows else 0), 2
        config.train.validation_batches, config.evaluate.episodes = 1, 1
    return config


VARIANTS = {
    "default": {"kind": "proportional"},
    "uniform": {"kind": "uniform"},
    "temperature": {"kind": "temperature", "t": 3.0},
    # frequent skills first, then proportional, then uniform
    "curriculum": {
        "kind": "curriculum",
        "stages": (
            (0, {"touch": 1.0, "push": 1.0}),
            (500, {"touch": 1.0, "push": 1.0, "lift": 5.0}),
            (1000, {"touch": 1.0, "push": 1.0, "lift": 20.0}),
        ),
    },
    "difficulty_error": {"kind": "difficulty", "measure": "error", "power": 2.0},
    "difficulty_success": {"kind": "difficulty", "measure": "success", "smoothing": 0.3},
}
