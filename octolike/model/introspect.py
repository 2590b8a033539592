"""Introspection of a trained network: attention maps and denoising paths.

For analysis, not for inference: every call compiles again.
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
from octolike.model.denoising import Denoising, Diffusion
from octolike.model.network import PolicyNetwork
from octolike.types import TokenGroup


class Span(NamedTuple):
    """The place of a token group in the sequence; time: None for a task group."""

    group: str
    time: int | None
    start: int
    stop: int


class AttentionMap(NamedTuple):
    """The attention of all blocks.

    spans: the places of the groups, in order. allowed: bool [B, N, N], True if a row may attend to
    a column. weights: float32 [layers, B, heads, N, N]; every row sums to 1.
    """

    spans: tuple[Span, ...]
    allowed: np.ndarray
    weights: np.ndarray

    def spans_of(self, group: str, time: int | None = -1) -> list[Span]:
        """Return the spans of a group at a timestep; −1: the last one."""
        spans = [s for s in self.spans if s.group == group]
        return spans[-1:] if time == -1 else [s for s in spans if s.time == time]


def attention(
    model: PolicyNetwork, params: Any, observation: Mapping[str, Any], task: Mapping[str, Any]
) -> AttentionMap:
    """Return the attention of every block, for the `observation` and `task` parts of a batch."""
    groups, blocks = _captured(model, params, observation, task, ("query", "key"))
    allowed = tokens.attention_mask(groups).dense()
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
    """Return normalised chunks float32 [1 + steps, B, H, A], from pure noise to the actions.

    Raises ValueError for a head that does not denoise, or one wrapped by another head.
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
    """Return (the transformer's output groups, the named projections' outputs per block)."""

    def is_captured(module: nn.Module, method: str) -> bool:
        return module.name in names and method == "__call__"

    order = []

    def encode(params: Any, *inputs: Mapping[str, Any]) -> tuple[list[TokenGroup], Any]:
        groups, variables = model.apply(
            {"params": params},
            *inputs,
            train=False,
            method="encode",
            capture_intermediates=is_captured,
            mutable=["intermediates"],
        )
        order.extend(groups)  # jit returns dicts in alphabetical order
        return list(groups.values()), variables

    values, variables = jax.jit(encode)(params, observation, task)
    groups = dict(zip(order, values, strict=True))
    blocks = [
        variables["intermediates"]["transformer"][f"block_{i}"]["attention"]
        for i in range(model.transformer.layers if names else 0)
    ]
    blocks = [{name: block[name]["__call__"][0] for name in names} for block in blocks]
    return _sequence(model, groups), blocks


def _sequence(model: PolicyNetwork, groups: Mapping[str, TokenGroup]) -> tokens.TokenSequence:
    sequence = tokens.TokenSequence({}, {}, {})
    for name, group in groups.items():
        is_register = name.removeprefix("readout_") in model.registers
        if name == "obs":  # the concatenation of the other observation groups
            continue
        if name.startswith("task_"):
            sequence.task[name] = group
        elif name.startswith("obs_") or is_register:
            sequence.observation[name] = group
        else:
            sequence.readout[name] = group
    return sequence


def _spans(groups: tokens.TokenSequence) -> tuple[Span, ...]:
    per_step = groups.observation | groups.readout
    window = next(iter(per_step.values())).mask.shape[1]
    ordered: list[tuple[str, int | None, tokens.TokenGroup]]
    ordered = [(name, None, g) for name, g in groups.task.items()]
    ordered += [(name, t, g) for t in range(window) for name, g in per_step.items()]
    spans, start = [], 0
    for name, time, group in ordered:
        spans.append(Span(name, time, start, start + group.mask.shape[-1]))
        start = spans[-1].stop
    return tuple(spans)


def _by_head(x: jax.Array, heads: int) -> jax.Array:
    return x.astype(jnp.float32).reshape(*x.shape[:2], heads, -1)
