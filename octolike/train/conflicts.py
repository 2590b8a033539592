"""Do groups of examples pull shared parameters apart? Their gradients compared, and PCGrad.

A group is a dataset, a task or an embodiment (`train.groups`). The loss of a batch is a weighted
sum over its examples, so its gradient is the sum of one part per group:

    loss = Σ_i w_i · loss_per_example_i + balance_loss      w_i: share of the batch's valid actions
    part g: the examples of g, and of balance_loss the share Σ_{i in g} w_i

One forward pass serves all parts; each costs one backward pass, and memory for a copy of the
gradient. A group that a batch lacks has a part of zeros.

    cosine          of two parts, over the parameters that both of them move: the shared ones
    conflict rate   share of the pairs with a cosine below zero
    within          cosine of the two halves of one group: below one by noise alone

PCGrad (Yu et al. 2020, "Gradient Surgery for Multi-Task Learning"): from each part goes what is
against another one, in random order. What is left is a weighted sum of the parts, with weights that
depend on their scalar products only, so nothing but the weights is computed on top.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from octolike import types
from octolike.config import Config, ConfigError, unknown
from octolike.train import metrics as logs
from octolike.train import optimizer
from octolike.train.gradients import Loss, Metrics

Params = dict[str, Any]

UNROLLED = 4  # groups up to which backward passes are written out, one by one
FILE = "conflicts.jsonl"
GROUPS = ("dataset", "task", "embodiment")
MOST_GROUPS = 32  # each one costs a backward pass and a copy of the gradient


class GradientComparison(NamedTuple):
    """What a comparison finds, [modules, …] in the order of `modules`, then the same over all.

    dot: [M + 1, G, G], scalar products. own: [M + 1, G, G], squared length of the row's part over
    the parameters that the column's part moves too. halves: [G, 3], of each group's two halves the
    product and both squared lengths. examples: int [G].
    """

    dot: jax.Array
    own: jax.Array
    halves: jax.Array
    examples: jax.Array


def group_names(by: str, names: types.Names) -> tuple[str, ...]:
    """Return the names of the groups; ConfigError for an unknown `by`, one group, or too many."""
    if by not in GROUPS:
        raise ConfigError(unknown("value of train.groups", by, GROUPS))
    found = getattr(names, f"{by}s")
    if not 2 <= len(found) <= MOST_GROUPS:
        raise ConfigError(
            f"train.groups {by!r} makes {len(found)} groups; gradients can be compared for 2 to "
            f"{MOST_GROUPS}. Choose another of {', '.join(GROUPS)}, or another data.tasks"
        )
    return tuple(name or "(no task)" for name in found)


def group_of(by: str, batch: types.Batch) -> jax.Array:
    """Return the group of each example, int32 [B]."""
    return batch["task"]["task_id"] if by == "task" else batch[by]


def weights(batch: types.Batch) -> jax.Array:
    """Return w [B]: the share of each example in the batch's valid actions."""
    mask = batch["action_mask"] & batch["observation"]["timestep_mask"][..., None, None]
    count = mask.sum(axis=(1, 2, 3)).astype(jnp.float32)
    return count / jnp.maximum(count.sum(), 1)


def differentiate(loss: Loss, by: str, count: int) -> Callable[..., Any]:
    """Return (params, batch, key) -> ((loss, metrics), gradients), with a part per group."""
    return lambda params, batch, key: per_group(
        loss, params, batch, key, group_of(by, batch), count
    )


def per_group(
    loss: Loss, params: Params, batch: types.Batch, key: jax.Array, groups: jax.Array, count: int
) -> tuple[tuple[jax.Array, Metrics], Params]:
    """Return ((loss, metrics), gradients) with a part per group: leaves [count, ...].

    The parts' sum is the gradient of the loss. groups: int32 [B]. The loss has loss_per_example [B]
    among its metrics (and balance_loss, if there is one), as the model gives it.
    """
    member = jax.nn.one_hot(groups, count, axis=0) * weights(batch)  # [G, B]

    def parts(params: Params) -> tuple[tuple[jax.Array, jax.Array], Any]:
        value, metrics = loss(params, batch, key)
        rest = jnp.asarray(metrics.get("balance_loss", 0.0), jnp.float32)
        return (metrics["loss_per_example"].astype(jnp.float32), rest), (value, metrics)

    _, pullback, found = jax.vjp(parts, params, has_aux=True)
    one = lambda part: pullback(part)[0]
    each = member, member.sum(axis=1)
    if count <= UNROLLED:  # XLA computes convolutions within a loop many times slower on CPU
        grads = [one((each[0][g], each[1][g])) for g in range(count)]
        return found, jax.tree.map(lambda *x: jnp.stack(x), *grads)
    # One after the other: together they would need the memory of all backward passes.
    return found, jax.lax.map(one, each)


