"""Networks of diffusion and flow heads: noised chunk, time and readout embedding to a chunk.

    network(embedding [..., D], x [..., F], time [..., 1], known, train=) → float32 [..., F]

A chunk is flattened to F = H · A values, action dimensions innermost; the leading axes are
arbitrary but equal. known: bool [..., H], True for actions of x that are clean (real-time
chunking); None without such a prefix. The weights of this input start at zero, so that a
network trained without it keeps its function. Dropout uses the stream "dropout", in training only.

    mlp          a residual MLP over the concatenated inputs, as in Octo
    unet         convolutions along the chunk at several scales (Diffusion Policy, Chi et al. 2023)
    transformer  self-attention over [time] [readout] [action 1] … [action H]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from octolike.config import ConfigError, build_component, option
from octolike.model.transformer import Transformer


class Denoiser(nn.Module):
    """The base of the networks: features of the time."""

    time_width: int = option(32, "width of the features of the time", low=2)
    dtype: Any = option(jnp.dtype("float32"), "compute type; parameters are float32")

    def time_features(self, time: jax.Array) -> jax.Array:
        """Return [..., time_width] for times [..., 1]: learned Fourier features, a small MLP."""
        shape = (self.time_width // 2, 1)
        frequencies = self.param("fourier", nn.initializers.normal(0.2), shape, jnp.float32)
        # Not a matrix product: on a TPU its inputs are rounded, an error of up to 1.1 rad.
        angle = 2 * jnp.pi * time.astype(jnp.float32) * frequencies[:, 0]
        t = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        t = nn.swish(nn.Dense(2 * self.time_width, dtype=self.dtype, name="time_in")(t))
        return nn.Dense(self.time_width, dtype=self.dtype, name="time_out")(t)

    def add_known(self, h: jax.Array, known: jax.Array) -> jax.Array:
        """Return h [..., D] plus a linear map of flags known [..., n] to its width."""
        init = nn.initializers.zeros
        dense = nn.Dense(
            h.shape[-1], use_bias=False, dtype=self.dtype, kernel_init=init, name="known"
        )
        return h + dense(known.astype(self.dtype))


class MLP(Denoiser):
    """Blocks of h + down(swish(up(norm(drop(h))))) over (time, embedding, noised actions)."""

    hidden: int = option(256, "width of the residual stream", low=1)
    blocks: int = option(3, "residual blocks", low=0)
    expansion: int = option(4, "hidden width of a block over `hidden`", low=1)
    layer_norm: bool = option(True, "layer norm in every block")
    dropout: float = option(0.0, "dropout rate in training", low=0, high=1)

    @nn.compact
    def __call__(
        self,
        embedding: jax.Array,
        x: jax.Array,
        time: jax.Array,
        known: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        def dense(width: int, name: str) -> nn.Dense:
            return nn.Dense(width, dtype=self.dtype, name=name)

        t = self.time_features(time)
        h = jnp.concatenate([t, embedding.astype(t.dtype), x.astype(t.dtype)], axis=-1)
        h = dense(self.hidden, "in")(h)
        if known is not None:
            h = self.add_known(h, known)
        for i in range(self.blocks):
            y = nn.Dropout(self.dropout, deterministic=not train)(h)
            if self.layer_norm:
                y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name=f"norm_{i}")(y)
            y = nn.swish(dense(self.expansion * self.hidden, f"up_{i}")(y))
            h = h + dense(self.hidden, f"down_{i}")(y)
        return dense(x.shape[-1], "out")(nn.swish(h)).astype(jnp.float32)


class UNet(Denoiser):
    """Convolutions along a chunk of any length, modulated by time and embedding.

    Every scale halves the chunk, rounded up, so that short chunks may have many scales.
    """

    horizon: int = option(1, "H: actions per chunk, from the data", low=1)
    features: Sequence[int] = option((128, 256, 512), "channels of each scale")
    kernel: int = option(3, "kernel size of the convolutions", low=1)
    groups: int = option(8, "groups of the group norm; they must divide the channels", low=1)
    dropout: float = option(0.0, "dropout rate in training", low=0, high=1)

    def __post_init__(self) -> None:
        uneven = [n for n in self.features if n % self.groups]
        if not self.features or uneven:
            raise ConfigError(
                f"unet: features {tuple(self.features)} must be multiples of groups {self.groups}"
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        embedding: jax.Array,
        x: jax.Array,
        time: jax.Array,
        known: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        t = self.time_features(time)
        condition = jnp.concatenate([t, embedding.astype(t.dtype)], axis=-1)
        condition = nn.swish(condition.reshape(-1, condition.shape[-1]))

        def block(h: jax.Array, features: int, name: str) -> jax.Array:
            module = _ConvBlock(
                features, self.kernel, self.groups, self.dropout, self.dtype, name=name
            )
            return module(h, condition, train=train)

        def conv(features: int, kernel: int, name: str, stride: int = 1) -> nn.Conv:
            return nn.Conv(features, (kernel,), strides=(stride,), dtype=self.dtype, name=name)

        h = x.astype(self.dtype).reshape(len(condition), self.horizon, -1)
        action_dim, skips = h.shape[-1], []
        for i, features in enumerate(self.features):
            if i:
                h = conv(features, 3, f"shrink_{i}", stride=2)(h)
            h = block(h, features, f"down_{i}")
            if known is not None and not i:
                h = self.add_known(h, known.reshape(len(condition), self.horizon, 1))
            skips.append(h)
        h = block(h, self.features[-1], "middle")
        for i, features in reversed(list(enumerate(self.features))):
            h = block(jnp.concatenate([h, skips[i]], axis=-1), features, f"up_{i}")
            if i:
                length = skips[i - 1].shape[1]
                h = conv(features, 3, f"grow_{i}")(jnp.repeat(h, 2, axis=1)[:, :length])
        return conv(action_dim, 1, "out")(h).astype(jnp.float32).reshape(x.shape)


class TransformerDenoiser(Denoiser):
    """A small pre-norm transformer over the time, the readout and the actions of the chunk."""

    horizon: int = option(1, "H: actions per chunk, from the data", low=1)
    width: int = option(256, "token width", low=1)
    layers: int = option(4, "transformer blocks", low=0)
    attention_heads: int = option(4, "attention heads; they must divide the width", low=1)
    mlp_width: int = option(1024, "width of the feed-forward layer", low=1)
    dropout: float = option(0.0, "dropout rate in training", low=0, high=1)

    def __post_init__(self) -> None:
        if self.width % self.attention_heads:
            raise ConfigError(
                f"transformer denoiser: width {self.width} is not a multiple of attention_heads "
                f"{self.attention_heads}"
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        embedding: jax.Array,
        x: jax.Array,
        time: jax.Array,
        known: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        def token(parts: jax.Array, name: str) -> jax.Array:
            tokens = nn.Dense(self.width, dtype=self.dtype, name=name)(parts)
            return tokens.reshape(-1, tokens.shape[-2], self.width)

        actions = x.reshape(*x.shape[:-1], self.horizon, -1)
        action_tokens = token(actions, "in")
        if known is not None:
            action_tokens = self.add_known(action_tokens, known.reshape(-1, self.horizon, 1))
        h = jnp.concatenate(
            [
                token(self.time_features(time)[..., None, :], "time"),
                token(embedding[..., None, :], "embedding"),
                action_tokens,
            ],
            axis=1,
        )
        init = nn.initializers.normal(0.02)
        positions = self.param("pos_embedding", init, (1, *h.shape[1:]), jnp.float32)
        transformer = Transformer(
            layers=self.layers,
            attention_heads=self.attention_heads,
            mlp_width=self.mlp_width,
            dropout=self.dropout,
            dtype=self.dtype,
            name="transformer",
        )
        h, _ = transformer(h + positions.astype(self.dtype), None, None, train=train)
        out = nn.Dense(actions.shape[-1], dtype=self.dtype, name="out")(h[:, 2:])
        return out.astype(jnp.float32).reshape(x.shape)


class _ConvBlock(nn.Module):
    """Two convolutions with group norm and mish, [N, H, C] to [N, H, features], and a skip."""

    features: int
    kernel: int
    groups: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array, *, train: bool) -> jax.Array:
        def layer(h: jax.Array, i: int) -> jax.Array:
            h = nn.Conv(self.features, (self.kernel,), dtype=self.dtype, name=f"conv_{i}")(h)
            h = nn.GroupNorm(self.groups, epsilon=1e-6, dtype=self.dtype, name=f"norm_{i}")(h)
            return h * jnp.tanh(nn.softplus(h))

        film = nn.Dense(2 * self.features, dtype=self.dtype, name="film")(condition)[:, None]
        scale, shift = jnp.split(film, 2, axis=-1)
        h = layer(x, 0) * (1 + scale) + shift
        h = layer(nn.Dropout(self.dropout, deterministic=not train)(h), 1)
        return h + nn.Dense(self.features, dtype=self.dtype, name="short_cut")(x)


def build(component: Mapping[str, Any], path: str, *, horizon: int, dtype: Any) -> Denoiser:
    """Return the network of a component for chunks of `horizon` actions; errors name `path`."""
    return build_component(NETWORKS, component, path, horizon=horizon, dtype=dtype)


NETWORKS = {"mlp": MLP, "unet": UNet, "transformer": TransformerDenoiser}
