"""Tokenizers: images, proprio, language, goal images and task ids to token groups.

A tokenizer takes the observation and the task of the batch contract and returns a TokenGroup of
any width; `network.py` projects it. Its `place` is "task" (tokens [B, N, C]), "observation" or
"subtask" (tokens [B, W, N, C]), or "condition", which returns a vector [B, E] without tokens.
Observation tokenizers also take a conditioning vector per step [B, W, E], None without any task; a
subtask tokenizer also returns metrics; its subtask_loss is added to the loss. `reads()` lists the
batch paths that a tokenizer needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from octolike.config import ConfigError, build_component, option
from octolike.model import bins as binning
from octolike.model.encoders import ENCODERS
from octolike.model.language import READERS, InstructionVector, TextEncoder, build_encoder
from octolike.model.pooling import TokenLearner
from octolike.model.subtask import Subtask
from octolike.types import BatchSpec, Names, TokenGroup

# (mean, deviation) per scaling: to [−1, 1], or ImageNet's of red, green and blue.
PIXELS = {
    "symmetric": (127.5, 127.5),
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
}


class Image(nn.Module):
    """Cameras, encoded as one stack of channels, or each alone by the same encoder (`shared`).

    Stacked cameras make one set of tokens, visible if any of them is present. Shared cameras make
    a set each, visible if that camera is present, and may differ in size. Absent images are black,
    absent depth is 0.
    """

    encoder: nn.Module = option(
        meaning="the image encoder", table="octolike.model.encoders:ENCODERS"
    )
    cameras: tuple[str, ...] = option(("primary",), "names of the cameras")
    shared: bool = option(False, "encode each camera alone, instead of their stack")
    goal: bool = option(False, "stack the same cameras' goal images on the channels")
    depth: bool = option(False, "stack the same cameras' depth images on the channels, resized")
    depth_range: float = option(2.0, "metres that become 1; farther points are clipped", low=0)
    film: bool = option(
        False, "modulate the encoder by the pooled task tokens or an instruction_vector (FiLM)"
    )
    learned_tokens: int = option(0, "pool the tokens to this number (TokenLearner); 0: no", low=0)
    pooling_heads: int = option(8, "attention heads of that pooling; divide the width", low=1)
    pixels: str = option(
        "symmetric", "scaling of the pixels: to [-1, 1], or as for ImageNet", choices=tuple(PIXELS)
    )
    dtype: Any = option(jnp.dtype("float32"), "compute type; parameters are float32")
    place: ClassVar[str] = "observation"

    def __post_init__(self) -> None:
        if self.depth_range <= 0:
            raise ConfigError(f"depth_range is {self.depth_range} metres; it must be positive")
        super().__post_init__()

    def reads(self) -> tuple[str, ...]:
        keys = [k for c in self.cameras for k in _with_presence("observation", f"image_{c}")]
        if self.goal:
            keys += [k for c in self.cameras for k in _with_presence("task", f"image_{c}")]
        if self.depth:
            keys += [k for c in self.cameras for k in _with_presence("observation", f"depth_{c}")]
        return tuple(keys)

    @nn.compact
    def __call__(
        self,
        observation: Mapping[str, Any],
        task: Mapping[str, Any],
        condition: jax.Array | None = None,
    ) -> TokenGroup:
        stacks = [(c,) for c in self.cameras] if self.shared else [self.cameras]
        groups = [self._encode_stack(stack, observation, task, condition) for stack in stacks]
        x = jnp.concatenate([g.tokens for g in groups], axis=-2)
        mask = jnp.concatenate([g.mask for g in groups], axis=-1)
        if self.learned_tokens:
            learner = TokenLearner(
                self.learned_tokens, self.pooling_heads, dtype=self.dtype, name="learner"
            )
            return _group(learner(x, mask), mask.any(axis=-1))
        return TokenGroup(x, mask)

    def _encode_stack(
        self,
        cameras: tuple[str, ...],
        observation: Mapping[str, Any],
        task: Mapping[str, Any],
        condition: jax.Array | None,
    ) -> TokenGroup:
        """Return the tokens of cameras stacked on the channels."""
        images, present = _images(observation, cameras, self.pixels, self.dtype)
        batch, window = images.shape[:2]
        channels = [images]
        if self.goal:
            goals, _ = _images(task, cameras, self.pixels, self.dtype)
            channels.append(jnp.broadcast_to(goals[:, None], (batch, window, *goals.shape[1:])))
        if self.depth:
            for camera in cameras:
                depth = _depth(observation, camera, self.depth_range, images.shape[2:4])
                channels.append(depth.astype(self.dtype))
        images = jnp.concatenate(channels, axis=-1)
        if self.film:
            assert condition is not None
            condition = condition.reshape(batch * window, -1)
        x = self.encoder(
            images.reshape(batch * window, *images.shape[2:]), condition if self.film else None
        )
        return _group(x.reshape(batch, window, *x.shape[1:]), present)


class GoalImage(nn.Module):
    """Goal images, stacked on the channels, as task tokens; visible if any of them is present."""

    encoder: nn.Module = option(
        meaning="the image encoder", table="octolike.model.encoders:ENCODERS"
    )
    cameras: tuple[str, ...] = option(("primary",), "names of the cameras")
    pixels: str = option(
        "symmetric", "scaling of the pixels: to [-1, 1], or as for ImageNet", choices=tuple(PIXELS)
    )
    dtype: Any = option(jnp.dtype("float32"), "compute type; parameters are float32")
    place: ClassVar[str] = "task"

    def reads(self) -> tuple[str, ...]:
        return tuple(k for c in self.cameras for k in _with_presence("task", f"image_{c}"))

    def __call__(self, observation: Mapping[str, Any], task: Mapping[str, Any]) -> TokenGroup:
        images, present = _images(task, self.cameras, self.pixels, self.dtype)
        return _group(self.encoder(images), present)


class Language(nn.Module):
    """Word embeddings of the instruction's ids, learned from scratch.

    An id beyond the vocabulary gives NaN, which stops training.
    """

    vocabulary: int = option(meaning="number of ids of the text tokenizer", low=1)
    width: int = option(64, "width of the tokens", low=1)
    pooled: bool = option(False, "one token from the mean word; False: one token per word")
    dtype: Any = option(jnp.dtype("float32"), "compute type; parameters are float32")
    place: ClassVar[str] = "task"

    def reads(self) -> tuple[str, ...]:
        return "task.language.ids", "task.language.mask", "task.present.language"

    @nn.compact
    def __call__(self, observation: Mapping[str, Any], task: Mapping[str, Any]) -> TokenGroup:
        ids, mask = task["language"]["ids"], task["language"]["mask"]
        present = task["present"]["language"][:, None]
        # Small embeddings scaled to unit variance: the optimiser's steps soon separate the words.
        words = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, name="words")(ids)
        words = words * self.width**0.5
        if not self.pooled:
            return TokenGroup(words, mask & present)
        mean = masked_mean(words, mask & present)
        token = nn.swish(nn.Dense(self.width, dtype=self.dtype, name="pooled")(mean))
        return TokenGroup(token[:, None], present)


class TaskId(nn.Module):
    """One token per task id: a linear map of the one-hot over the run's tasks.

    An id beyond the run's tasks gives NaN, which stops training.
    """

    tasks: int = option(meaning="number of tasks, from the run", low=0)
    width: int = option(64, "width of the token", low=1)
    dtype: Any = option(jnp.dtype("float32"), "compute type; parameters are float32")
    place: ClassVar[str] = "task"

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError(
                "a task_id tokenizer needs numbered tasks, but this run has none; set "
                "data.task_ids, or choose another tokenizer of the task"
            )
        super().__post_init__()

    def reads(self) -> tuple[str, ...]:
        return _with_presence("task", "task_id")

    @nn.compact
    def __call__(self, observation: Mapping[str, Any], task: Mapping[str, Any]) -> TokenGroup:
        task_id, present = task["task_id"], task["present"]["task_id"]
        # Small weights scaled to unit variance, as for words.
        x = jax.nn.one_hot(task_id, self.tasks, dtype=self.dtype) * self.tasks**0.5
        invalid = present & ((task_id < 0) | (task_id >= self.tasks))
        x = jnp.where(present[:, None], jnp.where(invalid[:, None], jnp.nan, x), 0)
        token = nn.Dense(self.width, dtype=self.dtype, name="token")(x)
        return _group(token[:, None], present)


class Proprio(nn.Module):
    """The robot's state: one token, one per dimension (`each`), or one bin per dimension (`bins`).

    The bins are those of `octolike.model.bins`, encoded one-hot.
    """

    key: str = option("proprio", "observation key of the state")
    each: bool = option(False, "one token of one channel per dimension")
    bins: int = option(0, "one token per dimension: the value's bin; 0: no bins", low=0)
    bin_kind: str = option("uniform", "spacing of the bins", choices=binning.KINDS)
    low: float = option(-3.0, "lower end of uniform bins")
    high: float = option(3.0, "upper end of uniform bins")
    tail: float = option(
        binning.TAIL, "probability left out at each end of normal bins", low=0, high=0.5
    )
    outside: str = option("nearest", "bin of values outside all bins", choices=binning.OUTSIDE)
    hidden: int = option(0, "width of a hidden layer before the projection; 0: none", low=0)
    dtype: Any = option(jnp.dtype("float32"), "compute type; parameters are float32")
    place: ClassVar[str] = "observation"

    def __post_init__(self) -> None:
        if self.bins:
            self._edges()  # raises ConfigError for invalid bins
        super().__post_init__()

    def reads(self) -> tuple[str, ...]:
        return _with_presence("observation", self.key)

    @nn.compact
    def __call__(
        self,
        observation: Mapping[str, Any],
        task: Mapping[str, Any],
        condition: jax.Array | None = None,
    ) -> TokenGroup:
        x = observation[self.key]
        if self.bins:
            index = binning.encode(x, self._edges(), self.outside)
            x = jax.nn.one_hot(index, self.bins, dtype=self.dtype)
        else:
            x = (x[..., None] if self.each else x[..., None, :]).astype(self.dtype)
        if self.hidden:
            x = nn.swish(nn.Dense(self.hidden, dtype=self.dtype, name="hidden")(x))
        return _group(x, observation["present"][self.key])

    def _edges(self) -> np.ndarray:
        return binning.edges(self.bin_kind, self.bins, self.low, self.high, self.tail)


TOKENIZERS = {
    "image": Image,
    "goal_image": GoalImage,
    "language": Language,
    "text_encoder": TextEncoder,
    "instruction_vector": InstructionVector,
    "subtask": Subtask,
    "task_id": TaskId,
    "proprio": Proprio,
}


def build(
    component: Mapping[str, Any], path: str, spec: BatchSpec, *, names: Names, dtype: Any
) -> nn.Module:
    """Return the tokenizer of a config's component, including its encoder.

    Raises ConfigError, naming `path`, for an unknown kind or field, a key that the spec lacks, or
    images that cannot be stacked.
    """
    fields, context = dict(component), {"dtype": dtype, "tasks": len(names.tasks)}
    if isinstance(fields.get("encoder"), Mapping):
        encoder_path = f"{path}.encoder"
        if fields.get("kind") in READERS:
            encoder = build_encoder(fields["encoder"], encoder_path, dtype)
        else:
            encoder = build_component(ENCODERS, fields["encoder"], encoder_path, **context)
        fields["encoder"] = encoder
    if isinstance(fields.get("cameras"), str):
        raise ConfigError(f"{path}.cameras is {fields['cameras']!r}; expected a tuple of names")
    tokenizer = build_component(TOKENIZERS, fields, path, **context)
    for key in tokenizer.reads():
        if key not in spec:
            keys = ", ".join(k for k in sorted(spec) if k.startswith(("observation.", "task.")))
            raise ConfigError(
                f"{path} reads {key!r}, which the data do not have (they have: {keys})"
            )
    if isinstance(tokenizer, (Image, GoalImage)):
        _check_sizes(tokenizer, spec, path)
    return tokenizer


def masked_mean(tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the mean [B, C] over the visible tokens of [B, N, C]; zeros if none is visible."""
    weight = mask[..., None].astype(tokens.dtype)
    # jnp.where, not a product: a hidden token must not matter even if it is not finite
    total = jnp.where(mask[..., None], tokens, 0).sum(axis=-2)
    return total / jnp.maximum(weight.sum(axis=-2), 1)


