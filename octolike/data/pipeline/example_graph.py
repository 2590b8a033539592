"""Rows to examples in the graph: windows, chunks, goals and conditioning, normalised and decoded.

`ExampleGraph.gather` collects the rows of one lane from the episodes in memory, images still
encoded; `decode` turns them into the leaves of a batch. Both are TensorFlow graph code. An image
that occurs several times in a call is decoded once.

A row of a bad record, or with an image that cannot be decoded, is replaced by the next good row of
its lane, and the leaf `bad` names it. The replacement depends only on the data and the row's place
in the order, so a resumed stream makes the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow.experimental.numpy as tnp

from octolike.config import DataConfig
from octolike.data.pipeline import closings, goals, windows
from octolike.data.pipeline.dataset_split import JoinedSplits
from octolike.data.pipeline.episode_graph import EpisodeLoader, EpisodeTensors, first_without_error
from octolike.data.rlds import decode
from octolike.embodiment import Embodiment
from octolike.representation import encode_rows

# A row is named by one number: episode · MAX_STEPS + step.
MAX_STEPS = 1 << 24

# Leaves of the graph that are not in the batch contract: the instruction as text, the draw that
# selects a paraphrase, and the rows that were replaced (−1: none).
TEXT, PARAPHRASE_DRAW, BAD = "text", "paraphrase_draw", "bad"
SUBTASKS = "subtasks"  # texts [n, W], with data.subtasks


class Rows(NamedTuple):
    """n rows of a phase, tensors [n].

    base: int64, the position of the episode's first step among the steps in memory.
    views: int64, the number that selects one of the episode's views.
    bad: int64, the row that was replaced by this one, −1 for none.
    valid: bool, False if no good row could replace it.
    draws: float64 [n, goals.DRAWS].
    """

    episode: tf.Tensor
    step: tf.Tensor
    base: tf.Tensor
    views: tf.Tensor
    bad: tf.Tensor
    valid: tf.Tensor
    draws: tf.Tensor


class Pool(NamedTuple):
    """The blocks in memory, oldest first: `images` per block; the other arrays concatenated.

    starts: int64 [blocks], the position of each block's first step.
    """

    images: tuple[tf.Tensor, ...]
    starts: tf.Tensor
    action: tf.Tensor
    proprio: tf.Tensor
    texts: tf.Tensor
    subtasks: tf.Tensor
    closings: tf.Tensor
    good: tf.Tensor


def join_blocks(blocks: Sequence[EpisodeTensors]) -> Pool:
    """Return the pool of some blocks; encoded images are not copied."""
    sizes = tf.stack([tf.size(b.good, tf.int64) for b in blocks])
    joined = [tf.concat(x, 0) for x in zip(*(b[1:] for b in blocks), strict=True)]
    return Pool(tuple(b.images for b in blocks), tf.cumsum(sizes, exclusive=True), *joined)


class ExampleGraph:
    """Makes examples of the episodes of several splits."""

    def __init__(
        self,
        config: DataConfig,
        supply: JoinedSplits,
        loader: EpisodeLoader,
        embodiments: Sequence[Embodiment],
        *,
        dropout: bool,
    ) -> None:
        """dropout: drop conditioning and vary the wording of instructions, as in training."""
        self._config, self._loader, self._dropout = config, loader, dropout
        self._has_goals = config.goal != "none"
        sources = supply.sources
        self._number = tf.constant([s.number for s in sources], tf.int32)
        self._record = tf.constant([s.record for s in sources], tf.int32)
        self._task = tf.constant(np.concatenate([s.tasks for s in sources]), tf.int32)
        self._has_task = tf.constant(np.concatenate([s.has_task for s in sources]))
        self._action_dims, self._affine_action, self._action_limit = _affine(embodiments, "action")
        self._proprio_dims, self._affine_proprio, self._proprio_limit = _affine(
            embodiments, "proprio"
        )
        self._state_transforms = [e.state_transform for e in embodiments]
        self._proprio_widths = [(n := len(e.proprio or ()), n) for e in embodiments]
        self._swapped = np.array(
            [[c in s.reader.channels.swapped for c in config.cameras] for s in sources]
        )
        columns = [closings.position_columns(e.proprio) for e in embodiments]
        self._position = tf.constant(columns, tf.int32)
        self._depth_unit = tf.constant([s.spec.depth_unit for s in sources], tf.float32)

    def gather(self, pool: Pool, rows: Rows) -> dict[str, tf.Tensor]:
        """Return the leaves of n rows, and their encoded images.

        "images": string [n, W (+ 1 for the goal), C + D]; "frames": int64 [n, W (+ 1)], a number
        for each (episode, step), −1 for a goal image that is not used.
        """
        d = self._config
        episode, t = rows.episode, rows.step
        length = tf.gather(self._loader.steps, episode)
        has_image = self._loader.has_image(episode, rows.views)
        text = self._wording(tf.gather(pool.texts, rows.base + t), rows.draws)
        task = goals.choose(
            rows.draws,
            t,
            length,
            strategy=d.goal,
            # Without dropout, too, an example must not show both if none in training does.
            keep_language=d.keep_language if self._dropout or d.exclusive else 1.0,
            keep_goal=d.keep_goal if self._dropout or d.exclusive else 1.0,
            exclusive=d.exclusive,
            keep_task_id=d.keep_task_id if self._dropout else 1.0,
            has_language=tf.strings.length(text) > 0,
            has_goal=tf.reduce_any(has_image, axis=1),
            has_task_id=tf.gather(self._has_task, episode) & d.task_ids,
            xp=tnp,
        )
        steps, in_episode = windows.window_steps(t, d.window, tnp)
        leaves = self._numbers(pool, rows, task, steps, length)
        leaves |= {
            "observation.timestep_mask": in_episode,
            "task.present.language": task.language,
            "task.task_id": tf.gather(self._task, episode),
            "task.present.task_id": task.task_id,
            TEXT: tf.where(task.language, text, ""),
            PARAPHRASE_DRAW: rows.draws[:, goals.PARAPHRASE],
            BAD: rows.bad,
        }
        if d.subtasks:
            subtasks = tf.gather(pool.subtasks, rows.base[:, None] + steps)
            subtasks = tf.where(tf.strings.length(subtasks) > 0, subtasks, text[:, None])
            leaves[SUBTASKS] = tf.where(in_episode & task.language[:, None], subtasks, "")
        if d.closings:
            end = tf.where(task.goal, task.step, length)
            leaves |= self._closings(pool, rows, steps, in_episode, end)
        for i, camera in enumerate(d.cameras):
            leaves |= self._presence(f"image_{camera}", has_image[:, i])
            if self._has_goals:
                leaves[f"task.present.image_{camera}"] = has_image[:, i] & task.goal
        has_depth = tf.gather(self._loader.has_depth, episode)
        for i, camera in enumerate(d.depth):
            leaves |= self._presence(f"depth_{camera}", has_depth[:, i])
        return leaves | self._encoded_images(pool, rows, task, steps)

    def decode(self, example: dict[str, tf.Tensor], lane_rows: int) -> dict[str, tf.Tensor]:
        """Return the leaves of n rows with decoded images; bad rows are replaced.

        lane_rows: consecutive rows of one lane, a divisor of n.
        """
        images, frames = example.pop("images"), example.pop("frames")
        if not images.shape[2]:
            return example
        source = tf.gather(self._loader.source, frames[:, 0] // MAX_STEPS)
        pixels, good = first_without_error(
            (images, frames, source), self._pixels, self._checked_pixels
        )
        current = frames[:, self._config.window - 1]
        return tf.cond(
            tf.reduce_all(good),
            lambda: example | pixels,
            lambda: _replace_bad_rows(example | pixels, good, current, lane_rows),
        )

    def _numbers(
        self, pool: Pool, rows: Rows, task: goals.TaskChoice, steps: tf.Tensor, length: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        d = self._config
        end = tf.where(task.goal, task.step, length)
        chunk, in_chunk = windows.chunk_steps(rows.step, d.window, d.horizon, length, end, tnp)
        source = tf.gather(self._loader.source, rows.episode)
        record = tf.gather(self._record, source)
        dims = tf.gather(self._action_dims, record)[:, None, None]
        valid = (in_chunk & rows.valid[:, None, None])[..., None] & dims
        has_chunks = pool.action.shape.rank == 3
        index = rows.base[:, None] + steps if has_chunks else rows.base[:, None, None] + chunk
        action = tf.gather(pool.action, index)
        leaves = {
            "action": _normalized(action, record, self._affine_action, self._action_limit),
            "action_mask": valid,
            "dataset": tf.gather(self._number, source),
            "embodiment": record,
        }
        if d.use_proprio and self._proprio_dims.shape[1]:
            present = tf.reduce_any(tf.gather(self._proprio_dims, record), axis=1)
            proprio = tf.gather(pool.proprio, rows.base[:, None] + steps)
            normalized = _normalized(proprio, record, self._affine_proprio, self._proprio_limit)
            leaves["observation.proprio"] = encode_rows(
                self._state_transforms, self._proprio_widths, normalized, proprio, record, tnp
            )
            leaves |= self._presence("proprio", present)
        return leaves

    def _closings(
        self, pool: Pool, rows: Rows, steps: tf.Tensor, in_episode: tf.Tensor, end: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """Return the label of each slot; end: int64 [n], the first step that is not looked at."""
        base = rows.base[:, None]
        closing = tf.gather(pool.closings, base + steps)
        mask = in_episode & rows.valid[:, None] & (closing >= 0) & (closing < end[:, None])
        ahead = tf.where(mask, closing, steps)
        change = tf.gather(pool.proprio, base + ahead) - tf.gather(pool.proprio, base + steps)
        record = tf.gather(self._record, tf.gather(self._loader.source, rows.episode))
        columns = tf.gather(self._position, record)
        position = tf.gather(change, columns, axis=2, batch_dims=1)
        return {"closing.position": position, "closing.mask": mask}

    def _presence(self, key: str, present: tf.Tensor) -> dict[str, tf.Tensor]:
        repeated = tf.repeat(present[:, None], self._config.window, axis=1)
        return {f"observation.present.{key}": repeated}

    def _wording(self, options: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
        """Return one of the K instructions of each row, string [n]; without dropout the first."""
        count = options.shape[1]
        if count == 1:
            return options[:, 0]
        repeated = tf.stack(
            [tf.reduce_any(options[:, i : i + 1] == options[:, :i], 1) for i in range(count)], 1
        )
        usable = (tf.strings.length(options) > 0) & ~repeated
        number = tf.cast(tf.reduce_sum(tf.cast(usable, tf.int32), axis=1), tf.float64)
        chosen = tf.floor(draws[:, goals.WORDING] * number) if self._dropout else 0.0 * number
        rank = tf.cumsum(tf.cast(usable, tf.float64), axis=1) - 1
        is_chosen = usable & (rank == chosen[:, None])
        index = tf.argmax(tf.cast(is_chosen, tf.int32), axis=1)
        return tf.where(number > 0, tf.gather(options, index, batch_dims=1), "")

    def _encoded_images(
        self, pool: Pool, rows: Rows, task: goals.TaskChoice, steps: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        if self._has_goals:
            steps = tf.concat([steps, task.step[:, None]], axis=1)
        position = rows.base[:, None] + steps
        frames = rows.episode[:, None] * MAX_STEPS + steps
        unused = tf.zeros_like(steps, tf.bool)
        if self._has_goals:
            is_goal = tf.range(tf.shape(steps)[1]) == tf.shape(steps)[1] - 1
            unused = ~task.goal[:, None] & is_goal
            frames = tf.where(unused, tf.constant(-1, tf.int64), frames)
        images = _gather_images(pool, tf.reshape(position, [-1]), tf.reshape(unused, [-1]))
        images = tf.reshape(images, tf.concat([tf.shape(steps), tf.shape(images)[1:]], 0))
        return {"images": images, "frames": frames}

    def _pixels(self, images: tf.Tensor, frames: tf.Tensor, source: tf.Tensor) -> Any:
        """Return (leaves of the decoded images, bool [n] all True); an error for a bad image."""
        leaves = self._image_leaves(images, frames, source)
        return leaves, tf.ones([tf.shape(frames)[0]], tf.bool)

    def _checked_pixels(self, images: tf.Tensor, frames: tf.Tensor, source: tf.Tensor) -> Any:
        """Return (leaves of the decoded images, bool [n] whether a row's images are good)."""
        shape, depth = tf.shape(images), len(self._config.depth)
        flat = tf.reshape(images, [-1, images.shape[2]])
        good = [
            _can_decode(flat[:, i], depth=i >= flat.shape[1] - depth) for i in range(flat.shape[1])
        ]
        good = tf.reshape(tf.stack(good, axis=1), shape)
        rows = tf.reduce_all(good, axis=[1, 2])
        return self._image_leaves(tf.where(good, images, ""), frames, source), rows

    def _image_leaves(
        self, images: tf.Tensor, frames: tf.Tensor, source: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """Return the decoded images of n rows; each distinct frame is decoded once."""
        d, rows, columns = self._config, tf.shape(frames)[0], frames.shape[1]
        numbers, inverse = tf.unique(tf.reshape(frames, [-1]))
        position = tf.range(tf.size(inverse))
        first = tf.math.unsorted_segment_min(position, inverse, tf.size(numbers)) * images.shape[2]
        encoded = tf.reshape(images, [-1])
        inverse = tf.reshape(inverse, [rows, columns])
        window = tf.reshape(inverse[:, : d.window], [-1])
        leaves: dict[str, tf.Tensor] = {}
        for i, (camera, side) in enumerate(d.cameras.items()):
            array = decode.DecodedImages(encoded, first + i, side, d.resize)
            pixels = tf.reshape(array.gather(window), [rows, d.window, side, side, 3])
            leaves[f"observation.image_{camera}"] = self._in_rgb(pixels, i, source)
            if self._has_goals:
                goal = array.gather(inverse[:, d.window])
                leaves[f"task.image_{camera}"] = self._in_rgb(goal, i, source)
        for i, (camera, side) in enumerate(d.depth.items(), start=len(d.cameras)):
            array = decode.DecodedImages(encoded, first + i, side, d.resize, depth=True)
            depth = tf.reshape(array.gather(window), [rows, d.window, side, side, 1])
            unit = tf.reshape(tf.gather(self._depth_unit, source), [-1, 1, 1, 1, 1])
            leaves[f"observation.depth_{camera}"] = depth * unit
        return leaves

    def _in_rgb(self, pixels: tf.Tensor, camera: int, source: tf.Tensor) -> tf.Tensor:
        """Return the images [n, ..., 3] of a camera with the channels red, green, blue."""
        swapped = self._swapped[:, camera]
        if not swapped.any():
            return pixels
        if swapped.all():
            return pixels[..., ::-1]
        flags = tf.reshape(
            tf.gather(tf.constant(swapped), source), [-1] + [1] * (pixels.shape.rank - 1)
        )
        return tf.where(flags, pixels[..., ::-1], pixels)


def next_good(good: tf.Tensor) -> tf.Tensor:
    """Return, for each of n rows, the index of the first good row from it on, cyclic, int64 [n].

    Its own index if no row is good.
    """
    count = tf.size(good, tf.int64)
    positions = tf.where(good)[:, 0]
    next_index = tf.searchsorted(positions, tf.range(count), side="left", out_type=tf.int64)
    number = tf.maximum(tf.size(positions, tf.int64), 1)
    padded = tf.concat([positions, tf.zeros([1], tf.int64)], 0)
    return tf.where(tf.reduce_any(good), tf.gather(padded, next_index % number), tf.range(count))


def _replace_bad_rows(
    leaves: dict[str, tf.Tensor], good: tf.Tensor, current: tf.Tensor, lane_rows: int
) -> dict[str, tf.Tensor]:
    """Replace rows by the next good ones of their lane; without one, their actions are masked."""
    by_lane = tf.reshape(good, [-1, lane_rows])
    ahead = tf.stack([tf.roll(by_lane, -i, axis=1) for i in range(lane_rows)])
    shift = tf.argmax(tf.cast(ahead, tf.int32), axis=0)  # the first good row from each row on
    row = (tf.range(lane_rows, dtype=tf.int64) + shift) % lane_rows
    lane = tf.range(tf.shape(row, tf.int64)[0])[:, None]
    index = tf.reshape(lane * lane_rows + row, [-1])
    result = {k: tf.gather(x, index) for k, x in leaves.items()}
    result[BAD] = tf.where(good, leaves[BAD], current)
    valid = tf.gather(good, index)
    result["action_mask"] &= tf.reshape(valid, [-1] + [1] * (result["action_mask"].shape.rank - 1))
    return result


def _can_decode(encoded: tf.Tensor, depth: bool) -> tf.Tensor:
    """Return whether each of n images can be decoded, bool [n]."""

    def can_decode_one(x: tf.Tensor) -> tf.Tensor:
        single = tf.data.Dataset.from_tensors(x[None])
        good = single.map(lambda y: tf.size(decode.decode_images(y, 1, "bilinear", depth)) > 0)
        bad = single.map(lambda _: False)
        return good.ignore_errors().concatenate(bad).take(1).get_single_element()

    return tf.map_fn(can_decode_one, encoded, fn_output_signature=tf.TensorSpec((), tf.bool))


def _gather_images(pool: Pool, position: tf.Tensor, unused: tf.Tensor) -> tf.Tensor:
    """Return the encoded images at positions among the steps in memory, string [n, C + D].

    unused: bool [n], "" for these.
    """
    block = tf.searchsorted(pool.starts, position, side="right", out_type=tf.int32) - 1
    # An empty block has the start of the next one: the last of equal starts has the position.
    block = tf.where(unused, len(pool.images), block)
    indices = tf.dynamic_partition(tf.range(tf.size(position)), block, len(pool.images) + 1)
    parts = [
        tf.gather(images, tf.gather(position, index) - pool.starts[i])
        for i, (images, index) in enumerate(zip(pool.images, indices[:-1], strict=True))
    ]
    blank = tf.fill([tf.size(indices[-1]), pool.images[0].shape[1]], "")
    return tf.dynamic_stitch(indices, [*parts, blank])


def _affine(embodiments: Sequence[Embodiment], part: str) -> tuple[tf.Tensor, Any, Any]:
    """Return (dimensions of each record bool [R, n], (shift, scale), limit), float32 [R, n]."""
    layouts = [e.layout(part) for e in embodiments]
    width = max((len(x) for x in layouts if x), default=0)
    dims = np.zeros((len(embodiments), width), bool)
    shift, scale = np.zeros(dims.shape, np.float32), np.ones(dims.shape, np.float32)
    limit = np.full(dims.shape, np.inf, np.float32)
    for i, (embodiment, layout) in enumerate(zip(embodiments, layouts, strict=True)):
        if layout is None:
            continue
        n = len(layout)
        dims[i, :n] = True
        shift[i, :n], scale[i, :n] = embodiment.affine(part)
        limit[i, :n] = np.where(embodiment.is_clipped(part), 1, np.inf)
    return tf.constant(dims), (tf.constant(shift), tf.constant(scale)), tf.constant(limit)


def _normalized(x: tf.Tensor, record: tf.Tensor, affine: Any, limit: tf.Tensor) -> tf.Tensor:
    """Return values [n, ..., dims] of records [n], normalised."""
    shape = [-1] + [1] * (x.shape.rank - 2) + [x.shape[-1]]
    shift, scale, limit = (tf.reshape(tf.gather(v, record), shape) for v in (*affine, limit))
    return tf.clip_by_value((x - shift) / scale, -limit, limit)
