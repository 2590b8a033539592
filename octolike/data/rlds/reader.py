"""Disk to standard episodes: records read by offset, parsed, standardised, checked.

Images stay the encoded bytes that they are on disk. `Reader` opens one split of one dataset; an
episode's record is found by the index that `statistics.py` makes, so any episode can be read at
any time, and an order of episodes is just an order of numbers.
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

# A TFRecord is: length (8 bytes), its checksum (4), the data, its checksum (4).
RECORD_HEADER, RECORD_FOOTER = 12, 4


class MissingSplitError(DataError):
    """A split that a dataset does not have."""


class ExcludedEpisodeError(DataError):
    """An episode that the dataset's row leaves out by its `keep` flag."""


@dataclass
class Episode:
    """A standard episode of T usable steps.

    Attributes:
        action: float32 [T, A], in robot units.
        proprio: float32 [T, P], in robot units, or None.
        instructions: T strings, "" where there is none; T tuples where the row has several fields.
        images: camera: T encoded images; a camera that this episode lacks is not in it.
        depth: camera: T depth images, encoded or as arrays [h, w, 1], in the row's unit.
    """

    action: np.ndarray
    proprio: np.ndarray | None
    instructions: list[str] | list[tuple[str, ...]]
    images: dict[str, list[bytes]]
    depth: dict[str, list[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.action)


class Reader:
    """One split of one dataset on disk."""

    def __init__(
        self, spec: DatasetSpec, root: str, split: str, *, uninformative: bool = False
    ) -> None:
        """Open <root>/<name>/<version> (local or gs://).

        uninformative: keep instructions that the row marks as not saying what to do.
        Raises DataError when the directory, version, split, a shard or a feature is missing.
        """
        self.spec, self.split = spec, split
        self._told = spec.language_informative or uninformative
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
                f"(there is: {', '.join(sorted(info.splits)) or 'none'})"
            )
        self.files = [str(f) for f in info.splits[split].filepaths]
        self.counts = list(info.splits[split].shard_lengths)
        lost = [f for f in self.files if not tf.io.gfile.exists(f)]
        if lost:
            raise DataError(
                f"{spec.name}: {len(lost)} of {len(self.files)} shards of split {split!r} are "
                f"missing, the first is {lost[0]}; copy the dataset again"
            )
        self.features = info.features
        self._check_features()
        skip = {STEPS: tfds.decode.SkipDecoding()}
        # traced here, once: tensorflow warns of functions that many readers make and call
        self._parse = tf.function(
            lambda raw: self.features.deserialize_example(raw, decoders=skip),  # images encoded
            input_signature=[tf.TensorSpec((), tf.string)],
        ).get_concrete_function()

    def read_records(self, shard: int) -> Iterator[bytes]:
        """Yield a shard's raw records in order; DataError names a truncated or corrupt one."""
        count = 0
        stream = iter(tf.data.TFRecordDataset(self.files[shard], buffer_size=1 << 20))
        while True:
            try:
                raw = next(stream).numpy()
            except StopIteration:
                break
            except tf.errors.OpError as error:
                raise DataError(
                    f"{self.files[shard]}: record {count} is truncated, corrupt or unreadable "
                    f"({error_summary(error)}); copy the file again"
                ) from None
            yield raw
            count += 1
        if count != self.counts[shard]:
            raise DataError(
                f"{self.files[shard]}: {count} records, but dataset_info.json promises "
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
        """Return the episode of the record of `length` bytes that starts at byte `offset`.

        cameras, depth: whose images are kept; cameras None: all.
        """
        raw = self.read_record(shard, offset, length)
        return self.parse_episode(raw, f"{self.files[shard]}, byte {offset}", cameras, depth)

    def read_record(self, shard: int, offset: int, length: int) -> bytes:
        """Return the raw record of `length` bytes that starts at byte `offset`."""
        path = self.files[shard]
        try:
            with tf.io.gfile.GFile(path, "rb") as f:
                f.seek(offset)
                block = f.read(RECORD_HEADER + length)
        except tf.errors.OpError as error:
            raise DataError(f"{path} could not be read: {error_summary(error)}") from None
        if len(block) < RECORD_HEADER + length or struct.unpack("<Q", block[:8])[0] != length:
            raise DataError(
                f"{path}: no record of {length} bytes at {offset}; the file has changed since its "
                "index was made: restore it, or delete the index to have it made again"
            )
        return block[RECORD_HEADER:]

    def parse_episode(
        self,
        raw: bytes,
        where: str,
        cameras: Collection[str] | None = None,
        depth: Collection[str] = (),
    ) -> Episode:
        """Return the standard episode of a raw record; `where` names it in errors."""
        steps = self._steps(raw, where)
        standard = self.standardize(steps, where)
        t = len(standard.action)
        images = {}
        for camera, key in self.spec.cameras.items():
            if cameras is not None and camera not in cameras:
                continue
            frames = list(steps[OBSERVATION][key][:t])
            if _is_picture(frames[0], f"{self.spec.name}: {where}: {camera} image of step 0"):
                images[camera] = frames
        deep = {c: list(steps[OBSERVATION][self.spec.depth[c]][:t]) for c in depth}
        texts = [decode_texts(value_at(steps, path))[:t] for path in self.spec.language_paths]
        if not self._told or not texts:
            texts = [[""] * t]
        instructions = texts[0] if len(texts) == 1 else list(zip(*texts, strict=True))
        return Episode(standard.action, standard.proprio, instructions, images, deep)

    def parse_label(self, raw: bytes, where: str) -> str:
        """Return the text of the row's label field in a raw record, "" where the row has none."""
        if not self.spec.label:
            return ""
        value = value_at(self._steps(raw, where), self.spec.label)
        return next(iter(decode_texts(np.reshape(value, -1))), "")

    def parse_steps(self, raw: bytes, where: str) -> dict[str, Any]:
        """Return the parsed steps of a raw record (`steps_with_metadata`); images stay encoded."""
        return self._steps(raw, where)

    def standardize(self, steps: Mapping[str, Any], where: str) -> StandardSteps:
        """Standardise; DataError for an episode without usable steps or with non-finite numbers."""
        if self.spec.keep and not np.all(value_at(steps, self.spec.keep)):
            raise ExcludedEpisodeError(f"{self.spec.name}: {where}: {self.spec.keep} is false")
        if len(steps[IS_FIRST]) == 0:
            raise DataError(f"{self.spec.name}: {where} has no steps")
        try:
            action, proprio = self.spec.standard_steps(steps)
        except KeyError as error:
            raise DataError(
                f"{self.spec.name}: {where} has no field {error}, which the dataset's row reads; "
                f"steps has {', '.join(sorted(steps))}, steps.observation "
                f"{', '.join(sorted(steps[OBSERVATION]))}"
            ) from None
        except (zlib.error, ValueError, TypeError, IndexError) as error:
            raise DataError(
                f"{self.spec.name}: {where} is not as the dataset's row expects: {error}"
            ) from None
        if len(action) == 0:
            raise DataError(f"{self.spec.name}: {where} has no usable steps")
        proprio = proprio if self.spec.proprio else None
        parts = (("action", action, self.spec.action), ("proprio", proprio, self.spec.proprio))
        for part, x, layout in parts:
            if layout is None:
                continue
            if x.shape[1:] != (len(layout),):
                raise DataError(
                    f"{self.spec.name}: {where}: {part} has shape {x.shape}, expected "
                    f"[T, {len(layout)}] ({', '.join(layout.names)})"
                )
            if not np.isfinite(x).all():
                t, d = np.argwhere(~np.isfinite(x))[0]
                raise DataError(
                    f"{self.spec.name}: {where}: {part} at step {t} is {x[t, d]} in dimension "
                    f"{d} ({layout.names[d]}); mend it or set data.bad_episodes='drop'"
                )
        return StandardSteps(
            np.asarray(action, np.float32), None if proprio is None else np.float32(proprio)
        )

    def _steps(self, raw: bytes, where: str) -> dict[str, Any]:
        try:
            parsed = tf.nest.map_structure(lambda x: x.numpy(), self._parse(tf.constant(raw)))
            return steps_with_metadata(parsed, self.spec.every)
        except (tf.errors.OpError, UnicodeDecodeError) as error:
            # tensorflow's message quotes the record, and fails itself where that is no text
            quoted = isinstance(error, UnicodeDecodeError)
            said = "no text at all" if quoted else error_summary(error)
            raise DataError(
                f"{self.spec.name}: {where} is not what features.json says: {said}"
            ) from None

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
                        f"{self.spec.name}: the row reads {path}, but {self.directory} has no "
                        f"{key!r} there (it has: {', '.join(sorted(node))})"
                    )
                node = node[key]
        for path in self.spec.language_paths:
            node, key = path.rpartition(".")[::2]
            there = dict(steps)[node] if node else steps
            if key not in there:
                raise DataError(
                    f"{self.spec.name}: the instruction should be steps.{path}, but "
                    f"{self.directory} has {', '.join(sorted(there))}"
                )


