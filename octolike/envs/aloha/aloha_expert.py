"""Scripted experts for the two arms, their demonstrations, and goal images.

An expert is a list of timed poses for both hands. The path between two poses is straight in space;
inverse kinematics converts it to joint targets. The recorded actions are the executed ones, so a
recorded demonstration replays exactly. (The benchmark's expert drags the hand by a weld to a body;
the hand lags behind, so its demonstrations need a second pass in joint space.)

The joints are damped, so they lag behind their targets too, the waist by 0.1 s. The targets
therefore lead the path by each joint's `LEAD`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from octolike.envs.aloha.aloha_env import CONTROL_HZ, STEP_LIMIT, AlohaEnv, AlohaScene
from octolike.envs.environment import demonstration_record, last_images

DEVIATION = 0.02  # standard deviation of executed joint targets, radians per unit of noise
MEETING_OFFSET = 0.01  # largest offset of the hands' meeting point, metres per unit of noise
GRASP = np.array([0.14, 0.0, 0.0])  # point between the fingertips in the hand's frame (metres)
# Seconds by which each joint lags behind its target, measured during a transfer; 0 for grippers.
LEAD = np.tile([0.1, 0.03, 0.03, 0.02, 0.03, 0.02, 0.0], 2)
OPEN, CLOSED = 1.0, 0.0
# Per skill: the step from which noise is multiplied by the second number. An insertion has a play
# of 8 mm on each side, and no feedback: with the full noise the peg hits the socket's edge.
PRECISION = {"transfer_cube": (STEP_LIMIT, 1.0), "insertion": (70, 0.1)}
_DAMPING = 1e-4
_ITERATIONS = 4  # of inverse kinematics per step, starting from the previous solution


class Pose(NamedTuple):
    """Target pose of one hand.

    position: position of the fingertips, metres; pitch (down), roll: angles about the hand's axes,
    radians; opening: in [0, 1].
    """

    position: np.ndarray
    pitch: float
    roll: float
    opening: float


class Waypoint(NamedTuple):
    """The poses of both hands at a step."""

    step: int
    left: Pose
    right: Pose


def collect_episode(
    env: AlohaEnv, seed: int, split: str, skills: Sequence[str], noise: float
) -> dict[str, Any]:
    """Record one demonstration; the caller drops those with `success` False.

    The label `action` is the expert's target; `executed_action` is the label plus noise on the
    joints, not on the grippers.

    Returns:
        The episode dict of `demonstration_record`.
    """
    observation, info = env.reset(seed=seed, options={"split": split, "skills": list(skills)})
    rng = np.random.default_rng([seed, 1])
    offset = rng.uniform(-MEETING_OFFSET, MEETING_OFFSET, 3) * noise
    targets = plan_targets(env.scene, info["skill"], offset)
    is_joint = np.tile([1.0] * 6 + [0.0], 2)
    grasped, share = PRECISION[info["skill"]]
    observations, executed = [], []
    for step, target in enumerate(targets):
        observations.append(observation)
        scale = DEVIATION * noise * (share if step >= grasped else 1)
        deviation = rng.normal(scale=scale, size=14) * is_joint
        executed.append((target + deviation).astype(np.float32))
        observation, _, terminated, truncated, info = env.step(executed[-1])
        if terminated or truncated:
            break
    labels = targets[: len(executed)].astype(np.float32)
    return demonstration_record(observations, list(labels), executed, info, seed=seed, split=split)


def goal(env: Any, seed: int, options: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the camera's image, uint8 [h, w, 3], at the end of the expert's episode.

    The environment stays in that state: reset it before the policy's episode.
    """
    episode = collect_episode(env.unwrapped, seed, options["split"], options["skills"], 0.0)
    return last_images(episode)


def plan_targets(scene: AlohaScene, skill: str, offset: np.ndarray) -> np.ndarray:
    """Return the joint targets of an episode, float64 [STEP_LIMIT, 14].

    offset: offset of the hands' meeting point, metres [3].
    """
    arms = [_ArmKinematics(scene, "left"), _ArmKinematics(scene, "right")]
    start = Waypoint(0, *(arm.pose() for arm in arms))
    waypoints = [start, *WAYPOINTS[skill](start, scene.object_positions(), offset)]
    path = np.zeros((STEP_LIMIT + 1, 14))
    for t in range(STEP_LIMIT + 1):
        poses = _interpolate(waypoints, t)
        path[t] = np.concatenate([arm.reach(pose) for arm, pose in zip(arms, poses)])
    speed = np.gradient(path, axis=0) * CONTROL_HZ
    return (path + LEAD * speed)[1:]


def transfer_cube(start: Waypoint, objects: np.ndarray, offset: np.ndarray) -> list[Waypoint]:
    """Return the waypoints: the right hand lifts the cube, the left one takes it from the side."""
    cube = objects[0] * (1, 1, 0) + (0, 0, 0.035)
    meet = np.array([0.0, 0.5, 0.25]) + offset

    def left(position: np.ndarray, opening: float) -> Pose:
        return Pose(position, 0.0, np.pi / 2, opening)

    def right(position: np.ndarray, opening: float) -> Pose:
        return Pose(position, 1.0, 0.0, opening)

    side, hold = meet + (-0.12, 0, -0.005), meet + (-0.005, 0, -0.005)
    return [
        Waypoint(60, start.left, right(cube + (0, 0, 0.08), OPEN)),
        Waypoint(85, left(side, OPEN), right(cube, OPEN)),
        Waypoint(95, left(side, OPEN), right(cube, OPEN)),
        Waypoint(110, left(side, OPEN), right(cube, CLOSED)),
        Waypoint(170, left(side, OPEN), right(meet, CLOSED)),
        Waypoint(185, left(side, OPEN), right(meet, CLOSED)),
        Waypoint(220, left(hold, OPEN), right(meet, CLOSED)),
        Waypoint(240, left(hold, CLOSED), right(meet, CLOSED)),
        Waypoint(255, left(hold, CLOSED), right(meet, OPEN)),
        Waypoint(STEP_LIMIT, left(side, CLOSED), right(meet + (0.1, 0, 0.05), OPEN)),
    ]


