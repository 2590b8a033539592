"""Replays of recorded actions, and their deviation from the recording."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

FILM_HZ = 5.0  # images per second of a film, in the robot's time


class Replay(NamedTuple):
    """The result of a replay over T' steps.

    success: whether it ended in success.
    steps: T', at most the number of actions.
    proprio: float [T'], the largest difference over the dimensions, in their units.
    pixels: float [T'], the mean absolute pixel difference (0 to 255) of the worst camera.
    """

    success: bool
    steps: int
    proprio: np.ndarray
    pixels: np.ndarray


class Film(NamedTuple):
    """An episode's images, each uint8 [h, w, 3], after how many steps each was taken, and `info`.

    The first image is of step 0, the last one of the last step, and `info` is of that step.
    """

    images: list[np.ndarray]
    steps: list[int]
    info: dict[str, Any]


def replay(
    env: Any,
    seed: int,
    options: dict[str, Any],
    actions: np.ndarray,
    recorded: Mapping[str, np.ndarray],
) -> Replay:
    """Execute actions [T, A] from a seed's start and compare with a recording {key: [T, ...]}.

    The observation of a step is the one before its action.
    """
    env = getattr(env, "unwrapped", env)
    observation, info = env.reset(seed=seed, options=options)
    proprio, pixels, done = [], [], False
    for t, action in enumerate(actions):
        if done:
            break
        differences = {k: _difference(observation[k], v[t]) for k, v in recorded.items()}
        proprio.append(differences["proprio"].max() if "proprio" in differences else 0.0)
        cameras = [d.mean() for key, d in differences.items() if key.startswith("image_")]
        pixels.append(max(cameras, default=0.0))
        observation, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated
    return Replay(bool(info["success"]), len(proprio), np.array(proprio), np.array(pixels))


def render_replay(env: Any, seed: int, options: dict[str, Any], actions: np.ndarray) -> Film:
    """Execute actions [T, A] from a seed's start and render FILM_HZ images per second.

    Wrappers are bypassed: the innermost environment acts and renders. One that has `act`, a step
    without observations, renders nothing else.
    """
    env = getattr(env, "unwrapped", env)
    stride = max(1, round(getattr(env, "metadata", {}).get("control_hz", FILM_HZ) / FILM_HZ))
    act = getattr(env, "act", env.step)
    _, info = env.reset(seed=seed, options=options)
    images, steps = [env.render()], [0]
    for step, action in enumerate(actions, start=1):
        *_, info = act(action)
        if step % stride == 0 or step == len(actions):
            images.append(env.render())
            steps.append(step)
    return Film(images, steps, info)


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(
            f"the simulator's observation has shape {list(a.shape)}, the recording "
            f"{list(b.shape)}: it was made with other settings of the environment"
        )
    return np.abs(a - b)
