"""Episodes to an RLDS dataset on disk that any RLDS or TFDS reader opens.

Shards can be written by many processes, in any order, and after a kill only the missing ones are
written again:

    writer = Writer(root, "tabletop", "1.0.0", shards={"train": 12, "val": 1})
    writer.write("train", 3, episodes)     # in a worker; an existing shard is left alone
    writer.finish()                        # once all are there: metadata, then the real name

Everything happens in <root>/<name>/<version>.incomplete, which becomes <version> at the very end,
so nothing half-written is ever read as whole. What the dataset is made with (`settings`) lies in
settings.json beside the shards: going on with other settings is an error, half-way and afterwards.

An episode is {"steps": nested dict of arrays [T, ...], "episode_metadata": flat dict}. A string or
number under steps is every step's. Images are uint8 [T, h, w, 3] and stored as PNG: for the
tabletop's frames of 48 and 64 pixels that is exact, half the size of JPEG at quality 95, and at
most a fifth slower to decode. Encoded frames (`EncodedImage`) are stored as they are.
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


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """A camera's frames as encoded images: `frames` are T byte strings.

    shape: (h, w, 3) of every one; format: "jpeg" or "png". It stands where an array [T, h, w, 3]
    would, and its bytes are stored unchanged.
    """

    frames: tuple[bytes, ...]
    shape: tuple[int, int, int]
    format: str

    ndim = 4
    dtype = np.dtype(object)

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, i: int) -> bytes:
        return self.frames[i]


@dataclass(frozen=True)
class Writer:
    """Writes one dataset.

    shards: number of TFRecord files per split. settings: what the episodes depend on, as plain
    JSON values; kept with the dataset. Raises DataError where an unfinished dataset was planned
    with other numbers of shards, and where the dataset was begun or made with other settings.
    """

    root: str
    name: str
    version: str
    shards: Mapping[str, int]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for place in (self.directory, self._place):
            self._check_settings(place)
        planned = {self._path(s, i).name for s, n in self.shards.items() for i in range(n)}
        for path in sorted(self._place.glob(f"{self.name}-*.tfrecord-*")):
            if path.name.removesuffix(".json") not in planned:
                raise DataError(
                    f"{self._place} has {path.name}, which is not of the planned shards "
                    f"{dict(self.shards)}; go on with its own plan, or remove the directory"
                )

    @property
    def directory(self) -> Path:
        """Where the finished dataset is."""
        return files.local_path(self.root, "data.root") / self.name / self.version

    @property
    def finished(self) -> bool:
        """Whether the dataset is whole."""
        return (self.directory / "features.json").exists()

    def shard_note(self, split: str, index: int) -> dict[str, Any] | None:
        """Return what is known of a finished shard, {"episodes": …, "bytes": …, …}, or None."""
        note = self._note(split, index)
        return json.loads(note.read_text()) if note.exists() else None

    def write(
        self,
        split: str,
        index: int,
        episodes: Iterable[Mapping[str, Any]],
        *,
        check: Callable[[Path, tfds.features.FeaturesDict], Any] | None = None,
        **notes: Any,
    ) -> int:
        """Write one shard, if it is not there yet, and return its number of episodes.

        check: is called with the written file and its features, before the file gets its name; what
        it raises undoes the shard. notes: plain values kept with the shard (see `shard_note`), as
        they are when it is whole. Raises DataError for an episode that is empty, not finite, or
        unlike the first one; OSError when the disk is full.
        """
        known = self.shard_note(split, index)
        if known:
            return known["episodes"]
        path = self._path(split, index)
        self._claim()
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        features, count, size = None, 0, 0
        try:
            with tf.io.TFRecordWriter(str(temporary)) as file:
                for episode in episodes:
                    where = f"{self.name}/{split}: shard {index}, episode {count}"
                    example = rlds_episode(episode, where)
                    features = features or infer_features(example)
                    record = _serialize(features, example, where)
                    file.write(record)
                    count, size = count + 1, size + len(record)
            if features is None:
                raise DataError(f"{self.name}/{split}: shard {index} has no episodes")
            if check is not None:
                check(temporary, features)
            temporary.rename(path)
        except tf.errors.OpError as error:
            raise OSError(f"{path} could not be written: {error.message}") from None
        finally:
            temporary.unlink(missing_ok=True)
        note = {"episodes": count, "bytes": size, "features": features.to_json(), **notes}
        # Last and at once: a shard without its note counts as missing.
        files.write_json(self._note(split, index), note, indent=None)
        return count

    def finish(self) -> Path:
        """Write the metadata, give the dataset its name, and return its directory.

        Raises DataError when a shard is missing or has other features than the first.
        """
        if self.finished:
            return self.directory
        notes = {s: [self.shard_note(s, i) for i in range(n)] for s, n in self.shards.items()}
        for split, known in notes.items():
            missing = [i for i, note in enumerate(known) if note is None]
            if missing:
                raise DataError(
                    f"{self.name}/{split}: shards {missing} of {len(known)} are not written; "
                    "write them, then finish"
                )
        stored = [note["features"] for known in notes.values() for note in known]
        if any(f != stored[0] for f in stored):
            raise DataError(f"{self.name}: its shards have different features; write them anew")
        place = self._place
        splits = [
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[n["episodes"] for n in known],
                num_bytes=sum(n["bytes"] for n in known),
                filename_template=tfds.core.ShardedFileTemplate(
                    data_dir=place,
                    template=_TEMPLATE,
                    dataset_name=self.name,
                    split=split,
                    filetype_suffix="tfrecord",
                ),
            )
            for split, known in notes.items()
        ]
        tfds.folder_dataset.write_metadata(
            data_dir=place,
            features=tfds.features.FeaturesDict.from_json(stored[0]),
            split_infos=splits,
            version=self.version,
            check_data=False,
        )
        for left in place.glob(".*"):  # by a writer that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        place.rename(self.directory)
        # Only now: without their notes, an unfinished dataset's shards would count as missing.
        for note in self.directory.glob(f"{self.name}-*.json"):
            note.unlink()
        return self.directory

    def _claim(self) -> None:
        """Say in the unfinished directory what it is made with, unless that is said already."""
        self._place.mkdir(parents=True, exist_ok=True)
        self._check_settings(self._place)
        if self.settings and not (self._place / SETTINGS).exists():
            files.write_json(self._place / SETTINGS, self.settings)

    def _check_settings(self, place: Path) -> None:
        if not self.settings or not (place / SETTINGS).exists():
            return
        known, ours = json.loads((place / SETTINGS).read_text()), _plain(self.settings)
        differ = [k for k in sorted({*known, *ours}) if known.get(k) != ours.get(k)]
        if differ:
            was, now = ({k: d.get(k) for k in differ} for d in (known, ours))
            raise DataError(
                f"{place} was begun with {was}, now it is {now}; go on with the old settings, give "
                "the dataset another name, or remove the directory to make it anew"
            )

    @property
    def _place(self) -> Path:
        return self.directory.with_name(f"{self.version}.incomplete")

    def _note(self, split: str, index: int) -> Path:
        path = self._path(split, index)
        return path.with_name(f"{path.name}.json")

    def _path(self, split: str, index: int) -> Path:
        total = self.shards[split]
        return self._place / f"{self.name}-{split}.tfrecord-{index:05d}-of-{total:05d}"


def rlds_episode(episode: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return an episode with RLDS's own step fields added where it lacks them.

    Reward is 1 and the step terminal at the end of a success: episode_metadata.success. Where that
    is not said, no reward is given and no step is terminal: nobody knows how the episode ended.
    Raises DataError, naming `where`, for no steps, differing lengths or non-finite numbers.
    """
    if STEPS not in episode:
        raise DataError(f"{where} has the keys {sorted(episode)}, expected {STEPS!r}")
    steps = _map(episode[STEPS], lambda x: x if isinstance(x, EncodedImage) else np.asarray(x))
    metadata = dict(episode.get("episode_metadata", {}))
    lengths = {k: len(x) for k, x in _leaves(steps) if x.ndim}
    if not lengths or len(set(lengths.values())) > 1 or min(lengths.values()) == 0:
        raise DataError(f"{where}: steps have lengths {lengths}, expected one length above 0")
    for key, x in _leaves(steps):
        if not _finite(x):
            at = f" at step {np.argwhere(~np.isfinite(x))[0][0]}" if x.ndim else ""
            raise DataError(f"{where}: steps.{key} is not finite{at}")
    for key, x in _leaves(metadata):
        if not _finite(np.asarray(x)):
            raise DataError(f"{where}: episode_metadata.{key} is not finite")
    t = next(iter(lengths.values()))
    last = np.arange(t) == t - 1
    done = last & bool(metadata.get("success", False))
    own = {
        IS_FIRST: np.arange(t) == 0,
        IS_LAST: last,
        IS_TERMINAL: done,
        REWARD: done.astype(np.float32),
        DISCOUNT: np.ones(t, np.float32),
    }
    return {STEPS: own | _spread(steps, t), "episode_metadata": metadata}


