"""The pre-norm transformer: attention and feed-forward blocks over one masked sequence."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from octolike.model import attention
from octolike.model.experts import Experts, TopK


class Transformer(nn.Module):
    """Blocks of x + attention(norm(x)) and x + mlp(norm(x)), then a last norm.

    Parameters are float32; `dtype` is the compute type. experts: a mixture of experts replaces the
    mlp in some blocks; None: in none. remat: store only each block's input for the backward pass,
    which recomputes the activations: less memory for about a third more time.
    """

    layers: int
    attention_heads: int
    mlp_width: int
    dropout: float = 0.0
    experts: TopK | None = None
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        condition: jax.Array | None,
        *,
        ends: tuple[int, ...] = (),
        train: bool,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return ([B, N, D], metrics) for x [B, N, D] and mask bool [B, 1, N, N], True: may attend.

        ends: ends of the spans of the sequence, the last one N; no token attends beyond its span's
        end. condition: [B, E], the pooled task tokens, or None without task tokens. The metrics are
        those of `Experts`: losses summed, others averaged over the blocks.
        """
        expert_metrics: list[dict[str, jax.Array]] = []
        block_type = (
            nn.remat(TransformerBlock, static_argnums=(4, 5)) if self.remat else TransformerBlock
        )
        for i in range(self.layers):
            has_experts = self.experts and self.experts.has_experts(i, self.layers)
            block = block_type(
                attention_heads=self.attention_heads,
                mlp_width=self.mlp_width,
                dropout=self.dropout,
                experts=self.experts if has_experts else None,
                dtype=self.dtype,
                name=f"block_{i}",
            )
            x, metrics = block(x, mask, condition, ends or (x.shape[1],), train)
            expert_metrics += [metrics] if metrics else []
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)
        if not expert_metrics:
            return x, {}
        sums = jax.tree.map(lambda *values: sum(values), *expert_metrics)
        count = len(expert_metrics)
        return x, {k: v if k.endswith("loss") else v / count for k, v in sums.items()}


class TransformerBlock(nn.Module):
    """One transformer block, [B, N, D] to [B, N, D], and the metrics of its experts."""

    attention_heads: int
    mlp_width: int
    dropout: float = 0.0
    experts: TopK | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        condition: jax.Array | None,
        ends: tuple[int, ...],
        train: bool,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        drop = nn.Dropout(self.dropout, deterministic=not train)
        h = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="attention_norm")(x)
        h = SelfAttention(heads=self.attention_heads, dtype=self.dtype, name="attention")(
            h, mask, ends
        )
        x = x + drop(h)
        h = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="mlp_norm")(x)
        if self.experts:
            experts = Experts(self.experts, self.mlp_width, dtype=self.dtype, name="experts")
            visible = mask[:, 0].any(axis=-2)  # to any query, a readout itself included
            h, metrics = experts(h, visible, condition, train=train)
            return x + drop(h), metrics
        h = nn.Dense(self.mlp_width, dtype=self.dtype, kernel_init=_xavier, name="mlp_in")(h)
        h = drop(nn.gelu(h, approximate=True))
        h = nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=_xavier, name="mlp_out")(h)
        return x + drop(h), {}


class SelfAttention(nn.Module):
    """Multi-head self-attention with biases."""

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x_BxNxD: jax.Array, mask: jax.Array | None = None, ends: tuple[int, ...] = ()
    ) -> jax.Array:
        """Return [B, N, D]; mask: bool [B, 1, N, N], None: all True; ends: as in `Transformer`."""
        batch, tokens, width = x_BxNxD.shape
        shape = (width, self.heads, width // self.heads)

        def project(name: str) -> jax.Array:
            y_BxNxD = Projection(shape, dtype=self.dtype, name=name)(x_BxNxD)
            return y_BxNxD.reshape(batch, tokens, *shape[1:])

        q_BxNxHxDh, k_BxNxHxDh, v_BxNxHxDh = map(project, ("query", "key", "value"))
        ends = ends or (tokens,)
        out = [
            attention.dot_product(
                q_BxNxHxDh[:, start:end],
                k_BxNxHxDh[:, :end],
                v_BxNxHxDh[:, :end],
                None if mask is None else mask[:, :, start:end, :end],
            )
            for start, end in zip((0, *ends), ends)
        ]
        x_BxNxD = jnp.concatenate(out, axis=1).reshape(batch, tokens, width)
        return Projection((*shape[1:], width), 2, dtype=self.dtype, name="out")(x_BxNxD)


class Projection(nn.Module):
    """A dense layer with an axis for the heads in its kernel, computed as a flat matrix product.

    shape: the kernel's; its first `inputs` axes are contracted.
    """

    shape: tuple[int, ...]
    inputs: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return [..., outputs] for x [..., inputs], both flat."""
        axes = tuple(range(len(self.shape)))
        init = nn.initializers.variance_scaling(
            1.0, "fan_avg", "uniform", axes[: self.inputs], axes[self.inputs :]
        )
        kernel = self.param("kernel", init, self.shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, self.shape[self.inputs :], jnp.float32)
        x, kernel, bias = (jnp.asarray(v, self.dtype) for v in (x, kernel, bias))
        # flat matrix products are a quarter faster on CPU than contractions over heads
        return x @ kernel.reshape(x.shape[-1], -1) + bias.reshape(-1)


_xavier = nn.initializers.xavier_uniform()
