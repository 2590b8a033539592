"""Observation or task to a token group: images, proprio, language, goal images, task numbers.

Every tokenizer is called with the observation and the task of the batch contract and returns a
TokenGroup of its own width; `network.py` projects it. Its `place` is "task" (tokens [B, N, C]) or
"observation" (tokens [B, W, N, C]; called with a conditioning vector [B, E] too, or None where
there are no task tokens). `reads()` lists the batch paths that it needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from octolike.config import ConfigError, build_component, unknown
from octolike.model import bins as binning
from octolike.model.encoders import ENCODERS
from octolike.model.language import TextEncoder, build_encoder
from octolike.model.pooling import TokenLearner
from octolike.types import BatchSpec, Names, TokenGroup

# (pixel − first) / second: to [−1, 1], or by ImageNet's mean and deviation of red, green and blue.
PIXELS = {
    "symmetric": (127.5, 127.5),
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
}


class Image(nn.Module):
    """Cameras: stacked on channels and encoded together, or each by itself with the same encoder.

    shared: encode each camera alone; the tokens come side by side, each camera's visible where it
    is there. Otherwise all are visible where any camera is. Shared cameras may differ in size.
    goal: stack the same cameras' goal images on top, black where there is none. depth: stack their
    depth images on top, 0 to `depth_range` metres as 0 to 1, resized if need be; 0 where there is
    none. film: modulate the encoder by the pooled task tokens. learned_tokens: pool the encoder's
    tokens to so many (0: keep them all), visible where any was. pixels: see `PIXELS`.
    """

    encoder: nn.Module
    cameras: tuple[str, ...] = ("primary",)
    shared: bool = False
    goal: bool = False
    depth: bool = False
    depth_range: float = 2.0
    film: bool = False
    learned_tokens: int = 0
    pixels: str = "symmetric"
    dtype: Any = jnp.float32
    place: ClassVar[str] = "observation"

    def __post_init__(self) -> None:
        _choice("pixels of an image tokenizer", self.pixels, PIXELS)
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
        looks = [(c,) for c in self.cameras] if self.shared else [self.cameras]
        groups = [self._look(look, observation, task, condition) for look in looks]
        x = jnp.concatenate([g.tokens for g in groups], axis=-2)
        mask = jnp.concatenate([g.mask for g in groups], axis=-1)
        if self.learned_tokens:
            learner = TokenLearner(self.learned_tokens, dtype=self.dtype, name="learner")
            return _group(learner(x, mask), mask.any(axis=-1))
        return TokenGroup(x, mask)

    def _look(
        self,
        cameras: tuple[str, ...],
        observation: Mapping[str, Any],
        task: Mapping[str, Any],
        condition: jax.Array | None,
    ) -> TokenGroup:
        """Return the tokens of cameras that are stacked on channels."""
        images, present = _images(observation, cameras, self.pixels, self.dtype)
        batch, window = images.shape[:2]
        stack = [images]
        if self.goal:
            goals, _ = _images(task, cameras, self.pixels, self.dtype)
            stack.append(jnp.broadcast_to(goals[:, None], (batch, window, *goals.shape[1:])))
        if self.depth:
            for camera in cameras:
                depth = _depth(observation, camera, self.depth_range, images.shape[2:4])
                stack.append(depth.astype(self.dtype))
        images = jnp.concatenate(stack, axis=-1)
        if self.film:
            condition = jnp.repeat(condition, window, axis=0)
        x = self.encoder(
            images.reshape(batch * window, *images.shape[2:]), condition if self.film else None
        )
        return _group(x.reshape(batch, window, *x.shape[1:]), present)


class GoalImage(nn.Module):
    """Goal images, stacked on channels, as task tokens; visible where any of them is there."""

    encoder: nn.Module
    cameras: tuple[str, ...] = ("primary",)
    pixels: str = "symmetric"
    dtype: Any = jnp.float32
    place: ClassVar[str] = "task"

    def __post_init__(self) -> None:
        _choice("pixels of a goal_image tokenizer", self.pixels, PIXELS)
        super().__post_init__()

    def reads(self) -> tuple[str, ...]:
        return tuple(k for c in self.cameras for k in _with_presence("task", f"image_{c}"))

    def __call__(self, observation: Mapping[str, Any], task: Mapping[str, Any]) -> TokenGroup:
        images, present = _images(task, self.cameras, self.pixels, self.dtype)
        return _group(self.encoder(images), present)


class Language(nn.Module):
    """Learned word embeddings of the instruction's ids, with no weights to download.

    vocabulary: how many ids the text tokenizer has (a higher id gives NaN, which stops training).
    pooled: one token, a small network's view of the mean word; else a token per word.
    """

    vocabulary: int
    width: int = 64
    pooled: bool = False
    dtype: Any = jnp.float32
    place: ClassVar[str] = "task"

    def reads(self) -> tuple[str, ...]:
        return "task.language.ids", "task.language.mask", "task.present.language"

    @nn.compact
    def __call__(self, observation: Mapping[str, Any], task: Mapping[str, Any]) -> TokenGroup:
        ids, mask = task["language"]["ids"], task["language"]["mask"]
        present = task["present"]["language"][:, None]
        # Unit variance from a small table: the optimiser's steps soon tell words apart.
        words = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, name="words")(ids)
        words = words * self.width**0.5
        if not self.pooled:
            return TokenGroup(words, mask & present)
        mean = masked_mean(words, mask & present)
        token = nn.swish(nn.Dense(self.width, dtype=self.dtype, name="pooled")(mean))
        return TokenGroup(token[:, None], present)


class TaskId(nn.Module):
    """The task by its number: one token, a linear map of the one-hot over the run's tasks.

    tasks: how many the run has (a number beyond gives NaN, which stops training).
    """

    tasks: int
    width: int = 64
    dtype: Any = jnp.float32
    place: ClassVar[str] = "task"

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError(
                "a task_id tokenizer needs numbered tasks, and this run has none; set "
                "data.task_ids, or choose another tokenizer of the task"
            )
        super().__post_init__()

    def reads(self) -> tuple[str, ...]:
        return _with_presence("task", "task_id")

    @nn.compact
    def __call__(self, observation: Mapping[str, Any], task: Mapping[str, Any]) -> TokenGroup:
        number, present = task["task_id"], task["present"]["task_id"]
        # Unit variance out of small weights, as for words.
        x = jax.nn.one_hot(number, self.tasks, dtype=self.dtype) * self.tasks**0.5
        bad = present & ((number < 0) | (number >= self.tasks))
        x = jnp.where(present[:, None], jnp.where(bad[:, None], jnp.nan, x), 0)
        token = nn.Dense(self.width, dtype=self.dtype, name="token")(x)
        return _group(token[:, None], present)


class Proprio(nn.Module):
    """The robot's state: one token, a token per dimension, or its bin per dimension.

    each: a token of one channel per dimension. bins > 0: a token per dimension that says which of
    so many bins its value lies in, one-hot (`octolike.model.bins`: bin_kind, low, high, outside).
    hidden > 0 puts one hidden layer before the projection.
    """

    key: str = "proprio"
    each: bool = False
    bins: int = 0
    bin_kind: str = "uniform"
    low: float = -3.0
    high: float = 3.0
    outside: str = "nearest"
    hidden: int = 0
    dtype: Any = jnp.float32
    place: ClassVar[str] = "observation"

    def __post_init__(self) -> None:
        binning.check_outside(self.outside)
        if self.bins:
            self._edges()
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
        return binning.edges(self.bin_kind, self.bins, self.low, self.high)


TOKENIZERS = {
    "image": Image,
    "goal_image": GoalImage,
    "language": Language,
    "text_encoder": TextEncoder,
    "task_id": TaskId,
    "proprio": Proprio,
}


def build(
    component: Mapping[str, Any], path: str, spec: BatchSpec, *, names: Names, dtype: Any
) -> nn.Module:
    """Return the tokenizer of a config's component, its encoder included.

    Raises ConfigError, naming `path`, for an unknown kind or field, a key that the spec lacks, or
    images that cannot be stacked.
    """
    fields, context = dict(component), {"dtype": dtype, "tasks": len(names.tasks)}
    if isinstance(fields.get("encoder"), Mapping):
        where = f"{path}.encoder"
        if fields.get("kind") == "text_encoder":
            fields["encoder"] = build_encoder(fields["encoder"], where, dtype)
        else:
            fields["encoder"] = build_component(ENCODERS, fields["encoder"], where, **context)
    if isinstance(fields.get("cameras"), str):
        raise ConfigError(f"{path}.cameras is {fields['cameras']!r}; expected a tuple of names")
    tokenizer = build_component(TOKENIZERS, fields, path, **context)
    for key in tokenizer.reads():
        if key not in spec:
            there = ", ".join(k for k in sorted(spec) if k.startswith(("observation.", "task.")))
            raise ConfigError(
                f"{path} reads {key!r}, which the data do not have (they have: {there})"
            )
    if isinstance(tokenizer, (Image, GoalImage)):
        _check_sizes(tokenizer, spec, path)
    return tokenizer


def masked_mean(tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the mean [B, C] of the visible ones of tokens [B, N, C]; zeros where none is."""
    weight = mask[..., None].astype(tokens.dtype)
    # where, not a product: a token nobody may see must not matter even if it is not finite
    total = jnp.where(mask[..., None], tokens, 0).sum(axis=-2)
    return total / jnp.maximum(weight.sum(axis=-2), 1)


