"""TrainState, how it starts, and the strict merge of parameters from another run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from octolike import types
from octolike.config import ConfigError, unknown
from octolike.train import lora, optimizer

Params = dict[str, Any]


@struct.dataclass
class TrainState:
    """What a step changes. One pytree, so that it is sharded, donated and saved as one.

    step: int32 [], optimiser updates made. params: trained parameters, nested by name. frozen: the
    others. ema: running average of `params`, {} if there is none. opt_state: optax state of
    `params`. lora_scale: of octolike.train.lora.
    """

    step: jax.Array
    params: Params
    frozen: Params
    ema: Params
    opt_state: optax.OptState
    lora_scale: float = struct.field(pytree_node=False, default=1.0)

    def all_params(self) -> Params:
        """Return trained and frozen parameters as one tree: what is saved."""
        return optimizer.merge(self.frozen, self.params)

    def model_params(self, trained: Params) -> Params:
        """Return what the model takes, for some values of the trained parameters."""
        return lora.merged(optimizer.merge(self.frozen, trained), self.lora_scale)

    def policy_params(self) -> Params:
        """Return the parameters that a policy uses: averaged ones where they are kept."""
        return self.model_params(optimizer.merge(self.params, self.ema))


def init_params(model: nn.Module, spec: types.BatchSpec, key: jax.Array) -> Params:
    """Return fresh parameters; traceable, so that `jax.eval_shape` gives their shapes alone."""
    params, noise, dropout = jax.random.split(key, 3)
    rngs = {"params": params, "noise": noise, "dropout": dropout}
    return model.init(rngs, types.zeros(spec, 1), train=False)["params"]


def create(
    params: Params,
    tx: optax.GradientTransformation,
    frozen: Iterable[str],
    *,
    ema: bool,
    lora_scale: float = 1.0,
) -> TrainState:
    """Return the state before the first step."""
    trained, still = optimizer.split(params, frozen)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=trained,
        frozen=still,
        ema=jax.tree.map(jnp.copy, trained) if ema else {},
        opt_state=tx.init(trained),
        lora_scale=lora_scale,
    )


def merge_strictly(params: Params, given: Params, source: str) -> Params:
    """Return `given` if it has exactly the paths and shapes of `params`, else raise ConfigError.

    The error names every path that is missing, extra, or of another shape. `params` may be
    abstract.
    """
    mine, theirs = optimizer.flatten(params), optimizer.flatten(given)
    faults = []
    for path in sorted(mine.keys() | theirs.keys()):
        if path not in theirs:
            faults.append(f"missing there: {path} {list(mine[path].shape)}")
        elif path not in mine:
            faults.append(f"only there: {unknown('parameter', path, mine).partition(' (')[0]}")
        elif mine[path].shape != theirs[path].shape:
            shapes = f"{list(theirs[path].shape)}, expected {list(mine[path].shape)}"
            faults.append(f"other shape: {path} {shapes}")
    if faults:
        raise ConfigError(
            f"the parameters of {source} do not fit this model ({len(faults)} differences):\n  "
            + "\n  ".join(faults)
            + "\nUse the model settings of that run (its config.json)."
        )
    return given


class Adapted(NamedTuple):
    """Parameters that go over from another run, by path; what starts afresh; what stays behind."""

    taken: dict[str, Any]
    fresh: list[str]
    left: list[str]


def adapt(params: Params, given: Params, fresh: Sequence[str], source: str) -> Adapted:
    """Return what a model with `params` (may be abstract) takes over from those of another run.

    Everything, but what the patterns `fresh` (train.reinit) match: that may differ, and starts
    from scratch. Raises ConfigError for a pattern that matches nothing, and with every path that
    is missing, extra, or of another shape without being matched.
    """
    mine, theirs = optimizer.flatten(params), optimizer.flatten(given)
    found = optimizer.match(sorted(mine.keys() | theirs.keys()), fresh, "train.reinit", "parameter")
    free = {path for paths in found.values() for path in paths}
    rest = lambda tree: optimizer.unflatten({k: v for k, v in tree.items() if k not in free})
    try:
        taken = merge_strictly(rest(mine), rest(theirs), source)
    except ConfigError as error:
        raise ConfigError(
            f"{error} Or let what differs start afresh, e.g. --config.train.reinit=\"('heads_*',)\""
        ) from None
    return Adapted(
        optimizer.flatten(taken), sorted(mine.keys() & free), sorted(theirs.keys() - mine.keys())
    )


def describe_adapted(adapted: Adapted) -> str:
    """Return the table of the model's parts: arrays taken over, fresh, and left behind."""
    rows: dict[str, list[int]] = {}
    for i, paths in enumerate(adapted):
        for path in paths:
            rows.setdefault(path.partition("/")[0], [0, 0, 0])[i] += 1
    shown = [(name, *(str(n) if n else "" for n in row)) for name, row in sorted(rows.items())]
    return table([("part", "taken over", "fresh", "left behind"), *shown])


def describe(params: Params, frozen: Iterable[str]) -> str:
    """Return the parameter table: path, shape, count, frozen or not. `params` may be abstract."""
    frozen = set(frozen)
    rows = [
        (k, "×".join(map(str, v.shape)), f"{v.size:,}", "frozen" if k in frozen else "")
        for k, v in sorted(optimizer.flatten(params).items())
    ]
    return table([("parameter", "shape", "count", ""), *rows])


def summarize(params: Params, frozen: Iterable[str]) -> str:
    """Return the table of the model's parts: arrays, parameters, trained ones; and the total."""
    frozen, parts = set(frozen), {}
    for path, x in sorted(optimizer.flatten(params).items()):
        for part in (path.partition("/")[0], "total"):
            n = parts.setdefault(part, [0, 0, 0])
            n[:] = n[0] + 1, n[1] + x.size, n[2] + (0 if path in frozen else x.size)
    parts["total"] = parts.pop("total")
    rows = [(name, *(f"{n:,}" for n in row)) for name, row in parts.items()]
    return table([("part", "arrays", "parameters", "trained"), *rows])


def table(rows: list[tuple[str, ...]]) -> str:
    """Return rows of text as a table: names to the left, numbers to the right."""
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(wide[0]), *(c.rjust(w) for c, w in zip(row[1:], wide[1:]))]
        ).rstrip()
        for row in rows
    )
