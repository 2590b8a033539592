"""A LIBERO scene for an expert: clouds of points of the collision boxes, and the hand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

HAND = "gripper0_grip_site"  # between the fingertips
_PADS = ("gripper0_finger1_pad_collision", "gripper0_finger2_pad_collision")
_GRID = np.stack(np.meshgrid(*[np.linspace(-1, 1, 5)] * 3), -1).reshape(-1, 3)
_BOX = 6  # mjGEOM_BOX: all collision shapes of LIBERO's objects are boxes


class Scene:
    """The present state of a simulation; lengths in metres, world coordinates."""

    def __init__(self, env: Any) -> None:
        self.env = env
        self.model, self.data = env.sim.model._model, env.sim.data._data
        roots = {env.obj_body_id[name]: name for name in self.names}
        self._owner = [self._root(body, roots) for body in range(self.model.nbody)]

    @property
    def names(self) -> list[str]:
        """Return the names of objects and fixtures."""
        return [n for n in (*self.env.objects_dict, *self.env.fixtures_dict) if self._has_body(n)]

    @property
    def goals(self) -> list[tuple[str, ...]]:
        """Return the predicates of the goal: ("in", object, region), ("open", region), …"""
        return [tuple(state) for state in self.env.parsed_problem["goal_state"]]

    def holds(self, goal: tuple[str, ...]) -> bool:
        """Return whether a predicate is true."""
        return bool(self.env._eval_predicate(list(goal)))

    def position(self, name: str) -> np.ndarray:
        """Return the position of an object, a fixture or a region [3]."""
        if name in self.env.object_sites_dict:
            return np.array(self.env.sim.data.get_site_xpos(name))
        return self.data.xpos[self.env.obj_body_id[name]].copy()

    def is_region(self, name: str) -> bool:
        """Return whether a name is a region's."""
        return name in self.env.object_sites_dict

    def owner(self, name: str) -> str:
        """Return the object or fixture of a region; other names are returned as they are."""
        return self.env.object_sites_dict[name].parent_name if self.is_region(name) else name

    def cloud(self, name: str) -> np.ndarray:
        """Return points [n, 3] on and in the collision boxes of an object or fixture."""
        return self._points(g for g in self._boxes() if self._owner[self._body(g)] == name)

    def body_cloud(self, body: int) -> np.ndarray:
        """Return points [n, 3] of the collision boxes of one body, such as a drawer."""
        return self._points(g for g in self._boxes() if self._body(g) == body)

    def others(self, *names: str) -> np.ndarray:
        """Return points [n, 3] of all objects and fixtures but those named."""
        return self._points(
            g for g in self._boxes() if self._owner[self._body(g)] not in (*names, "")
        )

    def joint(self, name: str) -> tuple[int, np.ndarray, np.ndarray, float]:
        """Return (body, axis [3], anchor [3], value) of a joint."""
        number = self.model.joint(name).id
        value = float(self.data.qpos[self.model.jnt_qposadr[number]])
        body = int(self.model.jnt_bodyid[number])
        return body, self.data.xaxis[number].copy(), self.data.xanchor[number].copy(), value

    def joint_range(self, name: str) -> tuple[float, float]:
        """Return the limits of a joint."""
        low, high = self.model.jnt_range[self.model.joint(name).id]
        return float(low), float(high)

    def region_joints(self, region: str) -> list[str]:
        """Return the joints that open a region; [] of one that cannot be opened."""
        return list(self.env.object_sites_dict[region].joints or ())

    def fixture_joint(self, fixture: str) -> str:
        """Return the joint of a fixture that has one."""
        return str(self.env.get_object(fixture).joints[0])

    def hand(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the hand's position [3] and rotation matrix [3, 3]."""
        site = self.model.site(HAND).id
        return self.data.site_xpos[site].copy(), self.data.site_xmat[site].reshape(3, 3).copy()

    def finger_axis(self) -> np.ndarray:
        """Return the unit vector from one finger to the other."""
        pads = [self.data.geom_xpos[self.model.geom(name).id] for name in _PADS]
        return (pads[0] - pads[1]) / max(float(np.linalg.norm(pads[0] - pads[1])), 1e-6)

    def opening(self) -> float:
        """Return the distance of the fingers, 0 to 0.08."""
        fingers = self.env.robots[0]._ref_gripper_joint_pos_indexes
        return float(np.abs(self.data.qpos[fingers]).sum())

    def joints(self) -> np.ndarray:
        """Return the angles of the arm's joints, float32 [7] (radians)."""
        return self.data.qpos[self.env.robots[0]._ref_joint_pos_indexes].astype(np.float32)

    def _points(self, geoms: Iterable[int]) -> np.ndarray:
        parts = [
            self.data.geom_xpos[g]
            + (_GRID * self.model.geom_size[g]) @ self.data.geom_xmat[g].reshape(3, 3).T
            for g in geoms
        ]
        return np.concatenate(parts) if parts else np.zeros((0, 3))

    def _boxes(self) -> list[int]:
        model = self.model
        solid = (model.geom_contype > 0) | (model.geom_conaffinity > 0)
        return np.flatnonzero(solid & (model.geom_type == _BOX)).tolist()

    def _body(self, geom: int) -> int:
        return int(self.model.geom_bodyid[geom])

    def _has_body(self, name: str) -> bool:
        return name in self.env.obj_body_id and name not in ("main_table", "floor")

    def _root(self, body: int, roots: dict[int, str]) -> str:
        while body and body not in roots:
            body = int(self.model.body_parentid[body])
        return roots.get(body, "")
