"""The embodiment record: the meaning, units and statistics of a robot's actions and proprio.

There is one record per robot and action convention. The data pipeline normalises with it, the
policy un-normalises with it, and every run stores it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from octolike.representation import Representation
from octolike.state_representation import StateRepresentation

NORMALIZATIONS = ("normal", "bounds", "minmax", "share")
STATISTICS = ("mean", "std", "min", "max", "p01", "p99")

# The smallest spread (metres, radians) that normalisation divides by: without it, a dimension that
# hardly moves in the data would explode when a robot moves it a little. Control noise is larger.
MIN_SPREAD = 1e-4
# Statistics have the values beyond which EXTREME of the steps lie, on each side. "normal" maps them
# into ± REACH, which heads can output; "bounds" map them to ±1 if they are RARE times as far from
# the middle as the 1st and 99th percentile: the dimension is rarely used.
EXTREME = 0.0005
REACH = 5.0
RARE = 3.0
LARGEST = 1e9  # of any statistic, in any unit: no measurement of a robot is larger


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The meaning of each dimension of an action or proprio vector.

    Attributes:
        names: names of the dimensions, e.g. ("dx", ..., "gripper").
        units: "m", "rad", or "" for a fraction in [0, 1].
        absolute: True for a target or position, False for a change since the previous step.
        normalized: False for dimensions that are learned as they are: shares in [0, 1] or [-1, 1].
        normalization: how each dimension is normalised, one of `NORMALIZATIONS`, "" for the
            record's way; () for the record's way in all of them.
    """

    names: tuple[str, ...]
    units: tuple[str, ...]
    absolute: tuple[bool, ...]
    normalized: tuple[bool, ...]
    normalization: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for f in fields(self):
            size = len(getattr(self, f.name))
            if size != len(self.names) and not (f.name == "normalization" and size == 0):
                raise ValueError(
                    f"layout {self.names}: {f.name} has {size} entries, expected {len(self.names)}"
                )
        for kind in self.normalization:
            if kind not in ("", *NORMALIZATIONS):
                raise ValueError(
                    f"layout {self.names}: normalization {kind!r} is not one of "
                    f"{', '.join(NORMALIZATIONS)}, or '' for that of the run"
                )

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """Statistics of a vector over the training steps, float32 [dims]; p01, p99: percentiles.

    steps, episodes: their numbers. low, high: the values that `EXTREME` of the steps lie below and
    above; None in records of older runs.
    """

    mean: np.ndarray
    std: np.ndarray
    min: np.ndarray
    max: np.ndarray
    p01: np.ndarray
    p99: np.ndarray
    steps: int
    episodes: int
    low: np.ndarray | None = None
    high: np.ndarray | None = None


def recorded_representation(text: str) -> str:
    """Return a representation of the config as records hold it: "" for "as_stored"."""
    return "" if text == "as_stored" else text


