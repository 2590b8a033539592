"""Gradients of a batch: of the whole batch at once, or accumulated over parts of it.

A gradient function maps (loss_fn, params, batch, key) to (loss, metrics, gradients). The training
step calls one. Wrappers build others from it: `accumulated`, and octolike.train.pcgrad.with_pcgrad.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from octolike.model.target import target
from octolike.train import optimizer
from octolike.types import Batch

Params = dict[str, Any]
Metrics = dict[str, jax.Array]
# (trained parameters, batch, key) -> (loss, metrics)
LossFn = Callable[[Params, Batch, jax.Array], tuple[jax.Array, Metrics]]
# (loss_fn, trained parameters, batch, key) -> (loss, metrics, gradients)
GradientFn = Callable[[LossFn, Params, Batch, jax.Array], tuple[jax.Array, Metrics, Params]]


def whole_batch(
    loss_fn: LossFn, params: Params, batch: Batch, key: jax.Array
) -> tuple[jax.Array, Metrics, Params]:
    """Return (loss, metrics, gradients) of a batch."""
    (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, key)
    return loss, metrics, grads


def accumulated(gradient_fn: GradientFn, parts: int) -> GradientFn:
    """Return a gradient function that computes a batch of B examples in `parts` parts.

    Each part has B / parts examples and is weighted by its valid actions, so the sum equals the
    gradient of the whole batch, except for the noise: each part draws its own, and for means over
    labelled steps alone (subtasks, auxiliary heads). Per-example metrics come back in the order of
    the batch.
    """

    def accumulate(
        loss_fn: LossFn, params: Params, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics, Params]:
        differentiate = functools.partial(gradient_fn, loss_fn)
        split = jax.tree.map(lambda x: _split(x, parts), batch)
        valid = batch["action_mask"] & batch["observation"]["timestep_mask"][..., None, None]
        axes = tuple(range(1, valid.ndim + 1))
        counts = _split(valid, parts).sum(axis=axes).astype(jnp.float32)
        weights = counts / jnp.maximum(counts.sum(), 1)

        def add_part(
            total: Params, inputs: tuple[Batch, jax.Array, jax.Array]
        ) -> tuple[Params, tuple[jax.Array, Metrics]]:
            part, weight, i = inputs
            loss, metrics, grads = differentiate(params, part, jax.random.fold_in(key, i))
            return jax.tree.map(lambda a, b: a + weight * b, total, grads), (loss, metrics)

        first = jax.tree.map(lambda x: x[0], split)
        shapes = jax.eval_shape(differentiate, params, first, key)[2]
        zeros = jax.tree.map(jnp.zeros_like, shapes)
        # XLA computes convolutions within a loop many times slower on CPU.
        unroll = target().platform == "cpu"
        inputs = split, weights, jnp.arange(parts)
        grads, (losses, metrics) = jax.lax.scan(add_part, zeros, inputs, unroll=unroll)

        def join(x: jax.Array) -> jax.Array:
            return (weights * x).sum() if x.ndim == 1 else _join(x)

        return (weights * losses).sum(), jax.tree.map(join, metrics), grads

    return accumulate


def gradient_norms(grads: Mapping[str, Any]) -> Metrics:
    """Return {"grad_norm": of all, "grad_norm/<module>": per module}; a block is a module."""
    modules: dict[str, dict[str, jax.Array]] = {}
    for path, x in optimizer.flatten(grads).items():
        names = path.removeprefix("lora/").split("/")
        in_block = len(names) > 2 and names[0] == "transformer"
        modules.setdefault("/".join(names[: 1 + in_block]), {})[path] = x
    squares = {name: optax.tree.norm(part, squared=True) for name, part in modules.items()}
    norms = {f"grad_norm/{name}": jnp.sqrt(square) for name, square in squares.items()}
    return {"grad_norm": jnp.sqrt(sum(squares.values())), **norms}


def _split(x: jax.Array, parts: int) -> jax.Array:
    """Return [B, …] as [parts, B / parts, …]; each part takes examples of every device."""
    return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)


def _join(x: jax.Array) -> jax.Array:
    """Return [parts, B / parts, …] as [B, …]: the inverse of `_split`."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
