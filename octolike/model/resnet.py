"""ResNets with group norm: images to one token per 32 × 32 pixels."""

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


class HybridResNet(nn.Module):
    """The residual network before Octo's and ViT's hybrid transformers: Octo's ViTResnet.

    Bottlenecks, standardised kernels, and padding as in TensorFlow, which `ResNet` has not. FiLM
    modulates the output of every stage after the first, or that of the root if there are no stages.
    """

    blocks: tuple[int, ...] = option((2, 2, 2, 2), "bottlenecks of each stage; Octo's: 26 layers")
    width: int = option(64, "channels of the first stage; every later stage doubles them", low=1)
    groups: int = option(32, "groups of the group norm; they must divide the channels", low=1)
    dtype: Any = option(jnp.dtype("float32"), "compute type; parameters are float32")

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array | None = None) -> jax.Array:
        x = Convolution(self.width, 7, 2, "SAME", dtype=self.dtype, name="root")(x)
        x = nn.relu(group_norm(self.groups, self.width, self.dtype, "root_norm")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        films = 0
        for stage, blocks in enumerate(self.blocks):
            for unit in range(blocks):
                x = Bottleneck(
                    self.width * 2**stage,
                    stride=2 if stage and not unit else 1,
                    groups=self.groups,
                    dtype=self.dtype,
                    name=f"block_{stage + 1}_unit_{unit + 1}",
                )(x)
            if stage:
                x = film(x, condition, self.dtype, f"film_{films}" if films else "film")
                films += 1
        if not self.blocks:
            x = film(x, condition, self.dtype, "film")
        return tokens(x)


class Bottleneck(nn.Module):
    """relu(x + convolutions(x)) with 4 · width channels; the parts have Octo's names."""

    width: int
    stride: int
    groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        skip, wide = x, 4 * self.width
        if self.stride != 1 or x.shape[-1] != wide:
            skip = self._layer(x, wide, 1, self.stride, "_proj")
        y = nn.relu(self._layer(x, self.width, 1, 1, "1"))
        y = nn.relu(self._layer(y, self.width, 3, self.stride, "2"))
        # An untrained block is the identity.
        y = self._layer(y, wide, 1, 1, "3", scale_init=nn.initializers.zeros)
        return nn.relu(skip + y)

    def _layer(
        self, x: jax.Array, width: int, size: int, stride: int, suffix: str, **options: Any
    ) -> jax.Array:
        convolution = Convolution(
            width, size, stride, "SAME", dtype=self.dtype, name=f"conv{suffix}"
        )
        return group_norm(self.groups, width, self.dtype, f"gn{suffix}", **options)(convolution(x))
