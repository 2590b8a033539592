"""The order of frames by its definition, as arrays: without records, and without the graph."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from octolike.data.pipeline.order import EpisodeTable, FrameOrder, Segment, part_of_block


def an_order(steps, *, groups=None, seed=0, batch_size=8, lanes=2, pool=10**6, budget=1e12):
    """Return an order of episodes of 10 bytes per step."""
    steps = np.array(steps)
    groups = np.zeros(len(steps), int) if groups is None else np.array(groups)
    table = EpisodeTable(steps=steps, sizes=10 * steps, groups=groups)
    settings = {"seed": seed, "batch_size": batch_size, "lanes": lanes}
    return FrameOrder(table, **settings, pool=pool, budget=budget)


class Section(NamedTuple):
    """The section of a lane in an epoch, as arrays.

    blocks: the frames [F, 2] of each block, in the order of the section; mixed: the indices of the
    blocks of each phase; rows: the frames [R, 2] in the order of use.
    """

    blocks: list
    mixed: list
    rows: np.ndarray


@lru_cache(maxsize=4)
def traced(order: FrameOrder) -> tuple:
    """Return (lane_epoch, block_frames, mix) as functions that run quickly many times."""
    number = tf.TensorSpec((), tf.int64)
    place = (number,) * 3
    segment = Segment(number, tf.TensorSpec((None,), tf.float64))

    def trace(function, *signature):
        return tf.function(function, signature, autograph=False)

    return (
        trace(order.lane_epoch, segment, number, number),
        trace(order.block_frames, place, number, tf.TensorSpec((None,), tf.int64)),
        trace(lambda *x: order.mix(*x, draws=1), place, number, tf.TensorSpec((), tf.int64)),
    )


def section_of(order, segment, epoch, lane) -> Section:
    """Return a lane's section by the definition of blocks and phases."""
    place = segment.start, *(tf.constant(x, tf.int64) for x in (epoch, lane))
    lane_epoch, block_frames, mix = traced(order)
    section = lane_epoch(segment, *place[1:])
    splits, many = section.splits.numpy(), int(section.blocks)
    blocks, used = [], []
    for i in range(len(splits) - 1):
        part = slice(splits[i], splits[i + 1])
        which, step = block_frames(place, tf.constant(i, tf.int64), section.count[part])
        episode = section.episodes.numpy()[part][which.numpy()]
        frames = np.stack([episode, step + section.first.numpy()[part][which.numpy()]], axis=1)
        blocks.append(frames)
        bounds = [part_of_block(len(frames), use, many) for use in range(many)]
        used.append([frames[begin:end] for begin, end in bounds])
    rows, mixed = [np.zeros((0, 2), int)], []
    for phase in range(len(blocks)):
        mixed.append([(phase - age) % len(blocks) for age in range(many)])
        frames = np.concatenate([used[b][age] for age, b in enumerate(mixed[-1])])
        assert len(frames) == section.rows[phase]
        permutation, draws = mix(
            place, tf.constant(phase, tf.int64), tf.constant(len(frames), tf.int64)
        )
        assert draws.shape == (len(frames), 1)
        rows.append(frames[permutation.numpy()])
    return Section(blocks, mixed, np.concatenate(rows))


def batches_of(order, segment, epochs) -> np.ndarray:
    """Return the frames of the batches of some epochs, int [batches, B, 2]."""
    result = []
    for epoch in epochs:
        sections = [section_of(order, segment, epoch, i) for i in range(order.lanes)]
        rows = [s.rows.reshape(-1, order.rows, 2) for s in sections]
        result.append(np.concatenate(rows, axis=1))
    return np.concatenate(result)


def whole(order):
    """Return the segment from batch 0 with one repetition of every episode per epoch."""
    return order.segment(0, np.ones(1))