def pcgrad(parts: Params, key: jax.Array) -> tuple[Params, jax.Array]:
    """Return the gradient that parts [G, ...] make after PCGrad, and their conflict rate."""
    found = products(parts)
    total = sum(x.sum(axis=0) for x in found.values())
    # Parameters that one group alone moves (its own head) are no matter of conflict.
    shared = {path: _movers(x) > 1 for path, x in found.items()}
    common = sum(jnp.where(shared[k][:, None, None], x, 0).sum(axis=0) for k, x in found.items())
    factor = pcgrad_weights(common, key)

    def summed(path: str, x: jax.Array) -> jax.Array:
        pieces = shared[path]  # [S]
        w = jnp.where(pieces, factor[:, None], 1.0)  # [G, S]
        rows = x.reshape(len(x), len(pieces), -1)
        return jnp.einsum("gs,gsn->sn", w, rows, precision="highest").reshape(x.shape[1:])

    flat = {path: summed(path, x) for path, x in optimizer.flatten(parts).items()}
    return optimizer.unflatten(flat), conflict_rate(total)


def pcgrad_weights(gram: jax.Array, key: jax.Array) -> jax.Array:
    """Return the weight of each part, [G], in the sum that PCGrad makes of parts.

    gram: [G, G], scalar products. Part i becomes Σ_k c_k · part k, with c of part i alone at first;
    for each j in random order, with d = Σ_k c_k · gram[k, j] below 0, c_j −= d / gram[j, j].
    """
    count = len(gram)
    lengths = jnp.diagonal(gram)

    def project(i: jax.Array, key: jax.Array) -> jax.Array:
        def against(c: jax.Array, j: jax.Array) -> tuple[jax.Array, None]:
            d = jnp.minimum(jnp.dot(c, gram[:, j], precision="highest"), 0)
            off = jnp.where((j == i) | (lengths[j] <= 0), 0, d / lengths[j])
            return c.at[j].add(-off), None

        start = jax.nn.one_hot(i, count)
        return jax.lax.scan(against, start, jax.random.permutation(key, count))[0]

    return jax.vmap(project)(jnp.arange(count), jax.random.split(key, count)).sum(axis=0)


def products(parts: Params) -> dict[str, jax.Array]:
    """Return {path: scalar products [S, G, G]} of leaves [G, ...].

    S = 1, but for heads with parameters per group of robots or tasks ("stacked"), whose first axis
    tells pieces apart that belong to different groups.
    """
    result = {}
    for path, x in optimizer.flatten(parts).items():
        stacked = "stacked" in path.split("/") and x.ndim > 1
        rows = x.reshape(len(x), x.shape[1] if stacked else 1, -1).astype(jnp.float32)
        result[path] = jnp.einsum("gsn,hsn->sgh", rows, rows, precision="highest")
    return result


def conflict_rate(gram: jax.Array) -> jax.Array:
    """Return the share of pairs of parts, zero ones aside, whose scalar product is negative."""
    there = jnp.diagonal(gram) > 0
    pair = jnp.triu(there[:, None] & there, 1)
    return (pair & (gram < 0)).sum() / jnp.maximum(pair.sum(), 1)


def modules(paths: list[str]) -> dict[str, list[str]]:
    """Return {module: its paths}: a tokenizer, a head, or a block of the transformer."""
    result: dict[str, list[str]] = {}
    for path in paths:
        first, _, rest = path.partition("/")
        inner = rest.partition("/")[0]
        name = f"{first}/{inner}" if first == "transformer" else first
        result.setdefault(name, []).append(path)
    return result


def compare(
    loss: Loss, params: Params, batch: types.Batch, key: jax.Array, groups: jax.Array, count: int
) -> GradientComparison:
    """Return how the groups' gradients lie to one another; pure, to be jitted."""
    seen = jax.nn.one_hot(groups, count, dtype=jnp.int32)  # [B, G]
    before = (jnp.cumsum(seen, axis=0) - seen)[jnp.arange(len(groups)), groups]
    _, parts = per_group(loss, params, batch, key, 2 * groups + before % 2, 2 * count)
    found = products(parts)
    # A group is the sum of its halves, and so are its products.
    whole = {k: x.reshape(-1, count, 2, count, 2).sum(axis=(2, 4)) for k, x in found.items()}
    dots, owns = [], []
    for paths in modules(list(whole)).values():
        pairs = [_shared(whole[path]) for path in paths]
        dots.append(sum(dot for dot, _ in pairs))
        owns.append(sum(own for _, own in pairs))
    dots.append(sum(dots))
    owns.append(sum(owns))
    gram = sum(x.sum(axis=0) for x in found.values()).reshape(count, 2, count, 2)
    g = jnp.arange(count)
    halves = [gram[g, 0, g, 1], gram[g, 0, g, 0], gram[g, 1, g, 1]]
    return GradientComparison(
        jnp.stack(dots), jnp.stack(owns), jnp.stack(halves, 1), seen.sum(axis=0)
    )


