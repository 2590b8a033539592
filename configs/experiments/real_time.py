"""Success with inference 0 to 6 control steps late: waiting, continuing, ensembling, chunking.

    octolike collect --config real_time
    octolike train --config real_time:seed=0      and 1, 2
    octolike benchmark delay --runs runs/real-time-0,runs/real-time-1,runs/real-time-2
    ... --methods wait,continue,ensemble,guided --delays 0,2,4,6
    octolike train --config real_time:seed=0,prefix=6       a head that learns prefixes: `trained`

Stated before the delays were run, after two attempts with prefix=6, and after seed 0 had succeeded
in 21 of 32 episodes without a delay (RESULTS.md):

- The table as a conveyor belt at 10 Hz: everything on it moves at 2 cm/s, 12 mm in six steps, and
  the fingers leave 18 mm on either side of an object. Lift and put; an expert takes about 14 and
  27 steps. The recipe of the quick start with chunks of 12 actions.
- One policy per seed serves all methods: 3,000 steps, without prefixes. `trained` is left out: a
  head that learned with prefixes from the start rarely succeeded in the attempts.
- The first chunk of an episode is free: the clock starts with it. From then on a chunk arrives
  `delay` steps after its observation; a new one starts every max(delay, 2) steps. "wait" executes 8
  actions and holds still for `delay` steps. All have the release rule of the quick start.
- The same scenes for all methods and delays; the step limits of the tasks stay.
- Smoothness: the mean change of the commanded translation, |a_t − a_{t−1}| in millimetres, at the
  step at which a new chunk takes over, next to the same within chunks.

Expected: waiting loses most, since the objects move on; continuing loses little success and is
rough at the borders; guided chunking is as successful and smoother.
"""

from octolike.config import Component, Config, base_config, parse_arg

ROBOT = "tabletop_belt"


def get_config(arg: str = "") -> Config:
    """Return the config; arguments: seed, prefix, debug."""
    args = parse_arg(arg, seed=0, prefix=0, debug=False)
    quickstart = "debug" if args.debug else ""
    config = base_config("../quickstart.py", quickstart, relative_to=__file__)
    kind = "real-time-prefix" if args.prefix else "real-time"
    config.workdir, config.seed = f"runs/{kind}-{args.seed}", args.seed
    config.collect.dataset, config.data.mix = ROBOT, ROBOT
    config.data.root, config.data.horizon = "runs/real-time/data", 12
    head = config.model.heads["action"]
    config.model.heads = {"action": Component(**{**head, "prefix": args.prefix})}
    config.collect.skills = {"lift": 900, "put": 1100}
    config.evaluate.splits = ("train",)
    config.train.steps, config.train.checkpoint_every = 3000, 3000
    if args.debug:
        config.workdir, config.data.root = "runs/real-time-debug", "runs/real-time-debug/data"
        config.collect.skills = {"lift": 4}
        config.train.steps, config.train.checkpoint_every = 20, 10
    return config
