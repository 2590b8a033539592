"""Checks of an embodiment record's ranges: dimensions that heads cannot learn, units, two sides.

An unnormalised dimension is learned as it is, so it must be a share in [0, 1] or [-1, 1]: heads
clip larger values, and their noise drowns smaller ones. Everything here is computed from the
statistics of a record, or of a part of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from octolike.embodiment import (
    MIN_SPREAD,
    RARE,
    REACH,
    STATISTICS,
    Embodiment,
    Layout,
    Statistics,
    is_rare,
)
from octolike.tables import text_table

PARTS = ("action", "proprio")
TOLERANCE = 0.1  # beyond [-1, 1]: measured shares overshoot
SMALL = 0.25  # unnormalised actions that move, but stay below it, are not shares: metres, perhaps
BINARY = 0.9  # of the largest variance that values between the extremes can have
# {unit: (the largest plausible value, the likely unit of larger ones)}
LARGEST = {"rad": (2.02 * np.pi, "degrees"), "m": (20.0, "millimetres")}
OUTSIDE = 0.5  # of the recorded range: how far a robot may leave it without a warning
# A dimension that hardly moved in the data leaves its range by noise: it counts as at least this
# wide. Other units or another order are off by far more.
NARROW = {"rad": 0.2, "m": 0.05}


def misfits(layout: Layout, s: Statistics, part: str) -> list[str]:
    """Return a clause with the remedy for each unnormalised dimension that is not a share."""
    low, high = (s.min, s.max) if s.low is None or s.high is None else (s.low, s.high)
    clauses = []
    for d, name in enumerate(layout.names):
        if layout.normalized[d]:
            continue
        begin, end = low[d], high[d]
        if max(abs(begin), abs(end)) > 1 + TOLERANCE:
            reason = "heads clip what lies outside"
            if part == "proprio":
                reason = "the network's other inputs are of that size"
        elif part == "action" and MIN_SPREAD < s.max[d] - s.min[d] <= 2 * SMALL:
            begin, end = s.min[d], s.max[d]
            if max(abs(begin), abs(end)) > SMALL:
                continue
            reason = "so small a range drowns in the noise of a head"
        else:
            continue
        clauses.append(
            f"{part} {name!r} is not normalised, but its values are {begin:.4g} to {end:.4g}; "
            f"expected a share in [0, 1] or [-1, 1], because {reason}. Set its entry of "
            f"{part}.normalized to True in the spec, or rescale it there (a spec of your own "
            "replaces one of the package; data.range_check='warn' only reports this)"
        )
    return clauses


def record_misfits(record: Embodiment) -> list[str]:
    """Return a sentence for each unnormalised dimension of a record that is not a share."""
    sentences = []
    for part in PARTS:
        layout, statistics = record.layout(part), getattr(record, f"{part}_statistics")
        if layout is not None and statistics is not None:
            names = ", ".join(record.datasets) or record.name
            sentences += [f"{names}: {x}" for x in misfits(layout, statistics, part)]
    return sentences


def as_before(record: Embodiment) -> Embodiment:
    """Return the record with statistics that normalise as those of runs before format 3."""
    parts = (record.action_statistics, record.proprio_statistics)
    action, proprio = (s and dataclasses.replace(s, low=None, high=None) for s in parts)
    return dataclasses.replace(record, action_statistics=action, proprio_statistics=proprio)


def describe_widened(record: Embodiment) -> list[str]:
    """Return a sentence for each part of a record with rarely used, hence widened, dimensions."""
    sentences = []
    for part in PARTS:
        layout, s = record.layout(part), getattr(record, f"{part}_statistics")
        if layout is None or s is None or s.low is None or s.high is None:
            continue
        beyond = np.maximum(s.high - s.mean, s.mean - s.low) > REACH * np.maximum(s.std, MIN_SPREAD)
        kinds = record.kinds(part)
        for kind, which in (("normal", beyond), ("bounds", is_rare(s))):
            names = [layout.names[d] for d in np.flatnonzero(which & (kinds == kind))]
            usual = "deviations" if kind == "normal" else "times the 1st to 99th percentile"
            if names:
                sentences.append(
                    f"rarely used: {part} {', '.join(names)} of {record.name}: values reach beyond "
                    f"{REACH if kind == 'normal' else RARE:g} {usual}; their normalisation is "
                    "widened to reach them"
                )
    return sentences


def doubtful_units(record: Embodiment) -> list[str]:
    """Return a sentence for each part with values that are too large for their units."""
    sentences = []
    for part in PARTS:
        layout, s = record.layout(part), getattr(record, f"{part}_statistics")
        if layout is None or s is None:
            continue
        low, high = (s.min, s.max) if s.low is None or s.high is None else (s.low, s.high)
        for unit, (limit, guess) in LARGEST.items():
            names = [
                f"{layout.names[d]} ({low[d]:.3g} to {high[d]:.3g})"
                for d in range(len(layout))
                if layout.units[d] == unit and max(abs(low[d]), abs(high[d])) > limit
            ]
            if names:
                sentences.append(
                    f"{part} of {record.name}: the unit of {', '.join(names)} is {unit!r}, but the "
                    f"values look like {guess}; correct the units or the values in the spec"
                )
    return sentences


def describe(records: Sequence[Embodiment]) -> list[str]:
    """Return a line for each misfit and for each widened or two-valued group of dimensions."""
    lines = []
    for record in records:
        lines += [f"warning: {x}" for x in record_misfits(record)]
        lines += [f"warning: {x}" for x in doubtful_units(record)]
        lines += describe_widened(record)
        if record.transform is not None:
            stored = record.transform.stored
            names = ", ".join(n for n in record.learned.names if n not in stored)
            lines.append(
                f"actions of {record.name} are learned as {record.representation!r}: {names}; "
                f"as stored: {', '.join(stored) or 'none'}"
            )
        if record.state_transform is not None:
            lines.append(
                f"proprio of {record.name} is shown as {record.proprio_representation!r}: "
                f"{', '.join(record.proprio_names)}"
            )
        if record.action_statistics is not None:
            binary = np.flatnonzero(is_binary(record.action_statistics))
            names = ", ".join(record.learned.names[d] for d in binary)
            if names:
                lines.append(f"two-valued actions of {record.name}: {names}")
    return lines


def statistics_table(layout: Layout, statistics: Statistics) -> str:
    """Return a row per dimension: its unit, its statistics, and "constant" if it hardly varies."""
    values = np.stack([getattr(statistics, name) for name in STATISTICS], axis=1)
    rows = []
    for name, unit, numbers in zip(layout.names, layout.units, values, strict=True):
        constant = "constant" if numbers[STATISTICS.index("std")] < MIN_SPREAD else ""
        rows.append((name, unit or "-", *(f"{x:.4g}" for x in numbers), constant))
    align = "l" + "r" * (len(STATISTICS) + 1) + "l"
    return text_table(rows, ("", "unit", *STATISTICS, ""), align, indent=4)


def statistics_tables(record: Embodiment) -> str:
    """Return the tables of a record's learned actions and of its proprio."""
    tables = []
    for part in PARTS:
        layout, s = record.layout(part), getattr(record, f"{part}_statistics")
        if layout is not None and s is not None:
            tables.append(f"  {part}\n{statistics_table(layout, s)}")
    return "\n".join(tables)


