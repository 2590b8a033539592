"""Does training on more tasks help on held-out ones? 1, 3, 9, 27 and all 79 tasks.

    octolike compare --config tasks --collect --seeds 5
    ... --config tasks:debug                                 a quick check

A task is a skill with an object and, to push, a direction. `tasks_N` learns N tasks of touching,
pushing and lifting, as many of each skill as possible, and `default` all of them, in equal steps.
Tasks bring their demonstrations: 57 on average to touch an object, 89 to lift it, 14 to push it in
one direction. More tasks are thus more demonstrations, too. A seed changes the parameters, the
order of the data, the demonstrations and the tasks; those of N are among those of 3 N.

The measure is the success on pairs of colour and shape that no variant has as a target
(`held_out_combination`), less that of `default`; `train` are all 79 tasks in new arrangements.
RESULTS.md has the results of three seeds.
"""

from octolike.config import Component, Config, ConfigError, base_config, parse_arg, unknown
from octolike.envs.tabletop.tabletop_tasks import names_in_turn

SKILLS = {"touch": 800, "push": 800, "lift": 800}
VARIANTS = ("default", "tasks_27", "tasks_9", "tasks_3", "tasks_1")
SPLIT = "held_out_combination"  # where octolike compare compares the variants
STEPS = 3000


def get_config(arg: str = "") -> Config:
    """Return the config; arguments: variant, seed (0 to 9), debug."""
    args = parse_arg(arg, variant="default", seed=0, debug=False)
    if args.variant not in VARIANTS:
        raise ConfigError(unknown("variant", args.variant, VARIANTS))
    runs = "runs/tasks-debug" if args.debug else "runs/tasks"
    config = base_config("compare.py", "debug" if args.debug else "", relative_to=__file__)
    config.workdir, config.seed = f"{runs}/{args.variant}-{args.seed}", args.seed
    config.data.root, config.collect.draw = f"{runs}/data/{args.seed}", args.seed
    if args.debug:
        config.data.sampling = Component(kind="proportional", over="task")
        return config
    config.collect.skills = dict(SKILLS)
    config.train.steps = config.train.checkpoint_every = STEPS
    count = args.variant.partition("_")[2]
    names = names_in_turn(tuple(SKILLS), args.seed)[: int(count) if count else None]
    stages = ((0, dict.fromkeys(names, 1.0)),)
    config.data.sampling = Component(kind="curriculum", over="task", stages=stages)
    return config
