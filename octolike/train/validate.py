"""Held-out loss and the error of sampled actions, per dataset.

    loss              the training loss on held-out frames, without augmentation
    action_error      mean absolute difference between a sampled chunk and the demonstrated one, in
                      normalised units, over valid entries, for the newest frame of each window
    gripper_accuracy  share of gripper entries on the demonstrated side of the middle

The action error is also given per task, over all datasets. The noise is the same at every
validation, so that two of them differ by the parameters alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from octolike import types
from octolike.model.language import FrozenEncoder
from octolike.normalize import Embodiment
from octolike.train import sharding
from octolike.types import Batch

Loaders = Mapping[str, Callable[[], Iterator[Batch]]]


class Validated(NamedTuple):
    """datasets: {dataset: {name: number}}; tasks: {task: action error}, of those that were seen."""

    datasets: dict[str, dict[str, float]]
    tasks: dict[str, float]


class Validator:
    """Validates parameters; compiled at the first call, once."""

    def __init__(
        self,
        model: nn.Module,
        loaders: Loaders,
        embodiments: Sequence[Embodiment],
        spec: types.BatchSpec,
        tasks: Sequence[str] = (),
        *,
        batches: int,
        mesh: Mesh,
        key: jax.Array,
        encoder: FrozenEncoder | None = None,
    ) -> None:
        """Prepare; `batches` of each of the `loaders` ({dataset: make iterator}) are taken.

        tasks: the names that a batch's task ids count. encoder: the frozen text encoder, if any.
        """
        self._encoder = encoder
        self._tasks = tuple(tasks)
        self._model, self._loaders, self._batches = model, loaders, batches
        self._spec, self._mesh, self._key = spec, mesh, key
        width = spec["action"][0][-1]
        self._dims, self._gripper = action_dims(embodiments, width)
        self._measure = jax.jit(self._measure, out_shardings=sharding.replicated(mesh))

    def __call__(self, params: Any) -> Validated:
        """Return the results of parameters as the model takes them."""
        results, per_task = {}, np.zeros((len(self._tasks), 2))
        for dataset, loader in self._loaders.items():
            totals: dict[str, np.ndarray] = {}
            for i, batch in zip(range(self._batches), loader()):
                types.check_batch(batch, self._spec)
                sharding.check_batch_size(len(batch["action"]), self._mesh)
                batch = self._encoder(batch) if self._encoder else batch
                batch = sharding.put_batch(batch, self._mesh)
                sums = self._measure(params, batch, jax.random.fold_in(self._key, i))
                found = jax.device_get(sums)
                task, errors = found.pop("task"), found.pop("error_per_example")
                known = task < len(self._tasks)
                np.add.at(per_task, task[known], errors[known])
                for name, value in found.items():
                    totals[name] = totals.get(name, 0.0) + np.asarray(value, np.float64)
            if not totals:
                raise ValueError(
                    f"the validation split of {dataset!r} gave no batch; "
                    "name another one in data.validation_split, or '' for none"
                )
            results[dataset] = {k: float(a / b) for k, (a, b) in totals.items() if b}
        seen = [(name, e, n) for name, (e, n) in zip(self._tasks, per_task) if n]
        return Validated(results, {name: float(e / n) for name, e, n in seen})

    def _measure(self, params: Any, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """Return {name: [sum, count]} of a batch, task [B], and error_per_example [B, 2]."""
        variables, (key_loss, key_sample) = {"params": params}, jax.random.split(key)
        loss, _ = self._model.apply(variables, batch, train=False, rngs={"noise": key_loss})
        trained = batch["action_mask"] & batch["observation"]["timestep_mask"][..., None, None]
        sampled = self._model.apply(
            variables,
            batch["observation"],
            batch["task"],
            dims=jnp.asarray(self._dims)[batch["embodiment"]],
            embodiment=batch["embodiment"],
            method="sample_actions",
            rngs={"noise": key_sample},
        )
        true, valid = batch["action"][:, -1], batch["action_mask"][:, -1]
        gripper = valid & jnp.asarray(self._gripper)[batch["embodiment"]][:, None]
        right = (sampled > 0.5) == (true > 0.5)
        return {
            "loss": jnp.stack([loss * trained.sum(), trained.sum()]),
            "action_error": _masked_sum(jnp.abs(sampled - true), valid),
            "gripper_accuracy": _masked_sum(right, gripper),
            "task": batch["task"]["task_id"],
            "error_per_example": jax.vmap(_masked_sum)(jnp.abs(sampled - true), valid),
        }


def action_dims(embodiments: Sequence[Embodiment], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return bool [E, A] twice: the action dimensions each robot has, and which are grippers."""
    dims = np.zeros((2, len(embodiments), width), bool)
    for i, embodiment in enumerate(embodiments):
        for j, normalized in enumerate(embodiment.action.normalized):
            dims[:, i, j] = True, not normalized
    return dims[0], dims[1]


def _masked_sum(x: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.stack([jnp.where(mask, x, 0).sum(dtype=jnp.float32), mask.sum(dtype=jnp.float32)])
