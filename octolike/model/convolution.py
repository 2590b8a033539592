"""Parts of convolutional encoders: standardised convolutions, group norm, patch embedding."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from octolike.config import ConfigError


class Convolution(nn.Module):
    """A size × size convolution with the same padding on every side, or XLA's "SAME".

    standardised: scale the kernel of each output channel to mean 0 and deviation 1 (weight
    standardisation, Qiao et al. 2019), which helps group norm with small batches.
    """

    features: int
    size: int = 3
    stride: int = 1
    padding: int | str = 1
    bias: bool = False
    standardised: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        if self.standardised:
            kernel = kernel - kernel.mean(axis=(0, 1, 2))
            kernel = kernel / (kernel.std(axis=(0, 1, 2)) + 1e-5)
        padding = self.padding
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (self.stride, self.stride),
            padding if isinstance(padding, str) else ((padding, padding),) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            y = y + bias.astype(self.dtype)
        return y


def group_norm(
    groups: int, width: int, dtype: Any, name: str, epsilon: float = 1e-6, **options: Any
) -> nn.GroupNorm:
    """Return the group norm of `width` features; the groups must divide them."""
    if width % groups:
        raise ConfigError(
            f"{width} features cannot be normalised in {groups} groups; set groups to a divisor"
        )
    return nn.GroupNorm(num_groups=groups, epsilon=epsilon, dtype=dtype, name=name, **options)


def embed_patches(x: jax.Array, width: int, patch: int, dtype: Any) -> jax.Array:
    """Return a linear map of each patch × patch square of x: [B, h // patch, w // patch, D].

    The layer is the child "embedding" of the calling module. Incomplete patches at the right and
    lower border are cut off. Raises ConfigError if x is smaller than a patch.
    """
    if min(x.shape[1:3]) < patch:
        raise ConfigError(
            f"an image or feature map of {x.shape[1]} × {x.shape[2]} is smaller than a patch of "
            f"{patch}"
        )
    return nn.Conv(width, (patch, patch), patch, padding="VALID", dtype=dtype, name="embedding")(x)


def tokens(x: jax.Array) -> jax.Array:
    """Return a feature map [B, h, w, C] as tokens [B, h · w, C], in row-major order."""
    return x.reshape(x.shape[0], -1, x.shape[-1])
