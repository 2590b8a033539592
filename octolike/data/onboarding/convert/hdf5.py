"""HDF5 recordings: ALOHA, DROID and other layouts (`Hdf5Recording`), robomimic.

One episode per file, or one per numbered group of a file (h5py paths in the file or group):
    action or actions [T, A], or a group of arrays; observations, observation or obs and their
    groups → observation; qpos → observation.state; images: uint8 or floats [T, h, w, 3],
    [T, 3, h, w], or encoded frames, uint8 [T, bytes] padded with zeros or of varying length;
    depth [T, h, w] or [T, h, w, 1]; rewards, dones; any other array of T rows belongs to the
    observation. --field NAME=PATH names the fields of other layouts.
DROID: <episode>/trajectory.h5 with recordings/MP4/<serial>.mp4 next to it.
robomimic (also LIBERO, RoboCasa, Isaac Lab), one file for all episodes, or a folder of such files:
    data/demo_<i>/actions [T, A]; obs and its groups; rewards, dones; mask/train and mask/valid,
    lists of demos. The instruction of a file may be an attribute of data: language_instruction, or
    problem_info (JSON).

The instruction of an episode is an attribute or text named in `recording.INSTRUCTIONS`, at the root
or in the episode, or in RoboCasa's ep_meta (JSON); --field language_instruction=NAME names another
one. The attribute success, of the episode or the file, becomes episode_metadata.success.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from octolike.data.onboarding.convert import recording
from octolike.data.onboarding.convert.columns import Columns, read_numbers, short_names
from octolike.data.onboarding.convert.frame_encoding import ConvertOptions
from octolike.data.onboarding.convert.hdf5_attributes import (
    OBSERVATIONS,
    attributes_of,
    droid_task,
    instruction_of,
    success_of,
    unread_attributes,
)
from octolike.data.onboarding.convert.recording import EpisodeLocation
from octolike.data.onboarding.convert.video import list_frames, read_frames
from octolike.data.rlds.decode import MOST_PIXELS
from octolike.errors import DataError

SUFFIXES = (".hdf5", ".h5")
LARGEST_ROW = 4 * MOST_PIXELS  # bytes of a picture
DEEPEST = 100  # groups within each other
SPLITS = {"train": "train", "valid": "val"}
STEPS = {
    "reward": "reward",
    "rewards": "reward",
    "done": "is_terminal",
    "dones": "is_terminal",
    "terminals": "is_terminal",
    "is_terminal": "is_terminal",
}
NOT_READ = {
    "next_obs": "the observation of the next step, a copy",
    "states": "the simulator's state, which no robot has",
    "compress_len": "lengths of encoded frames, which are not needed",
}


@dataclass(frozen=True)
class Hdf5Recording:
    """One episode per file, or per numbered group of a file."""

    path: Path
    options: ConvertOptions

    def episodes(self) -> list[EpisodeLocation]:
        """Return the episodes, episode_2 before episode_10."""
        result = []
        for name in hdf5_files(self.path):
            try:
                with open_hdf5(_file(self.path, name)) as file:
                    groups = self._episode_groups(file)
            except DataError:  # read() reports it
                groups = []
            result += [EpisodeLocation(name, group) for group in groups or [""]]
        return result

    def metadata(self) -> dict[str, Any]:
        """Return {}: the files have no metadata."""
        return {}

    def read(self, location: EpisodeLocation) -> dict[str, Any]:
        """Return an episode."""
        path = _file(self.path, location.file)
        with open_hdf5(path) as file:
            group = file[location.key] if location.key else file
            reader = _GroupReader((group, file), self.options, str(location))
            reader.add_all({p: _role(p) for p in reader.paths})
            if path.name.startswith("trajectory."):
                _add_droid_videos(reader.columns, path.parent, reader.length)
            instruction = instruction_of(group, reader.length) or instruction_of(
                file, reader.length
            )
            return reader.episode(instruction or droid_task(path.parent))

    def _episode_groups(self, file: h5py.File) -> list[str]:
        """Return the numbered groups that hold an action; [] if the file is one episode."""
        action = dict(self.options.fields).get("action", "")
        if action in file if action else any(a in file for a in recording.ACTIONS):
            return []
        groups: list[str] = []

        def visit(name: str, node: Any) -> None:
            has_action = isinstance(node, h5py.Group) and (
                action in node if action else any(a in node for a in recording.ACTIONS)
            )
            if has_action and re.search(r"\d$", name):
                groups.append(name)

        file.visititems(visit)
        return sorted(groups, key=natural_key)


@dataclass(frozen=True)
class RobomimicRecording:
    """Many episodes per file."""

    path: Path
    options: ConvertOptions

    def episodes(self) -> list[EpisodeLocation]:
        """Return the demos of all files, with their split in the masks of the file."""
        result = []
        for name in hdf5_files(self.path):
            with open_hdf5(_file(self.path, name)) as file:
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
        with open_hdf5(_file(self.path, hdf5_files(self.path)[0])) as file:
            try:
                settings = json.loads(file["data"].attrs["env_args"])
                return {"control_hz": float(settings["env_kwargs"]["control_freq"])}
            except (KeyError, ValueError, TypeError):
                return {}

    def read(self, location: EpisodeLocation) -> dict[str, Any]:
        """Return one demo."""
        with open_hdf5(_file(self.path, location.file)) as file:
            demo = file["data"][location.key]
            reader = _GroupReader((demo, file["data"], file), self.options, str(location))
            reader.add_all({p: _robomimic_role(p) for p in reader.paths})
            length = reader.length
            instruction = instruction_of(demo, length) or instruction_of(file["data"], length)
            return reader.episode(instruction or instruction_of(file, length))


class _GroupReader:
    """Reads the arrays of one episode's group into steps and columns."""

    def __init__(self, groups: Sequence[Any], options: ConvertOptions, source: str) -> None:
        """Read the first of the groups; the others are around it and may have attributes."""
        group = groups[0]
        self._group, self.columns = group, Columns(options, source)
        self._attributes = attributes_of(*groups)
        self.steps: dict[str, Any] = {}
        self.instruction: Any = None  # named by --field
        self.length = 0
        self.paths: list[str] = []
        group.visititems(self._list)
        self._fields = {path: field for field, path in options.fields}
        for path, field in list(self._fields.items()):
            if path not in group and path in self._attributes and field in recording.INSTRUCTIONS:
                self.instruction = [self._attributes[path]]
                del self._fields[path]
            elif path not in group:
                raise DataError(
                    f"{source} has no {path!r} (--field); it has {', '.join(self.paths) or 'none'}"
                )

    def _list(self, name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset) and node.shape is None:
            self.columns.left_out[name] = "empty"
        elif isinstance(node, h5py.Dataset):
            self.paths.append(name)

    def add_all(self, roles: dict[str, tuple[str, str]]) -> None:
        """Add every array by its (role, name); the role "" has the reason to leave it out."""
        for prefix, field in self._fields.items():
            for path in roles:
                if path == prefix or path.startswith(f"{prefix}/"):
                    roles[path] = _role(f"{field}{path.removeprefix(prefix)}")
        if "action" in self._fields.values():
            # The other parts of a group "action" are not commands, but fields of their own.
            for path, (role, name) in roles.items():
                if role == "action" and self._target(path) == path:
                    roles[path] = ("extra", f"action_{name}")
        if not any(role == "action" for role, _ in roles.values()):
            self._find_action(roles)
        actions = [p for p, (role, _) in roles.items() if role == "action"]
        shape = self._group[actions[0]].shape if actions else ()
        self.length = recording.check_steps(shape[0] if shape else 0, self.columns.source)
        observation = [p for p, (role, _) in roles.items() if role == "observation"]
        targets = {p: self._target(p) for p in observation}
        short = short_names(targets.values(), "/")
        longer = self._are_one_longer(observation)
        for path, (role, name) in roles.items():
            x = self._group[path]
            if role == "":
                self.columns.left_out[path] = name
            elif role == "instruction":
                self._add_instruction(path, name)
            elif role == "observation":
                self._add_observation(path, _state_name(short[targets[path]]), x, longer)
            elif not x.shape or x.dtype.kind not in "fiub" or len(x) != self.length:
                self.columns.left_out[path] = f"{x.dtype} {list(x.shape)} is not {self.length} rows"
            elif role == "action" and name:
                self.steps.setdefault("action", {})[name] = read_numbers(x, path)
            else:
                self.steps[name or role] = read_numbers(x, path)

    def episode(self, instruction: Any) -> dict[str, Any]:
        """Return the episode, with rewards as float32 and ends as bool."""
        if self.instruction is not None:
            instruction = list(recording.texts(self.instruction, self.length))
        for key, dtype in (("reward", np.float32), ("is_terminal", bool)):
            if key in self.steps:
                self.steps[key] = self.steps[key].reshape(self.length).astype(dtype)
        unread = unread_attributes(self._attributes)
        used = {f"attribute {path}" for _, path in self.columns.options.fields}
        self.columns.left_out |= {k: v for k, v in unread.items() if k not in used}
        success = success_of(self._attributes, self.columns.source)
        return recording.episode(self.steps, self.columns, instruction, success)

    def _add_instruction(self, path: str, name: str) -> None:
        """Add a further wording of the instruction; the first one is read by `instruction_of`."""
        values = np.ravel(self._group[path][()])
        if name:
            self.steps[name] = recording.texts(values, self.length)
        elif path in self._fields:
            self.instruction = values
        if len(values) not in (1, self.length):
            self.columns.changed[path] = (
                f"{len(values)} texts for {self.length} steps: the first one is used; name each in "
                "a field of its own, such as language_instruction_2"
            )

    def _find_action(self, roles: dict[str, tuple[str, str]]) -> None:
        """Use the only array named action, in any group."""
        named = [p for p in roles if p.rpartition("/")[2] in recording.ACTIONS]
        if len(named) == 1:
            roles[named[0]] = ("action", "")
            self.columns.changed[named[0]] = "used as the action"

    def _target(self, path: str) -> str:
        """Return the path of an array after the renaming of --field."""
        for prefix, field in self._fields.items():
            if path == prefix or path.startswith(f"{prefix}/"):
                return f"{field}{path.removeprefix(prefix)}"
        return path

    def _are_one_longer(self, paths: list[str]) -> bool:
        """Return whether all observations have one more row than the action (ManiSkill)."""
        lengths = {len(self._group[p]) for p in paths if self._group[p].shape}
        if self.length and lengths == {self.length + 1}:
            self.columns.changed["observation"] = (
                "one row more than the action, the last is not used"
            )
            return True
        return False

    def _add_observation(self, path: str, name: str, x: Any, longer: bool) -> None:
        in_group = path.partition("/")[0] in OBSERVATIONS or path in self._fields
        if x.shape and longer:
            self.columns.add(name, x[: self.length])
        elif x.shape and (len(x) == self.length or in_group):
            self.columns.add(name, x)
        elif x.dtype.kind in "OSU":
            self.columns.left_out[path] = (
                f"a text: use it as the instruction with --field language_instruction={path}"
            )
        else:
            shape = list(x.shape) or "one value"
            self.columns.left_out[path] = f"{shape} is not one entry per step ({self.length})"


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
    """Open an HDF5 file; DataError if it is not one, truncated, or refers to other files."""
    recording.check_regular(path)
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path} is not a complete HDF5 file: {error}") from None
    try:
        stat = path.stat()
        if problem := _foreign_part(path, stat.st_size, stat.st_mtime_ns):
            raise DataError(f"{path}: {problem}")
    except BaseException:
        file.close()
        raise
    return file


