"""Mixture of experts: several feed-forward networks per block; each token or task uses a few.

    gate       logits → softmax p [.., E]; the k experts of largest p are used, weighted by p
    capacity   in training an expert takes at most capacity · k / E of the units; later units skip
               the block. In inference no unit is dropped
    balance    the loss balance · E · Σ_e f_e p_e, minimal for equal use of all experts
               (f_e: share of the assignments, p_e: mean probability; Fedus et al. 2021, eq. 4)

Buffers of `capacity` units per expert keep the matrix products large. Without a limit each expert
has a buffer for all units, so that inference with token gates costs E dense feed-forwards.

gate "token": each token chooses, by its features; the capacity counts within an example, so that
examples do not influence one another. gate "task": each example chooses once for all its tokens, by
its pooled task tokens; the capacity counts examples of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from octolike.config import ConfigError, build_component, option

GATES = ("token", "task")


@dataclass(frozen=True, kw_only=True)
class TopK:
    """Top-k gating: the number of experts, the blocks that have them, and the gate."""

    count: int = option(4, "E: number of experts", low=1)
    k: int = option(1, "experts used at a time, at most count", low=1)
    gate: str = option("token", "unit that chooses its experts", choices=GATES)
    capacity: float = option(1.5, "units per expert in training, over an even share", low=1)
    balance: float = option(0.01, "weight of the load-balance loss", low=0)
    every: int = option(1, "every k-th block has experts, counted from the last", low=1)

    def __post_init__(self) -> None:
        if self.k > self.count:
            raise ConfigError(
                f"model.experts.k is {self.k}; it must be 1 to model.experts.count ({self.count})"
            )

    def has_experts(self, block: int, blocks: int) -> bool:
        """Return whether the block, counted from 0, has experts."""
        return (blocks - 1 - block) % self.every == 0


class Routing(NamedTuple):
    """The assignment of G groups of U units (tokens or examples) to k experts each.

    expert: int [G, U, k]. place: int [G, U, k], the index in the expert's buffer; a place beyond
    the capacity is dropped. weight: float [G, U, k], 0 for hidden units. probabilities: [G, U, E].
    """

    expert: jax.Array
    place: jax.Array
    weight: jax.Array
    probabilities: jax.Array


class Experts(nn.Module):
    """The feed-forward of a block, [B, N, D] to [B, N, D], by E expert networks."""

    gating: TopK
    mlp_width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, visible: jax.Array, condition: jax.Array | None, *, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return (features, metrics) for tokens x and visible bool [B, N].

        condition: [B, E'], the pooled task tokens. Metrics: balance_loss, weighted;
        experts_per_example [B, E], the share of each expert in the example's choices; experts_full,
        the share of dropped choices.
        """
        x, gating, batch = jnp.asarray(x), self.gating, len(x)
        by_task = gating.gate == "task"
        if by_task:
            if condition is None:
                raise ConfigError(
                    "model.experts.gate 'task' needs a tokenizer of the task; add one, or use "
                    "gate 'token'"
                )
            units, active = condition[None], jnp.ones((1, batch), bool)
        else:
            units, active = x, visible
        logits = nn.Dense(gating.count, dtype=jnp.float32, name="gate")(units.astype(jnp.float32))
        routing = route(logits, active, gating.k)
        tokens = x[None] if by_task else x[:, :, None]  # [G, U, n, D]: n tokens per unit
        capacity = units.shape[1]
        if train:
            even_share = gating.k * units.shape[1] / gating.count
            capacity = min(math.ceil(gating.capacity * even_share), capacity)
        if routing.expert.size < gating.count:
            outputs = self._gathered(tokens, routing)
        else:
            outputs = self._buffered(tokens, routing, capacity)
        fits = routing.place < capacity
        weight = jnp.where(fits, routing.weight, 0)
        # float32: in bfloat16, the sum of two experts would round twice
        y = jnp.einsum("guknd,guk->gund", outputs.astype(jnp.float32), weight)
        chosen = jax.nn.one_hot(routing.expert, gating.count) * active[..., None, None]
        counts = chosen.sum(axis=(1, 2)) if not by_task else chosen[0].sum(axis=1)
        metrics = {
            "balance_loss": gating.balance * _balance(routing, chosen, active),
            "experts_per_example": counts / jnp.maximum(counts.sum(-1, keepdims=True), 1),
            "experts_full": (chosen.any(-1) & ~fits).sum() / jnp.maximum(chosen.sum(), 1),
        }
        return y.reshape(x.shape).astype(x.dtype), metrics

    def _buffered(self, tokens: jax.Array, routing: Routing, capacity: int) -> jax.Array:
        """Return [G, U, k, n, D]: each expert computes a full buffer of C = capacity units."""
        groups, count = tokens.shape[0], self.gating.count
        g = jnp.arange(groups)[:, None, None]
        buffers = tokens[g, buffer_units(routing, count, capacity)]  # [G, E, C, n, D]
        w_in, b_in, w_out, b_out = self._weights(tokens.shape[-1])
        h = jnp.einsum("gecnd,edm->gecnm", buffers, w_in) + b_in[:, None, None]
        h = nn.gelu(h, approximate=True)
        y = jnp.einsum("gecnm,emd->gecnd", h, w_out) + b_out[:, None, None]
        return y.at[g, routing.expert, routing.place].get(mode="fill", fill_value=0)

    def _gathered(self, tokens: jax.Array, routing: Routing) -> jax.Array:
        """Return [G, U, k, n, D] by gathering the weights of each unit's experts."""
        w_in, b_in, w_out, b_out = (w[routing.expert] for w in self._weights(tokens.shape[-1]))
        h = jnp.einsum("gund,gukdm->guknm", tokens, w_in) + b_in[..., None, :]
        h = nn.gelu(h, approximate=True)
        return jnp.einsum("guknm,gukmd->guknd", h, w_out) + b_out[..., None, :]

    def _weights(self, width: int) -> tuple[jax.Array, ...]:
        count, hidden = self.gating.count, self.mlp_width
        # each expert is initialised like the dense layer
        kernel = nn.initializers.variance_scaling(
            1.0, "fan_avg", "uniform", in_axis=-2, out_axis=-1, batch_axis=(0,)
        )
        shapes = {
            "in_kernel": (kernel, (count, width, hidden)),
            "in_bias": (nn.initializers.zeros, (count, hidden)),
            "out_kernel": (kernel, (count, hidden, width)),
            "out_bias": (nn.initializers.zeros, (count, width)),
        }
        weights = (self.param(name, *init, jnp.float32) for name, init in shapes.items())
        return tuple(jnp.asarray(w, self.dtype) for w in weights)


