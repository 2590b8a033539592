"""Pixels to feature tokens: small stems, patches, keypoints, ResNets, ViTs; each takes FiLM.

Every encoder maps float images [B, h, w, C] in [-1, 1], with or without a conditioning vector
[B, E], to feature tokens [B, N, F].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from octolike.config import ConfigError, build_component
from octolike.model import encoder_weights
from octolike.model.convolution import Convolution, embed_patches, group_norm, tokens
from octolike.model.film import film
from octolike.model.resnet import ResNet
from octolike.model.vit import ViT


class SmallStem(nn.Module):
    """Standardised convolutions, then one token per `patch` × `patch` pixels.

    The defaults are Octo's SmallStem16 (patch=32: SmallStem32); features=(32, 64, 128), patch=8
    suits 64 to 128 pixels. kernels, strides, padding: of each convolution; () means 3, 2 and
    kernel // 2 for all.
    """

    features: tuple[int, ...] = (32, 96, 192, 384)
    kernels: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    patch: int = 16
    width: int = 512
    groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array | None = None) -> jax.Array:
        n = len(self.features)
        kernels, strides = self.kernels or (3,) * n, self.strides or (2,) * n
        padding = self.padding or tuple(k // 2 for k in kernels)
        if {len(kernels), len(strides), len(padding)} != {n}:
            raise ConfigError(
                f"small_stem: features {self.features}, kernels {kernels}, strides {strides} and "
                f"padding {padding} differ in length"
            )
        cell, rest = divmod(self.patch, math.prod(strides))
        if rest or not cell:
            raise ConfigError(
                f"small_stem: convolutions of strides {strides} make cells of "
                f"{math.prod(strides)} pixels; patch {self.patch} must be a multiple of that"
            )
        for i, layer in enumerate(zip(self.features, kernels, strides, padding, strict=True)):
            x = Convolution(*layer, bias=True, dtype=self.dtype, name=f"conv_{i}")(x)
            x = nn.relu(group_norm(self.groups, layer[0], self.dtype, f"norm_{i}")(x))
        x = embed_patches(x, self.width, cell, self.dtype)
        return tokens(film(x, condition, self.dtype, "film"))


class Patch(nn.Module):
    """One convolution: a linear map of each `patch` × `patch` square."""

    patch: int = 16
    width: int = 512
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array | None = None) -> jax.Array:
        x = embed_patches(x, self.width, self.patch, self.dtype)
        return tokens(film(x, condition, self.dtype, "film"))


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
                x = group_norm(self.groups, width, self.dtype, f"norm_{i}")(x)
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


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1)


ENCODERS = {
    "small_stem": SmallStem,
    "patch": Patch,
    "keypoints": Keypoints,
    "resnet": ResNet,
    "vit": ViT,
}


def load_weights(
    component: Mapping[str, Any], fresh: Mapping[str, Any], path: str = "encoder"
) -> dict[str, Any]:
    """Return the parameters, nested as `fresh`, that the component's `weights` file holds.

    fresh: the encoder's own parameters, arrays or shapes, which may lack nothing and say what is
    expected. What no file has (FiLM) is left out of the result. `path` names the component in
    errors. Raises ConfigError for an encoder without `weights`, or a file that does not fit.
    """
    encoder = build_component(ENCODERS, component, path)
    if not getattr(encoder, "weights", ""):
        raise ConfigError(f"{path} ({component['kind']!r}) names no weights file")
    return encoder_weights.load(encoder.weights, component["kind"], fresh)
