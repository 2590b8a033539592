"""A planted conflict: two robots at the same table that differ in one respect.

    octolike collect --config conflict
    octolike collect --config conflict:robot=mirrored
    octolike compare --config conflict                        every variant
    octolike train --config conflict:variant=heads,seed=1     one run
    ... --config conflict:debug                              a quick check

The second robot's x and y have the opposite sign. It sees the same tables, so the right action of
one robot is wrong for the other. With conflict=… (and robot=… to collect) it differs otherwise:

    rescaled   its actions are twice as large, which its own statistics undo
    inverted   its gripper closes at 1, not at 0 (touch and lift instead of touch and push)
    turned     its gripper and wrist camera are mounted a quarter turn (touch and lift)
    repainted  table, gripper and light have other colours; equal actions

`alone` and `other_alone` learn one robot in half the steps, at equal data and equal steps per
robot; `default` shares everything without conditioning on the robot; the other variants are
remedies: a robot token, a head per robot, both, experts or a hypernetwork that see the token,
sampling by difficulty, PCGrad with and without the token. Expect runs/conflict/comparison.md with
success per robot; a run takes two to four minutes on one core, of the hypernetwork about five.
RESULTS.md has the results of opposite signs.
"""

from octolike.config import Component, Config, ConfigError, base_config, parse_arg, unknown

ROBOT = "tabletop"
MOVES, GRASPS = {"touch": 300, "push": 300}, {"touch": 300, "lift": 300}
CONFLICTS = {
    "mirrored": MOVES,
    "rescaled": MOVES,
    "inverted": GRASPS,  # the other skills leave the gripper closed
    "turned": GRASPS,
    "repainted": MOVES,
}
STEPS = 1500  # of both robots together


def get_config(arg: str = "") -> Config:
    """Return the config; arguments: variant, seed, conflict, robot (to collect), debug."""
    args = parse_arg(
        arg, variant="default", seed=0, conflict="mirrored", robot="standard", debug=False
    )
    if args.variant not in VARIANTS:
        raise ConfigError(unknown("variant", args.variant, VARIANTS))
    if args.conflict not in CONFLICTS:
        raise ConfigError(unknown("conflict", args.conflict, CONFLICTS))
    if args.robot not in ("standard", *CONFLICTS):
        raise ConfigError(unknown("robot", args.robot, ("standard", *CONFLICTS)))
    runs = "runs/conflict" if args.conflict == "mirrored" else f"runs/conflict-{args.conflict}"
    runs += "-debug" * args.debug
    second = f"{ROBOT}_{args.conflict}"
    config = base(second, CONFLICTS[args.conflict])
    config.workdir, config.seed = f"{runs}/{args.variant}-{args.seed}", args.seed
    # the robot's name selects the convention of the environment: octolike.envs.tabletop.conventions
    config.collect.dataset = ROBOT if args.robot == "standard" else f"{ROBOT}_{args.robot}"
    config.data.root = f"{runs}/data"
    VARIANTS[args.variant](config, second)
    if args.debug:
        config.collect.skills = dict.fromkeys(config.collect.skills, 2)
        config.collect.episodes_per_shard = 2
        config.data.batch_size, config.train.steps, config.train.log_every = 4, 20, 5
        config.optim.warmup, config.train.validation_batches = 2, 1
        config.train.validate_every = min(config.train.validate_every, 10)
        config.evaluate.episodes = 1
    return config


def base(second: str, skills: dict[str, int]) -> Config:
    """Return the config that all variants share: both robots, half of the examples each."""
    config = base_config("compare.py", relative_to=__file__)
    config.data.mix, config.data.mix_weights = f"{ROBOT}=1,{second}=1", "shares"
    config.data.tasks = "dataset"  # the task id is the robot's: `robot_token` conditions on it
    config.collect.skills, config.train.steps = dict(skills), STEPS
    config.train.groups, config.train.conflicts_every = "dataset", 25
    config.evaluate.embodiment = "all"
    config.evaluate.splits, config.evaluate.episodes = ("train",), 30
    return config


def alone(config: Config, robot: str) -> None:
    """Learn one robot in the number of steps that it has in the mixture."""
    config.data.mix, config.train.steps = robot, config.train.steps // 2
    config.train.checkpoint_every = config.train.steps
    config.train.conflicts_every = 0


def robot_token(config: Config) -> None:
    """Condition on the robot by a token next to the instruction."""
    config.data.task_ids, config.evaluate.condition_on = True, ("language", "task_id")
    config.model.tokenizers = {"robot": Component(kind="task_id"), **config.model.tokenizers}


def heads(config: Config) -> None:
    """Give each robot an action head of its own."""
    inner = config.model.heads["action"]
    config.model.heads = {"action": Component(kind="per_group", by="embodiment", head=inner)}


def experts(config: Config) -> None:
    """Route an example to two of four experts per block by its conditioning, the robot included."""
    robot_token(config)
    config.model.experts = Component(kind="top_k", count=4, k=2, gate="task")


def hypernet(config: Config) -> None:
    """Generate changes of the shared head's weights from the conditioning, the robot included."""
    robot_token(config)
    inner = config.model.heads["action"]
    config.model.heads = {"action": Component(kind="hypernet", rank=4, hidden=64, head=inner)}


def reweighted(config: Config) -> None:
    """Sample more of the robot with the larger error."""
    config.data.sampling = Component(kind="difficulty", over="dataset", power=2.0)
    config.train.validate_every = 250


def pcgrad(config: Config) -> None:
    """Project each robot's gradient off the conflicting part of the other's."""
    config.optim.surgery = "pcgrad"


VARIANTS = {
    "default": lambda c, second: None,
    "alone": lambda c, second: alone(c, ROBOT),
    "other_alone": alone,
    "robot_token": lambda c, second: robot_token(c),
    "heads": lambda c, second: heads(c),
    "robot_token_heads": lambda c, second: (robot_token(c), heads(c)),
    "experts_by_task": lambda c, second: experts(c),
    "hypernet": lambda c, second: hypernet(c),
    "reweighted": lambda c, second: reweighted(c),
    "pcgrad": lambda c, second: pcgrad(c),
    "robot_token_pcgrad": lambda c, second: (robot_token(c), pcgrad(c)),
}
