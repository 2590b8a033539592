"""Pretrained text encoders: T5, CLIP and BERT, from ids [B, L] to states [B, L, E].

Parameters have the same names in all of them; `language_weights.py` maps these to Hugging Face's.
`language.py` puts the states into the network.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from octolike.config import option


def _quick_gelu(x: jax.Array) -> jax.Array:
    return x * nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_new": nn.gelu,
    "quick_gelu": _quick_gelu,
    "silu": nn.silu,
}


class RMSNorm(nn.Module):
    """Division by the root mean square: a layer norm without mean and bias."""

    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * scale).astype(self.dtype)


class _TextTransformer(nn.Module):
    """The parts that the text encoders share; `dtype` and `attention_heads` are theirs."""

    use_bias: ClassVar[bool]

    def _dense(self, width: int, name: str) -> nn.Dense:
        return nn.Dense(width, use_bias=self.use_bias, dtype=self.dtype, name=name)

    def _attend(
        self,
        i: int,
        x: jax.Array,
        width: int,
        mask: jax.Array,
        bias: jax.Array | float = 0.0,
        divisor: float | None = None,
    ) -> jax.Array:
        """Return the attention of block i; queries, keys and values have `width` in all heads.

        divisor: divisor of the queries; None: they are used as they are.
        """
        q, k, v = (self._dense(width, f"block_{i}_{name}")(x) for name in ("query", "key", "value"))
        q = q if divisor is None else q / divisor
        attended = attend(q, k, v, self.attention_heads, mask, bias)
        return self._dense(x.shape[-1], f"block_{i}_out")(attended)


class T5(_TextTransformer):
    """The encoder of T5 (Raffel et al. 2019): v1.0 (relu), v1.1 and its relatives (gated).

    Positions are a bias on the attention logits, learned per bucket of distances and shared by all
    blocks. With a path, its config.json gives the sizes.
    """

    path: str = option("", "directory, hub id or package:NAME/FOLDER of the weights; '': none")
    vocabulary: int = option(32128, "number of token ids", low=1)
    width: int = option(768, "E: width of the states", low=1)
    layers: int = option(12, "transformer blocks", low=0)
    attention_heads: int = option(12, "attention heads", low=1)
    head_width: int = option(64, "width of an attention head", low=1)
    mlp_width: int = option(3072, "width of the feed-forward layer", low=1)
    activation: str = option(
        "relu", "activation of the feed-forward layer", choices=tuple(ACTIVATIONS)
    )
    gated: bool = option(False, "gated feed-forward layer, as in v1.1")
    buckets: int = option(32, "buckets of relative distances", low=1)
    max_distance: int = option(128, "distance from which on all share the last bucket", low=1)
    epsilon: float = option(1e-6, "epsilon of the norms", low=0)
    dtype: Any = option(jnp.dtype("float32"), "compute type; parameters are float32")
    use_bias: ClassVar[bool] = False

    @property
    def max_length(self) -> int | None:
        """The maximum number of tokens; None: no limit."""
        return None

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Return the last hidden states [B, L, width] of ids int [B, L]; mask: False is padding."""
        x = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, name="words")(ids)
        buckets = distance_buckets(ids.shape[1], self.buckets, self.max_distance)
        bias = nn.Embed(self.buckets, self.attention_heads, name="relative_bias")(buckets)
        bias_1xNxLxL = bias.transpose(2, 0, 1)[None].astype(jnp.float32)
        for i in range(self.layers):
            norm = RMSNorm(self.epsilon, self.dtype, name=f"block_{i}_attention_norm")
            # No division by √head_width: T5's initialisation contains it.
            width = self.attention_heads * self.head_width
            x = x + self._attend(i, norm(x), width, mask[:, None, None, :], bias_1xNxLxL)
            norm = RMSNorm(self.epsilon, self.dtype, name=f"block_{i}_mlp_norm")
            x = x + self._mlp(i, norm(x))
        return RMSNorm(self.epsilon, self.dtype, name="norm")(x)

    def _mlp(self, i: int, x: jax.Array) -> jax.Array:
        activate = ACTIVATIONS[self.activation]
        hidden = self._dense(self.mlp_width, f"block_{i}_mlp_in")(x)
        if self.gated:
            hidden = activate(self._dense(self.mlp_width, f"block_{i}_mlp_gate")(x)) * hidden
        else:
            hidden = activate(hidden)
        return self._dense(self.width, f"block_{i}_mlp_out")(hidden)


