"""Many tokens to few: learned probes that attend to them (multi-head attention pooling, MAP)."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from octolike.config import ConfigError, option
from octolike.model.attention import attend


class AttentionPooling(nn.Module):
    """x = attention of `tokens` learned probes to the visible tokens; then x + mlp(norm(x)).

    If no token is visible, the result depends on the parameters alone.
    """

    tokens: int = option(1, "number of probes, and so of pooled tokens", low=1)
    heads: int = option(8, "attention heads; they must divide the token width", low=1)
    expansion: int = option(4, "hidden width of the feed-forward over the token width", low=1)
    dtype: Any = option(jnp.dtype("float32"), "compute type")

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Return [..., n, D] for x [..., N, D] and mask bool [..., N], True: visible; None: all.

        Raises ConfigError if the heads do not divide D.
        """
        *leading, length, width = x.shape
        if width % self.heads:
            raise ConfigError(
                f"attention pooling: {self.heads} heads do not divide a token width of {width}; "
                "set the number of heads to a divisor"
            )
        mask = jnp.broadcast_to(True if mask is None else mask, x.shape[:-1])
        # Zeros as well: if all tokens are hidden, attention spreads evenly over them.
        x = jnp.where(mask[..., None], x, 0).reshape(-1, length, width)
        probe = self.param("probe", _xavier, (1, self.tokens, width), jnp.float32)
        probe = jnp.broadcast_to(probe.astype(self.dtype), (len(x), self.tokens, width))

        mask = mask.reshape(-1, 1, 1, length)
        out = attend(probe, x, mask, heads=self.heads, dtype=self.dtype)
        h = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(out)
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=_xavier)
        h = nn.gelu(dense(self.expansion * width, name="mlp_in")(h), approximate=True)
        h = dense(width, name="mlp_out")(h)
        return (out + h).reshape(*leading, self.tokens, width)


class TokenLearner(nn.Module):
    """Position embedding, norm and attention pooling to `tokens` learned summaries."""

    tokens: int = option(meaning="number of pooled tokens", low=1)
    heads: int = option(8, "attention heads; they must divide the token width", low=1)
    dtype: Any = option(jnp.dtype("float32"), "compute type")

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Return [..., n, D] for x [..., N, D] and mask bool [..., N], True: visible; None: all."""
        init = nn.initializers.normal(0.02)
        x = x + self.param("pos_embedding", init, x.shape[-2:], jnp.float32).astype(self.dtype)
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)
        return AttentionPooling(self.tokens, self.heads, dtype=self.dtype, name="pool")(x, mask)


_xavier = nn.initializers.xavier_uniform()
