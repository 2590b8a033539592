"""Batcher: requests of many robots to batched calls of one policy, on one inference thread.

The event loop never computes. Requests wait in a bounded queue; while a batch is on the inference
thread, the next one fills up. A batch starts as soon as every robot that is expected has asked, at
the latest `batch_wait_ms` after its first request, so a single robot never waits for others.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
import traceback
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from octolike import types
from octolike.policy.execution import NonFiniteActionsError
from octolike.policy.policy import Policy
from octolike.policy.serving.metrics import ServerMetrics
from octolike.policy.serving.options import ServeOptions

WAIT_SHARE = 0.25  # of the duration of a call that a batch may wait for more requests


class BusyError(RuntimeError):
    """The queue is full, or the server stops."""


class FailureError(RuntimeError):
    """The policy failed; the sentence is for the client, the reason is in the server's log."""


class Inputs(NamedTuple):
    """A request as the network takes it: parts of a batch [1, ...], made on another thread.

    states: proprio [1, P] in robot units, or None; prefix: the actions to continue, or None.
    """

    observation: types.Batch
    task: types.Batch
    states: np.ndarray | None
    prefix: Any


class Result(NamedTuple):
    """A chunk float32 [H, A] in robot units, with how it came about; durations in seconds."""

    actions: np.ndarray
    step: int
    queue: float
    model: float
    batch: int


@dataclasses.dataclass(eq=False)
class _Job:
    client: Any
    inputs: Inputs
    seed: int
    future: asyncio.Future[Result]
    created: float


class Batcher:
    """Answers requests with one policy, which may be replaced between two batches.

    Attributes:
        policy: that computes the next batch.
        waiting: number of requests in the queue.
        running_since: start of the batch on the inference thread (`time.monotonic`), or None.
    """

    def __init__(self, policy: Policy, options: ServeOptions, metrics: ServerMetrics) -> None:
        self.policy = policy
        self._wait, self._capacity, self._metrics = (
            options.batch_wait_ms / 1e3,
            options.queue,
            metrics,
        )
        self._largest = max(options.batch_sizes)
        self._jobs: deque[_Job] = deque()
        self._changed = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="octolike-inference")
        self._last: set[Any] = set()  # the clients of the last batch
        self._duration = 0.0  # of the last batch
        self.running_since: float | None = None

    @property
    def waiting(self) -> int:
        """The number of requests in the queue."""
        return len(self._jobs)

    async def call(self, function: Any, *arguments: Any) -> Any:
        """Return function(*arguments), computed on the inference thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, function, *arguments)

    async def submit(self, client: Any, inputs: Inputs, seed: int) -> Result:
        """Return the chunk of a request; a cancelled call leaves the queue.

        Raises BusyError if the queue is full, FailureError if the policy fails.
        """
        if len(self._jobs) >= self._capacity:
            raise BusyError(f"{len(self._jobs)} requests are waiting already; ask again later")
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        job = _Job(client, inputs, seed, future, time.perf_counter())
        self._jobs.append(job)
        self._changed.set()
        try:
            return await future
        finally:
            if job in self._jobs:
                self._jobs.remove(job)

    async def run(self) -> None:
        """Compute batches until cancelled."""
        while True:
            await self._collect()
            jobs = [self._jobs.popleft() for _ in range(min(len(self._jobs), self._largest))]
            self._last = {job.client for job in jobs}
            if not jobs:
                continue
            policy, start = self.policy, time.perf_counter()
            self.running_since = time.monotonic()
            try:
                results = await self.call(_compute, policy, jobs)
            finally:
                self.running_since = None
            self._duration = time.perf_counter() - start
            self._metrics.add_batch(len(jobs))
            for job, result in zip(jobs, results, strict=True):
                if job.future.done():  # the client has gone
                    continue
                if isinstance(result, Exception):
                    job.future.set_exception(result)
                    continue
                waited = start - job.created
                job.future.set_result(
                    Result(result, policy.step, waited, self._duration, len(jobs))
                )

    async def _collect(self) -> None:
        """Return when a batch should start."""
        while not self._jobs:
            self._changed.clear()
            await self._changed.wait()
        deadline = self._jobs[0].created + min(self._wait, WAIT_SHARE * self._duration)
        while self._jobs and len(self._jobs) < self._largest:
            expected = self._last | {job.client for job in self._jobs}
            remaining = deadline - time.perf_counter()
            if len(self._jobs) >= len(expected) or remaining <= 0:
                return
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), remaining)
            except TimeoutError:
                return

    def close(self) -> None:
        """Stop the inference thread after the batch that it computes."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _compute(policy: Policy, jobs: Sequence[_Job]) -> list[np.ndarray | Exception]:
    """Return each job's chunk in robot units, or its error: one job's fault is not another's."""
    try:
        actions = _sample(policy, [job.inputs for job in jobs], [job.seed for job in jobs])
        return list(actions)
    except Exception as error:
        rows = error.rows if isinstance(error, NonFiniteActionsError) else ()
        if 0 < len(rows) < len(jobs):  # the others do not wait for each of these alone
            good = iter(_compute(policy, [job for i, job in enumerate(jobs) if i not in rows]))
            message = "the sampled actions are not finite; check the observation"
            return [FailureError(message) if i in rows else next(good) for i in range(len(jobs))]
        if len(jobs) > 1:
            return [result for job in jobs for result in _compute(policy, [job])]
        if isinstance(error, FloatingPointError):
            return [FailureError(str(error))]
        traceback.print_exc()
        return [
            FailureError(f"the policy failed with {type(error).__name__}; see the server's log")
        ]


def _sample(policy: Policy, inputs: Sequence[Inputs], seeds: Sequence[int]) -> np.ndarray:
    join = lambda *x: np.concatenate(x)
    observation = jax.tree.map(join, *[x.observation for x in inputs])
    task = jax.tree.map(join, *[x.task for x in inputs])
    states = None if inputs[0].states is None else np.concatenate([x.states for x in inputs])
    prefix = policy.encode_prefixes([x.prefix for x in inputs], states)
    chunks = policy.sample_normalized(observation, task, seeds, prefix)
    return policy.unnormalize(chunks, states)
