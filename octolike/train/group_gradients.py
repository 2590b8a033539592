"""Gradients per group of examples.

A group is a dataset, a task or an embodiment (`train.groups`). The loss of a batch is a weighted
sum over its examples, so its gradient is the sum of one part per group:

    loss = Σ_i w_i · loss_per_example_i + shared        w_i: share of the batch's valid actions
    part g: the examples of g, and the share Σ_{i in g} w_i of shared

The shared losses are those of the whole batch (`network.SHARED_LOSSES`): of experts, subtasks and
auxiliary heads.

All parts share one forward pass. Each part costs one backward pass and the memory of one copy of
the gradient. The part of a group without examples in the batch is zero.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from octolike import types
from octolike.config import ConfigError, unknown
from octolike.model.network import SHARED_LOSSES
from octolike.train import optimizer
from octolike.train.gradients import GradientFn, LossFn, Metrics, Params

GROUPS = ("dataset", "task", "embodiment")
MOST_GROUPS = 32  # each group costs a backward pass and a copy of the gradient
UNROLLED = 4  # up to this number of groups, the backward passes are written out


def group_names(by: str, names: types.Names) -> tuple[str, ...]:
    """Return the names of the groups.

    Raises:
        ConfigError: an unknown `by`, fewer than two groups, or more than MOST_GROUPS.
    """
    if by not in GROUPS:
        raise ConfigError(unknown("value of train.groups", by, GROUPS))
    groups = getattr(names, f"{by}s")
    if not 2 <= len(groups) <= MOST_GROUPS:
        raise ConfigError(
            f"train.groups {by!r} makes {len(groups)} groups; gradients can be compared for 2 to "
            f"{MOST_GROUPS}. Choose another of {', '.join(GROUPS)}, or another data.tasks"
        )
    return tuple(name or "(no task)" for name in groups)


def group_ids(by: str, batch: types.Batch) -> jax.Array:
    """Return the group of each example, int32 [B]."""
    return batch["task"]["task_id"] if by == "task" else batch[by]


def example_weights(batch: types.Batch) -> jax.Array:
    """Return w [B]: the share of each example in the batch's valid actions."""
    mask = batch["action_mask"] & batch["observation"]["timestep_mask"][..., None, None]
    count = mask.sum(axis=(1, 2, 3)).astype(jnp.float32)
    return count / jnp.maximum(count.sum(), 1)


def per_group(by: str, count: int) -> GradientFn:
    """Return a gradient function that returns one part per group: leaves [count, …]."""

    def gradient_fn(
        loss_fn: LossFn, params: Params, batch: types.Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics, Params]:
        return group_gradients(loss_fn, params, batch, key, group_ids(by, batch), count)

    return gradient_fn


def group_gradients(
    loss_fn: LossFn,
    params: Params,
    batch: types.Batch,
    key: jax.Array,
    groups: jax.Array,
    count: int,
) -> tuple[jax.Array, Metrics, Params]:
    """Return (loss, metrics, gradients) with one gradient per group: leaves [count, …].

    The sum over groups is the gradient of the loss.

    Args:
        loss_fn: must return the metric loss_per_example [B], and the shared losses that it has.
        params: trained parameters.
        batch: B examples.
        key: random key of the loss.
        groups: int32 [B], the group of each example.
        count: number of groups.
    """
    member = jax.nn.one_hot(groups, count, axis=0) * example_weights(batch)  # [G, B]

    def terms(params: Params) -> tuple[tuple[jax.Array, jax.Array], Any]:
        loss, metrics = loss_fn(params, batch, key)
        shared = sum(metrics.get(name, 0.0) for name in SHARED_LOSSES)
        shared = jnp.asarray(shared, jnp.float32)
        return (metrics["loss_per_example"].astype(jnp.float32), shared), (loss, metrics)

    _, pullback, (loss, metrics) = jax.vjp(terms, params, has_aux=True)

    def gradient(weights: tuple[jax.Array, jax.Array]) -> Params:
        return pullback(weights)[0]

    weights = member, member.sum(axis=1)
    if count <= UNROLLED:  # XLA computes convolutions within a loop many times slower on CPU
        grads = [gradient((weights[0][g], weights[1][g])) for g in range(count)]
        return loss, metrics, jax.tree.map(lambda *x: jnp.stack(x), *grads)
    # One after the other: together they would need the memory of all backward passes.
    return loss, metrics, jax.lax.map(gradient, weights)


def gram_matrices(parts: Params) -> dict[str, jax.Array]:
    """Return {path: scalar products [S, G, G]} of leaves [G, …].

    S is 1, except for heads with parameters per group of robots or tasks ("stacked"): their first
    axis separates slices that belong to different groups.
    """
    result = {}
    for path, x in optimizer.flatten(parts).items():
        stacked = "stacked" in path.split("/") and x.ndim > 1
        rows = x.reshape(len(x), x.shape[1] if stacked else 1, -1).astype(jnp.float32)
        result[path] = jnp.einsum("gsn,hsn->sgh", rows, rows, precision="highest")
    return result


def conflict_rate(gram: jax.Array) -> jax.Array:
    """Return the share of pairs of nonzero parts with a negative scalar product; gram: [G, G]."""
    nonzero = jnp.diagonal(gram) > 0
    pairs = jnp.triu(nonzero[:, None] & nonzero, 1)
    return (pairs & (gram < 0)).sum() / jnp.maximum(pairs.sum(), 1)
