"""Representations of the learned actions, compared on the simulated table, three seeds.

    octolike collect --config representations
    octolike compare --config representations            every variant, 3 seeds
    ... --config representations:debug                   a quick check

Stated before the runs: touch and lift, 500 demonstrations each, 1,500 steps of 32 examples, seeds
0, 1 and 2; every run meets the same 25 layouts per skill. The measure is the success of a variant
less that of `default` on the same layouts, over all seeds, with a 95 % interval over (seed, layout)
pairs. The demonstrations are changes (dx …) with the pose as proprio, so that `delta` is the stored
form, and `absolute`, `relative` and the rotations are computed from the pose. A run takes two to
three minutes on one core; RESULTS.md has the results.
"""

from octolike.config import Config, ConfigError, base_config, parse_arg, unknown

VARIANTS = {
    "default": "as_stored",
    "relative": "relative",
    "absolute": "absolute",
    "delta_tool_frame": "delta tool_frame",
    "relative_tool_frame": "relative tool_frame",
    "relative_rotation_6d": "relative rotation_6d",
    "absolute_rotation_6d": "absolute rotation_6d",
}
SKILLS = {"touch": 500, "lift": 500}


def get_config(arg: str = "") -> Config:
    """Return the config; arguments: variant, seed, debug."""
    args = parse_arg(arg, variant="default", seed=0, debug=False)
    if args.variant not in VARIANTS:
        raise ConfigError(unknown("variant", args.variant, VARIANTS))
    runs = "runs/representations-debug" if args.debug else "runs/representations"
    config = base_config("compare.py", "debug" if args.debug else "", relative_to=__file__)
    config.workdir, config.seed = f"{runs}/{args.variant}-{args.seed}", args.seed
    config.data.root, config.data.representation = f"{runs}/data", VARIANTS[args.variant]
    config.collect.skills = dict.fromkeys(SKILLS, 2) if args.debug else dict(SKILLS)
    config.evaluate.splits, config.evaluate.skills = ("train",), tuple(SKILLS)
    config.evaluate.episodes = 2 if args.debug else 25
    return config