def _with_presence(place: str, key: str) -> tuple[str, str]:
    return f"{place}.{key}", f"{place}.present.{key}"


def _images(
    source: Mapping[str, Any], cameras: tuple[str, ...], pixels: str, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Return (scaled images stacked on channels, whether any camera is present)."""
    images, presence = [], []
    for camera in cameras:
        image, present = source[f"image_{camera}"], source["present"][f"image_{camera}"]
        images.append(jnp.where(present[..., None, None, None], image, 0))
        presence.append(present)
    stacked = jnp.concatenate(images, axis=-1).astype(dtype)
    mean, deviation = (jnp.asarray(x, dtype) for x in PIXELS[pixels])
    if mean.ndim:  # per colour; every camera has three
        mean, deviation = (jnp.tile(x, len(cameras)) for x in (mean, deviation))
    return (stacked - mean) / deviation, jnp.stack(presence).any(axis=0)


def _depth(
    observation: Mapping[str, Any], camera: str, depth_range: float, size: tuple[int, ...]
) -> jax.Array:
    """Return depth [B, W, h, w, 1], scaled to [0, 1], at the given size; 0 if absent."""
    x, present = observation[f"depth_{camera}"], observation["present"][f"depth_{camera}"]
    x = jnp.where(present[..., None, None, None], x, 0)
    if x.shape[2:4] != size:
        # Nearest: 0 marks unmeasured pixels, so a mean with it is not a distance.
        x = jax.image.resize(x, (*x.shape[:2], *size, 1), "nearest")
    return jnp.clip(x / depth_range, 0, 1)


def _check_sizes(tokenizer: Image | GoalImage, spec: BatchSpec, path: str) -> None:
    """Raise ConfigError if images that are stacked on channels differ in size."""
    images = [k for k in tokenizer.reads() if ".image_" in k and ".present." not in k]
    shared = getattr(tokenizer, "shared", False)
    for stack in [(c,) for c in tokenizer.cameras] if shared else [tokenizer.cameras]:
        sizes = {k: spec[k][0][-3:-1] for k in images if k.partition(".image_")[2] in stack}
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{k} {h} × {w}" for k, (h, w) in sizes.items())
            raise ConfigError(
                f"{path} stacks images of different sizes ({listed}); use one tokenizer per "
                "camera, set shared=True, or give the cameras one size in data.cameras"
            )


def _group(tokens: jax.Array, present: jax.Array) -> TokenGroup:
    return TokenGroup(tokens, jnp.broadcast_to(present[..., None], tokens.shape[:-1]))
