"""Folders of npz files, one per episode: the format to write when a recording has none.

    np.savez("episode_0.npz", action=…, state=…, image_primary=…, language_instruction="…")

Keys: action [T, A]; language_instruction, a string or T of them; success (bool) and control_hz,
where known; reward, is_terminal [T]; everything else with T entries is of the observation: images
uint8 [T, h, w, 3], numbers. An "observation." or "observation/" before a key may be written.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from octolike.data.onboarding.convert import recording
from octolike.data.onboarding.convert.hdf5 import natural
from octolike.data.onboarding.convert.recording import ConvertOptions, EpisodeLocation
from octolike.errors import DataError

OF_STEPS = ("action", "reward", "is_terminal", "discount")


@dataclass(frozen=True)
class NpzRecording:
    """One file per episode."""

    path: Path
    options: ConvertOptions

    def items(self) -> list[EpisodeLocation]:
        """Return a file each."""
        if self.path.is_file():
            return [EpisodeLocation(self.path.name)]
        names = (str(f.relative_to(self.path)) for f in self.path.rglob("*.npz"))
        names = sorted((n for n in names if not Path(n).name.startswith(".")), key=natural)
        if not names:
            raise DataError(f"{self.path} has no .npz files")
        return [EpisodeLocation(n) for n in names]

    def about(self) -> dict[str, Any]:
        """Return the control rate that the first file states."""
        with _opened(self._file(self.items()[0])) as file:
            return {"control_hz": float(file["control_hz"])} if "control_hz" in file else {}

    def read(self, item: EpisodeLocation) -> dict[str, Any]:
        """Return the episode of a file."""
        where, cameras, numbers, steps = str(item), {}, {}, {}
        told: Any = ""
        metadata = {}
        with _opened(self._file(item)) as file:
            for key in file.files:
                try:
                    x = file[key]
                except (ValueError, OSError, zipfile.BadZipFile) as error:
                    raise DataError(f"{where}: {key} cannot be read: {error}") from None
                name = key.removeprefix("observation.").removeprefix("observation/")
                if name in recording.INSTRUCTIONS:
                    told = list(x) if x.ndim else x
                elif name == "success":
                    metadata["success"] = bool(x)
                elif name == "control_hz":
                    continue
                elif recording.is_video(x):
                    cameras[name] = recording.encode(x, self.options, f"{where}, camera {name}")
                elif x.ndim == 0 or x.dtype.kind not in "fiub":
                    raise DataError(
                        f"{where}: {key} is {x.dtype} {x.shape}; expected numbers or images of T "
                        f"steps, or one of success, control_hz, {', '.join(recording.INSTRUCTIONS)}"
                    )
                else:
                    (steps if name in OF_STEPS else numbers)[name] = x
        steps["observation"] = numbers
        return recording.episode(steps, cameras, told, self.options, metadata, where)

    def _file(self, item: EpisodeLocation) -> Path:
        return self.path / item.file if self.path.is_dir() else self.path


def _opened(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{path} is no whole npz file: {error}") from None
