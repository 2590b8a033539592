"""Gradients of a batch: all at once, or part by part where the batch does not fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from octolike.train import optimizer
from octolike.types import Batch

Params = dict[str, Any]
Metrics = dict[str, jax.Array]
# (trained parameters, batch, key) -> (loss, metrics)
Loss = Callable[[Params, Batch, jax.Array], tuple[jax.Array, Metrics]]


def of_batch(
    loss: Loss,
    params: Params,
    batch: Batch,
    key: jax.Array,
    parts: int = 1,
    differentiate: Callable[..., Any] | None = None,
) -> tuple[jax.Array, Metrics, Params]:
    """Return (loss, metrics, gradients) of a batch of B examples, computed in `parts` parts.

    A part is B / parts examples, and counts by its valid actions, so that the sum is the gradient
    of the whole batch (but for the noise, which each part draws for itself). Metrics with an axis
    of examples come back in the batch's order. differentiate: another way to the gradients
    (conflicts.differentiate), (params, batch, key) -> ((loss, metrics), gradients).
    """
    differentiate = differentiate or jax.value_and_grad(loss, has_aux=True)
    if parts == 1:
        (value, metrics), grads = differentiate(params, batch, key)
        return value, metrics, grads
    cut = jax.tree.map(lambda x: _cut(x, parts), batch)
    valid = batch["action_mask"] & batch["observation"]["timestep_mask"][..., None, None]
    counts = _cut(valid, parts).sum(axis=tuple(range(1, valid.ndim + 1))).astype(jnp.float32)
    weights = counts / jnp.maximum(counts.sum(), 1)

    def one(grads: Params, given: tuple[Batch, jax.Array, jax.Array]) -> tuple[Params, Any]:
        part, weight, i = given
        (value, metrics), new = differentiate(params, part, jax.random.fold_in(key, i))
        return jax.tree.map(lambda a, b: a + weight * b, grads, new), (value, metrics)

    first = jax.tree.map(lambda x: x[0], cut)
    zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(differentiate, params, first, key)[1])
    # XLA computes convolutions within a loop many times slower on CPU.
    unroll = jax.default_backend() == "cpu"
    given = cut, weights, jnp.arange(parts)
    grads, (values, metrics) = jax.lax.scan(one, zero, given, unroll=unroll)
    join = lambda x: (weights * x).sum() if x.ndim == 1 else _join(x)
    return (weights * values).sum(), jax.tree.map(join, metrics), grads


def norms(grads: Mapping[str, Any]) -> Metrics:
    """Return {"grad_norm": of all, "grad_norm/<module>": of each}; a block is a module."""
    modules: dict[str, dict[str, jax.Array]] = {}
    for path, x in optimizer.flatten(grads).items():
        name = path.removeprefix("lora/").split("/")
        blocks = len(name) > 2 and name[0] == "transformer"
        modules.setdefault("/".join(name[: 1 + blocks]), {})[path] = x
    squares = {name: optax.tree.norm(part, squared=True) for name, part in modules.items()}
    found = {f"grad_norm/{name}": jnp.sqrt(square) for name, square in squares.items()}
    return {"grad_norm": jnp.sqrt(sum(squares.values())), **found}


def _cut(x: jax.Array, parts: int) -> jax.Array:
    """Return [B, …] as [parts, B / parts, …], every part out of every device's examples."""
    return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)


def _join(x: jax.Array) -> jax.Array:
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
