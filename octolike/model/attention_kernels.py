"""Attention kernels of accelerators: neither reads a mask of [queries, keys] per example.

    flash     cuDNN's, one call per span of the sequence (`tokens.Layout.spans`): it has no static
              mask, but a span's keys can be cut
    splash    for TPUs, one call for the whole sequence: it skips the tiles that the static mask
              empties, and cutting the sequence costs more than the tiles

A query without any allowed key gets finite but arbitrary values.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from octolike.model.target import target
from octolike.model.tokens import AttentionMask, Layout

Excluded = tuple[np.ndarray, np.ndarray]
ALIGNMENT = 8  # cuDNN's head widths are multiples of it, and here its lengths
# A power of two, so exact in bfloat16: over √Dh it exceeds any difference of logits, and its
# exponential is 0 in float32.
EXCLUDE = 2.0**20
LANES = 128  # splash attention: lengths and tiles are multiples of a TPU's vector width
TILE = 512  # largest tile: a larger one would not fit the TPU's vector memory with its gradients


def channels(layout: Layout) -> int:
    """Return the number of channels that a mask adds to a head in `flash`."""
    reasons = 2 + len(layout.readout)  # invisible, task groups, each readout
    return reasons + -reasons % ALIGNMENT


def flash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    excluded: Excluded | None,
    visible: jax.Array | None,
) -> jax.Array:
    """Return cuDNN's flash attention (NVIDIA), with the mask in extra channels of the heads.

    query: [B, n, H, Dh]; key, value: [B, N, H, Dh]; excluded: (query [n, C], key [N, C]) of
    `tokens.Layout.exclusions`, static; visible: bool [B, N]; both None: every query attends to
    every key.
    """
    (n, _, width), keys = query.shape[1:], key.shape[1]
    # jax refuses odd lengths in training; a multiple of 8 tokens is aligned in memory as well.
    queries_pad, keys_pad = -n % ALIGNMENT, -keys % ALIGNMENT
    if keys_pad and visible is None:
        excluded = np.zeros((n, 0), bool), np.zeros((keys, 0), bool)
        visible = jnp.ones((len(key), keys), bool)
    query, key, value = (pad_tokens(x, ALIGNMENT) for x in (query, key, value))
    if excluded is not None and visible is not None:
        padding = (queries_pad, keys_pad)
        excluded = tuple(np.pad(x, ((0, p), (0, 0))) for x, p in zip(excluded, padding))  # type: ignore[assignment]
        visible = jnp.pad(visible, ((0, 0), (0, keys_pad)))
        query, key, value = with_mask_channels(query, key, value, excluded, visible)
    scale = width**-0.5
    out = jax.nn.dot_product_attention(query, key, value, scale=scale, implementation="cudnn")
    return out[:, :n, :, :width]


def with_mask_channels(
    query: jax.Array, key: jax.Array, value: jax.Array, excluded: Excluded, visible: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return query, key and value for which unmasked attention equals the masked one.

    The logit of an excluded pair gets −EXCLUDE per reason from the extra channels: the query's
    channel is 1 if the reason holds for the query, the key's −EXCLUDE if it holds for the key. That
    replaces a bias tensor [B, 1, n, N], which the kernel would read, and differentiate, in every
    layer. The value's extra channels are 0: cuDNN requires equal widths.
    """
    reasons_q = np.concatenate([np.ones((query.shape[1], 1), bool), excluded[0]], axis=-1)
    static = jnp.asarray(excluded[1])
    reasons_k = jnp.concatenate(
        [~visible[..., None], jnp.broadcast_to(static, (len(visible), *static.shape))], axis=-1
    )
    padding = -reasons_q.shape[-1] % ALIGNMENT

    def extend(x: jax.Array, reasons: jax.Array) -> jax.Array:
        reasons = jnp.pad(reasons, [(0, 0)] * (reasons.ndim - 1) + [(0, padding)])
        shape = (*x.shape[:-1], reasons.shape[-1])
        reasons = jnp.broadcast_to(reasons[..., :, None, :], shape)
        return jnp.concatenate([x, reasons.astype(x.dtype)], axis=-1)

    query = extend(query, jnp.asarray(reasons_q, query.dtype)[None])
    key = extend(key, -EXCLUDE * reasons_k.astype(key.dtype))
    return query, key, jnp.pad(value, [(0, 0)] * 3 + [(0, reasons_q.shape[-1] + padding)])


def splash(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask | None
) -> jax.Array:
    """Return splash attention (TPU), [B, n, H, Dh].

    query: [B, n, H, Dh]; key, value: [B, N, H, Dh]; mask: of a sequence that is both; None: every
    query attends to every key.
    """
    lengths = query.shape[1], key.shape[1]
    scaled = query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    q, k, v = (pad_tokens(x, LANES).swapaxes(1, 2) for x in (scaled, key, value))
    return splash_by_heads(q, k, v, mask, lengths).swapaxes(1, 2)[:, : lengths[0]]


def splash_by_heads(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: AttentionMask | None,
    lengths: tuple[int, int],
) -> jax.Array:
    """Return splash attention of padded sequences, in the layout of jax's kernel.

    query: [B, H, n, Dh], divided by √Dh; key, value: [B, H, N, Dh]. n and N are multiples of LANES;
    `lengths` of them are tokens, the others may hold anything finite.
    """
    batch, heads, *_ = query.shape
    allowed = np.ones(lengths, bool) if mask is None else mask.layout.pattern
    visible = jnp.ones((batch, lengths[1]), bool) if mask is None else mask.visible
    padding = tuple((0, x.shape[2] - n) for x, n in zip((query, key), lengths, strict=True))
    # Padded queries attend to all keys, padded keys are invisible.
    kernel = _splash_kernel(np.pad(allowed, padding, constant_values=True), heads)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
        return jax.vmap(kernel)(q, k, v, visible)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.axis_names:  # the compiler cannot partition a Pallas kernel: each device its examples
        spec = PartitionSpec(mesh.axis_names)
        attend = jax.shard_map(attend, in_specs=spec, out_specs=spec, check_vma=False)
    return attend(query, key, value, jnp.pad(visible.astype(jnp.int32), ((0, 0), padding[1])))


def pad_tokens(x: jax.Array, multiple: int) -> jax.Array:
    """Return x [B, n, ...] with zeros appended, up to a multiple of tokens."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % multiple)] + [(0, 0)] * (x.ndim - 2))


def _splash_kernel(allowed: np.ndarray, heads: int) -> Callable[..., jax.Array]:
    """Return the attention of one example, [H, n, Dh], by jax's kernel."""
    # Imported here: Pallas takes half a second, and only a TPU needs it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    block_q, block_kv = map(_tile, allowed.shape)
    sizes = kernels.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    # Not the fused backward kernel: outside of it, partial gradients of the queries are summed,
    # which costs a fourth of a block of octo-base.
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([masks.NumpyMask(allowed)] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=target().platform != "tpu",
    )

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
        ids = kernels.SegmentIds(jnp.ones(q.shape[1], jnp.int32), visible)
        return kernel(q, k, v, segment_ids=ids)

    return attend


def _tile(length: int) -> int:
    """Return the largest tile of at most TILE that divides a length."""
    return max(n for n in range(LANES, min(length, TILE) + 1, LANES) if length % n == 0)
