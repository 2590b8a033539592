"""The episode index of a split: the position of each episode on disk, and its cache file.

With the index (shard, offset, length, steps and task of each episode), episodes can be read in any
order and tasks can be weighted. It also holds the sketches from which statistics are computed.

The cache is next to the data or, if they are read-only, in data.cache (default: the user's cache
directory). Its name contains digests of everything it depends on, so an outdated cache is never
read. Files are renamed to their final name when they are complete.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import sys
import threading
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import tensorflow as tf

from octolike.data.rlds.quantile_sketch import QuantileSketch
from octolike.data.rlds.reader import Reader
from octolike.data.specs.episode_filter import EpisodeFilter
from octolike.embodiment import Statistics

FORMAT = 7  # of the cache file
ALGORITHM = 1  # increase it if the pass over the records computes an index or sketches differently
PARTS = ("action", "proprio")
COLUMNS = ("shard", "offset", "length", "content", "steps", "kept_start", "task", "label")
CAMERA_COLUMNS = ("image_bytes", "black_frames", "depth_bytes")
_TEXTS = ("tasks", "labels", "bad")
LARGEST = 8 << 30  # bytes of a stored index in memory: 60 million episodes


@dataclass(frozen=True, eq=False)
class EpisodeIndex:
    """Positions and tasks of the usable episodes, and sketches of their steps.

    Attributes:
        shard, offset, length, steps: int64 [episodes]; offset and length in bytes.
        content: int64 [episodes], a fingerprint of the record (record_files.content_fingerprint).
        kept_start, kept: if the filter drops idle steps, an episode consists of the standard steps
            at the positions kept[kept_start : kept_start + steps] (int32); of all of them if
            kept_start, int64 [episodes], is -1. `positions` returns them.
        task: int64 [episodes], index into `tasks`: the stored instructions, "" for none.
        label: int64 [episodes], index into `labels`: texts of the spec's label field, "" for none.
        image_bytes: int64 [episodes, C], bytes of the encoded images of each camera of the spec, in
            the order of `spec.cameras`, over the usable steps.
        black_frames: int64 [episodes, C], how many of these images are black or empty.
        depth_bytes: int64 [episodes, D], the same as image_bytes, in the order of `spec.depth`.
        sketches: "action" and, if the dataset has it, "proprio": over all steps.
        bad: a reason for each episode that cannot be used.
        filtered_by: number of episodes that filters exclude, by reason.
        idle_steps: number of idle steps dropped.
    """

    shard: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    content: np.ndarray
    steps: np.ndarray
    kept_start: np.ndarray
    task: np.ndarray
    label: np.ndarray
    image_bytes: np.ndarray
    black_frames: np.ndarray
    depth_bytes: np.ndarray
    tasks: tuple[str, ...]
    labels: tuple[str, ...]
    sketches: Mapping[str, QuantileSketch]
    bad: tuple[str, ...]
    filtered_by: Mapping[str, int] = field(default_factory=dict)
    kept: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    idle_steps: int = 0

    @property
    def filtered(self) -> int:
        """The number of episodes that filters exclude."""
        return sum(self.filtered_by.values())

    @cached_property
    def action(self) -> Statistics:
        """The statistics of the actions."""
        return self.sketches["action"].statistics()

    @cached_property
    def proprio(self) -> Statistics | None:
        """The statistics of the proprio; None for a dataset without it."""
        return self.sketches["proprio"].statistics() if "proprio" in self.sketches else None

    def positions(self, episode: int) -> np.ndarray:
        """Return the positions of an episode's steps among its standard steps, int [steps]."""
        start, steps = int(self.kept_start[episode]), int(self.steps[episode])
        return np.arange(steps) if start < 0 else self.kept[start : start + steps]

    @property
    def has_image(self) -> np.ndarray:
        """Bool [episodes, C]: False for cameras with more black frames than others."""
        return 2 * self.black_frames <= self.steps[:, None]

    @property
    def has_instruction(self) -> np.ndarray:
        """Bool [episodes]: which of them have an instruction."""
        return np.array([bool(text) for text in self.tasks], bool)[self.task]

    def first_episodes(self, count: int) -> EpisodeIndex:
        """Return the index of the first episodes (0: all); the statistics remain those of all."""
        return self.take(slice(count or len(self.steps)))

    def take(self, episodes: np.ndarray | slice) -> EpisodeIndex:
        """Return the index of some episodes (numbers, mask or slice); the statistics remain."""
        return replace(self, **{k: getattr(self, k)[episodes] for k in COLUMNS + CAMERA_COLUMNS})


