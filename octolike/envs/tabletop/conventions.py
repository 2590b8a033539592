"""How a robot of the table writes its moves down: the same table, another meaning of the numbers.

Two robots whose conventions differ are in conflict on purpose: what one must do in a scene is wrong
for the other, and nothing in the scene says which one it is. That is what remedies of negative
transfer are tried on (configs/conflict.py).

    standard   dx, dy, dz in metres along the table's axes
    mirrored   x and y point the other way, as of a robot on the table's other side
    rescaled   half metres: every number is twice as large. Statistics of the robot's own undo this
               one, so it conflicts only where they are shared
"""

from collections.abc import Mapping

import numpy as np

# What the table's dx, dy, dz are multiplied by to give the robot's. Powers of two: nothing is lost.
CONVENTIONS: Mapping[str, tuple[float, float, float]] = {
    "standard": (1.0, 1.0, 1.0),
    "mirrored": (-1.0, -1.0, 1.0),
    "rescaled": (2.0, 2.0, 2.0),
}
# Robots by the name of their embodiment: the fields of the environment that make it that robot.
ROBOTS: Mapping[str, Mapping[str, str]] = {
    "tabletop": {},
    "tabletop_target": {},
    "tabletop_mirrored": {"action_convention": "mirrored"},
    "tabletop_rescaled": {"action_convention": "rescaled"},
}


def to_robot(action: np.ndarray, convention: str) -> np.ndarray:
    """Return an action [..., 7] in the robot's numbers, from the table's."""
    return _scaled(action, np.array(CONVENTIONS[convention]))


def to_table(action: np.ndarray, convention: str) -> np.ndarray:
    """Return an action [..., 7] along the table's axes in metres: the inverse of `to_robot`."""
    return _scaled(action, 1 / np.array(CONVENTIONS[convention]))


def _scaled(action: np.ndarray, factors: np.ndarray) -> np.ndarray:
    out = action.copy()
    out[..., :3] *= factors.astype(out.dtype)
    return out
