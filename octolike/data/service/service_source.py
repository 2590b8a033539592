"""Batches from workers on other machines, listed in data.service.

    data = ServiceSource(config)        octolike.data.open_data returns it if data.service is set
    for batch in data.train(): ...      the same batches as from local data, bit for bit

Each of W workers builds a contiguous W-th of this process's part of every batch (see worker.py);
the parts are received directly into the arrays of the batch. The training machine does not need
tensorflow.

The connection is neither encrypted nor authenticated: use it in trusted networks only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from octolike.config import Config, ConfigError
from octolike.data.service.worker_pool import CancellableCall, WorkerPool, unique_name
from octolike.embodiment import Embodiment, embodiments_from_json
from octolike.types import Batch, Names, spec_from_json, unflatten


class ServiceSource:
    """A DataSource with batches from the workers of data.service."""

    def __init__(self, config: Config, processes: int = 1) -> None:
        """Connect to every worker of data.service.

        processes: the number of training processes, which share every batch. Raises ConfigError
        for a batch that cannot be divided among them and for a worker with other settings,
        DataError for workers with different data, ServiceError if an address does not answer.
        """
        self._size, self._prefetch = config.data.batch_size, config.data.prefetch
        _check_parts(self._size, processes, len(config.data.service))
        self._workers = WorkerPool(config)
        about = self._workers.about
        self.spec = spec_from_json(about["spec"])
        self.embodiments: Sequence[Embodiment] = embodiments_from_json(about["embodiments"])
        self.names = Names(**{k: tuple(v) for k, v in about["names"].items()})
        self.datasets, self.tasks = list(self.names.datasets), self.names.tasks
        self.shares = np.array(about["shares"])

    def train(
        self, start: Mapping[str, Any] | None = None, process: tuple[int, int] = (0, 1)
    ) -> ServiceStream:
        """Return the endless training batches, from the beginning or from a `state()`.

        process: (index, count) of this host, which gets a contiguous part of each batch.
        """
        index, count = process
        workers = len(self._workers)
        _check_parts(self._size, count, workers)
        parts = [(index * workers + w, count * workers) for w in range(workers)]
        header = {"state": start, "part": parts[0]}
        state = self._workers.call(0, "open", header)["state"]
        rows = self._size // count

        def allocate() -> dict[str, np.ndarray]:
            return {k: np.empty((rows, *shape), dtype) for k, (shape, dtype) in self.spec.items()}

        return ServiceStream(self._workers, parts, allocate, state, self._prefetch)

    def validation(self) -> dict[str, Callable[[], Iterator[Batch]]]:
        """Return {dataset: function that iterates over its validation batches}."""
        names = self._workers.about["validation"]
        return {name: partial(self._held_out, name, i) for i, name in enumerate(names)}

    def describe(self) -> str:
        """Return the workers' table of the datasets, and their addresses."""
        table = self._workers.about["description"]
        return f"{table}\nbatches come from {', '.join(self._workers.addresses)}"

    def close(self) -> None:
        """Close the connections."""
        self._workers.close()

    def _held_out(self, dataset: str, number: int) -> Iterator[Batch]:
        """Yield the validation batches of a dataset, all from one worker; datasets rotate."""
        stream, home = unique_name(), number % len(self._workers)
        try:
            for i in range(self._workers.about["settings"]["train.validation_batches"]):
                leaves: dict[str, np.ndarray] = {}
                header = {"stream": stream, "dataset": dataset, "number": i}
                allocate = partial(_allocate, leaves)
                if self._workers.call(home, "validation", header, allocate)["end"]:
                    return
                yield unflatten(leaves)
        finally:
            self._workers.close_stream(stream)


class _RequestedBatch(NamedTuple):
    """A batch in transfer: its leaves, and the call and the future of each part."""

    leaves: dict[str, np.ndarray]
    calls: list[CancellableCall]
    parts: list[Future]


