"""Two arms hand a cube over (gym-aloha's scenes): fourteen joints from one camera, on a CPU.

    python scripts/collect.py --config configs/aloha.py
    python scripts/train.py --config configs/aloha.py
    python scripts/evaluate.py --run runs/aloha --suite aloha_transfer_cube
    ... --config configs/aloha.py:debug      seconds, to see that all is wired

Expect a minute or two per ten demonstrations and core: an episode has up to 300 steps.
"""

from octolike.config import Component, Config, parse_arg


def get_config(arg: str = "") -> Config:
    """Return the config; arguments: debug."""
    args = parse_arg(arg, debug=False)
    config = Config(workdir="runs/aloha")
    config.environment = Component(kind="aloha", primary_size=96)
    config.collect.dataset, config.collect.skills = "aloha", {"transfer_cube": 50}
    config.collect.validation_share, config.collect.episodes_per_shard = 0.04, 10

    data = config.data
    data.root, data.mix = "runs/aloha/data", "aloha"
    data.cameras = {"primary": 96}
    data.window, data.horizon, data.goal = 1, 25, "none"
    data.batch_size, data.pool, data.memory = 32, 8000, 4.0
    data.text = Component(kind="hash", length=20, vocabulary=1024)

    model = config.model
    model.width, model.layers, model.attention_heads, model.mlp_width = 192, 3, 6, 768
    encoder = Component(
        kind="keypoints", features=(48, 96, 96), kernels=(4, 3, 3), strides=(4, 2, 1), keypoints=32
    )
    model.tokenizers = {
        "language": Component(kind="language", vocabulary=1024, pooled=True),
        "primary": Component(kind="image", cameras=("primary",), film=True, encoder=encoder),
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
    config.train.checkpoint_every, config.train.keep = 2000, 4
    config.evaluate.execute, config.evaluate.episodes = 12, 50
    config.evaluate.splits = ("train",)

    if args.debug:
        config.workdir = "runs/aloha-debug"
        data.root = "runs/aloha-debug/data"
        config.collect.skills, config.collect.episodes_per_shard = {"transfer_cube": 2}, 1
        data.batch_size, model.width, model.layers, model.mlp_width = 4, 48, 1, 64
        config.train.steps, config.train.log_every, config.optim.warmup = 20, 5, 2
        config.train.validate_every, config.train.checkpoint_every = 10, 10
        config.train.validation_batches = 1
        config.evaluate.episodes = 1
    return config
