"""Pixels to feature tokens: convolutional stems, patches, keypoints; any of them FiLM-conditioned.

Every encoder maps float images [B, h, w, C] in [-1, 1], with or without a conditioning vector
[B, E], to feature tokens [B, N, F].
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from octolike.config import ConfigError


class SmallStem(nn.Module):
    """Standardised 3×3 convolutions of stride 2, then one token per `patch` × `patch` pixels.

    The defaults are Octo's SmallStem16; features=(32, 64, 128), patch=8 suits 64 to 128 pixels.
    """

    features: tuple[int, ...] = (32, 96, 192, 384)
    patch: int = 16
    width: int = 512
    groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array | None = None) -> jax.Array:
        cell = self.patch // 2 ** len(self.features)
        if cell * 2 ** len(self.features) != self.patch:
            raise ConfigError(
                f"small_stem: {len(self.features)} convolutions of stride 2 make cells of "
                f"{2 ** len(self.features)} pixels; patch {self.patch} must be a multiple of that"
            )
        for i, width in enumerate(self.features):
            x = StandardConv(width, dtype=self.dtype, name=f"conv_{i}")(x)
            x = nn.relu(_group_norm(self.groups, width, self.dtype, f"norm_{i}")(x))
        x = _patches(self.width, cell, self.dtype)(x)
        return _tokens(film(x, condition, self.dtype, "film"))


class Patch(nn.Module):
    """One convolution: a linear map of each `patch` × `patch` square."""

    patch: int = 16
    width: int = 512
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array | None = None) -> jax.Array:
        x = _patches(self.width, self.patch, self.dtype)(x)
        return _tokens(film(x, condition, self.dtype, "film"))


class Keypoints(nn.Module):
    """Where things are, in few tokens: convolutions, then a spatial softmax per keypoint.

    Each keypoint's softmax over the feature map gives its mean position (x, y in [-1, 1]) and the
    features found there. Conditioning enters after every convolution, so that *which* things are
    looked for can depend on the instruction. merge: all keypoints in one token, else a token each.
    """

    features: tuple[int, ...] = (16, 32, 64)
    kernels: tuple[int, ...] = (5, 3, 3)
    strides: tuple[int, ...] = (2, 2, 2)
    keypoints: int = 16
    merge: bool = True
    width: int = 128
    groups: int = 8  # of GroupNorm; 0: no normalisation
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array | None = None) -> jax.Array:
        layers = self.features, self.kernels, self.strides
        if len({len(x) for x in layers}) != 1:
            raise ConfigError(
                f"keypoints: features {self.features}, kernels {self.kernels} and strides "
                f"{self.strides} differ in length"
            )
        for i, (width, size, stride) in enumerate(zip(*layers, strict=True)):
            x = nn.Conv(width, (size, size), stride, dtype=self.dtype, name=f"conv_{i}")(x)
            if self.groups:
                x = _group_norm(self.groups, width, self.dtype, f"norm_{i}")(x)
            x = nn.relu(film(x, condition, self.dtype, f"film_{i}"))
        xy_BxKx2, found_BxKxC = self._look(x)
        if self.merge:
            found = nn.Dense(8, dtype=self.dtype, name="features")(found_BxKxC)
            x = jnp.concatenate([_flat(xy_BxKx2), _flat(found)], axis=-1)[:, None]
        else:
            x = jnp.concatenate([xy_BxKx2, found_BxKxC], axis=-1)
        return nn.Dense(self.width, dtype=self.dtype, name="out")(x)

    def _look(self, x_BxhxwxC: jax.Array) -> tuple[jax.Array, jax.Array]:
        batch, h, w, channels = x_BxhxwxC.shape
        x_BxNxC = x_BxhxwxC.reshape(batch, h * w, channels)
        logits_BxNxK = nn.Dense(self.keypoints, dtype=self.dtype, name="attention")(x_BxNxC)
        # float32: bfloat16's 8 bits make a mean position no finer than a cell of the map.
        share_BxNxK = jax.nn.softmax(logits_BxNxK.astype(jnp.float32), axis=1)
        y, x = jnp.meshgrid(jnp.linspace(-1, 1, h), jnp.linspace(-1, 1, w), indexing="ij")
        grid_Nx2 = jnp.stack([x, y], axis=-1).reshape(h * w, 2)
        xy = jnp.einsum("bnk,nd->bkd", share_BxNxK, grid_Nx2)
        found = jnp.einsum("bnk,bnc->bkc", share_BxNxK, x_BxNxC)
        return xy.astype(self.dtype), found.astype(self.dtype)


class StandardConv(nn.Module):
    """A 3×3 convolution of stride 2, padding 1, whose kernel is standardised per output channel."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param(
            "kernel",
            nn.initializers.lecun_normal(),
            (3, 3, x.shape[-1], self.features),
            jnp.float32,
        )
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        kernel = kernel - kernel.mean(axis=(0, 1, 2))
        kernel = kernel / (kernel.std(axis=(0, 1, 2)) + 1e-5)
        x, kernel, bias = (v.astype(self.dtype) for v in (x, kernel, bias))
        y = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y + bias


class Film(nn.Module):
    """Feature-wise modulation, the identity at first: x · (1 + scale(c)) + shift(c)."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        """Return x [B, h, w, C] modulated per channel by condition [B, E]."""
        zeros = nn.initializers.zeros
        scale = nn.Dense(x.shape[-1], kernel_init=zeros, dtype=self.dtype, name="scale")(condition)
        shift = nn.Dense(x.shape[-1], kernel_init=zeros, dtype=self.dtype, name="shift")(condition)
        return x * (1 + scale[:, None, None]) + shift[:, None, None]


def film(x: jax.Array, condition: jax.Array | None, dtype: Any, name: str) -> jax.Array:
    """Return x modulated by `condition`, or x itself where there is none."""
    return x if condition is None else Film(dtype=dtype, name=name)(x, condition)


def _patches(width: int, size: int, dtype: Any) -> nn.Conv:
    return nn.Conv(width, (size, size), size, padding="VALID", dtype=dtype, name="embedding")


def _group_norm(groups: int, width: int, dtype: Any, name: str) -> nn.GroupNorm:
    if width % groups:
        raise ConfigError(
            f"{width} features cannot be normalised in {groups} groups; set groups to a divisor"
        )
    return nn.GroupNorm(num_groups=groups, epsilon=1e-6, dtype=dtype, name=name)


def _tokens(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1)


ENCODERS = {"small_stem": SmallStem, "patch": Patch, "keypoints": Keypoints}
