"""TrainState and its creation, and tables of its parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from octolike import types
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
