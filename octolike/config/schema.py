"""Every option of a run, once: type, default, meaning, and the values that it allows.

`Config.check` checks the options, then the rules between them.
"""

# No `from __future__ import annotations`: config_flags reads the fields' types, not their names.
from dataclasses import dataclass

from octolike.config.components import Component, check_types, choice, option, require


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Which episodes, and how they become batches."""

    root: str = option("", "directory (local or gs://) that holds the datasets' folders")
    roots: Component = option(Component, "dataset: directory of its own, where it is not root")
    mix: str = option("", "a name of data/specs/mixes.py, or 'dataset=weight,dataset=weight'")
    mix_weights: str = option("multipliers", "'multipliers' of a dataset's size, or 'shares'")
    specs: tuple[str, ...] = option(
        (), "Python files with rows of one's own: data/specs/catalog.py"
    )
    cameras: dict[str, int] = option(lambda: {"primary": 128}, "camera: side in pixels; [] none")
    depth: dict[str, int] = option(dict, "camera: side in pixels of its depth images")
    window: int = option(1, "W: frames of history, the present one included")
    horizon: int = option(4, "H: actions per chunk")
    use_proprio: bool = option(True, "observation.proprio in the batch")
    normalization: str = option(
        "normal", "'normal' (mean, std) or 'bounds' (1st to 99th percentile)"
    )
    text: Component = option(
        lambda: Component(kind="hash", length=16, vocabulary=4096),
        "instruction to token ids: octolike.text",
    )
    paraphrases: str = option("", "JSON file: {instruction: [other wordings, ...]}; '': none")
    uninformative_language: bool = option(
        False, "keep instructions that do not say what to do (marked in the dataset's row)"
    )
    tasks: str = option(
        "instruction", "what counts as a task: 'instruction', 'label' (of the row), or 'dataset'"
    )
    task_ids: bool = option(False, "tell the policy its task by number too: task.task_id")
    goal: str = option("uniform", "goal images: 'uniform' future frame, 'last' frame, or 'none'")
    keep_language: float = option(1.0, "probability that an example keeps its instruction")
    keep_goal: float = option(1.0, "probability that an example keeps its goal image")
    keep_task_id: float = option(1.0, "probability that an example keeps its task id")
    sampling: Component = option(
        lambda: Component(kind="mix"), "who is in a batch: octolike.data.pipeline.sampling"
    )
    batch_size: int = option(64, "B: examples per step")
    episodes: int = option(0, "use the first so many training episodes of each dataset; 0: all")
    limits: Component = option(Component, "dataset: so many episodes, in place of data.episodes")
    pool: int = option(512, "episodes whose frames are mixed with one another, of all datasets")
    memory: float = option(4.0, "GiB for episodes and batches held; makes the pool smaller")
    threads: int = option(0, "threads that read episodes; 0: one per core")
    prefetch: int = option(2, "batches made ahead")
    service: tuple[str, ...] = option(
        (), "'host:port' of the workers (scripts/serve_data.py) that make the batches; (): here"
    )
    train_split: str = option("train", "split to train on")
    validation_split: str = option("val", "held-out split; '' for none")
    bad_episodes: str = option(
        "error", "'error', or 'drop': leave out bad episodes, count and report them"
    )
    cache: str = option("", "where statistics are kept when a dataset's directory is read-only")

    def root_of(self, dataset: str) -> str:
        """Return the directory that holds a dataset's folder."""
        return self.roots.get(dataset, self.root)

    def move(self, root: str | None) -> None:
        """Look for every dataset below one directory, if one is given."""
        if root:
            self.root, self.roots = root, Component()

    def limit_of(self, dataset: str) -> int:
        """Return how many training episodes of a dataset are used; 0: all."""
        return self.limits.get(dataset, self.episodes)


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The transformer and its surroundings; `octolike.model.network` draws the whole."""

    width: int = option(256, "D: token width")
    layers: int = option(4, "transformer blocks")
    attention_heads: int = option(4, "attention heads per block")
    mlp_width: int = option(1024, "width of the feed-forward layer")
    dropout: float = option(0.0, "dropout rate in the transformer")
    dtype: str = option("float32", "compute type: 'float32' or 'bfloat16'; parameters stay float32")
    max_window: int = option(0, "timesteps with a position embedding; 0: data.window")
    remat: bool = option(False, "recompute each block's activations backwards: memory for time")
    repeat_task_tokens: bool = option(False, "show the task tokens again at every timestep")
    experts: Component = option(
        dict, "mixture of experts in the feed-forward: octolike.model.experts; {}: dense"
    )
    tokenizers: dict[str, Component] = option(dict, "token groups: octolike.model.tokenizers")
    readouts: dict[str, int] = option(lambda: {"action": 1}, "readout groups: number of tokens")
    registers: tuple[str, ...] = option(
        (), "readouts that observations look at too: tokens to keep things in for later timesteps"
    )
    heads: dict[str, Component] = option(dict, "action heads: octolike.model.heads")


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """The optimiser: AdamW."""

    learning_rate: float = option(3e-4, "peak learning rate")
    schedule: str = option("cosine", "'cosine' to zero, 'rsqrt', or 'constant', after the warm-up")
    warmup: int = option(200, "steps of linear warm-up")
    weight_decay: float = option(0.01, "decoupled weight decay, on kernels only")
    clip: float = option(1.0, "largest global gradient norm; 0: no clipping")
    b1: float = option(0.9, "decay of the first moment")
    b2: float = option(0.95, "decay of the second moment")
    frozen: tuple[str, ...] = option(
        (), "parameters that stay: patterns over paths, e.g. 'tokenizers_*'"
    )
    lora: tuple[str, ...] = option(
        (), "kernels that stay but for a low-rank change: patterns, e.g. 'transformer/*kernel'"
    )
    lora_rank: int = option(8, "rank of those changes")
    lora_scale: float = option(1.0, "factor of those changes: alpha / rank")
    ema: float = option(0.0, "decay of the averaged parameters that the policy uses; 0: none")
    accumulate: int = option(1, "parts of a batch computed one after the other: memory for time")
    surgery: str = option(
        "", "'pcgrad': gradients of 'train.groups' lose what conflicts with another's; '': no"
    )


@dataclass(kw_only=True, slots=True)
class AugmentConfig:
    """Image augmentation inside the step; one geometry per window, fresh colours per example."""

    crop_scale: tuple[float, float] = option(
        (1.0, 1.0), "area of the random resized crop, as a share"
    )
    crop_ratio: tuple[float, float] = option((1.0, 1.0), "aspect ratio of the crop")
    brightness: float = option(0.0, "largest shift, as a share of the range")
    contrast: float = option(0.0, "contrast factor in 1 ± this")
    saturation: float = option(0.0, "saturation factor in 1 ± this")
    hue: float = option(0.0, "largest turn of the hue circle, in turns")
    cameras: tuple[str, ...] = option((), "cameras whose geometry may change; () for all")


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """The loop."""

    steps: int = option(10_000, "optimiser steps")
    init_from: str = option("", "run directory whose parameters start this run; '': from scratch")
    init_step: int = option(0, "checkpoint of init_from; 0: the newest")
    fresh: tuple[str, ...] = option(
        (), "parameters that need not fit init_from: patterns; they start from scratch"
    )
    fsdp: int = option(1, "devices over which parameters and optimiser state are cut; 0: all")
    distributed: bool = option(False, "several processes: jax.distributed.initialize at the start")
    compilation_cache: str = option("", "directory of compiled steps; '': none is kept")
    groups: str = option(
        "dataset", "whose gradients are compared: 'dataset', 'task' or 'embodiment'"
    )
    conflicts_every: int = option(0, "steps between comparisons of the groups' gradients; 0: none")
    log_every: int = option(50, "steps between logged metrics")
    validate_every: int = option(1000, "steps between validations; 0: at the end only")
    validation_batches: int = option(8, "batches per validation and dataset")
    checkpoint_every: int = option(
        1000, "steps between checkpoints; one is always written at the end"
    )
    keep: int = option(2, "newest checkpoints kept")
    keep_every: int = option(0, "also keep the checkpoints at multiples of so many steps; 0: none")
    keep_best: str = option(
        "", "also keep the best by a validation number: 'action_error' or 'loss'; '': none"
    )
    wandb: str = option("", "project of Weights & Biases, where that is installed; '': none")
    augment: AugmentConfig = option(AugmentConfig, "image augmentation")


@dataclass(kw_only=True, slots=True)
class CollectConfig:
    """Demonstrations made by a simulator's scripted experts: scripts/collect.py."""

    dataset: str = option("tabletop", "name of the dataset to write, under data.root")
    skills: dict[str, int] = option(dict, "skill: training episodes")
    split: str = option("train", "split of the environment's tasks that is demonstrated")
    validation_share: float = option(
        0.05, "validation episodes, as a share of the training episodes"
    )
    noise: float = option(
        0.5, "how much the executed actions stray from the expert's; 0: not at all"
    )
    episodes_per_shard: int = option(50, "episodes per TFRecord file")
    workers: int = option(0, "processes; 0: one per core")


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """Closed-loop episodes: scripts/evaluate.py."""

    episodes: int = option(20, "episodes per skill and split")
    splits: tuple[str, ...] = option(("train",), "splits of the environment's tasks")
    skills: tuple[str, ...] = option((), "skills; () for all that were collected")
    tell: tuple[str, ...] = option(
        ("language",), "how the policy is told its task: any of 'language', 'goal', 'task_id'"
    )
    execute: int = option(1, "actions of each chunk that are executed before the next is asked for")
    ensemble: float = option(
        0.0, "temporal ensembling: older predictions weigh exp(-this · age); 0: off"
    )
    videos: int = option(2, "videos per skill and split, of successes and of failures")
    embodiment: str = option("", "the robot, of those that the run knows; '': it has one")
    untrained: bool = option(True, "also evaluate the same network before training, as the floor")
    batch: int = option(16, "environments stepped together; one policy call serves them all")
    workers: int = option(0, "processes; 0: one per core")
    seed: int = option(1_000_000, "first episode's seed; collection counts from 0")