@dataclass(frozen=True, kw_only=True, eq=False)
class Embodiment:
    """A robot with its action and proprio conventions.

    Attributes:
        name: unique within a run.
        robot: the machine.
        control_hz: actions per second; 0: unknown, as of imported Octo runs.
        gripper: the gripper's convention, in words.
        action: layout of an action.
        proprio: layout of proprio, or None.
        normalization: "normal": (x − mean) / std. "bounds": maps the 1st to 99th percentile to
            [−1, 1], "minmax" the extremes; both clip when normalising. "share" maps the range
            without its rarest values to [0, 1]: a gripper in metres or percent. A layout may choose
            another way for a dimension. The first two are widened for rarely used dimensions
            (`REACH`).
        datasets: the source of the statistics.
        inferred: fields of the dataset specs that were inferred and not verified.
        representation: form in which actions are learned (octolike.representation); "": as stored.
        proprio_representation: how the network sees proprio (octolike.state_representation); "": as
            stored.
        action_statistics, proprio_statistics: statistics of the training steps: of the learned
            chunks, and of the stored proprio.
    """

    name: str
    robot: str
    control_hz: float
    gripper: str
    action: Layout
    proprio: Layout | None
    normalization: str = "normal"
    datasets: tuple[str, ...] = ()
    inferred: tuple[str, ...] = ()
    representation: str = ""
    proprio_representation: str = ""
    action_statistics: Statistics | None = None
    proprio_statistics: Statistics | None = None

    def __post_init__(self) -> None:
        if self.normalization not in NORMALIZATIONS:
            raise ValueError(
                f"embodiment {self.name!r}: normalization {self.normalization!r} is not one of "
                f"{', '.join(NORMALIZATIONS)}"
            )
        _ = self.state_transform  # raises if it does not apply; `layout` computes the other one
        for part in ("action", "proprio"):
            layout, statistics = self.layout(part), getattr(self, f"{part}_statistics")
            if layout is None or statistics is None:
                continue
            for name in STATISTICS:
                if getattr(statistics, name).shape != (len(layout),):
                    raise ValueError(
                        f"embodiment {self.name!r}: {part}_statistics.{name} has shape "
                        f"{getattr(statistics, name).shape}, expected ({len(layout)},)"
                    )

    @cached_property
    def transform(self) -> Representation | None:
        """The transform of action chunks to their learned form; None if learned as stored."""
        if not self.representation:
            return None
        states = self.proprio.names if self.proprio else ()
        a = self.action
        result = Representation(self.representation, a.names, a.absolute, a.normalized, states)
        turned = [(a.names[d], a.units[d]) for d in result.angles if a.units[d] != "rad"]
        if turned:
            raise ValueError(
                f"representation {self.representation!r} needs angles in radians; the unit of "
                f"{', '.join(name for name, _ in turned)} is {turned[0][1]!r}: convert them in the "
                "spec"
            )
        return result

    @cached_property
    def state_transform(self) -> StateRepresentation | None:
        """The transform of proprio to the network's input; None if that is proprio as stored."""
        p = self.proprio
        if not self.proprio_representation or p is None:
            return None
        return StateRepresentation(self.proprio_representation, p.names, p.units, p.normalized)

    @property
    def proprio_names(self) -> tuple[str, ...]:
        """The names of the columns of proprio that the network sees; () without proprio."""
        transform = self.state_transform
        return transform.names if transform else self.proprio.names if self.proprio else ()

    def layout(self, part: str) -> Layout | None:
        """Return the layout of the learned actions ("action"), or of the proprio."""
        if part == "action" and self.transform is not None:
            return self._learned
        return self.action if part == "action" else self.proprio

    @cached_property
    def _learned(self) -> Layout:
        assert self.transform is not None  # see `layout`
        a, source = self.action, self.transform.source
        is_angle = [name in a.names for name in self.transform.names]
        units = tuple(a.units[d] if same else "" for d, same in zip(source, is_angle, strict=True))
        return Layout(
            names=self.transform.names,
            units=units,
            absolute=self.transform.absolute,
            normalized=tuple(a.normalized[d] for d in source),
            normalization=tuple(a.normalization[d] for d in source) if a.normalization else (),
        )

    @property
    def learned(self) -> Layout:
        """The layout of the actions as the network predicts them."""
        layout = self.layout("action")
        assert layout is not None
        return layout

    def represent(self, chunk: np.ndarray, proprio: np.ndarray | None) -> np.ndarray:
        """Return action chunks float [..., H, A] as learned, [..., H, A'], not yet normalised.

        proprio: float [..., P] in robot units at the first action; None if nothing depends on it.
        """
        return chunk if self.transform is None else self.transform.encode(chunk, proprio)

    def encode(self, chunk: np.ndarray, proprio: np.ndarray | None) -> np.ndarray:
        """Return chunks [..., H, A] in robot units as the network's, float32 [..., H, A']."""
        return self.normalize_action(self.represent(chunk, proprio))

    def decode(self, x: np.ndarray, proprio: np.ndarray | None) -> np.ndarray:
        """Return the network's chunks [..., H, A'] in robot units, float32 [..., H, A]."""
        learned = self.unnormalize_action(x)
        return learned if self.transform is None else self.transform.decode(learned, proprio)

    def normalize_action(self, x: np.ndarray) -> np.ndarray:
        """Return learned actions float [..., A'] as normalised float32."""
        return self._normalize(x, "action")

    def unnormalize_action(self, x: np.ndarray) -> np.ndarray:
        """Return normalised actions float [..., A'] in the units of the learned ones, float32."""
        shift, scale = self._checked_affine("action", x)
        return (x * scale + shift).astype(np.float32)

    def normalize_proprio(self, x: np.ndarray) -> np.ndarray:
        """Return proprio float [..., P] in robot units as the network's, float32 [..., P']."""
        normalized, transform = self._normalize(x, "proprio"), self.state_transform
        if transform is None:
            return normalized
        return np.asarray(transform.encode(normalized, x), np.float32)

    def kinds(self, part: str) -> np.ndarray:
        """Return how each dimension of "action" or "proprio" is normalised, "" for not at all."""
        layout = self.layout(part)
        assert layout is not None  # callers check it
        kinds = [kind or self.normalization for kind in layout.normalization or [""] * len(layout)]
        return np.where(layout.normalized, kinds, "")

    def is_clipped(self, part: str) -> np.ndarray:
        """Return bool [dims]: which dimensions of "action" or "proprio" are clipped to [-1, 1]."""
        return np.isin(self.kinds(part), ("bounds", "minmax"))

    def affine(self, part: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (shift, scale), float32 [dims], of a part: x = normalised · scale + shift."""
        layout, statistics = self.layout(part), getattr(self, f"{part}_statistics")
        if layout is None or statistics is None:
            raise ValueError(
                f"embodiment {self.name!r} has no {part} statistics; compute them "
                "with octolike.data.open_data, or load a run that has them"
            )
        kinds = self.kinds(part)
        shift, scale = np.zeros(len(layout), np.float32), np.ones(len(layout), np.float32)
        for kind in NORMALIZATIONS:
            pairs = zip((shift, scale), _affine(kind, statistics), strict=True)
            shift, scale = (np.where(kinds == kind, new, old) for old, new in pairs)
        return shift.astype(np.float32), scale.astype(np.float32)

    def _normalize(self, x: np.ndarray, part: str) -> np.ndarray:
        shift, scale = self._checked_affine(part, x)
        y = ((x - shift) / scale).astype(np.float32)
        is_clipped = self.is_clipped(part)
        return np.where(is_clipped, np.clip(y, -1, 1), y) if is_clipped.any() else y

    def _checked_affine(self, part: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        layout = self.layout(part)
        if layout is not None and x.shape[-1] != len(layout):
            raise ValueError(
                f"embodiment {self.name!r}: {part} has {x.shape[-1]} dimensions, expected "
                f"{len(layout)} ({', '.join(layout.names)})"
            )
        return self.affine(part)


def _affine(kind: str, s: Statistics) -> tuple[np.ndarray, np.ndarray]:
    """Return (shift, scale) [dims] of one way to normalise."""
    if kind == "normal":
        shift, scale = s.mean, s.std
        if s.low is not None and s.high is not None:
            scale = np.maximum(scale, np.maximum(s.high - shift, shift - s.low) / REACH)
        return shift, np.maximum(scale, MIN_SPREAD)
    if kind == "share":
        low, high = (s.min, s.max) if s.low is None or s.high is None else (s.low, s.high)
        return low, np.maximum(high - low, MIN_SPREAD)
    low, high = (s.p01, s.p99) if kind == "bounds" else (s.min, s.max)
    if kind == "bounds" and s.low is not None and s.high is not None:
        rare = is_rare(s)
        low, high = np.where(rare, s.low, low), np.where(rare, s.high, high)
    return (high + low) / 2, np.maximum((high - low) / 2, MIN_SPREAD)


def one_is_open(gripper: str) -> bool | None:
    """Return whether 1 means open in the text of a gripper's convention; None if it is unknown.

    The first statement counts; a later one is on the stored values. "-1 = open" is none on 1.
    """
    match = re.search(r"(?<![-.\d])1 = (open|close)", gripper)
    return match.group(1) == "open" if match else None


def is_rare(s: Statistics) -> np.ndarray:
    """Return bool [dims]: more than `EXTREME` of the steps lie far outside the percentiles."""
    if s.low is None or s.high is None:
        return np.zeros(s.mean.shape, bool)
    middle, half = (s.p99 + s.p01) / 2, (s.p99 - s.p01) / 2
    farthest = np.maximum(s.high - middle, middle - s.low)
    return farthest > RARE * np.maximum(half, MIN_SPREAD)


# Fields that older records lack. They are stored unless empty: old records stay as they are.
OPTIONAL: dict[type, set[str]] = {
    Embodiment: {"inferred", "representation", "proprio_representation"},
    Layout: {"normalization"},
    Statistics: {"low", "high"},
}


def embodiments_to_json(embodiments: Sequence[Embodiment]) -> list[dict[str, Any]]:
    """Return the records as plain JSON data, without the `OPTIONAL` fields that are empty."""
    return [_plain(dataclasses.asdict(e)) for e in embodiments]


def embodiments_from_json(data: Sequence[Mapping[str, Any]]) -> list[Embodiment]:
    """Return the records that `embodiments_to_json` wrote; ValueError, in one line, for others."""
    try:
        records = _records(data)
    except (TypeError, AttributeError, KeyError, OverflowError) as error:
        raise ValueError(
            f"the embodiment records have another structure ({type(error).__name__}: {error})"
        ) from None
    for record in records:
        check_record(record)
    return records


def check_record(record: Embodiment) -> None:
    """Raise ValueError, naming the value, for a record that would give impossible actions."""
    title = f"embodiment {record.name!r}"
    texts = (record.name, record.robot, record.gripper, *record.datasets, *record.inferred)
    if not all(isinstance(x, str) for x in texts):
        raise ValueError(f"{title}: its names are not all texts")
    if not (isinstance(record.control_hz, (int, float)) and 0 <= record.control_hz < 1e5):
        raise ValueError(
            f"{title}: control_hz is {record.control_hz!r}; expected actions per s, 0 for unknown"
        )
    for part in ("action", "proprio"):
        layout, statistics = record.layout(part), getattr(record, f"{part}_statistics")
        if layout is None:
            continue
        if not all(isinstance(x, str) for x in (*layout.names, *layout.units)):
            raise ValueError(f"{title}: the names and units of {part} are not all texts")
        if not layout.names or len(set(layout.names)) < len(layout.names):
            raise ValueError(f"{title}: the names of {part} are not distinct: {layout.names}")
        if not all(isinstance(x, bool) for x in (*layout.absolute, *layout.normalized)):
            raise ValueError(f"{title}: absolute and normalized of {part} are not all booleans")
        if statistics is not None:
            _check_statistics(f"{title}: {part}", layout, statistics)


def _check_statistics(title: str, layout: Layout, s: Statistics) -> None:
    """Raise ValueError for statistics that no data can have."""
    optional = [x for x in ("low", "high") if getattr(s, x) is not None]
    for name in (*STATISTICS, *optional):
        values = getattr(s, name)
        for d in np.flatnonzero(~np.isfinite(values)):
            raise ValueError(f"{title} {layout.names[d]!r} has the {name} {values[d]}")
        for d in np.flatnonzero(np.abs(values) > LARGEST):
            raise ValueError(
                f"{title} {layout.names[d]!r} has the {name} {values[d]:.4g} {layout.units[d]}"
            )
    pairs = [("min", "max"), ("p01", "p99"), *([("low", "high")] if len(optional) == 2 else [])]
    for low, high in pairs:
        for d in np.flatnonzero(getattr(s, low) > getattr(s, high)):
            raise ValueError(
                f"{title} {layout.names[d]!r} has {low} {getattr(s, low)[d]:.6g} > {high} "
                f"{getattr(s, high)[d]:.6g}"
            )
    # No spread can exceed the largest value; a rounding error is allowed.
    largest = np.maximum(np.abs(s.min), np.abs(s.max)) * 1.01 + MIN_SPREAD
    bad = (s.std < 0) | ((s.std > largest) & np.asarray(layout.normalized, bool))
    for d in np.flatnonzero(bad):
        raise ValueError(
            f"{title} {layout.names[d]!r} has the std {s.std[d]:.4g}, which no values between "
            f"{s.min[d]:.4g} and {s.max[d]:.4g} can have"
        )
    slack = 0.01 * (s.max - s.min) + 1e-3 * np.maximum(np.abs(s.min), np.abs(s.max)) + MIN_SPREAD
    outside = ((s.mean < s.min - slack) | (s.mean > s.max + slack)) & np.asarray(layout.normalized)
    for d in np.flatnonzero(outside):
        raise ValueError(
            f"{title} {layout.names[d]!r} has the mean {s.mean[d]:.4g}, outside its values "
            f"{s.min[d]:.4g} to {s.max[d]:.4g}"
        )
    if not all(type(n) is int and n >= 0 for n in (s.steps, s.episodes)):
        raise ValueError(f"{title} statistics: steps {s.steps!r}, episodes {s.episodes!r}")


def _records(data: Sequence[Mapping[str, Any]]) -> list[Embodiment]:
    records = []
    for record in data:
        values = dict(_strict(Embodiment, record, "embodiment"))
        for name in values.keys() & {"datasets", "inferred"}:
            values[name] = tuple(values[name])
        for part in ("action", "proprio"):
            if values[part] is not None:
                layout = _strict(Layout, values[part], f"{values['name']}.{part}")
                values[part] = Layout(**{k: tuple(v) for k, v in layout.items()})
            key = f"{part}_statistics"
            if values[key] is not None:
                stored = dict(_strict(Statistics, values[key], f"{values['name']}.{key}"))
                names = [k for k in (*STATISTICS, "low", "high") if k in stored]
                arrays = {k: _numbers(stored[k], f"{values['name']}.{key}.{k}") for k in names}
                values[key] = Statistics(**(stored | arrays))
        records.append(Embodiment(**values))
    return records


def _numbers(values: Any, path: str) -> np.ndarray:
    try:
        return np.asarray(values, np.float32)
    except (ValueError, TypeError):
        raise ValueError(f"embodiment {path} is {values!r:.80}; expected numbers") from None


def _strict(cls: type, values: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """Return the values if they are exactly the fields of a dataclass, `OPTIONAL` ones aside."""
    names = {f.name for f in fields(cls)}
    missing, unknown = names - values.keys() - OPTIONAL[cls], values.keys() - names
    if missing or unknown:
        raise ValueError(
            f"{path}: expected the fields {sorted(names)}; unknown: {sorted(unknown)}, missing: "
            f"{sorted(missing)}"
        )
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        optional = set().union(*OPTIONAL.values()) & value.keys()
        empty = {k for k in optional if isinstance(value[k], (tuple, str)) and not value[k]}
        empty |= {k for k in optional if value[k] is None}
        return {k: _plain(v) for k, v in value.items() if k not in empty}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value.tolist() if isinstance(value, np.ndarray) else value
