"""Folders of npz files, one per episode: for recordings in any other format.

    np.savez("episode_0.npz", action=…, state=…, image_primary=…, language_instruction="…")

Keys: action [T, A]; language_instruction, a string or T of them; success (once or T times) and
control_hz, if known; reward, is_terminal or done [T]; all other keys with T entries belong to the
observation: images uint8 [T, h, w, 3], depth, numbers. Keys may have the prefix "observation." or
"observation/".
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from octolike import files
from octolike.data.onboarding.convert import recording
from octolike.data.onboarding.convert.columns import Columns
from octolike.data.onboarding.convert.frame_encoding import ConvertOptions
from octolike.data.onboarding.convert.hdf5 import STEPS, natural_key
from octolike.data.onboarding.convert.recording import EpisodeLocation
from octolike.errors import DataError

STEP_KEYS = ("action", "reward", "is_terminal", "discount")


@dataclass(frozen=True)
class NpzRecording:
    """One file per episode."""

    path: Path
    options: ConvertOptions

    def episodes(self) -> list[EpisodeLocation]:
        """Return one episode per file."""
        if self.path.is_file():
            return [EpisodeLocation(self.path.name)]
        paths = (str(f.relative_to(self.path)) for f in self.path.rglob("*.npz"))
        names = sorted((n for n in paths if not Path(n).name.startswith(".")), key=natural_key)
        if not names:
            raise DataError(f"{self.path} has no .npz files")
        return [EpisodeLocation(n) for n in names]

    def metadata(self) -> dict[str, Any]:
        """Return the control rate in the first file."""
        with _open_npz(self._file(self.episodes()[0])) as file:
            source = str(self.path)
            return (
                {"control_hz": float(_one(file["control_hz"], "control_hz", source))}
                if "control_hz" in file
                else {}
            )

    def read(self, location: EpisodeLocation) -> dict[str, Any]:
        """Return the episode of a file."""
        source = str(location)
        columns = Columns(self.options, source)
        steps: dict[str, Any] = {}
        instruction: Any = ""
        metadata = {}
        with _open_npz(self._file(location)) as file:
            arrays = {key: _read(file, key, source) for key in file.files}
        names = self._names(arrays, source)
        shape = arrays[names["action"]].shape if "action" in names else ()
        if len(shape) == 1 and all(x.shape[:1] != shape for k, x in arrays.items() if x.ndim > 1):
            raise DataError(
                f"{source}: the action is {list(shape)}, a single step by the other arrays; "
                "expected one file per episode, with an action [T, A]"
            )
        length = recording.check_steps(shape[0] if shape else 0, source)
        for name, key in names.items():
            x = arrays[key]
            if name in recording.INSTRUCTIONS:
                instruction = list(x) if x.ndim else x
            elif recording.FURTHER.fullmatch(name):
                steps[name] = recording.texts(x, length)
            elif name == "success":
                metadata["success"] = recording.flag(x, f"{source}: {name}")
            elif name == "control_hz":
                hz, stored = float(_one(x, name, source)), self.options.control_hz
                if abs(hz - stored) > 0.01 * stored:
                    columns.change(name, f"{hz:g} in some episodes: stored as {stored:g} in all")
            elif name in STEPS and x.size == length:
                dtype = bool if STEPS[name] == "is_terminal" else np.float32
                steps[STEPS[name]] = x.reshape(length).astype(dtype)
            elif name in STEP_KEYS:
                steps[name] = x
            elif x.ndim == 0 or (length and x.ndim < 4 and len(x) != length):
                columns.left_out[key] = (
                    f"{x.dtype} {list(x.shape)} is not one entry per step ({length})"
                )
            elif "action" in name:
                steps[name] = x
            else:
                columns.add(name, x)
        return recording.episode(steps, columns, instruction, metadata)

    def _names(self, arrays: dict[str, np.ndarray], source: str) -> dict[str, str]:
        """Return {field: key of the file}."""
        fields = {path: field for field, path in self.options.fields}
        if missing := sorted(set(fields) - set(arrays)):
            raise DataError(f"{source} has no {missing[0]!r} (--field); it has {', '.join(arrays)}")
        names: dict[str, str] = {}
        for key in arrays:
            name = fields.get(key, key)
            name = name.removeprefix("observation.").removeprefix("observation/")
            name = "action" if name == "actions" and "action" not in arrays else name
            name = name.replace("/", "_").replace(".", "_")
            if name in names:
                raise DataError(f"{source}: {names[name]} and {key} would both be {name}")
            names[name] = key
        return names

    def _file(self, location: EpisodeLocation) -> Path:
        return self.path / location.file if self.path.is_dir() else self.path


def _one(x: np.ndarray, name: str, source: str) -> Any:
    """Return the number or flag in an array of one element; DataError for anything else."""
    if x.size != 1 or x.dtype.kind not in "fiub":
        raise DataError(f"{source}: {name} is {x.dtype} {list(x.shape)}; expected one number")
    return x.item()


def _read(file: Any, key: str, source: str) -> np.ndarray:
    try:
        return file[key]
    except (*recording.MALFORMED, zipfile.BadZipFile) as error:
        raise DataError(f"{source}: {key} cannot be read: {files.cause(error)}") from None


def _open_npz(path: Path) -> Any:
    recording.check_regular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > recording.LARGEST:
            raise DataError(
                f"{path} has arrays of {size:,} bytes; expected at most {recording.LARGEST:,}"
            )
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{path} is not a complete npz file: {files.cause(error)}") from None