def data_digest(reader: Reader) -> str:
    """Return a digest of everything but the spec that an index depends on: the files, the code."""
    values = [FORMAT, ALGORITHM, reader.stamps, reader.counts, repr(reader.features)]
    # Only options that differ from their defaults: a new option keeps the digests of old indices.
    if not all(mask.all() for mask in reader.selected):
        values.append([np.flatnonzero(mask).tolist() for mask in reader.selected])
    if reader.share:
        values.append(["share", reader.share])
    if reader.filters != EpisodeFilter():
        values.append(asdict(reader.filters))
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def index_digest(reader: Reader) -> str:
    """Return the digest of everything that an index depends on: the files, the code, the spec."""
    spec = reader.spec.fingerprint()
    if reader.representation != "as_stored":
        values = json.dumps([spec, reader.representation, reader.horizon])
        spec = hashlib.sha256(values.encode()).hexdigest()[:16]
    return f"{data_digest(reader)}-{spec}"


class IndexCache:
    """The cache of one index: its file and, until the pass is complete, a file per shard.

    Files are written to the first directory that accepts them, and read from the first that has
    them.
    """

    def __init__(self, directories: list[str], name: str) -> None:
        self._directories, self._name = directories, name

    @classmethod
    def for_reader(cls, reader: Reader, cache: str) -> IndexCache:
        """Return the cache next to a reader's data, else in `cache` or the user's directory."""
        split = re.sub(r"[^\w+]", "_", reader.split)
        name = f"{reader.spec.name}-{split}-{index_digest(reader)}.npz"
        return cls([f"{reader.directory}/.octolike", cache or _user_cache()], name)

    def load(self) -> EpisodeIndex | None:
        """Return the index if it is cached."""
        return _load_first(self._directories, self._name)

    def load_shard(self, shard: int) -> EpisodeIndex | None:
        """Return the index of a shard if it is cached."""
        return _load_first(self._directories, self._shard_name(shard))

    def save_shard(self, shard: int, index: EpisodeIndex) -> None:
        """Write the index of a shard; do nothing if no directory can be written."""
        _save(index, self._directories, self._shard_name(shard))

    def save(self, index: EpisodeIndex) -> None:
        """Write the complete index, and remove the files of the shards."""
        failures = _save(index, self._directories, self._name)
        if failures:
            print("statistics could not be cached: " + "; ".join(failures), file=sys.stderr)
        for directory in self._directories:
            shards = f"{directory}/{self._name}.parts"
            if tf.io.gfile.isdir(shards) and not _is_read_only(directory):
                tf.io.gfile.rmtree(shards)

    def lock_path(self) -> str:
        """Return the path of the lock of a pass, in the first directory that can be written."""
        for directory in self._directories:
            if not _is_read_only(directory):
                return f"{directory}/{self._name}.lock"
        return ""

    def outdated_reason(self) -> str:
        """Return why an existing cache of the same split does not apply; "" without one."""
        split, data, _ = self._name.removesuffix(".npz").rsplit("-", 2)
        pattern = re.compile(rf"{re.escape(split)}-([0-9a-f]{{16}})(-[0-9a-f]{{16}})?\.npz")
        for i, directory in enumerate(self._directories):
            names = tf.io.gfile.listdir(directory) if tf.io.gfile.isdir(directory) else []
            digests = [match[1] for match in map(pattern.fullmatch, names) if match]
            if data in digests:
                return "the spec's computation changed"
            # Other directories may hold caches of another copy of the dataset.
            if digests and i == 0:
                return "the files or the way of computing statistics changed"
        return ""

    def _shard_name(self, shard: int) -> str:
        return f"{self._name}.parts/{shard:05d}.npz"


