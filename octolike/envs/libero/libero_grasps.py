"""Grasps from above, chosen from the points of an object and of its surroundings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MAX_WIDTH = 0.072  # metres; the hand opens to 0.08
_BAND = 0.02  # height of the slice of an object that the fingers close around
_DEPTH = 0.028  # fingertips below the top of the grasped object
_RIM_DEPTH = 0.03
_FLOOR = 0.011  # fingertips above the support
_STEP = np.deg2rad(15)


class Grasp(NamedTuple):
    """Position of the fingertips [3] (metres), yaw from the hand's initial pose, and costs."""

    position: np.ndarray
    yaw: float
    cost: float
    is_rim: bool


def find_grasps(
    cloud: np.ndarray, obstacles: np.ndarray, finger_axis: np.ndarray, failed: Sequence[Grasp] = ()
) -> list[Grasp]:
    """Return the grasps of an object, the best first; [] if nothing fits between the fingers.

    Args:
        cloud: points of the object [n, 3].
        obstacles: points of everything else [m, 3].
        finger_axis: axis between the fingers in the hand's initial pose [3].
        failed: earlier grasps, which become costly.
    """
    base = float(np.arctan2(finger_axis[1], finger_axis[0]))
    grasps = [*_across(cloud, obstacles, base), *_rim(cloud, obstacles, base)]
    priced = [g._replace(cost=g.cost + sum(_likeness(g, f) for f in failed)) for g in grasps]
    return sorted(priced, key=lambda g: g.cost)


def _across(cloud: np.ndarray, obstacles: np.ndarray, base: float) -> list[Grasp]:
    """Return grasps around the whole object."""
    top, bottom = cloud[:, 2].max(), cloud[:, 2].min()
    height = max(bottom + _FLOOR, top - _DEPTH)
    if height > top - 0.004:  # flatter than the fingertips' distance from the support
        height = top - 0.004
    band = cloud[(cloud[:, 2] > height - _BAND) & (cloud[:, 2] < height + _BAND)]
    grasps = []
    for yaw in np.arange(-np.pi / 2, np.pi / 2, _STEP):
        u = np.array([np.cos(base + yaw), np.sin(base + yaw)])
        v = np.array([-u[1], u[0]])
        along, side = band[:, :2] @ u, band[:, :2] @ v
        width = np.ptp(along)
        if width > MAX_WIDTH:
            continue
        xy = u * (along.max() + along.min()) / 2 + v * (side.max() + side.min()) / 2
        position = np.array([*xy, height])
        cost = 4 * width / MAX_WIDTH + abs(yaw) / np.pi + _crowding(position, u, v, obstacles)
        grasps.append(Grasp(position, float(yaw), float(cost), False))
    return grasps


def _rim(cloud: np.ndarray, obstacles: np.ndarray, base: float) -> list[Grasp]:
    """Return grasps of the rim of a hollow object, a finger inside; [] for other objects."""
    top = cloud[:, 2].max()
    upper = cloud[cloud[:, 2] > top - _BAND]
    centre = (upper[:, :2].max(0) + upper[:, :2].min(0)) / 2
    radius = np.linalg.norm(upper[:, :2] - centre, axis=1)
    if (radius < 0.02).any():
        return []
    angle = np.arctan2(*(upper[:, :2] - centre).T[::-1])
    grasps = []
    for direction in np.arange(0, 2 * np.pi, _STEP):
        near = np.abs((angle - direction + np.pi) % (2 * np.pi) - np.pi) < _STEP
        if not near.any():
            continue
        u = np.array([np.cos(direction), np.sin(direction)])
        v = np.array([-u[1], u[0]])
        wall = (radius[near].max() + radius[near].min()) / 2
        yaw = (direction - base + np.pi / 2) % np.pi - np.pi / 2
        position = np.array([*(centre + u * wall), top - _RIM_DEPTH])
        thick = np.ptp(radius[near])
        cost = 2 + 4 * thick / MAX_WIDTH + abs(yaw) / np.pi + _crowding(position, u, v, obstacles)
        grasps.append(Grasp(position, float(yaw), float(cost), True))
    return grasps


def _crowding(position: np.ndarray, u: np.ndarray, v: np.ndarray, obstacles: np.ndarray) -> float:
    """Return a cost of the points within the volume of the open fingers and the hand."""
    offset = obstacles - position
    along, side = np.abs(offset[:, :2] @ u), np.abs(offset[:, :2] @ v)
    above = offset[:, 2]
    fingers = (along > 0.0) & (along < 0.068) & (side < 0.022) & (above > -0.012) & (above < 0.1)
    hand = (along < 0.115) & (side < 0.045) & (above > 0.055) & (above < 0.25)
    return 3.0 * float((fingers | hand).any()) + 0.05 * min(int((fingers | hand).sum()), 100)


def _likeness(a: Grasp, b: Grasp) -> float:
    same = a.is_rim == b.is_rim and np.linalg.norm(a.position[:2] - b.position[:2]) < 0.025
    return 3.0 if same and abs(a.yaw - b.yaw) < 0.4 else 0.0
