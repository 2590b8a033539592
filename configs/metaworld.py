"""Meta-World: one policy from one camera and language, for ten tasks or for fifty.

    pip install packaging imageio scipy && pip install --no-deps 'metaworld>=3.1,<4'
    octolike collect --config metaworld:tasks=mt10
    octolike train --config metaworld:tasks=mt10
    octolike evaluate --run runs/metaworld-mt10 --suite metaworld_mt10
    ... --config metaworld:tasks=mt50,size=27m                  for a GPU
    ... --config metaworld:debug                                a quick check

tasks: mt10, mt50, ml10 or ml45. The latter two are evaluated on held-out tasks by the suite of that
name. `octolike train_arrays` trains from the same config without tensorflow and records the
demonstrations itself. RESULTS.md has the results.
"""

from octolike.config import Component, Config, ConfigError, base_config, parse_arg, unknown
from octolike.envs.metaworld.metaworld_tasks import benchmark

SIZES = ("cpu", "27m")
DEMONSTRATIONS = 50  # of each task


def get_config(arg: str = "") -> Config:
    """Return the config; arguments: tasks, size, debug."""
    args = parse_arg(arg, tasks="mt10", size="cpu", debug=False)
    if args.size not in SIZES:
        raise ConfigError(unknown("size", args.size, SIZES))
    name = f"metaworld-{args.tasks}" + (f"-{args.size}" if args.size != "cpu" else "")
    config = Config(workdir=f"runs/{name}")
    config.environment = Component(kind="metaworld", primary_size=96)
    config.collect.dataset = "metaworld"
    config.collect.skills = dict.fromkeys(benchmark(args.tasks).train, DEMONSTRATIONS)
    config.collect.episodes_per_shard = 25

    data = config.data
    data.root, data.mix = f"runs/metaworld-{args.tasks}/data", "metaworld"
    data.cameras, data.tasks = {"primary": 96}, "label"
    data.window, data.horizon, data.goal = 1, 16, "none"
    data.pool, data.memory = 16_384, 8.0
    data.text = Component(kind="hash", length=16, vocabulary=1024)
    config.evaluate.splits, config.evaluate.execute = ("train", "held_out_phrasing"), 8
    config.evaluate.batch = 10
    (_large if args.size == "27m" else _small)(config)

    if args.debug:
        config.workdir, data.root = f"runs/{name}-debug", f"runs/{name}-debug/data"
        config.collect.skills = dict.fromkeys(benchmark(args.tasks).train[:2], 2)
        config.collect.episodes_per_shard = 2
        data.batch_size, config.model.width, config.model.layers = 4, 48, 1
        config.model.attention_heads, config.model.mlp_width = 6, 64
        config.model.tokenizers["language"]["width"] = 48
        config.model.dtype = "float32"
        config.train.steps, config.train.log_every, config.optim.warmup = 20, 5, 2
        config.train.validate_every, config.train.checkpoint_every = 10, 10
        config.train.validation_batches = 1
        config.evaluate.episodes, config.evaluate.splits = 1, ("train",)
    return config


def _small(config: Config) -> None:
    """The network of configs/tabletop.py, with one camera."""
    model, data, table = config.model, config.data, base_config("tabletop.py", relative_to=__file__)
    model.width, model.layers, model.attention_heads, model.mlp_width = 192, 3, 6, 768
    model.tokenizers, model.heads = table.model.tokenizers, table.model.heads
    model.tokenizers["language"]["width"] = 192
    del model.tokenizers["wrist"]
    data.batch_size = 32
    config.optim.learning_rate, config.optim.warmup, config.optim.ema = 1e-3, 500, 0.999
    config.train.steps, config.train.validate_every = 16_000, 2000
    config.train.checkpoint_every, config.train.log_every = 4000, 100


def _large(config: Config) -> None:
    """Octo-small's transformer, with an encoder that is asked by the instruction."""
    model, data = config.model, config.data
    model.width, model.layers, model.attention_heads, model.mlp_width = 384, 12, 6, 1536
    model.dtype = "bfloat16"
    model.tokenizers = {
        "language": Component(kind="language", vocabulary=1024, width=384),
        "primary": Component(
            kind="image",
            cameras=("primary",),
            film=True,
            encoder=Component(kind="small_stem", patch=8, features=(32, 96, 192), width=384),
        ),
        "proprio": Component(kind="proprio"),
    }
    model.heads = base_config("tabletop.py", relative_to=__file__).model.heads
    data.batch_size = 256
    config.optim.learning_rate, config.optim.warmup, config.optim.ema = 5e-4, 2000, 0.999
    config.train.steps, config.train.validate_every = 60_000, 5000
    config.train.checkpoint_every, config.train.log_every = 10_000, 100
    augment = config.train.augment
    augment.brightness, augment.contrast, augment.saturation = 0.1, 0.1, 0.1
