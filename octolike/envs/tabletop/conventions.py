"""The robots of the table: action conventions, and a conveyor belt at a higher control rate.

Two robots with different conventions conflict on purpose: the right action of one is wrong for the
other, and nothing in the image shows which robot it is. Remedies for negative transfer are tested
on such pairs (configs/experiments/conflict.py).

    standard   dx, dy, dz in metres along the table's axes
    mirrored   x and y reversed, as for a robot on the opposite side of the table
    rescaled   in half metres: every number is twice as large. Per-robot statistics undo this, so
               it conflicts only if statistics are shared
"""

from collections.abc import Mapping

import numpy as np

# Robot's dx, dy, dz = these factors times the table's. Powers of two, so the inverse is exact.
CONVENTIONS: Mapping[str, tuple[float, float, float]] = {
    "standard": (1.0, 1.0, 1.0),
    "mirrored": (-1.0, -1.0, 1.0),
    "rescaled": (2.0, 2.0, 2.0),
}
# {embodiment: the environment settings of that robot}
ROBOTS: Mapping[str, Mapping[str, str | int | float | bool]] = {
    "tabletop": {},
    "tabletop_target": {},
    "tabletop_mirrored": {"action_convention": "mirrored"},
    "tabletop_rescaled": {"action_convention": "rescaled"},
    "tabletop_belt": {"control_hz": 10, "belt": 0.02},
    "tabletop_bare_goal": {"bare_goal_frame": True},
}


def to_robot(action: np.ndarray, convention: str) -> np.ndarray:
    """Convert an action [..., 7] from the table's convention to the robot's."""
    return _scale(action, np.array(CONVENTIONS[convention]))


def to_table(action: np.ndarray, convention: str) -> np.ndarray:
    """Convert an action [..., 7] from the robot's convention to metres along the table's axes."""
    return _scale(action, 1 / np.array(CONVENTIONS[convention]))


def _scale(action: np.ndarray, factors: np.ndarray) -> np.ndarray:
    scaled = action.copy()
    scaled[..., :3] *= factors.astype(scaled.dtype)
    return scaled
