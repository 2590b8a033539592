"""Observation or task to a token group: images, proprio, language, goal images.

Every tokenizer is called with the observation and the task of the batch contract and returns a
TokenGroup of its own width; `octo.py` projects it. Its `place` is "task" (tokens [B, N, C]) or
"observation" (tokens [B, W, N, C]; called with a conditioning vector [B, E] too, or None where
there are no task tokens). `reads()` lists the batch paths that it needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from octolike.config import ConfigError, build_component
from octolike.model.encoders import ENCODERS
from octolike.types import BatchSpec, Names, TokenGroup


class Image(nn.Module):
    """Cameras, stacked on channels and encoded together; visible where any of them is there.

    goal: stack the same cameras' goal images on top, black where there is none. film: modulate the
    encoder by the pooled task tokens.
    """

    encoder: nn.Module
    cameras: tuple[str, ...] = ("primary",)
    goal: bool = False
    film: bool = False
    dtype: Any = jnp.float32
    place: ClassVar[str] = "observation"

    def reads(self) -> tuple[str, ...]:
        keys = [k for c in self.cameras for k in _with_presence("observation", f"image_{c}")]
        if self.goal:
            keys += [k for c in self.cameras for k in _with_presence("task", f"image_{c}")]
        return tuple(keys)

    def __call__(
        self,
        observation: Mapping[str, Any],
        task: Mapping[str, Any],
        condition: jax.Array | None = None,
    ) -> TokenGroup:
        images, present = _images(observation, self.cameras, self.dtype)
        batch, window = images.shape[:2]
        if self.goal:
            goals, _ = _images(task, self.cameras, self.dtype)
            goals = jnp.broadcast_to(goals[:, None], (batch, window, *goals.shape[1:]))
            images = jnp.concatenate([images, goals], axis=-1)
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
    dtype: Any = jnp.float32
    place: ClassVar[str] = "task"

    def reads(self) -> tuple[str, ...]:
        return tuple(k for c in self.cameras for k in _with_presence("task", f"image_{c}"))

    def __call__(self, observation: Mapping[str, Any], task: Mapping[str, Any]) -> TokenGroup:
        images, present = _images(task, self.cameras, self.dtype)
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


class Proprio(nn.Module):
    """The robot's state as one token; `hidden` > 0 puts one hidden layer before the projection."""

    key: str = "proprio"
    hidden: int = 0
    dtype: Any = jnp.float32
    place: ClassVar[str] = "observation"

    def reads(self) -> tuple[str, ...]:
        return _with_presence("observation", self.key)

    @nn.compact
    def __call__(
        self,
        observation: Mapping[str, Any],
        task: Mapping[str, Any],
        condition: jax.Array | None = None,
    ) -> TokenGroup:
        x = observation[self.key].astype(self.dtype)
        if self.hidden:
            x = nn.swish(nn.Dense(self.hidden, dtype=self.dtype, name="hidden")(x))
        return _group(x[..., None, :], observation["present"][self.key])


TOKENIZERS = {"image": Image, "goal_image": GoalImage, "language": Language, "proprio": Proprio}


def build(
    component: Mapping[str, Any], path: str, spec: BatchSpec, *, names: Names, dtype: Any
) -> nn.Module:
    """Return the tokenizer of a config's component, its encoder included.

    Raises ConfigError, naming `path`, for an unknown kind or field, or a key that the spec lacks.
    """
    fields, context = dict(component), {"dtype": dtype}
    if isinstance(fields.get("encoder"), Mapping):
        encoder = build_component(ENCODERS, fields["encoder"], f"{path}.encoder", **context)
        fields["encoder"] = encoder
    if isinstance(fields.get("cameras"), str):
        raise ConfigError(f"{path}.cameras is {fields['cameras']!r}; expected a tuple of names")
    tokenizer = build_component(TOKENIZERS, fields, path, **context)
    for key in tokenizer.reads():
        if key not in spec:
            there = ", ".join(k for k in sorted(spec) if k.startswith(("observation.", "task.")))
            raise ConfigError(
                f"{path} reads {key!r}, which the data do not have (they have: {there})"
            )
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
    source: Mapping[str, Any], cameras: tuple[str, ...], dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Return images in [-1, 1], stacked on channels, absent ones black; whether any is there."""
    images, present = [], []
    for camera in cameras:
        image, there = source[f"image_{camera}"], source["present"][f"image_{camera}"]
        images.append(jnp.where(there[..., None, None, None], image, 0))
        present.append(there)
    stacked = jnp.concatenate(images, axis=-1).astype(dtype) / 127.5 - 1
    return stacked, jnp.stack(present).any(axis=0)


def _group(tokens: jax.Array, present: jax.Array) -> TokenGroup:
    return TokenGroup(tokens, jnp.broadcast_to(present[..., None], tokens.shape[:-1]))
