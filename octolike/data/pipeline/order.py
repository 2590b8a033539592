"""The order of frames, a pure function of (seed, epoch, position), and the episodes it needs.

`Order` is an endless order of frames that holds while the shares stay the same. Each epoch permutes
the episodes of all datasets, an episode as often as its group's share asks for; consecutive ones
form a pool, and a pool's frames are mixed with one another. Only numbers are permuted: encoded
images are held once, by `EpisodeCache`, and decoded after mixing.

    epoch:  e7 e2 e9 | e1 e4 e7 e8 | ...    pools of at most `pool` episodes and `budget` bytes
    frames: (e9,3) (e7,0) (e2,5) (e7,1) ... | (e8,2) ...
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from octolike.data.rlds.reader import Episode

# Streams of random numbers, so that no two purposes share draws.
_EPISODES, _FRAMES, _PHASES, _TASKS = range(4)


class PoolKey(NamedTuple):
    """Which pool: of the order that begins with batch `start`, in this epoch, with this number."""

    start: int
    epoch: int
    number: int


@dataclass(frozen=True, eq=False)
class EpisodeTable:
    """The episodes that can be drawn, over all datasets: int64 [E] each.

    steps: usable steps; sizes: bytes held for it; groups: number of its group.
    """

    steps: np.ndarray
    sizes: np.ndarray
    groups: np.ndarray


class Order:
    """The endless order of frames under constant shares."""

    def __init__(
        self,
        stock: EpisodeTable,
        shares: np.ndarray,
        *,
        seed: int,
        start: int = 0,
        pool: int,
        budget: int,
        part: tuple[int, int, int] = (0, 1, 1),
    ) -> None:
        """Prepare.

        Args:
            stock: the episodes.
            shares: of the groups, float64 [G].
            seed: of the run.
            start: the batch from which the shares hold; another one is another order.
            pool: episodes that a pool has at most.
            budget: bytes that a pool has at most, unless it is a single episode.
            part: (a, b, n): of each n positions, those from a to before b are ours.
        """
        self.start, self._stock, self._pool, self._budget = start, stock, pool, budget
        self._part = part
        self._key = (seed, start)
        self._repeats = _repeats(stock, shares)
        self._phases = self._spread_phases()
        self._total = float((self._repeats * stock.steps).sum())
        self._entries_of = lru_cache(maxsize=2)(self._permute)
        self._frames_of = lru_cache(maxsize=3)(self._mix)
        self._first_of = lru_cache(maxsize=8)(self._first)

    def take(self, position: int, count: int) -> tuple[list[PoolKey], np.ndarray]:
        """Return (pools, in order; frames int [count, 2]: episode and step) from a position on."""
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
        """Return the pool at a position, and how much of it came before, as a share."""
        epoch = self._epoch(position)
        _, ends = self._entries_of(epoch)
        offset = position - self._first_of(epoch)
        number = int(np.searchsorted(ends, offset, side="right"))
        begin = int(ends[number - 1]) if number else 0
        return PoolKey(self.start, epoch, number), (offset - begin) / (int(ends[number]) - begin)

    def episodes(self, key: PoolKey) -> np.ndarray:
        """Return our distinct episodes of a pool in the order of need, int [≤ pool]."""
        frames = self._frames_of(key.epoch, key.number)[:, 0]
        _, ends = self._entries_of(key.epoch)
        begin = self._first_of(key.epoch) + (int(ends[key.number - 1]) if key.number else 0)
        low, high, size = self._part
        place = (begin + np.arange(len(frames))) % size
        frames = frames[(low <= place) & (place < high)]
        _, firsts = np.unique(frames, return_index=True)
        return frames[np.sort(firsts)]

    def following(self, key: PoolKey) -> PoolKey:
        """Return the pool that comes after a pool."""
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
        return int((self._shown(epoch) * self._stock.steps).sum())

    def _shown(self, epoch: int) -> np.ndarray:
        """Return how often each episode comes in the epochs before one, int64 [E].

        The phases make the rounding fair: an episode that should come 0.3 times an epoch comes in
        every third or fourth, and of each group nearly the same number comes in each.
        """
        return np.floor(self._repeats * epoch + self._phases).astype(np.int64)

    def _spread_phases(self) -> np.ndarray:
        """Return a phase in [0, 1) per episode, evenly spread within each group."""
        rng = np.random.default_rng((*self._key, _PHASES))
        groups = self._stock.groups
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
        times = self._shown(epoch + 1) - self._shown(epoch)
        entries = rng.permutation(np.repeat(np.arange(len(times)), times))
        ends = np.cumsum(self._stock.sizes[entries])
        pools, begin = [], 0
        while begin < len(entries):
            before = int(ends[begin - 1]) if begin else 0
            fits = int(np.searchsorted(ends, before + self._budget, side="right"))
            end = max(min(fits, begin + self._pool), begin + 1)
            pools.append(entries[begin:end])
            begin = end
        return pools, np.cumsum([self._stock.steps[p].sum() for p in pools], dtype=np.int64)

    def _mix(self, epoch: int, number: int) -> np.ndarray:
        """Return (episode, step) of a pool's frames in their order, int [frames, 2]."""
        pools, _ = self._entries_of(epoch)
        steps = self._stock.steps[pools[number]]
        firsts = np.repeat(np.cumsum(steps) - steps, steps)
        frames = np.stack(
            [np.repeat(pools[number], steps), np.arange(steps.sum()) - firsts], axis=1
        )
        rng = np.random.default_rng((*self._key, _FRAMES, epoch, number))
        return frames[rng.permutation(len(frames))]


