"""Plain multi-head attention between two sets of tokens, for pooling and for image encoders."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax


def attend(
    x: jax.Array, seen: jax.Array, mask: jax.Array | None, *, heads: int, dtype: Any
) -> jax.Array:
    """Return what tokens x [B, n, D] find at tokens `seen` [B, N, D]: [B, n, D].

    mask: bool [B, 1, 1 or n, N], True: may look; None: at all. The projections are the children
    query, key, value and out of the module that calls.
    """
    init = nn.initializers.xavier_uniform()

    def project(name: str, tokens: jax.Array) -> jax.Array:
        shape = (heads, tokens.shape[-1] // heads)
        return nn.DenseGeneral(shape, dtype=dtype, kernel_init=init, name=name)(tokens)

    query, key, value = project("query", x), project("key", seen), project("value", seen)
    found = jax.nn.dot_product_attention(query, key, value, mask=mask)
    out = nn.DenseGeneral(x.shape[-1], axis=(-2, -1), dtype=dtype, kernel_init=init, name="out")
    return out(found)
