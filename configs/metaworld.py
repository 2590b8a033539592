"""Meta-World: one policy from one camera (or two) and language, for ten tasks or for fifty.

    pip install --no-deps packaging 'metaworld>=3.1,<4'    # next to octolike[sim]; docs/install.md
    octolike collect --config metaworld:tasks=mt10
    octolike train --config metaworld:tasks=mt10
    octolike evaluate --run runs/metaworld-mt10 --suite metaworld_mt10
    ... --config metaworld:zoom=1.6,wrist=true,pixels=128,stride=2    to see more
    ... --config metaworld:tasks=mt50,size=27m,zoom=1.6,wrist=true,pixels=128,stride=2    for a GPU
    ... --config metaworld:seed=1               another training seed, on demonstrations of its own
    ... --config metaworld:debug                                a quick check

tasks: mt10, mt50, ml10 or ml45. The latter two are evaluated on held-out tasks by the suite of that
name. The goal is a ball of 3 pixels in an image of 96: zoom enlarges the middle (at 1.6 the objects
and goals of MT10 stay in view; the handle of an open window reaches the right edge), pixels is the
side of the images, wrist adds the camera on the hand; each has demonstrations and runs of its own.
Nothing has been evaluated with them yet; whether all of MT50 stays in view at 1.6 was not checked.
MT50 without them has 96 pixels and no zoom, too.
stride is that of the first convolution: 4 in the small network (2: four times the encoder's work),
2 in that of 27 M parameters, whatever the arguments.
`octolike train_arrays` trains from the same config without tensorflow and records the
demonstrations itself. RESULTS.md has the results.
"""

from octolike.config import Component, Config, ConfigError, base_config, parse_arg, unknown
from octolike.envs.metaworld.metaworld_tasks import benchmark

SIZES = ("cpu", "27m")
STRIDES = {"cpu": 4, "27m": 2}  # of the encoder's first convolution
DEMONSTRATIONS = 50  # of each task


def get_config(arg: str = "") -> Config:
    """Return the config; arguments: tasks, size, zoom, wrist, pixels, stride, seed, debug."""
    usual = {"zoom": 1.0, "wrist": False, "pixels": 96, "stride": 0}
    args = parse_arg(arg, tasks="mt10", size="cpu", seed=0, debug=False, **usual)
    if args.size not in SIZES:
        raise ConfigError(unknown("size", args.size, SIZES))
    stride = args.stride or STRIDES[args.size]
    if args.size == "27m" and stride != STRIDES["27m"]:
        raise ConfigError(f"stride is {stride}; the network of size=27m has 2, leave it out")
    view = f"-zoom{args.zoom:g}" * (args.zoom != 1) + "-wrist" * args.wrist
    view += f"-{args.pixels}px" * (args.pixels != 96)
    another = f"-{args.seed}" * (args.seed > 0)
    name = f"metaworld-{args.tasks}{view}" + f"-{args.size}" * (args.size != "cpu")
    name += f"-stride{stride}" * (stride != STRIDES[args.size]) + another
    config = Config(workdir=f"runs/{name}", seed=args.seed)
    config.collect.draw = args.seed
    config.environment = Component(kind="metaworld", primary_size=args.pixels)
    if args.zoom != 1:
        config.environment["zoom"] = args.zoom
    if args.wrist:
        config.environment["hand_size"] = args.pixels
    config.collect.dataset = "metaworld_wrist" if args.wrist else "metaworld"
    config.collect.skills = dict.fromkeys(benchmark(args.tasks).train, DEMONSTRATIONS)
    config.collect.episodes_per_shard = 25

    data = config.data
    data.root, data.mix = f"runs/metaworld-{args.tasks}{view}{another}/data", config.collect.dataset
    cameras = ("primary", "wrist") if args.wrist else ("primary",)
    data.cameras, data.tasks = dict.fromkeys(cameras, args.pixels), "label"
    data.window, data.horizon, data.goal = 1, 16, "none"
    data.pool, data.memory = 16_384, 8.0
    data.text = Component(kind="hash", length=16, vocabulary=1024)
    config.evaluate.splits, config.evaluate.execute = ("train", "held_out_phrasing"), 8
    config.evaluate.batch = 10
    (_large if args.size == "27m" else _small)(config, cameras)
    if args.size == "cpu":
        for camera in cameras:
            config.model.tokenizers[camera]["encoder"]["strides"] = (stride, 2, 1)

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


def _small(config: Config, cameras: tuple[str, ...]) -> None:
    """The network of configs/tabletop.py, with these cameras."""
    model, data, table = config.model, config.data, _tabletop()
    model.width, model.layers, model.attention_heads, model.mlp_width = 192, 3, 6, 768
    model.tokenizers, model.heads = table.model.tokenizers, table.model.heads
    model.tokenizers["language"]["width"] = 192
    if "wrist" not in cameras:
        del model.tokenizers["wrist"]
    data.batch_size = 32
    config.optim.learning_rate, config.optim.warmup, config.optim.ema = 1e-3, 500, 0.999
    config.train.steps, config.train.validate_every = 16_000, 2000
    config.train.checkpoint_every, config.train.log_every = 4000, 100


def _large(config: Config, cameras: tuple[str, ...]) -> None:
    """Octo-small's transformer, with an encoder that is asked by the instruction."""
    model, data = config.model, config.data
    model.width, model.layers, model.attention_heads, model.mlp_width = 384, 12, 6, 1536
    model.dtype = "bfloat16"
    model.tokenizers = {
        "language": Component(kind="language", vocabulary=1024, width=384),
        **{
            camera: Component(
                kind="image",
                cameras=(camera,),
                film=True,
                encoder=Component(kind="small_stem", patch=8, features=(32, 96, 192), width=384),
            )
            for camera in cameras
        },
        "proprio": Component(kind="proprio"),
    }
    model.heads = _tabletop().model.heads
    data.batch_size = 256
    config.optim.learning_rate, config.optim.warmup, config.optim.ema = 5e-4, 2000, 0.999
    config.train.steps, config.train.validate_every = 60_000, 5000
    config.train.checkpoint_every, config.train.log_every = 10_000, 100
    augment = config.train.augment
    augment.brightness, augment.contrast, augment.saturation = 0.1, 0.1, 0.1


def _tabletop() -> Config:
    return base_config("tabletop.py", "subtasks=false", relative_to=__file__)
