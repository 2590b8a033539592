"""Functions from raw RLDS steps to standard steps, for datasets that expressions cannot describe.

Such a function takes the steps of an episode as stored (a nested dict of numpy arrays [T, ...]
without images) and returns `StandardSteps`: actions and proprio in the layouts of the dataset spec,
for the first `len(action)` steps. It must not read images: statistics are computed without decoding
them. The functions below have twins in TensorFlow (`rlds/graph_expressions.py`); the graph that
makes batches calls any other function through Python (`tf.numpy_function`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class StandardSteps(NamedTuple):
    """action: float32 [T', A]; proprio: float32 [T', P] or None; T' ≤ T: the end may be missing."""

    action: np.ndarray
    proprio: np.ndarray | None


def navigation(steps: Mapping[str, Any]) -> StandardSteps:
    """Return the waypoints of a mobile robot (GNM): its displacement to the next step.

    Displacements are in the robot's frame, scaled per episode from metres to the units of the
    stored actions: by the length of the first stored action over that of the first displacement,
    both taken before thinning to every k-th step.
    """
    raw = steps.get("unthinned", steps)
    first = np.linalg.norm(np.diff(_float64(raw["observation"]["position"])[:2], axis=0))
    stored = np.linalg.norm(_float64(raw["action"])[:1])
    position = _float64(steps["observation"]["position"])
    yaw = _float64(steps["observation"]["yaw"]).reshape(-1)
    move = np.diff(position, axis=0)
    scale = stored / first if first > 0 and stored > 0 else 1.0
    cos, sin = np.cos(yaw[:-1]), np.sin(yaw[:-1])
    body = np.stack([cos * move[:, 0] + sin * move[:, 1], cos * move[:, 1] - sin * move[:, 0]])
    state = np.concatenate([position, yaw[:, None]], axis=1)[:-1]
    return StandardSteps((scale * body.T).astype(np.float32), state.astype(np.float32))


def as_stored(steps: Mapping[str, Any]) -> StandardSteps:
    """Return `action` and `observation.state` unchanged, for datasets written by this project."""
    return StandardSteps(steps["action"], steps["observation"]["state"])


def _float64(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)
