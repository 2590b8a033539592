"""Mixture of experts: several feed-forward networks in a block, each token or task sent to a few.

    gate       logits → softmax p [.., E]; the k largest are used, their p as weights
    capacity   in training an expert takes at most capacity · k / E of what there is; what comes
               later passes the block unchanged. When acting nothing is ever turned away
    balance    the loss balance · E · Σ_e f_e p_e, least when all experts are used alike
               (f_e: share of the assignments, p_e: mean probability; Fedus et al. 2021, eq. 4)

Buffers of `room` units per expert keep the matrix products large; without a limit each expert has
room for all, so acting with token gates costs E dense feed-forwards.

gate "token": every token chooses, from its features; the capacity counts within an example, so
examples do not influence one another. gate "task": an example chooses once, from its pooled task
tokens, for all its tokens; the capacity counts examples of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from octolike.config import ConfigError, build_component, unknown


@dataclass(frozen=True, kw_only=True)
class TopK:
    """Which blocks have experts, how many, and who chooses.

    count: E experts; k: used at a time; gate: "token" or "task"; capacity: room of an expert over
    an even share; balance: weight of the load-balance loss; every: each so many-th block has them,
    the last one included.
    """

    count: int = 4
    k: int = 1
    gate: str = "token"
    capacity: float = 1.5
    balance: float = 0.01
    every: int = 1

    def __post_init__(self) -> None:
        if self.gate not in ("token", "task"):
            raise ConfigError(unknown("model.experts.gate", self.gate, ("token", "task")))
        if not 1 <= self.k <= self.count:
            raise ConfigError(
                f"model.experts.k is {self.k}; it must lie in 1 to model.experts.count {self.count}"
            )
        if self.capacity < 1 or self.balance < 0 or self.every < 1:
            raise ConfigError(
                f"model.experts: capacity {self.capacity} and every {self.every} must be at least "
                f"1, balance {self.balance} at least 0"
            )

    def at(self, block: int, blocks: int) -> bool:
        """Return whether this block of so many has experts."""
        return (blocks - 1 - block) % self.every == 0


class Routing(NamedTuple):
    """Who goes where: G groups of U units (tokens or examples), k choices each.

    expert, place: int [G, U, k], place ≥ C has no room; weight: float [G, U, k], 0 for who is not
    to be served; probabilities: [G, U, E].
    """

    expert: jax.Array
    place: jax.Array
    weight: jax.Array
    probabilities: jax.Array


class Experts(nn.Module):
    """The feed-forward of a block, [B, N, D] to [B, N, D], by E networks of the given width."""

    gating: TopK
    mlp_width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, visible: jax.Array, condition: jax.Array | None, *, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return (features, metrics) for tokens x and visible bool [B, N].

        condition: [B, E'], the pooled task tokens. Metrics: balance_loss, weighted;
        experts_per_example [B, E], the share of the example's choices that fell on each expert;
        experts_full, the share of choices that found no room.
        """
        x, gating, batch = jnp.asarray(x), self.gating, len(x)
        by_task = gating.gate == "task"
        if by_task:
            if condition is None:
                raise ConfigError(
                    "model.experts.gate 'task' needs a tokenizer of the task; add one, or use "
                    "gate 'token'"
                )
            units, wanted = condition[None], jnp.ones((1, batch), bool)
        else:
            units, wanted = x, visible
        logits = nn.Dense(gating.count, dtype=jnp.float32, name="gate")(units.astype(jnp.float32))
        routing = route(logits, wanted, gating.k)
        rows = x[None] if by_task else x[:, :, None]  # [G, U, n, D]: n tokens go with each unit
        room = units.shape[1]
        if train:
            even = gating.capacity * gating.k * units.shape[1] / gating.count
            room = min(math.ceil(even), room)
        few = routing.expert.size < gating.count
        served = self._one_by_one(rows, routing) if few else self._in_buffers(rows, routing, room)
        fits = routing.place < room
        weight = jnp.where(fits, routing.weight, 0)
        # bfloat16 sums of two experts would round twice
        y = jnp.einsum("guknd,guk->gund", served.astype(jnp.float32), weight)
        chosen = jax.nn.one_hot(routing.expert, gating.count) * wanted[..., None, None]
        counts = chosen.sum(axis=(1, 2)) if not by_task else chosen[0].sum(axis=1)
        metrics = {
            "balance_loss": gating.balance * _balance(routing, chosen, wanted),
            "experts_per_example": counts / jnp.maximum(counts.sum(-1, keepdims=True), 1),
            "experts_full": (chosen.any(-1) & ~fits).sum() / jnp.maximum(chosen.sum(), 1),
        }
        return y.reshape(x.shape).astype(x.dtype), metrics

    def _in_buffers(self, rows: jax.Array, routing: Routing, room: int) -> jax.Array:
        """Return [G, U, k, n, D]: every expert computes `room` units of each group, used or not."""
        groups, count = rows.shape[0], self.gating.count
        g = jnp.arange(groups)[:, None, None]
        slots = jnp.zeros((groups, count, room), jnp.int32)
        unit = jnp.broadcast_to(jnp.arange(rows.shape[1])[None, :, None], routing.place.shape)
        slots = slots.at[g, routing.expert, routing.place].set(unit, mode="drop")
        held = rows[g, slots]  # [G, E, room, n, D]
        w_in, b_in, w_out, b_out = self._weights(rows.shape[-1])
        h = jnp.einsum("gecnd,edm->gecnm", held, w_in) + b_in[:, None, None]
        h = nn.gelu(h, approximate=True)
        y = jnp.einsum("gecnm,emd->gecnd", h, w_out) + b_out[:, None, None]
        return y.at[g, routing.expert, routing.place].get(mode="fill", fill_value=0)

    def _one_by_one(self, rows: jax.Array, routing: Routing) -> jax.Array:
        """Return [G, U, k, n, D] by fetching each unit's own experts: acting on one task."""
        w_in, b_in, w_out, b_out = (w[routing.expert] for w in self._weights(rows.shape[-1]))
        h = jnp.einsum("gund,gukdm->guknm", rows, w_in) + b_in[..., None, :]
        h = nn.gelu(h, approximate=True)
        return jnp.einsum("guknm,gukmd->guknd", h, w_out) + b_out[..., None, :]

    def _weights(self, width: int) -> tuple[jax.Array, ...]:
        count, hidden = self.gating.count, self.mlp_width
        # each expert starts as the dense layer would
        kernel = nn.initializers.variance_scaling(
            1.0, "fan_avg", "uniform", in_axis=-2, out_axis=-1, batch_axis=(0,)
        )
        shapes = {
            "in_kernel": (kernel, (count, width, hidden)),
            "in_bias": (nn.initializers.zeros, (count, hidden)),
            "out_kernel": (kernel, (count, hidden, width)),
            "out_bias": (nn.initializers.zeros, (count, width)),
        }
        made = (self.param(name, *how, jnp.float32) for name, how in shapes.items())
        return tuple(jnp.asarray(w, self.dtype) for w in made)