def steps_with_metadata(example: Mapping[str, Any], every: int) -> dict[str, Any]:
    """Return the steps of a parsed example as rows see them.

    Of the steps, each `every`-th is kept; "unthinned" has the first two of all then. "episode" has
    what the example says of the whole episode.
    """
    steps = dict(example[STEPS])
    if every > 1:
        first = tf.nest.map_structure(lambda x: x[:2], steps)
        steps = tf.nest.map_structure(lambda x: x[::every], steps) | {"unthinned": first}
    return steps | {"episode": {k: v for k, v in example.items() if k != STEPS}}


def value_at(steps: Mapping[str, Any], path: str) -> Any:
    """Return the value at a dotted path; KeyError, naming the path, where there is none."""
    value: Any = steps
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise KeyError(path)
        value = value[key]
    return value


def decode_texts(x: Any) -> list[str]:
    """Return texts of bytes [T], or of code points [T, n] that end with the first zero."""
    x = np.asarray(x)
    if x.dtype.kind in "iu":
        return ["".join(map(chr, row[: (*np.flatnonzero(row == 0), len(row))[0]])) for row in x]
    return [t.decode("utf-8", errors="replace") for t in x.tolist()]


def find_directory(spec: DatasetSpec, root: str) -> str:
    """Return the directory of a dataset's version; DataError says what was found instead."""
    name = f"{root.rstrip('/')}/{spec.name}"
    if spec.folder and tf.io.gfile.isdir(released := f"{root.rstrip('/')}/{spec.folder}"):
        name = released
    wanted = f"{name}/{spec.version or _only_version(name)}"
    if tf.io.gfile.exists(f"{wanted}/features.json"):
        return wanted
    if not root or not tf.io.gfile.isdir(root):
        raise DataError(
            f"data.root {root!r} is no directory; set it to the one that holds {spec.name}/"
        )
    for started in (wanted, f"{wanted}.incomplete"):
        if tf.io.gfile.isdir(started):
            raise DataError(
                f"{spec.name}: {started} is not finished; run what was writing it again to the end"
            )
    place = name if tf.io.gfile.isdir(name) else root
    found = ", ".join(sorted(x.rstrip("/") for x in tf.io.gfile.listdir(place))[:20]) or "nothing"
    raise DataError(
        f"{spec.name}: {wanted} is not there; {place} has: {found}. Set data.root to the directory "
        f"that holds {spec.name}/{spec.version}"
    )


def _only_version(name: str) -> str:
    """Return the version on disk where a row states none, and there is just one."""
    there = tf.io.gfile.listdir(name) if tf.io.gfile.isdir(name) else []
    versions = [v.rstrip("/") for v in there if v[:1].isdigit() and "incomplete" not in v]
    return versions[0] if len(versions) == 1 else "<version>"


def error_summary(error: tf.errors.OpError) -> str:
    """Return the first line of tensorflow's message, without the names of graph nodes."""
    return error.message.partition("\n")[0].rpartition("}} ")[2]


def _is_picture(encoded: bytes, where: str) -> bool:
    """Tell a real image from padding: empty bytes, a single pixel, or black all over.

    The flags of Bridge V2's metadata say False for images that are there.
    """
    if not encoded:
        return False
    try:
        image = tf.io.decode_image(encoded, expand_animations=False).numpy()
    except tf.errors.OpError as error:
        raise DataError(f"{where} cannot be decoded: {error_summary(error)}") from None
    return image.size > image.shape[-1] and bool(image.any())
