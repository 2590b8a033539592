"""How well the episodes are mixed: computed before training from the table of episodes, and stated.

A batch is mixed ideally if its frames are drawn from all episodes at once. A stream from disk holds
a pool of episodes instead, as large as data.pool and data.memory allow; the report compares both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from octolike.config import ConfigError
from octolike.data.pipeline.order import BLOCKS, WHOLE, EpisodeTable

# Bytes in memory per byte of the mixed episodes: one more block is loaded ahead.
OVERHEAD = (BLOCKS + 1) / BLOCKS
# Below this share of the ideal number of distinct episodes, the report is a warning.
ENOUGH = 0.8
# By default: rows of a batch per lane, the largest number of lanes, the smallest pool (episodes).
LANE_ROWS, MAX_LANES, MIN_POOL = 4, 128, 512


def number_of_lanes(batch_size: int, lanes: int = 0, pool: int = 0) -> int:
    """Return `lanes` or, for 0, a power of two that divides the batch size.

    By default, a lane has at least LANE_ROWS rows of a batch and one episode of the pool (0: any
    number). It must not depend on the hosts, or the batches would. Raises ConfigError if `lanes`
    does not divide the batch size.
    """
    if lanes:
        if batch_size % lanes:
            raise ConfigError(
                f"data.lanes is {lanes}; expected a divisor of data.batch_size, {batch_size}"
            )
        return lanes
    lanes, most = 1, min(batch_size // LANE_ROWS, MAX_LANES, pool or batch_size)
    while batch_size % (2 * lanes) == 0 and 2 * lanes <= most:
        lanes *= 2
    return lanes


def default_pool(batch_size: int) -> int:
    """Return the number of episodes that are mixed by default: two per row of a batch or more."""
    return max(MIN_POOL, 2 * batch_size)


@dataclass(frozen=True)
class MixingReport:
    """The expected mixing of a stream.

    Attributes:
        episodes: mixed at a time; episode_bytes: in memory, with those loaded ahead.
        distinct, ideal_distinct: episodes in a batch.
        overlap, ideal_overlap: share of a batch's examples with an episode of the previous batch.
        bytes_per_batch: read from disk.
        limit: the setting that limits the pool; "" if all episodes are in it.
        remedy: the value of that setting for a pool of twice the batch size.
    """

    batch_size: int
    episodes: float
    episode_bytes: float
    distinct: float
    ideal_distinct: float
    overlap: float
    ideal_overlap: float
    bytes_per_batch: float
    limit: str
    remedy: str

    @property
    def is_poor(self) -> bool:
        """Whether a batch has too few distinct episodes."""
        return bool(self.limit) and self.distinct < ENOUGH * self.ideal_distinct

    def describe(self) -> str:
        """Return one line, and a warning with the remedy if the mixing is poor."""
        text = (
            f"mixing: a pool of about {self.episodes:,.0f} episodes "
            f"({self.episode_bytes / 2**20:,.0f} MiB of their chosen cameras, with those read "
            f"ahead); a batch of {self.batch_size} has about {self.distinct:.0f} distinct episodes "
            f"({self.ideal_distinct:.0f} without a pool), {self.overlap:.0%} of its examples share "
            f"one with the previous batch ({self.ideal_overlap:.0%}); it reads "
            f"{self.bytes_per_batch / 2**20:.3g} MiB"
        )
        if not self.is_poor:
            return text
        return (
            f"{text}\nWARNING: only {self.distinct / self.ideal_distinct:.0%} of the distinct "
            f"episodes that a batch would have without a pool, limited by {self.limit}: set "
            f"{self.remedy}"
        )


def report(
    table: EpisodeTable,
    repeats: np.ndarray,
    lengths: np.ndarray,
    *,
    batch_size: int,
    lanes: int,
    pool: int,
    budget: float,
) -> MixingReport:
    """Return the report of a stream.

    repeats: float [E], of each episode in an epoch; lengths: int [E], bytes on disk; lanes, pool,
    budget: as in order.FrameOrder.
    """
    used = repeats > 0
    steps, sizes, repeats, lengths = (x[used] for x in (table.steps, table.sizes, repeats, lengths))
    entries = repeats.sum()
    cost = np.maximum(lanes / pool, sizes * (lanes / budget))
    mean_size = (repeats * sizes).sum() / entries
    section = (repeats * cost).sum() / lanes  # its cost in a lane's memory for mixed blocks
    is_whole = section <= WHOLE
    blocks = max(math.ceil(section * BLOCKS), BLOCKS + 1)
    per_lane = entries / lanes * (1 if is_whole else BLOCKS / blocks)
    # The chance that one of a lane's rows in a batch is of an episode: long ones have more.
    mean = (repeats * steps).sum() / entries
    chance = np.minimum(steps / (mean * max(per_lane, 1.0)), 1.0)
    chosen = 1 - (1 - chance) ** (batch_size // lanes)
    share = repeats * steps / (repeats * steps).sum()
    new = 1 - (1 - share) ** batch_size
    distinct = per_lane * lanes * (repeats * chosen).sum() / entries
    by_memory = (sizes * (lanes / budget) > lanes / pool).mean() > 0.5
    target = 2 * batch_size
    remedy = f"data.pool to {target}"
    if by_memory:
        remedy = f"data.memory to at least {target * mean_size * OVERHEAD * 4 / 3 / 2**30:.2g}"
    limit = ("data.memory" if by_memory else "data.pool") if not is_whole else ""
    return MixingReport(
        batch_size=batch_size,
        episodes=per_lane * lanes,
        episode_bytes=per_lane * lanes * mean_size * (OVERHEAD if limit else 2),
        distinct=float(distinct if limit else min(distinct, new.sum())),
        ideal_distinct=float(new.sum()),
        overlap=float((share * chosen).sum()),
        ideal_overlap=float((share * new).sum()),
        bytes_per_batch=float((repeats * lengths).sum() / (repeats * steps).sum() * batch_size),
        limit=limit,
        remedy=remedy,
    )