@dataclass(kw_only=True, slots=True)
class Config:
    """One run."""

    workdir: str = option("", "where everything of this run is written")
    seed: int = option(0, "seeds parameters, data order, augmentation and noise")
    data: DataConfig = option(DataConfig, "episodes to batches")
    model: ModelConfig = option(ModelConfig, "the policy network")
    optim: OptimConfig = option(OptimConfig, "the optimiser")
    train: TrainConfig = option(TrainConfig, "the loop")
    environment: Component = option(dict, "simulator: octolike.envs; {} for none")
    collect: CollectConfig = option(CollectConfig, "demonstrations")
    evaluate: EvaluateConfig = option(EvaluateConfig, "closed-loop evaluation")

    def check(self) -> None:
        """Raise ConfigError for the first group of settings that do not fit each other."""
        check_types(self, "config")
        d, m, o, t = self.data, self.model, self.optim, self.train
        choice("data.mix_weights", d.mix_weights, ("multipliers", "shares"))
        choice("data.normalization", d.normalization, ("normal", "bounds"))
        choice("data.goal", d.goal, ("uniform", "last", "none"))
        choice("data.tasks", d.tasks, ("instruction", "label", "dataset"))
        choice("data.bad_episodes", d.bad_episodes, ("error", "drop"))
        choice("model.dtype", m.dtype, ("float32", "bfloat16"))
        choice("optim.schedule", o.schedule, ("cosine", "rsqrt", "constant"))
        choice("optim.surgery", o.surgery, ("", "pcgrad"))
        choice("train.groups", t.groups, ("dataset", "task", "embodiment"))
        choice("train.keep_best", t.keep_best, ("", "action_error", "loss"))
        for way in self.evaluate.tell:
            choice("evaluate.tell", way, ("language", "goal", "task_id"))
        for name, value, low in (
            ("data.window", d.window, 1),
            ("data.horizon", d.horizon, 1),
            ("data.batch_size", d.batch_size, 1),
            ("data.pool", d.pool, 1),
            ("data.prefetch", d.prefetch, 0),
            ("train.steps", t.steps, 1),
            ("train.conflicts_every", t.conflicts_every, 0),
            ("train.log_every", t.log_every, 1),
            ("train.validate_every", t.validate_every, 0),
            ("train.checkpoint_every", t.checkpoint_every, 1),
            ("train.keep", t.keep, 1),
            ("train.keep_every", t.keep_every, 0),
            ("train.fsdp", t.fsdp, 0),
            ("optim.accumulate", o.accumulate, 1),
            ("optim.lora_rank", o.lora_rank, 1),
            ("model.layers", m.layers, 1),
            ("evaluate.execute", self.evaluate.execute, 1),
            ("evaluate.episodes", self.evaluate.episodes, 1),
            ("evaluate.batch", self.evaluate.batch, 1),
        ):
            require(value >= low, f"{name} is {value}; it must be at least {low}")
        require(
            t.validation_batches >= 1,
            f"train.validation_batches is {t.validation_batches}; it must be at least 1. For no "
            "validation: data.validation_split=''",
        )
        require(d.memory > 0, f"data.memory is {d.memory} GiB; it must be positive")
        for name, value in (
            ("data.keep_language", d.keep_language),
            ("data.keep_goal", d.keep_goal),
            ("data.keep_task_id", d.keep_task_id),
            ("model.dropout", m.dropout),
            ("optim.ema", o.ema),
            ("collect.validation_share", self.collect.validation_share),
        ):
            require(0 <= value <= 1, f"{name} is {value}; it must lie in [0, 1]")
        require(
            m.max_window == 0 or m.max_window >= d.window,
            f"model.max_window {m.max_window} is smaller than data.window {d.window}",
        )
        require(
            m.width % m.attention_heads == 0,
            f"model.width {m.width} is no multiple of model.attention_heads {m.attention_heads}",
        )
        require(
            self.evaluate.execute <= d.horizon,
            f"evaluate.execute {self.evaluate.execute} exceeds the chunk, data.horizon {d.horizon}",
        )
        for address in d.service:
            host, _, port = address.rpartition(":")
            require(
                bool(host) and port.isdecimal() and d.service.count(address) == 1,
                f"data.service names {address!r}; expected different 'host:port', for several "
                "--config.data.service=\"('host1:7070', 'host2:7070')\"",
            )
        for name, tokenizer in m.tokenizers.items():
            if "vocabulary" in tokenizer and "vocabulary" in d.text:
                ours, theirs = tokenizer["vocabulary"], d.text["vocabulary"]
                require(
                    ours == theirs,
                    f"model.tokenizers.{name}.vocabulary {ours} differs from "
                    f"data.text.vocabulary {theirs}",
                )
            require(
                tokenizer.get("kind") != "task_id" or d.task_ids,
                f"model.tokenizers.{name} tells the policy its task by number, but data.task_ids "
                "is off",
            )
        require(
            d.batch_size % o.accumulate == 0,
            f"data.batch_size {d.batch_size} does not divide into optim.accumulate {o.accumulate} "
            "equal parts",
        )
        require(o.warmup <= t.steps, f"optim.warmup {o.warmup} exceeds train.steps {t.steps}")
        require(bool(self.workdir), "workdir is empty; name one, e.g. --config.workdir=runs/mine")
