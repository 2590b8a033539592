"""Infer the layout of actions or proprio from names and values, with the evidence for it.

Names that the file gives are taken. Other columns are named after their fields: one of several
columns gets a number. Units, and whether a column is a target or a change, follow from the values.
Nothing here is certain, so each inference states its evidence, for the user to verify.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from octolike import ranges
from octolike.data.rlds.quantile_sketch import QuantileSketch
from octolike.embodiment import Layout, Statistics

POSE = ("x", "y", "z", "roll", "pitch", "yaw")
GRIPPER = ("gripper", "finger", "jaw", "claw")
JOINT = ("joint", "qpos", "shoulder", "elbow", "wrist", "waist", "forearm", "axis", "motor")
CARTESIAN = ("pose", "eef", "ee_", "tcp", "cartesian", "end_effector")
FULL_TURN = 2 * np.pi
SHARE = 0.5  # the least range of a gripper that is left as it is
METRES = 5.0  # no arm reaches farther
METRES_PER_STEP = 0.3  # no arm moves farther in a step


@dataclass(frozen=True)
class InferredLayout:
    """The inferred meaning of the columns of a vector.

    Attributes:
        layout: of the columns.
        grippers: indices of the columns that are grippers.
        evidence: {"names", "units", "absolute" or "gripper": the reason for what was inferred}.
        doubts: sentences on columns that are unlike the usual radians, metres and shares.
    """

    layout: Layout
    grippers: tuple[int, ...] = ()
    evidence: Mapping[str, str] = dataclasses.field(default_factory=dict)
    doubts: tuple[str, ...] = ()


def infer_layout(
    part: str,
    widths: Mapping[str, int],
    episodes: Sequence[np.ndarray],
    names: Sequence[str] = (),
    state: Sequence[np.ndarray] = (),
    state_names: Sequence[str] = (),
) -> InferredLayout:
    """Return the layout of the columns of `episodes`, float [T, dims] each.

    Args:
        part: "action" or "proprio".
        widths: {field: number of its columns}, in the order of the columns.
        episodes: the columns of all fields, for each episode.
        names: of the columns, from the file.
        state: for actions: the proprio of each episode.
        state_names: of its columns; targets without names of their own get those of the state.
    """
    dims = sum(widths.values())
    s = _statistics(episodes, dims)
    evidence: dict[str, str] = {}
    absolute, reason = (True,) * dims, ""
    if part == "action":
        absolute, reason = _absolute(episodes, state, dims)
        evidence["absolute"] = reason
    columns, evidence["names"] = _names(part, widths, names, absolute, s)
    is_named = not evidence["names"] or len(widths) > 1
    if not is_named and part == "action" and len(state_names) == dims and sum(absolute) >= dims - 1:
        columns = tuple(state_names)
        evidence["names"] = f"{dims} targets without names in the file: named after the state"
    grippers = _grippers(columns, s)
    absolute = tuple(a or i in grippers for i, a in enumerate(absolute))
    units, reasons = zip(
        *(_unit(columns[d], absolute[d], d in grippers, s, d) for d in range(dims))
    )
    evidence["units"] = "; ".join(dict.fromkeys(filter(None, reasons))) or "none could be inferred"
    layout = Layout(names=columns, units=units, absolute=absolute, normalized=(True,) * dims)
    shares = [d for d in grippers if part == "action" and _is_share(layout, s, d)]
    if grippers and part == "action":
        evidence["gripper"] = "; ".join(_side(columns[d], s, d, d in shares) for d in grippers)
    normalized = tuple(d not in shares for d in range(dims))
    layout = dataclasses.replace(layout, normalized=normalized)
    evidence = {k: v for k, v in evidence.items() if v}
    return InferredLayout(layout, grippers, evidence, _doubts(part, layout, grippers, s))


def _doubts(part: str, layout: Layout, grippers: Sequence[int], s: Statistics) -> tuple[str, ...]:
    """Return sentences on columns that are unlike the usual radians, metres and shares."""
    doubts = []
    largest = np.maximum(np.abs(s.min), np.abs(s.max))
    turns = [
        layout.names[d]
        for d in range(len(layout))
        if layout.units[d] == "deg"
        or (not layout.units[d] and layout.absolute[d] and largest[d] > FULL_TURN * 1.01)
        if d not in grippers
    ]
    if turns:
        doubts.append(
            f"{part}: {', '.join(turns)} exceed 2π: degrees, or percent of a range, not radians; "
            "a policy acts in the same unit, so the robot must as well"
        )
    scaled = [layout.names[d] for d in grippers if layout.normalized[d]]
    if scaled and part == "action":
        doubts.append(
            f"{part}: {', '.join(scaled)}: a gripper that is not a share in [0, 1] or [-1, 1]; it "
            "is normalised"
        )
    return tuple(doubts)


def _statistics(episodes: Sequence[np.ndarray], dims: int) -> Statistics:
    """Return the statistics of all finite rows; of one row of zeros if there are none."""
    sketch = QuantileSketch(dims)
    for x in episodes:
        finite = x[np.isfinite(x).all(axis=1)]
        if len(finite):
            sketch.update(np.asarray(finite, np.float32))
    sketch.flush()
    if not sketch.steps:
        sketch.update(np.zeros((1, dims), np.float32))
    return sketch.statistics()


def _names(
    part: str,
    widths: Mapping[str, int],
    given: Sequence[str],
    absolute: Sequence[bool],
    s: Statistics,
) -> tuple[tuple[str, ...], str]:
    """Return the names of the columns, and the evidence for names that the file does not give."""
    dims = sum(widths.values())
    if len(given) == dims == len(set(given)):
        return tuple(given), ""
    if len(widths) > 1:
        stems = {
            field: field.removeprefix("observation.").removeprefix("action.") for field in widths
        }
        named = [
            stems[f].replace(".", "_") + (f"_{i}" if n > 1 else "")
            for f, n in widths.items()
            for i in range(n)
        ]
        return tuple(named), f"named after the fields {', '.join(widths)}"
    field = next(iter(widths), part)
    leaf = field.rpartition(".")[2]
    count = f"{dims} columns without names in the file"
    last = _is_gripper_like(s, dims - 1) if dims else False
    tail = ("gripper",) if dims == 7 and last else ()
    if dims - len(tail) == 6 and not any(absolute[:6]):
        return (
            *(f"d{n}" for n in POSE),
            *tail,
        ), f"{count} that are changes: taken for a Cartesian motion"
    if dims - len(tail) == 6 and any(word in leaf for word in CARTESIAN):
        return (*POSE, *tail), f"{count} in a field named {leaf}"
    if dims == 14 and all(_is_gripper_like(s, d) for d in (6, 13)):
        arm = (*(f"joint_{i}" for i in range(6)), "gripper")
        both = tuple(f"{side}_{n}" for side in ("left", "right") for n in arm)
        return both, f"{count}, of which the 7th and the 14th are shares or two-valued: two arms"
    if dims - len(tail) in (6, 7) and any(word in leaf for word in JOINT):
        joints = tuple(f"joint_{i}" for i in range(dims - len(tail)))
        return (*joints, *tail), f"{count} in a field named {leaf}"
    stem = {"action": "action", "actions": "action"}.get(leaf, leaf)
    if dims == 1:
        return (stem,), count
    numbered = tuple(f"{stem}_{i}" for i in range(dims - len(tail)))
    meaning = "targets" if part == "action" and all(absolute) else "values"
    return (
        *numbered,
        *tail,
    ), f"{count}: {meaning} of joints or of a pose, the data do not say which"


def _is_gripper_like(s: Statistics, d: int) -> bool:
    """Return whether a column has two values, or shares that reach both ends."""
    spans_share = bool(s.min[d] >= -0.1 and s.max[d] <= 1.1 and s.max[d] - s.min[d] > 0.8)
    return bool(ranges.is_binary(s)[d]) or spans_share


def _grippers(names: Sequence[str], s: Statistics) -> tuple[int, ...]:
    """Return the columns named after a gripper, or the last one if it has two values."""
    named = tuple(
        i
        for i, n in enumerate(names)
        if any(w in n.lower() for w in GRIPPER) or n.lower() in ("grip", "g")
    )
    if named or len(names) < 2:
        return named
    last = len(names) - 1
    return (last,) if ranges.is_binary(s)[last] else ()


def _is_share(layout: Layout, s: Statistics, d: int) -> bool:
    """Return whether a column may be learned as it is: also `ranges.misfits` accepts less."""
    if 0 < s.max[d] - s.min[d] < SHARE:
        return False
    single = dataclasses.replace(layout, normalized=tuple(i != d for i in range(len(layout))))
    return not ranges.misfits(single, s, "action")


def _side(name: str, s: Statistics, d: int, is_share: bool) -> str:
    """Return the sentence on a gripper: its range, and whether it is two-valued or normalised."""
    kind = "two-valued, " if ranges.is_binary(s)[d] else ""
    effect = "left as it is" if is_share else "normalised"
    high = float((s.mean[d] - s.min[d]) / max(float(s.max[d] - s.min[d]), 1e-9))
    return (
        f"{name}: {kind}{s.min[d]:.4g} to {s.max[d]:.4g}, {high:.0%} of the way up on average; "
        f"{effect}; the data do not say which end is open"
    )


def _unit(name: str, absolute: bool, is_gripper: bool, s: Statistics, d: int) -> tuple[str, str]:
    """Return the unit of a column and the evidence, "" if none was needed."""
    largest = float(max(abs(s.min[d]), abs(s.max[d])))
    lower = name.lower()
    span = f"{s.min[d]:.3g} to {s.max[d]:.3g}"
    if is_gripper:
        return _gripper_unit(name, s, d, largest)
    axis = lower.removeprefix("d")
    if axis in POSE[:3]:
        limit = METRES if absolute else METRES_PER_STEP
        if largest <= limit:
            return "m", f"{name} within ±{limit:g}: metres"
        return (
            ("mm", f"{name} {span}: millimetres")
            if absolute and largest > 20
            else (
                "",
                f"{name} {span}: not metres"
                + ("" if absolute else " per step; a controller's scale"),
            )
        )
    if axis in POSE[3:] or any(word in lower for word in JOINT):
        if largest > FULL_TURN * 1.01:
            return "deg", f"{name} {span}, beyond 2π: degrees"
        return "rad", "angles within ±2π: radians"
    return "", ""


def _gripper_unit(name: str, s: Statistics, d: int, largest: float) -> tuple[str, str]:
    span = f"{name} {s.min[d]:.3g} to {s.max[d]:.3g}"
    if largest > 1 + ranges.TOLERANCE:
        return ("%", f"{span}: percent") if largest <= 110 else ("", f"{span}: steps of the device")
    if ranges.MIN_SPREAD < largest <= 0.15:
        return "m", f"{span}: metres"
    return "", ""


def _absolute(
    action: Sequence[np.ndarray], state: Sequence[np.ndarray], dims: int
) -> tuple[tuple[bool, ...], str]:
    """Return whether actions are targets, per dimension, with the evidence.

    Targets are closer to the next state than to its change. Without a state of as many dimensions,
    they change slowly relative to their spread.
    """
    long = [i for i, x in enumerate(action) if len(x) > 1]
    if not long:
        return (False,) * dims, "too few steps to see whether actions are targets"
    if state and state[0].shape[1] == dims:
        target = np.concatenate([np.abs(action[i][:-1] - state[i][1:]) for i in long])
        change = np.concatenate([np.abs(action[i][:-1] - np.diff(state[i], axis=0)) for i in long])
        near = np.nanmedian(target, 0) < np.nanmedian(change, 0)
        reason = "targets are closer to the next state than to its change"
    else:
        spread = np.nanstd(np.concatenate(action), axis=0) + 1e-12
        moves = np.concatenate([np.abs(np.diff(action[i], axis=0)) for i in long])
        near = np.nanmedian(moves, 0) < 0.1 * spread
        reason = "no state of the same size; targets change slowly relative to their spread"
    count = int(near.sum())
    return tuple(near.tolist()), f"{count} of {dims} are targets: {reason}"
