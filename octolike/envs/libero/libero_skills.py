"""The experts' skills by task family, as generators of hand targets.

    pick and place   in(object, region), on(object, region or object)

`plan` works through a task's goals until all hold. A skill reads the scene again at every step, so
it recovers: an object that was missed, dropped or pushed away is approached again, with a grasp
other than the failed one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from octolike.envs.libero.libero_grasps import Grasp, find_grasps
from octolike.envs.libero.libero_scene import Scene

CLEARANCE = 0.05  # metres between what is carried and what it passes over
ROUNDS = 4  # attempts at a goal
_NEAR, _PATIENCE = 0.008, 60  # metres; steps for one target
_CLOSE_STEPS, _OPEN_STEPS = 11, 8  # robosuite moves the command of the fingers in 8 steps
_SLIP = 0.03  # metres that an object may move in the hand


class Target(NamedTuple):
    """A target of the hand.

    position: of the fingertips [3]; rotation [3, 3]; is_closed: of the gripper; speed: largest
    action; is_delicate: with less noise, and no kicks.
    """

    position: np.ndarray
    rotation: np.ndarray
    is_closed: bool
    speed: float = 1.0
    is_delicate: bool = False


def plan(scene: Scene, rng: np.random.Generator, noise: float) -> Iterator[Target]:
    """Yield targets until the task's goals hold, or every attempt at one has failed."""
    hand = Hand(scene, rng, noise)
    for _ in range(ROUNDS):
        for goal in scene.goals:
            if not scene.holds(goal) and goal[0] in SKILLS:
                yield from SKILLS[goal[0]](hand, *goal[1:])
        if all(scene.holds(goal) for goal in scene.goals):
            return


class Hand:
    """Moves of the hand, and what several skills share."""

    def __init__(self, scene: Scene, rng: np.random.Generator, noise: float) -> None:
        self.scene, self.rng, self.noise = scene, rng, noise
        self.failed: list[Grasp] = []
        self.offsets: dict[str, np.ndarray] = {}  # of grasped objects from the hand
        self.axis = scene.finger_axis()
        _, rotation = scene.hand()
        # The initial pose, with the hand exactly vertical.
        z = np.array([0.0, 0.0, -1.0])
        x = rotation[:, 0] - z * (rotation[:, 0] @ z)
        x /= np.linalg.norm(x)
        self.down = np.stack([x, np.cross(z, x), z], axis=1)

    def turned(self, yaw: float) -> np.ndarray:
        """Return the rotation matrix of the vertical hand at a yaw from its initial pose."""
        cos, sin = np.cos(yaw), np.sin(yaw)
        return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) @ self.down

    def jitter(self, scale: float) -> np.ndarray:
        """Return a random offset [3] of standard deviation `scale` (metres) at noise 1."""
        return self.rng.normal(scale=scale * self.noise, size=3)

    def go(
        self,
        position: np.ndarray,
        rotation: np.ndarray,
        is_closed: bool,
        near: float = _NEAR,
        speed: float = 1.0,
        is_delicate: bool = False,
    ) -> Iterator[Target]:
        """Yield a target until the hand is near it, or for some time."""
        for _ in range(_PATIENCE):
            here, turned = self.scene.hand()
            angle = np.arccos(np.clip((np.trace(rotation @ turned.T) - 1) / 2, -1, 1))
            if np.linalg.norm(position - here) < near and angle < 0.12:
                return
            yield Target(position, rotation, is_closed, speed, is_delicate)

    def wait(
        self, position: np.ndarray, rotation: np.ndarray, is_closed: bool, steps: int
    ) -> Iterator[Target]:
        """Yield a target for a number of steps, in which the fingers move."""
        for _ in range(steps):
            yield Target(position, rotation, is_closed, is_delicate=True)

    def over(self, start: np.ndarray, end: np.ndarray, below: float, *ignore: str) -> float:
        """Return a height of the hand at which it clears everything on its way.

        below: how far that which it carries reaches below the fingertips.
        """
        others = self.scene.others(*ignore)
        way = end[:2] - start[:2]
        share = np.clip((others[:, :2] - start[:2]) @ way / max(way @ way, 1e-9), 0, 1)
        near = np.linalg.norm(others[:, :2] - start[:2] - share[:, None] * way, axis=1) < 0.12
        top = float(others[near, 2].max()) if near.any() else -np.inf
        return max(top + below + CLEARANCE, start[2], end[2])


