"""PCGrad: gradient surgery between groups (Yu et al. 2020, "Gradient Surgery for Multi-Task
Learning").

From the gradient of each group, PCGrad removes the component that opposes another group's
gradient, group after group in random order. The result is a weighted sum of the original
gradients, and the weights depend on their scalar products only. So the weights are all that is
computed on top of the gradients per group.
"""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp

from octolike.train import optimizer
from octolike.train.gradients import GradientFn, LossFn, Metrics, Params
from octolike.train.group_gradients import conflict_rate, gram_matrices
from octolike.types import Batch

SURGERY = 1 << 16  # folded into the key of a step: the stream that draws PCGrad's order


def with_pcgrad(gradient_fn: GradientFn) -> GradientFn:
    """Return a gradient function that merges the parts of a per-group one; adds conflict_rate."""

    def merged(
        loss_fn: LossFn, params: Params, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics, Params]:
        loss, metrics, parts = gradient_fn(loss_fn, params, batch, key)
        grads, rate = pcgrad(parts, jax.random.fold_in(key, SURGERY))
        return loss, {**metrics, "conflict_rate": rate}, grads

    return merged


def pcgrad(parts: Params, key: jax.Array) -> tuple[Params, jax.Array]:
    """Return the merged gradient of parts [G, …], and their conflict rate."""
    grams = gram_matrices(parts)
    total = cast(jax.Array, sum(x.sum(axis=0) for x in grams.values()))
    # A parameter with a gradient from one group only (its own head) cannot be in conflict.
    shared = {path: _moving_parts(x) > 1 for path, x in grams.items()}
    common = sum(jnp.where(shared[k][:, None, None], x, 0).sum(axis=0) for k, x in grams.items())
    weights = pcgrad_weights(cast(jax.Array, common), key)

    def weighted_sum(path: str, x: jax.Array) -> jax.Array:
        slices = shared[path]  # [S]
        w = jnp.where(slices, weights[:, None], 1.0)  # [G, S]
        rows = x.reshape(len(x), len(slices), -1)
        return jnp.einsum("gs,gsn->sn", w, rows, precision="highest").reshape(x.shape[1:])

    flat = {path: weighted_sum(path, x) for path, x in optimizer.flatten(parts).items()}
    return optimizer.unflatten(flat), conflict_rate(total)


def pcgrad_weights(gram: jax.Array, key: jax.Array) -> jax.Array:
    """Return the weight of each part, [G], in PCGrad's sum.

    gram: [G, G], scalar products. Part i becomes Σ_k c_k · part k. At first c is 1 for part i and 0
    elsewhere; then for each j in random order with d = Σ_k c_k · gram[k, j] < 0:
    c_j −= d / gram[j, j].
    """
    count = len(gram)
    lengths = jnp.diagonal(gram)

    def project(i: jax.Array, key: jax.Array) -> jax.Array:
        def remove(c: jax.Array, j: jax.Array) -> tuple[jax.Array, None]:
            d = jnp.minimum(jnp.dot(c, gram[:, j], precision="highest"), 0)
            off = jnp.where((j == i) | (lengths[j] <= 0), 0, d / lengths[j])
            return c.at[j].add(-off), None

        start = jax.nn.one_hot(i, count)
        return jax.lax.scan(remove, start, jax.random.permutation(key, count))[0]

    return jax.vmap(project)(jnp.arange(count), jax.random.split(key, count)).sum(axis=0)


def _moving_parts(gram: jax.Array) -> jax.Array:
    """Return the number of parts with a nonzero gradient per slice, int [S]; gram: [S, G, G]."""
    return (jnp.diagonal(gram, axis1=1, axis2=2) > 0).sum(axis=1)
