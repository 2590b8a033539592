"""Scripted experts for the two arms, their demonstrations, and how a finished task looks.

An expert is a list of poses for both hands with the time of each. The path between them is straight
in space; inverse kinematics turns it into joint targets, so that what is recorded is what is
executed, and a recorded demonstration is its own replay. (The benchmark's own way, a body that
drags the hand by a weld, needs a replay in joint space afterwards: the hand trails that body.)

The joints are braked, so they trail their targets too, the waist by a tenth of a second. The
targets therefore lead the path by `LEAD` of each joint.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from octolike.envs import environment
from octolike.envs.aloha.aloha_env import CONTROL_HZ, STEP_LIMIT, AlohaEnv, AlohaScene

DEVIATION = 0.02  # radians that executed targets are off, per unit of noise
WANDER = 0.01  # metres that the meeting place is off, per unit of noise
GRASP = np.array([0.14, 0.0, 0.0])  # between the fingertips, in the hand's frame (metres)
# Seconds that each joint trails its target: measured over a transfer; grippers are not led.
LEAD = np.tile([0.1, 0.03, 0.03, 0.02, 0.03, 0.02, 0.0], 2)
OPEN, SHUT = 1.0, 0.0
_DAMPING = 1e-4
_ITERATIONS = 4  # of inverse kinematics at each step, from the last step's solution


class Pose(NamedTuple):
    """Where the fingertips are to be, and how.

    position: metres; pitch (down), roll: turns about the hand's own axes, radians; opening: [0, 1].
    """

    position: np.ndarray
    pitch: float
    roll: float
    opening: float


class Waypoint(NamedTuple):
    """When (steps) both hands are to be where."""

    step: int
    left: Pose
    right: Pose


def collect_episode(
    env: AlohaEnv, seed: int, split: str, skills: Sequence[str], noise: float
) -> dict[str, Any]:
    """Record one demonstration; the caller drops those whose `success` is False.

    The label `action` is the expert's target; `executed_action` is that plus noise of the joints,
    not of the grippers.

    Returns what `environment.recorded` makes.
    """
    observation, info = env.reset(seed=seed, options={"split": split, "skills": list(skills)})
    rng = np.random.default_rng([seed, 1])
    targets = plan(env.stage, info["skill"], rng.uniform(-WANDER, WANDER, 3) * noise)
    arm = np.tile([1.0] * 6 + [0.0], 2)
    observations, executed = [], []
    for target in targets:
        observations.append(observation)
        jolt = rng.normal(scale=DEVIATION * noise, size=14) * arm
        executed.append((target + jolt).astype(np.float32))
        observation, _, terminated, truncated, info = env.step(executed[-1])
        if terminated or truncated:
            break
    labels = targets[: len(executed)].astype(np.float32)
    return environment.recorded(observations, labels, executed, info, seed=seed, split=split)


def goal(env: Any, seed: int, options: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the camera's picture, uint8 [h, w, 3], at the end of the expert's own episode.

    The environment is left at that end: reset it before the policy's turn.
    """
    episode = collect_episode(env.unwrapped, seed, options["split"], options["skills"], 0.0)
    return environment.last_pictures(episode)


def plan(stage: AlohaScene, skill: str, wander: np.ndarray) -> np.ndarray:
    """Return joint targets for the whole episode, float64 [STEP_LIMIT, 14].

    wander: added to where the hands meet, metres [3].
    """
    arms = [_Arm(stage, "left"), _Arm(stage, "right")]
    start = Waypoint(0, *(arm.pose() for arm in arms))
    ways = [start, *WAYPOINTS[skill](start, stage.things(), wander)]
    path = np.zeros((STEP_LIMIT + 1, 14))
    for t in range(STEP_LIMIT + 1):
        poses = _between(ways, t)
        path[t] = np.concatenate([arm.reach(pose) for arm, pose in zip(arms, poses)])
    speed = np.gradient(path, axis=0) * CONTROL_HZ
    return (path + LEAD * speed)[1:]


def transfer_cube(start: Waypoint, things: np.ndarray, wander: np.ndarray) -> list[Waypoint]:
    """The right hand picks the cube up and holds it out; the left one takes it from the side."""
    cube = things[0] * (1, 1, 0) + (0, 0, 0.035)
    meet = np.array([0.0, 0.5, 0.25]) + wander
    right = lambda place, opening: Pose(np.asarray(place), 1.0, 0.0, opening)
    left = lambda place, opening: Pose(np.asarray(place), 0.0, np.pi / 2, opening)
    side, hold = meet + (-0.12, 0, -0.005), meet + (-0.005, 0, -0.005)
    return [
        Waypoint(60, start.left, right(cube + (0, 0, 0.08), OPEN)),
        Waypoint(85, left(side, OPEN), right(cube, OPEN)),
        Waypoint(95, left(side, OPEN), right(cube, OPEN)),
        Waypoint(110, left(side, OPEN), right(cube, SHUT)),
        Waypoint(170, left(side, OPEN), right(meet, SHUT)),
        Waypoint(185, left(side, OPEN), right(meet, SHUT)),
        Waypoint(220, left(hold, OPEN), right(meet, SHUT)),
        Waypoint(240, left(hold, SHUT), right(meet, SHUT)),
        Waypoint(255, left(hold, SHUT), right(meet, OPEN)),
        Waypoint(STEP_LIMIT, left(side, SHUT), right(meet + (0.1, 0, 0.05), OPEN)),
    ]