def is_binary(s: Statistics) -> np.ndarray:
    """Return bool [dims]: nearly all values are at one of the two extremes.

    The variance of values between a and b with the mean m is at most (m - a) (b - m), which they
    reach if all of them are a or b.
    """
    largest = (s.mean - s.min) * (s.max - s.mean)
    return (s.max - s.min > MIN_SPREAD) & (np.square(s.std) >= BINARY * largest) & (largest > 0)


def sided(record: Embodiment) -> np.ndarray:
    """Return bool [A]: action dimensions with two sides: binary ones, grippers, unnormalised ones.

    Dimensions that never move have no sides. Without statistics: the unnormalised ones.
    """
    layout, s = record.learned, record.action_statistics
    is_normalized = np.asarray(layout.normalized, bool)
    if s is None:
        return ~is_normalized
    is_gripper = np.array(["gripper" in name.lower() for name in layout.names])
    moves = s.max - s.min > MIN_SPREAD
    return moves & (
        is_binary(s) | ~is_normalized | (is_gripper & np.asarray(layout.absolute, bool))
    )


def middles(record: Embodiment) -> np.ndarray:
    """Return the middle of the range of each action dimension, normalised, float32 [A]."""
    s = record.action_statistics
    if s is None:
        return np.full(len(record.learned), 0.5, np.float32)
    return record.normalize_action((s.min + s.max)[None] / 2)[0]


def far_outside(x: np.ndarray, record: Embodiment) -> np.ndarray:
    """Return bool like proprio [..., P]: farther outside the recorded range than `OUTSIDE` of it.

    A range is at least `NARROW` wide. False for dimensions that were constant in the data, or are
    not normalised: nothing is known of their range.
    """
    s = record.proprio_statistics
    if s is None or record.proprio is None:
        return np.zeros(x.shape, bool)
    width = s.max - s.min
    has_range = (width > MIN_SPREAD) & np.asarray(record.proprio.normalized, bool)
    narrow = [NARROW.get(unit, 0.0) for unit in record.proprio.units]
    allowed = OUTSIDE * np.maximum(width, narrow) / np.maximum(width, MIN_SPREAD)
    return has_range & (outside(x, s) > allowed)


def outside(x: np.ndarray, s: Statistics) -> np.ndarray:
    """Return how far values [..., dims] lie outside the recorded range, in lengths of it.

    0 inside; the range of a constant dimension counts as `MIN_SPREAD`.
    """
    excess = np.maximum(np.maximum(s.min - x, x - s.max), 0)
    return np.asarray(excess / np.maximum(s.max - s.min, MIN_SPREAD))
