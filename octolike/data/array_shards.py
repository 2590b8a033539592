"""Demonstrations as .npz files, a file per shard, written and read without tensorflow.

    store = ArrayShards(root, {"train": 12, "val": 1}, settings)
    store.write("train", 3, episodes, tries=…)      in any order; an existing shard is kept
    frames = store.frames("train")                  when all shards exist

A file holds the arrays of `ArrayFrames` and a note: the settings, the number of episodes, and the
values that `write` was given. It gets its name when it is complete, so an interrupted recording
continues with the missing files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from octolike import files
from octolike.config import ConfigError
from octolike.data.arrays import ArrayFrames


@dataclass(frozen=True)
class ArrayShards:
    """The shards of a directory.

    Raises ConfigError for a file that cannot be read, that is not a planned shard, or that was
    recorded with other settings.

    Attributes:
        root: the directory.
        shards: number of files per split.
        settings: everything that the episodes depend on, as plain JSON values.
    """

    root: str
    shards: Mapping[str, int]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        current = json.loads(json.dumps(self.settings))
        planned = {self._path(s, i) for s, total in self.shards.items() for i in range(total)}
        for path in sorted(self._directory.glob("*.npz")):
            stored = _read_note(path)["settings"]
            names = [k for k in sorted({*stored, *current}) if stored.get(k) != current.get(k)]
            if names or path not in planned:
                of_file = {k: stored.get(k) for k in names} or path.name
                here = {k: current.get(k) for k in names} or f"the shards {dict(self.shards)}"
                raise ConfigError(
                    f"{path} was recorded with {of_file}, this config has {here}; remove the "
                    "files, or use another data.root"
                )

    def shard_note(self, split: str, index: int) -> dict[str, Any] | None:
        """Return the note of a shard, {"episodes": …, …}; None for a shard that is missing."""
        path = self._path(split, index)
        return _read_note(path) if path.exists() else None

    def write(
        self,
        split: str,
        index: int,
        episodes: Iterable[Mapping[str, Any]],
        *,
        may_be_empty: bool = False,
        **notes: Any,
    ) -> int:
        """Write a shard unless it exists, and return its number of episodes.

        Args:
            split: split of the shard.
            index: index of the shard in its split.
            episodes: in the format of the simulators (octolike.envs).
            may_be_empty: whether a shard without episodes is written, instead of an error.
            notes: plain values stored with the shard.
        """
        existing = self.shard_note(split, index)
        if existing:
            return existing["episodes"]
        episodes = list(episodes)
        arrays = {}
        if episodes or not may_be_empty:
            arrays = _arrays(ArrayFrames.from_episodes(episodes))
        note = {"settings": self.settings, "episodes": len(episodes), **notes}
        arrays["note"] = np.array(json.dumps(note), np.str_)
        files.write_npz(self._path(split, index), arrays)
        return len(episodes)

    def frames(self, split: str) -> ArrayFrames | None:
        """Return the frames of a split; None for a split without episodes.

        The files and the result are in memory at the same time.
        """
        paths = [self._path(split, i) for i in range(self.shards.get(split, 0))]
        parts = [_read_frames(path) for path in paths if _read_note(path)["episodes"]]
        return ArrayFrames.concatenate(parts) if parts else None

    @property
    def _directory(self) -> Path:
        return files.local_path(self.root, "data.root")

    def _path(self, split: str, index: int) -> Path:
        return self._directory / f"{split}-{index:05d}-of-{self.shards[split]:05d}.npz"


def _arrays(frames: ArrayFrames) -> dict[str, np.ndarray]:
    arrays = {f"image_{camera}": x for camera, x in frames.images.items()}
    arrays |= {n: getattr(frames, n) for n in ("proprio", "action", "starts")}
    return arrays | {n: np.array(getattr(frames, n), np.str_) for n in ("instructions", "tasks")}


def _read_note(path: Path) -> dict[str, Any]:
    with _opened(path) as file:
        return json.loads(str(file["note"]))


def _read_frames(path: Path) -> ArrayFrames:
    with _opened(path) as file:
        arrays = {f.name: file[f.name] for f in dataclasses.fields(ArrayFrames) if f.name in file}
        for name in ("instructions", "tasks"):
            arrays[name] = tuple(arrays[name].tolist())
        cameras = [k for k in file if k.startswith("image_")]
        images = {k.removeprefix("image_"): file[k] for k in cameras}
        return ArrayFrames(images=images, **arrays)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open an .npz file; ConfigError if it is missing, cut off, or has other contents."""
    try:
        with np.load(path, allow_pickle=False) as file:
            yield file
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"{path} cannot be read as demonstrations: {error}; remove it, or use another data.root"
        ) from None