class ServiceStream(Iterator[Batch]):
    """Batches requested ahead, one thread per part; `state()` follows the last one returned."""

    def __init__(
        self,
        workers: WorkerPool,
        parts: Sequence[tuple[int, int]],
        allocate: Callable[[], dict[str, np.ndarray]],
        state: Mapping[str, Any],
        prefetch: int,
    ) -> None:
        """parts: (index, count) per worker; allocate: return the empty leaves of a batch."""
        self._workers, self._parts, self._allocate = workers, parts, allocate
        self._state, self._prefetch, self._stream = dict(state), prefetch, unique_name()
        # One thread per worker, so that it gets one request after the other.
        self._threads = [ThreadPoolExecutor(1) for _ in parts]
        self._ahead: deque[_RequestedBatch] = deque()
        self._fault: Exception | None = None

    def __next__(self) -> Batch:
        if self._fault is not None:
            raise self._fault
        self._fill(1)
        ahead = self._ahead[0]
        try:
            for part in ahead.parts:
                part.result()
        except Exception as error:
            self.close()
            self._fault = error
            raise
        self._ahead.popleft()
        self._state["batches"] += 1
        self._fill(self._prefetch)
        return unflatten(ahead.leaves)

    def state(self) -> dict[str, Any]:
        """Return the position after the last batch, for `train(start=...)` of any source."""
        return dict(self._state)

    def state_at(self, position: Mapping[str, Any]) -> dict[str, Any]:
        """Return an earlier `state()` with the feedback that has come since."""
        return {**position, "sampling": self._state["sampling"]}

    def feedback(
        self, datasets: Mapping[str, float], tasks: Mapping[str, float] | None = None
    ) -> None:
        """Update the sampling with results by name, from the next batch on, as `RldsStream` does.

        A worker computes the new state; batches requested ahead are requested again.
        """
        results = {"datasets": datasets, "tasks": tasks or {}}
        header: dict[str, Any] = {
            k: {n: float(x) for n, x in v.items()} for k, v in results.items()
        }
        header |= {"state": self._state, "part": self._parts[0]}
        state = self._workers.call(0, "feedback", header)["state"]
        if state != self._state:
            self._cancel()
            self._state = state

    def memory(self) -> int:
        """Return the bytes in memory: batches requested ahead."""
        return sum(x.nbytes for ahead in self._ahead for x in ahead.leaves.values())

    def close(self) -> None:
        """Cancel the requests and let the workers release the episodes."""
        if isinstance(self._fault, StopIteration):
            return
        self._cancel()
        for thread in self._threads:
            thread.shutdown(wait=True, cancel_futures=True)
        self._workers.close_stream(self._stream)
        self._fault = StopIteration()

    def _cancel(self) -> None:
        for ahead in self._ahead:
            for call, part in zip(ahead.calls, ahead.parts, strict=True):
                part.cancel()
                call.cancel()
        self._ahead.clear()

    def _fill(self, count: int) -> None:
        """Request batches until `count` are in transfer."""
        while len(self._ahead) < count:
            state = {**self._state, "batches": self._state["batches"] + len(self._ahead)}
            leaves, calls = self._allocate(), [CancellableCall() for _ in self._parts]
            futures = [
                thread.submit(self._receive, w, state, leaves, calls[w])
                for w, thread in enumerate(self._threads)
            ]
            self._ahead.append(_RequestedBatch(leaves, calls, futures))

    def _receive(
        self, w: int, state: dict[str, Any], leaves: dict[str, np.ndarray], call: CancellableCall
    ) -> None:
        """Receive part `w` of the batch after a state into its rows of `leaves`."""

        def rows_of(path: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
            leaf = leaves[path]
            rows = len(leaf) // len(self._parts)
            part = leaf[w * rows : (w + 1) * rows]
            if (part.dtype.str, part.shape) != (dtype, shape):
                raise ValueError(f"{path} is {dtype} {shape}, not {part.dtype.str} {part.shape}")
            return part

        header = {"stream": self._stream, "state": state, "part": self._parts[w]}
        self._workers.call(w, "batch", header, rows_of, call)


def _allocate(leaves: dict[str, np.ndarray], path: str, dtype: str, shape: tuple) -> np.ndarray:
    leaves[path] = np.empty(shape, dtype)
    return leaves[path]


def _check_parts(size: int, processes: int, workers: int) -> None:
    """Raise ConfigError if a batch cannot be divided among the processes and workers."""
    parts = processes * workers
    if size % parts:
        sizes = sorted({max(size // parts, 1) * parts, (size // parts + 1) * parts})
        counts = [n for n in range(1, workers + 1) if size % (processes * n) == 0]
        raise ConfigError(
            f"data.batch_size {size} cannot be divided into {parts} equal parts: {processes} "
            f"process{'es' if processes > 1 else ''} × {workers} addresses in data.service. Set it "
            f"to {' or '.join(map(str, sizes))}"
            + (f", or list {' or '.join(map(str, counts))} of the addresses" if counts else "")
        )