class EpisodeCache:
    """The episodes in memory: those of the pools in use, and of the next one as it is needed."""

    def __init__(
        self, load: Callable[[int], Episode], sizes: np.ndarray, executor: ThreadPoolExecutor
    ) -> None:
        self._load, self._sizes, self._executor = load, sizes, executor
        self._pools: dict[PoolKey, tuple[np.ndarray, int]] = {}  # episodes; how many are asked for
        self._held: dict[int, tuple[Future[Episode], int]] = {}  # and by how many pools
        self.bytes = 0

    def keep(
        self,
        episodes_of: Callable[[PoolKey], np.ndarray],
        pools: list[PoolKey],
        ahead: tuple[PoolKey, float],
    ) -> None:
        """Hold the episodes of some pools and a share of another one's, and no others."""
        wanted = dict.fromkeys(pools, 1.0)
        wanted.setdefault(*ahead)
        unused = [key for key in self._pools if key not in wanted]
        for key, share in wanted.items():
            episodes, asked = self._pools.get(key) or (episodes_of(key), 0)
            enough = max(asked, int(np.ceil(min(share, 1.0) * len(episodes))))
            for e in episodes[asked:enough].tolist():
                self._ask(e)
            self._pools[key] = episodes, enough
        for key in unused:  # dropped last, so that data that fit into one pool are read once
            episodes, asked = self._pools.pop(key)
            for e in episodes[:asked].tolist():
                self._drop(e)

    def get(self, episode: int) -> Future[Episode]:
        """Return a held episode, as it arrives."""
        return self._held[episode][0]

    def close(self) -> None:
        """Forget the episodes, and do not load those still waiting to be."""
        for future, _ in self._held.values():
            future.cancel()
        self._held, self._pools, self.bytes = {}, {}, 0

    def _ask(self, episode: int) -> None:
        if episode in self._held:
            future, users = self._held[episode]
            self._held[episode] = future, users + 1
            return
        self._held[episode] = self._executor.submit(run_unless_exiting, self._load, episode), 1
        self.bytes += int(self._sizes[episode])

    def _drop(self, episode: int) -> None:
        future, users = self._held[episode]
        if users > 1:
            self._held[episode] = future, users - 1
            return
        future.cancel()
        del self._held[episode]
        self.bytes -= int(self._sizes[episode])


def run_unless_exiting(work: Callable, *args: object) -> object:
    """Return work(*args), but not when the interpreter is ending, which waits for its threads."""
    if not threading.main_thread().is_alive():
        raise CancelledError
    return work(*args)


def task_draws(seed: int, batch: int, size: int, width: int) -> np.ndarray:
    """Return a batch's draws for goals, wordings and dropout, float64 [size, width] in [0, 1)."""
    return np.random.default_rng((seed, _TASKS, batch)).random((size, width))


def _repeats(stock: EpisodeTable, shares: np.ndarray) -> np.ndarray:
    """Return how often each episode should come in an epoch, float64 [E].

    An epoch is as many frames as there are steps in the groups that have a share.
    """
    steps = np.bincount(stock.groups, stock.steps, minlength=len(shares))
    per_step = np.divide(shares, steps, out=np.zeros(len(shares)), where=steps > 0)
    # rounded, so that what should come once an epoch comes exactly once
    return np.round(per_step * steps[shares > 0].sum(), 9)[stock.groups]
