"""Attention: the scaled dot product, and the multi-head layer of pooling and image encoders.

The dot product is cuDNN's flash attention if the device supports it: an NVIDIA GPU of compute
capability 8.0 (Ampere) or later, bfloat16 or float16, and a supported head width. Otherwise XLA
compiles it.
"""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

Implementation = Literal["xla", "cudnn"]
MULTIPLE = 8  # tokens: alignment of cuDNN's kernels with a mask


def dot_product(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Return [B, n, H, Dh]: softmax(query keyᵀ / √Dh) value, for query [B, n, H, Dh].

    key, value: [B, N, H, Dh]; mask: bool [B, 1, n or 1, N], True: may attend. implementation: "xla"
    or "cudnn"; None: that of `implementation_for`.
    """
    implementation = implementation or implementation_for(query.dtype, query.shape[-1])
    if implementation == "xla":
        return jax.nn.dot_product_attention(query, key, value, mask=mask)
    return _aligned(query, key, value, mask, implementation)


def implementation_for(dtype: Any, width: int) -> Implementation:
    """Return "cudnn" if this process's devices support it for this head width, else "xla"."""
    device = jax.local_devices()[0]
    capability = getattr(device, "compute_capability", "") if device.platform == "gpu" else ""
    if not capability.replace(".", "").isdigit():  # no GPU, or AMD's
        return "xla"
    widest = 256 if float(capability) >= 9 else 128
    half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    fits = width <= widest and width % 8 == 0
    return "cudnn" if float(capability) >= 8 and half and fits else "xla"


def _aligned(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    implementation: Implementation,
) -> jax.Array:
    """Return the same with both sequences padded to a multiple; the padding is masked."""
    n, keys = query.shape[1], key.shape[1]
    if mask is None:
        mask = jnp.ones((1, 1, n, keys), bool)
    mask = jnp.broadcast_to(mask, (*mask.shape[:2], n, keys))
    query_pad, key_pad = (0, -n % MULTIPLE), (0, -keys % MULTIPLE)

    def pad(x: jax.Array, width: tuple[int, int]) -> jax.Array:
        return jnp.pad(x, ((0, 0), width, (0, 0), (0, 0)))

    out = jax.nn.dot_product_attention(
        pad(query, query_pad),
        pad(key, key_pad),
        pad(value, key_pad),
        mask=jnp.pad(mask, ((0, 0), (0, 0), query_pad, key_pad)),
        implementation=implementation,
    )
    return out[:, :n]


def attend(
    x: jax.Array, context: jax.Array, mask: jax.Array | None, *, heads: int, dtype: Any
) -> jax.Array:
    """Return [B, n, D], multi-head attention of tokens x [B, n, D] to context [B, N, D].

    mask: bool [B, 1, 1 or n, N], True: may attend; None: all True. The projections are the children
    query, key, value and out of the calling module.
    """
    init = nn.initializers.xavier_uniform()

    def project(name: str, tokens: jax.Array) -> jax.Array:
        shape = (heads, tokens.shape[-1] // heads)
        return nn.DenseGeneral(shape, dtype=dtype, kernel_init=init, name=name)(tokens)

    query, key, value = project("query", x), project("key", context), project("value", context)
    if mask is not None:
        # Under vmap (heads with parameters per example) jax's batching of the cuDNN call reshapes
        # the mask to all heads, so it must have them.
        mask = jnp.broadcast_to(mask, (mask.shape[0], heads, *mask.shape[2:]))
    heads_BxnxHxDh = dot_product(query, key, value, mask)
    out = nn.DenseGeneral(x.shape[-1], axis=(-2, -1), dtype=dtype, kernel_init=init, name="out")
    return out(heads_BxnxHxDh)
