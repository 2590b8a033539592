"""ResNet-18, 34 and 50 with group norm: images to one token per 32 × 32 pixels."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from octolike.config import option
from octolike.model.convolution import Convolution, group_norm, tokens
from octolike.model.film import film

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


class ResNet(nn.Module):
    """A residual network (He et al. 2015; the stride of a bottleneck is in its 3 × 3 convolution).

    Depths 18 and 34 have two 3 × 3 convolutions per block, 50 has bottlenecks. FiLM modulates
    every block before its residual sum. Of timm's published weights, resnet50_gn fits, with
    standardised=False.
    """

    depth: int = option(18, "number of layers", choices=tuple(BLOCKS))
    width: int = option(64, "channels of the first stage; every later stage doubles them", low=1)
    groups: int = option(32, "groups of the group norm; they must divide the channels", low=1)
    standardised: bool = option(True, "standardise the kernels, in addition to the group norm")
    epsilon: float = option(1e-5, "epsilon of the group norm; PyTorch's is 1e-5", low=0)
    weights: str = option("", "file of published weights, in timm's layout, read at the start")
    dtype: Any = option(jnp.dtype("float32"), "compute type; parameters are float32")

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array | None = None) -> jax.Array:
        x = Convolution(
            self.width, 7, 2, 3, standardised=self.standardised, dtype=self.dtype, name="conv"
        )(x)
        x = nn.relu(group_norm(self.groups, self.width, self.dtype, "norm", self.epsilon)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, blocks in enumerate(BLOCKS[self.depth], start=1):
            for i in range(blocks):
                block = ResidualBlock(
                    self.width * 2 ** (stage - 1),
                    stride=2 if stage > 1 and not i else 1,
                    bottleneck=self.depth >= 50,
                    groups=self.groups,
                    standardised=self.standardised,
                    epsilon=self.epsilon,
                    dtype=self.dtype,
                    name=f"stage_{stage}_block_{i}",
                )
                x = block(x, condition)
        return tokens(x)


class ResidualBlock(nn.Module):
    """relu(x + film(convolutions(x))); the skip path has a convolution if the shape changes."""

    width: int
    stride: int
    bottleneck: bool
    groups: int
    standardised: bool
    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array | None) -> jax.Array:
        out = self.width * (4 if self.bottleneck else 1)
        layers = (  # (features, kernel size, stride)
            ((self.width, 1, 1), (self.width, 3, self.stride), (out, 1, 1))
            if self.bottleneck
            else ((out, 3, self.stride), (out, 3, 1))
        )
        y = x
        for i, layer in enumerate(layers, start=1):
            y = self._layer(nn.relu(y) if i > 1 else y, *layer, suffix=f"_{i}")
        y = film(y, condition, self.dtype, "film")
        if self.stride != 1 or x.shape[-1] != out:
            x = self._layer(x, out, 1, self.stride, suffix="_skip")
        return nn.relu(x + y)

    def _layer(self, x: jax.Array, width: int, size: int, stride: int, suffix: str) -> jax.Array:
        x = Convolution(
            width,
            size,
            stride,
            size // 2,
            standardised=self.standardised,
            dtype=self.dtype,
            name=f"conv{suffix}",
        )(x)
        return group_norm(self.groups, width, self.dtype, f"norm{suffix}", self.epsilon)(x)