def insertion(start: Waypoint, objects: np.ndarray, offset: np.ndarray) -> list[Waypoint]:
    """Return the waypoints: each hand lifts an object by its outer end, then peg into socket."""
    grip = np.array([0.03, 0, 0])  # from the middle of an object towards its hand
    peg = objects[0] * (1, 1, 0) + (0, 0, 0.024) + grip
    socket = objects[1] * (1, 1, 0) + (0, 0, 0.03) - grip
    meet = np.array([0.0, 0.5, 0.2]) + offset

    # The heights are those of the grasps above the objects' middle.
    def peg_at(x: float) -> np.ndarray:
        return meet + (x, 0, 0.014) + grip

    def hand(position: np.ndarray, opening: float) -> Pose:
        return Pose(position, 1.35, 0.0, opening)

    socket_at = meet + (-0.07, 0, 0.008) - grip
    above = np.array([0, 0, 0.08])
    return [
        Waypoint(60, hand(socket + above, OPEN), hand(peg + above, OPEN)),
        Waypoint(85, hand(socket, OPEN), hand(peg, OPEN)),
        Waypoint(95, hand(socket, OPEN), hand(peg, OPEN)),
        Waypoint(110, hand(socket, CLOSED), hand(peg, CLOSED)),
        Waypoint(170, hand(socket_at, CLOSED), hand(peg_at(0.10), CLOSED)),
        Waypoint(200, hand(socket_at, CLOSED), hand(peg_at(0.10), CLOSED)),
        Waypoint(260, hand(socket_at, CLOSED), hand(peg_at(-0.01), CLOSED)),
        Waypoint(STEP_LIMIT, hand(socket_at, CLOSED), hand(peg_at(-0.03), CLOSED)),
    ]


WAYPOINTS = {"transfer_cube": transfer_cube, "insertion": insertion}


class _ArmKinematics:
    """Forward and inverse kinematics of one arm on a copy of the scene's state."""

    def __init__(self, scene: AlohaScene, name: str) -> None:
        self._mujoco, self._model = scene.mujoco, scene.model
        self._data = scene.mujoco.MjData(scene.model)
        self._data.qpos[:] = scene.data.qpos
        self._first = 0 if name == "left" else 8
        self._base = np.diag([1.0, 1.0, 1.0]) if name == "left" else np.diag([-1.0, -1.0, 1.0])
        self._body = scene.model.body(f"vx300s_{name}/gripper_link").id
        self._opening = scene.joints()[6 if name == "left" else 13]
        self._range = scene.model.jnt_range[self._first : self._first + 6]

    def pose(self) -> Pose:
        """Return the present pose of the hand."""
        self._mujoco.mj_kinematics(self._model, self._data)
        position, rotation = self._fingertips()
        return Pose(position, -np.arcsin(rotation[2, 0]), 0.0, self._opening)

    def reach(self, pose: Pose) -> np.ndarray:
        """Return the six joints that reach a pose, and its opening: float64 [7]."""
        q, mujoco = slice(self._first, self._first + 6), self._mujoco
        target = self._base @ _rotation(1, pose.pitch) @ _rotation(0, pose.roll)
        jacobian = np.zeros((6, self._model.nv))
        for _ in range(_ITERATIONS):
            mujoco.mj_kinematics(self._model, self._data)
            mujoco.mj_comPos(self._model, self._data)
            position, rotation = self._fingertips()
            angles = sum(np.cross(rotation[:, i], target[:, i]) for i in range(3)) / 2
            error = np.concatenate([pose.position - position, angles])
            mujoco.mj_jac(self._model, self._data, jacobian[:3], jacobian[3:], position, self._body)
            j = jacobian[:, q]
            step = j.T @ np.linalg.solve(j @ j.T + _DAMPING * np.eye(6), error)
            self._data.qpos[q] = np.clip(self._data.qpos[q] + step, *self._range.T)
        return np.append(self._data.qpos[q], pose.opening)

    def _fingertips(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the point between the fingertips, [3], and the hand's rotation, [3, 3]."""
        rotation = self._data.xmat[self._body].reshape(3, 3)
        return self._data.xpos[self._body] + rotation @ GRASP, rotation


def _rotation(axis: int, angle: float) -> np.ndarray:
    """Return the rotation about a coordinate axis, [3, 3]."""
    c, s = np.cos(angle), np.sin(angle)
    matrix = np.eye(3)
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = c, -s, s, c
    return matrix


def _interpolate(waypoints: Sequence[Waypoint], step: int) -> tuple[Pose, Pose]:
    """Return both hands' poses at a step: straight lines with smooth acceleration."""
    for a, b in itertools.pairwise(waypoints):
        if step <= b.step:
            fraction = (step - a.step) / (b.step - a.step)
            fraction = fraction * fraction * (3 - 2 * fraction)
            return _blend(a.left, b.left, fraction), _blend(a.right, b.right, fraction)
    return waypoints[-1].left, waypoints[-1].right


def _blend(a: Pose, b: Pose, fraction: float) -> Pose:
    pairs: Iterable[tuple[Any, Any]] = zip(a, b)
    return Pose(*(p + fraction * (q - p) for p, q in pairs))
