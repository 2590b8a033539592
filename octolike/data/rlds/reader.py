"""From disk to standard episodes: records are read by offset, parsed, standardised and checked.

Images remain encoded, as stored. A `Reader` opens one split of one dataset. The episode index
(index.py) gives the position of each record, so episodes can be read in any order.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from octolike.data.rlds.fields import IS_FIRST, OBSERVATION, STEPS
from octolike.data.specs.spec import DatasetSpec
from octolike.data.specs.standardize import StandardSteps
from octolike.errors import DataError

# A TFRecord consists of its length (8 bytes), a checksum (4), the data, and a checksum (4).
RECORD_HEADER, RECORD_FOOTER = 12, 4


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
        self, spec: DatasetSpec, root: str, split: str, *, uninformative: bool = False
    ) -> None:
        """Open <root>/<name>/<version> (local or gs://).

        uninformative: keep instructions that the spec marks as uninformative.
        Raises DataError if the directory, the version, the split, a shard or a feature is missing.
        """
        self.spec, self.split = spec, split
        self._use_instructions = spec.language_informative or uninformative
        self.directory = find_directory(spec, root)
        try:
            info = tfds.builder_from_directory(self.directory).info
        except Exception as error:  # tfds raises whatever its parsers raise
            raise DataError(
                f"{spec.name}: features.json or dataset_info.json in {self.directory} cannot be "
                f"read: {error}; copy the dataset again"
            ) from error
        if split not in info.splits:
            raise MissingSplitError(
                f"{spec.name}: no split {split!r} in {self.directory} "
                f"(splits: {', '.join(sorted(info.splits)) or 'none'})"
            )
        self.files = [str(f) for f in info.splits[split].filepaths]
        self.counts = list(info.splits[split].shard_lengths)
        missing = [f for f in self.files if not tf.io.gfile.exists(f)]
        if missing:
            raise DataError(
                f"{spec.name}: {len(missing)} of {len(self.files)} shards of split {split!r} are "
                f"missing, the first is {missing[0]}; copy the dataset again"
            )
        self.features = info.features
        self._check_features()
        skip = {STEPS: tfds.decode.SkipDecoding()}
        # Traced once, here: TensorFlow warns about retracing if many readers trace when called.
        self._parse = tf.function(
            lambda record: self.features.deserialize_example(record, decoders=skip),
            input_signature=[tf.TensorSpec((), tf.string)],
        ).get_concrete_function()

    def read_records(self, shard: int) -> Iterator[bytes]:
        """Yield the raw records of a shard in order; DataError for a truncated or corrupted one."""
        count = 0
        stream = iter(tf.data.TFRecordDataset(self.files[shard], buffer_size=1 << 20))
        while True:
            try:
                record = next(stream).numpy()
            except StopIteration:
                break
            except tf.errors.OpError as error:
                raise DataError(
                    f"{self.files[shard]}: record {count} is truncated, corrupted or unreadable "
                    f"({error_summary(error)}); copy the file again"
                ) from None
            yield record
            count += 1
        if count != self.counts[shard]:
            raise DataError(
                f"{self.files[shard]}: {count} records, but dataset_info.json lists "
                f"{self.counts[shard]}; copy the file again"
            )

    def read_episode(
        self,
        shard: int,
        offset: int,
        length: int,
        cameras: Collection[str] | None = None,
        depth: Collection[str] = (),
    ) -> Episode:
        """Return the episode of the record of `length` bytes at byte `offset`.

        cameras, depth: cameras to return images and depth images of; cameras None: all.
        """
        record = self.read_record(shard, offset, length)
        return self.parse_episode(record, f"{self.files[shard]}, byte {offset}", cameras, depth)

    def read_record(self, shard: int, offset: int, length: int) -> bytes:
        """Return the raw record of `length` bytes at byte `offset`."""
        path = self.files[shard]
        try:
            with tf.io.gfile.GFile(path, "rb") as f:
                f.seek(offset)
                block = f.read(RECORD_HEADER + length)
        except tf.errors.OpError as error:
            raise DataError(f"{path} could not be read: {error_summary(error)}") from None
        if len(block) < RECORD_HEADER + length or struct.unpack("<Q", block[:8])[0] != length:
            raise DataError(
                f"{path}: no record of {length} bytes at {offset}; the file has changed since it "
                "was indexed: restore it, or delete the index to recompute it"
            )
        return block[RECORD_HEADER:]

    def parse_episode(
        self,
        record: bytes,
        place: str,
        cameras: Collection[str] | None = None,
        depth: Collection[str] = (),
    ) -> Episode:
        """Return the standard episode of a raw record; `place` names the record in errors."""
        steps = self.parse_steps(record, place)
        standard = self.standardize(steps, place)
        t = len(standard.action)
        images = {}
        for camera, key in self.spec.cameras.items():
            if cameras is not None and camera not in cameras:
                continue
            frames = list(steps[OBSERVATION][key][:t])
            if _has_content(frames[0], f"{self.spec.name}: {place}: {camera} image of step 0"):
                images[camera] = frames
        depth_images = {c: list(steps[OBSERVATION][self.spec.depth[c]][:t]) for c in depth}
        texts = [decode_texts(value_at(steps, path))[:t] for path in self.spec.language_paths]
        if not self._use_instructions or not texts:
            texts = [[""] * t]
        instructions = texts[0] if len(texts) == 1 else list(zip(*texts, strict=True))
        return Episode(standard.action, standard.proprio, instructions, images, depth_images)

    def parse_label(self, record: bytes, place: str) -> str:
        """Return the text of the spec's label field in a raw record, "" without a label field."""
        if not self.spec.label:
            return ""
        value = value_at(self.parse_steps(record, place), self.spec.label)
        return next(iter(decode_texts(np.reshape(value, -1))), "")

    def parse_steps(self, record: bytes, place: str) -> dict[str, Any]:
        """Return the parsed steps of a raw record (`steps_with_metadata`); images stay encoded."""
        try:
            parsed = tf.nest.map_structure(lambda x: x.numpy(), self._parse(tf.constant(record)))
            return steps_with_metadata(parsed, self.spec.every)
        except (tf.errors.OpError, UnicodeDecodeError) as error:
            raise DataError(
                f"{self.spec.name}: {place} does not match features.json: {error_summary(error)}"
            ) from None

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
                f"steps has {', '.join(sorted(steps))}, steps.observation "
                f"{', '.join(sorted(steps[OBSERVATION]))}"
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

    def _check_features(self) -> None:
        steps = self.features[STEPS].feature
        for camera, key in self.spec.cameras.items():
            if key not in steps[OBSERVATION]:
                raise DataError(
                    f"{self.spec.name}: camera {camera!r} should be steps.observation.{key}, but "
                    f"{self.directory} has {', '.join(sorted(steps[OBSERVATION]))}"
                )
        for camera, key in self.spec.depth.items():
            if key not in steps[OBSERVATION]:
                raise DataError(
                    f"{self.spec.name}: the depth of {camera!r} should be steps.observation.{key}, "
                    f"but {self.directory} has {', '.join(sorted(steps[OBSERVATION]))}"
                )
        episode = {"episode": {k: v for k, v in self.features.items() if k != STEPS}}
        for path in filter(None, (self.spec.label, self.spec.keep)):
            node: Any = {**dict(steps), **episode}
            for key in path.split("."):
                if key not in node:
                    raise DataError(
                        f"{self.spec.name}: the spec reads {path}, but {self.directory} has no "
                        f"{key!r} there (it has: {', '.join(sorted(node))})"
                    )
                node = node[key]
        for path in self.spec.language_paths:
            parent, key = path.rpartition(".")[::2]
            fields = dict(steps)[parent] if parent else steps
            if key not in fields:
                raise DataError(
                    f"{self.spec.name}: the instruction should be steps.{path}, but "
                    f"{self.directory} has {', '.join(sorted(fields))}"
                )


def steps_with_metadata(example: Mapping[str, Any], every: int) -> dict[str, Any]:
    """Return every k-th step of a parsed example, with the fields of the episode under "episode".

    The values are arrays or tensors. With every > 1, "unthinned" holds the first two steps before
    thinning.
    """
    steps = dict(example[STEPS])
    if every > 1:
        first = tf.nest.map_structure(lambda x: x[:2], steps)
        steps = tf.nest.map_structure(lambda x: x[::every], steps) | {"unthinned": first}
    return steps | {"episode": {k: v for k, v in example.items() if k != STEPS}}


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


def error_summary(error: tf.errors.OpError | UnicodeDecodeError) -> str:
    """Return the first line of a TensorFlow error, without the names of graph nodes."""
    if isinstance(error, UnicodeDecodeError):
        # The message quotes the record, and TensorFlow fails to decode it.
        return "the record cannot be parsed"
    return error.message.partition("\n")[0].rpartition("}} ")[2]


def _has_content(encoded: bytes, place: str) -> bool:
    """Return whether an image is more than padding: empty bytes, a single pixel, or all black.

    The flags in Bridge V2's metadata cannot be used: they are False for images that exist.
    """
    if not encoded:
        return False
    try:
        image = tf.io.decode_image(encoded, expand_animations=False).numpy()
    except tf.errors.OpError as error:
        raise DataError(f"{place} cannot be decoded: {error_summary(error)}") from None
    return image.size > image.shape[-1] and bool(image.any())
