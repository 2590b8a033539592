"""Infer the units of columns from their names and values.

The angles of one vector share a unit: a wrist that stays within 5 degrees next to an elbow at 90 is
in degrees too, and so are the changes of a state in degrees.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from octolike import ranges
from octolike.embodiment import Layout, Statistics

POSE = ("x", "y", "z", "roll", "pitch", "yaw")
JOINT = ("joint", "qpos", "shoulder", "elbow", "wrist", "waist", "forearm", "axis", "motor")
# Of a joint, but not its angle.
NO_ANGLE = ("cos", "sin", "vel", "torque", "effort", "current", "force", "quat", "rotation")
FULL_TURN = 2 * np.pi
METRES = 5.0  # no arm reaches farther
METRES_PER_STEP = 0.3  # no arm moves farther in a step


def infer_units(
    names: Sequence[str],
    absolute: Sequence[bool],
    grippers: Sequence[int],
    s: Statistics,
    state: Layout | None = None,
    matches: Sequence[int] = (),
) -> tuple[tuple[str, ...], str]:
    """Return (the unit of each column, "" for unknown ones; the evidence).

    state, matches: for actions, the layout of the proprio and the column that each action moves:
    the changes of a state have its unit.
    """
    units, reasons = [""] * len(names), []
    largest = np.maximum(np.abs(s.min), np.abs(s.max))
    for d, name in enumerate(names):
        if d in grippers:
            units[d], reason = _gripper_unit(name, s, d, float(largest[d]))
            reasons.append(reason)
        elif _axis(name) in POSE[:3]:
            units[d], reason = _length(name, absolute[d], s, d, float(largest[d]))
            reasons.append(reason)
    angles = [d for d, name in enumerate(names) if d not in grippers and is_angle(name)]
    unit, reason = _angle_unit(names, angles, s, largest, state, matches)
    turns = [d for d in angles if not absolute[d] and _axis(names[d]) in POSE[3:]]
    if unit == "rad" and turns and _has_own_scale(names, absolute, units):
        angles = [d for d in angles if d not in turns]
        reason = f"{', '.join(names[d] for d in turns)}: turns of a controller with its own scale"
    for d in angles:
        units[d] = unit
    reasons.append(reason)
    return tuple(units), "; ".join(dict.fromkeys(filter(None, reasons)))


def _has_own_scale(names: Sequence[str], absolute: Sequence[bool], units: Sequence[str]) -> bool:
    """Return whether changes of a position are too large for metres: in a controller's scale."""
    return any(
        not a and not unit and _axis(name) in POSE[:3]
        for name, a, unit in zip(names, absolute, units, strict=True)
    )


def is_angle(name: str) -> bool:
    """Return whether a name is that of an angle: of a pose or of a joint."""
    lower = name.lower()
    is_joint = any(word in lower for word in JOINT) and not any(w in lower for w in NO_ANGLE)
    return _axis(name) in POSE[3:] or is_joint


def _axis(name: str) -> str:
    """Return the part of a name that can be an axis of a pose: x of dx, of left_x and of tcp.x."""
    last = name.lower().replace(".", "_").rpartition("_")[2]
    return last[1:] if last.startswith("d") and last[1:] in POSE else last


def _length(name: str, absolute: bool, s: Statistics, d: int, largest: float) -> tuple[str, str]:
    limit = METRES if absolute else METRES_PER_STEP
    if largest <= limit:
        return "m", f"{name} within ±{limit:g}: metres"
    span = f"{name} {s.min[d]:.3g} to {s.max[d]:.3g}"
    if absolute and largest > 4 * METRES:
        return "mm", f"{span}: millimetres"
    return "", f"{span}: not metres" + ("" if absolute else " per step; a controller's scale")


def _angle_unit(
    names: Sequence[str],
    angles: Sequence[int],
    s: Statistics,
    largest: np.ndarray,
    state: Layout | None,
    matches: Sequence[int],
) -> tuple[str, str]:
    """Return the unit of all angles, and the evidence."""
    beyond = [d for d in angles if largest[d] > FULL_TURN * 1.01]
    if beyond:
        d = max(beyond, key=lambda d: largest[d])
        text = f"{names[d]} {s.min[d]:.3g} to {s.max[d]:.3g}, beyond 2π: degrees"
        note = "" if len(beyond) == len(angles) else ", and so are the other angles"
        return "deg", text + note
    if state is not None and matches:
        followed = {state.units[matches[d]] for d in angles if matches[d] >= 0}
        if "deg" in followed:
            return "deg", "angles whose states are in degrees"
    if not angles or max(largest[d] for d in angles) < ranges.MIN_SPREAD:
        return "", ""  # zeros fit any unit
    return "rad", "angles within ±2π: radians"


def _gripper_unit(name: str, s: Statistics, d: int, largest: float) -> tuple[str, str]:
    span = f"{name} {s.min[d]:.3g} to {s.max[d]:.3g}"
    if largest > 1 + ranges.TOLERANCE:
        return ("%", f"{span}: percent") if largest <= 110 else ("", f"{span}: steps of the device")
    if ranges.MIN_SPREAD < largest <= 0.15:
        return "m", f"{span}: metres"
    return "", ""
