"""Attention: the scaled dot product, and the multi-head layer of pooling and image encoders.

The dot product is cuDNN's flash attention where the device has it: an NVIDIA GPU since Ampere, of
compute capability 8.0, with bfloat16 or float16 and heads of a width that it knows. Elsewhere it is
the compiler's.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

MULTIPLE = 8  # tokens: what cuDNN's kernels with a mask are aligned to


def dot_product(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Return [B, n, H, Dh]: softmax(query keyᵀ / √Dh) value, for query [B, n, H, Dh].

    key, value: [B, N, H, Dh]; mask: bool [B, 1, n or 1, N], True: may look. implementation: "xla"
    or "cudnn"; None: what `implementation_for` says.
    """
    implementation = implementation or implementation_for(query.dtype, query.shape[-1])
    if implementation == "xla":
        return jax.nn.dot_product_attention(query, key, value, mask=mask)
    return _aligned(query, key, value, mask, implementation)


def implementation_for(dtype: Any, width: int) -> str:
    """Return "cudnn" if this process's devices have flash attention for heads so wide, or "xla"."""
    device = jax.local_devices()[0]
    capability = getattr(device, "compute_capability", "") if device.platform == "gpu" else ""
    if not capability.replace(".", "").isdigit():  # no GPU, or AMD's
        return "xla"
    widest = 256 if float(capability) >= 9 else 128
    half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    fits = width <= widest and width % 8 == 0
    return "cudnn" if float(capability) >= 8 and half and fits else "xla"


def _aligned(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, implementation: str
) -> jax.Array:
    """Do the same with both numbers of tokens filled up to a multiple: nobody looks at those."""
    n, seen = query.shape[1], key.shape[1]
    if mask is None:
        mask = jnp.ones((1, 1, n, seen), bool)
    mask = jnp.broadcast_to(mask, (*mask.shape[:2], n, seen))
    rows, columns = (0, -n % MULTIPLE), (0, -seen % MULTIPLE)
    fill = lambda x, tokens: jnp.pad(x, ((0, 0), tokens, (0, 0), (0, 0)))
    found = jax.nn.dot_product_attention(
        fill(query, rows),
        fill(key, columns),
        fill(value, columns),
        mask=jnp.pad(mask, ((0, 0), (0, 0), rows, columns)),
        implementation=implementation,
    )
    return found[:, :n]


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
    found = dot_product(query, key, value, mask)
    out = nn.DenseGeneral(x.shape[-1], axis=(-2, -1), dtype=dtype, kernel_init=init, name="out")
    return out(found)
