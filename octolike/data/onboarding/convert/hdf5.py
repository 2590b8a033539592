"""HDF5 recordings in the layouts of ALOHA and robomimic (also LIBERO and RoboCasa).

ALOHA, one file per episode (h5py paths):
    action [T, A]; observations/qpos [T, P] → observation.state; observations/qvel, effort;
    observations/images/<camera>: uint8 [T, h, w, 3], or encoded frames, uint8 [T, bytes] padded
    with zeros or of varying length (compress_len is not needed); base_action.
robomimic, one file for all episodes, or a folder of such files:
    data/demo_<i>/actions [T, A]; obs/<key>, images [T, h, w, 3] among them; rewards, dones;
    mask/train and mask/valid, lists of demos. next_obs (a copy) and states (of the simulator) are
    left out. The instruction of a file may be an attribute of data: language_instruction, or
    problem_info (JSON).

The instruction of an episode is an attribute or string named in `recording.INSTRUCTIONS`, at the
root or in the demo. Neither format records success; rewards are kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from octolike.data.onboarding.convert import recording
from octolike.data.onboarding.convert.recording import ConvertOptions, EpisodeLocation
from octolike.errors import DataError

SUFFIXES = (".hdf5", ".h5")
SPLITS = {"train": "train", "valid": "val"}


@dataclass(frozen=True)
class AlohaRecording:
    """One file per episode."""

    path: Path
    options: ConvertOptions

    def episodes(self) -> list[EpisodeLocation]:
        """Return one episode per file, episode_2 before episode_10."""
        return [EpisodeLocation(f) for f in hdf5_files(self.path)]

    def metadata(self) -> dict[str, Any]:
        """Return {}: the files have no metadata."""
        return {}

    def read(self, location: EpisodeLocation) -> dict[str, Any]:
        """Return the episode of a file."""
        source = str(location)
        with open_hdf5(self.path / location.file if self.path.is_dir() else self.path) as file:
            if "observations" not in file:
                raise DataError(f"{source} has no observations; found: {', '.join(file) or 'none'}")
            observations = file["observations"]
            numbers = {k: v[()] for k, v in observations.items() if _is_numbers(v)}
            if "qpos" in numbers:
                numbers["state"] = numbers.pop("qpos")
            cameras = {}
            for name, frames in observations.get("images", {}).items():
                camera = f"{source}, camera {name}"
                cameras[name] = recording.encode(_frames(frames, camera), self.options, camera)
            steps = {k: v[()] for k, v in file.items() if _is_numbers(v) and v.ndim <= 2}
            steps.pop("compress_len", None)
            steps["observation"] = numbers
            instruction = _instruction(file)
            return recording.episode(steps, cameras, instruction, self.options, {}, source)


@dataclass(frozen=True)
class RobomimicRecording:
    """Many episodes per file."""

    path: Path
    options: ConvertOptions

    def episodes(self) -> list[EpisodeLocation]:
        """Return the demos of all files, with their split in the masks of the file."""
        result = []
        for name in hdf5_files(self.path):
            with open_hdf5(self._file(name)) as file:
                if "data" not in file:
                    raise DataError(f"{name} has no group 'data'; found: {', '.join(file)}")
                splits: dict[str, str] = {}
                for mask, split in SPLITS.items():
                    if "mask" in file and mask in file["mask"]:
                        splits |= {recording.text(d): split for d in file["mask"][mask][()]}
                demos = sorted(file["data"], key=natural_key)
                missing = sorted(set(splits) - set(demos))
                if missing:
                    raise DataError(f"{name}: mask has {missing[0]}, which is not in data")
                result += [
                    EpisodeLocation(name, d, splits.get(d, "train" if splits else ""))
                    for d in demos
                ]
        return result

    def metadata(self) -> dict[str, Any]:
        """Return the control rate if the file has the settings of the simulator."""
        with open_hdf5(self._file(hdf5_files(self.path)[0])) as file:
            try:
                settings = json.loads(file["data"].attrs["env_args"])
                return {"control_hz": float(settings["env_kwargs"]["control_freq"])}
            except (KeyError, ValueError, TypeError):
                return {}

    def read(self, location: EpisodeLocation) -> dict[str, Any]:
        """Return one demo."""
        source = str(location)
        with open_hdf5(self._file(location.file)) as file:
            demo = file["data"][location.key]
            cameras, numbers = {}, {}
            for name, x in demo.get("obs", {}).items():
                if recording.is_video(x):
                    camera = f"{source}, camera {name}"
                    cameras[name] = recording.encode(recording.blocks(x), self.options, camera)
                elif _is_numbers(x):
                    numbers[name] = x[()]
            steps: dict[str, Any] = {"observation": numbers}
            for name, key in (("actions", "action"), ("rewards", "reward")):
                steps |= {key: demo[name][()]} if name in demo else {}
            if "dones" in demo:
                steps["is_terminal"] = demo["dones"][()].astype(bool)
            instruction = _instruction(demo) or _instruction(file["data"]) or _instruction(file)
            if "reward" in steps:
                steps["reward"] = steps["reward"].astype(np.float32)
            return recording.episode(steps, cameras, instruction, self.options, {}, source)

    def _file(self, name: str) -> Path:
        return self.path / name if self.path.is_dir() else self.path


def hdf5_files(path: Path) -> list[str]:
    """Return the HDF5 files at or under a path, in natural order; DataError for none."""
    if path.is_file():
        return [path.name]
    paths = (f for f in path.rglob("*") if f.suffix in SUFFIXES and not f.name.startswith("."))
    names = sorted((str(f.relative_to(path)) for f in paths), key=natural_key)
    if not names:
        raise DataError(f"{path} has no {' or '.join(SUFFIXES)} files")
    return names


def open_hdf5(path: Path) -> h5py.File:
    """Open an HDF5 file; DataError if it is not one or truncated."""
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path} is not a complete HDF5 file: {error}") from None


def natural_key(name: str) -> list[Any]:
    """Return a key that sorts demo_2 before demo_10."""
    return [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", name)]


def _is_numbers(x: Any) -> bool:
    return isinstance(x, h5py.Dataset) and x.dtype.kind in "fiub" and 1 <= x.ndim <= 3


def _frames(x: h5py.Dataset, source: str) -> Iterator[np.ndarray | bytes]:
    """Yield pixels, or encoded frames without their padding."""
    if recording.is_video(x):
        yield from recording.blocks(x)
    elif x.ndim in (1, 2):
        for row in recording.blocks(x):
            # JPEG and PNG never end in a zero byte.
            data = np.asarray(row)
            yield (data.tobytes() if data.dtype != object else bytes(data.item())).rstrip(b"\0")
    else:
        raise DataError(f"{source}: {x.dtype} {x.shape} is neither frames nor encoded frames")


def _instruction(group: Any) -> str:
    for name in recording.INSTRUCTIONS:
        if name in group.attrs:
            return recording.text(group.attrs[name])
        if name in group and isinstance(group[name], h5py.Dataset) and group[name].size:
            return recording.text(np.ravel(group[name][()])[0])
    if "problem_info" in group.attrs:
        text = json.loads(group.attrs["problem_info"]).get("language_instruction", "")
        return " ".join(text) if isinstance(text, list) else text
    return ""
