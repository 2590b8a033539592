"""Bridge V2 from an RLDS directory, local or gs://, that holds bridge_dataset/1.0.0.

    octolike train --config bridge --config.data.root=DIR
    ... --config bridge:debug    a tiny network and 40 steps, on the same data

The full config has the size of Octo-small (27 M parameters) with goal images and language, for an
accelerator.
"""

from octolike.config import Component, Config, parse_arg


def get_config(arg: str = "") -> Config:
    """Return the config; arguments: debug."""
    args = parse_arg(arg, debug=False)
    config = Config(workdir="runs/bridge")

    data = config.data
    data.root, data.mix = "data", "bridge_dataset"
    data.cameras = {"primary": 256}
    data.window, data.horizon, data.goal = 2, 4, "uniform"
    data.keep_language, data.keep_goal = 0.7, 0.7
    data.batch_size, data.pool = 256, 2048
    data.text = Component(kind="hash", length=16, vocabulary=8192)

    model = config.model
    model.width, model.layers, model.attention_heads, model.mlp_width = 384, 12, 6, 1536
    model.dtype = "bfloat16"
    model.tokenizers = {
        "language": Component(kind="language", vocabulary=8192, width=384),
        "primary": Component(
            kind="image",
            cameras=("primary",),
            goal=True,
            encoder=Component(kind="small_stem", patch=16),
        ),
        "proprio": Component(kind="proprio"),
    }
    model.heads = {"action": Component(kind="diffusion", steps=20)}

    config.optim.learning_rate, config.optim.warmup = 3e-4, 2000
    config.optim.ema = 0.999
    config.train.steps, config.train.validate_every, config.train.checkpoint_every = (
        300_000,
        5000,
        5000,
    )
    augment = config.train.augment
    augment.crop_scale, augment.crop_ratio = (0.8, 1.0), (0.9, 1.1)
    augment.brightness, augment.contrast, augment.saturation, augment.hue = 0.1, 0.1, 0.1, 0.05

    if args.debug:
        config.workdir = "runs/bridge-debug"
        data.cameras, data.batch_size, data.pool = {"primary": 64}, 8, 32
        model.width, model.layers, model.attention_heads, model.mlp_width = 32, 1, 2, 64
        model.dtype = "float32"
        model.tokenizers["language"]["width"] = 32
        model.tokenizers["primary"]["encoder"] = Component(
            kind="small_stem", features=(8, 16, 32), groups=4, patch=16, width=64
        )
        network = Component(kind="mlp", hidden=32, blocks=1)
        model.heads = {"action": Component(kind="diffusion", steps=5, network=network)}
        config.optim.warmup = 5
        config.train.steps, config.train.log_every = 40, 10
        config.train.validate_every, config.train.checkpoint_every = 20, 20
        config.train.validation_batches = 1
    return config
