"""The embodiment record: the meaning, units and statistics of a robot's actions and proprio.

There is one record per robot and action convention. The data pipeline normalises with it, the
policy un-normalises with it, and every run stores it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

NORMALIZATIONS = ("normal", "bounds")
STATISTICS = ("mean", "std", "min", "max", "p01", "p99")

# The smallest spread (metres, radians) that normalisation divides by: without it, a dimension that
# hardly moves in the data would explode when a robot moves it a little. Control noise is larger.
MIN_SPREAD = 1e-4


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The meaning of each dimension of an action or proprio vector.

    Attributes:
        names: of the dimensions, e.g. ("dx", ..., "gripper").
        units: "m", "rad", or "" for a fraction in [0, 1].
        absolute: True for a target or position, False for a change since the previous step.
        normalized: False for dimensions that are not normalised (grippers).
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
    """Statistics of a vector over the training steps, float32 [dims]; p01, p99: percentiles.

    steps, episodes: their numbers.
    """

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
    """A robot with its action and proprio conventions.

    Attributes:
        name: unique within a run.
        robot: the machine.
        control_hz: actions per second.
        gripper: the gripper's convention, in words.
        action: layout of an action.
        proprio: layout of proprio, or None.
        normalization: "normal": (x − mean) / std. "bounds": maps the 1st to 99th percentile to
            [−1, 1], and clips when normalising.
        datasets: the source of the statistics.
        action_statistics, proprio_statistics: of their training steps.
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
                f"embodiment {self.name!r} has no {part} statistics; compute them "
                "with octolike.data.open_data, or load a run that has them"
            )
        if x.shape[-1] != len(layout):
            raise ValueError(
                f"embodiment {self.name!r}: {part} has {x.shape[-1]} dimensions, expected "
                f"{len(layout)} ({', '.join(layout.names)})"
            )
        if self.normalization == "normal":
            shift, scale = statistics.mean, np.maximum(statistics.std, MIN_SPREAD)
        else:
            shift = (statistics.p99 + statistics.p01) / 2
            scale = np.maximum((statistics.p99 - statistics.p01) / 2, MIN_SPREAD)
        is_normalized = np.asarray(layout.normalized)
        return (
            np.where(is_normalized, shift, 0).astype(np.float32),
            np.where(is_normalized, scale, 1).astype(np.float32),
        )


def embodiments_to_json(embodiments: Sequence[Embodiment]) -> list[dict[str, Any]]:
    """Return the records as plain JSON data."""
    return [_plain(dataclasses.asdict(e)) for e in embodiments]


def embodiments_from_json(data: Sequence[Mapping[str, Any]]) -> list[Embodiment]:
    """Return the records that `embodiments_to_json` wrote; ValueError for other fields."""
    records = []
    for record in data:
        values = dict(_strict(Embodiment, record, "embodiment"))
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


def _strict(cls: type, values: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """Return the values if they are exactly the fields of a dataclass."""
    names = {f.name for f in fields(cls)}
    if values.keys() != names:
        raise ValueError(
            f"{path}: expected the fields {sorted(names)}; unknown: "
            f"{sorted(values.keys() - names)}, missing: {sorted(names - values.keys())}"
        )
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value.tolist() if isinstance(value, np.ndarray) else value
