"""Attention: one function for every device, and the multi-head layer of pooling and encoders.

The kernel of `masked_attention` depends on the device that is traced for:

    "flash"    an NVIDIA GPU of compute capability 8.0 (Ampere) or later, bfloat16: cuDNN
    "splash"   a TPU, bfloat16: jax's Pallas kernel
    "xla"      any other: matrix products and a softmax, with the mask as a tensor

Calls with few queries, or with the few keys of a pooled group, are not worth a kernel: XLA's.
"""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from octolike.model import attention_kernels
from octolike.model.target import target
from octolike.model.tokens import AttentionMask

Implementation = Literal["xla", "flash", "splash"]
FEW = 64  # queries: with fewer, a kernel's tiles are mostly padding


def dot_product(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """Return [B, n, H, Dh]: softmax(query keyᵀ / √Dh) value, for query [B, n, H, Dh], by XLA.

    key, value: [B, N, H, Dh]; mask: bool [B, 1, n or 1, N], True: may attend.
    """
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="xla")


def masked_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: AttentionMask | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Return the attention [B, n, H, Dh] of n queries to a sequence of N keys.

    query: [B, n, H, Dh]; key, value: [B, N, H, Dh]. mask: of the sequence; None: every query
    attends to every key. implementation: None: the best of the device that is traced for.
    """
    implementation = implementation or _best(query, key, mask)
    if implementation == "xla":
        return _by_xla(query, key, value, mask)
    if implementation == "splash":
        return attention_kernels.splash(query, key, value, mask)
    if mask is None:
        return attention_kernels.flash(query, key, value, None, None)
    out = []
    for start, end in mask.layout.spans():
        span = query[:, start:end], key[:, :end], value[:, :end]
        excluded = mask.layout.exclusions(start, end)
        out.append(attention_kernels.flash(*span, excluded, mask.visible[:, :end]))
    return jnp.concatenate(out, axis=1)


def _by_xla(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask | None
) -> jax.Array:
    if mask is None:
        return dot_product(query, key, value)
    out = [
        dot_product(query[:, a:b], key[:, :b], value[:, :b], mask.dense(slice(a, b), b))
        for a, b in mask.layout.spans()
    ]
    return jnp.concatenate(out, axis=1)


def _best(query: jax.Array, key: jax.Array, mask: AttentionMask | None) -> Implementation:
    if not is_long(query.shape[1], key.shape[1]):
        return "xla"
    channels = attention_kernels.channels(mask.layout) if mask else 0
    return implementation_for(query.dtype, query.shape[-1], channels)


def is_long(queries: int, keys: int) -> bool:
    """Return whether a kernel is worth it for these numbers of tokens."""
    return min(queries, keys) >= FEW


def implementation_for(dtype: Any, width: int, channels: int = 0) -> Implementation:
    """Return the attention kernel of the device that is traced for.

    width: width of a head; channels: number that the flash kernel adds to it, for a mask.
    """
    device, half = target(), jnp.dtype(dtype) == jnp.bfloat16
    if device.platform == "tpu" and half:
        return "splash"
    widest = 256 if device.capability >= 9 else 128
    fits = width % 8 == 0 and width + channels <= widest
    cuda = device.platform == "cuda" and device.capability >= 8
    return "flash" if cuda and half and fits else "xla"


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
    if mask is None:
        heads_BxnxHxDh = masked_attention(query, key, value)
    else:
        heads_BxnxHxDh = dot_product(query, key, value, mask)
    out = nn.DenseGeneral(x.shape[-1], axis=(-2, -1), dtype=dtype, kernel_init=init, name="out")
    return out(heads_BxnxHxDh)
