"""The robots of the table: action conventions, another gripper, another look, a conveyor belt.

Two robots with different conventions conflict on purpose: the right action of one is wrong for the
other, and nothing in the image shows which robot it is. Remedies for negative transfer are tested
on such pairs (configs/experiments/conflict.py).

    standard   dx, dy, dz in metres along the table's axes; gripper 1 = open
    mirrored   x and y reversed, as for a robot on the opposite side of the table
    rescaled   in half metres: every number is twice as large. Per-robot statistics undo this, so
               it conflicts only if statistics are shared
    inverted   gripper 1 = closed

Two more robots have the standard convention. Their images show the difference:

    turned     the gripper and its camera are mounted a quarter turn about the vertical axis: the
               fingers enclose an object from other sides, and the wrist image is turned
    repainted  another colour of the table and the gripper, in dimmer and warmer light
"""

from collections.abc import Mapping

import numpy as np

# Robot's dx, dy, dz = these factors times the table's, and its gripper's number is the table's or
# its complement to 1 (factor -1). Powers of two, so the inverse is exact.
CONVENTIONS: Mapping[str, tuple[float, float, float, float]] = {
    "standard": (1.0, 1.0, 1.0, 1.0),
    "mirrored": (-1.0, -1.0, 1.0, 1.0),
    "rescaled": (2.0, 2.0, 2.0, 1.0),
    "inverted": (1.0, 1.0, 1.0, -1.0),
}
# {embodiment: the environment settings of that robot}
ROBOTS: Mapping[str, Mapping[str, str | int | float | bool]] = {
    "tabletop": {},
    "tabletop_target": {},
    "tabletop_mirrored": {"action_convention": "mirrored"},
    "tabletop_rescaled": {"action_convention": "rescaled"},
    "tabletop_inverted": {"action_convention": "inverted"},
    "tabletop_turned": {"gripper": "turned"},
    "tabletop_repainted": {"look": "repainted"},
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
    scaled[..., :3] *= factors[:3].astype(scaled.dtype)
    if factors[3] < 0:
        scaled[..., 6] = 1 - scaled[..., 6]
    return scaled
