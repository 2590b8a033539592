"""A resumable stream of batches, planned from the order and built ahead in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from octolike.data.pipeline import goals
from octolike.data.pipeline.batch_builder import BatchBuilder, EpisodeRef
from octolike.data.pipeline.dataset_split import DatasetSplit, JoinedSplits
from octolike.data.pipeline.order import (
    EpisodeCache,
    Order,
    PoolKey,
    run_unless_exiting,
    task_draws,
)
from octolike.data.pipeline.sampling import SamplingSchedule
from octolike.text import TextTokenizer
from octolike.types import Batch, unflatten


@dataclass(frozen=True)
class PipelineThreads:
    """The batch builder and thread pools that all streams of a source share."""

    builder: BatchBuilder
    text: TextTokenizer
    loaders: ThreadPoolExecutor
    builders: ThreadPoolExecutor
    prefetch: int
    batch_bytes: int


@dataclass(frozen=True)
class EpisodeStream:
    """The settings of one stream.

    Attributes:
        supply: the episodes.
        size: examples of a batch over all hosts; part: the examples of this host.
        batches: length of the stream; 0: endless.
    """

    supply: JoinedSplits
    size: int
    part: slice
    seed: int
    dropout: bool
    pool: int
    budget: int
    batches: int = 0


class _PendingBatch(NamedTuple):
    """A batch in progress, the groups of its examples, and the pools that it reads."""

    result: Future
    groups: np.ndarray
    pools: list[PoolKey]


class RldsStream(Iterator[Batch]):
    """Batches built ahead in threads; `state()` is the position after the last one returned."""

    def __init__(
        self,
        work: PipelineThreads,
        stream: EpisodeStream,
        schedule: SamplingSchedule,
        datasets: Sequence[str],
        start: int,
    ) -> None:
        self._work, self._stream, self._schedule = work, stream, schedule
        self._datasets, self._count = list(datasets), start
        self._orders: dict[int, Order] = {}
        self._ahead: deque[_PendingBatch] = deque()
        self._cache = EpisodeCache(stream.supply.load, stream.supply.table.sizes, work.loaders)
        self._group_counts = np.zeros(len(schedule.groups.names), np.int64)
        self._fault: Exception | None = None

    def __next__(self) -> Batch:
        if self._fault is not None:
            raise self._fault
        self._fill(1)
        if not self._ahead:
            raise StopIteration
        ahead = self._ahead[0]
        try:
            leaves, texts = ahead.result.result()
        except Exception as error:
            self.close()
            self._fault = error
            raise
        self._ahead.popleft()
        self._count += 1
        self._group_counts += np.bincount(ahead.groups, minlength=len(self._group_counts))
        self._fill(self._work.prefetch)
        leaves["task.language.ids"], leaves["task.language.mask"] = self._work.text.encode(texts)
        return unflatten(leaves)

    def state(self) -> dict[str, Any]:
        """Return the position after the last returned batch, for `RldsSource.train(start=...)`."""
        return {
            "batches": self._count,
            "datasets": self._datasets,
            "sampling": self._schedule.state(),
        }

    def state_at(self, position: Mapping[str, Any]) -> dict[str, Any]:
        """Return an earlier `state()` with the feedback that has come since."""
        return {**position, "sampling": self._schedule.state()}

    def feedback(
        self, datasets: Mapping[str, float], tasks: Mapping[str, float] | None = None
    ) -> None:
        """Update the sampling with results by dataset and by task, from the next batch on.

        Uses those that data.sampling.over selects and rebuilds the batches built ahead. Tasks that
        occur only in validation are ignored.
        """
        if self._schedule.over == "dataset":
            results = dict(datasets)
        else:
            results = {k: v for k, v in (tasks or {}).items() if k in self._schedule.names}
        if self._schedule.feedback(self._count, results):
            self._orders.pop(self._count, None)
            self._ahead.clear()

    def shares(self) -> dict[str, float]:
        """Return the planned share of each dataset or task in the next batch."""
        shares = self._schedule.shares(self._count).tolist()
        return dict(zip(self._schedule.groups.names, shares, strict=True))

    def realised(self) -> dict[str, float]:
        """Return the actual share of each dataset or task in the batches returned so far."""
        shares = (self._group_counts / max(int(self._group_counts.sum()), 1)).tolist()
        return dict(zip(self._schedule.groups.names, shares, strict=True))

    def memory(self) -> int:
        """Return the bytes in memory: encoded episodes, and batches built ahead."""
        return self._cache.bytes + len(self._ahead) * self._work.batch_bytes

    def close(self) -> None:
        """Stop building batches and release the episodes."""
        for ahead in self._ahead:
            ahead.result.cancel()
        self._ahead.clear()
        self._cache.close()
        self._fault = StopIteration()

    def _fill(self, count: int) -> None:
        """Start building batches until `count` are in progress."""
        if self._stream.batches:
            count = min(count, self._stream.batches - self._count)
        while len(self._ahead) < count:
            number = self._count + len(self._ahead)
            order, position = self._order(number)
            stream, supply = self._stream, self._stream.supply
            begin = position + stream.part.start
            pools, frames = order.take(begin, stream.part.stop - stream.part.start)
            used = [key for ahead in self._ahead for key in ahead.pools] + pools
            self._cache.keep(self._episodes, used, self._next_pool())
            distinct, which = np.unique(frames[:, 0], return_inverse=True)
            result = self._work.builders.submit(
                run_unless_exiting,
                _build,
                self._work.builder,
                [(*supply.find(e), self._cache.get(e)) for e in distinct.tolist()],
                which,
                frames[:, 1],
                task_draws(stream.seed, number, stream.size, goals.DRAWS)[stream.part],
                stream.dropout,
            )
            groups = supply.table.groups[frames[:, 0]]
            self._ahead.append(_PendingBatch(result, groups, pools))

    def _next_pool(self) -> tuple[PoolKey, float]:
        """Return the pool after the current one, and the share of it to load.

        It is loaded progressively, a little faster than the current one is used up.
        """
        order, position = self._order(self._count)
        pool, progress = order.progress(position)
        return order.following(pool), 0.05 + 1.25 * progress

    def _order(self, batch: int) -> tuple[Order, int]:
        """Return the order of a batch, and the position of the batch in it."""
        start = self._schedule.since(batch)
        if start not in self._orders:
            s = self._stream
            self._orders[start] = Order(
                s.supply.table,
                self._schedule.shares(batch),
                seed=s.seed,
                start=start,
                pool=s.pool,
                budget=s.budget,
                part=(s.part.start, s.part.stop, s.size),
            )
            for old in sorted(self._orders)[:-3]:
                del self._orders[old]
        return self._orders[start], (batch - start) * self._stream.size

    def _episodes(self, key: PoolKey) -> np.ndarray:
        """Return the episodes of a pool that the stream uses."""
        order, s = self._orders[key.start], self._stream
        episodes = order.episodes(key)
        if s.batches:
            episodes = episodes[np.isin(episodes, order.take(0, s.batches * s.size)[1][:, 0])]
        return episodes


def _build(
    builder: BatchBuilder,
    requests: list[tuple[DatasetSplit, int, Future]],
    which: np.ndarray,
    t: np.ndarray,
    draws: np.ndarray,
    dropout: bool,
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Wait for the episodes; return the leaves of a batch and its instructions."""
    episodes = [EpisodeRef(source, number, future.result()) for source, number, future in requests]
    return builder.batch(episodes, which, t, draws, dropout)