def insertion(start: Waypoint, things: np.ndarray, wander: np.ndarray) -> list[Waypoint]:
    """Each hand picks one thing up by its outer end; then the peg is pushed into the socket."""
    grip = np.array([0.03, 0, 0])  # from the middle of a thing towards its hand
    peg = things[0] * (1, 1, 0) + (0, 0, 0.024) + grip
    socket = things[1] * (1, 1, 0) + (0, 0, 0.03) - grip
    meet = np.array([0.0, 0.5, 0.2]) + wander
    # Both are held at the height above their middle at which they were grasped.
    peg_at = lambda x: meet + (x, 0, 0.014) + grip
    socket_at = meet + (-0.07, 0, 0.008) - grip
    hand = lambda place, opening: Pose(np.asarray(place), 1.35, 0.0, opening)
    above = np.array([0, 0, 0.08])
    return [
        Waypoint(60, hand(socket + above, OPEN), hand(peg + above, OPEN)),
        Waypoint(85, hand(socket, OPEN), hand(peg, OPEN)),
        Waypoint(95, hand(socket, OPEN), hand(peg, OPEN)),
        Waypoint(110, hand(socket, SHUT), hand(peg, SHUT)),
        Waypoint(170, hand(socket_at, SHUT), hand(peg_at(0.10), SHUT)),
        Waypoint(200, hand(socket_at, SHUT), hand(peg_at(0.10), SHUT)),
        Waypoint(260, hand(socket_at, SHUT), hand(peg_at(-0.01), SHUT)),
        Waypoint(STEP_LIMIT, hand(socket_at, SHUT), hand(peg_at(-0.03), SHUT)),
    ]


WAYPOINTS = {"transfer_cube": transfer_cube, "insertion": insertion}


class _Arm:
    """Kinematics of one arm on a scratch copy of the scene."""

    def __init__(self, stage: AlohaScene, name: str) -> None:
        self._mujoco, self._model = stage.mujoco, stage.model
        self._data = stage.mujoco.MjData(stage.model)
        self._data.qpos[:] = stage.data.qpos
        self._first = 0 if name == "left" else 8
        self._base = np.diag([1.0, 1.0, 1.0]) if name == "left" else np.diag([-1.0, -1.0, 1.0])
        self._body = stage.model.body(f"vx300s_{name}/gripper_link").id
        self._opening = stage.joints()[6 if name == "left" else 13]
        self._range = stage.model.jnt_range[self._first : self._first + 6]

    def pose(self) -> Pose:
        """Return where the fingertips are."""
        self._mujoco.mj_kinematics(self._model, self._data)
        position, turn = self._tips()
        return Pose(position, -np.arcsin(turn[2, 0]), 0.0, self._opening)

    def reach(self, pose: Pose) -> np.ndarray:
        """Return six joints that bring the fingertips there, and the opening: float64 [7]."""
        q, mujoco = slice(self._first, self._first + 6), self._mujoco
        wanted = self._base @ _turn(1, pose.pitch) @ _turn(0, pose.roll)
        jacobian = np.zeros((6, self._model.nv))
        for _ in range(_ITERATIONS):
            mujoco.mj_kinematics(self._model, self._data)
            mujoco.mj_comPos(self._model, self._data)
            at, turn = self._tips()
            off = sum(np.cross(turn[:, i], wanted[:, i]) for i in range(3)) / 2
            error = np.concatenate([pose.position - at, off])
            mujoco.mj_jac(self._model, self._data, jacobian[:3], jacobian[3:], at, self._body)
            j = jacobian[:, q]
            step = j.T @ np.linalg.solve(j @ j.T + _DAMPING * np.eye(6), error)
            self._data.qpos[q] = np.clip(self._data.qpos[q] + step, *self._range.T)
        return np.append(self._data.qpos[q], pose.opening)

    def _tips(self) -> tuple[np.ndarray, np.ndarray]:
        turn = self._data.xmat[self._body].reshape(3, 3)
        return self._data.xpos[self._body] + turn @ GRASP, turn


def _turn(axis: int, angle: float) -> np.ndarray:
    """Return the rotation about a coordinate axis, [3, 3]."""
    c, s = np.cos(angle), np.sin(angle)
    matrix = np.eye(3)
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = c, -s, s, c
    return matrix


def _between(ways: Sequence[Waypoint], step: int) -> tuple[Pose, Pose]:
    """Return both hands' poses at a step: straight between waypoints, slow at both ends."""
    for a, b in itertools.pairwise(ways):
        if step <= b.step:
            share = (step - a.step) / (b.step - a.step)
            share = share * share * (3 - 2 * share)
            return _mix(a.left, b.left, share), _mix(a.right, b.right, share)
    return ways[-1].left, ways[-1].right


def _mix(a: Pose, b: Pose, share: float) -> Pose:
    return Pose(*(p + share * (q - p) for p, q in zip(a, b)))
