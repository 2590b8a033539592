"""Finetune a run: by default the quick start's policy, on fifty demonstrations of putting.

    octolike collect --config finetune
    octolike finetune --config finetune:mode=lora
    ... --config finetune:checkpoint=runs/octo,head=l1
        --config.data.specs=my_robot.py --config.data.mix=my_robot

Arguments: checkpoint; mode (full, head, readouts, frozen_vision, frozen_language, lora); head (a
kind, or 'fresh' for the same one from scratch, as other action dimensions need); camera=name:side
adds one; proprio=add, drop or fresh (another robot's); window, horizon. RESULTS.md has results of
few demonstrations.
"""

from types import SimpleNamespace

from octolike.config import (
    Component,
    Config,
    ConfigError,
    DataConfig,
    OptimConfig,
    TrainConfig,
    base_config,
    parse_arg,
    stored_config,
    unknown,
)

MODES = ("full", "head", "readouts", "frozen_vision", "frozen_language", "lora")
HEADS, READOUTS = ("!heads_*",), ("!heads_*", "!readout_*")
# The data settings that shape the network and its inputs are taken from the run.
SHAPING = ("cameras", "depth", "window", "horizon", "use_proprio", "text", "goal")
SHAPING += ("normalization", "representation", "proprio_representation", "resize", "subtasks")
SHAPING += ("closings",)


def get_config(arg: str = "") -> Config:
    """Return the config; arguments: above, and debug."""
    args = parse_arg(
        arg,
        checkpoint="",
        mode="full",
        head="",
        camera="",
        proprio="",
        window=0,
        horizon=0,
        debug=False,
    )
    config = source(args)
    old, config.data = config.data, DataConfig(root="runs/finetune/data", mix="tabletop_target")
    for name in SHAPING:
        setattr(config.data, name, getattr(old, name))
    config.data.batch_size, config.data.pool = old.batch_size, old.pool
    config.data.tasks, config.data.task_ids = old.tasks, old.task_ids
    init_from = args.checkpoint or ("runs/quickstart-debug" if args.debug else "runs/quickstart")
    config.workdir = f"runs/finetune/{args.mode}"
    config.train = TrainConfig(init_from=init_from, steps=2000, validate_every=500, log_every=100)
    config.optim = OptimConfig(learning_rate=3e-4, warmup=100, ema=config.optim.ema)
    config.collect.dataset, config.collect.skills = "tabletop_target", {"put": 50}
    config.collect.episodes_per_shard, config.collect.validation_share = 10, 0.2

    change(config, args)
    freeze(config, args.mode)
    if args.debug:
        config.workdir, config.data.root = "runs/finetune-debug", "runs/finetune-debug/data"
        config.collect.skills, config.collect.episodes_per_shard = {"put": 2}, 2
        config.train.steps, config.train.log_every, config.optim.warmup = 20, 5, 2
        config.train.validate_every, config.train.validation_batches = 10, 1
        config.data.batch_size = 4
    return config


def source(args: SimpleNamespace) -> Config:
    """Return the config of the run to start from."""
    if args.checkpoint:
        return stored_config(args.checkpoint)
    return base_config("quickstart.py", "debug" if args.debug else "", relative_to=__file__)


def change(config: Config, args: SimpleNamespace) -> None:
    """Change the network as the arguments ask; new parameters are reinitialised."""
    data, model, fresh = config.data, config.model, []
    if args.head:
        kind = model.heads["action"]["kind"] if args.head == "fresh" else args.head
        if args.head != "fresh":
            model.heads = {"action": Component(kind=kind)}
        fresh.append("heads_*")
    if args.camera:
        name, _, side = args.camera.partition(":")
        likely = [t for t in model.tokenizers.values() if t["kind"] == "image"]
        if not side.isdigit() or name in data.cameras or name in model.tokenizers or not likely:
            raise ConfigError(
                f"camera={args.camera!r}: expected name:pixels of a camera that the run does not "
                f"have ({', '.join(data.cameras)}), and an image tokenizer to copy"
            )
        data.cameras = {**data.cameras, name: int(side)}
        model.tokenizers[name] = Component({**likely[0], "cameras": (name,)})
        fresh += [f"tokenizers_{name}/*", f"obs_{name}_*"]
    if args.proprio not in ("", "add", "drop", "fresh"):
        raise ConfigError(unknown("value of proprio", args.proprio, ("add", "drop", "fresh")))
    inputs = [k for k, t in model.tokenizers.items() if t["kind"] == "proprio"]
    if args.proprio == "fresh":
        if not inputs:
            raise ConfigError("proprio=fresh: the run has no proprio; use proprio=add")
        fresh += [f"obs_{name}_*" for name in inputs]
        readers = [k for k, t in model.tokenizers.items() if t["kind"] == "subtask"]
        fresh += [f"tokenizers_{name}/reader/hidden/*" for name in readers]
    if args.proprio == "add":
        data.use_proprio, model.tokenizers["proprio"] = True, Component(kind="proprio")
        fresh.append("obs_proprio_*")
    config.train.reinit = tuple(fresh)
    if args.proprio == "drop":
        data.use_proprio = False
        model.tokenizers = {k: t for k, t in model.tokenizers.items() if k not in inputs}
        config.train.reinit += tuple(f"*_{name}*" for name in inputs)
        for name, tokenizer in model.tokenizers.items():
            if tokenizer["kind"] == "subtask":
                model.tokenizers[name] = Component({**tokenizer, "proprio": False})
    if args.window:
        model.max_window = max(model.max_window, data.window)
        if args.window > model.max_window:
            model.max_window = args.window
            config.train.reinit += ("*_pos_embedding",)
        data.window = args.window
    data.horizon = args.horizon or data.horizon
    config.evaluate.execute = min(config.evaluate.execute, data.horizon)


def freeze(config: Config, mode: str) -> None:
    """Freeze parameters by `mode`; reinitialised ones are always trained."""
    tokenizers, fresh = config.model.tokenizers, config.train.reinit
    named = lambda kind: tuple(
        f"tokenizers_{k}/*" for k, t in tokenizers.items() if t["kind"] == kind
    )
    if mode not in MODES:
        raise ConfigError(unknown("mode", mode, MODES))
    frozen = {
        "full": (),
        "head": ("*", *HEADS),
        "readouts": ("*", *READOUTS),
        "lora": ("*", *READOUTS),
        "frozen_vision": named("image"),
        "frozen_language": named("language") + named("subtask"),
    }[mode]
    # A dropped tokenizer has no parameters to train.
    there = tuple(f"!{p}" for p in fresh if not p.startswith("*_") or p == "*_pos_embedding")
    config.optim.frozen = frozen + (there if frozen else ())
    if mode == "lora":  # of experts, too, but not of their router, which is small
        gates = ("!*/experts/gate/kernel",) if config.model.experts else ()
        config.optim.lora = ("transformer/*kernel", *gates)
