"""What happens inside a trained network: who looks at whom, and how noise becomes actions.

For looking at a network, not for running it: every call compiles anew, and nothing is saved.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from octolike.model import tokens
from octolike.model.heads import Denoising, Diffusion
from octolike.model.network import PolicyNetwork
from octolike.types import TokenGroup


class Span(NamedTuple):
    """Where a token group stands in the sequence; time: None for a task group."""

    group: str
    time: int | None
    start: int
    stop: int


class AttentionMap(NamedTuple):
    """spans: of the sequence's groups, in order; allowed: bool [B, N, N], True where a row may look
    at a column; weights: float32 [layers, B, heads, N, N], how much it does, each row's sum 1.
    """

    spans: tuple[Span, ...]
    allowed: np.ndarray
    weights: np.ndarray

    def of(self, group: str, time: int | None = -1) -> list[Span]:
        """Return the spans of a group at a timestep; −1: the last one."""
        mine = [s for s in self.spans if s.group == group]
        return mine[-1:] if time == -1 else [s for s in mine if s.time == time]


def attention(
    model: PolicyNetwork, params: Any, observation: Mapping[str, Any], task: Mapping[str, Any]
) -> AttentionMap:
    """Return the attention of every block, for the `observation` and `task` parts of a batch."""
    groups, blocks = _captured(model, params, observation, task, ("query", "key"))
    allowed = tokens.attention_mask(groups)
    weights = []
    for block in blocks:
        q, k = (_by_head(block[name], model.transformer.attention_heads) for name in block)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        weights.append(jax.nn.softmax(jnp.where(allowed, scores, -1e30)))
    return AttentionMap(_spans(groups), np.asarray(allowed[:, 0]), np.asarray(jnp.stack(weights)))


def denoising(
    model: PolicyNetwork,
    params: Any,
    observation: Mapping[str, Any],
    task: Mapping[str, Any],
    key: jax.Array,
    head: str = "action",
) -> np.ndarray:
    """Return normalised chunks float32 [1 + steps, B, H, A]: from pure noise to the actions.

    Raises ValueError for a head that does not denoise, or one inside another.
    """
    module = model.heads[head]
    if not isinstance(module, Denoising):
        raise ValueError(
            f"head {head!r} is a {type(module).__name__}; only 'diffusion' and 'flow' denoise"
        )
    groups, _ = _captured(model, params, observation, task, ())
    group = {**groups.task, **groups.observation, **groups.readout}[module.readout]
    shape = (len(group.tokens), module.horizon * module.action_dim)
    key_x, key_z = jax.random.split(key)
    draws = [jax.random.normal(key_x, shape)]
    if isinstance(module, Diffusion):
        draws.append(jax.random.normal(key_z, (module.steps, *shape)))
    variables = {"params": params[f"heads_{head}"]}
    path = functools.partial(module.apply, method="denoise", path=True)
    return np.asarray(jax.jit(path)(variables, group, *draws))


def _captured(
    model: PolicyNetwork,
    params: Any,
    observation: Mapping[str, Any],
    task: Mapping[str, Any],
    names: tuple[str, ...],
) -> tuple[tokens.TokenSequence, list[dict[str, jax.Array]]]:
    """Return the groups that leave the transformer, and per block what its projections made."""

    def wanted(module: nn.Module, method: str) -> bool:
        return module.name in names and method == "__call__"

    order = []

    def encode(params: Any, *given: Mapping[str, Any]) -> tuple[list[TokenGroup], Any]:
        found, kept = model.apply(
            {"params": params},
            *given,
            train=False,
            method="encode",
            capture_intermediates=wanted,
            mutable=["intermediates"],
        )
        order.extend(found)  # jit would give the groups back in alphabetical order
        return list(found.values()), kept

    values, kept = jax.jit(encode)(params, observation, task)
    found = dict(zip(order, values, strict=True))
    blocks = [
        kept["intermediates"]["transformer"][f"block_{i}"]["attention"]
        for i in range(model.transformer.layers if names else 0)
    ]
    blocks = [{name: block[name]["__call__"][0] for name in names} for block in blocks]
    return _sorted(model, found), blocks


def _sorted(model: PolicyNetwork, found: Mapping[str, TokenGroup]) -> tokens.TokenSequence:
    groups = tokens.TokenSequence({}, {}, {})
    for name, group in found.items():
        register = name.removeprefix("readout_") in model.registers
        if name.startswith("task_"):
            groups.task[name] = group
        elif name.startswith("obs_") or (register and name != "obs"):
            groups.observation[name] = group
        elif name != "obs":  # that is all of the observation's groups once more
            groups.readout[name] = group
    return groups


def _spans(groups: tokens.TokenSequence) -> tuple[Span, ...]:
    per_step = groups.observation | groups.readout
    window = next(iter(per_step.values())).mask.shape[1]
    placed = [(name, None, g) for name, g in groups.task.items()]
    placed += [(name, t, g) for t in range(window) for name, g in per_step.items()]
    spans, start = [], 0
    for name, time, group in placed:
        spans.append(Span(name, time, start, start + group.mask.shape[-1]))
        start = spans[-1].stop
    return tuple(spans)


def _by_head(x: jax.Array, heads: int) -> jax.Array:
    return x.astype(jnp.float32).reshape(*x.shape[:2], heads, -1)
