"""A standard episode: actions and proprio in robot units, images still encoded as stored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from octolike.errors import DataError


class ExcludedEpisodeError(DataError):
    """A filter excludes the episode.

    Attributes:
        reason: in a few words, the same for all episodes that this filter excludes.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass
class Episode:
    """A standard episode of T usable steps.

    Attributes:
        action: float32 [T, A], in robot units.
        proprio: float32 [T, P], in robot units, or None.
        instructions: T strings, "" for none; T tuples if the spec has several instruction fields.
        images: camera: T encoded images; cameras that the episode lacks are missing.
        depth: camera: T depth images, encoded or as arrays [h, w, 1], in the spec's unit.
    """

    action: np.ndarray
    proprio: np.ndarray | None
    instructions: list[str] | list[tuple[str, ...]]
    images: dict[str, list[bytes]]
    depth: dict[str, list[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.action)
