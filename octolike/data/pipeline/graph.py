"""The graph that makes batches: a tf.data.Dataset from the order of frames to decoded batches.

    batches = BatchGraph(config, supply, embodiments, settings)
    dataset = batches.dataset(segments, start=0, process=(0, 1))

A lane (order.py) is an iterator of its own:

    epochs → blocks to load → episodes read, parsed, joined → phases of BLOCKS blocks → rows

The lanes of this host are interleaved; their rows are decoded in parallel, the only expensive step,
and joined to batches. Everything is TensorFlow ops in private, bounded threads: no Python runs,
unless a dataset spec has a Python function of its own, and the dataset can be serialised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from octolike.config import DataConfig
from octolike.data.pipeline import goals
from octolike.data.pipeline.dataset_split import JoinedSplits
from octolike.data.pipeline.episode_graph import EpisodeLoader, called, plain
from octolike.data.pipeline.example_graph import (
    BAD,
    MAX_STEPS,
    PARAPHRASE_DRAW,
    SUBTASKS,
    TEXT,
    ExampleGraph,
    Rows,
    join_blocks,
    next_good,
)
from octolike.data.pipeline.order import BLOCKS, FrameOrder, Segment, part_of_block
from octolike.embodiment import Embodiment
from octolike.types import unflatten

# The graph runs few, large functions: TensorFlow's rewriting of each takes seconds at the start and
# finds nothing to improve.
tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})

# The number of a batch, a leaf of the graph's elements that is not in the batch contract.
NUMBER = "batch_number"
GRAPH_LEAVES = (NUMBER, TEXT, SUBTASKS, PARAPHRASE_DRAW, BAD)
_ENDLESS = 1 << 62
_GROUP = 16  # rows of a lane that are collected at the same time
_READ_AHEAD = 2  # episodes of a block that are read at the same time


@dataclass(frozen=True)
class StreamSettings:
    """The settings of one stream.

    Attributes:
        batch_size: examples of a batch over all hosts.
        lanes: number over all hosts.
        seed: seed of the order and of all draws.
        dropout: drop conditioning and vary the wording of instructions, as in training.
        pool: maximum number of episodes that are mixed; budget: their maximum bytes.
        threads: number that decode at the same time; prefetch: batches made ahead.
    """

    batch_size: int
    lanes: int
    seed: int
    dropout: bool
    pool: int
    budget: float
    threads: int
    prefetch: int


class SegmentSpan(NamedTuple):
    """A segment of the batches with constant shares: `length` batches from `first`; −1: endless."""

    first: int
    length: int
    shares: np.ndarray


class Block(NamedTuple):
    """A block of a lane's section, and the phase that its loading begins; tensors int64.

    Attributes:
        place: (start of the segment, epoch, lane), [] each.
        number: []; blocks: [], the number of blocks that a phase mixes.
        phase: [], −1 while the blocks of the first phase are loaded.
        skip: [], rows of the phase that lie before the start of the stream.
        episodes: [n]; views: [n], the numbers that select one of the views of each.
        which, step: [F], the frames in the order of use: index in `episodes`, step of the episode.
    """

    place: tuple[tf.Tensor, tf.Tensor, tf.Tensor]
    number: tf.Tensor
    blocks: tf.Tensor
    phase: tf.Tensor
    skip: tf.Tensor
    episodes: tf.Tensor
    views: tf.Tensor
    which: tf.Tensor
    step: tf.Tensor


class BatchGraph:
    """Builds the tf.data graph of a stream over the episodes of several splits."""

    def __init__(
        self,
        config: DataConfig,
        supply: JoinedSplits,
        embodiments: Sequence[Embodiment],
        settings: StreamSettings,
    ) -> None:
        self._settings = settings
        self._traced: dict[tuple[int, bool], Any] = {}
        self.order = FrameOrder(
            supply.table,
            seed=settings.seed,
            batch_size=settings.batch_size,
            lanes=settings.lanes,
            pool=settings.pool,
            budget=settings.budget,
        )
        self._loader = EpisodeLoader(
            supply,
            tuple(config.cameras),
            tuple(config.depth),
            action_dim=max(len(e.learned) for e in embodiments),
            proprio_dim=max((len(e.proprio) for e in embodiments if e.proprio), default=0),
            chunks=config.horizon if any(e.transform for e in embodiments) else 0,
            subtasks=config.subtasks,
            closings=config.closings,
        )
        self._examples = ExampleGraph(
            config,
            supply,
            self._loader,
            embodiments,
            dropout=settings.dropout,
        )

    def dataset(
        self,
        spans: Sequence[SegmentSpan],
        start: int,
        process: tuple[int, int] = (0, 1),
        *,
        decode: bool = True,
    ) -> tf.data.Dataset:
        """Return the batches from number `start` on, as nested dicts of tensors.

        spans: consecutive segments; `start` lies in the first one. process: (index, count) of this
        host, which gets the rows of its lanes. decode: else the dataset ends before the images are
        decoded, with leaves [lanes, rows, ...] as in ExampleGraph.gather.
        """
        index, count = process
        lanes = self.order.lanes // count
        threads = self._settings.threads
        if (lanes, decode) not in self._traced:
            self._traced[lanes, decode] = called(partial(self._batches, lanes, decode))
        batches = self._traced[lanes, decode](
            self._positions(spans, start),
            tf.constant(index * lanes, tf.int64),
            tf.constant(start, tf.int64),
        )
        return batches.prefetch(self._settings.prefetch).with_options(_options(threads + 2))

    def _batches(
        self,
        lanes: int,
        decode: bool,
        positions: Any,
        first_lane: tf.Tensor,
        start: tf.Tensor,
    ) -> tf.data.Dataset:
        """Return the batches of `lanes` lanes; traced once, so that a stream restarts quickly."""
        segments = tf.data.Dataset.from_tensor_slices(positions)
        rows = tf.data.Dataset.range(first_lane, first_lane + lanes).interleave(
            plain(lambda lane: self._lane(segments, lane)), cycle_length=lanes, block_length=1
        )
        if not decode:
            return rows.batch(lanes, drop_remainder=True)
        threads = self._settings.threads
        parts = _parts(lanes, threads)
        decoded = rows.batch(lanes // parts, drop_remainder=True).map(
            plain(called(self._decode)), num_parallel_calls=threads, deterministic=True
        )
        if parts > 1:
            joined = decoded.batch(parts, drop_remainder=True, num_parallel_calls=2)
            decoded = joined.map(plain(called(_join_leading_axes)))
        numbered = tf.data.Dataset.zip((tf.data.Dataset.range(start, _ENDLESS), decoded))
        return numbered.map(plain(lambda number, leaves: unflatten(leaves | {NUMBER: number})))

    def examples(self, frames: np.ndarray, draws: np.ndarray) -> dict[str, tf.Tensor]:
        """Return the leaves of the given frames.

        frames: int [n, 2], episode and step; draws: float64 [n, goals.DRAWS].
        """
        distinct, which = np.unique(frames[:, 0], return_inverse=True)
        first = tf.constant(0, tf.int64)
        blocks = [self._loader.load(tf.constant(e, tf.int64), first) for e in distinct.tolist()]
        pool = join_blocks(blocks)
        base = tf.gather(pool.starts, which)
        episode, step = (tf.constant(frames[:, i], tf.int64) for i in range(2))
        good = tf.gather(pool.good, base + step)
        row = episode * MAX_STEPS + step
        views = tf.zeros_like(episode)
        rows = Rows(episode, step, base, views, tf.where(good, -1, row), good, tf.constant(draws))
        return self._examples.decode(self._examples.gather(pool, rows), lane_rows=1)

    def _positions(self, spans: Sequence[SegmentSpan], start: int) -> Any:
        """Return (segment, first epoch, batches skipped in it, batches) of each segment."""
        segments, epochs, skipped, counts = [], [], [], []
        for span in spans:
            segment = self.order.segment(span.first, span.shares)
            batch = max(start - span.first, 0)
            epoch = self.order.epoch_at(segment, batch)
            segments.append(segment)
            epochs.append(epoch)
            skipped.append(batch - int(self.order.first_batch(segment, epoch)))
            counts.append(span.length - batch if span.length >= 0 else -1)
        stacked = Segment(*(tf.stack(x) for x in zip(*segments, strict=True)))
        arrays = [tf.constant(x, tf.int64) for x in (epochs, skipped, counts)]
        return stacked, *arrays

    def _lane(self, positions: tf.data.Dataset, lane: tf.Tensor) -> tf.data.Dataset:
        """Return the endless rows of a lane, still encoded, in groups of the rows per batch."""

        def segment_rows(
            segment: Segment, epoch: tf.Tensor, skipped: tf.Tensor, batches: tf.Tensor
        ) -> tf.data.Dataset:
            epochs = tf.data.Dataset.range(epoch, _ENDLESS)
            blocks = epochs.flat_map(
                plain(
                    lambda e: self._blocks(
                        segment, e, lane, tf.where(e == epoch, skipped * self.order.rows, 0)
                    )
                )
            )
            # Loaded ahead across epochs: one block for the next phase.
            loaded = blocks.flat_map(plain(self._load)).prefetch(1)
            pools = loaded.scan(self._no_blocks(), plain(_push))
            rows = pools.flat_map(plain(self._phase)).rebatch(self.order.rows)
            return rows.take(batches)

        return positions.flat_map(plain(segment_rows))

    def _blocks(
        self, segment: Segment, epoch: tf.Tensor, lane: tf.Tensor, skipped: tf.Tensor
    ) -> tf.data.Dataset:
        """Return the blocks of a lane's section in the order of loading.

        skipped: rows of the section that lie before the start of the stream.
        """
        section = self.order.lane_epoch(segment, epoch, lane)
        phases = tf.size(section.rows, tf.int64)
        begins = tf.concat([[0], tf.cumsum(section.rows)], 0)
        begins = tf.cast(begins, tf.int64)
        current = tf.searchsorted(begins[1:], [skipped], side="right", out_type=tf.int64)[0]
        # The older blocks of the first phase are loaded before it; they are cyclic in the section.
        numbers = tf.range(current - tf.maximum(section.blocks - 1, 0), phases)

        def block(number: tf.Tensor) -> Block:
            i = number % tf.maximum(phases, 1)
            episodes = slice(section.splits[i], section.splits[i + 1])
            place = segment.start, epoch, lane
            which, step = self.order.block_frames(place, i, section.count[episodes])
            return Block(
                place=place,
                number=i,
                blocks=section.blocks,
                phase=tf.where(number >= current, number, -1),
                skip=tf.where(number == current, skipped - begins[current], 0),
                episodes=section.episodes[episodes],
                views=self._views(segment.start, epoch, section.episodes[episodes]),
                which=which,
                step=step + tf.gather(section.first[episodes], which),
            )

        return tf.data.Dataset.from_tensor_slices(numbers).map(plain(block))

    def _load(self, block: Block) -> tf.data.Dataset:
        """Return one element: a block and its episodes, one after the other."""
        total = tf.reduce_sum(tf.gather(self._loader.steps, block.episodes))
        episodes = tf.data.Dataset.from_tensor_slices((block.episodes, block.views))
        loaded = episodes.map(
            plain(self._loader.load), num_parallel_calls=_READ_AHEAD, deterministic=True
        ).rebatch(total)
        return tf.data.Dataset.zip((tf.data.Dataset.from_tensors(block), loaded))

    def _phase(self, *pool: Any) -> tf.data.Dataset:
        """Return the rows of the phase that the newest block begins, oldest block first."""
        newest: Block = pool[-1][0]
        joined = join_blocks([tensors for _, tensors in pool])
        parts = [
            self._rows_of_block(block, joined.starts[len(pool) - 1 - age], age, newest)
            for age, (block, _) in enumerate(reversed(pool))
        ]
        episode, step, base = (tf.concat(x, 0) for x in zip(*parts, strict=True))
        count = tf.size(episode)
        order, draws = self.order.mix(newest.place, newest.phase, count, goals.DRAWS)
        episode, step, base = (tf.gather(x, order) for x in (episode, step, base))
        good = tf.gather(joined.good, base + step)
        index = next_good(good)
        bad = tf.where(good, tf.constant(-1, tf.int64), episode * MAX_STEPS + step)
        episode, step, base = (tf.gather(x, index) for x in (episode, step, base))
        views = self._views(*newest.place[:2], episode)
        rows = Rows(episode, step, base, views, bad, tf.gather(good, index), draws)
        rows = Rows(*(x[newest.skip :] for x in rows))
        groups = tf.data.Dataset.from_tensor_slices(rows).batch(max(self.order.rows, _GROUP))
        return groups.map(plain(lambda group: self._examples.gather(joined, group)))

    def _views(self, start: tf.Tensor, epoch: tf.Tensor, episodes: tf.Tensor) -> tf.Tensor:
        if self._loader.views == 1:
            return tf.zeros_like(episodes)
        return self.order.views(start, epoch, episodes)

    def _rows_of_block(
        self, block: Block, start: tf.Tensor, age: int, newest: Block
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Return (episode, step, base) of the rows that a block of an age adds to a phase."""
        frames = tf.size(block.which, tf.int64)
        begin, end = part_of_block(frames, tf.constant(age, tf.int64), newest.blocks)
        used = (age < newest.blocks) & (newest.phase >= 0)
        part = slice(begin, tf.where(used, end, begin))
        which = block.which[part]
        steps = tf.gather(self._loader.steps, block.episodes)
        base = start + tf.gather(tf.cumsum(steps, exclusive=True), which)
        return tf.gather(block.episodes, which), block.step[part], base

    def _no_blocks(self) -> Any:
        """Return the state before any block is loaded: BLOCKS − 1 empty blocks."""
        zero, none = tf.constant(0, tf.int64), tf.zeros([0], tf.int64)
        block = Block((zero,) * 3, zero, zero, zero - 1, zero, none, none, none, none)
        return ((block, self._loader.no_steps()),) * (BLOCKS - 1)

    def _decode(self, encoded: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Return the examples of encoded rows [lanes, rows, ...]."""
        return self._examples.decode(_join_leading_axes(encoded), self.order.rows)


def _parts(lanes: int, threads: int) -> int:
    """Return in how many parts a batch is decoded: about two batches are decoded at a time.

    Each part has the same number of lanes. With few threads, a batch is decoded as a whole, which
    saves the copy that joins the parts.
    """
    return next(
        n for n in range(1, lanes + 1) if lanes % n == 0 and (2 * n >= threads or n == lanes)
    )


def _join_leading_axes(leaves: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Return leaves [n, m, ...] as [n · m, ...]."""
    joined = {}
    for path, x in leaves.items():
        joined[path] = tf.reshape(x, tf.concat([[-1], tf.shape(x)[2:]], 0))
        if x.shape[0] and x.shape[1]:
            joined[path].set_shape((x.shape[0] * x.shape[1], *x.shape[2:]))
        else:
            joined[path].set_shape((None, *x.shape[2:]))
    return joined


def _push(state: Any, element: Any) -> tuple[Any, Any]:
    """Return (the newest BLOCKS − 1 blocks, the newest BLOCKS blocks), oldest first.

    A section of a single block keeps no older ones.
    """
    pool = (*state, element)
    block = element[0]
    none = tf.nest.map_structure(lambda x: x[:0] if x.shape.rank else x, element)
    older = tf.cond(block.blocks > 1, lambda: pool[1:], lambda: (none,) * len(state))
    return older, pool


def _options(threads: int) -> tf.data.Options:
    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1
    options.autotune.enabled = False
    # Rewriting this graph takes seconds at each start and finds nothing to improve.
    options.experimental_optimization.apply_default_optimizations = False
    options.deterministic = True
    return options
