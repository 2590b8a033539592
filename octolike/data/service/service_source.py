"""Batches that workers on other machines make: data.service names them.

    data = ServiceSource(config)        octolike.data.open_data makes it if data.service is set
    for batch in data.train(): ...      the same batches, bit for bit

Of W workers each makes a contiguous W-th of this process's share of every batch (`service` draws
it), and the parts are received into the places where they belong. Imports no tensorflow, so that
the training machine needs none.

The connection is neither encrypted nor authenticated: for networks that are trusted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from octolike.config import Config, ConfigError
from octolike.data.service.worker_pool import CancellableCall, WorkerPool, name
from octolike.embodiment import embodiments_from_json
from octolike.types import Batch, Names, spec_from_json, unflatten


class ServiceSource:
    """The DataSource of a run whose batches are made by the workers of data.service."""

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
        self.embodiments = embodiments_from_json(about["embodiments"])
        self.names = Names(**{k: tuple(v) for k, v in about["names"].items()})
        self.datasets, self.tasks = list(self.names.datasets), self.names.tasks
        self.shares = np.array(about["shares"])

    def train(
        self, start: Mapping[str, Any] | None = None, process: tuple[int, int] = (0, 1)
    ) -> ServiceStream:
        """Return the endless training batches, from the beginning or from a `state()`.

        process: (index, count) of this host: it gets its contiguous share of each batch.
        """
        index, count = process
        each = len(self._workers)
        _check_parts(self._size, count, each)
        parts = [(index * each + w, count * each) for w in range(each)]
        header = {"state": start, "part": parts[0]}
        state = self._workers.ask(0, "open", header)["state"]
        rows = self._size // count
        make = lambda: {k: np.empty((rows, *shape), kind) for k, (shape, kind) in self.spec.items()}
        return ServiceStream(self._workers, parts, make, state, self._prefetch)

    def validation(self) -> dict[str, Callable[[], Iterator[Batch]]]:
        """Return per dataset a function that iterates over its validation batches."""
        names = self._workers.about["validation"]
        return {name: partial(self._held_out, name, i) for i, name in enumerate(names)}

    def describe(self) -> str:
        """Return the workers' table of the datasets, and who they are."""
        about = self._workers.about["description"]
        return f"{about}\nbatches are made by {', '.join(self._workers.addresses)}"

    def close(self) -> None:
        """Close the connections."""
        self._workers.close()

    def _held_out(self, dataset: str, number: int) -> Iterator[Batch]:
        """Yield a dataset's validation batches, all of one worker; each dataset has another."""
        stream, home = name(), number % len(self._workers)
        try:
            for i in range(self._workers.about["settings"]["train.validation_batches"]):
                leaves: dict[str, np.ndarray] = {}
                header = {"stream": stream, "dataset": dataset, "number": i}
                place = partial(_put, leaves)
                if self._workers.ask(home, "validation", header, place)["end"]:
                    return
                yield unflatten(leaves)
        finally:
            self._workers.forget(stream)


class _RequestedBatch(NamedTuple):
    """A batch that is being received: its leaves, and of each part the request and its end."""

    leaves: dict[str, np.ndarray]
    tickets: list[CancellableCall]
    parts: list[Future]


class ServiceStream(Iterator[Batch]):
    """Numpy batches, asked for ahead in a thread per part; `state()` is of the last returned."""

    def __init__(
        self,
        workers: WorkerPool,
        parts: Sequence[tuple[int, int]],
        make: Callable[[], dict[str, np.ndarray]],
        state: Mapping[str, Any],
        prefetch: int,
    ) -> None:
        """parts: (index, count) of each worker's; make: the leaves of a batch, to be filled."""
        self._workers, self._parts, self._make = workers, parts, make
        self._state, self._prefetch, self._stream = dict(state), prefetch, name()
        # One thread each, so that a worker is asked for one batch after the other.
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
        """Return what `train(start=...)` needs, here or of the local data, to go on from here."""
        return dict(self._state)

    def state_at(self, position: Mapping[str, Any]) -> dict[str, Any]:
        """Return an earlier `state()` with what feedback has changed since."""
        return {**position, "sampling": self._state["sampling"]}

    def feedback(
        self, datasets: Mapping[str, float], tasks: Mapping[str, float] | None = None
    ) -> None:
        """Take in how well things go, by name; a worker says what that changes, as `Batches` does.

        It holds from the next batch on that is returned; those asked for ahead are asked for again.
        """
        results = {"datasets": datasets, "tasks": tasks or {}}
        header = {k: {n: float(x) for n, x in v.items()} for k, v in results.items()}
        header |= {"state": self._state, "part": self._parts[0]}
        state = self._workers.ask(0, "feedback", header)["state"]
        if state != self._state:
            self._drop()
            self._state = state

    def memory(self) -> int:
        """Return the bytes held: batches asked for ahead."""
        return sum(x.nbytes for ahead in self._ahead for x in ahead.leaves.values())

    def close(self) -> None:
        """Ask for no more batches, and let the workers forget the episodes."""
        if isinstance(self._fault, StopIteration):
            return
        self._drop()
        for thread in self._threads:
            thread.shutdown(wait=True, cancel_futures=True)
        self._workers.forget(self._stream)
        self._fault = StopIteration()

    def _drop(self) -> None:
        for ahead in self._ahead:
            for ticket, part in zip(ahead.tickets, ahead.parts, strict=True):
                part.cancel()
                ticket.drop()
        self._ahead.clear()

    def _fill(self, count: int) -> None:
        """Have so many batches under way."""
        while len(self._ahead) < count:
            state = {**self._state, "batches": self._state["batches"] + len(self._ahead)}
            leaves, tickets = self._make(), [CancellableCall() for _ in self._parts]
            futures = [
                thread.submit(self._receive, w, state, leaves, tickets[w])
                for w, thread in enumerate(self._threads)
            ]
            self._ahead.append(_RequestedBatch(leaves, tickets, futures))

    def _receive(
        self, w: int, state: dict[str, Any], leaves: dict[str, np.ndarray], ticket: CancellableCall
    ) -> None:
        """Have a part of the batch after a state written into its rows."""

        def place(path: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
            whole = leaves[path]
            rows = len(whole) // len(self._parts)
            part = whole[w * rows : (w + 1) * rows]
            if (part.dtype.str, part.shape) != (dtype, shape):
                raise ValueError(f"{path} is {dtype} {shape}, not {part.dtype.str} {part.shape}")
            return part

        header = {"stream": self._stream, "state": state, "part": self._parts[w]}
        self._workers.ask(w, "batch", header, place, ticket)


def _put(leaves: dict[str, np.ndarray], path: str, dtype: str, shape: tuple) -> np.ndarray:
    leaves[path] = np.empty(shape, dtype)
    return leaves[path]


def _check_parts(size: int, processes: int, workers: int) -> None:
    """Raise ConfigError where a batch cannot be cut into a part per process and worker."""
    parts = processes * workers
    if size % parts:
        near = sorted({max(size // parts, 1) * parts, (size // parts + 1) * parts})
        fitting = [n for n in range(1, workers + 1) if size % (processes * n) == 0]
        raise ConfigError(
            f"data.batch_size {size} cannot be cut into {parts} equal parts: {processes} "
            f"process{'es' if processes > 1 else ''} × {workers} addresses in data.service. Set it "
            f"to {' or '.join(map(str, near))}"
            + (f", or name {' or '.join(map(str, fitting))} of the addresses" if fitting else "")
        )
