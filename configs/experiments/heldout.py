"""Held-out tasks: zero-shot, and after five to fifty demonstrations.

    octolike collect --config heldout
    octolike collect --config heldout:variant=default_50     the held-out task
    octolike compare --config heldout                        every variant
    ... --config heldout:debug                               a quick check

`default` learns touching, pushing and lifting with language, `no_language` the same without, and
`single` lifting alone, from the same demonstrations in equal steps; each is evaluated on seen and
held-out tasks. `<variant>_<n>` finetunes it with n demonstrations of lifting balls, which training
holds out; `scratch_<n>` trains on those alone. A source must be trained before its finetuned
variants: name it first in --variants. Expect runs/heldout/comparison.md; a run takes two to four
minutes on one core, finetuning about one. RESULTS.md has the results.
"""

from octolike.config import (
    Component,
    Config,
    ConfigError,
    OptimConfig,
    base_config,
    parse_arg,
    unknown,
)

SKILLS = {"touch": 400, "push": 400, "lift": 400}
COUNTS = (5, 10, 20, 50)
SOURCES = ("default", "no_language", "single")
TARGET = "tabletop_target"
SPLIT = "held_out_family"  # where octolike compare compares the variants
VARIANTS = (*SOURCES, *(f"{s}_{n}" for n in COUNTS for s in (*SOURCES, "scratch")))


def get_config(arg: str = "") -> Config:
    """Return the config; arguments: variant, seed, debug."""
    args = parse_arg(arg, variant="default", seed=0, debug=False)
    if args.variant not in VARIANTS:
        raise ConfigError(unknown("variant", args.variant, VARIANTS))
    runs = "runs/heldout-debug" if args.debug else "runs/heldout"
    source, _, count = (
        args.variant.rpartition("_") if args.variant[-1].isdigit() else (args.variant, "", "")
    )
    conditioning = "variant=no_conditioning" if source == "no_language" else ""
    config = base_config("compare.py", conditioning, relative_to=__file__)
    config.data.root, config.collect.skills = f"{runs}/data", dict(SKILLS)
    config.workdir, config.seed = f"{runs}/{args.variant}-{args.seed}", args.seed
    config.evaluate.skills = ("touch", "push", "lift")
    config.evaluate.splits = (
        "train",
        "held_out_combination",
        "held_out_phrasing",
        "held_out_family",
    )
    if source == "single":
        only = ((0, {"lift/*": 1.0}),)
        config.data.sampling = Component(kind="curriculum", over="task", stages=only)
        config.evaluate.skills = ("lift",)
    if count:
        few(config, f"{runs}/{source}-{args.seed}" if source != "scratch" else "", int(count))
    if args.debug:
        small(config)
    return config


def few(config: Config, source: str, count: int) -> None:
    """Train on `count` demonstrations of a held-out task; source: a run to finetune, "": none."""
    config.data.mix, config.data.episodes = TARGET, count
    config.data.sampling = Component(kind="mix")
    config.train.init_from, config.train.steps = source, 400
    config.train.checkpoint_every = 400
    config.optim = OptimConfig(learning_rate=3e-4, warmup=50, ema=0.99)
    config.collect.dataset, config.collect.split = TARGET, "held_out_family"
    config.collect.skills, config.collect.validation_share = {"lift": max(COUNTS)}, 0.2
    config.collect.episodes_per_shard = 10
    config.evaluate.splits, config.evaluate.skills = ("train", "held_out_family"), ("lift",)


def small(config: Config) -> None:
    """Shrink the run to a few seconds."""
    config.collect.skills = dict.fromkeys(config.collect.skills, 2)
    config.collect.episodes_per_shard, config.evaluate.episodes = 2, 1
    config.data.batch_size, config.train.steps, config.train.log_every = 4, 20, 5
    config.optim.warmup, config.train.validation_batches = 2, 1
