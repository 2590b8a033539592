"""LIBERO: one policy for a suite, or for all, from demonstrations of the scripted experts.

    pip install 'octolike[libero]'
    octolike collect --config libero:suite=object
    octolike train --config libero:suite=object
    octolike evaluate --run runs/libero-object --suite libero_object
    ... --suite libero_object_pro                   other words, objects, positions, goals
    octolike train --config libero:suite=all        when object, spatial and goal are collected
    ... --config libero:suite=all,size=27m          for a GPU; on the public conversions with
        --config.data.root=DIR --config.data.mix=libero
    ... --config libero:debug                       a quick check

suite: object, spatial, goal (those of its tasks that have an expert) or all. The demonstrations
have the layout of the public conversions libero_*_no_noops, and their specs read them. Scores of
policies trained on them are not comparable with published ones: the demonstrations are others; the
report says so.
docs/libero.md has the yields of the experts.
"""

from octolike.config import Component, Config, ConfigError, base_config, parse_arg, unknown
from octolike.envs.libero.libero_tasks import DEMONSTRATED

SIZES = ("cpu", "27m")
DEMONSTRATIONS = 50  # of each task


def get_config(arg: str = "") -> Config:
    """Return the config; arguments: suite, size, demos, debug."""
    args = parse_arg(arg, suite="object", size="cpu", demos=DEMONSTRATIONS, debug=False)
    suites = ("object", "spatial", "goal")
    if args.suite not in (*suites, "all"):
        raise ConfigError(unknown("suite", args.suite, (*suites, "all")))
    if args.size not in SIZES:
        raise ConfigError(unknown("size", args.size, SIZES))
    name = f"libero-{args.suite}" + (f"-{args.size}" if args.size != "cpu" else "")
    # The table's network and optimizer.
    config = base_config("tabletop.py", "subtasks=false", relative_to=__file__)
    config.workdir = f"runs/{name}"
    # As large as the stored images, so the policy resizes both alike.
    config.environment = Component(kind="libero", primary_size=256, wrist_size=256)
    chosen = suites if args.suite == "all" else (args.suite,)
    skills = [s for s in DEMONSTRATED if s.split("/")[0] in chosen]
    # A dataset for each suite, as the public ones; "all" collects none.
    config.collect.skills = {} if args.suite == "all" else dict.fromkeys(skills, args.demos)
    config.collect.dataset = f"libero_{chosen[0]}_no_noops"
    config.collect.validation_share, config.collect.episodes_per_shard = 0.04, 10

    data, model = config.data, config.model
    data.root, data.mix = "runs/libero-data", ",".join(f"libero_{s}_no_noops" for s in chosen)
    data.cameras = {"primary": 128, "wrist": 64}
    data.window, data.horizon, data.goal = 1, 16, "none"
    data.batch_size, data.pool, data.memory = 32, 8192, 8.0
    data.text = Component(kind="hash", length=24, vocabulary=2048)
    model.tokenizers["language"]["vocabulary"] = 2048
    config.train.steps, config.train.validate_every = 16_000, 2000
    config.train.checkpoint_every, config.train.log_every = 4000, 100
    config.evaluate.execute, config.evaluate.release, config.evaluate.episodes = 8, 0, 50
    config.evaluate.splits, config.evaluate.batch = ("train",), 10
    config.evaluate.skills = tuple(skills)
    if args.size == "27m":
        _large(config)
    if args.debug:
        _debug(config, skills)
    return config


def _large(config: Config) -> None:
    """Octo-small's transformer on images of 256 and 128 pixels."""
    data, model = config.data, config.model
    data.cameras, data.batch_size, data.pool = {"primary": 256, "wrist": 128}, 256, 65_536
    model.width, model.layers, model.attention_heads, model.mlp_width = 384, 12, 6, 1536
    model.dtype = "bfloat16"
    model.tokenizers = {
        "language": Component(kind="language", vocabulary=2048, width=384),
        **{
            camera: Component(
                kind="image",
                cameras=(camera,),
                film=True,
                encoder=Component(kind="small_stem", patch=16, features=(32, 96, 192), width=384),
            )
            for camera in ("primary", "wrist")
        },
        "proprio": Component(kind="proprio"),
    }
    config.optim.learning_rate, config.optim.warmup, config.optim.ema = 5e-4, 2000, 0.999
    config.train.steps, config.train.validate_every = 60_000, 5000
    config.train.checkpoint_every = 10_000
    augment = config.train.augment
    augment.brightness, augment.contrast, augment.saturation = 0.1, 0.1, 0.1


def _debug(config: Config, skills: list[str]) -> None:
    data, model = config.data, config.model
    config.workdir += "-debug"
    data.root = f"{config.workdir}/data"
    config.collect.skills, config.collect.validation_share = dict.fromkeys(skills[:1], 2), 0.5
    config.evaluate.skills = tuple(skills[:1])
    config.collect.episodes_per_shard = 1
    data.cameras, data.batch_size = {"primary": 64, "wrist": 32}, 4
    model.width, model.layers, model.mlp_width, model.dtype = 48, 1, 64, "float32"
    model.attention_heads = 6
    model.tokenizers["language"]["width"] = 48
    config.train.steps, config.train.log_every, config.optim.warmup = 20, 5, 2
    config.train.validate_every, config.train.checkpoint_every = 10, 10
    config.train.validation_batches = 1
    config.evaluate.episodes, config.evaluate.batch = 1, 1