def route(logits: jax.Array, wanted: jax.Array, k: int) -> Routing:
    """Return where the units go, for logits [G, U, E]; wanted: bool [G, U], False: nobody's.

    Places are given first choices first, then in the order of the units.
    """
    p = jax.nn.softmax(logits, axis=-1)
    weight, expert = jax.lax.top_k(p, k)
    if k > 1:
        # with one choice the weight must stay p, or the gate would get no gradient
        weight = weight / weight.sum(axis=-1, keepdims=True)
    weight = jnp.where(wanted[..., None], weight, 0)
    choices = jax.nn.one_hot(expert, logits.shape[-1], dtype=jnp.int32)
    choices = choices * wanted[..., None, None]  # [G, U, k, E]
    groups, units, _, count = choices.shape
    in_order = choices.swapaxes(1, 2).reshape(groups, k * units, count)
    before = (in_order.cumsum(axis=1) - in_order).reshape(groups, k, units, count).swapaxes(1, 2)
    place = jnp.take_along_axis(before, expert[..., None], axis=-1)[..., 0]
    return Routing(expert, jnp.where(wanted[..., None], place, units), weight, p)


def build(component: Mapping[str, Any]) -> TopK | None:
    """Return the gating of model.experts, or None for a dense feed-forward."""
    return build_component(EXPERTS, component, "model.experts") if component else None


EXPERTS = {"top_k": TopK}


def _balance(routing: Routing, chosen: jax.Array, wanted: jax.Array) -> jax.Array:
    units = jnp.maximum(wanted.sum(), 1)
    mean = jnp.where(wanted[..., None], routing.probabilities, 0).sum(axis=(0, 1)) / units
    share = chosen.sum(axis=(0, 1, 2)) / jnp.maximum(chosen.sum(), 1)
    return chosen.shape[-1] * (share * mean).sum()
