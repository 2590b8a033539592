"""The pre-norm transformer: attention and feed-forward blocks over one masked sequence."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from octolike.model import attention, attention_kernels, remat
from octolike.model.experts import Experts, TopK
from octolike.model.tokens import AttentionMask


class Transformer(nn.Module):
    """Blocks of x + attention(norm(x)) and x + mlp(norm(x)), then a last norm.

    Parameters are float32; `dtype` is the compute type. experts: a mixture of experts replaces the
    mlp in some blocks; None: in none. remat: a policy of octolike.model.remat, for each block.
    """

    layers: int
    attention_heads: int
    mlp_width: int
    dropout: float = 0.0
    experts: TopK | None = None
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: AttentionMask | None,
        condition: jax.Array | None,
        *,
        read: tuple[int, ...] | None = None,
        train: bool,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return (tokens [B, n, D], metrics) for x [B, N, D].

        Args:
            x: the sequence.
            mask: None: every token attends to every token.
            condition: [B, E], the pooled task tokens, or None without task tokens.
            read: the positions to return; None: all. The last block computes the
                others only as keys, unless it has experts: their capacity counts all tokens.
            train: whether dropout and the capacity of experts apply.

        The metrics are those of `Experts`: losses summed, others averaged over the blocks.
        """
        expert_metrics: list[dict[str, jax.Array]] = []
        block_type = remat.checkpoint(TransformerBlock, self.remat, static_argnums=(4, 5))
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
            last = i == self.layers - 1 and not has_experts
            x, metrics = block(x, mask, condition, read if last else None, train)
            expert_metrics += [metrics] if metrics else []
        if read is not None and x.shape[1] != len(read):
            x = x[:, np.array(read)]
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)
        if not expert_metrics:
            return x, {}
        sums = jax.tree.map(lambda *values: sum(values), *expert_metrics)
        count = len(expert_metrics)
        return x, {k: v if k.endswith("loss") else v / count for k, v in sums.items()}


class TransformerBlock(nn.Module):
    """One transformer block, [B, N, D] to [B, n, D], and the metrics of its experts.

    read: the n positions that it returns; None: all.
    """

    attention_heads: int
    mlp_width: int
    dropout: float = 0.0
    experts: TopK | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: AttentionMask | None,
        condition: jax.Array | None,
        read: tuple[int, ...] | None,
        train: bool,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        drop = nn.Dropout(self.dropout, deterministic=not train)
        h = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="attention_norm")(x)
        h = SelfAttention(heads=self.attention_heads, dtype=self.dtype, name="attention")(
            h, mask, read
        )
        x = (x if read is None else x[:, np.array(read)]) + drop(h)
        h = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="mlp_norm")(x)
        if self.experts:
            experts = Experts(self.experts, self.mlp_width, dtype=self.dtype, name="experts")
            visible = jnp.ones(x.shape[:2], bool) if mask is None else mask.visible
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
        self,
        x_BxNxD: jax.Array,
        mask: AttentionMask | None = None,
        read: tuple[int, ...] | None = None,
    ) -> jax.Array:
        """Return [B, n, D]; mask: None: all True; read: as in `TransformerBlock`."""
        batch, length, width = x_BxNxD.shape
        shape = (width, self.heads, width // self.heads)
        is_whole = read is None and attention.is_long(length, length)
        if is_whole and attention.implementation_for(self.dtype, shape[-1]) == "splash":
            return self._by_heads(x_BxNxD, mask)

        def project(name: str, x: jax.Array) -> jax.Array:
            y = Projection(shape, dtype=self.dtype, name=name)(x)
            return y.reshape(batch, x.shape[1], *shape[1:])

        q_BxnxHxDh = project("query", x_BxNxD if read is None else x_BxNxD[:, np.array(read)])
        k_BxNxHxDh, v_BxNxHxDh = project("key", x_BxNxD), project("value", x_BxNxD)
        if read is None:
            x = attention.masked_attention(q_BxnxHxDh, k_BxNxHxDh, v_BxNxHxDh, mask)
        else:  # few queries
            dense_mask = None if mask is None else mask.dense(np.array(read))
            x = attention.dot_product(q_BxnxHxDh, k_BxNxHxDh, v_BxNxHxDh, dense_mask)
        x_BxnxD = x.reshape(batch, -1, width)
        return Projection((*shape[1:], width), 2, dtype=self.dtype, name="out")(x_BxnxD)

    def _by_heads(self, x_BxNxD: jax.Array, mask: AttentionMask | None) -> jax.Array:
        """Return [B, N, D] by splash attention, whose layout the projections write and read.

        In the estimate of the TPU's compiler, padding and transposing its inputs and results cost
        more than the products of attention.
        """
        _, length, width = x_BxNxD.shape
        shape = (width, self.heads, width // self.heads)
        x = attention_kernels.pad_tokens(x_BxNxD, attention_kernels.LANES)

        def project(name: str, scale: float = 1.0) -> jax.Array:
            return Projection(shape, dtype=self.dtype, by_heads=True, scale=scale, name=name)(x)

        q_BxHxnxDh = project("query", shape[-1] ** -0.5)
        k_BxHxnxDh, v_BxHxnxDh = project("key"), project("value")
        sequence = q_BxHxnxDh, k_BxHxnxDh, v_BxHxnxDh
        heads = attention_kernels.splash_by_heads(*sequence, mask, (length, length))
        out = Projection((*shape[1:], width), 2, dtype=self.dtype, by_heads=True, name="out")
        return out(heads)[:, :length]


class Projection(nn.Module):
    """A dense layer with an axis for the heads in its kernel.

    shape: the kernel's; its first `inputs` axes are contracted. by_heads: the side of the heads is
    [B, H, n, Dh], not flat. scale: factor on the outputs.
    """

    shape: tuple[int, ...]
    inputs: int = 1
    dtype: Any = jnp.float32
    by_heads: bool = False
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return [..., outputs] for x [..., inputs], both flat unless `by_heads`."""
        axes = tuple(range(len(self.shape)))
        init = nn.initializers.variance_scaling(
            1.0, "fan_avg", "uniform", axes[: self.inputs], axes[self.inputs :]
        )
        kernel = self.param("kernel", init, self.shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, self.shape[self.inputs :], jnp.float32)
        if self.scale != 1.0:
            kernel, bias = self.scale * kernel, self.scale * bias
        x, kernel, bias = (jnp.asarray(v, self.dtype) for v in (x, kernel, bias))
        if not self.by_heads:
            # flat matrix products are a quarter faster on CPU than contractions over heads
            return x @ kernel.reshape(x.shape[-1], -1) + bias.reshape(-1)
        if self.inputs == 2:
            return jnp.einsum("bhnk,hkd->bnd", x, kernel) + bias
        # a product with ones: on a TPU its gradient takes a third of the time of a broadcast's
        ones = jnp.ones(x.shape[:2], self.dtype)
        return jnp.einsum("bnd,dhk->bhnk", x, kernel) + jnp.einsum("bn,hk->bhnk", ones, bias)


_xavier = nn.initializers.xavier_uniform()
