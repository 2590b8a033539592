"""Raw RLDS steps to a standard episode, where a row's expressions do not say it all.

A standardise function takes the steps of an episode as stored (a nested dict of numpy arrays
[T, ...], images left out) and returns `StandardSteps`: actions and proprio in the layout that the
dataset's row states, for the first `len(action)` steps. It must not touch images, so that
statistics need no decoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class StandardSteps(NamedTuple):
    """action: float32 [T', A]; proprio: float32 [T', P], or None. T' ≤ T: the end is dropped."""

    action: np.ndarray
    proprio: np.ndarray | None


def navigation(steps: Mapping[str, Any]) -> StandardSteps:
    """Waypoints of mobile robots (GNM): displacement to the next kept step in the robot's frame.

    One scale per episode brings metres to the units of the stored actions: the length of the first
    stored action over that of the first displacement, both before steps are left out.
    """
    raw = steps.get("unthinned", steps)
    first = np.linalg.norm(np.diff(raw["observation"]["position"][:2], axis=0))
    stored = np.linalg.norm(raw["action"][:1])
    position, yaw = steps["observation"]["position"], np.reshape(steps["observation"]["yaw"], -1)
    moved = np.diff(np.asarray(position, np.float64), axis=0)
    scale = stored / first if first > 0 and stored > 0 else 1.0
    cos, sin = np.cos(yaw[:-1]), np.sin(yaw[:-1])
    body = np.stack([cos * moved[:, 0] + sin * moved[:, 1], cos * moved[:, 1] - sin * moved[:, 0]])
    state = np.concatenate([position, yaw[:, None]], axis=1)[:-1]
    return StandardSteps(np.float32(scale * body.T), np.float32(state))


def as_stored(steps: Mapping[str, Any]) -> StandardSteps:
    """Return `action` and `observation.state` as they are: datasets written by this project."""
    return StandardSteps(steps["action"], steps["observation"]["state"])