@functools.lru_cache(maxsize=4096)
def _foreign_part(path: Path, _size: int, _changed: int) -> str:
    """Return a clause on a part of an HDF5 file that lies in other files or is huge; "" for none.

    Links and raw data in other files would read any file of this machine into the dataset.
    """
    with h5py.File(path, "r") as file:
        groups, visited = [file], set()
        while groups:
            group = groups.pop()
            if group.name.count("/") > DEEPEST:  # HDF5 takes quadratic time
                return f"has groups more than {DEEPEST} deep"
            for name in group:
                link, place = group.get(name, getlink=True), f"{group.name}/{name}"
                if isinstance(link, h5py.ExternalLink):
                    return f"{place!r} is a link into {link.filename!r:.200}; copy its data here"
                try:
                    node = group[name]
                except (KeyError, OSError):  # a broken link
                    continue
                if isinstance(node, h5py.Group):
                    key = h5py.h5o.get_info(node.id).addr
                    groups += [node] if key not in visited else []
                    visited.add(key)
                elif isinstance(node, h5py.Dataset) and (problem := _foreign_data(node)):
                    return f"{place!r} {problem}"
    return ""


def _foreign_data(x: h5py.Dataset) -> str:
    if x.external:
        return f"has its values in {x.external[0][0]!r:.200}; copy them into the file"
    if x.is_virtual and any(source.file_name != "." for source in x.virtual_sources()):
        return "is a view of other files; copy their data into this one"
    if x.nbytes > recording.LARGEST:
        return f"has {x.nbytes:,} bytes; expected at most {recording.LARGEST:,}"
    if x.shape and x.nbytes > LARGEST_ROW * len(x):
        return f"has rows of {x.nbytes // len(x):,} bytes; expected at most {LARGEST_ROW:,}"
    return ""


