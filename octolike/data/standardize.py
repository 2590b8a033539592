"""Raw RLDS steps to a standard episode: one short function per dataset.

A standardise function takes the steps of an episode as stored (a nested dict of numpy arrays
[T, ...], images left out) and returns `Standard`: actions and proprio in the layout that the
dataset's row states, for the first `len(action)` steps. It must not touch images, so that
statistics need no decoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class Standard(NamedTuple):
    """action: float32 [T', A]; proprio: float32 [T', P], or None. T' ≤ T: the end is dropped."""

    action: np.ndarray
    proprio: np.ndarray | None


def bridge(steps: Mapping[str, Any]) -> Standard:
    """Bridge V2: actions relabelled from the reached states; the last step has no next state.

    The commanded motion is not what the arm did; the state change is. The gripper command is kept,
    made binary.
    """
    state = steps["observation"]["state"]
    moved = state[1:, :6] - state[:-1, :6]
    moved[:, 3:] = wrap_angle(moved[:, 3:])
    gripper = binarize_gripper(steps["action"][:, 6])[:-1, None]
    return Standard(np.concatenate([moved, gripper], axis=1).astype(np.float32), state[:-1])


def as_stored(steps: Mapping[str, Any]) -> Standard:
    """Return `action` and `observation.state` as they are: datasets written by this project."""
    return Standard(steps["action"], steps["observation"]["state"])


def wrap_angle(x: np.ndarray) -> np.ndarray:
    """Return angles in radians, brought into (−π, π]."""
    return x - 2 * np.pi * np.ceil((x - np.pi) / (2 * np.pi))


def binarize_gripper(x: np.ndarray, low: float = 0.05, high: float = 0.95) -> np.ndarray:
    """Return gripper commands [T] as 0 (closed) or 1 (open).

    Above `high` is open, below `low` closed; a value between is the gripper on its way, and takes
    the next extreme's. With no extreme after it: open if the last command is above the middle. What
    is not finite stays NaN, as do the values before it that would take its side.
    """
    between = (low <= x) & (x <= high)
    side = np.where(np.isfinite(x), x > high, np.nan)
    result, following = np.empty(len(x), np.float32), float(x[-1] > 0.5)
    for t in reversed(range(len(x))):
        following = following if between[t] else side[t]
        result[t] = following
    return result
