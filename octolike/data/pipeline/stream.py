"""A stream of batches: planned from the order, made ahead in background threads, resumable."""

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
    """What all streams share: who makes batches, and the threads."""

    maker: BatchBuilder
    text: TextTokenizer
    loaders: ThreadPoolExecutor
    makers: ThreadPoolExecutor
    prefetch: int
    batch_bytes: int


@dataclass(frozen=True)
class EpisodeStream:
    """One stream of batches: of which episodes, `size` examples each, of which `part` are ours.

    batches: how many will be asked for; 0: no end.
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
    """A batch that is being made, the groups of its examples, and the pools that it needs."""

    made: Future
    groups: np.ndarray
    pools: list[PoolKey]


class RldsStream(Iterator[Batch]):
    """Numpy batches, made ahead in background threads; `state()` follows the last one returned."""

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
        self._shelf = EpisodeCache(stream.supply.load, stream.supply.stock.sizes, work.loaders)
        self._seen = np.zeros(len(schedule.groups.names), np.int64)
        self._fault: Exception | None = None

    def __next__(self) -> Batch:
        if self._fault is not None:
            raise self._fault
        self._fill(1)
        if not self._ahead:
            raise StopIteration
        ahead = self._ahead[0]
        try:
            leaves, texts = ahead.made.result()
        except Exception as error:
            self.close()
            self._fault = error
            raise
        self._ahead.popleft()
        self._count += 1
        self._seen += np.bincount(ahead.groups, minlength=len(self._seen))
        self._fill(self._work.prefetch)
        leaves["task.language.ids"], leaves["task.language.mask"] = self._work.text.encode(texts)
        return unflatten(leaves)

    def state(self) -> dict[str, Any]:
        """Return what `Data.train(start=...)` needs to go on after the last returned batch."""
        return {
            "batches": self._count,
            "datasets": self._datasets,
            "sampling": self._schedule.state(),
        }

    def state_at(self, position: Mapping[str, Any]) -> dict[str, Any]:
        """Return an earlier `state()` with what feedback has changed since."""
        return {**position, "sampling": self._schedule.state()}

    def feedback(
        self, datasets: Mapping[str, float], tasks: Mapping[str, float] | None = None
    ) -> None:
        """Take in how well things go, by the name of the dataset and of the task.

        What fits data.sampling.over is used, from the next batch on that is returned; what has been
        made ahead is made again. Tasks that are not sampled (seen in validation only) do not count.
        """
        if self._schedule.over == "dataset":
            results = dict(datasets)
        else:
            results = {k: v for k, v in (tasks or {}).items() if k in self._schedule.known}
        if self._schedule.feedback(self._count, results):
            self._orders.pop(self._count, None)
            self._ahead.clear()

    def shares(self) -> dict[str, float]:
        """Return the share that each dataset or task is asked to have in the next batch."""
        shares = self._schedule.shares(self._count).tolist()
        return dict(zip(self._schedule.groups.names, shares, strict=True))

    def realised(self) -> dict[str, float]:
        """Return the share that each has had in the batches returned by this stream."""
        shares = (self._seen / max(int(self._seen.sum()), 1)).tolist()
        return dict(zip(self._schedule.groups.names, shares, strict=True))

    def memory(self) -> int:
        """Return the bytes held: encoded episodes, and batches made ahead."""
        return self._shelf.bytes + len(self._ahead) * self._work.batch_bytes

    def close(self) -> None:
        """Stop making batches ahead, and forget the episodes."""
        for ahead in self._ahead:
            ahead.made.cancel()
        self._ahead.clear()
        self._shelf.close()
        self._fault = StopIteration()

    def _fill(self, count: int) -> None:
        """Have so many batches under way."""
        if self._stream.batches:
            count = min(count, self._stream.batches - self._count)
        while len(self._ahead) < count:
            number = self._count + len(self._ahead)
            run, position = self._order(number)
            stream, supply = self._stream, self._stream.supply
            begin = position + stream.part.start
            pools, frames = run.take(begin, stream.part.stop - stream.part.start)
            used = [key for ahead in self._ahead for key in ahead.pools] + pools
            self._shelf.keep(self._episodes, used, self._next_pool())
            distinct, which = np.unique(frames[:, 0], return_inverse=True)
            made = self._work.makers.submit(
                run_unless_exiting,
                _make,
                self._work.maker,
                [(*supply.find(e), self._shelf.get(e)) for e in distinct.tolist()],
                which,
                frames[:, 1],
                task_draws(stream.seed, number, stream.size, goals.DRAWS)[stream.part],
                stream.dropout,
            )
            groups = supply.stock.groups[frames[:, 0]]
            self._ahead.append(_PendingBatch(made, groups, pools))

    def _next_pool(self) -> tuple[PoolKey, float]:
        """Return the pool after the one that the next batch begins in, and how much to have of it.

        It is loaded bit by bit, a little faster than the present one is used up.
        """
        run, position = self._order(self._count)
        pool, done = run.progress(position)
        return run.following(pool), 0.05 + 1.25 * done

    def _order(self, batch: int) -> tuple[Order, int]:
        """Return the order that a batch is from, and its position there."""
        start = self._schedule.since(batch)
        if start not in self._orders:
            s = self._stream
            self._orders[start] = Order(
                s.supply.stock,
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
        """Return the episodes of a pool that will be needed."""
        run, s = self._orders[key.start], self._stream
        episodes = run.episodes(key)
        if s.batches:
            episodes = episodes[np.isin(episodes, run.take(0, s.batches * s.size)[1][:, 0])]
        return episodes


def _make(
    maker: BatchBuilder,
    wanted: list[tuple[DatasetSplit, int, Future]],
    which: np.ndarray,
    t: np.ndarray,
    draws: np.ndarray,
    dropout: bool,
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the leaves of a batch and its instructions; waits for the episodes."""
    episodes = [EpisodeRef(source, number, future.result()) for source, number, future in wanted]
    return maker.batch(episodes, which, t, draws, dropout)
