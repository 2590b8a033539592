"""Validation: the loss on held-out data and the error of sampled actions, per dataset.

    loss              the training loss on held-out frames, without augmentation
    action_error      mean absolute difference between sampled and demonstrated chunk, in normalised
                      units, over valid entries, for the newest frame of each window
    gripper_accuracy  share of gripper entries (`ranges.sided`) on the demonstrated side of the
                      middle of the dimension's own range
    gripper_majority  the same of a policy that always takes the more frequent side: the accuracy to
                      compare with

    action_error_<conditioning>  action_error of a policy with several conditionings, conditioned on
                      one of them alone (language, goal or task_id), over the examples that have it

    <name>/<measure>  of an auxiliary head, over the steps with a label: its loss, and others such
                      as metres; <name>/labelled: the share of the steps with a label

The action error is also computed per task, over all datasets. The noise is the same at every
validation, so two results differ by the parameters only. Some chunks are returned for a figure.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from octolike import ranges, types
from octolike.config import ConfigError
from octolike.embodiment import Embodiment
from octolike.model import language
from octolike.model.language import FrozenEncoder
from octolike.model.network import build_network
from octolike.model.target import fast_key
from octolike.train import sharding
from octolike.train.checkpoint import Run
from octolike.train.chunk_figures import ActionChunk
from octolike.types import Batch

# {dataset: function that iterates over its held-out batches}
ValidationLoaders = Mapping[str, Callable[[], Iterator[Batch]]]

CHUNKS = 6  # in the figure, of all datasets together
PRESENT = "task.present."
GRIPPER_SUMS = ("right", "upper", "count")


@dataclasses.dataclass(frozen=True)
class ValidationResult:
    """The result of a validation.

    Attributes:
        datasets: {dataset: {name: number}}.
        tasks: {task: action error}, for the tasks in the data.
        chunks: a few examples with their predictions, from several datasets.
        success: {task: success rate}, if it was measured.
    """

    datasets: dict[str, dict[str, float]]
    tasks: dict[str, float]
    chunks: tuple[ActionChunk, ...] = dataclasses.field(default=(), compare=False, repr=False)
    success: dict[str, float] = dataclasses.field(default_factory=dict)


class Validator:
    """Validates parameters; compiled once, at the first call."""

    def __init__(
        self,
        model: nn.Module,
        loaders: ValidationLoaders,
        embodiments: Sequence[Embodiment],
        spec: types.BatchSpec,
        tasks: Sequence[str] = (),
        *,
        batches: int,
        mesh: Mesh,
        key: jax.Array,
        encoder: FrozenEncoder | None = None,
    ) -> None:
        """Prepare.

        Args:
            model: the network.
            loaders: iterators of this process's shares of the held-out batches (types.batch_share).
            embodiments: records in the order of a batch's `embodiment`.
            spec: the batch spec.
            tasks: names in the order of a batch's task ids.
            batches: number of batches to take of each loader.
            mesh: the devices.
            key: random key of the noise.
            encoder: the frozen text encoder, if there is one.
        """
        self._encoder = encoder
        self._tasks, self._embodiments = tuple(tasks), embodiments
        self._conditionings = conditionings(model, spec)
        self._model, self._loaders, self._batches = model, loaders, batches
        self._spec, self._mesh, self._key = spec, mesh, key
        width = spec["action"][0][-1]
        self._dims, self._gripper, self._middle = action_dims(embodiments, width)
        replicated = sharding.replicated(mesh)
        self._measure_jit = jax.jit(self._measure, out_shardings=replicated)
        self._error_jit = jax.jit(self._error, out_shardings=replicated)

    def __call__(self, params: Any) -> ValidationResult:
        """Return the result for the model's parameters."""
        results, per_task, chunks = {}, np.zeros((len(self._tasks), 2)), []
        for dataset, loader in self._loaders.items():
            totals: dict[str, np.ndarray] = {}
            for i, batch in zip(range(self._batches), loader()):
                types.check_batch(batch, self._spec)
                sums = jax.device_get(self._sums(params, batch, i))
                rows = sums.pop("rows")
                has_task = rows["task"] < len(self._tasks)
                np.add.at(per_task, rows["task"][has_task], rows["error"][has_task])
                if not i:
                    chunks += self._chunks(dataset, rows)
                for name, value in sums.items():
                    totals[name] = totals.get(name, 0.0) + np.asarray(value, np.float64)
            if not totals:
                raise ConfigError(
                    f"the validation split of {dataset!r} has no batch; "
                    "name another split in data.validation_split, or '' for no validation"
                )
            totals |= _gripper_sums(*(totals.pop(f"gripper_{k}") for k in GRIPPER_SUMS))
            results[dataset] = {k: float(a / b) for k, (a, b) in totals.items() if b}
        tasks = {name: float(e / n) for name, (e, n) in zip(self._tasks, per_task) if n}
        return ValidationResult(results, tasks, tuple(chunks[:CHUNKS]))

    def _sums(self, params: Any, batch: Batch, index: int) -> dict[str, Any]:
        """Return `_measure` of a numpy batch, and action_error_<conditioning> [sum, count]."""
        encoded = self._encoder(batch) if self._encoder else batch
        placed = sharding.put_padded_batch(encoded, self._mesh)
        key = jax.random.fold_in(self._key, index)
        with jax.set_mesh(self._mesh):
            return self._measured(params, placed, key)

    def _measured(self, params: Any, placed: Batch, key: jax.Array) -> dict[str, Any]:
        sums = self._measure_jit(params, placed, key)
        present = placed["task"].get("present", {})
        for conditioning, keys in self._conditionings.items():
            only = {k: x if k in keys else jnp.zeros_like(x) for k, x in present.items()}
            conditioned = placed | {"task": placed["task"] | {"present": only}}
            available = functools.reduce(jnp.logical_or, [present[k] for k in keys])
            error = self._error_jit(params, conditioned, available, key)
            sums[f"action_error_{conditioning}"] = error
        return sums

    def _chunks(self, dataset: str, rows: Mapping[str, np.ndarray]) -> list[ActionChunk]:
        """Return some examples of `_measure`'s rows, evenly spread, with their sampled chunks."""
        usable = np.flatnonzero(rows["valid"].any(axis=1))
        count = min(max(CHUNKS // len(self._loaders), 1), len(usable))
        spread = np.linspace(0, len(usable) - 1, count).round().astype(int)
        chunks = []
        for i in dict.fromkeys(usable[spread].tolist()):
            robot, task = self._embodiments[rows["embodiment"][i]], rows["task"][i]
            name = self._tasks[task] if task < len(self._tasks) else ""
            demonstrated, sampled, valid = (
                rows[k][i] for k in ("demonstrated", "sampled", "valid")
            )
            chunks.append(
                ActionChunk.from_normalized(robot, demonstrated, sampled, valid, (dataset, name))
            )
        return chunks

    def _measure(self, params: Any, batch: Batch, key: jax.Array) -> dict[str, Any]:
        """Return {name: [sum, count]} of a batch, and "rows": its examples, of all processes.

        And gripper_<sum>, int [A] each: entries on the right side, on the upper side, and all.
        """
        variables, (key_loss, key_sample) = {"params": params}, jax.random.split(fast_key(key))
        rngs = {"noise": key_loss}
        output: Any = self._model.apply(variables, batch, train=False, rngs=rngs)
        loss, metrics = output
        trained = batch["action_mask"] & batch["observation"]["timestep_mask"][..., None, None]
        sampled = self._sample(variables, batch, key_sample)
        true, valid = batch["action"][:, -1], batch["action_mask"][:, -1]
        gripper = valid & jnp.asarray(self._gripper)[batch["embodiment"]][:, None]
        middle = jnp.asarray(self._middle)[batch["embodiment"]][:, None]
        right = (sampled > middle) == (true > middle)
        per_dimension = (
            x.sum(axis=(0, 1)) for x in (gripper & right, gripper & (true > middle), gripper)
        )
        return {
            "loss": jnp.stack([loss * trained.sum(), trained.sum()]),
            **self._auxiliary_sums(metrics, trained.any(axis=(2, 3)).sum()),
            "action_error": _masked_sum(jnp.abs(sampled - true), valid),
            **{f"gripper_{k}": x for k, x in zip(GRIPPER_SUMS, per_dimension, strict=True)},
            "rows": {
                "sampled": sampled,
                "demonstrated": true,
                "valid": valid.any(axis=-1),
                "embodiment": batch["embodiment"],
                "task": batch["task"]["task_id"],
                "error": jax.vmap(_masked_sum)(jnp.abs(sampled - true), valid),
            },
        }

    def _auxiliary_sums(
        self, metrics: Mapping[str, jax.Array], steps: jax.Array
    ) -> dict[str, jax.Array]:
        """Return {metric of an auxiliary head: [sum, count]}; steps: int [], those of the batch."""
        sums = {}
        for name in getattr(self._model, "auxiliary", {}):
            labelled = metrics[f"{name}/labelled"] * steps
            for metric in (k for k in metrics if k.startswith(f"{name}/")):
                count = steps if metric == f"{name}/labelled" else labelled
                sums[metric] = jnp.stack([metrics[metric] * count, count.astype(jnp.float32)])
        return sums

    def _error(self, params: Any, batch: Batch, include: jax.Array, key: jax.Array) -> jax.Array:
        """Return the action error [sum, count] over the included examples; include: bool [B]."""
        sampled = self._sample({"params": params}, batch, jax.random.split(fast_key(key))[1])
        valid = batch["action_mask"][:, -1] & include[:, None, None]
        return _masked_sum(jnp.abs(sampled - batch["action"][:, -1]), valid)

    def _sample(self, variables: Any, batch: Batch, key: jax.Array) -> jax.Array:
        """Return sampled chunks, [B, H, A]."""
        chunks = self._model.apply(
            variables,
            batch["observation"],
            batch["task"],
            dims=jnp.asarray(self._dims)[batch["embodiment"]],
            embodiment=batch["embodiment"],
            method="sample_actions",
            rngs={"noise": key},
        )
        return cast(jax.Array, chunks)


def conditionings(model: nn.Module, spec: types.BatchSpec) -> dict[str, list[str]]:
    """Return {conditioning: its keys under task.present}; {} for fewer than two.

    The conditionings are those of 'language', 'goal' and 'task_id' that batches have and the
    model's tokenizers read.
    """
    present = [k for k in spec if k.startswith(PRESENT)]
    if hasattr(model, "tokenizers"):
        inputs = {k for tokenizer in model.tokenizers.values() for k in tokenizer.reads()}
        present = [k for k in present if k in inputs]
    keys: dict[str, list[str]] = {}
    for key in (k.removeprefix(PRESENT) for k in present):
        keys.setdefault("goal" if key.startswith("image_") else key, []).append(key)
    return keys if len(keys) > 1 else {}


def validate_run(run: Run, batches: Mapping[str, Sequence[Batch]]) -> ValidationResult:
    """Return the validation result of a loaded run on {dataset: batches}."""
    settings = dataclasses.asdict(run.config.model)
    loaders = {name: functools.partial(iter, held_out) for name, held_out in batches.items()}
    validator = Validator(
        build_network(settings, language.extend_spec(settings, run.spec), run.names),
        loaders,
        run.embodiments,
        run.spec,
        run.names.tasks,
        batches=max(map(len, batches.values())),
        mesh=sharding.make_mesh(),
        key=jax.random.key(run.config.seed),
        encoder=language.frozen_encoder(settings),
    )
    return validator(run.params)


def action_dims(
    embodiments: Sequence[Embodiment], width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return [E, A] each: bool, a robot's dimensions, and those with sides; their middles."""
    dims, gripper = np.zeros((2, len(embodiments), width), bool)
    middle = np.zeros((len(embodiments), width), np.float32)
    for i, embodiment in enumerate(embodiments):
        count = len(embodiment.learned)
        dims[i, :count] = True
        gripper[i, :count] = ranges.sided(embodiment)
        middle[i, :count] = ranges.middles(embodiment)
    return dims, gripper, middle


def _gripper_sums(right: np.ndarray, upper: np.ndarray, count: np.ndarray) -> dict[str, np.ndarray]:
    """Return [sum, count] of gripper_accuracy and gripper_majority, from sums per dimension."""
    majority = np.maximum(upper, count - upper)
    sums = {"gripper_accuracy": right, "gripper_majority": majority}
    return {name: np.array([x.sum(), count.sum()]) for name, x in sums.items()}


def _masked_sum(x: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.stack([jnp.where(mask, x, 0).sum(dtype=jnp.float32), mask.sum(dtype=jnp.float32)])
