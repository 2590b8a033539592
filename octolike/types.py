"""Shared types: axis letters, the batch contract, TokenGroup, DataSource. Imports only numpy.

Axis letters (suffixes and einsum letters everywhere):

    B batch · W window (history) · H horizon (action chunk) · A action dims · P proprio dims
    L language tokens · N tokens of a group · D token width · T steps of an episode · K samples

The batch contract. A batch is a nested dict of numpy arrays:

    observation.image_<camera>  uint8   [B, W, h, w, 3]
    observation.proprio         float32 [B, W, P]        normalised; padded with 0 to the widest
    observation.timestep_mask   bool    [B, W]           False: before the episode's first step
    observation.present.<key>   bool    [B, W]           False: the dataset lacks this sensor
    observation.depth_<camera>  float32 [B, W, h, w, 1]  metres; 0 for missing measurements
    task.language.ids           int32   [B, L]
    task.language.mask          bool    [B, L]           False: padding
    task.subtask.ids            int32   [B, W, L]        labels for training (data.subtasks)
    task.subtask.mask           bool    [B, W, L]        False: padding, and steps without a label
    task.image_<camera>         uint8   [B, h, w, 3]     the goal image
    task.task_id                int32   [B]              index into the run's tasks
    task.present.<key>          bool    [B]              keys: language, image_<camera>, task_id
    action                      float32 [B, W, H, A]     normalised; padded with 0 to the widest
    action_mask                 bool    [B, W, H, A]     False: padded, or past the end or goal
    closing.position            float32 [B, W, 3]        a label (data.closings): metres from the
                                                         gripper to its place at its next closing
    closing.mask                bool    [B, W]           False: no such label; the position is 0
    dataset                     int32   [B]              index into the run's datasets
    embodiment                  int32   [B]              index into the run's embodiment records

If a frozen text encoder runs outside the step (octolike.model.language), the trainer and the policy
add its states to the batch just before the model:

    task.language.states        float   [B, L, E]

All examples of a run have the same keys: an input that a dataset lacks is filled with zeros and
marked False under `present`, and the model masks it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

Batch = dict[str, Any]
BatchSpec = dict[str, tuple[tuple[int, ...], str]]
DTYPES = ("uint8", "bool", "int32", "int64", "float16", "float32", "float64")
MOST_ELEMENTS = 2**31  # of one example of an array: more is a corrupted or hostile batch spec


class TokenGroup(NamedTuple):
    """Tokens that enter the transformer together.

    tokens: float [..., N, D]; mask: bool [..., N], False for tokens that must not be attended to.
    Task groups have leading axes [B]; observation and readout groups [B, W].
    """

    tokens: Any
    mask: Any


class Names(NamedTuple):
    """The names behind the integers of a batch, in the order of their index; saved with the run."""

    datasets: tuple[str, ...]
    embodiments: tuple[str, ...]
    tasks: tuple[str, ...] = ()


class BatchStream(Protocol):
    """Endless training batches with a position that can be saved."""

    def __next__(self) -> Batch:
        """Return the next batch."""

    def state(self) -> dict[str, Any]:
        """Return the position after the last batch, as JSON data; `DataSource.train` takes it."""

    def state_at(self, position: dict[str, Any]) -> dict[str, Any]:
        """Return an earlier `state()`, updated by the feedback since then."""

    def feedback(self, datasets: Mapping[str, float], tasks: Mapping[str, float]) -> None:
        """Pass validation errors by name, which adaptive sampling weights follow."""

    def memory(self) -> int:
        """Return the memory in use, in bytes."""

    def close(self) -> None:
        """Stop the background work."""


class DataSource(Protocol):
    """The data of a run, as training needs them.

    spec: the batch spec; embodiments: the records (octolike.embodiment) that `embodiment` in a
    batch indexes.
    """

    spec: BatchSpec
    embodiments: Sequence[Any]

    @property
    def names(self) -> Names:
        """Return the names behind the integers of a batch."""

    def train(
        self, start: Mapping[str, Any] | None = None, process: tuple[int, int] = (0, 1)
    ) -> BatchStream:
        """Return the training batches from a saved position, or from the beginning.

        process: (index, count) of this host, which gets its share of each batch.
        """

    def validation(
        self, process: tuple[int, int] = (0, 1)
    ) -> dict[str, Callable[[], Iterator[Batch]]]:
        """Return {dataset: function that iterates over its held-out batches}; {} for none.

        process: (index, count) of this host, which gets its share of each batch (`batch_share`).
        """

    def describe(self) -> str:
        """Return a table that describes the data."""


class Prefix(NamedTuple):
    """The actions that a robot plans for the first steps of a chunk, for real-time chunking.

    action: float32 [B, H, A], normalised. known: bool [B, H], True for actions that the robot will
    certainly have executed when the chunk arrives; only heads trained with a prefix read it.
    weight: float32 [B, H] in [0, 1], how closely guidance makes the chunk follow an action; None
    for no guidance.
    """

    action: Any
    known: Any
    weight: Any


class Context(NamedTuple):
    """The task and robot that a head predicts a chunk for.

    task: float [B, E], the pooled task tokens, or None; embodiment, task_id: int32 [B].
    """

    task: Any
    embodiment: Any
    task_id: Any


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, leaf) of a nested dict, sorted by key at each level."""
    for key in sorted(tree):
        path = f"{prefix}.{key}" if prefix else key
        if isinstance(tree[key], Mapping):
            yield from flatten(tree[key], path)
        else:
            yield path, tree[key]


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested dict of {dotted path: leaf}: the inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, key = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[key] = leaf
    return tree