def natural_key(name: str) -> list[Any]:
    """Return a key that sorts demo_2 before demo_10."""
    return [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", name)]


def _file(path: Path, name: str) -> Path:
    return path / name if path.is_dir() else path


def _role(path: str) -> tuple[str, str]:
    """Return (role, name) of an array; for the role "", the name is the reason to leave it out."""
    head, _, tail = path.partition("/")
    leaf = path.rpartition("/")[2]
    if leaf in recording.INSTRUCTIONS:
        return "instruction", ""
    if recording.FURTHER.fullmatch(leaf):
        return "instruction", leaf
    if path in NOT_READ:
        return "", NOT_READ[path]
    if head in recording.ACTIONS:
        return "action", tail.replace("/", "_")
    if path in STEPS:
        return STEPS[path], ""
    if "action" in head and head not in OBSERVATIONS:
        return "extra", path.replace("/", "_")
    return "observation", ""


def _robomimic_role(path: str) -> tuple[str, str]:
    head = path.partition("/")[0]
    if head in NOT_READ:
        return "", NOT_READ[head]
    if head == "obs" or head in recording.ACTIONS or path in STEPS or "action" in head:
        return _role(path)
    leaf = path.rpartition("/")[2]
    if leaf in recording.INSTRUCTIONS or recording.FURTHER.fullmatch(leaf):
        return _role(path)
    return "", f"not part of obs; read it with --field {leaf}={path}"


def _state_name(name: str) -> str:
    return "state" if name == "qpos" else name


def _add_droid_videos(columns: Columns, directory: Path, length: int) -> None:
    """Add the videos that DROID keeps next to a trajectory, one frame per step."""
    for path in sorted((directory / "recordings" / "MP4").glob("*.mp4")):
        name = f"camera_{path.stem}"
        try:
            listing = list_frames(path)
        except DataError as error:
            raise DataError(f"{columns.source}, {name}: {error}") from None
        if len(listing.times) == length:
            frames = read_frames(listing, range(length), f"{columns.source}, {name}")
            columns.add_frames(name, frames)
        else:
            columns.left_out[name] = f"{path.name} does not have one frame per step"
