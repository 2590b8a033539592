"""Do groups of examples pull shared parameters in different directions? Their gradients compared.

The groups and their gradients are those of octolike.train.group_gradients.

    cosine          between two groups' gradients, over the parameters that both of them move
    conflict rate   share of the pairs with a negative cosine
    within          cosine between the two halves of one group: noise alone makes it less than one
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from octolike import files, types
from octolike.config import Config
from octolike.train import metrics as logs
from octolike.train import optimizer
from octolike.train.gradients import LossFn, Metrics, Params
from octolike.train.group_gradients import (
    gram_matrices,
    group_gradients,
    group_ids,
    group_names,
)

FILE = "conflicts.jsonl"


class GradientComparison(NamedTuple):
    """Scalar products of the groups' gradients, per module (M) and, last, over all parameters.

    Attributes:
        dot: [M + 1, G, G], scalar products.
        squares: [M + 1, G, G], squared length of the row's gradient over the parameters that the
            column's gradient moves too.
        halves: [G, 3], per group: product of its two halves, and the squared length of each half.
        examples: int [G].
    """

    dot: jax.Array
    squares: jax.Array
    halves: jax.Array
    examples: jax.Array


def compare(
    loss_fn: LossFn,
    params: Params,
    batch: types.Batch,
    key: jax.Array,
    groups: jax.Array,
    count: int,
) -> GradientComparison:
    """Compare the gradients of `count` groups; pure, to be jitted. groups: int32 [B]."""
    member = jax.nn.one_hot(groups, count, dtype=jnp.int32)  # [B, G]
    index_in_group = (jnp.cumsum(member, axis=0) - member)[jnp.arange(len(groups)), groups]
    half_ids = 2 * groups + index_in_group % 2
    _, _, parts = group_gradients(loss_fn, params, batch, key, half_ids, 2 * count)
    grams = gram_matrices(parts)
    # A group's gradient is the sum of its halves, and so are its scalar products.
    of_groups = {k: x.reshape(-1, count, 2, count, 2).sum(axis=(2, 4)) for k, x in grams.items()}
    dots, squares = [], []
    for paths in modules(list(of_groups)).values():
        pairs = [_shared_products(of_groups[path]) for path in paths]
        dots.append(sum(dot for dot, _ in pairs))
        squares.append(sum(square for _, square in pairs))
    dots.append(sum(dots))
    squares.append(sum(squares))
    gram = cast(jax.Array, sum(x.sum(axis=0) for x in grams.values()))
    gram = gram.reshape(count, 2, count, 2)
    g = jnp.arange(count)
    halves = [gram[g, 0, g, 1], gram[g, 0, g, 0], gram[g, 1, g, 1]]
    return GradientComparison(
        jnp.stack(dots), jnp.stack(squares), jnp.stack(halves, 1), member.sum(axis=0)
    )


def modules(paths: list[str]) -> dict[str, list[str]]:
    """Return {module: its paths}; a module is a tokenizer, a head or a transformer block."""
    result: dict[str, list[str]] = {}
    for path in paths:
        first, _, inner_path = path.partition("/")
        inner = inner_path.partition("/")[0]
        name = f"{first}/{inner}" if first == "transformer" else first
        result.setdefault(name, []).append(path)
    return result


def to_row(
    comparison: GradientComparison,
    groups: tuple[str, ...],
    module_names: list[str],
    step: int,
    seconds: float,
) -> dict[str, Any]:
    """Return a comparison as a row of conflicts.jsonl; undefined numbers are None.

    cosine: [G, G]; within: [G]; modules: {name: {cosine: [G, G], conflict_rate}}.
    """
    dot, squares, halves = (np.asarray(x, np.float64) for x in comparison[:3])
    cosine = _ratio(dot, np.sqrt(squares * squares.swapaxes(1, 2)))
    within = _ratio(halves[:, 0], np.sqrt(halves[:, 1] * halves[:, 2]))
    per_module = {
        name: {"cosine": to_lists(cosine[i]), "conflict_rate": negative_share(cosine[i])}
        for i, name in enumerate(module_names)
    }
    return {
        "step": step,
        "seconds": round(seconds, 4),
        "groups": list(groups),
        "examples": np.asarray(comparison.examples).tolist(),
        "cosine": to_lists(cosine[-1]),
        "within": to_lists(within),
        "conflict_rate": negative_share(cosine[-1]),
        "modules": per_module,
    }


def negative_share(cosine: np.ndarray) -> float | None:
    """Return the share of negative values among the finite pairs of [G, G]; None without a pair."""
    pairs = cosine[np.triu_indices(len(cosine), 1)]
    pairs = pairs[np.isfinite(pairs)]
    return float((pairs < 0).mean()) if len(pairs) else None


def to_lists(values: np.ndarray) -> list[Any]:
    """Return an array as nested lists, rounded, with None for NaN."""
    if values.ndim > 1:
        return [to_lists(row) for row in values]
    return [round(float(v), 5) if np.isfinite(v) else None for v in values]


class GradientComparer:
    """Compares the groups' gradients every k steps and appends a row to conflicts.jsonl.

    It computes the gradients of the next step: same batch, augmentation and noise. With
    optim.accumulate it uses the first part of the batch. The first comparison compiles; the
    `seconds` of a row exclude that.
    """

    def __init__(
        self,
        loss_fn: Callable[..., tuple[jax.Array, Metrics]],
        key: jax.Array,
        config: Config,
        names: types.Names,
        step: int,
    ) -> None:
        """Prepare, and drop the rows that a resumed run will write again.

        Args:
            loss_fn: (state, params, batch, key) -> (loss, metrics), the training loss.
            key: the key that the training step folds its step number into.
            config: the run's config.
            names: names of the groups.
            step: first step of this process.
        """
        self._loss_fn, self._key = loss_fn, key
        self._by, self._names = config.train.groups, group_names(config.train.groups, names)
        self._every, self._parts = config.train.conflicts_every, config.optim.accumulate
        self._files = files.Mirror(config.workdir)
        self._compiled: Any = None
        if jax.process_index() == 0:
            self._files.fetch(FILE)
            logs.truncate(self._files.local / FILE, step - 1)

    def due(self, step: int) -> bool:
        """Return whether gradients are compared after `step` steps."""
        return bool(self._every) and step % self._every == 0

    def call(self, step: int, state: Any, batch: types.Batch) -> None:
        """Compare the gradients of a state on a batch on the devices, and write a row."""
        if self._compiled is None:
            replicated = state.step.sharding  # every device needs the result
            jitted = jax.jit(self._compare, out_shardings=replicated)
            mesh = getattr(state.step.sharding, "mesh", None)
            with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
                self._compiled = jitted.lower(state, batch).compile()
        jax.block_until_ready(state)  # so that the previous step is not timed
        started = time.perf_counter()
        comparison = jax.device_get(jax.block_until_ready(self._compiled(state, batch)))
        seconds = time.perf_counter() - started
        module_names = list(modules(list(optimizer.flatten(state.params))))
        row = to_row(comparison, self._names, module_names, step, seconds)
        if jax.process_index() == 0:
            with (self._files.local / FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
            self._files.upload()

    def close(self) -> None:
        """Do nothing: every row is written."""

    def _compare(self, state: Any, batch: types.Batch) -> GradientComparison:
        batch = jax.tree.map(lambda x: x[: len(x) // self._parts], batch)
        key = jax.random.fold_in(self._key, state.step)
        groups, loss_fn = group_ids(self._by, batch), functools.partial(self._loss_fn, state)
        return compare(loss_fn, state.params, batch, key, groups, len(self._names))


def read(workdir: files.PathLike) -> list[dict[str, Any]]:
    """Return the rows of a run's conflicts.jsonl; [] without the file."""
    return logs.read(files.as_path(workdir) / FILE)


def _shared_products(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (dot, squares), both [G, G], of products [S, G, G]; see `GradientComparison`."""
    lengths = jnp.diagonal(gram, axis1=1, axis2=2)  # [S, G]
    moved = lengths > 0
    squares = (lengths[:, :, None] * moved[:, None, :]).sum(axis=0)
    return gram.sum(axis=0), squares


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return a / b, NaN if b is 0."""
    return np.where(b > 0, a / np.where(b > 0, b, 1), np.nan)
