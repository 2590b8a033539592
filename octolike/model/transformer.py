"""The pre-norm transformer: attention and feed-forward blocks over one masked sequence."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from octolike.model.experts import Experts, TopK


class Transformer(nn.Module):
    """Blocks of x + attention(norm(x)) and x + mlp(norm(x)), then a last norm.

    Parameters are float32; `dtype` is what is computed in. experts: which blocks have a mixture of
    experts in place of the mlp; None: no block.
    """

    layers: int
    attention_heads: int
    mlp_width: int
    dropout: float = 0.0
    experts: TopK | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array, condition: jax.Array | None, *, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return ([B, N, D], metrics) for x [B, N, D] and mask bool [B, 1, N, N], True: may attend.

        condition: [B, E], the pooled task tokens, or None without any. Metrics are those of
        `Experts`: losses summed over the blocks, the rest their mean.
        """
        found: list[dict[str, jax.Array]] = []
        for i in range(self.layers):
            block = Block(
                attention_heads=self.attention_heads,
                mlp_width=self.mlp_width,
                dropout=self.dropout,
                experts=self.experts if self.experts and self.experts.at(i, self.layers) else None,
                dtype=self.dtype,
                name=f"block_{i}",
            )
            x, metrics = block(x, mask, condition, train=train)
            found += [metrics] if metrics else []
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)
        total = jax.tree.map(lambda *values: sum(values), *found) if found else {}
        shared = {k: v if k.endswith("loss") else v / len(found) for k, v in total.items()}
        return x, shared


class Block(nn.Module):
    """One transformer block, [B, N, D] to [B, N, D], and the metrics of its experts."""

    attention_heads: int
    mlp_width: int
    dropout: float = 0.0
    experts: TopK | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array, condition: jax.Array | None, *, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        drop = nn.Dropout(self.dropout, deterministic=not train)
        h = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="attention_norm")(x)
        h = Attention(heads=self.attention_heads, dtype=self.dtype, name="attention")(h, mask)
        x = x + drop(h)
        h = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="mlp_norm")(x)
        if self.experts:
            experts = Experts(self.experts, self.mlp_width, dtype=self.dtype, name="experts")
            visible = mask[:, 0].any(axis=-2)  # by anybody: its own readout, too
            h, metrics = experts(h, visible, condition, train=train)
            return x + drop(h), metrics
        h = nn.Dense(self.mlp_width, dtype=self.dtype, kernel_init=_xavier, name="mlp_in")(h)
        h = drop(nn.gelu(h, approximate=True))
        h = nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=_xavier, name="mlp_out")(h)
        return x + drop(h), {}


class Attention(nn.Module):
    """Multi-head self-attention with biases."""

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxNxD: jax.Array, mask: jax.Array) -> jax.Array:
        width = x_BxNxD.shape[-1]

        def project(name: str) -> jax.Array:
            shape = (self.heads, width // self.heads)
            return nn.DenseGeneral(shape, dtype=self.dtype, kernel_init=_xavier, name=name)(x_BxNxD)

        out_BxNxHxDh = jax.nn.dot_product_attention(
            project("query"), project("key"), project("value"), mask=mask
        )
        out = nn.DenseGeneral(
            width, axis=(-2, -1), dtype=self.dtype, kernel_init=_xavier, name="out"
        )
        return out(out_BxNxHxDh)


_xavier = nn.initializers.xavier_uniform()
