"""Folders of npz files, one per episode: for recordings in any other format.

    np.savez("episode_0.npz", action=…, state=…, image_primary=…, language_instruction="…")

Keys: action [T, A]; language_instruction, a string or T of them; success (bool) and control_hz, if
known; reward, is_terminal [T]; all other keys with T entries belong to the observation: images
uint8 [T, h, w, 3], numbers. Keys may have the prefix "observation." or "observation/".
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from octolike.data.onboarding.convert import recording
from octolike.data.onboarding.convert.hdf5 import natural_key
from octolike.data.onboarding.convert.recording import ConvertOptions, EpisodeLocation
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
            return {"control_hz": float(file["control_hz"])} if "control_hz" in file else {}

    def read(self, location: EpisodeLocation) -> dict[str, Any]:
        """Return the episode of a file."""
        source, cameras = str(location), {}
        numbers: dict[str, Any] = {}
        steps: dict[str, Any] = {}
        instruction: Any = ""
        metadata = {}
        with _open_npz(self._file(location)) as file:
            for key in file.files:
                try:
                    x = file[key]
                except (ValueError, OSError, zipfile.BadZipFile) as error:
                    raise DataError(f"{source}: {key} cannot be read: {error}") from None
                name = key.removeprefix("observation.").removeprefix("observation/")
                if name in recording.INSTRUCTIONS:
                    instruction = list(x) if x.ndim else x
                elif name == "success":
                    metadata["success"] = bool(x)
                elif name == "control_hz":
                    continue
                elif recording.is_video(x):
                    cameras[name] = recording.encode(x, self.options, f"{source}, camera {name}")
                elif x.ndim == 0 or x.dtype.kind not in "fiub":
                    raise DataError(
                        f"{source}: {key} is {x.dtype} {x.shape}; expected numbers or images of T "
                        f"steps, or one of success, control_hz, {', '.join(recording.INSTRUCTIONS)}"
                    )
                else:
                    (steps if name in STEP_KEYS else numbers)[name] = x
        steps["observation"] = numbers
        return recording.episode(steps, cameras, instruction, self.options, metadata, source)

    def _file(self, location: EpisodeLocation) -> Path:
        return self.path / location.file if self.path.is_dir() else self.path


def _open_npz(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{path} is not a complete npz file: {error}") from None
