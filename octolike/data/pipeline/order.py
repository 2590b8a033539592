"""The order of frames: an endless, resumable sequence, computed by TensorFlow ops in the graph.

Each epoch permutes the episodes of all datasets, repeated in proportion to the shares of their
groups; the frames of the permuted episodes form one line. A fixed number of lanes, owned by hosts,
share it: in each batch, a lane supplies the same number of rows, and in an epoch it walks along its
own section of the line. So the batches are equal for any number of hosts, and each host reads only
the episodes of its lanes.

    epoch line:  e7 e2 e9 e1 | e4 e7 e8 e3 | ...     one section per lane
    a lane:      [e4 e7] [e8 e3] [e5 e6] ...         blocks of consecutive episodes
    a phase:     frames drawn from the newest block and the BLOCKS − 1 blocks before it

In each phase, a lane mixes the frames of its newest blocks: each frame of a block belongs to one of
the BLOCKS phases in which the block is in memory. Blocks are cyclic within an epoch, so a lane
visits each frame of its section exactly once per epoch. Shares are constant within a segment of the
batches. Batch n is a pure function of (seed, segment, n): resuming is arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import tensorflow as tf

# A lane mixes the frames of this many blocks; one more is loaded ahead.
BLOCKS = 4
# A section is one block if it fits, with the next epoch's, into the memory of all these blocks.
WHOLE = (BLOCKS + 1) / (2 * BLOCKS)
# Separate random streams.
_PHASES, _EPISODES, _FRAMES, _MIX, _DRAWS = range(_STREAMS := 5)
_VIEWS = "views"  # and one that hashes texts

# Different numbers that select one of an episode's views.
VIEWS = 1 << 20
# Of the hash that derives seeds: odd, so that the product modulo 2^64 keeps all differences.
_MULTIPLIER = 6364136223846793005


@dataclass(frozen=True, eq=False)
class EpisodeTable:
    """The E episodes of all datasets, int64 [E] each.

    steps: usable steps; sizes: bytes in memory; groups: index of the sampling group.
    """

    steps: np.ndarray
    sizes: np.ndarray
    groups: np.ndarray


class LaneEpoch(NamedTuple):
    """The section of one lane in one epoch: n episodes in m blocks, tensors int64.

    episodes, first, count: [n], the first step and the number of steps of each episode that belong
        to the section (its first and last episode may be shared with a neighbour).
    splits: [m + 1], the episodes of block i are splits[i] to splits[i + 1].
    rows: [m], the rows of each phase; blocks: [], the blocks that a phase mixes.
    """

    episodes: tf.Tensor
    first: tf.Tensor
    count: tf.Tensor
    splits: tf.Tensor
    rows: tf.Tensor
    blocks: tf.Tensor


class Segment(NamedTuple):
    """Consecutive batches with constant shares.

    start: int64 [], their first batch; a different start gives a different order.
    repeats: float64 [G], the repetitions of the episodes of each group in an epoch.
    """

    start: tf.Tensor
    repeats: tf.Tensor


class FrameOrder:
    """The endless order of frames."""

    def __init__(
        self,
        table: EpisodeTable,
        *,
        seed: int,
        batch_size: int,
        lanes: int,
        pool: int,
        budget: float,
    ) -> None:
        """Set the sizes of lanes and blocks.

        Args:
            table: the episodes.
            seed: the run's seed.
            batch_size: rows of a batch over all hosts, a multiple of `lanes`.
            lanes: over all hosts.
            pool: maximum number of episodes that are mixed, over all lanes.
            budget: maximum bytes of these episodes, over all lanes.
        """
        self.lanes, self.rows = lanes, batch_size // lanes
        self._batch_size, self._seed, self._table = batch_size, seed, table
        cost = np.maximum(lanes / pool, table.sizes * (lanes / budget))
        self.steps = tf.constant(table.steps, tf.int64)
        self._cost = tf.constant(cost, tf.float64)
        self._groups = tf.constant(table.groups, tf.int64)
        self._phases = tf.constant(_spread_phases(table.groups, seed), tf.float64)

    def segment(self, start: int, shares: np.ndarray) -> Segment:
        """Return the segment from batch `start` with the shares of the groups, float64 [G]."""
        repeats = repeats_of_groups(self._table, shares)
        return Segment(tf.constant(start, tf.int64), tf.constant(repeats, tf.float64))

    def first_batch(self, segment: Segment, epoch: tf.Tensor | int) -> tf.Tensor:
        """Return the batch with which an epoch begins, counted from the start, int64 []."""
        return self._batches(self._repeats_before(segment, epoch))

    def epoch_at(self, segment: Segment, batch: int) -> int:
        """Return the epoch of a batch, counted from the start of the segment."""
        low, high = 0, 1
        while int(self.first_batch(segment, high)) <= batch:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (
                (middle, high) if int(self.first_batch(segment, middle)) <= batch else (low, middle)
            )
        return low

    def lane_epoch(self, segment: Segment, epoch: tf.Tensor, lane: tf.Tensor) -> LaneEpoch:
        """Return the section of a lane in an epoch; no episode if the epoch has no batch."""
        before = self._repeats_before(segment, epoch)
        after = self._repeats_before(segment, epoch + 1)
        entries = tf.repeat(tf.range(tf.size(self.steps)), after - before)
        entries = _shuffle(entries, self._derive(_EPISODES, segment.start, epoch))
        length = (self._batches(after) - self._batches(before)) * self.rows
        entries = _extend(entries, self.steps, length * self.lanes)
        ends = tf.cumsum(tf.gather(self.steps, entries))
        low, high = lane * length, (lane + 1) * length
        first = tf.searchsorted(ends, [low], side="right", out_type=tf.int64)[0]
        last = tf.searchsorted(ends, [high], side="left", out_type=tf.int64)[0]
        section = slice(first, tf.where(length > 0, last + 1, first))
        episodes, ends = tf.cast(entries[section], tf.int64), ends[section]
        steps = tf.gather(self.steps, episodes)
        skipped = tf.maximum(low - (ends - steps), 0)
        count = tf.minimum(ends, high) - (ends - steps) - skipped
        return self._divide(episodes, skipped, count)

    def block_frames(
        self, place: tuple[tf.Tensor, tf.Tensor, tf.Tensor], block: tf.Tensor, count: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Return (episode of the block, step within its section) in the order of use, int64 [F].

        place: (start of the segment, epoch, lane).
        """
        episode = tf.repeat(tf.range(tf.size(count, tf.int64)), count)
        step = tf.range(tf.size(episode, tf.int64)) - tf.gather(tf.cumsum(count) - count, episode)
        order = _shuffle(tf.range(tf.size(episode)), self._derive(_FRAMES, *place, block))
        return tf.gather(episode, order), tf.gather(step, order)

    def mix(
        self,
        place: tuple[tf.Tensor, tf.Tensor, tf.Tensor],
        phase: tf.Tensor,
        rows: tf.Tensor,
        draws: int,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Return (permutation of the rows of a phase [rows], draws in [0, 1) [rows, draws])."""
        order = _shuffle(tf.range(rows), self._derive(_MIX, *place, phase))
        seed = self._derive(_DRAWS, *place, phase)
        return order, tf.random.stateless_uniform(
            [rows, draws], seed, dtype=tf.float64, alg="philox"
        )

    def views(self, start: tf.Tensor, epoch: tf.Tensor, episodes: tf.Tensor) -> tf.Tensor:
        """Return a number below VIEWS for each episode [n] in an epoch of a segment, int64 [n]."""
        texts = tf.strings.format(
            f"{_VIEWS} {self._seed} {{}} {{}} ", (start, epoch)
        ) + tf.strings.as_string(episodes)
        return tf.strings.to_hash_bucket_fast(texts, VIEWS)

    def _divide(self, episodes: tf.Tensor, first: tf.Tensor, count: tf.Tensor) -> LaneEpoch:
        """Divide a section into blocks of similar cost, each of at least one episode."""
        ends = tf.cumsum(tf.gather(self._cost, episodes))
        total = tf.reduce_max(tf.concat([ends, [0.0]], 0))
        is_single = total <= WHOLE
        single = tf.ones_like(total)
        number = tf.where(
            is_single, single, tf.maximum(tf.math.ceil(total * BLOCKS), BLOCKS + single)
        )
        middle = ends - tf.gather(self._cost, episodes) / 2
        block = tf.cast(tf.minimum(middle / total * number, number - 1), tf.int64)
        _, block = tf.unique(block, out_idx=tf.int64)
        frames = tf.math.segment_sum(count, block)
        splits = tf.concat([[0], tf.cumsum(tf.math.segment_sum(tf.ones_like(count), block))], 0)
        blocks = tf.minimum(tf.size(frames, tf.int64), BLOCKS)
        parts = [
            tf.where(use < blocks, tf.roll(_part(frames, use, blocks), use, 0), 0)
            for use in range(BLOCKS)
        ]
        return LaneEpoch(episodes, first, count, splits, tf.add_n(parts), blocks)

    def _repeats_before(self, segment: Segment, epoch: tf.Tensor | int) -> tf.Tensor:
        """Return the repetitions of each episode before an epoch, int64 [E].

        The phases make the rounding fair: an episode with 0.3 repetitions per epoch appears in
        every third or fourth epoch, and each epoch has nearly as many episodes of each group.
        """
        repeats = tf.gather(segment.repeats, self._groups)
        value = repeats * tf.cast(epoch, tf.float64) + self._phases
        return tf.cast(tf.floor(value), tf.int64)

    def _batches(self, repeats: tf.Tensor) -> tf.Tensor:
        """Return the batches that hold the repetitions of each episode, int64 [], rounded up."""
        return -(-tf.reduce_sum(repeats * self.steps) // self._batch_size)

    def _derive(self, stream: int, start: tf.Tensor, *numbers: tf.Tensor) -> tf.Tensor:
        """Return the seed of a random stream, int64 [2]: (the run's, a hash of the numbers).

        start: first batch of the segment; with the stream it gives one number, different per pair.
        """
        value = (stream + _STREAMS * tf.cast(start, tf.int64)) * _MULTIPLIER
        for number in numbers:
            value = (value + tf.cast(number, tf.int64)) * _MULTIPLIER
        return tf.stack([tf.constant(self._seed, tf.int64), value])


def repeats_of_groups(table: EpisodeTable, shares: np.ndarray) -> np.ndarray:
    """Return the repetitions of the episodes of each group in an epoch, float64 [G].

    An epoch has as many frames as the groups with a share > 0 have steps.
    """
    steps = np.bincount(table.groups, table.steps, minlength=len(shares))
    per_step = np.divide(shares, steps, out=np.zeros(len(shares)), where=steps > 0)
    # rounded, so that one repetition per epoch is exactly one
    return np.round(per_step * steps[shares > 0].sum(), 9)


def part_of_block(frames: tf.Tensor, use: tf.Tensor, blocks: tf.Tensor) -> tuple:
    """Return (begin, end) of the frames of a block of F frames in its use-th phase, int64."""
    return frames * use // blocks, frames * (use + 1) // blocks


def _part(frames: tf.Tensor, use: int, blocks: tf.Tensor) -> tf.Tensor:
    begin, end = part_of_block(frames, tf.constant(use, tf.int64), blocks)
    return end - begin


def _shuffle(values: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    return tf.random.experimental.stateless_shuffle(values, seed, alg="philox")


def _extend(entries: tf.Tensor, steps: tf.Tensor, frames: tf.Tensor) -> tf.Tensor:
    """Return the entries, repeated until they have at least as many frames."""
    total = tf.maximum(tf.reduce_sum(tf.gather(steps, entries)), 1)
    return tf.tile(entries, [tf.maximum(tf.cast(-(-frames // total), tf.int32), 1)])


def _spread_phases(groups: np.ndarray, seed: int) -> np.ndarray:
    """Return a phase in [0, 1) per episode, evenly spread within each group, float64 [E]."""
    rng = np.random.default_rng((seed, _PHASES))
    shuffled = rng.permutation(len(groups))
    order = shuffled[np.argsort(groups[shuffled], kind="stable")]
    counts = np.bincount(groups)
    rank = np.arange(len(groups)) - (np.cumsum(counts) - counts)[groups[order]]
    phases = np.empty(len(groups))
    phases[order] = (rank + rng.random(len(counts))[groups[order]]) / counts[groups[order]]
    return phases