def to_row(
    found: GradientComparison, names: tuple[str, ...], parts: list[str], step: int, seconds: float
) -> dict[str, Any]:
    """Return a comparison as a line of conflicts.jsonl; None stands where there is no number.

    cosine: [G, G]; within: [G]; modules: {name: {cosine: [G, G], conflict_rate}}.
    """
    dot, own, halves = (np.asarray(x, np.float64) for x in found[:3])
    cosine = _ratio(dot, np.sqrt(own * own.swapaxes(1, 2)))
    within = _ratio(halves[:, 0], np.sqrt(halves[:, 1] * halves[:, 2]))
    per_module = {
        name: {"cosine": plain(cosine[i]), "conflict_rate": rate(cosine[i])}
        for i, name in enumerate(parts)
    }
    return {
        "step": step,
        "seconds": round(seconds, 4),
        "groups": list(names),
        "examples": np.asarray(found.examples).tolist(),
        "cosine": plain(cosine[-1]),
        "within": plain(within),
        "conflict_rate": rate(cosine[-1]),
        "modules": per_module,
    }


def rate(cosine: np.ndarray) -> float | None:
    """Return the share of known pairs of a matrix [G, G] that are negative; None without any."""
    pairs = cosine[np.triu_indices(len(cosine), 1)]
    pairs = pairs[np.isfinite(pairs)]
    return float((pairs < 0).mean()) if len(pairs) else None


def plain(values: np.ndarray) -> list[Any]:
    """Return an array as nested lists, rounded, with None for NaN."""
    if values.ndim > 1:
        return [plain(row) for row in values]
    return [round(float(v), 5) if np.isfinite(v) else None for v in values]


class GradientComparer:
    """Compares gradients every so many steps and notes them in a run's conflicts.jsonl.

    What is compared are the parts of the gradient of the step that comes next: its batch, its
    augmentation, its noise; of a batch that is computed in parts (optim.accumulate), of one part.
    The first comparison compiles; `seconds` of a row is what a comparison took, that aside.
    """

    def __init__(
        self,
        loss: Callable[[Any], Loss],
        key: jax.Array,
        config: Config,
        names: types.Names,
        step: int,
    ) -> None:
        """loss: of a state; key: of the steps; step: where the run stands."""
        self._loss, self._key = loss, key
        self._by, self._names = config.train.groups, group_names(config.train.groups, names)
        self._every, self._parts = config.train.conflicts_every, config.optim.accumulate
        self._path = Path(config.workdir) / FILE
        self._compare: Any = None
        if jax.process_index() == 0:
            logs.truncate(self._path, step - 1)

    def due(self, step: int) -> bool:
        """Return whether gradients are compared when so many steps are done."""
        return bool(self._every) and step % self._every == 0

    def __call__(self, step: int, state: Any, batch: types.Batch) -> None:
        """Compare the gradients of this state for a batch on the devices, and write a line."""
        if self._compare is None:
            whole = state.step.sharding  # the numbers are wanted on every device
            measure = jax.jit(self._measure, out_shardings=whole)
            self._compare = measure.lower(state, batch).compile()
        jax.block_until_ready(state)  # the step before this is not what is timed
        started = time.perf_counter()
        found = jax.device_get(jax.block_until_ready(self._compare(state, batch)))
        seconds = time.perf_counter() - started
        parts = list(modules(list(optimizer.flatten(state.params))))
        row = to_row(found, self._names, parts, step, seconds)
        if jax.process_index() == 0:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")

    def _measure(self, state: Any, batch: types.Batch) -> GradientComparison:
        batch = jax.tree.map(lambda x: x[: len(x) // self._parts], batch)
        key = jax.random.fold_in(self._key, state.step)
        groups = group_of(self._by, batch)
        return compare(self._loss(state), state.params, batch, key, groups, len(self._names))


def read(workdir: str | Path) -> list[Mapping[str, Any]]:
    """Return the lines of a run's conflicts.jsonl; none where it has none."""
    return logs.read(Path(workdir) / FILE)


def _movers(gram: jax.Array) -> jax.Array:
    """Return how many parts move each piece, int [S], for products [S, G, G]."""
    return (jnp.diagonal(gram, axis1=1, axis2=2) > 0).sum(axis=1)


def _shared(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (dot, own), both [G, G], of products [S, G, G]; see `GradientComparison`."""
    lengths = jnp.diagonal(gram, axis1=1, axis2=2)  # [S, G]
    moved = lengths > 0
    own = (lengths[:, :, None] * moved[:, None, :]).sum(axis=0)
    return gram.sum(axis=0), own


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return a / b, NaN where b is 0."""
    return np.where(b > 0, a / np.where(b > 0, b, 1), np.nan)