def infer_features(example: Mapping[str, Any]) -> tfds.features.FeaturesDict:
    """Return the TFDS features that an `rlds_episode` shows."""
    steps = _map(example[STEPS], _step_feature)
    metadata = _map(example["episode_metadata"], lambda x: _feature(np.asarray(x)))
    return tfds.features.FeaturesDict(
        {STEPS: tfds.features.Dataset(steps), "episode_metadata": metadata}
    )


def _serialize(features: tfds.features.FeaturesDict, example: dict[str, Any], where: str) -> bytes:
    t = len(example[STEPS][IS_FIRST])
    steps = [_map(example[STEPS], lambda x, i=i: x[i]) for i in range(t)]
    try:
        record = features.serialize_example(features.encode_example({**example, STEPS: steps}))
    # tfds turns the KeyError of a missing or unknown key into a RuntimeError.
    except (ValueError, TypeError, KeyError, AssertionError, RuntimeError) as error:
        raise DataError(f"{where} does not fit the features of the first: {error}") from error
    # The order of a protobuf map differs between processes: in order, the same episodes make the
    # same file whoever writes them.
    return tf.train.Example.FromString(record).SerializeToString(deterministic=True)


def _step_feature(x: np.ndarray | EncodedImage) -> Any:
    if isinstance(x, EncodedImage):
        return tfds.features.Image(shape=x.shape, encoding_format=x.format)
    return _feature(np.asarray(x[0]))


def _feature(x: np.ndarray) -> Any:
    if x.dtype == np.uint8 and x.ndim == 3 and x.shape[-1] == 3:
        return tfds.features.Image(shape=x.shape, encoding_format="png")
    if x.dtype.kind in "US":
        return tfds.features.Text()
    if x.ndim == 0:
        return tfds.features.Scalar(dtype=x.dtype.type)
    return tfds.features.Tensor(shape=x.shape, dtype=x.dtype.type)


def _plain(x: Any) -> Any:
    """Return a value as JSON gives it back: tuples become lists."""
    return json.loads(json.dumps(x))


def _finite(x: np.ndarray) -> bool:
    return not np.issubdtype(x.dtype, np.floating) or bool(np.isfinite(x).all())


def _spread(steps: Mapping[str, Any], t: int) -> dict[str, Any]:
    return _map(steps, lambda x: x if x.ndim else np.repeat(x, t))


def _map(tree: Mapping[str, Any], f: Any) -> dict[str, Any]:
    return {k: _map(v, f) if isinstance(v, Mapping) else f(v) for k, v in tree.items()}


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
