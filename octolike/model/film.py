"""Feature-wise modulation (FiLM, Perez et al. 2018): conditions an encoder on a vector."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Film(nn.Module):
    """x · (1 + scale(c)) + shift(c), initialised as the identity."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        """Return x [B, ..., C] modulated per channel by condition [B, E]."""
        zeros = nn.initializers.zeros
        scale = nn.Dense(x.shape[-1], kernel_init=zeros, dtype=self.dtype, name="scale")(condition)
        shift = nn.Dense(x.shape[-1], kernel_init=zeros, dtype=self.dtype, name="shift")(condition)
        shape = (len(condition), *(1,) * (x.ndim - 2), x.shape[-1])
        return x * (1 + scale.reshape(shape)) + shift.reshape(shape)


def film(x: jax.Array, condition: jax.Array | None, dtype: Any, name: str) -> jax.Array:
    """Return x modulated by `condition`, or x itself if that is None."""
    return x if condition is None else Film(dtype=dtype, name=name)(x, condition)
