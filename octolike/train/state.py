"""TrainState, its creation, and the strict transfer of parameters from another run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from octolike import types
from octolike.config import ConfigError, unknown
from octolike.model.target import compile_for
from octolike.tables import text_table
from octolike.train import lora, optimizer

Params = dict[str, Any]


@struct.dataclass
class TrainState:
    """Everything that a step changes: one pytree, sharded, donated and saved as one.

    Attributes:
        step: int32 [], number of optimiser updates.
        params: trained parameters, nested by name.
        frozen: all other parameters.
        ema: running average of `params`; {} without one.
        opt_state: optax state of `params`.
        lora_scale: see octolike.train.lora.
    """

    step: jax.Array
    params: Params
    frozen: Params
    ema: Params
    opt_state: optax.OptState
    lora_scale: float = struct.field(pytree_node=False, default=1.0)

    def all_params(self) -> Params:
        """Return trained and frozen parameters as one tree, as checkpoints hold them."""
        return optimizer.merge(self.frozen, self.params)

    def model_params(self, trained: Params) -> Params:
        """Return the model's parameters for given values of the trained ones."""
        return lora.merge(optimizer.merge(self.frozen, trained), self.lora_scale)

    def policy_params(self) -> Params:
        """Return the parameters of the policy: the average, if there is one."""
        return self.model_params(optimizer.merge(self.params, self.ema))


def init_params(model: nn.Module, spec: types.BatchSpec, key: jax.Array) -> Params:
    """Return initial parameters; traceable, so `jax.eval_shape` gives their shapes alone."""
    params, noise, dropout = jax.random.split(key, 3)
    rngs = {"params": params, "noise": noise, "dropout": dropout}
    # The kernels of an accelerator compute nothing that the parameters depend on, and one example
    # cannot be partitioned over the devices.
    with compile_for("cpu"):
        return model.init(rngs, types.zeros(spec, 1), train=False)["params"]


def create(
    params: Params,
    tx: optax.GradientTransformation,
    frozen: Iterable[str],
    *,
    ema: bool,
    lora_scale: float = 1.0,
) -> TrainState:
    """Return the state before the first step. frozen: parameter paths."""
    trained, frozen_params = optimizer.split(params, frozen)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=trained,
        frozen=frozen_params,
        ema=jax.tree.map(jnp.copy, trained) if ema else {},
        opt_state=tx.init(trained),
        lora_scale=lora_scale,
    )


def merge_strictly(params: Params, loaded: Params, source: str) -> Params:
    """Return `loaded` if it has exactly the paths and shapes of `params` (may be abstract).

    Raises:
        ConfigError: names every path that is missing, extra, or of another shape.
    """
    expected, actual = optimizer.flatten(params), optimizer.flatten(loaded)
    faults = []
    for path in sorted(expected.keys() | actual.keys()):
        if path not in actual:
            faults.append(f"missing there: {path} {list(expected[path].shape)}")
        elif path not in expected:
            faults.append(f"only there: {unknown('parameter', path, expected).partition(' (')[0]}")
        elif expected[path].shape != actual[path].shape:
            shapes = f"{list(actual[path].shape)}, expected {list(expected[path].shape)}"
            faults.append(f"other shape: {path} {shapes}")
    if faults:
        raise ConfigError(
            f"the parameters of {source} do not fit this model ({len(faults)} differences):\n  "
            + "\n  ".join(faults)
            + "\nUse the model settings of that run (its config.json)."
        )
    return loaded


class ParameterTransfer(NamedTuple):
    """The transfer of parameters from one run to another, by path.

    Attributes:
        taken: {path: value} of the parameters that are taken over.
        reinitialized: paths of this model that keep their initial values.
        unused: paths of the other run that this model does not have.
    """

    taken: dict[str, Any]
    reinitialized: list[str]
    unused: list[str]


def transfer_params(
    params: Params, source_params: Params, reinit: Sequence[str], source: str
) -> ParameterTransfer:
    """Return the transfer from another run's parameters to a model with `params`.

    All parameters must fit exactly, except those that the patterns `reinit` match.

    Args:
        params: parameters of this model; may be abstract.
        source_params: parameters of the other run.
        reinit: patterns (train.reinit).
        source: name of the other run, for messages.

    Raises:
        ConfigError: a pattern that matches nothing; or every path that is missing, extra or of
            another shape and not matched by a pattern.
    """
    target, loaded = optimizer.flatten(params), optimizer.flatten(source_params)
    paths = sorted(target.keys() | loaded.keys())
    matches = optimizer.match_patterns(paths, reinit, "train.reinit", "parameter")
    matched = {path for paths in matches.values() for path in paths}

    def strict_part(flat: dict[str, Any]) -> Params:
        return optimizer.unflatten({k: v for k, v in flat.items() if k not in matched})

    try:
        taken = merge_strictly(strict_part(target), strict_part(loaded), source)
    except ConfigError as error:
        patterns = (*reinit, *_patterns_of_differences(target, loaded, matched))
        raise ConfigError(
            f"{error} Or reinitialise the parameters that differ:\n"
            f'  --config.train.reinit="{patterns!r}"'
        ) from None
    return ParameterTransfer(
        taken=optimizer.flatten(taken),
        reinitialized=sorted(target.keys() & matched),
        unused=sorted(loaded.keys() - target.keys()),
    )


def _patterns_of_differences(
    target: Mapping[str, Any], loaded: Mapping[str, Any], matched: Iterable[str]
) -> list[str]:
    """Return a pattern per part with parameters that differ; a head is one part with its input."""
    differing = [
        path
        for path in (target.keys() | loaded.keys()) - set(matched)
        if path not in target or path not in loaded or target[path].shape != loaded[path].shape
    ]
    return sorted({f"{path.partition('/')[0]}*" for path in differing})


def describe_transfer(transfer: ParameterTransfer) -> str:
    """Return a table of the model's parts: arrays taken over, reinitialised, and unused."""
    counts: dict[str, list[int]] = {}
    for i, paths in enumerate(transfer):
        for path in paths:
            counts.setdefault(path.partition("/")[0], [0, 0, 0])[i] += 1
    rows = [(name, *(n or "" for n in row)) for name, row in sorted(counts.items())]
    return text_table(rows, ("part", "taken over", "reinitialised", "unused"), align="lr")


def describe_params(params: Params, frozen: Iterable[str]) -> str:
    """Return the parameter table: path, shape, count, frozen or not. `params` may be abstract."""
    frozen = set(frozen)
    rows = [
        (k, "×".join(map(str, v.shape)), f"{v.size:,}", "frozen" if k in frozen else "")
        for k, v in sorted(optimizer.flatten(params).items())
    ]
    return text_table(rows, ("parameter", "shape", "count", ""), align="lr")


def summarize_params(params: Params, frozen: Iterable[str]) -> str:
    """Return the table of the model's parts: arrays, parameters, trained ones; and the total."""
    counts: dict[str, list[int]] = {}
    frozen = set(frozen)
    for path, x in sorted(optimizer.flatten(params).items()):
        for part in (path.partition("/")[0], "total"):
            n = counts.setdefault(part, [0, 0, 0])
            n[:] = n[0] + 1, n[1] + x.size, n[2] + (0 if path in frozen else x.size)
    counts["total"] = counts.pop("total")
    rows = [(name, *(f"{n:,}" for n in row)) for name, row in counts.items()]
    return text_table(rows, ("part", "arrays", "parameters", "trained"), align="lr")
