"""The order of frames, a pure function of (seed, epoch, position), and the cache of its episodes.

`Order` is the endless order of frames under constant shares. Each epoch permutes the episodes of
all datasets, repeated in proportion to the shares of their groups. Consecutive episodes form a
pool, and the frames of a pool are shuffled together. Only indices are permuted: `EpisodeCache`
holds each encoded image once, and images are decoded after shuffling.

    epoch:  e7 e2 e9 | e1 e4 e7 e8 | ...    pools of at most `pool` episodes and `budget` bytes
    frames: (e9,3) (e7,0) (e2,5) (e7,1) ... | (e8,2) ...
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np

from octolike.data.rlds.reader import Episode

_Result = TypeVar("_Result")

# Separate random streams.
_EPISODES, _FRAMES, _PHASES, _TASKS = range(4)


class PoolKey(NamedTuple):
    """A pool: its number in an epoch of the order that begins with batch `start`."""

    start: int
    epoch: int
    number: int


@dataclass(frozen=True, eq=False)
class EpisodeTable:
    """The E episodes of all datasets, int64 [E] each.

    steps: usable steps; sizes: bytes in memory; groups: index of the sampling group.
    """

    steps: np.ndarray
    sizes: np.ndarray
    groups: np.ndarray


class Order:
    """The endless order of frames under constant shares."""

    def __init__(
        self,
        table: EpisodeTable,
        shares: np.ndarray,
        *,
        seed: int,
        start: int = 0,
        pool: int,
        budget: int,
        part: tuple[int, int, int] = (0, 1, 1),
    ) -> None:
        """Compute how often each episode is repeated.

        Args:
            table: the episodes.
            shares: of the groups, float64 [G].
            seed: of the run.
            start: the first batch of these shares; a different start gives a different order.
            pool: maximum number of episodes in a pool.
            budget: maximum bytes of a pool, except for a pool of one episode.
            part: (a, b, n): this host uses the positions a ≤ p < b of every n.
        """
        self.start, self._table, self._pool, self._budget = start, table, pool, budget
        self._part = part
        self._key = (seed, start)
        self._repeats = _repeats(table, shares)
        self._phases = self._spread_phases()
        self._total = float((self._repeats * table.steps).sum())
        self._entries_of = lru_cache(maxsize=2)(self._permute)
        self._frames_of = lru_cache(maxsize=3)(self._mix)
        self._first_of = lru_cache(maxsize=8)(self._first)

    def take(self, position: int, count: int) -> tuple[list[PoolKey], np.ndarray]:
        """Return (pools, in order; frames int [count, 2]: episode, step) from a position."""
        keys, parts = [], []
        while count:
            epoch = self._epoch(position)
            _, ends = self._entries_of(epoch)
            offset = position - self._first_of(epoch)
            number = int(np.searchsorted(ends, offset, side="right"))
            begin = int(ends[number - 1]) if number else 0
            frames = self._frames_of(epoch, number)[offset - begin : offset - begin + count]
            keys.append(PoolKey(self.start, epoch, number))
            parts.append(frames)
            position, count = position + len(frames), count - len(frames)
        return keys, np.concatenate(parts)

    def progress(self, position: int) -> tuple[PoolKey, float]:
        """Return the pool at a position, and the used share of its frames."""
        epoch = self._epoch(position)
        _, ends = self._entries_of(epoch)
        offset = position - self._first_of(epoch)
        number = int(np.searchsorted(ends, offset, side="right"))
        begin = int(ends[number - 1]) if number else 0
        return PoolKey(self.start, epoch, number), (offset - begin) / (int(ends[number]) - begin)

    def episodes(self, key: PoolKey) -> np.ndarray:
        """Return this host's distinct episodes of a pool in the order of use, int [≤ pool]."""
        frames = self._frames_of(key.epoch, key.number)[:, 0]
        _, ends = self._entries_of(key.epoch)
        begin = self._first_of(key.epoch) + (int(ends[key.number - 1]) if key.number else 0)
        low, high, size = self._part
        row = (begin + np.arange(len(frames))) % size
        frames = frames[(low <= row) & (row < high)]
        _, firsts = np.unique(frames, return_index=True)
        return frames[np.sort(firsts)]

    def following(self, key: PoolKey) -> PoolKey:
        """Return the next pool."""
        pools, _ = self._entries_of(key.epoch)
        if key.number + 1 < len(pools):
            return key._replace(number=key.number + 1)
        epoch = key.epoch + 1
        while self._first_of(epoch) == self._first_of(epoch + 1):
            epoch += 1
        return PoolKey(self.start, epoch, 0)

    def _epoch(self, position: int) -> int:
        epoch = int(position / self._total)
        while self._first_of(epoch) > position:
            epoch -= 1
        while self._first_of(epoch + 1) <= position:
            epoch += 1
        return epoch

    def _first(self, epoch: int) -> int:
        """Return the position of an epoch's first frame."""
        return int((self._repeats_before(epoch) * self._table.steps).sum())

    def _repeats_before(self, epoch: int) -> np.ndarray:
        """Return the repetitions of each episode before an epoch, int64 [E].

        The phases make the rounding fair: an episode with 0.3 repetitions per epoch appears in
        every third or fourth epoch, and each epoch has nearly as many episodes of each group.
        """
        return np.floor(self._repeats * epoch + self._phases).astype(np.int64)

    def _spread_phases(self) -> np.ndarray:
        """Return a phase in [0, 1) per episode, evenly spread within each group."""
        rng = np.random.default_rng((*self._key, _PHASES))
        groups = self._table.groups
        shuffled = rng.permutation(len(groups))
        order = shuffled[np.argsort(groups[shuffled], kind="stable")]
        counts = np.bincount(groups)
        rank = np.arange(len(groups)) - (np.cumsum(counts) - counts)[groups[order]]
        phases = np.empty(len(groups))
        phases[order] = (rank + rng.random(len(counts))[groups[order]]) / counts[groups[order]]
        return phases

    def _permute(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Return (each pool's episodes, position in the epoch at which each pool ends)."""
        rng = np.random.default_rng((*self._key, _EPISODES, epoch))
        times = self._repeats_before(epoch + 1) - self._repeats_before(epoch)
        entries = rng.permutation(np.repeat(np.arange(len(times)), times))
        ends = np.cumsum(self._table.sizes[entries])
        pools, begin = [], 0
        while begin < len(entries):
            before = int(ends[begin - 1]) if begin else 0
            fits = int(np.searchsorted(ends, before + self._budget, side="right"))
            end = max(min(fits, begin + self._pool), begin + 1)
            pools.append(entries[begin:end])
            begin = end
        return pools, np.cumsum([self._table.steps[p].sum() for p in pools], dtype=np.int64)

    def _mix(self, epoch: int, number: int) -> np.ndarray:
        """Return (episode, step) of a pool's frames in their order, int [frames, 2]."""
        pools, _ = self._entries_of(epoch)
        steps = self._table.steps[pools[number]]
        firsts = np.repeat(np.cumsum(steps) - steps, steps)
        frames = np.stack(
            [np.repeat(pools[number], steps), np.arange(steps.sum()) - firsts], axis=1
        )
        rng = np.random.default_rng((*self._key, _FRAMES, epoch, number))
        return frames[rng.permutation(len(frames))]


class EpisodeCache:
    """The episodes in memory: all of the pools in use and, progressively, those of the next one."""

    def __init__(
        self, load: Callable[[int], Episode], sizes: np.ndarray, executor: ThreadPoolExecutor
    ) -> None:
        self._load, self._sizes, self._executor = load, sizes, executor
        self._pools: dict[PoolKey, tuple[np.ndarray, int]] = {}  # episodes, number requested
        self._episodes: dict[int, tuple[Future[Episode], int]] = {}  # episode, number of users
        self.bytes = 0

    def keep(
        self,
        episodes_of: Callable[[PoolKey], np.ndarray],
        pools: list[PoolKey],
        ahead: tuple[PoolKey, float],
    ) -> None:
        """Hold the episodes of `pools` and a share of the episodes of the next pool, `ahead`."""
        shares = dict.fromkeys(pools, 1.0)
        shares.setdefault(*ahead)
        unused = [key for key in self._pools if key not in shares]
        for key, share in shares.items():
            episodes, requested = self._pools.get(key) or (episodes_of(key), 0)
            target = max(requested, int(np.ceil(min(share, 1.0) * len(episodes))))
            for e in episodes[requested:target].tolist():
                self._request(e)
            self._pools[key] = episodes, target
        for key in unused:  # last, so that data that fit into one pool are read once
            episodes, requested = self._pools.pop(key)
            for e in episodes[:requested].tolist():
                self._release(e)

    def get(self, episode: int) -> Future[Episode]:
        """Return the future of a requested episode."""
        return self._episodes[episode][0]

    def close(self) -> None:
        """Release all episodes and cancel those that are not loaded yet."""
        for future, _ in self._episodes.values():
            future.cancel()
        self._episodes, self._pools, self.bytes = {}, {}, 0

    def _request(self, episode: int) -> None:
        if episode in self._episodes:
            future, users = self._episodes[episode]
            self._episodes[episode] = future, users + 1
            return
        self._episodes[episode] = self._executor.submit(run_unless_exiting, self._load, episode), 1
        self.bytes += int(self._sizes[episode])

    def _release(self, episode: int) -> None:
        future, users = self._episodes[episode]
        if users > 1:
            self._episodes[episode] = future, users - 1
            return
        future.cancel()
        del self._episodes[episode]
        self.bytes -= int(self._sizes[episode])


def run_unless_exiting(work: Callable[..., _Result], *args: object) -> _Result:
    """Return work(*args); raise CancelledError if the interpreter is waiting for its threads."""
    if not threading.main_thread().is_alive():
        raise CancelledError
    return work(*args)


def task_draws(seed: int, batch: int, size: int, width: int) -> np.ndarray:
    """Return the draws for goals, wordings and dropout of a batch, float64 [size, width]."""
    return np.random.default_rng((seed, _TASKS, batch)).random((size, width))


def _repeats(table: EpisodeTable, shares: np.ndarray) -> np.ndarray:
    """Return the repetitions of each episode in an epoch, float64 [E].

    An epoch has as many frames as the groups with a share > 0 have steps.
    """
    steps = np.bincount(table.groups, table.steps, minlength=len(shares))
    per_step = np.divide(shares, steps, out=np.zeros(len(shares)), where=steps > 0)
    # rounded, so that one repetition per epoch is exactly one
    return np.round(per_step * steps[shares > 0].sum(), 9)[table.groups]
