"""Name the columns of actions or proprio, with the evidence for it.

Names that the file gives are taken. Other columns are named after their fields: one of several
columns gets a number. A rotation is recognised by its values: the four of a quaternion have norm 1,
the six of two columns of a rotation matrix are orthogonal. The evidence states the open questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from octolike import ranges
from octolike.data.onboarding.infer_units import FULL_TURN, POSE, is_angle
from octolike.embodiment import MIN_SPREAD, Statistics

CARTESIAN = ("pose", "eef", "ee_", "tcp", "cartesian", "end_effector")
GRIPPER = ("gripper", "finger", "jaw", "claw")
RARE = 0.02  # a column that switches less often is not a gripper
CONTROLLER = 1.0 + ranges.TOLERANCE  # the largest change of a pose: in metres, or of a controller
NORM = 1e-3  # rounding of a rotation in float32


class ActionContext(NamedTuple):
    """The state that actions move, from which they are named (`infer_layout`).

    absolute: bool per column; matches: the state column that each one moves, or -1; state_names:
    names of the state's columns.
    """

    absolute: tuple[bool, ...]
    matches: tuple[int, ...] = ()
    state_names: tuple[str, ...] = ()


class ColumnNames(NamedTuple):
    """The names, the evidence for names that the file does not give, and doubts about rotations."""

    names: tuple[str, ...]
    evidence: str
    doubts: tuple[str, ...] = ()


def name_columns(
    part: str,
    widths: Mapping[str, int],
    file_names: Sequence[str],
    episodes: Sequence[np.ndarray],
    s: Statistics,
    action: ActionContext | None = None,
) -> ColumnNames:
    """Return the names of the columns of the fields `widths`.

    file_names: those in the file, () for none. action: of actions; None for proprio.
    """
    dims = sum(widths.values())
    rotations = find_rotations(episodes)
    doubts = tuple(_rotation_doubt(part, start, kind, episodes) for start, kind in rotations)
    if len(file_names) == dims == len(set(file_names)):
        return ColumnNames(tuple(file_names), "", doubts)
    if file_names:
        repeated = sorted({n for n in file_names if file_names.count(n) > 1})
        found = f"repeats {', '.join(repeated)}" if repeated else f"has {len(file_names)} names"
        doubts += (f"{part}: the file {found} for {dims} columns: its names are not used",)
    if len(widths) > 1:
        columns = [
            _stem(field) + (f"_{i}" if width > 1 else "")
            for field, width in widths.items()
            for i in range(width)
        ]
        return ColumnNames(tuple(columns), f"named after the fields {', '.join(widths)}", doubts)
    is_velocity = "vel" in next(iter(widths), "")
    if action is not None and not is_velocity and (followed := _after_state(dims, action, s)):
        noun = "targets" if all(action.absolute) else "columns"
        evidence = f"{dims} {noun} without names in the file: named after the state"
        return ColumnNames(followed, evidence, doubts)
    names, evidence = _one_field(next(iter(widths), part), dims, part, s, action)
    for start, kind in rotations:
        size = len(kind.columns)
        names = (*names[:start], *kind.columns, *names[start + size :])
        evidence += f"; columns {start} to {start + size - 1} are {kind.title}"
    return ColumnNames(names, evidence, doubts)


def grippers(names: Sequence[str], s: Statistics) -> tuple[int, ...]:
    """Return the columns named after a gripper, or the last ones that have two values."""
    named = tuple(
        i
        for i, n in enumerate(names)
        if any(w in n.lower() for w in GRIPPER) or n.lower() in ("grip", "g")
    )
    if named or len(names) < 2:
        return named
    is_switch = ranges.is_binary(s) & (np.abs(_height(s) - 0.5) < 0.5 - RARE)
    first = len(names)
    while first > 1 and is_switch[first - 1]:
        first -= 1
    return tuple(range(first, len(names)))


class Rotation(NamedTuple):
    """A rotation among the columns."""

    title: str
    columns: tuple[str, ...]


QUATERNION = Rotation(
    "a quaternion (norm 1), with w first or last: the data do not say",
    tuple(f"quaternion_{i}" for i in range(4)),
)
ROTATION_6D = Rotation("two columns of a rotation matrix", tuple(f"rotation_{i}" for i in range(6)))


def find_rotations(episodes: Sequence[np.ndarray]) -> list[tuple[int, Rotation]]:
    """Return (first column, kind) of each rotation among the columns."""
    x = np.concatenate(episodes) if episodes else np.zeros((0, 0))
    x = x[np.isfinite(x).all(axis=1)]
    result: list[tuple[int, Rotation]] = []
    start = 0
    while len(x) and start + 4 <= x.shape[1]:
        kind = ROTATION_6D if _is_rotation_6d(x[:, start : start + 6]) else None
        if kind is None and _is_unit(x[:, start : start + 4]):
            # Three columns of norm 1 next to a constant 0 are not a quaternion.
            moving = np.ptp(x[:, start : start + 4], axis=0) > NORM
            kind = QUATERNION if moving.sum() >= 2 else None
        if kind is None:
            start += 1
        else:
            result.append((start, kind))
            start += len(kind.columns)
    return result


def _is_unit(x: np.ndarray) -> bool:
    return bool(np.abs(np.linalg.norm(x, axis=1) - 1).max() < NORM)


def _is_rotation_6d(x: np.ndarray) -> bool:
    if x.shape[1] < 6 or not (_is_unit(x[:, :3]) and _is_unit(x[:, 3:])):
        return False
    return bool(np.abs((x[:, :3] * x[:, 3:]).sum(axis=1)).max() < NORM)


def _rotation_doubt(part: str, start: int, kind: Rotation, episodes: Sequence[np.ndarray]) -> str:
    """Return the sentence on a rotation: signs that flip, normalisation that leaves the sphere."""
    size = len(kind.columns)
    text = f"{part}: columns {start} to {start + size - 1} are {kind.title}"
    if kind is not QUATERNION:
        return text
    flips = sum(
        int((np.einsum("td,td->t", x[1:, start : start + 4], x[:-1, start : start + 4]) < 0).sum())
        for x in episodes
    )
    text += f"; its sign flips in {flips} steps" if flips else ""
    if part == "proprio":
        return (
            f"{text}; q and -q are one rotation: convert it to roll, pitch and yaw in standardize, "
            "which data.proprio_representation=rotation_6d shows without jumps"
        )
    return f"{text}; convert it in standardize: a head predicts its four numbers independently"


def _height(s: Statistics) -> np.ndarray:
    """Return how far up the mean of each column is: 0 at the smallest value, 1 at the largest."""
    return (s.mean - s.min) / np.maximum(s.max - s.min, 1e-9)


def _after_state(dims: int, action: ActionContext, s: Statistics) -> tuple[str, ...]:
    """Return the names of the state's columns that the actions move; () if not every one is clear.

    Targets of as many columns as the state follow it in its order; changes have to match each.
    """
    states, matches = action.state_names, action.matches
    if not states:
        return ()
    if len(states) == dims and sum(action.absolute) >= dims - 1:
        return states
    # A switch moves its state with a delay, and a constant column moves none.
    is_quiet = ranges.is_binary(s) | (s.max - s.min <= MIN_SPREAD)
    is_square = len(states) == dims
    names = tuple(
        states[m] if m >= 0 else (states[d] if is_square and is_quiet[d] else "")
        for d, m in enumerate(matches)
    )
    is_clear = len(names) == dims and all(names) and len(set(names)) == dims
    moving = [name for name, quiet in zip(names, is_quiet, strict=True) if not quiet]
    return names if is_clear and all(map(is_angle, moving)) else ()


def _one_field(
    field: str, dims: int, part: str, s: Statistics, action: ActionContext | None
) -> tuple[tuple[str, ...], str]:
    """Return the names of the columns of one field, and the evidence."""
    leaf = field.rpartition(".")[2]
    count = f"{dims} columns without names in the file"
    tail = ("gripper",) if dims == 7 and _is_gripper_like(s, dims - 1) else ()
    is_joint = is_angle(leaf) or "joint_vel" in leaf
    are_changes = action is not None and dims - len(tail) == 6 and not any(action.absolute[:6])
    if action is not None and are_changes and not is_joint and _is_motion(s, action):
        names = (*(f"d{n}" for n in POSE), *tail)
        return names, f"{count} that are changes: taken for a Cartesian motion"
    if dims - len(tail) == 6 and any(word in leaf for word in CARTESIAN):
        return (*POSE, *tail), f"{count} in a field named {leaf}"
    if dims == 14 and all(_is_gripper_like(s, d) for d in (6, 13)):
        arm = (*(f"joint_{i}" for i in range(6)), "gripper")
        both = tuple(f"{side}_{n}" for side in ("left", "right") for n in arm)
        return both, f"{count}, of which the 7th and the 14th are shares or two-valued: two arms"
    if dims - len(tail) in (6, 7) and is_joint:
        stem = "joint_velocity" if "vel" in leaf else "joint"
        joints = tuple(f"{stem}_{i}" for i in range(dims - len(tail)))
        return (*joints, *tail), f"{count} in a field named {leaf}"
    stem = "action" if leaf == "actions" else leaf
    if dims == 1:
        return (stem,), count
    numbered = tuple(f"{stem}_{i}" for i in range(dims - len(tail)))
    meaning = "targets" if action is not None and all(action.absolute) else "values"
    return (
        *numbered,
        *tail,
    ), f"{count}: {meaning} of joints or of a pose, the data do not say which"


def _is_motion(s: Statistics, action: ActionContext) -> bool:
    """Return whether six changes can be those of a pose: small, and of no joints."""
    largest = np.maximum(np.abs(s.min), np.abs(s.max))[:6]
    names = action.state_names
    moves_joints = any(is_angle(names[m]) for m in action.matches[:6] if names and m >= 0)
    moves = bool((s.max - s.min)[:6].max() > MIN_SPREAD)
    is_small = largest[:3].max() <= CONTROLLER and largest[3:].max() <= FULL_TURN
    return bool(moves and is_small and not moves_joints)


def _is_gripper_like(s: Statistics, d: int) -> bool:
    """Return whether a column has two values, or shares that reach both ends."""
    spans_share = bool(s.min[d] >= -0.1 and s.max[d] <= 1.1 and s.max[d] - s.min[d] > 0.8)
    return bool(ranges.is_binary(s)[d]) or spans_share


def _stem(field: str) -> str:
    return field.removeprefix("observation.").removeprefix("action.").replace(".", "_")
