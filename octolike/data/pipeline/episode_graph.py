"""Episodes in the graph: a record is read by offset, verified, parsed and standardised.

`EpisodeLoader.load` is TensorFlow graph code. A record that cannot be read, has changed or does not
match its dataset spec becomes a blank episode marked as bad, so that one record never ends
the stream; the batch carries the mark (example_graph), and the consumer reports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow.experimental.numpy as tnp

from octolike.data.pipeline.closings import next_closings, unlabelled_reason
from octolike.data.pipeline.dataset_split import DatasetSplit, JoinedSplits
from octolike.data.pipeline.subtasks import graph_subtasks
from octolike.data.rlds import record_files
from octolike.data.rlds.graph_expressions import graph_standard_steps
from octolike.data.rlds.texts import graph_texts
from octolike.data.specs.subtask_rules import GRIPPER


class EpisodeTensors(NamedTuple):
    """T steps of one episode, or S steps of several ones, one after the other.

    Attributes:
        images: string [S, C + D], the encoded images of the run's cameras and depth cameras; "" for
            a camera that the episode lacks.
        action: float32 [S, A] as stored or, with a representation (octolike.representation), the
            learned chunk of each step [S, H, A']; proprio: float32 [S, P]. Not normalised, padded
            with 0 to the widest.
        texts: string [S, K], the instructions of each step; "" for none.
        subtasks: string [S], the subtask of each step; "" for none.
        closings: int64 [S], the step of the episode that next closes the gripper; −1 for none.
        good: bool [S], False for a blank episode in place of a bad record.
    """

    images: tf.Tensor
    action: tf.Tensor
    proprio: tf.Tensor
    texts: tf.Tensor
    subtasks: tf.Tensor
    closings: tf.Tensor
    good: tf.Tensor


class EpisodeLoader:
    """Reads the episodes of several splits, numbered through (`JoinedSplits`).

    Attributes:
        steps: int64 [E], of each episode.
        source: int32 [E], the number of its split.
        has_depth: bool [E, D], which of the run's depth cameras it has.
        views: largest number of views of an episode; in view v, an interchangeable camera shows
            the images of the one v places further on.
    """

    def __init__(
        self,
        supply: JoinedSplits,
        cameras: Sequence[str],
        depth: Sequence[str],
        *,
        action_dim: int,
        proprio_dim: int,
        chunks: int = 0,
        subtasks: bool = False,
        closings: bool = False,
    ) -> None:
        """Load chunks of learned actions, or the stored actions if `chunks` is 0.

        action_dim, proprio_dim: A and P of the batch. subtasks, closings: load those of the steps,
        too.
        """
        self._subtasks, self._closings = subtasks, closings
        self._chunks = (chunks,) if chunks else ()
        self._cameras, self._depth = tuple(cameras), tuple(depth)
        self._action_dim, self._proprio_dim = action_dim, proprio_dim
        self._texts = max(len(s.spec.language_paths) for s in supply.sources) or 1
        self.steps = tf.constant(supply.table.steps, tf.int64)
        self.views = max(len(s.views) or 1 for s in supply.sources)
        views = range(self.views)
        presence = [_presence(supply.sources, self._cameras, view) for view in views]
        # [views · E, C]: gather, unlike gather_nd, takes a table of no camera.
        self._has_image = tf.constant(np.concatenate(presence), tf.bool)
        self._episodes = len(presence[0])
        allowed = [np.where(s.has_views, len(s.views), 1) for s in supply.sources]
        self._view_count = tf.constant(np.concatenate(allowed), tf.int64)
        depth_of_source = [[c in s.depth for c in self._depth] for s in supply.sources]
        files = [f for s in supply.sources for f in s.reader.files]
        firsts = np.cumsum([0, *(len(s.reader.files) for s in supply.sources)])
        counts = [len(s.index.steps) for s in supply.sources]
        shards = [s.index.shard + first for s, first in zip(supply.sources, firsts, strict=False)]
        self._files = tf.constant(files)
        self._shard = tf.constant(np.concatenate(shards), tf.int64)
        self.source = tf.constant(np.repeat(np.arange(len(counts)), counts), tf.int32)
        self.has_depth = tf.constant(np.repeat(np.array(depth_of_source, bool), counts, axis=0))
        self._offset = tf.constant(np.concatenate([s.index.offset for s in supply.sources]))
        self._length = tf.constant(np.concatenate([s.index.length for s in supply.sources]))
        kept_ends = np.cumsum([0, *(len(s.index.kept) for s in supply.sources)])
        kept_starts = [
            np.where(s.index.kept_start < 0, -1, s.index.kept_start + first)
            for s, first in zip(supply.sources, kept_ends, strict=False)
        ]
        self._kept_start = tf.constant(np.concatenate(kept_starts), tf.int64)
        self._kept = tf.constant(np.concatenate([s.index.kept for s in supply.sources]), tf.int64)
        self._content = tf.constant(np.concatenate([s.index.content for s in supply.sources]))
        self._parsers = [_traced(self._parser(s)) for s in supply.sources]

    def load(self, episode: tf.Tensor, views: tf.Tensor) -> EpisodeTensors:
        """Return an episode by its number, int64 []; views: selects one of its views, int64 []."""
        values = episode, self._view(episode, views)
        return first_without_error(values, self._read, lambda number, view: self._blank(number))

    def has_image(self, episodes: tf.Tensor, views: tf.Tensor) -> tf.Tensor:
        """Return bool [n, C]: which of the run's cameras the episodes have in these views."""
        rows = self._view(episodes, views) * self._episodes + episodes
        return tf.gather(self._has_image, rows)

    def _view(self, episodes: tf.Tensor, views: tf.Tensor) -> tf.Tensor:
        return views % tf.gather(self._view_count, episodes)

    def no_steps(self) -> EpisodeTensors:
        """Return tensors of no step."""
        return EpisodeTensors(*(x[:0] for x in self._blank(tf.constant(0, tf.int64))))

    def _read(self, episode: tf.Tensor, view: tf.Tensor) -> EpisodeTensors:
        record = self._record(episode)
        source = tf.gather(self.source, episode)
        positions = self._positions(episode)
        read = _call_one(self._parsers, source, record, positions, view)
        has_image = tf.gather(self._has_image, view * self._episodes + episode)
        has = tf.concat([has_image, tf.gather(self.has_depth, episode)], axis=0)
        steps = tf.gather(self.steps, episode)
        tf.debugging.assert_equal(tf.size(read.good, tf.int64), steps)
        tf.debugging.assert_all_finite(read.action, "action")
        tf.debugging.assert_all_finite(read.proprio, "proprio")
        images = read.images
        # A copy of all strings only where a camera is absent.
        images = tf.cond(tf.reduce_all(has), lambda: images, lambda: tf.where(has, images, ""))
        return read._replace(images=images)

    def _record(self, episode: tf.Tensor) -> tf.Tensor:
        """Return the record of an episode; its checksums and its fingerprint are verified."""
        path = tf.gather(self._files, tf.gather(self._shard, episode))
        record = record_files.graph_record(
            path, tf.gather(self._offset, episode), tf.gather(self._length, episode)
        )
        content = record_files.content_fingerprint(record)
        tf.debugging.assert_equal(content, tf.gather(self._content, episode))
        return record

    def _positions(self, episode: tf.Tensor) -> tf.Tensor:
        """Return the positions of an episode's steps among its standard steps, int64 [steps]."""
        start, steps = tf.gather(self._kept_start, episode), tf.gather(self.steps, episode)
        return tf.cond(
            start < 0, lambda: tf.range(steps), lambda: self._kept[start : start + steps]
        )

    def _blank(self, episode: tf.Tensor) -> EpisodeTensors:
        steps = tf.gather(self.steps, episode)
        return EpisodeTensors(
            images=tf.fill([steps, len(self._cameras) + len(self._depth)], ""),
            action=tf.zeros([steps, *self._chunks, self._action_dim]),
            proprio=tf.zeros([steps, self._proprio_dim]),
            texts=tf.fill([steps, self._texts], ""),
            subtasks=tf.fill([steps], ""),
            closings=tf.fill([steps], tf.constant(-1, tf.int64)),
            good=tf.zeros([steps], tf.bool),
        )

    def _parser(self, source: DatasetSplit) -> Any:
        """Return the function of a record of one dataset that gives the standard episode."""
        spec = source.spec
        views = range(len(source.views) or 1)
        names_of_views = [[_shown_camera(source, c, view) for c in self._cameras] for view in views]
        cameras = dict.fromkeys(c for names in names_of_views for c in names if c in spec.cameras)
        parse = source.reader.graph_parse(cameras, source.depth)
        paths = spec.language_paths if source.reader.uses_instructions else ()

        def standard_episode(
            record: tf.Tensor, positions: tf.Tensor, view: tf.Tensor
        ) -> EpisodeTensors:
            parsed = parse(record)
            action, proprio = graph_standard_steps(spec, parsed.steps)
            steps = tf.shape(action)[0]
            missing = tf.fill([steps], "")
            columns = _one_of(
                [
                    [parsed.images[c][:steps] if c in cameras else missing for c in names]
                    for names in names_of_views
                ],
                view,
            )
            columns += [
                _encoded_depth(parsed.depth[c][:steps]) if c in source.depth else missing
                for c in self._depth
            ]
            texts = [graph_texts(parsed.steps, path, steps) for path in paths]
            texts += [missing] * (self._texts - len(texts))
            subtasks = missing
            if self._subtasks and source.reader.has_subtasks:
                subtasks = graph_subtasks(spec, parsed.steps, action, texts[0])
            if len(source.index.kept):  # without idle steps
                proprio = None if proprio is None else tf.gather(proprio, positions)
                action = tf.gather(action, positions)
                columns = [tf.gather(x, positions) for x in columns]
                texts = [tf.gather(x, positions) for x in texts]
                subtasks = tf.gather(subtasks, positions)
                steps = tf.size(positions)
            closings = tf.fill([steps], tf.constant(-1, tf.int64))
            if self._closings and not unlabelled_reason(spec):
                closings = next_closings(action[:, spec.action.names.index(GRIPPER)])
            if self._chunks:
                ahead = tf.range(steps)[:, None] + tf.range(*self._chunks)
                action = tf.gather(action, tf.minimum(ahead, steps - 1))
                if source.embodiment.transform is not None:
                    action = source.embodiment.transform.encode(action, proprio, tnp)
            if proprio is None:
                proprio = tf.zeros([steps, 0])
            return EpisodeTensors(
                images=tf.stack(columns, axis=1) if columns else tf.fill([steps, 0], ""),
                action=_widen(action, self._action_dim),
                proprio=_widen(proprio[:, : self._proprio_dim], self._proprio_dim),
                texts=tf.stack(texts, axis=1),
                subtasks=subtasks,
                closings=closings,
                good=tf.ones([steps], tf.bool),
            )

        return standard_episode


def _encoded_depth(depth: tf.Tensor) -> tf.Tensor:
    """Return depth images as PNG [T]: as stored, or from arrays [T, h, w] or [T, h, w, 1].

    float32 is stored as RGBA, the four bytes of each number, as TFDS does.
    """
    if depth.dtype == tf.string:
        return depth
    if depth.dtype == tf.uint16:
        images = depth if depth.shape.rank == 4 else depth[..., None]
    else:
        flat = depth[..., 0] if depth.shape.rank == 4 else depth
        images = tf.bitcast(tf.cast(flat, tf.float32), tf.uint8)
    return tf.map_fn(tf.io.encode_png, images, fn_output_signature=tf.TensorSpec((), tf.string))


def _shown_camera(source: DatasetSplit, camera: str, view: int) -> str:
    """Return the camera that is shown as `camera` of the run in a view."""
    if camera not in source.views:
        return camera
    return source.views[(source.views.index(camera) + view) % len(source.views)]


def _one_of(options: Sequence[list[tf.Tensor]], number: tf.Tensor) -> list[tf.Tensor]:
    """Return one of several lists of tensors."""
    if len(options) == 1 or not options[0]:
        return options[0]
    branches = [lambda columns=columns: columns for columns in options]
    return list(tf.switch_case(tf.cast(number, tf.int32), branches))


def _presence(sources: Sequence[DatasetSplit], cameras: Sequence[str], view: int) -> np.ndarray:
    """Return bool [E, C]: which of the run's cameras each episode has in a view."""
    rows = []
    for source in sources:
        names = list(source.spec.cameras)
        view_cameras = [_shown_camera(source, c, view) for c in cameras]
        columns = [
            source.index.has_image[:, names.index(c)]
            if c in names
            else np.zeros(len(source.index.steps), bool)
            for c in view_cameras
        ]
        rows.append(
            np.stack(columns, axis=1) if columns else np.zeros((len(source.index.steps), 0))
        )
    return np.concatenate(rows).astype(bool)


def _widen(x: tf.Tensor, width: int) -> tf.Tensor:
    """Return float32 [T, ..., n], padded with zeros to [T, ..., width]."""
    padding = [[0, 0]] * (x.shape.rank - 1) + [[0, width - x.shape[-1]]]
    padded = tf.pad(tf.cast(x, tf.float32), padding)
    return tf.ensure_shape(padded, (None, *x.shape[1:-1], width))


def _traced(function: Any) -> Any:
    """Return a function of a record, positions and a view, traced once for all hosts."""
    number = tf.TensorSpec((), tf.int64)
    signature = [tf.TensorSpec((), tf.string), tf.TensorSpec((None,), tf.int64), number]
    return tf.function(function, signature, autograph=False).get_concrete_function()


def _call_one(functions: Sequence[Any], number: tf.Tensor, *values: tf.Tensor) -> EpisodeTensors:
    """Return functions[number](*values).

    Unlike tf.switch_case, the operation is neither traced once more nor unrolled into the calling
    graph, which takes a tenth of a second per function at the start.
    """
    first = functions[0]
    if len(functions) == 1 or any(f.captured_inputs for f in functions):
        branches = [partial(f, *values) for f in functions]
        return first(*values) if len(functions) == 1 else tf.switch_case(number, branches)
    results = tf.raw_ops.Case(
        branch_index=number, input=values, Tout=[x.dtype for x in first.outputs], branches=functions
    )
    shapes = zip(results, first.structured_outputs, strict=True)
    return EpisodeTensors(*(tf.ensure_shape(x, like.shape) for x, like in shapes))


def first_without_error(values: Any, *functions: Any) -> Any:
    """Return functions[0](*values), or the result of the first function that runs without error.

    TensorFlow cannot catch an error within a graph, but a dataset can ignore one.
    """
    single = tf.data.Dataset.from_tensors(values)
    results = [single.map(plain(called(f))).ignore_errors() for f in functions]
    for result in results[1:]:
        results[0] = results[0].concatenate(result)
    return results[0].take(1).get_single_element()


def called(function: Any) -> Any:
    """Return a function that tf.data instantiates quickly: its graph is one call."""
    return tf.function(function, autograph=False)


def plain(function: Any) -> Any:
    """Return a function that tf.data traces as it is, without AutoGraph."""
    return tf.autograph.experimental.do_not_convert(function)
