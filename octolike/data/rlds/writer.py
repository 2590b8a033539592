"""Writes episodes to an RLDS dataset on disk that any RLDS or TFDS reader can open.

Several processes can write shards in any order, and after an interruption only the missing shards
are written:

    writer = Writer(root, "tabletop", "1.0.0", shards={"train": 12, "val": 1})
    writer.write("train", 3, episodes)     # in a worker; does nothing for an existing shard
    writer.finish()                        # when all shards exist: metadata, then the final name

Everything is written to <root>/<name>/<version>.incomplete, which is renamed to <version> at the
very end, so a partial dataset is never read as complete. settings.json next to the shards holds the
`settings` of the dataset: continuing or reopening it with other settings is an error.

An episode is {"steps": nested dict of arrays [T, ...], "episode_metadata": flat dict}. A string or
number under steps applies to every step. Images are uint8 [T, h, w, 3] and stored as PNG: for the
tabletop's frames of 48 and 64 pixels, PNG is lossless, half the size of JPEG at quality 95, and at
most a fifth slower to decode. Encoded frames (`EncodedImage`) are stored unchanged.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from octolike import files
from octolike.data.rlds.fields import DISCOUNT, IS_FIRST, IS_LAST, IS_TERMINAL, REWARD, STEPS
from octolike.errors import DataError

_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
SETTINGS = "settings.json"
SUMMARY = "summary.json"


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """The frames of a camera as encoded images, in the place of an array [T, h, w, 3].

    Attributes:
        frames: T byte strings, stored unchanged.
        shape: (h, w, 3) of every frame; (h, w, 1) of depth.
        format: "jpeg" or "png".
        pixels: type of a pixel: uint8; uint16 or float32 of depth.
    """

    frames: tuple[bytes, ...]
    shape: tuple[int, int, int]
    format: str
    pixels: str = "uint8"

    ndim = 4
    dtype = np.dtype(object)

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, i: int) -> bytes:
        return self.frames[i]


@dataclass(frozen=True)
class Writer:
    """Writes one dataset.

    Raises DataError if an unfinished dataset has another plan of shards, and if the dataset was
    started or completed with other settings.

    Attributes:
        root, name, version: the directory is <root>/<name>/<version>.
        shards: number of TFRecord files per split.
        settings: everything that the episodes depend on, as plain JSON values.
        may_change: settings; a change of one of them starts an unfinished dataset again.
    """

    root: str
    name: str
    version: str
    shards: Mapping[str, int]
    settings: Mapping[str, Any] = field(default_factory=dict)
    may_change: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._discard_if_changed()
        for directory in (self.directory, self._unfinished_directory):
            self._check_settings(directory)
        planned = {self._shard_path(s, i).name for s, n in self.shards.items() for i in range(n)}
        for path in sorted(self._unfinished_directory.glob(f"{self.name}-*.tfrecord-*")):
            if path.name.removesuffix(".json") not in planned:
                raise DataError(
                    f"{self._unfinished_directory} has {path.name}, which is not one of the "
                    f"planned shards {dict(self.shards)}; use the earlier plan, or remove the "
                    "directory"
                )

    @property
    def directory(self) -> Path:
        """The directory of the finished dataset."""
        return files.local_path(self.root, "data.root") / self.name / self.version

    @property
    def finished(self) -> bool:
        """Whether the dataset is complete."""
        return (self.directory / "features.json").exists()

    def shard_note(self, split: str, index: int) -> dict[str, Any] | None:
        """Return the note of a finished shard, {"episodes": …, "bytes": …, …}; else None."""
        path = self._note_path(split, index)
        return json.loads(path.read_text()) if path.exists() else None

    def write(
        self,
        split: str,
        index: int,
        episodes: Iterable[Mapping[str, Any]],
        *,
        check: Callable[[Path, tfds.features.FeaturesDict], Any] | None = None,
        may_be_empty: bool = False,
        **notes: Any,
    ) -> int:
        """Write one shard unless it exists, and return its number of episodes.

        Args:
            split: split of the shard.
            index: index of the shard in its split.
            episodes: episodes of the shard.
            check: called with the written file and its features before the file gets its final
                name; an exception discards the shard.
            may_be_empty: whether a shard without episodes is written, instead of an error.
            notes: plain values stored with the shard (see `shard_note`), read when it is complete.

        Raises:
            DataError: an episode is empty, not finite, or differs in structure from the first; or
                there is none.
            OSError: the disk is full.
        """
        existing = self.shard_note(split, index)
        if existing:
            return existing["episodes"]
        path = self._shard_path(split, index)
        self._write_settings()
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        features, count, size = None, 0, 0
        try:
            with tf.io.TFRecordWriter(str(temporary)) as file:
                for episode in episodes:
                    place = f"{self.name}/{split}: shard {index}, episode {count}"
                    example = rlds_episode(episode, place)
                    features = features or infer_features(example)
                    record = _serialize(features, example, place)
                    file.write(record)
                    count, size = count + 1, size + len(record)
            if features is None and not may_be_empty:
                raise DataError(f"{self.name}/{split}: shard {index} has no episodes")
            if check is not None and features is not None:
                check(temporary, features)
            temporary.rename(path)
        except tf.errors.OpError as error:
            raise OSError(f"{path} could not be written: {error.message}") from None
        finally:
            temporary.unlink(missing_ok=True)
        stored = None if features is None else features.to_json()
        note = {"episodes": count, "bytes": size, "features": stored, **notes}
        # Last, and atomically: a shard without its note counts as missing.
        files.write_json(self._note_path(split, index), note, indent=None)
        return count

    def summary(self) -> dict[str, Any]:
        """Return the summary of the finished dataset; {} without one."""
        path = self.directory / SUMMARY
        return json.loads(path.read_text()) if path.exists() else {}

    def finish(self, summary: Mapping[str, Any] | None = None) -> Path:
        """Write the metadata, rename the dataset to its final name, and return its directory.

        A split without episodes is left out. The summary, plain JSON values, is stored next to the
        shards.

        Raises DataError if a shard is missing, if the features of two shards differ, or if there
        are no episodes.
        """
        if self.finished:
            return self.directory
        notes: dict[str, list[dict[str, Any]]] = {}
        for split, count in self.shards.items():
            shard_notes = [self.shard_note(split, i) for i in range(count)]
            missing = [i for i, note in enumerate(shard_notes) if note is None]
            if missing:
                raise DataError(
                    f"{self.name}/{split}: shards {missing} of {count} are not written; "
                    "write them before finishing"
                )
            notes[split] = [note for note in shard_notes if note is not None]
        stored = [
            note["features"] for of_split in notes.values() for note in of_split if note["episodes"]
        ]
        if not stored:
            raise DataError(f"{self.name} has no episodes")
        if any(f != stored[0] for f in stored):
            raise DataError(f"{self.name}: its shards have different features; write them again")
        directory = self._unfinished_directory
        splits = [
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[n["episodes"] for n in split_notes],
                num_bytes=sum(n["bytes"] for n in split_notes),
                filename_template=tfds.core.ShardedFileTemplate(
                    data_dir=directory,
                    template=_TEMPLATE,
                    dataset_name=self.name,
                    split=split,
                    filetype_suffix="tfrecord",
                ),
            )
            for split, split_notes in notes.items()
            if any(note["episodes"] for note in split_notes)
        ]
        for split in notes.keys() - {info.name for info in splits}:  # TFDS takes no split without
            for i in range(self.shards[split]):
                self._shard_path(split, i).unlink(missing_ok=True)
        tfds.folder_dataset.write_metadata(
            data_dir=directory,
            features=tfds.features.FeaturesDict.from_json(stored[0]),
            split_infos=splits,
            version=self.version,
            check_data=False,
        )
        for remnant in directory.glob(".*"):  # of an interrupted writer
            shutil.rmtree(remnant) if remnant.is_dir() else remnant.unlink()
        if summary:
            files.write_json(directory / SUMMARY, summary)
        directory.rename(self.directory)
        # Only now: in an unfinished dataset, shards without notes would count as missing.
        for note in self.directory.glob(f"{self.name}-*.json"):
            note.unlink()
        return self.directory

    def _write_settings(self) -> None:
        """Write settings.json to the unfinished directory if it is missing; else check it."""
        directory = self._unfinished_directory
        directory.mkdir(parents=True, exist_ok=True)
        self._check_settings(directory)
        if self.settings and not (directory / SETTINGS).exists():
            files.write_json(directory / SETTINGS, self.settings)

    def _discard_if_changed(self) -> None:
        """Remove an unfinished dataset if its settings differ in those of `may_change` alone."""
        directory = self._unfinished_directory
        differ = self._differences(directory)
        if differ and differ[0].keys() <= {*self.may_change}:
            names = ", ".join(differ[0])
            print(f"{directory} was started with another {names}: it is started again")
            shutil.rmtree(directory)

    def _differences(self, directory: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Return (stored, present) values of the settings that differ; None if none does."""
        if not self.settings or not (directory / SETTINGS).exists():
            return None
        stored, current = json.loads((directory / SETTINGS).read_text()), _as_json(self.settings)
        differ = [k for k in sorted({*stored, *current}) if stored.get(k) != current.get(k)]
        old, new = ({k: d.get(k) for k in differ} for d in (stored, current))
        return (old, new) if differ else None

    def _check_settings(self, directory: Path) -> None:
        if differ := self._differences(directory):
            old, new = differ
            raise DataError(
                f"{directory} was started with {old}, but now it is {new}; continue with the old "
                "settings, give the dataset another name, or remove the directory to start again"
            )

    @property
    def _unfinished_directory(self) -> Path:
        return self.directory.with_name(f"{self.version}.incomplete")

    def _note_path(self, split: str, index: int) -> Path:
        path = self._shard_path(split, index)
        return path.with_name(f"{path.name}.json")

    def _shard_path(self, split: str, index: int) -> Path:
        total = self.shards[split]
        return (
            self._unfinished_directory / f"{self.name}-{split}.tfrecord-{index:05d}-of-{total:05d}"
        )


