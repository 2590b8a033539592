"""From disk to standard episodes: records are read by offset, parsed, standardised and checked.

Images remain encoded, as stored. A `Reader` opens one split of one dataset. The episode index
(index.py) gives the position of each record, so episodes can be read in any order.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from octolike.data.rlds import decode, record_fields, record_files, spec_fields
from octolike.data.rlds.channel_order import ChannelOrder
from octolike.data.rlds.dataset_directory import find_directory, read_info, stamp_shards
from octolike.data.rlds.episode import Episode, ExcludedEpisodeError
from octolike.data.rlds.fields import IS_FIRST, OBSERVATION
from octolike.data.rlds.record_fields import EPISODE, ParsedEpisode
from octolike.data.rlds.record_files import PARSE_ERRORS, error_summary
from octolike.data.rlds.split_records import (
    HELD_OUT,
    TRAINING,
    HeldOut,
    MissingSplitError,
    SplitRecords,
    find_records,
    has_split,
    is_held_out,
)
from octolike.data.rlds.texts import has_path, split_path, texts_at, value_at
from octolike.data.specs import expressions
from octolike.data.specs.episode_filter import EpisodeFilter, build_filter
from octolike.data.specs.spec import DatasetSpec
from octolike.data.specs.standardize import StandardSteps
from octolike.errors import DataError

NOTHING_HELD_OUT, NO_FILTER = HeldOut(), EpisodeFilter()


class Reader:
    """Reads one split of one dataset on disk."""

    def __init__(
        self,
        spec: DatasetSpec,
        root: str,
        split: str,
        *,
        uninformative: bool = False,
        representation: str = "as_stored",
        horizon: int = 1,
        held_out: HeldOut = NOTHING_HELD_OUT,
        filters: EpisodeFilter = NO_FILTER,
        channel_order: str = "",
    ) -> None:
        """Open <root>/<name>/<version> (local or gs://).

        split: a split or slice, such as "train[:1000]".
        uninformative: keep instructions that the spec marks as uninformative.
        held_out: the split, slice or share left out of this split; the method `held_out` opens it.
        filters: filters of the config; those of the spec apply as well.
        representation, horizon: form of the learned actions and length of their chunks; the
            statistics are those of the learned actions.
        channel_order: the setting of ChannelOrder.

        Raises DataError if the directory, the version, the split, a shard or a feature is missing.
        """
        self.spec, self.split, self.part = spec, split, TRAINING
        self.filters = build_filter(
            spec.filters, _changed(filters), title=f"the filters of {spec.name}"
        )
        self.representation, self.horizon = representation, horizon
        self.uses_instructions = spec.language_informative or uninformative
        self.channels = ChannelOrder(spec, channel_order, self._first_bytes)
        self._open = functools.partial(  # another split of the same dataset
            Reader,
            spec,
            root,
            uninformative=uninformative,
            representation=representation,
            horizon=horizon,
            filters=filters,
            channel_order=channel_order,
        )
        self.directory = find_directory(spec, root)
        info = read_info(spec.name, self.directory)
        self._splits, self._rule = info.splits, held_out
        self.share, self._slice = 0.0, ""  # held out: a share, or a slice
        records = self._find_records()
        self.files, self.counts, self.selected = records.files, records.counts, records.selected
        # An index depends on the name, bytes and last change of each shard.
        self.stamps = stamp_shards(spec.name, self.directory, self.files, split)
        self.features = info.features
        self.fields = record_fields.field_tree(info.features)
        self._camera_paths, self._depth_paths = spec_fields.image_paths(
            spec, self.fields, self.directory
        )
        flags = (spec.label, spec.keep, self.filters.keep)
        spec_fields.check_paths(spec, flags, self.fields, self.directory)
        self._parsers: dict[tuple[Any, ...], Any] = {}

    @property
    def has_subtasks(self) -> bool:
        """Whether the steps have subtasks: the spec's text is on disk, or it has rules."""
        text = self.spec.subtask
        return bool(self.spec.subtask_rules) or (text != "" and has_path(self.fields, text))

    def _find_records(self) -> SplitRecords:
        """Return the records of the split without a held-out slice; remember the slice or share."""
        split, held_out = self.split, self._rule
        title = f"{self.spec.name}: no split {{!r}} in {self.directory}"
        records = find_records(self._splits, split, title)
        if not _count(records):
            raise DataError(f"{split!r} of {self.spec.name} contains no episodes")
        if held_out.split and not has_split(self._splits, held_out.split):
            self.share = held_out.share
        elif held_out.split:
            remaining = records.without(find_records(self._splits, held_out.split, title))
            self._slice = held_out.split if _count(remaining) < _count(records) else ""
            records = remaining
        if not _count(records):
            raise DataError(
                f"{self.spec.name}: all episodes of {split!r} are held out by {held_out.split!r}; "
                "choose another data.train_split or data.validation_split"
            )
        return records

    @property
    def title(self) -> str:
        """The dataset, its split and its part."""
        suffix = f" ({self.part})" if self.part != TRAINING else ""
        return f"{self.spec.name}/{self.split}{suffix}"

    def held_out(self) -> Reader:
        """Return a reader of the held-out episodes; MissingSplitError if there are none."""
        split = self._rule.split
        if self.share:
            reader = copy.copy(self)
            reader.part = HELD_OUT
            return reader
        if not split or not has_split(self._splits, split):
            names = ", ".join(sorted(self._splits))
            raise MissingSplitError(
                f"{self.spec.name}: no split {split!r} in {self.directory} (splits: {names}); set "
                f"data.validation_splits.{self.spec.name} to one of them or to a slice such as "
                "'train[95%:]', or data.held_out=0.05 to hold out a share of the training "
                "episodes, or data.validation_split='' for no validation"
            )
        return self._open(split)

    def _first_bytes(self) -> dict[str, bytes]:
        """Return the first bytes of an image of each camera in spec.bgr."""
        parser = self.parser(self.spec.bgr)
        first_bytes: dict[str, bytes] = {}
        for shard in range(len(self.files)):
            for record in self.read_records(shard):
                parsed = self._parse(record, self.files[shard], parser)
                for camera, frames in parsed.images.items():
                    frame = next((x for x in frames.numpy() if x), b"")
                    if frame:
                        first_bytes.setdefault(camera, frame[:2])
                if len(first_bytes) == len(self.spec.bgr):
                    return first_bytes
        return {camera: first_bytes.get(camera, b"") for camera in self.spec.bgr}

    def describe_held_out(self) -> str:
        """Return a line on the episodes held out from a training split; "" for none."""
        if self.share:
            names = ", ".join(sorted(self._splits))
            return (
                f"held out: {self.share:.4g} of the episodes of {self.spec.name}/{self.split}, by "
                f"a hash of their records: no split {self._rule.split!r} (splits: {names})"
            )
        if self._slice:
            return f"held out: {self._slice} of {self.spec.name}, left out of {self.split}"
        return ""

    def in_part(self, content: np.ndarray) -> np.ndarray:
        """Return bool: which records, given by their fingerprints, belong to this reader's part."""
        held_out = is_held_out(content, self.share)
        return held_out if self.part == HELD_OUT else ~held_out

    def selected_records(self, shard: int) -> Iterator[tuple[int, bytes]]:
        """Yield (number in the file, raw record) of the split's and part's records of a shard."""
        for number, record in enumerate(self.read_records(shard)):
            content = np.array(record_files.content_fingerprint(tf.constant(record)))
            if self.selected[shard][number] and self.in_part(content):
                yield number, record

    def read_records(self, shard: int) -> Iterator[bytes]:
        """Yield the raw records of a shard in order; DataError for a truncated or corrupted one."""
        count, path = 0, self.files[shard]
        self.check_shard(shard)
        stream = iter(tf.data.TFRecordDataset(path, buffer_size=1 << 20))
        while True:
            try:
                record = next(stream).numpy()
            except StopIteration:
                break
            except tf.errors.OpError as error:
                if count == 0 and (problem := record_files.container_problem(path)):
                    raise DataError(f"{path} {problem}") from None
                raise DataError(
                    f"{path}: record {count} is truncated, corrupted or unreadable "
                    f"({error_summary(error)}); copy the file again"
                ) from None
            if count == self.counts[shard]:
                raise DataError(
                    f"{path}: more records than dataset_info.json lists, {count}; copy the dataset "
                    "again"
                )
            yield record
            count += 1
        if count != self.counts[shard]:
            raise DataError(
                f"{path}: {count} records, but dataset_info.json lists {self.counts[shard]}; copy "
                "the file again"
            )

    def check_shard(self, shard: int) -> None:
        """Raise DataError for a shard with records that claim more bytes than it has."""
        record_files.check_lengths(self.files[shard], self.stamps[shard][1])

    def read_episode(
        self,
        shard: int,
        offset: int,
        length: int,
        cameras: Collection[str] | None = None,
        depth: Collection[str] = (),
        content: int | None = None,
    ) -> Episode:
        """Return the episode of the record of `length` bytes at byte `offset`.

        cameras, depth: cameras to return images and depth images of; cameras None: all. content:
        the fingerprint that the record should have.
        """
        record = self.read_record(shard, offset, length, content)
        return self.parse_episode(record, f"{self.files[shard]}, byte {offset}", cameras, depth)

    def without_filters(self) -> Reader:
        """Return this reader with every step of its episodes, idle ones too."""
        reader = copy.copy(self)
        reader.filters = NO_FILTER
        return reader

    def read_record(
        self, shard: int, offset: int, length: int, content: int | None = None
    ) -> bytes:
        """Return the raw record of `length` bytes at byte `offset`, its checksums verified.

        content: the fingerprint that the record should have (EpisodeIndex.content).
        """
        return record_files.read_record(self.files[shard], offset, length, content)

    def graph_parse(
        self, cameras: Collection[str] | None = None, depth: Collection[str] = ()
    ) -> Callable[[tf.Tensor], ParsedEpisode]:
        """Return a function of a raw record (scalar string) to be used inside Dataset.map.

        It parses only the images and depth images of these cameras (None: all cameras) and the
        fields that the dataset spec reads.
        """
        spec = self.spec
        names = (*spec.language_paths, spec.label, spec.keep, self.filters.keep)
        names += (spec.subtask,) if self.has_subtasks else ()
        paths = [self._path(x) for x in names if x]
        paths.append((IS_FIRST,))
        expressions_read = expressions.fields_read(spec.action_from + spec.proprio_from)
        chosen = record_fields.under([*paths, *expressions_read])
        if spec.standardize is not None:
            return self._graph_parser(cameras, depth, record_fields.not_image_array)
        return self._graph_parser(cameras, depth, chosen)

    def parser(
        self, cameras: Collection[str] | None = None, depth: Collection[str] = ()
    ) -> Callable[[tf.Tensor], ParsedEpisode]:
        """Return `graph_parse(...)` as a traced function, for eager use and for Dataset.map."""
        key = (None if cameras is None else tuple(cameras), tuple(depth))
        return self._concrete(key, lambda: self.graph_parse(cameras, depth))

    def parse_episode(
        self,
        record: bytes,
        place: str,
        cameras: Collection[str] | None = None,
        depth: Collection[str] = (),
    ) -> Episode:
        """Return the standard episode of a raw record; `place` names the record in errors.

        A camera is missing if most of its frames are black.
        """
        parsed = self._parse(record, place, self.parser(cameras, depth))
        steps = to_numpy(parsed.steps)
        standard = self.standardize(steps, place)
        positions = self.kept_steps(steps, standard, place)
        standard, t = take_steps(standard, positions), len(positions)
        images = {}
        for camera, frames in parsed.images.items():
            frames = tf.gather(frames, positions)
            if 2 * self.black_frames(frames, camera, place).sum() <= t:
                images[camera] = list(frames.numpy())
        depth_images = {c: list(tf.gather(x, positions).numpy()) for c, x in parsed.depth.items()}
        texts = [
            [step_texts[i] for i in positions]
            for step_texts in (texts_at(steps, path) for path in self.spec.language_paths)
        ]
        if not self.uses_instructions or not texts:
            texts = [[""] * t]
        instructions = texts[0] if len(texts) == 1 else list(zip(*texts, strict=True))
        return Episode(standard.action, standard.proprio, instructions, images, depth_images)

    def black_frames(self, frames: tf.Tensor, camera: str, place: str) -> np.ndarray:
        """Return bool [T]: which encoded frames of a camera are black; DataError if corrupted."""
        try:
            return decode.black_frames(frames)
        except decode.UndecodableFrameError as error:
            raise DataError(
                f"{self.spec.name}: {place}: {camera} image of step {error.step} cannot be "
                f"decoded: {error_summary(error.error)}"
            ) from None

    def parse_label(self, record: bytes, place: str) -> str:
        """Return the text of the spec's label field in a raw record, "" without a label field."""
        if not self.spec.label:
            return ""
        return next(iter(texts_at(self.parse_steps(record, place), self.spec.label)), "")

    def parse_steps(self, record: bytes, place: str) -> dict[str, Any]:
        """Return all fields of a raw record but its images (ParsedEpisode.steps), as arrays."""
        build = functools.partial(self._graph_parser, (), (), record_fields.not_image_array)
        return to_numpy(self._parse(record, place, self._concrete(("steps",), build)).steps)

    def _graph_parser(
        self,
        cameras: Collection[str] | None,
        depth: Collection[str],
        selects: Callable[[record_fields.Path, Any], bool],
    ) -> Callable[[tf.Tensor], ParsedEpisode]:
        names = self._camera_paths if cameras is None else cameras
        images = {c: p for c, p in self._camera_paths.items() if c in names}
        depths = {c: p for c, p in self._depth_paths.items() if c in depth}
        try:
            return record_fields.graph_parser(
                self.features, selects, images, depths, self.spec.every
            )
        except DataError as error:
            raise DataError(f"{self.spec.name}: {error}") from None

    def _concrete(self, key: tuple[Any, ...], build: Callable[[], Any]) -> Any:
        """Return a function for eager use, traced once: tracing takes a tenth of a second."""
        if key not in self._parsers:
            self._parsers[key] = record_fields.traced(build(), self.spec.name)
        return self._parsers[key]

    def _parse(self, record: bytes, place: str, parser: Any) -> ParsedEpisode:
        """Return a parsed record as eager tensors."""
        try:
            return parser(tf.constant(record))
        except PARSE_ERRORS as error:
            raise DataError(
                f"{self.spec.name}: {place} does not match features.json: {error_summary(error)}"
            ) from None

    def _path(self, name: str) -> record_fields.Path:
        return split_path(self.fields, name)[0]

    def standardize(self, steps: Mapping[str, Any], place: str) -> StandardSteps:
        """Return the checked actions and proprio of parsed steps.

        Raises ExcludedEpisodeError if a filter excludes the episode, and DataError if it lacks a
        field, has no usable steps, another width or non-finite numbers.
        """
        for flag in filter(None, (self.spec.keep, self.filters.keep)):
            if not np.all(value_at(steps, flag)):
                raise ExcludedEpisodeError(
                    f"{self.spec.name}: {place}: {flag} is false", f"{flag} is false"
                )
        if len(steps[IS_FIRST]) == 0:
            raise DataError(f"{self.spec.name}: {place} has no steps")
        try:
            action, proprio = self.spec.standard_steps(steps)
        except KeyError as error:
            raise DataError(
                f"{self.spec.name}: {place} has no field {error}, which the dataset spec reads; "
                f"steps has {', '.join(sorted({*self.fields} - {EPISODE}))}, steps.observation "
                f"{', '.join(sorted(self.fields[OBSERVATION])) or 'nothing'}"
            ) from None
        except (zlib.error, ValueError, TypeError, IndexError, ArithmeticError) as error:
            raise DataError(
                f"{self.spec.name}: {place} does not fit the dataset spec: {error}"
            ) from None
        if len(action) == 0:
            raise DataError(f"{self.spec.name}: {place} has no usable steps")
        proprio = proprio if self.spec.proprio else None
        parts = (("action", action, self.spec.action), ("proprio", proprio, self.spec.proprio))
        for part, x, layout in parts:
            if layout is None:
                continue
            assert x is not None  # a spec with a proprio layout provides proprio
            if x.shape[1:] != (len(layout),):
                raise DataError(
                    f"{self.spec.name}: {place}: {part} has shape {x.shape}, expected "
                    f"[T, {len(layout)}] ({', '.join(layout.names)})"
                )
            if not np.isfinite(x).all():
                t, d = np.argwhere(~np.isfinite(x))[0]
                raise DataError(
                    f"{self.spec.name}: {place}: {part} at step {t} is {x[t, d]} in dimension "
                    f"{d} ({layout.names[d]}); fix it or set data.bad_episodes='drop'"
                )
        return StandardSteps(
            np.asarray(action, np.float32),
            None if proprio is None else proprio.astype(np.float32),
        )

    def kept_steps(
        self, steps: Mapping[str, Any], standard: StandardSteps, place: str
    ) -> np.ndarray:
        """Return the positions of the standard steps to use, int64 [T']: all but the idle ones.

        Raises ExcludedEpisodeError if a filter excludes the episode.
        """
        positions = self.filters.kept_steps(standard.action, self.spec.action)
        texts: list[str] = []
        if self.filters.labelled and self.spec.language_paths:
            texts = texts_at(steps, self.spec.language_paths[0])
        if reason := self.filters.reason_to_exclude(standard.action[positions], texts):
            raise ExcludedEpisodeError(f"{self.spec.name}: {place}: {reason}", reason)
        return positions


def _count(records: SplitRecords) -> int:
    return sum(int(mask.sum()) for mask in records.selected)


def _changed(filters: EpisodeFilter) -> dict[str, Any]:
    """Return the fields of a filter that differ from their defaults."""
    return {k: v for k, v in dataclasses.asdict(filters).items() if v != getattr(NO_FILTER, k)}


def take_steps(standard: StandardSteps, positions: np.ndarray) -> StandardSteps:
    """Return some of the standard steps."""
    proprio = standard.proprio
    return StandardSteps(
        standard.action[positions], None if proprio is None else proprio[positions]
    )


def to_numpy(tree: Any) -> Any:
    """Return nested eager tensors as numpy arrays."""
    return tf.nest.map_structure(lambda x: x.numpy(), tree)
