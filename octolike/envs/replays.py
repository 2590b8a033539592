"""Playing recorded actions again, and how far that leads from what was recorded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class Replay(NamedTuple):
    """How a replay went.

    success: whether it ended in success; steps: that it lasted; proprio: float [T'], the largest
    difference over the dimensions at each step, in their units; pixels: float [T'], the mean
    difference of a camera's values (0 to 255), of the camera where it is largest.
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
    """Execute actions [T, A] from a seed's start, beside the recorded observation {key: [T, ...]}.

    The observation of a step is the one before its action.
    """
    env = getattr(env, "unwrapped", env)
    observation, info = env.reset(seed=seed, options=options)
    proprio, pixels, done = [], [], False
    for t, action in enumerate(actions):
        if done:
            break
        apart = {k: _difference(observation[k], v[t]) for k, v in recorded.items()}
        proprio.append(apart["proprio"].max() if "proprio" in apart else 0.0)
        pictures = [x.mean() for k, x in apart.items() if k.startswith("image_")]
        pixels.append(max(pictures, default=0.0))
        observation, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated
    return Replay(bool(info["success"]), len(proprio), np.array(proprio), np.array(pixels))


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(
            f"the simulator shows {list(a.shape)}, the recording has {list(b.shape)}: it was made "
            "with other settings of the environment"
        )
    return np.abs(a - b)