def rlds_episode(episode: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return an episode with the missing step fields of RLDS added.

    The last step of a success (episode_metadata.success) is terminal and has reward 1. Without that
    field, the outcome is unknown: all rewards are 0 and no step is terminal. Raises DataError,
    naming `place`, for an episode without steps, with differing lengths or non-finite numbers.
    """
    if STEPS not in episode:
        raise DataError(f"{place} has the keys {sorted(episode)}, expected {STEPS!r}")
    steps = _map(episode[STEPS], lambda x: x if isinstance(x, EncodedImage) else np.asarray(x))
    metadata = dict(episode.get("episode_metadata", {}))
    lengths = {k: len(x) for k, x in _leaves(steps) if x.ndim}
    if not lengths or len(set(lengths.values())) > 1 or min(lengths.values()) == 0:
        raise DataError(f"{place}: steps have lengths {lengths}, expected one length above 0")
    for key, x in _leaves(steps):
        if not _finite(x):
            step = f" at step {np.argwhere(~np.isfinite(x))[0][0]}" if x.ndim else ""
            raise DataError(f"{place}: steps.{key} is not finite{step}")
    for key, x in _leaves(metadata):
        if not _finite(np.asarray(x)):
            raise DataError(f"{place}: episode_metadata.{key} is not finite")
    t = next(iter(lengths.values()))
    last = np.arange(t) == t - 1
    terminal = last & bool(metadata.get("success", False))
    defaults = {
        IS_FIRST: np.arange(t) == 0,
        IS_LAST: last,
        IS_TERMINAL: terminal,
        REWARD: terminal.astype(np.float32),
        DISCOUNT: np.ones(t, np.float32),
    }
    return {STEPS: defaults | _repeat_scalars(steps, t), "episode_metadata": metadata}


def infer_features(example: Mapping[str, Any]) -> tfds.features.FeaturesDict:
    """Return the TFDS features of an `rlds_episode`."""
    steps = _map(example[STEPS], _step_feature)
    metadata = _map(example["episode_metadata"], lambda x: _feature(np.asarray(x)))
    return tfds.features.FeaturesDict(
        {STEPS: tfds.features.Dataset(steps), "episode_metadata": metadata}
    )


def _serialize(features: tfds.features.FeaturesDict, example: dict[str, Any], place: str) -> bytes:
    t = len(example[STEPS][IS_FIRST])
    steps = [_map(example[STEPS], lambda x, i=i: _at(x, i)) for i in range(t)]
    try:
        record = features.serialize_example({**example, STEPS: steps})
    # TFDS raises a RuntimeError for a missing or unknown key.
    except (ValueError, TypeError, KeyError, AssertionError, RuntimeError) as error:
        raise DataError(
            f"{place} does not match the features of the first episode: {error}"
        ) from error
    # The order of a protobuf map differs between processes. Sorted, the same episodes give the same
    # file in every process.
    return tf.train.Example.FromString(record).SerializeToString(deterministic=True)


def _at(x: np.ndarray | EncodedImage, i: int) -> Any:
    """Return step i; float depth decoded, because TFDS encodes floats itself."""
    if isinstance(x, EncodedImage) and x.pixels == "float32":
        return tf.io.decode_png(x[i], channels=4).numpy().view(np.float32)
    return x[i]


def _step_feature(x: np.ndarray | EncodedImage) -> Any:
    if isinstance(x, EncodedImage):
        dtype = np.dtype(x.pixels).type
        return tfds.features.Image(shape=x.shape, dtype=dtype, encoding_format=x.format)
    return _feature(np.asarray(x[0]))


def _feature(x: np.ndarray) -> Any:
    if x.dtype == np.uint8 and x.ndim == 3 and x.shape[-1] == 3:
        return tfds.features.Image(shape=x.shape, encoding_format="png")
    if x.dtype.kind in "US":
        return tfds.features.Text()
    if x.ndim == 0:
        return tfds.features.Scalar(dtype=x.dtype.type)
    return tfds.features.Tensor(shape=x.shape, dtype=x.dtype.type)


def _as_json(x: Any) -> Any:
    """Return a value as it is after writing and reading JSON: tuples become lists."""
    return json.loads(json.dumps(x))


def _finite(x: np.ndarray) -> bool:
    return not np.issubdtype(x.dtype, np.floating) or bool(np.isfinite(x).all())


def _repeat_scalars(steps: Mapping[str, Any], t: int) -> dict[str, Any]:
    return _map(steps, lambda x: x if x.ndim else np.repeat(x, t))


def _map(tree: Mapping[str, Any], f: Any) -> dict[str, Any]:
    return {k: _map(v, f) if isinstance(v, Mapping) else f(v) for k, v in tree.items()}


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
