"""Networks of diffusion and flow heads: noisy chunk, time and readout to a chunk.

    network(embedding [..., D], x [..., F], time [..., 1], train=) → float32 [..., F]

A chunk is flattened to F = H · A values, action dimensions innermost; leading axes are free, and
the same for all three. Dropout takes the stream "dropout" and is for training only.

    mlp          a residual MLP over everything at once, as in Octo
    unet         convolutions along the chunk at several scales (Diffusion Policy, Chi et al. 2023)
    transformer  [time] [readout] [action 1] … [action H] attend to one another
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from octolike.config import ConfigError, build_component
from octolike.model.transformer import Transformer

TIME_WIDTH = 32  # of the features that every network makes of the time


class Denoiser(nn.Module):
    """What the networks share: the features of the time."""

    dtype: Any = jnp.float32

    def time_features(self, time: jax.Array) -> jax.Array:
        """Return [..., 32] for times [..., 1]: learned Fourier features and two dense layers."""
        waves = self.param("fourier", nn.initializers.normal(0.2), (16, 1), jnp.float32)
        angle = 2 * jnp.pi * time.astype(jnp.float32) @ waves.T
        t = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        t = nn.swish(nn.Dense(2 * TIME_WIDTH, dtype=self.dtype, name="time_in")(t))
        return nn.Dense(TIME_WIDTH, dtype=self.dtype, name="time_out")(t)


class MLP(Denoiser):
    """Blocks of h + down(swish(up(norm(drop(h))))) over (time, embedding, noisy actions)."""

    hidden: int = 256
    blocks: int = 3
    expansion: int = 4
    layer_norm: bool = True
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, embedding: jax.Array, x: jax.Array, time: jax.Array, *, train: bool = False
    ) -> jax.Array:
        def dense(width: int, name: str) -> nn.Dense:
            return nn.Dense(width, dtype=self.dtype, name=name)

        t = self.time_features(time)
        h = jnp.concatenate([t, embedding.astype(t.dtype), x.astype(t.dtype)], axis=-1)
        h = dense(self.hidden, "in")(h)
        for i in range(self.blocks):
            y = nn.Dropout(self.dropout, deterministic=not train)(h)
            if self.layer_norm:
                y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name=f"norm_{i}")(y)
            y = nn.swish(dense(self.expansion * self.hidden, f"up_{i}")(y))
            h = h + dense(self.hidden, f"down_{i}")(y)
        return dense(x.shape[-1], "out")(nn.swish(h)).astype(jnp.float32)


class UNet(Denoiser):
    """Convolutions along the chunk, modulated by time and embedding, for chunks of any length.

    features: channels of each scale; from one to the next the chunk is halved, rounded up, so that
    more scales than the chunk has halves do no harm. groups: of every GroupNorm.
    """

    horizon: int = 1
    features: Sequence[int] = (128, 256, 512)
    kernel: int = 3
    groups: int = 8
    dropout: float = 0.0

    def __post_init__(self) -> None:
        uneven = [n for n in self.features if n % self.groups]
        if not self.features or uneven:
            raise ConfigError(
                f"unet: features {tuple(self.features)} must be multiples of groups {self.groups}"
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self, embedding: jax.Array, x: jax.Array, time: jax.Array, *, train: bool = False
    ) -> jax.Array:
        t = self.time_features(time)
        condition = jnp.concatenate([t, embedding.astype(t.dtype)], axis=-1)
        condition = nn.swish(condition.reshape(-1, condition.shape[-1]))

        def block(h: jax.Array, features: int, name: str) -> jax.Array:
            made = _ConvBlock(
                features, self.kernel, self.groups, self.dropout, self.dtype, name=name
            )
            return made(h, condition, train=train)

        def conv(features: int, kernel: int, name: str, stride: int = 1) -> nn.Conv:
            return nn.Conv(features, (kernel,), strides=(stride,), dtype=self.dtype, name=name)

        h = x.astype(self.dtype).reshape(len(condition), self.horizon, -1)
        action_dim, skips = h.shape[-1], []
        for i, features in enumerate(self.features):
            if i:
                h = conv(features, 3, f"shrink_{i}", stride=2)(h)
            h = block(h, features, f"down_{i}")
            skips.append(h)
        h = block(h, self.features[-1], "middle")
        for i, features in reversed(list(enumerate(self.features))):
            h = block(jnp.concatenate([h, skips[i]], axis=-1), features, f"up_{i}")
            if i:
                length = skips[i - 1].shape[1]
                h = conv(features, 3, f"grow_{i}")(jnp.repeat(h, 2, axis=1)[:, :length])
        return conv(action_dim, 1, "out")(h).astype(jnp.float32).reshape(x.shape)


class TransformerDenoiser(Denoiser):
    """A small pre-norm transformer; the readout is a token in front of the chunk's actions."""

    horizon: int = 1
    width: int = 256
    layers: int = 4
    attention_heads: int = 4
    mlp_width: int = 1024
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.width % self.attention_heads:
            raise ConfigError(
                f"transformer denoiser: width {self.width} is no multiple of attention_heads "
                f"{self.attention_heads}"
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self, embedding: jax.Array, x: jax.Array, time: jax.Array, *, train: bool = False
    ) -> jax.Array:
        def token(parts: jax.Array, name: str) -> jax.Array:
            made = nn.Dense(self.width, dtype=self.dtype, name=name)(parts)
            return made.reshape(-1, made.shape[-2], self.width)

        actions = x.reshape(*x.shape[:-1], self.horizon, -1)
        h = jnp.concatenate(
            [
                token(self.time_features(time)[..., None, :], "time"),
                token(embedding[..., None, :], "embedding"),
                token(actions, "in"),
            ],
            axis=1,
        )
        init = nn.initializers.normal(0.02)
        place = self.param("pos_embedding", init, (1, *h.shape[1:]), jnp.float32)
        everybody = jnp.ones((1, 1, h.shape[1], h.shape[1]), bool)
        transformer = Transformer(
            layers=self.layers,
            attention_heads=self.attention_heads,
            mlp_width=self.mlp_width,
            dropout=self.dropout,
            dtype=self.dtype,
            name="transformer",
        )
        h, _ = transformer(h + place.astype(self.dtype), everybody, None, train=train)
        out = nn.Dense(actions.shape[-1], dtype=self.dtype, name="out")(h[:, 2:])
        return out.astype(jnp.float32).reshape(x.shape)


class _ConvBlock(nn.Module):
    """Two convolutions with GroupNorm and mish, [N, H, C] to [N, H, features], and a short cut."""

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
    """Return the network of a component for chunks of so many steps; ConfigError names `path`."""
    return build_component(NETWORKS, component, path, horizon=horizon, dtype=dtype)


NETWORKS = {"mlp": MLP, "unet": UNet, "transformer": TransformerDenoiser}