def batch_spec(batch: Mapping[str, Any]) -> BatchSpec:
    """Return {dotted path: (shape without the batch axis, dtype name)} of a batch."""
    return {path: (tuple(x.shape[1:]), np.dtype(x.dtype).name) for path, x in flatten(batch)}


def zeros(spec: BatchSpec, batch_size: int) -> Batch:
    """Return an all-zero batch of `batch_size` examples, e.g. to initialise a model."""
    return unflatten({k: np.zeros((batch_size, *s), d) for k, (s, d) in spec.items()})


def batch_share(batch: Batch, process: tuple[int, int]) -> Batch:
    """Return the rows of one host, process = (index, count), of a numpy batch of any size.

    All hosts get the same number of rows; those that fill up are copies without a valid action.
    """
    index, count = process
    if count == 1:
        return batch
    size = len(batch["action"])
    rows = index * -(-size // count) + np.arange(-(-size // count))
    leaves = {k: x[np.minimum(rows, size - 1)] for k, x in flatten(batch)}
    leaves["action_mask"][rows >= size] = False
    return unflatten(leaves)


def check_batch(batch: Mapping[str, Any], spec: BatchSpec) -> None:
    """Raise ValueError for keys that are missing, unknown, or of another shape or dtype."""
    actual, faults = batch_spec(batch), []
    for path in sorted(spec.keys() | actual.keys()):
        if path not in actual:
            faults.append(f"{path}: missing, expected {_show(spec[path])}")
        elif path not in spec:
            faults.append(
                f"{path}: found {_show(actual[path])}, but the batch spec has no such key"
            )
        elif actual[path] != (tuple(spec[path][0]), spec[path][1]):
            faults.append(f"{path}: found {_show(actual[path])}, expected {_show(spec[path])}")
    if faults:
        raise ValueError("the batch does not match the batch spec:\n  " + "\n  ".join(faults))


def spec_to_json(spec: BatchSpec) -> dict[str, Any]:
    """Return the spec as plain JSON data."""
    return {k: {"shape": list(s), "dtype": d} for k, (s, d) in spec.items()}


def spec_from_json(data: Any) -> BatchSpec:
    """Return the spec that `spec_to_json` wrote; ValueError, in one line, for any other data."""
    if not isinstance(data, Mapping) or not data:
        raise ValueError(f"a batch spec is {_short(data)}; expected {{path: shape and dtype}}")
    spec: BatchSpec = {}
    for path, entry in data.items():
        if not isinstance(entry, Mapping) or entry.keys() != {"shape", "dtype"}:
            raise ValueError(f"batch spec {path!r:.80} is {_short(entry)}; expected shape, dtype")
        shape, dtype = entry["shape"], entry["dtype"]
        if dtype not in DTYPES:
            raise ValueError(f"batch spec {path!r:.80}: unknown dtype {_short(dtype)}")
        is_shape = isinstance(shape, (list, tuple)) and all(type(n) is int and n > 0 for n in shape)
        if not is_shape or math.prod(shape) > MOST_ELEMENTS:
            raise ValueError(f"batch spec {path!r:.80}: impossible shape {_short(shape)}")
        spec[path] = tuple(shape), dtype
    try:
        unflatten(spec)
    except (AttributeError, TypeError):
        raise ValueError("a batch spec has an array at the path of a group") from None
    if len(spec.get("action", ((),))[0]) != 3:
        raise ValueError("a batch spec lacks 'action' [W, H, A]")
    return spec


def names_from_json(data: Any) -> Names:
    """Return the names of names.json; ValueError, in one line, for any other data."""
    if not isinstance(data, Mapping) or not {"datasets", "embodiments"} <= data.keys():
        raise ValueError(f"the names are {_short(data)}; expected datasets, embodiments, tasks")
    if unknown := data.keys() - set(Names._fields):
        raise ValueError(f"unknown kinds of names: {_short(sorted(unknown))}")
    for kind, names in data.items():
        if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
            raise ValueError(f"the names of {kind} are {_short(names)}; expected a list of texts")
        if len(set(names)) < len(names):
            raise ValueError(f"the names of {kind} are not distinct: {_short(names)}")
    return Names(**{kind: tuple(names) for kind, names in data.items()})


def _short(value: Any) -> str:
    """Return a value as text of at most 80 characters, for errors."""
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


def _show(leaf: tuple[tuple[int, ...], str]) -> str:
    return f"{leaf[1]} [batch{''.join(f', {n}' for n in leaf[0])}]"
