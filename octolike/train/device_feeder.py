"""Transfers batches to the devices, each with the position in the data that follows it."""

from __future__ import annotations

import json
import time
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from octolike import files, types
from octolike.model import language
from octolike.train import sharding
from octolike.train.validation import ValidationResult

POSITION = "position"  # key of the position (JSON text) among the arrays of a saved batch


class DeviceBatch(NamedTuple):
    """A batch on the devices.

    Attributes:
        arrays: on the devices.
        position: the position in the data after this batch.
        ready: time when the batch was ready on the host.
        host_batch: this process's share, as numpy arrays; held until the metrics of its step are
            known to be finite, since on the host that costs no device memory.
    """

    arrays: types.Batch
    position: dict[str, Any]
    ready: float
    host_batch: types.Batch


class DeviceFeeder:
    """Checks the batches of a stream and transfers them to the devices."""

    def __init__(
        self,
        batches: types.BatchStream,
        spec: types.BatchSpec,
        mesh: Mesh,
        encoder: language.FrozenEncoder | None = None,
    ) -> None:
        """spec: of the batches; encoder: adds the states of a frozen text encoder to them."""
        self._batches, self._spec, self._mesh, self._encoder = batches, spec, mesh, encoder

    def next(self, signum: int | None = None) -> DeviceBatch:
        """Return the next batch; its transfer may still be under way.

        signum: the signal that this process has received.
        """
        host_batch = next(self._batches)
        types.check_batch(host_batch, self._spec)
        position, ready = self._batches.state(), time.perf_counter()
        batch = self._encoder(host_batch) if self._encoder else host_batch
        arrays = sharding.put_batch(sharding.with_signal(batch, signum), self._mesh)
        return DeviceBatch(arrays, position, ready, host_batch)

    def memory(self) -> int:
        """Return the bytes that the data hold."""
        return self._batches.memory()

    def feedback(self, result: ValidationResult, position: dict[str, Any]) -> dict[str, Any]:
        """Give a validation result to the data; return `position` with that feedback included."""
        errors = {name: row["action_error"] for name, row in result.datasets.items()}
        if result.success:
            self._batches.feedback({}, result.success)
        else:
            self._batches.feedback(errors, result.tasks)
        return self._batches.state_at(position)

    def close(self) -> None:
        """Stop the stream."""
        self._batches.close()


def save_batch(batch: DeviceBatch, workdir: files.PathLike, step: int) -> files.Path:
    """Write the batch of a step to workdir/bad_batch_<step>.npz and return the path.

    Arrays are stored under their dotted paths, and under "position" the position in the data after
    the batch, as JSON text. With several processes each writes its share, with its index in the
    file name.
    """
    index, count = sharding.process()
    share = f".{index}" if count > 1 else ""
    path = files.as_path(workdir) / f"bad_batch_{step}{share}.npz"
    arrays = dict(types.flatten(batch.host_batch))
    files.write_npz(path, {**arrays, POSITION: json.dumps(batch.position)})
    return path


def save_bad_batch(batch: DeviceBatch, workdir: files.PathLike, step: int) -> str:
    """Save the batch of a failed step; return a sentence on its values and its path.

    Does not raise, so that the original failure stays the error that is reported.
    """
    arrays = dict(types.flatten(batch.host_batch))
    floats = {k: x for k, x in arrays.items() if np.issubdtype(x.dtype, np.floating)}
    bad = [k for k, x in floats.items() if not np.isfinite(x).all()]
    values = f"not finite in {', '.join(bad)}" if bad else "finite everywhere"
    try:
        path = save_batch(batch, workdir, step)
    except OSError as error:
        return f"The batch of that step is {values}; it could not be saved: {error}."
    return (
        f"The batch of that step is {values}; it is in {path} "
        "(octolike.train.device_feeder.load_batch)."
    )


def load_batch(path: files.PathLike) -> tuple[types.Batch, dict[str, Any]]:
    """Return (batch, position in the data after it) from a file of `save_batch`."""
    arrays = files.read_npz(path)
    position = json.loads(str(arrays.pop(POSITION)))
    return types.unflatten(arrays), position
