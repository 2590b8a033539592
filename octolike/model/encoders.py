"""Image encoders: small stems, patches, keypoints, ResNets and ViTs, all with optional FiLM.

Every encoder maps float images [B, h, w, C] in [-1, 1] and an optional conditioning vector [B, E]
to feature tokens [B, N, F].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from octolike.config import ConfigError, build_component, option
from octolike.model import encoder_weights
from octolike.model.convolution import Convolution, embed_patches, group_norm, tokens
from octolike.model.film import film
from octolike.model.resnet import HybridResNet, ResNet
from octolike.model.vit import ViT


class SmallStem(nn.Module):
    """Standardised convolutions, then one token per `patch` × `patch` pixels.

    The defaults are Octo's SmallStem16 (patch=32: SmallStem32); features=(32, 64, 128), patch=8
    suits 64 to 128 pixels.
    """

    features: tuple[int, ...] = option((32, 96, 192, 384), "channels of each convolution")
    kernels: tuple[int, ...] = option((), "kernel size of each convolution; (): 3 for all")
    strides: tuple[int, ...] = option((), "stride of each convolution; (): 2 for all")
    padding: tuple[int, ...] = option((), "padding of each convolution; (): half of its kernel")
    patch: int = option(16, "pixels per side of the square that becomes one token", low=1)
    width: int = option(512, "F: width of the tokens", low=1)
    groups: int = option(32, "groups of the group norm; they must divide the channels", low=1)
    dtype: Any = option(jnp.dtype("float32"), "compute type; parameters are float32")

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
        cell, remainder = divmod(self.patch, math.prod(strides))
        if remainder or not cell:
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

    patch: int = option(16, "pixels per side of the square that becomes one token", low=1)
    width: int = option(512, "F: width of the tokens", low=1)
    dtype: Any = option(jnp.dtype("float32"), "compute type; parameters are float32")

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array | None = None) -> jax.Array:
        x = embed_patches(x, self.width, self.patch, self.dtype)
        return tokens(film(x, condition, self.dtype, "film"))


class Keypoints(nn.Module):
    """Object positions in few tokens: convolutions, then a spatial softmax per keypoint.

    Each keypoint's softmax over the feature map gives its mean position (x, y in [-1, 1]) and its
    mean features. FiLM follows every convolution, so that the instruction can decide *which*
    objects the keypoints track.
    """

    features: tuple[int, ...] = option((16, 32, 64), "channels of each convolution")
    kernels: tuple[int, ...] = option((5, 3, 3), "kernel size of each convolution")
    strides: tuple[int, ...] = option((2, 2, 2), "stride of each convolution")
    keypoints: int = option(16, "number of keypoints", low=1)
    merge: bool = option(True, "all keypoints in one token; False: one token per keypoint")
    width: int = option(128, "F: width of the tokens", low=1)
    groups: int = option(8, "groups of the group norm; 0: no normalisation", low=0)
    dtype: Any = option(jnp.dtype("float32"), "compute type; parameters are float32")

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
        xy_BxKx2, features_BxKxC = self._spatial_softmax(x)
        if self.merge:
            features_BxKx8 = nn.Dense(8, dtype=self.dtype, name="features")(features_BxKxC)
            x = jnp.concatenate([_flat(xy_BxKx2), _flat(features_BxKx8)], axis=-1)[:, None]
        else:
            x = jnp.concatenate([xy_BxKx2, features_BxKxC], axis=-1)
        return nn.Dense(self.width, dtype=self.dtype, name="out")(x)

    def _spatial_softmax(self, x_BxhxwxC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return each keypoint's mean position [B, K, 2] and mean features [B, K, C]."""
        batch, h, w, channels = x_BxhxwxC.shape
        x_BxNxC = x_BxhxwxC.reshape(batch, h * w, channels)
        logits_BxNxK = nn.Dense(self.keypoints, dtype=self.dtype, name="attention")(x_BxNxC)
        # float32: bfloat16's 8 bits resolve a mean position only to a cell of the map.
        weights_BxNxK = jax.nn.softmax(logits_BxNxK.astype(jnp.float32), axis=1)
        y, x = jnp.meshgrid(jnp.linspace(-1, 1, h), jnp.linspace(-1, 1, w), indexing="ij")
        grid_Nx2 = jnp.stack([x, y], axis=-1).reshape(h * w, 2)
        xy_BxKx2 = jnp.einsum("bnk,nd->bkd", weights_BxNxK, grid_Nx2)
        features_BxKxC = jnp.einsum("bnk,bnc->bkc", weights_BxNxK, x_BxNxC)
        return xy_BxKx2.astype(self.dtype), features_BxKxC.astype(self.dtype)


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1)


ENCODERS = {
    "small_stem": SmallStem,
    "patch": Patch,
    "keypoints": Keypoints,
    "resnet": ResNet,
    "hybrid_resnet": HybridResNet,
    "vit": ViT,
}


def load_weights(
    component: Mapping[str, Any], shapes: Mapping[str, Any], path: str = "encoder"
) -> dict[str, Any]:
    """Return the parameters of the component's `weights` file, nested as `shapes`.

    Args:
        component: the encoder's component.
        shapes: all parameters of the encoder, as arrays or shapes. FiLM, which published files
            lack, is left out of the result.
        path: the component's place in the config, for errors.

    Raises:
        ConfigError: for an encoder without `weights`, or a file that does not fit.
    """
    encoder = build_component(ENCODERS, component, path)
    if not getattr(encoder, "weights", ""):
        raise ConfigError(f"{path} ({component['kind']!r}) has no weights file; set its 'weights'")
    return encoder_weights.load(encoder.weights, component["kind"], shapes)