class ClipText(_TextTransformer):
    """The text encoder of CLIP (Radford et al. 2021): a causal pre-norm transformer.

    With a path, its config.json gives the sizes.
    """

    path: str = option("", "directory, hub id or package:NAME/FOLDER of the weights; '': none")
    vocabulary: int = option(49408, "number of token ids", low=1)
    width: int = option(512, "E: width of the states", low=1)
    layers: int = option(12, "transformer blocks", low=0)
    attention_heads: int = option(8, "attention heads", low=1)
    mlp_width: int = option(2048, "width of the feed-forward layer", low=1)
    activation: str = option(
        "quick_gelu", "activation of the feed-forward layer", choices=tuple(ACTIVATIONS)
    )
    max_length: int = option(77, "maximum number of tokens", low=1)
    epsilon: float = option(1e-5, "epsilon of the norms", low=0)
    dtype: Any = option(jnp.dtype("float32"), "compute type; parameters are float32")
    use_bias: ClassVar[bool] = True

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Return the last hidden states [B, L, width] of ids int [B, L]; mask: False is padding."""
        length = ids.shape[1]
        x = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, name="words")(ids)
        positions = nn.Embed(self.max_length, self.width, dtype=self.dtype, name="positions")
        x = x + positions(jnp.arange(length))
        visible = mask[:, None, None, :] & jnp.tril(jnp.ones((length, length), bool))
        for i in range(self.layers):
            hidden = self._norm(f"block_{i}_attention_norm")(x)
            divisor = math.sqrt(self.width // self.attention_heads)
            x = x + self._attend(i, hidden, self.width, visible, divisor=divisor)
            hidden = self._norm(f"block_{i}_mlp_norm")(x)
            hidden = self._dense(self.mlp_width, f"block_{i}_mlp_in")(hidden)
            hidden = ACTIVATIONS[self.activation](hidden)
            x = x + self._dense(self.width, f"block_{i}_mlp_out")(hidden)
        return self._norm("norm")(x)

    def _norm(self, name: str) -> nn.LayerNorm:
        return nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name=name)


class Bert(_TextTransformer):
    """BERT (Devlin et al. 2018), and the sentence encoders built on it, such as MiniLM.

    A bidirectional post-norm transformer. With a path, its config.json gives the sizes.
    """

    path: str = option("", "directory, hub id or package:NAME/FOLDER of the weights; '': none")
    vocabulary: int = option(30522, "number of token ids", low=1)
    width: int = option(768, "E: width of the states", low=1)
    layers: int = option(12, "transformer blocks", low=0)
    attention_heads: int = option(12, "attention heads", low=1)
    mlp_width: int = option(3072, "width of the feed-forward layer", low=1)
    activation: str = option(
        "gelu", "activation of the feed-forward layer", choices=tuple(ACTIVATIONS)
    )
    max_length: int = option(512, "maximum number of tokens", low=1)
    segments: int = option(2, "kinds of text; an instruction is the first", low=1)
    epsilon: float = option(1e-12, "epsilon of the norms", low=0)
    dtype: Any = option(jnp.dtype("float32"), "compute type; parameters are float32")
    use_bias: ClassVar[bool] = True

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Return the last hidden states [B, L, width] of ids int [B, L]; mask: False is padding."""
        x = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, name="words")(ids)
        positions = nn.Embed(self.max_length, self.width, dtype=self.dtype, name="positions")
        segments = nn.Embed(self.segments, self.width, dtype=self.dtype, name="segments")
        x = x + positions(jnp.arange(ids.shape[1])) + segments(jnp.zeros_like(ids))
        x = self._norm("embedding_norm")(x)
        divisor = math.sqrt(self.width // self.attention_heads)
        for i in range(self.layers):
            attended = self._attend(i, x, self.width, mask[:, None, None, :], divisor=divisor)
            x = self._norm(f"block_{i}_attention_norm")(x + attended)
            hidden = self._dense(self.mlp_width, f"block_{i}_mlp_in")(x)
            hidden = ACTIVATIONS[self.activation](hidden)
            hidden = self._dense(self.width, f"block_{i}_mlp_out")(hidden)
            x = self._norm(f"block_{i}_mlp_norm")(x + hidden)
        return x

    def _norm(self, name: str) -> nn.LayerNorm:
        return nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name=name)


class Table(nn.Module):
    """Given vectors, such as sentence embeddings: the encoder of `octolike.text.TableTokenizer`.

    Row 0 is padding. With a path, its config.json gives the sizes.
    """

    path: str = option("", "directory, hub id or package:NAME/FOLDER of the vectors; '': none")
    vocabulary: int = option(1, "number of rows", low=1)
    width: int = option(512, "E: width of the vectors", low=1)
    dtype: Any = option(jnp.dtype("float32"), "compute type; parameters are float32")

    @property
    def max_length(self) -> int | None:
        """The maximum number of tokens; None: no limit."""
        return None

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Return the rows [B, L, width] of ids int [B, L]."""
        return nn.Embed(self.vocabulary, self.width, dtype=self.dtype, name="rows")(ids)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    heads: int,
    mask: jax.Array,
    bias: jax.Array | float = 0.0,
) -> jax.Array:
    """Return softmax(q · k + bias) · v per head; q, k, v: [B, L, N · H], mask: [B, 1, L or 1, L].

    The softmax is computed in float32. A fully masked row attends to all keys equally, so that the
    result stays finite.
    """
    q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v))
    logits_BxNxLxL = jnp.einsum("bqnh,bknh->bnqk", q, k).astype(jnp.float32) + bias
    logits_BxNxLxL = jnp.where(mask, logits_BxNxLxL, jnp.finfo(jnp.float32).min)
    weights_BxNxLxL = jax.nn.softmax(logits_BxNxLxL, axis=-1).astype(v.dtype)
    out_BxLxNxH = jnp.einsum("bnqk,bknh->bqnh", weights_BxNxLxL, v)
    return out_BxLxNxH.reshape(*out_BxLxNxH.shape[:2], -1)


def distance_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """Return T5's bucket, int32 [L, L], of each distance from row (query) to column (key).

    Half of the buckets are for keys behind the query, half for keys ahead. In each half, the first
    half holds one distance per bucket; the sizes of the others grow logarithmically up to
    `max_distance`, and the last holds all larger distances.
    """
    position = np.arange(length)
    offset = position[None, :] - position[:, None]
    distance = np.abs(offset)
    half = buckets // 2
    exact = half // 2
    # float32, as in the training of T5: at powers of two the rounding decides the bucket
    ratio = np.maximum(distance, 1).astype(np.float32) / exact
    growth = np.log(ratio) / np.float32(math.log(max_distance / exact))
    large = np.minimum(exact + (growth * (half - exact)).astype(np.int32), half - 1)
    bucket = np.where(distance < exact, distance, large)
    return (bucket + np.where(offset > 0, half, 0)).astype(np.int32)


ENCODERS = {"t5": T5, "clip": ClipText, "bert": Bert, "table": Table}
