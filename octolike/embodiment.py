"""The embodiment record: what a robot's numbers mean, and how they are normalised and back.

One record per robot and action convention. The data pipeline normalises with it, the policy undoes
it, and it travels inside every checkpoint, so that nothing about units is left to memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

NORMALIZATIONS = ("normal", "bounds")
STATISTICS = ("mean", "std", "min", "max", "p01", "p99")

# A dimension that hardly moves in the data must not explode when a robot moves it a little: spreads
# below this (metres, radians) count as this. Real control noise is larger.
FLOOR = 1e-4


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What each dimension of an action or proprio vector is.

    Attributes:
        names: of the dimensions, e.g. ("dx", ..., "gripper").
        units: "m", "rad", or "" for a share in [0, 1].
        absolute: True for a target or position, False for a change since the last step.
        normalized: False for dimensions that are left as they are (grippers).
    """

    names: tuple[str, ...]
    units: tuple[str, ...]
    absolute: tuple[bool, ...]
    normalized: tuple[bool, ...]

    def __post_init__(self) -> None:
        for f in fields(self):
            if len(getattr(self, f.name)) != len(self.names):
                raise ValueError(
                    f"layout {self.names}: {f.name} has {len(getattr(self, f.name))} entries, "
                    f"expected {len(self.names)}"
                )

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """Of a vector over the training steps: float32 arrays [dims], and of how much they are."""

    mean: np.ndarray
    std: np.ndarray
    min: np.ndarray
    max: np.ndarray
    p01: np.ndarray
    p99: np.ndarray
    steps: int
    episodes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Embodiment:
    """A robot as a policy knows it.

    Attributes:
        name: unique within a run.
        robot: the machine.
        control_hz: actions per second.
        gripper: the gripper's convention in words.
        action, proprio: what the dimensions mean; proprio None where there is none.
        normalization: "normal": (x − mean) / std. "bounds": the 1st to 99th percentile to [−1, 1],
            clipped on the way in.
        datasets: whose training steps the statistics are of.
    """

    name: str
    robot: str
    control_hz: float
    gripper: str
    action: Layout
    proprio: Layout | None
    normalization: str = "normal"
    datasets: tuple[str, ...] = ()
    action_statistics: Statistics | None = None
    proprio_statistics: Statistics | None = None

    def __post_init__(self) -> None:
        if self.normalization not in NORMALIZATIONS:
            raise ValueError(
                f"embodiment {self.name!r}: normalization {self.normalization!r} is not one of "
                f"{', '.join(NORMALIZATIONS)}"
            )
        for part in ("action", "proprio"):
            layout, statistics = getattr(self, part), getattr(self, f"{part}_statistics")
            for name in STATISTICS if layout is not None and statistics is not None else ():
                if getattr(statistics, name).shape != (len(layout),):
                    raise ValueError(
                        f"embodiment {self.name!r}: {part}_statistics.{name} has shape "
                        f"{getattr(statistics, name).shape}, expected ({len(layout)},)"
                    )

    def normalize_action(self, x: np.ndarray) -> np.ndarray:
        """Return actions float [..., A] in robot units as normalised float32."""
        return self._normalize(x, "action")

    def unnormalize_action(self, x: np.ndarray) -> np.ndarray:
        """Return normalised actions float [..., A] in robot units, float32."""
        shift, scale = self._affine("action", x)
        return (x * scale + shift).astype(np.float32)

    def normalize_proprio(self, x: np.ndarray) -> np.ndarray:
        """Return proprio float [..., P] in robot units as normalised float32."""
        return self._normalize(x, "proprio")

    def _normalize(self, x: np.ndarray, part: str) -> np.ndarray:
        shift, scale = self._affine(part, x)
        y = ((x - shift) / scale).astype(np.float32)
        if self.normalization == "bounds":
            y = np.where(getattr(self, part).normalized, np.clip(y, -1, 1), y)
        return y

    def _affine(self, part: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (shift, scale), float32 [dims]: x = normalised · scale + shift."""
        layout, statistics = getattr(self, part), getattr(self, f"{part}_statistics")
        if layout is None or statistics is None:
            raise ValueError(
                f"embodiment {self.name!r} has no {part} statistics; make them with "
                "octolike.data, or load a run that carries them"
            )
        if x.shape[-1] != len(layout):
            raise ValueError(
                f"embodiment {self.name!r}: {part} has {x.shape[-1]} dimensions, expected "
                f"{len(layout)} ({', '.join(layout.names)})"
            )
        if self.normalization == "normal":
            shift, scale = statistics.mean, np.maximum(statistics.std, FLOOR)
        else:
            shift = (statistics.p99 + statistics.p01) / 2
            scale = np.maximum((statistics.p99 - statistics.p01) / 2, FLOOR)
        kept = np.asarray(layout.normalized)
        return (
            np.where(kept, shift, 0).astype(np.float32),
            np.where(kept, scale, 1).astype(np.float32),
        )


def embodiments_to_json(embodiments: Sequence[Embodiment]) -> list[dict[str, Any]]:
    """Return the records as plain JSON data."""
    return [_plain(dataclasses.asdict(e)) for e in embodiments]


def embodiments_from_json(data: Sequence[Mapping[str, Any]]) -> list[Embodiment]:
    """Return the records that `embodiments_to_json` wrote; unknown or missing names: ValueError."""
    records = []
    for item in data:
        values = dict(_strict(Embodiment, item, "embodiment"))
        values["datasets"] = tuple(values["datasets"])
        for part in ("action", "proprio"):
            if values[part] is not None:
                layout = _strict(Layout, values[part], f"{values['name']}.{part}")
                values[part] = Layout(**{k: tuple(v) for k, v in layout.items()})
            key = f"{part}_statistics"
            if values[key] is not None:
                stored = dict(_strict(Statistics, values[key], f"{values['name']}.{key}"))
                arrays = {k: np.asarray(stored[k], np.float32) for k in STATISTICS}
                values[key] = Statistics(**(stored | arrays))
        records.append(Embodiment(**values))
    return records


def _strict(cls: type, item: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    names = {f.name for f in fields(cls)}
    if item.keys() != names:
        raise ValueError(
            f"{where}: expected the fields {sorted(names)}; unknown {sorted(item.keys() - names)}, "
            f"missing {sorted(names - item.keys())}"
        )
    return item


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value.tolist() if isinstance(value, np.ndarray) else value
