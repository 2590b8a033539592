"""Success with inference 0 to 6 control steps late: waiting, continuing, ensembling, chunking.

    octolike collect --config real_time
    octolike train --config real_time:seed=0      and 1, 2
    octolike benchmark delay --runs runs/real-time-0,runs/real-time-1,runs/real-time-2

Stated before the run:

- The table at 5 Hz, touch and lift, chunks of 16 actions, a flow head. The objects rest, so only
  the arm moves while a chunk is computed: the mildest case of a late chunk.
- One policy per seed serves all methods: its head is trained with prefixes of 0 to 6 actions
  (`prefix`), one seventh of them empty, so that it also acts without a prefix, and under guidance.
- The first chunk of an episode is free: the clock starts with it. From then on a chunk arrives
  `delay` steps after its observation; a new one starts every max(delay, 2) steps. "wait" executes 8
  actions and holds still for `delay` steps.
- The same scenes for all methods and delays; the step limits of the tasks stay.
- Smoothness: the mean change of the commanded translation, |a_t − a_{t−1}| in millimetres, at the
  step at which a new chunk takes over, next to the same within chunks.

Expected: waiting loses by the time limit alone; continuing loses little success and is rough at the
borders; both kinds of real-time chunking are as successful and smoother.
"""

from octolike.config import Component, Config, parse_arg

LONGEST = 6  # control steps


def get_config(arg: str = "") -> Config:
    """Return the config; arguments: seed, debug."""
    args = parse_arg(arg, seed=0, debug=False)
    config = Config(workdir=f"runs/real-time-{args.seed}", seed=args.seed)
    config.environment = Component(kind="tabletop", primary_size=64, wrist_size=48)
    config.collect.skills = {"touch": 1000, "lift": 1000}

    data = config.data
    data.root, data.mix = "runs/real-time/data", "tabletop"
    data.cameras = {"primary": 64, "wrist": 48}
    data.window, data.horizon, data.goal = 1, 16, "none"
    data.batch_size, data.pool = 32, 4096
    data.text = Component(kind="hash", length=16, vocabulary=1024)

    def camera(name: str) -> Component:
        encoder = Component(
            kind="keypoints", features=(48, 64, 64), kernels=(4, 3, 3), strides=(4, 2, 1)
        )
        return Component(kind="image", cameras=(name,), film=True, encoder=encoder)

    model = config.model
    model.width, model.layers, model.attention_heads, model.mlp_width = 128, 2, 4, 512
    model.tokenizers = {
        "language": Component(kind="language", vocabulary=1024, pooled=True),
        "primary": camera("primary"),
        "wrist": camera("wrist"),
        "proprio": Component(kind="proprio"),
    }
    model.heads = {
        "action": Component(
            kind="flow",
            steps=5,
            network=Component(kind="mlp", blocks=2, expansion=2),
            samples_per_example=4,
            prefix=LONGEST,
        )
    }
    config.optim.learning_rate, config.optim.warmup, config.optim.ema = 1e-3, 100, 0.999
    config.train.steps, config.train.validate_every = 5000, 1000
    config.train.checkpoint_every, config.train.log_every = 5000, 200
    config.evaluate.execute, config.evaluate.splits = 2, ("train",)

    if args.debug:
        config.workdir, data.root = "runs/real-time-debug", "runs/real-time-debug/data"
        config.collect.skills, config.collect.episodes_per_shard = {"touch": 4}, 2
        config.train.steps, config.train.log_every, config.optim.warmup = 20, 5, 2
        config.train.validate_every, config.train.checkpoint_every = 10, 10
        config.train.validation_batches = 1
    return config