def route(logits: jax.Array, active: jax.Array, k: int) -> Routing:
    """Return the routing for logits [G, U, E]; active: bool [G, U], False for hidden units.

    Places are assigned to all first choices, then to all second ones, each in the units' order.
    """
    p = jax.nn.softmax(logits, axis=-1)
    weight, expert = jax.lax.top_k(p, k)
    if k > 1:
        # k = 1 keeps p: a weight of 1 would give the gate no gradient
        weight = weight / weight.sum(axis=-1, keepdims=True)
    weight = jnp.where(active[..., None], weight, 0)
    choices = jax.nn.one_hot(expert, logits.shape[-1], dtype=jnp.int32)
    choices = choices * active[..., None, None]  # [G, U, k, E]
    groups, units, _, count = choices.shape
    in_order = choices.swapaxes(1, 2).reshape(groups, k * units, count)
    before = (in_order.cumsum(axis=1) - in_order).reshape(groups, k, units, count).swapaxes(1, 2)
    place = jnp.take_along_axis(before, expert[..., None], axis=-1)[..., 0]
    return Routing(expert, jnp.where(active[..., None], place, units), weight, p)


def buffer_units(routing: Routing, count: int, capacity: int) -> jax.Array:
    """Return the unit in each slot of the buffers of `count` experts, int [G, E, C].

    Empty slots hold units that differ: one for all would collect all their gradients.
    """
    groups, units = routing.place.shape[:2]
    slots = jnp.broadcast_to(jnp.arange(capacity), (groups, count, capacity))
    unit = jnp.broadcast_to(jnp.arange(units)[None, :, None], routing.place.shape)
    g = jnp.arange(groups)[:, None, None]
    return slots.at[g, routing.expert, routing.place].set(unit, mode="drop")


def build(component: Mapping[str, Any]) -> TopK | None:
    """Return the gating of model.experts, or None for a dense feed-forward."""
    return build_component(EXPERTS, component, "model.experts") if component else None


EXPERTS = {"top_k": TopK}


def _balance(routing: Routing, chosen: jax.Array, active: jax.Array) -> jax.Array:
    units = jnp.maximum(active.sum(), 1)
    mean = jnp.where(active[..., None], routing.probabilities, 0).sum(axis=(0, 1)) / units
    share = chosen.sum(axis=(0, 1, 2)) / jnp.maximum(chosen.sum(), 1)
    return chosen.shape[-1] * (share * mean).sum()