def _with_presence(place: str, key: str) -> tuple[str, str]:
    return f"{place}.{key}", f"{place}.present.{key}"


def _images(
    source: Mapping[str, Any], cameras: tuple[str, ...], pixels: str, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Return scaled images, stacked on channels, absent ones black; whether any is there."""
    images, present = [], []
    for camera in cameras:
        image, there = source[f"image_{camera}"], source["present"][f"image_{camera}"]
        images.append(jnp.where(there[..., None, None, None], image, 0))
        present.append(there)
    stacked = jnp.concatenate(images, axis=-1).astype(dtype)
    middle, spread = (jnp.asarray(x, dtype) for x in PIXELS[pixels])
    if middle.ndim:  # a colour each; every camera has three
        middle, spread = (jnp.tile(x, len(cameras)) for x in (middle, spread))
    return (stacked - middle) / spread, jnp.stack(present).any(axis=0)


def _depth(
    observation: Mapping[str, Any], camera: str, depth_range: float, size: tuple[int, int]
) -> jax.Array:
    """Return depth [B, W, h, w, 1], 0 to 1, at the given size; 0 where it is absent."""
    x, there = observation[f"depth_{camera}"], observation["present"][f"depth_{camera}"]
    x = jnp.where(there[..., None, None, None], x, 0)
    if x.shape[2:4] != size:
        # Nearest: a mean with 0, which says that nothing was measured, is no distance.
        x = jax.image.resize(x, (*x.shape[:2], *size, 1), "nearest")
    return jnp.clip(x / depth_range, 0, 1)


def _check_sizes(tokenizer: Image | GoalImage, spec: BatchSpec, path: str) -> None:
    """Raise ConfigError where images that are stacked on channels differ in size."""
    images = [k for k in tokenizer.reads() if ".image_" in k and ".present." not in k]
    shared = getattr(tokenizer, "shared", False)
    for stack in [(c,) for c in tokenizer.cameras] if shared else [tokenizer.cameras]:
        sizes = {k: spec[k][0][-3:-1] for k in images if k.partition(".image_")[2] in stack}
        if len(set(sizes.values())) > 1:
            found = ", ".join(f"{k} {h} × {w}" for k, (h, w) in sizes.items())
            raise ConfigError(
                f"{path} stacks images of different sizes ({found}); give each camera a tokenizer, "
                "set shared=True, or give the cameras one size in data.cameras"
            )


def _group(tokens: jax.Array, present: jax.Array) -> TokenGroup:
    return TokenGroup(tokens, jnp.broadcast_to(present[..., None], tokens.shape[:-1]))


def _choice(field: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ConfigError(unknown(field, value, choices))
