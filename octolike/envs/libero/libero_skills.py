"""The experts' skills by task family, as generators of hand targets.

    pick and place   in(object, region), on(object, region or object)
    push             on(object, region), of an object that no grasp from above fits
    open             open(region), the region of a drawer; also before in(object, that region)
    turn             turnon(fixture), by its knob

`plan` works through a task's goals until all hold. A skill reads the scene again at every step, so
it recovers: an object that was missed, dropped or pushed away is approached again, with a grasp
other than the failed one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from octolike.envs.libero.libero_grasps import Grasp, find_grasps
from octolike.envs.libero.libero_scene import Scene

CLEARANCE = 0.05  # metres between a carried object and those below it
ROUNDS = 4  # attempts at a goal
_NEAR, _PATIENCE, _STALLED = 0.008, 60, 10  # metres; steps for a target; without progress
_CLOSE_STEPS, _OPEN_STEPS = 11, 8  # robosuite moves the command of the fingers in 8 steps
_SLIP = 0.03  # metres that an object may move in the hand
_PUSH_HEIGHT = 0.02
_BAR, _KNOB = (
    0.018,
    0.035,
)  # metres: the outermost part of a drawer is its handle, the top of a knob its grip
_TURN = 0.9  # radians; a stove is on from 0.5


class Target(NamedTuple):
    """A target of the hand.

    position: position of the fingertips [3]; rotation: of the hand [3, 3]; is_closed: whether the
    gripper closes; speed: largest action; is_delicate: with less noise, and no kicks.
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
    """Moves of the hand, and the state that several skills share."""

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

    def across(self, direction: np.ndarray) -> float:
        """Return the yaw at which the fingers close across a direction, within ± π/2."""
        angle = np.arctan2(direction[1], direction[0]) + np.pi / 2
        yaw = angle - np.arctan2(self.axis[1], self.axis[0])
        return float((yaw + np.pi / 2) % np.pi - np.pi / 2)

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
        """Yield a target until the hand is near it, or does not come nearer for some steps."""
        best, since = np.inf, 0
        for _ in range(_PATIENCE):
            here, turned = self.scene.hand()
            angle = np.arccos(np.clip((np.trace(rotation @ turned.T) - 1) / 2, -1, 1))
            distance = float(np.linalg.norm(position - here))
            if distance < near and angle < 0.12:
                return
            left = distance + 0.1 * float(angle)
            best, since = (left, 0) if left < best - 0.001 else (best, since + 1)
            if since > _STALLED:
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

        below: distance from the fingertips to the lowest point of the carried object.
        """
        obstacles = self.scene.others(*ignore)
        way = end[:2] - start[:2]
        share = np.clip((obstacles[:, :2] - start[:2]) @ way / max(way @ way, 1e-9), 0, 1)
        near = np.linalg.norm(obstacles[:, :2] - start[:2] - share[:, None] * way, axis=1) < 0.12
        top = float(obstacles[near, 2].max()) if near.any() else -np.inf
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
    """Return whether an object has kept its place in the hand since the fingers closed."""
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


def bring(hand: Hand, name: str, target: str) -> Iterator[Target]:
    """Bring an object into or onto another one, or a region, by grasping or by pushing it."""
    scene = hand.scene
    if is_drawer(scene, target) and not scene.holds(("open", target)):
        yield from open_drawer(hand, target)
    if find_grasps(scene.cloud(name), scene.others(name), hand.axis):
        yield from pick(hand, name)
        if is_held(hand, name):
            yield from place(hand, name, target)
    else:
        yield from push(hand, name, target)


def push(hand: Hand, name: str, target: str) -> Iterator[Target]:
    """Push an object along the table with closed fingers, from behind."""
    scene = hand.scene
    cloud, begin, end = scene.cloud(name), scene.position(name), scene.position(target)
    way = (end - begin)[:2]
    direction = np.append(way / max(float(np.linalg.norm(way)), 1e-6), 0.0)
    behind = -float(((cloud - begin) @ direction).min())
    height = float(cloud[:, 2].min()) + _PUSH_HEIGHT
    start = np.array([*(begin - direction * (behind + 0.035))[:2], height]) + hand.jitter(0.004)
    stop = np.array([*(end - direction * behind)[:2], height])
    yaw = hand.across(direction)
    rotation = hand.turned(yaw)
    here, _ = scene.hand()
    above = np.array([*start[:2], hand.over(here, start, 0.02)])
    yield from hand.go(np.array([*here[:2], above[2]]), rotation, True, near=0.03)
    yield from hand.go(above, rotation, True, near=0.02)
    yield from hand.go(start, rotation, True, near=0.012, speed=0.7)
    yield from hand.go(stop, rotation, True, near=0.01, speed=0.35, is_delicate=True)
    yield from hand.go(stop + (0, 0, 0.1), rotation, True, near=0.03)


def is_drawer(scene: Scene, name: str) -> bool:
    """Return whether a name is the region of a drawer."""
    return scene.is_region(name) and bool(scene.region_joints(name))


def open_drawer(hand: Hand, region: str) -> Iterator[Target]:
    """Pinch the handle of a drawer with the hand horizontal, and pull."""
    scene = hand.scene
    (joint, *_) = scene.region_joints(region)
    body, axis, _, value = scene.joint(joint)
    end = max(scene.joint_range(joint), key=abs)
    pull = axis * np.sign(end)
    cloud = scene.body_cloud(body)
    reach = cloud @ pull
    bar = cloud[reach > reach.max() - _BAR]
    centre = (bar.max(0) + bar.min(0)) / 2 + hand.jitter(0.003)
    down = hand.turned(hand.across(np.cross(pull, (0.0, 0.0, 1.0))))  # closes along the pull
    rotation = _tilt(pull) @ down
    before = centre + pull * 0.09
    here, _ = scene.hand()
    high = max(here[2], before[2] + 0.08)
    yield from hand.go(np.array([*here[:2], high]), down, False, near=0.03)
    yield from hand.go(np.array([*before[:2], high]), rotation, False, near=0.03)
    yield from hand.go(before, rotation, False, near=0.015)
    yield from hand.go(centre, rotation, False, near=0.008, speed=0.5, is_delicate=True)
    yield from hand.wait(centre, rotation, True, _CLOSE_STEPS)
    pulled = centre + pull * (abs(end - value) + 0.02)
    for _ in range(_PATIENCE):
        if scene.holds(("open", region)) or np.linalg.norm(scene.hand()[0] - pulled) < _NEAR:
            break
        yield Target(pulled, rotation, True, 0.6, True)
    here, _ = scene.hand()
    yield from hand.wait(here, rotation, False, _OPEN_STEPS)
    back = here + pull * 0.08
    yield from hand.go(back, rotation, False, near=0.03)
    yield from hand.go(back + (0, 0, 0.15), down, False, near=0.03)


def turn_on(hand: Hand, fixture: str) -> Iterator[Target]:
    """Grasp the knob of a fixture from above and turn it with the wrist."""
    scene = hand.scene
    joint = scene.fixture_joint(fixture)
    body, axis, anchor, value = scene.joint(joint)
    cloud = scene.body_cloud(body)
    knob = cloud[cloud[:, 2] > cloud[:, 2].max() - _KNOB]
    grasps = find_grasps(knob, scene.others(fixture), hand.axis, hand.failed)
    grasps = [g for g in grasps if not g.is_rim]
    if not grasps:
        return
    grasp = grasps[0]
    position = np.array([*anchor[:2], grasp.position[2]]) + hand.jitter(0.002)
    rotation = hand.turned(grasp.yaw)
    here, _ = scene.hand()
    above = position + (0, 0, 0.1)
    yield from hand.go(np.array([*here[:2], max(here[2], above[2])]), rotation, False, near=0.03)
    yield from hand.go(above, rotation, False, near=0.015)
    yield from hand.go(position, rotation, False, near=0.006, speed=0.6, is_delicate=True)
    yield from hand.wait(position, rotation, True, _CLOSE_STEPS)
    sense = float(np.sign(axis[2])) * (_TURN - value)
    for share in np.linspace(0, 1, 12):
        turned = hand.turned(grasp.yaw + sense * share)
        yield from hand.wait(position, turned, True, 2)
    yield from hand.wait(position, hand.turned(grasp.yaw + sense), True, 6)
    hand.failed.append(grasp)
    yield from hand.wait(position, hand.turned(grasp.yaw + sense), False, _OPEN_STEPS)
    yield from hand.go(above, hand.turned(grasp.yaw + sense), False, near=0.02)


def _tilt(pull: np.ndarray) -> np.ndarray:
    """Return the rotation that turns a hand from pointing down to pointing against `pull`."""
    x, y, z = np.cross((0.0, 0.0, -1.0), -pull)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + cross + cross @ cross


def _support(scene: Scene, name: str, target: str, spot: np.ndarray) -> float:
    """Return the height on which an object will stand: the top of the target's middle."""
    obstacles = scene.others(name)
    near = np.linalg.norm(obstacles[:, :2] - spot[:2], axis=1) < 0.03
    if near.any():
        return float(obstacles[near, 2].max())
    return float(spot[2])


def _vertical(rotation: np.ndarray) -> np.ndarray:
    z = np.array([0.0, 0.0, -1.0])
    x = rotation[:, 0] - z * (rotation[:, 0] @ z)
    x /= np.linalg.norm(x)
    return np.stack([x, np.cross(z, x), z], axis=1)


# By the predicate of a goal; arguments: the hand, then those of the predicate.
SKILLS: Mapping[str, Callable[..., Iterator[Target]]] = {
    "in": bring,
    "on": bring,
    "open": open_drawer,
    "turnon": turn_on,
}
