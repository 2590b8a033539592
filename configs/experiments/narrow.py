"""A narrow target and a broad prior: lifting objects that only the prior has touched and pushed.

    octolike compare --config narrow --collect --seeds 8
    ... --config narrow:debug                                a quick check

The target is lifting the cube and the cylinder of one colour, 89 demonstrations on average; the
prior is touching and pushing all objects, 1,000 demonstrations. `narrow` learns the target alone;
`default` both, half of the examples each, in twice the steps, so it sees the target as often;
`default_short` in equal steps; `all_objects` lifts every object, as the best case. A seed changes
the parameters, the order of the data, the demonstrations and the colour.

The measure is the success of `default` less that of `narrow`. Seven of the nine objects of `train`
are novel to the target; those of `held_out_combination` also to the prior. Not run yet.
"""

from octolike.config import Component, Config, ConfigError, base_config, parse_arg, unknown

COLOURS = ("blue", "purple", "orange")  # those with both shapes in training
STEPS = 1500
# Multiplier of the target's steps, an eighth of those of the prior: half of the examples.
TARGET_WEIGHT = 8.0
VARIANTS = ("default", "default_short", "narrow", "all_objects")


def get_config(arg: str = "") -> Config:
    """Return the config; arguments: variant, seed (0 to 9), debug."""
    args = parse_arg(arg, variant="default", seed=0, debug=False)
    if args.variant not in VARIANTS:
        raise ConfigError(unknown("variant", args.variant, VARIANTS))
    runs = "runs/narrow-debug" if args.debug else "runs/narrow"
    config = base_config("compare.py", "debug" if args.debug else "", relative_to=__file__)
    config.workdir, config.seed = f"{runs}/{args.variant}-{args.seed}", args.seed
    config.data.root, config.collect.draw = f"{runs}/data/{args.seed}", args.seed
    config.evaluate.skills = ("lift",)
    if args.debug:  # too few demonstrations for one colour
        config.data.sampling = Component(kind="proportional", over="task")
        return config
    config.evaluate.episodes = 60
    if args.variant == "default":
        config.train.steps = config.train.checkpoint_every = 2 * STEPS
    target = "lift/*" if args.variant == "all_objects" else f"lift/{COLOURS[args.seed % 3]}_*"
    weights = {target: 1.0}
    if args.variant.startswith("default"):
        weights = {target: TARGET_WEIGHT, "touch/*": 1.0, "push/*": 1.0}
    config.data.sampling = Component(kind="curriculum", over="task", stages=((0, weights),))
    return config
