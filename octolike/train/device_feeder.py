"""From the batches of the data to the devices, each with the position that comes after it."""

from __future__ import annotations

import json
import time
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from octolike import files, types
from octolike.model import language
from octolike.train import sharding
from octolike.train.validation import Validated

POSITION = "position"  # beside a saved batch's arrays: JSON text


class DeviceBatch(NamedTuple):
    """A batch on the devices; position: in the data, after it; ready: when it was there.

    given: this process's share as it came, on the host, where it costs no device memory to keep
    until the step's metrics are known to be finite.
    """

    arrays: types.Batch
    position: dict[str, Any]
    ready: float
    given: types.Batch


class DeviceFeeder:
    """Takes numpy batches to the devices, with the position in the data that comes after each.

    spec: of the batches; encoder: adds a frozen text encoder's states to them, if there is one.
    """

    def __init__(
        self,
        batches: types.BatchStream,
        spec: types.BatchSpec,
        mesh: Mesh,
        encoder: language.FrozenEncoder | None = None,
    ) -> None:
        self._batches, self._spec, self._mesh, self._encoder = batches, spec, mesh, encoder

    def next(self) -> DeviceBatch:
        """Return the next batch; the transfer may still be under way."""
        given = next(self._batches)
        types.check_batch(given, self._spec)
        position, ready = self._batches.state(), time.perf_counter()
        batch = self._encoder(given) if self._encoder else given
        return DeviceBatch(sharding.put_batch(batch, self._mesh), position, ready, given)

    def memory(self) -> int:
        """Return the bytes that the data hold."""
        return self._batches.memory()

    def feedback(self, found: Validated, position: dict[str, Any]) -> dict[str, Any]:
        """Tell the data how well things go, and return a position with what that changes."""
        errors = {name: row["action_error"] for name, row in found.datasets.items()}
        if found.success:
            self._batches.feedback({}, found.success)
        else:
            self._batches.feedback(errors, found.tasks)
        return self._batches.state_at(position)

    def close(self) -> None:
        """Stop making batches."""
        self._batches.close()


def save_batch(fed: DeviceBatch, workdir: files.PathLike, step: int) -> files.Path:
    """Write the batch of a step to workdir/bad_batch_<step>.npz and return the path.

    Arrays under their dotted paths, and "position": the JSON text of the position in the data after
    the batch. Each of several processes writes its share, to a name with its number.
    """
    index, count = sharding.process()
    share = f".{index}" if count > 1 else ""
    path = files.as_path(workdir) / f"bad_batch_{step}{share}.npz"
    files.write_npz(path, {**dict(types.flatten(fed.given)), POSITION: json.dumps(fed.position)})
    return path


def save_bad_batch(fed: DeviceBatch, workdir: files.PathLike, step: int) -> str:
    """Save the batch of a step that went wrong; return a sentence on where, and on its values.

    Does not fail: what went wrong first is the news.
    """
    floats = {k: x for k, x in types.flatten(fed.given) if np.issubdtype(x.dtype, np.floating)}
    wrong = [k for k, x in floats.items() if not np.isfinite(x).all()]
    values = f"not finite in {', '.join(wrong)}" if wrong else "finite everywhere"
    try:
        path = save_batch(fed, workdir, step)
    except OSError as error:
        return f"The batch of that step is {values}; it could not be saved: {error}."
    return (
        f"The batch of that step is {values}; it is in {path} "
        "(octolike.train.device_feeder.load_batch)."
    )


def load_batch(path: files.PathLike) -> tuple[types.Batch, dict[str, Any]]:
    """Return the batch that `save_batch` wrote, and the position in the data after it."""
    arrays = files.read_npz(path)
    position = json.loads(str(arrays.pop(POSITION)))
    return types.unflatten(arrays), position