def _save(index: EpisodeIndex, directories: list[str], name: str) -> list[str]:
    """Write to the first directory that accepts the file; else return the reasons of all."""
    arrays = {k: getattr(index, k) for k in COLUMNS + CAMERA_COLUMNS}
    # Texts as JSON: a numpy array would give each text the size of the longest.
    values = {k: getattr(index, k) for k in _TEXTS} | {
        "filtered_by": dict(index.filtered_by),
        "idle_steps": index.idle_steps,
    }
    arrays["kept"] = index.kept
    texts = json.dumps(values)
    arrays["texts"] = np.frombuffer(texts.encode(), np.uint8)
    for part, sketch in index.sketches.items():
        arrays |= {f"{part}.{k}": x for k, x in sketch.to_arrays().items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    failures = []
    for root in directories:
        if _is_read_only(root):
            failures.append(f"{root}: read-only")
            continue
        directory, _, file = f"{root}/{name}".rpartition("/")
        temporary = f"{directory}/.{file}.{os.getpid()}.{threading.get_ident()}"
        try:
            tf.io.gfile.makedirs(directory)
            with tf.io.gfile.GFile(temporary, "wb") as f:
                f.write(buffer.getvalue())
            tf.io.gfile.rename(temporary, f"{directory}/{file}", overwrite=True)
        except (tf.errors.OpError, OSError) as error:
            failures.append(f"{root}: {error}")
        else:
            return []
    return failures


def _load_first(directories: list[str], name: str) -> EpisodeIndex | None:
    """Return the index in the first directory that has it; an unreadable file counts as missing."""
    for path in (f"{directory}/{name}" for directory in directories):
        if tf.io.gfile.exists(path):
            try:
                return _load(path)
            except Exception as error:  # zipfile raises IndexError, too, for a flipped bit
                print(f"{path} is corrupted ({error}); recomputing it", file=sys.stderr)
    return None


def _load(path: str) -> EpisodeIndex:
    with tf.io.gfile.GFile(path, "rb") as f:
        content = io.BytesIO(f.read())
    with zipfile.ZipFile(content) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > LARGEST:
        raise ValueError(f"it would take {size:,} bytes; expected at most {LARGEST:,}")
    with np.load(content) as data:  # without pickle: arrays of numbers only
        arrays = {k: data[k] for k in data.files}
    sketches = {}
    for part in PARTS:
        prefix = f"{part}."
        sketch = {k.removeprefix(prefix): x for k, x in arrays.items() if k.startswith(prefix)}
        if sketch:
            sketches[part] = QuantileSketch.from_arrays(sketch)
    texts = json.loads(arrays["texts"].tobytes())
    texts |= {k: tuple(texts[k]) for k in _TEXTS}
    columns = {k: arrays[k] for k in (*COLUMNS, *CAMERA_COLUMNS, "kept")}
    index = EpisodeIndex(**columns, **texts, sketches=sketches)
    _check(index)
    return index


def _check(index: EpisodeIndex) -> None:
    """Raise ValueError unless the parts of a stored index fit together.

    The checksums of its file detect accidents; this check detects files written by others.
    """
    episodes = len(index.steps)
    for name in (*COLUMNS, *CAMERA_COLUMNS):
        x = getattr(index, name)
        rank = 1 if name in COLUMNS else 2
        if x.dtype != np.int64 or x.ndim != rank or len(x) != episodes:
            raise ValueError(f"{name} is {x.dtype} {list(x.shape)} for {episodes} episodes")
        if name not in ("content", "kept_start") and (x < 0).any():
            raise ValueError(f"{name} has negative numbers")
    for name, names in (("task", "tasks"), ("label", "labels")):
        if episodes and getattr(index, name).max() >= len(getattr(index, names)):
            raise ValueError(f"{name} has numbers beyond its {len(getattr(index, names))} texts")
    if index.kept.dtype != np.int32 or index.kept.ndim != 1:
        raise ValueError(f"kept is {index.kept.dtype} {list(index.kept.shape)}")
    is_cut = index.kept_start >= 0
    if (index.kept_start < -1).any() or (
        (index.kept_start + index.steps)[is_cut] > len(index.kept)
    ).any():
        raise ValueError("kept_start leaves the kept steps")
    if "action" not in index.sketches:
        raise ValueError("it has no statistics of the actions")


def _is_read_only(directory: str) -> bool:
    """Return whether the permissions of a local parent directory forbid writing, even for root."""
    parent = Path(directory).parent
    return parent.is_dir() and not parent.stat().st_mode & 0o222


def _user_cache() -> str:
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return f"{home}/octolike"
