"""The full-size run on the simulated table: under an hour on two cores.

    octolike collect --config tabletop
    octolike train --config tabletop
    octolike evaluate --run runs/tabletop
    ... --config tabletop:debug      seconds, a quick check

RESULTS.md has the results.
"""

from octolike.config import Component, Config, parse_arg


def get_config(arg: str = "") -> Config:
    """Return the config; arguments: debug."""
    args = parse_arg(arg, debug=False)
    config = Config(workdir="runs/tabletop")
    config.environment = Component(kind="tabletop", primary_size=64, wrist_size=48)
    config.collect.skills = {"touch": 800, "push": 800, "lift": 800, "put": 2400, "stack": 1200}
    config.collect.validation_share, config.collect.episodes_per_shard = 0.02, 200

    data = config.data
    data.root, data.mix = "runs/tabletop/data", "tabletop"
    data.cameras = {"primary": 64, "wrist": 48}
    data.window, data.horizon, data.goal = 1, 8, "none"
    data.batch_size, data.pool, data.memory = 32, 16_384, 8.0
    data.text = Component(kind="hash", length=16, vocabulary=1024)

    def camera(name: str) -> Component:
        encoder = Component(
            kind="keypoints",
            features=(48, 96, 96),
            kernels=(4, 3, 3),
            strides=(4, 2, 1),
            keypoints=32,
        )
        return Component(kind="image", cameras=(name,), film=True, encoder=encoder)

    model = config.model
    model.width, model.layers, model.attention_heads, model.mlp_width = 192, 3, 6, 768
    model.tokenizers = {
        "language": Component(kind="language", vocabulary=1024, pooled=True),
        "primary": camera("primary"),
        "wrist": camera("wrist"),
        "proprio": Component(kind="proprio"),
    }
    model.heads = {
        "action": Component(
            kind="diffusion",
            steps=20,
            network=Component(kind="mlp", blocks=2, expansion=2),
            samples_per_example=4,
            prediction="sample",
            sampler="ddim",
            inference_steps=10,
        )
    }
    config.optim.learning_rate, config.optim.warmup, config.optim.ema = 1e-3, 500, 0.999
    config.train.steps, config.train.validate_every = 12_000, 2000
    config.train.checkpoint_every, config.train.keep = 2000, 8
    config.train.log_every = 100
    config.evaluate.execute = 2
    config.evaluate.episodes = 50
    config.evaluate.splits = (
        "train",
        "held_out_combination",
        "held_out_phrasing",
        "held_out_family",
    )

    if args.debug:
        config.workdir = "runs/tabletop-debug"
        data.root = "runs/tabletop-debug/data"
        config.collect.skills = {"touch": 4, "put": 2}
        config.collect.episodes_per_shard = 2
        data.batch_size, model.width, model.layers, model.mlp_width = 4, 48, 1, 64
        config.train.steps, config.train.log_every, config.optim.warmup = 20, 5, 2
        config.train.validate_every, config.train.checkpoint_every = 10, 10
        config.train.validation_batches = 1
        config.evaluate.episodes, config.evaluate.splits = 2, ("train",)
    return config