def pick(hand: Hand, name: str) -> Iterator[Target]:
    """Grasp an object from above and lift it."""
    scene = hand.scene
    grasps = find_grasps(scene.cloud(name), scene.others(name), hand.axis, hand.failed)
    if not grasps:
        return
    grasp = grasps[0]
    rotation, begin = hand.turned(grasp.yaw), scene.position(name)
    position = grasp.position + hand.jitter(0.003) * (1, 1, 0)
    above = position + (0, 0, 0.09)
    here, _ = scene.hand()
    height = hand.over(here, above, 0.02, name)
    if np.linalg.norm(here[:2] - above[:2]) > 0.04:
        if here[2] < height - 0.03:
            yield from hand.go(np.array([*here[:2], height]), rotation, False, near=0.03)
        yield from hand.go(
            np.array([*above[:2], height]) + hand.jitter(0.01), rotation, False, near=0.02
        )
    yield from hand.go(above, rotation, False, near=0.012)
    moved = scene.position(name) - begin
    if np.linalg.norm(moved[:2]) > 0.008:
        return  # pushed on the way: look again
    yield from hand.go(position, rotation, False, near=0.005, speed=0.6, is_delicate=True)
    yield from hand.wait(position, rotation, True, _CLOSE_STEPS)
    hand.offsets[name] = scene.position(name) - scene.hand()[0]
    lifted = position + (0, 0, 0.07)
    yield from hand.go(lifted, rotation, True, near=0.02, speed=0.8, is_delicate=True)
    if not is_held(hand, name):
        hand.failed.append(grasp)
        del hand.offsets[name]
        yield from hand.wait(lifted, rotation, False, _OPEN_STEPS)


def is_held(hand: Hand, name: str) -> bool:
    """Return whether an object is where it was in the hand when the fingers closed."""
    if name not in hand.offsets:
        return False
    offset = hand.scene.position(name) - hand.scene.hand()[0]
    return bool(np.linalg.norm(offset - hand.offsets[name]) < _SLIP)


def place(hand: Hand, name: str, target: str) -> Iterator[Target]:
    """Carry a held object to a region or another object, and release it."""
    scene = hand.scene
    here, rotation = scene.hand()
    rotation = _vertical(rotation)
    cloud, begin = scene.cloud(name), scene.position(name)
    below = here[2] - cloud[:, 2].min()
    spot = scene.position(target)
    offset = here - begin
    support = _support(scene, name, target, spot)
    goal = np.array([*(spot + offset)[:2], support + below + 0.012])
    height = hand.over(here, goal, below, name)
    yield from hand.go(np.array([*here[:2], height]), rotation, True, near=0.025)
    if not is_held(hand, name):
        return
    above = np.array([*goal[:2], height])
    yield from hand.go(above + hand.jitter(0.008), rotation, True, near=0.02)
    if not is_held(hand, name):
        return
    goal[:2] = (scene.position(target) + scene.hand()[0] - scene.position(name))[:2]
    yield from hand.go(goal, rotation, True, near=0.01, speed=0.6, is_delicate=True)
    del hand.offsets[name]
    yield from hand.wait(goal, rotation, False, _OPEN_STEPS)
    yield from hand.go(goal + (0, 0, 0.1), rotation, False, near=0.02)


def pick_and_place(hand: Hand, name: str, target: str) -> Iterator[Target]:
    """Bring an object into or onto another one, or a region."""
    yield from pick(hand, name)
    if is_held(hand, name):
        yield from place(hand, name, target)


def _support(scene: Scene, name: str, target: str, spot: np.ndarray) -> float:
    """Return the height on which an object will stand: the top of the target's middle."""
    others = scene.others(name)
    near = np.linalg.norm(others[:, :2] - spot[:2], axis=1) < 0.03
    if near.any():
        return float(others[near, 2].max())
    return float(spot[2])


def _vertical(rotation: np.ndarray) -> np.ndarray:
    z = np.array([0.0, 0.0, -1.0])
    x = rotation[:, 0] - z * (rotation[:, 0] @ z)
    x /= np.linalg.norm(x)
    return np.stack([x, np.cross(z, x), z], axis=1)


SKILLS = {"in": pick_and_place, "on": pick_and_place}
