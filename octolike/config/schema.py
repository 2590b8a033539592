"""Every option of a run, once: type, default, meaning and the values that it allows.

`Config.check` checks each option, then the rules between options.
"""

# No `from __future__ import annotations`: config_flags reads the fields' types, not their names.
from dataclasses import dataclass

from octolike.config.components import Component, check_fields, option, require, unknown

# The words of data.representation: one of the first, then any of the others.
REPRESENTATIONS = ("as_stored", "relative", "delta", "absolute")
REPRESENTATION_FLAGS = ("tool_frame", "rotation_6d")
# The words of data.proprio_representation: "as_stored", or any of these.
PROPRIO_REPRESENTATIONS = ("sin_cos", "rotation_6d")


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """The episodes, and how they become batches."""

    root: str = option("", "directory (local or gs://) with one folder per dataset")
    roots: Component = option(Component, "{dataset: directory} of datasets that are not in root")
    mix: str = option("", "a name in data/specs/mixes.py, or 'dataset=weight,dataset=weight'")
    mix_weights: str = option(
        "multipliers",
        "weights multiply the size of a dataset, or are its share of the examples",
        choices=("multipliers", "shares"),
    )
    specs: tuple[str, ...] = option(
        (), "Python files with your own dataset specs: data/specs/catalog.py"
    )
    cameras: dict[str, int] = option(
        lambda: {"primary": 128}, "{camera: side of its images in pixels}; {}: none", low=1
    )
    resize: str = option(
        "area",
        "kernel that resizes images of another size: 'area', the mean over each pixel (bilinear "
        "where a side grows); 'bilinear', antialiased, as before format 3; 'lanczos3', as in Octo",
        choices=("area", "bilinear", "lanczos3"),
    )
    absent_cameras: tuple[str, ...] = option(
        (), "cameras of the network that no dataset of the mix has: their input is masked"
    )
    depth: dict[str, int] = option(
        dict, "{camera: side of its depth images in pixels}; {}: none", low=1
    )
    window: int = option(1, "W: frames of history, including the current one", low=1)
    horizon: int = option(4, "H: actions per chunk", low=1)
    use_proprio: bool = option(True, "include observation.proprio in the batch")
    normalization: str = option(
        "normal",
        "'normal': by mean and standard deviation; 'bounds': by 1st and 99th percentile; "
        "'minmax': by the extremes. A spec may choose per dimension",
        choices=("normal", "bounds", "minmax"),
    )
    range_check: str = option(
        "strict",
        "'strict': widen the normalisation of rarely used dimensions, and refuse unnormalised ones "
        "outside [-1, 1]; 'warn': only report both, as runs before format 3",
        choices=("strict", "warn"),
    )
    representation: str = option(
        "as_stored",
        "form in which actions are learned: 'as_stored', or 'relative', 'delta' or 'absolute', "
        "optionally followed by 'tool_frame' and 'rotation_6d': octolike.representation",
    )
    proprio_representation: str = option(
        "as_stored",
        "how the network sees angles of proprio: 'as_stored', or one or both of 'sin_cos' and "
        "'rotation_6d': octolike.state_representation",
    )
    text: Component = option(
        lambda: Component(kind="hash", length=16, vocabulary=4096),
        "tokenizer of the instruction",
        table="octolike.text:TOKENIZERS",
    )
    paraphrases: str = option("", "JSON file {instruction: [paraphrase, ...]}; '': none")
    uninformative_language: bool = option(
        False, "keep instructions that the dataset spec marks as uninformative"
    )
    subtasks: bool = option(
        False,
        "label each step with its subtask, as the dataset spec says; without one, its instruction",
    )
    closings: bool = option(
        False,
        "label each step with the position of the gripper at its next closing, for a head of "
        "model.auxiliary",
    )
    tasks: str = option(
        "instruction",
        "a task is a distinct instruction, label (of the dataset spec), or dataset",
        choices=("instruction", "label", "dataset"),
    )
    task_ids: bool = option(False, "condition on the task's number as well: task.task_id")
    goal: str = option(
        "uniform",
        "goal image: a uniformly sampled future frame, the last frame, or none",
        choices=("uniform", "last", "none"),
    )
    keep_language: float = option(
        1.0, "probability that an example keeps its instruction", low=0, high=1
    )
    keep_goal: float = option(
        1.0, "probability that an example keeps its goal image", low=0, high=1
    )
    exclusive: bool = option(
        False,
        "an example with a goal image and an instruction keeps one of them, in the ratio of "
        "keep_goal to keep_language; validation as well",
    )
    keep_task_id: float = option(
        1.0, "probability that an example keeps its task id", low=0, high=1
    )
    sampling: Component = option(
        lambda: Component(kind="mix"),
        "sampling weights of datasets or tasks",
        table="octolike.data.pipeline.sampling:SAMPLING",
    )
    batch_size: int = option(64, "B: examples per step", low=1)
    episodes: int = option(0, "use only the first episodes of each training split; 0: all", low=0)
    limits: Component = option(Component, "{dataset: number} that overrides data.episodes")
    pool: int = option(
        0,
        "episodes, of all datasets and hosts, whose frames are mixed; 0: twice batch_size, at "
        "least 512",
        low=0,
    )
    memory: float = option(
        4.0, "GiB for buffered episodes and batches, of all hosts together; limits the pool"
    )
    lanes: int = option(
        0,
        "parts of a batch with episodes of their own: a divisor of batch_size, and a multiple of "
        "the number of hosts; 0: chosen from batch_size and pool",
        low=0,
    )
    threads: int = option(0, "threads that decode images; 0: one per core", low=0)
    prefetch: int = option(2, "batches prepared ahead", low=0)
    train_split: str = option("train", "training split")
    validation_split: str = option(
        "val", "held-out split, or a slice such as 'train[95%:]' that training leaves out; '': none"
    )
    validation_splits: Component = option(
        Component, "{dataset: split} that overrides data.validation_split"
    )
    held_out: float = option(
        0.05,
        "share of the training episodes held out, by a hash of their records, of datasets without "
        "the validation split; 0: none",
        low=0,
        high=0.9,
    )
    channel_orders: Component = option(
        Component,
        "{dataset: 'rgb' or 'bgr'}: order in which its images are stored; 'spec': as the dataset "
        "spec says; '*': all other datasets; {}: by dataset spec and encoding",
        choices=("rgb", "bgr", "spec"),
    )
    filters: Component = option(
        Component,
        "episodes to use: fields of data/specs/episode_filter.py, such as {'min_steps': 5}",
    )
    draw_views: bool = option(
        False,
        "show one of a dataset spec's interchangeable cameras (DatasetSpec.views) as any other, "
        "drawn per episode and epoch; validation shows them as they are",
    )
    bad_episodes: str = option(
        "error",
        "stop at a bad episode, or drop it, count it and report it",
        choices=("error", "drop"),
    )
    cache: str = option("", "directory for statistics if the dataset's directory is read-only")

    def root_of(self, dataset: str) -> str:
        """Return the directory that holds a dataset's folder."""
        return self.roots.get(dataset, self.root)

    def validation_split_of(self, dataset: str) -> str:
        """Return the held-out split of a dataset; "": none."""
        return self.validation_splits.get(dataset, self.validation_split)

    def channel_order_of(self, dataset: str) -> str:
        """Return how the channels of a dataset are stored; "": by dataset spec and encoding."""
        return self.channel_orders.get(dataset, self.channel_orders.get("*", ""))

    def move(self, root: str | None) -> None:
        """Read every dataset from one directory, if one is given."""
        if root:
            self.root, self.roots = root, Component()

    def limit_of(self, dataset: str) -> int:
        """Return the number of training episodes to use of a dataset; 0: all."""
        return self.limits.get(dataset, self.episodes)


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The policy network."""

    width: int = option(256, "D: token width", low=1)
    layers: int = option(4, "transformer blocks", low=1)
    attention_heads: int = option(4, "attention heads per block", low=1)
    mlp_width: int = option(1024, "width of the feed-forward layer", low=1)
    dropout: float = option(0.0, "dropout rate in the transformer", low=0, high=1)
    dtype: str = option(
        "float32",
        "compute type; parameters are always float32",
        choices=("float32", "bfloat16"),
    )
    max_window: int = option(0, "timesteps with a position embedding; 0: data.window", low=0)
    remat: str = option(
        "auto",
        "what the backward pass finds stored: 'none' of it is computed again; 'dots': matrix "
        "products and attention are stored; 'full': only inputs of blocks; 'auto': dots on an "
        "accelerator, none on a CPU",
        choices=("auto", "none", "dots", "full"),
    )
    repeat_task_tokens: bool = option(False, "repeat the task tokens at every timestep")
    experts: Component = option(
        dict,
        "mixture of experts in the feed-forward layer; {}: dense",
        table="octolike.model.experts:EXPERTS",
    )
    tokenizers: dict[str, Component] = option(
        dict, "{name: tokenizer}: the token groups", table="octolike.model.tokenizers:TOKENIZERS"
    )
    readouts: dict[str, int] = option(
        lambda: {"action": 1}, "{name: number of tokens}: the readout groups", low=1
    )
    registers: tuple[str, ...] = option(
        (), "readouts that later observation tokens may attend to: memory across timesteps"
    )
    heads: dict[str, Component] = option(
        dict, "{name: action head}", table="octolike.model.heads:HEADS"
    )
    auxiliary: dict[str, Component] = option(
        dict,
        "{name: auxiliary head}: predicts a label in training, next to the action heads",
        table="octolike.model.auxiliary:AUXILIARY",
    )


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """The optimiser: AdamW."""

    learning_rate: float = option(3e-4, "peak learning rate")
    schedule: str = option(
        "cosine",
        "learning rate after warm-up: cosine decay to zero, 1/sqrt(step), or constant",
        choices=("cosine", "rsqrt", "constant"),
    )
    warmup: int = option(200, "steps of linear warm-up", low=0)
    weight_decay: float = option(0.01, "decoupled weight decay, of kernels only")
    clip: float = option(1.0, "largest global gradient norm; 0: no clipping")
    b1: float = option(0.9, "decay of the first moment")
    b2: float = option(0.95, "decay of the second moment")
    frozen: tuple[str, ...] = option(
        (), "frozen parameters: patterns over paths, e.g. 'tokenizers_*'; '!...' excepts"
    )
    lora: tuple[str, ...] = option(
        (), "kernels that only get a low-rank update: patterns, e.g. 'transformer/*kernel'"
    )
    lora_rank: int = option(8, "rank of the low-rank updates", low=1)
    lora_scale: float = option(1.0, "factor of the low-rank updates: alpha / rank")
    ema: float = option(
        0.0, "decay of the parameter average that the policy uses; 0: none", low=0, high=1
    )
    accumulate: int = option(
        1, "parts of a batch whose gradients are accumulated: less memory, more time", low=1
    )
    surgery: str = option(
        "",
        "'pcgrad': project conflicting gradients of train.groups; '': none",
        choices=("", "pcgrad"),
    )


@dataclass(kw_only=True, slots=True)
class AugmentConfig:
    """Image augmentation inside the step: one geometry per window, colours per example."""

    crop_scale: tuple[float, float] = option(
        (1.0, 1.0), "area of the random resized crop, as a fraction of the image: (low, high)"
    )
    crop_ratio: tuple[float, float] = option((1.0, 1.0), "aspect ratio of the crop: (low, high)")
    brightness: float = option(0.0, "largest shift, as a fraction of the range")
    contrast: float = option(0.0, "contrast factor lies in 1 ± this value")
    saturation: float = option(0.0, "saturation factor lies in 1 ± this value")
    hue: float = option(0.0, "largest rotation of the hue circle, in turns")
    cameras: tuple[str, ...] = option((), "cameras that are cropped; (): all")


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """The training loop."""

    steps: int = option(10_000, "optimiser steps", low=1)
    init_from: str = option("", "run directory with the initial parameters; '': from scratch")
    init_step: int = option(0, "checkpoint of init_from; 0: the newest", low=0)
    reinit: tuple[str, ...] = option(
        (), "parameters that are reinitialised, not taken from init_from: patterns over paths"
    )
    fsdp: int = option(
        1, "devices over which parameters and optimiser state are sharded; 0: all", low=0
    )
    distributed: bool = option(False, "call jax.distributed.initialize: several processes")
    compilation_cache: str = option("", "directory for compiled steps; '': no cache")
    groups: str = option(
        "dataset",
        "groups whose gradients are compared",
        choices=("dataset", "task", "embodiment"),
    )
    conflicts_every: int = option(0, "steps between comparisons of group gradients; 0: none", low=0)
    log_every: int = option(50, "steps between logged metrics", low=1)
    validate_every: int = option(1000, "steps between validations; 0: only at the end", low=0)
    validation_batches: int = option(
        8,
        "batches per validation and dataset; for no validation set data.validation_split=''",
        low=1,
    )
    checkpoint_every: int = option(
        1000, "steps between checkpoints; the last step always has one", low=1
    )
    keep: int = option(2, "number of newest checkpoints to retain", low=1)
    keep_every: int = option(
        0, "also retain the checkpoints at multiples of this many steps; 0: none", low=0
    )
    keep_best: str = option(
        "",
        "also retain the checkpoint with the lowest validation action error or loss; '': none",
        choices=("", "action_error", "loss"),
    )
    wandb: str = option("", "Weights & Biases project; '': none")
    profile: str = option("", "'start:stop': steps to trace into workdir/profile; '': none")
    augment: AugmentConfig = option(AugmentConfig, "image augmentation")


@dataclass(kw_only=True, slots=True)
class CollectConfig:
    """Demonstrations by scripted experts in a simulator: octolike collect."""

    dataset: str = option("tabletop", "name of the dataset to write in data.root")
    skills: dict[str, int] = option(dict, "{skill: number of training episodes}", low=0)
    split: str = option("train", "split of the environment's tasks to demonstrate")
    validation_share: float = option(
        0.05, "validation episodes as a fraction of the training episodes", low=0, high=1
    )
    draw: int = option(
        0, "draw of the demonstrations: two draws share no scene or noise", low=0, high=9
    )
    noise: float = option(0.5, "noise on the executed actions; 0: exactly the expert's actions")
    episodes_per_shard: int = option(50, "episodes per TFRecord file", low=1)
    workers: int = option(0, "processes; 0: one per core", low=0)


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """Closed-loop evaluation: octolike evaluate."""

    episodes: int = option(20, "episodes per skill and split", low=1)
    splits: tuple[str, ...] = option(("train",), "splits of the environment's tasks")
    skills: tuple[str, ...] = option((), "skills; (): all that were collected")
    condition_on: tuple[str, ...] = option(
        ("language",),
        "inputs that specify the task",
        choices=("language", "goal", "task_id"),
    )
    execute: int = option(1, "actions of each chunk to execute before the next inference", low=1)
    ensemble: float = option(
        0.0, "temporal ensembling: weight exp(-this · age) of earlier predictions; 0: off"
    )
    delay: int = option(0, "steps that a simulated inference takes", low=0)
    overlap: str = option(
        "continue",
        "during an inference that takes `delay` steps, the robot continues the previous chunk, or "
        "waits",
        choices=("continue", "wait"),
    )
    real_time: str = option(
        "",
        "real-time chunking: new chunks continue the actions executed meanwhile, 'guided' or as "
        "'trained' (heads.*.prefix); '': off",
        choices=("", "guided", "trained"),
    )
    gripper_band: float = option(
        0.0, "a gripper keeps its target until a prediction differs by more; 0: off", low=0
    )
    release: int = option(
        0, "after a gripper opens, execute this many more actions of the same chunk; 0: off", low=0
    )
    videos: int = option(2, "videos of successes, and of failures, per skill and split", low=0)
    embodiment: str = option("", "embodiment of the run to evaluate; '': its only one")
    untrained: bool = option(True, "also evaluate the untrained network, as a baseline")
    batch: int = option(16, "environments stepped together with one policy call", low=1)
    workers: int = option(0, "processes; 0: one per core", low=0)
    seed: int = option(
        1_000_000, "seed of the first episode; collection starts at 0", low=0, high=2**31 - 1
    )


@dataclass(kw_only=True, slots=True)
class Config:
    """One run."""

    workdir: str = option("", "directory of the run")
    seed: int = option(
        0, "seed of parameters, data order, augmentation and noise", low=0, high=2**32 - 1
    )
    plugins: tuple[str, ...] = option(
        (), "Python files of your own that add kinds to the open sets: octolike.config.plugins"
    )
    data: DataConfig = option(DataConfig, "episodes to batches")
    model: ModelConfig = option(ModelConfig, "the policy network")
    optim: OptimConfig = option(OptimConfig, "the optimiser")
    train: TrainConfig = option(TrainConfig, "the training loop")
    environment: Component = option(
        dict, "simulator; {}: none", table="octolike.envs.registry:ENVIRONMENTS"
    )
    collect: CollectConfig = option(CollectConfig, "demonstrations")
    evaluate: EvaluateConfig = option(EvaluateConfig, "closed-loop evaluation")

    def check(self) -> None:
        """Raise ConfigError for the first option that is not allowed or contradicts another."""
        check_fields(self)
        d, m, o, t = self.data, self.model, self.optim, self.train
        require(d.memory > 0, f"data.memory is {d.memory} GiB; it must be positive")
        require(
            not d.exclusive or d.keep_goal + d.keep_language > 0,
            "data.exclusive keeps the goal image or the instruction, but data.keep_goal and "
            "data.keep_language are 0; set one of them above 0",
        )
        require(
            m.max_window == 0 or m.max_window >= d.window,
            f"model.max_window {m.max_window} is smaller than data.window {d.window}",
        )
        require(
            m.width % m.attention_heads == 0,
            f"model.width {m.width} is not a multiple of model.attention_heads {m.attention_heads}",
        )
        require(
            self.evaluate.execute <= d.horizon,
            f"evaluate.execute {self.evaluate.execute} exceeds the chunk, data.horizon {d.horizon}",
        )
        mode, *flags = d.representation.split() or [""]
        noun = f"word in data.representation {d.representation!r}"
        require(mode in REPRESENTATIONS, unknown(noun, mode, REPRESENTATIONS))
        for flag in flags:
            require(flag in REPRESENTATION_FLAGS, unknown(noun, flag, REPRESENTATION_FLAGS))
        noun = f"word in data.proprio_representation {d.proprio_representation!r}"
        for word in d.proprio_representation.split() or [""]:
            if d.proprio_representation != "as_stored":
                require(
                    word in PROPRIO_REPRESENTATIONS, unknown(noun, word, PROPRIO_REPRESENTATIONS)
                )
        require(
            mode == "as_stored" or d.use_proprio,
            f"data.representation {d.representation!r} needs the robot's state; set "
            "data.use_proprio, or 'as_stored'",
        )
        for name, tokenizer in m.tokenizers.items():
            self._check_tokenizer(f"model.tokenizers.{name}", tokenizer)
        require(
            d.batch_size % o.accumulate == 0,
            f"data.batch_size {d.batch_size} does not divide into optim.accumulate {o.accumulate} "
            "equal parts",
        )
        start, _, stop = t.profile.partition(":")
        require(
            not t.profile or (start.isdigit() and stop.isdigit() and int(start) < int(stop)),
            f"train.profile {t.profile!r} is not 'start:stop', such as '100:110'",
        )
        require(o.warmup <= t.steps, f"optim.warmup {o.warmup} exceeds train.steps {t.steps}")
        require(bool(self.workdir), "workdir is empty; set one, e.g. --config.workdir=runs/mine")

    def _check_tokenizer(self, path: str, tokenizer: Component) -> None:
        text = self.data.text
        if "vocabulary" in tokenizer and "vocabulary" in text:
            require(
                tokenizer["vocabulary"] == text["vocabulary"],
                f"{path}.vocabulary {tokenizer['vocabulary']} differs from "
                f"data.text.vocabulary {text['vocabulary']}",
            )
        require(
            tokenizer.get("kind") != "task_id" or self.data.task_ids,
            f"{path} conditions on the task's number, but data.task_ids is off",
        )
