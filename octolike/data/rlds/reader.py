"""From disk to standard episodes: records are read by offset, parsed, standardised and checked.

Images remain encoded, as stored. A `Reader` opens one split of one dataset. The episode index
(index.py) gives the position of each record, so episodes can be read in any order.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from octolike.data.rlds import decode, record_fields, record_files
from octolike.data.rlds.fields import IS_FIRST, OBSERVATION, STEPS
from octolike.data.rlds.record_fields import EPISODE, ParsedEpisode
from octolike.data.rlds.record_files import PARSE_ERRORS, error_summary, one_line
from octolike.data.specs import expressions
from octolike.data.specs.spec import DatasetSpec
from octolike.data.specs.standardize import StandardSteps
from octolike.errors import DataError


class MissingSplitError(DataError):
    """The dataset does not have the split."""


class ExcludedEpisodeError(DataError):
    """The dataset spec excludes the episode by its `keep` flag."""


@dataclass
class Episode:
    """A standard episode of T usable steps.

    Attributes:
        action: float32 [T, A], in robot units.
        proprio: float32 [T, P], in robot units, or None.
        instructions: T strings, "" for none; T tuples if the spec has several instruction fields.
        images: camera: T encoded images; cameras that the episode lacks are missing.
        depth: camera: T depth images, encoded or as arrays [h, w, 1], in the spec's unit.
    """

    action: np.ndarray
    proprio: np.ndarray | None
    instructions: list[str] | list[tuple[str, ...]]
    images: dict[str, list[bytes]]
    depth: dict[str, list[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.action)


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
    ) -> None:
        """Open <root>/<name>/<version> (local or gs://).

        uninformative: keep instructions that the spec marks as uninformative.
        representation, horizon: what of the actions is learned, and in chunks of how many; the
            statistics of the actions are those of what is learned.
        Raises DataError if the directory, the version, the split, a shard or a feature is missing.
        """
        self.spec, self.split = spec, split
        self.representation, self.horizon = representation, horizon
        self.uses_instructions = spec.language_informative or uninformative
        self.directory = find_directory(spec, root)
        try:
            info = tfds.builder_from_directory(self.directory).info
        except Exception as error:  # tfds raises whatever its parsers raise
            raise DataError(
                f"{spec.name}: features.json or dataset_info.json in {self.directory} cannot be "
                f"read: {one_line(error)}; copy the dataset again"
            ) from error
        record_files.check_format(info, spec.name, self.directory)
        if split not in info.splits:
            raise MissingSplitError(
                f"{spec.name}: no split {split!r} in {self.directory} "
                f"(splits: {', '.join(sorted(info.splits)) or 'none'}); set data.train_split and "
                "data.validation_split to whole splits; data.validation_split='' holds nothing out"
            )
        self.files = [str(f) for f in info.splits[split].filepaths]
        self.counts = list(info.splits[split].shard_lengths)
        listing = record_files.list_directory(self.directory)
        names = [f.rpartition("/")[2] for f in self.files]
        missing = [f for f, name in zip(self.files, names, strict=True) if name not in listing]
        if missing:
            raise DataError(
                f"{spec.name}: {len(missing)} of {len(self.files)} shards of split {split!r} are "
                f"missing, the first is {missing[0]}; copy the dataset again"
            )
        # (name, bytes, time of the last change) of each shard: what an index of them depends on.
        self.stamps = [(name, *listing[name]) for name in names]
        self.features = info.features
        self.fields = record_fields.field_tree(info.features)
        self._camera_paths, self._depth_paths = self._check_features()
        self._parsers: dict[tuple[Any, ...], Any] = {}

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
        """Raise DataError for a shard whose records claim more bytes than it has."""
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
        paths = [self._path(x) for x in (*spec.language_paths, spec.label, spec.keep) if x]
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
        t = len(standard.action)
        images = {}
        for camera, frames in parsed.images.items():
            if 2 * self.black_frames(frames[:t], camera, place).sum() <= t:
                images[camera] = list(frames[:t].numpy())
        depth_images = {c: list(x[:t].numpy()) for c, x in parsed.depth.items()}
        texts = [self.texts_at(steps, path)[:t] for path in self.spec.language_paths]
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
        value = value_at(self.parse_steps(record, place), self.spec.label)
        return next(iter(decode_texts(np.reshape(value, -1))), "")

    def parse_steps(self, record: bytes, place: str) -> dict[str, Any]:
        """Return all fields of a raw record but its images (ParsedEpisode.steps), as arrays."""
        build = functools.partial(self._graph_parser, (), (), record_fields.not_image_array)
        return to_numpy(self._parse(record, place, self._concrete(("steps",), build)).steps)

    def texts_at(self, steps: Mapping[str, Any], name: str) -> list[str]:
        """Return the T texts at a path of parsed steps; one of the episode is repeated."""
        value, count = value_at(steps, name), len(steps[IS_FIRST])
        if name.startswith(f"{EPISODE}."):
            return decode_texts(np.reshape(value, -1)[:1]) * count
        return decode_texts(value)

    def _graph_parser(
        self,
        cameras: Collection[str] | None,
        depth: Collection[str],
        wanted: Callable[[record_fields.Path, Any], bool],
    ) -> Callable[[tf.Tensor], ParsedEpisode]:
        names = self._camera_paths if cameras is None else cameras
        images = {c: p for c, p in self._camera_paths.items() if c in names}
        depths = {c: p for c, p in self._depth_paths.items() if c in depth}
        return record_fields.graph_parser(self.features, wanted, images, depths, self.spec.every)

    def _concrete(self, key: tuple[Any, ...], build: Callable[[], Any]) -> Any:
        """Return a function for eager use, traced once: tracing takes a tenth of a second."""
        if key not in self._parsers:
            function = tf.function(
                build(), input_signature=[tf.TensorSpec((), tf.string)], autograph=False
            )
            self._parsers[key] = function.get_concrete_function()
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
        return tuple(name.split("."))

    def standardize(self, steps: Mapping[str, Any], place: str) -> StandardSteps:
        """Return the checked actions and proprio of parsed steps.

        Raises ExcludedEpisodeError if the spec excludes the episode, and DataError if it lacks a
        field, has no usable steps, another width or non-finite numbers.
        """
        if self.spec.keep and not np.all(value_at(steps, self.spec.keep)):
            raise ExcludedEpisodeError(f"{self.spec.name}: {place}: {self.spec.keep} is false")
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

    def _check_features(self) -> tuple[dict[str, record_fields.Path], ...]:
        """Return the paths of cameras and depth; DataError for a field that does not exist."""
        observation = self.fields[OBSERVATION]
        result: tuple[dict[str, record_fields.Path], ...] = ({}, {})
        for paths, kind, keys in zip(
            result, ("camera {!r}", "the depth of {!r}"), (self.spec.cameras, self.spec.depth)
        ):
            for camera, key in keys.items():
                path = record_fields.find_path(observation, key)
                title = f"{self.spec.name}: {kind.format(camera)} should be steps.observation.{key}"
                if path is None:
                    names = ", ".join(sorted(observation)) or "no observation"
                    raise DataError(f"{title}, but {self.directory} has {names}")
                feature = record_fields.get_path(observation, path)
                problem = record_fields.image_problem(feature)
                if problem and keys is self.spec.cameras:
                    raise DataError(
                        f"{title}, but it is {problem} in {self.directory}; expected images, or "
                        "uint8 arrays [height, width, 1, 3 or 4]: convert the dataset"
                    )
                paths[camera] = (OBSERVATION, *path)
        for name in filter(None, (*self.spec.language_paths, self.spec.label, self.spec.keep)):
            node: Any = self.fields
            for key in self._path(name):
                if not isinstance(node, Mapping) or key not in node:
                    role = (
                        "the instruction should be"
                        if name in self.spec.language_paths
                        else ("the spec reads")
                    )
                    names = ", ".join(sorted(node)) if isinstance(node, Mapping) else "a value"
                    raise DataError(
                        f"{self.spec.name}: {role} {_shown(name)}, but {self.directory} has no "
                        f"{key!r} there (it has: {names})"
                    )
                node = node[key]
        return result


def to_numpy(tree: Any) -> Any:
    """Return nested eager tensors as numpy arrays."""
    return tf.nest.map_structure(lambda x: x.numpy(), tree)


def value_at(steps: Mapping[str, Any], path: str) -> Any:
    """Return the value at a dotted path; KeyError with the path if it is missing."""
    value: Any = steps
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise KeyError(path)
        value = value[key]
    return value


def decode_texts(x: Any) -> list[str]:
    """Return the texts of bytes [T], or of code points [T, n] terminated by a zero."""
    x = np.asarray(x)
    if x.dtype.kind in "iu":
        return ["".join(map(chr, row[: (*np.flatnonzero(row == 0), len(row))[0]])) for row in x]
    return [t.decode("utf-8", errors="replace") for t in x.tolist()]


def _shown(name: str) -> str:
    """Return a path under steps, or of the episode, as users know it."""
    return name if name.startswith(f"{EPISODE}.") else f"{STEPS}.{name}"


def find_directory(spec: DatasetSpec, root: str) -> str:
    """Return the directory of a dataset's version; DataError lists the existing ones."""
    parent = f"{root.rstrip('/')}/{spec.name}"
    if spec.folder and tf.io.gfile.isdir(released := f"{root.rstrip('/')}/{spec.folder}"):
        parent = released
    directory = f"{parent}/{spec.version or _only_version(parent)}"
    if tf.io.gfile.exists(f"{directory}/features.json"):
        return directory
    if not root or not tf.io.gfile.isdir(root):
        raise DataError(
            f"data.root {root!r} is not a directory; set it to the one that holds {spec.name}/"
        )
    for unfinished in (directory, f"{directory}.incomplete"):
        if tf.io.gfile.isdir(unfinished):
            raise DataError(
                f"{spec.name}: {unfinished} is incomplete; run the program that writes it to the "
                "end"
            )
    existing = parent if tf.io.gfile.isdir(parent) else root
    names = ", ".join(sorted(x.rstrip("/") for x in tf.io.gfile.listdir(existing))[:20])
    raise DataError(
        f"{spec.name}: {directory} does not exist; {existing} has: {names or 'nothing'}. Set "
        f"data.root to the directory that holds {spec.name}/{spec.version}"
    )


def _only_version(directory: str) -> str:
    """Return the only version on disk, for a spec without one; a placeholder if there are more."""
    names = tf.io.gfile.listdir(directory) if tf.io.gfile.isdir(directory) else []
    versions = [v.rstrip("/") for v in names if v[:1].isdigit() and "incomplete" not in v]
    return versions[0] if len(versions) == 1 else "<version>"
