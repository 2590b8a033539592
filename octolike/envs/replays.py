"""Replays of recorded actions, and their deviation from the recording."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


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


def render_replay(
    env: Any, seed: int, options: dict[str, Any], actions: np.ndarray
) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Execute actions [T, A] from a seed's start; return T + 1 rendered images and the last info.

    Wrappers are bypassed: the innermost environment acts and renders.
    """
    env = getattr(env, "unwrapped", env)
    _, info = env.reset(seed=seed, options=options)
    images = [env.render()]
    for action in actions:
        *_, info = env.step(action)
        images.append(env.render())
    return images, info


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(
            f"the simulator's observation has shape {list(a.shape)}, the recording "
            f"{list(b.shape)}: it was made with other settings of the environment"
        )
    return np.abs(a - b)
