"""Who is in a batch: an order that is a pure function of (seed, position), resumable anywhere.

`Order` is one dataset's endless order of frames. Each epoch permutes the episodes; consecutive
episodes form a pool, and a pool's frames are mixed with one another. Only numbers are permuted:
encoded images are held once, by `Pool`, and decoded after mixing.

    epoch:  e7 e2 e9 | e1 e4 e8 | ...       pools of `pool` episodes
    frames: (e9,3) (e7,0) (e2,5) (e7,1) ... | (e8,2) ...
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np

from octolike.data.episodes import Episode

# Streams of random numbers, so that no two purposes share draws.
_EPISODES, _FRAMES, _DATASETS, _TASKS = range(4)


class Order:
    """The endless order of one dataset's frames."""

    def __init__(self, steps: np.ndarray, *, seed: int, dataset: int, pool: int) -> None:
        """steps: int [episodes], usable steps of each; pool: episodes mixed at a time."""
        self.steps, self.pool = steps, pool
        self._key = (seed, dataset)
        self._frames_of = lru_cache(maxsize=2)(self._mix)
        self._episodes_of = lru_cache(maxsize=2)(self._permute)

    def at(self, position: int) -> tuple[tuple[int, int], int, int]:
        """Return ((epoch, pool number), episode, step) at a position ≥ 0."""
        epoch, offset = divmod(position, int(self.steps.sum()))
        _, starts = self._episodes_of(epoch)
        number = int(np.searchsorted(starts, offset, side="right")) - 1
        episode, step = self._frames_of(epoch, number)[offset - starts[number]]
        return (epoch, number), int(episode), int(step)

    def episodes(self, epoch: int, number: int) -> np.ndarray:
        """Return the episodes of a pool, int [≤ pool]."""
        order, _ = self._episodes_of(epoch)
        return order[number * self.pool : (number + 1) * self.pool]

    def following(self, epoch: int, number: int) -> tuple[int, int]:
        """Return the pool that comes after a pool."""
        last = (number + 1) * self.pool >= len(self.steps)
        return (epoch + 1, 0) if last else (epoch, number + 1)

    def _permute(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (episodes in this epoch's order, position at which each pool starts)."""
        rng = np.random.default_rng((*self._key, _EPISODES, epoch))
        order = rng.permutation(len(self.steps))
        ends = np.cumsum(self.steps[order])
        starts = np.concatenate([[0], ends[self.pool - 1 :: self.pool]])
        return order, starts[: -(-len(order) // self.pool)]

    def _mix(self, epoch: int, number: int) -> np.ndarray:
        """Return (episode, step) of a pool's frames in their order, int [frames, 2]."""
        members = self.episodes(epoch, number)
        frames = np.concatenate(
            [np.stack([np.full(self.steps[e], e), np.arange(self.steps[e])], 1) for e in members]
        )
        rng = np.random.default_rng((*self._key, _FRAMES, epoch, number))
        return frames[rng.permutation(len(frames))]


class Pool:
    """The episodes in memory: those of the present pool, and of the next one as they arrive."""

    def __init__(
        self, order: Order, load: Callable[[int], Episode], executor: ThreadPoolExecutor
    ) -> None:
        self.order, self._load, self._executor = order, load, executor
        self._held: dict[int, Future[Episode]] = {}
        self._present: tuple[int, int] | None = None

    def get(self, pool: tuple[int, int], episode: int) -> Episode:
        """Return an episode of a pool; asking for a new pool starts loading the one after it."""
        if pool != self._present:
            self._present = pool
            wanted = [int(e) for e in self.order.episodes(*pool)]
            wanted += [int(e) for e in self.order.episodes(*self.order.following(*pool))]
            # dict keeps what is there, so a dataset that fits into one pool is read once
            self._held = {
                e: self._held.get(e) or self._executor.submit(self._load, e)
                for e in dict.fromkeys(wanted)
            }
        return self._held[episode].result()

    def close(self) -> None:
        """Forget the episodes, and do not load those still waiting to be."""
        for future in self._held.values():
            future.cancel()
        self._held, self._present = {}, None


def choose_datasets(seed: int, batch: int, shares: np.ndarray, size: int) -> np.ndarray:
    """Return the dataset of each example of a batch, int [size]."""
    rng = np.random.default_rng((seed, _DATASETS, batch))
    return rng.choice(len(shares), size=size, p=shares)


def task_rng(seed: int, batch: int) -> np.random.Generator:
    """Return the generator of a batch's goals and dropout."""
    return np.random.default_rng((seed, _TASKS, batch))
