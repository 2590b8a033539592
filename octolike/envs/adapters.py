"""Functions of the environments of LIBERO and SimplerEnv."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from octolike.config import ConfigError
from octolike.envs.environment import check_action


def import_simulator(module: str, simulator: str, remedy: str) -> Any:
    """Import a simulator's module; ConfigError with the installation command if that fails."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{simulator} cannot be imported ({error}); install it: {remedy}"
        ) from error


def check_arm_action(action: np.ndarray) -> np.ndarray:
    """Return a 7-dimensional action as float64 [7]; ValueError unless it is 7 finite numbers."""
    return check_action(action, 7, "dx dy dz, rotation, gripper")


def resize_by_area(image: Any, size: int, source: str) -> np.ndarray:
    """Return an image uint8 [h, w, 3] as [size, size, 3], each pixel the mean over its area."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
        raise ValueError(
            f"{source} is {image.dtype} {list(image.shape)}; expected uint8 [h, w, 3]: "
            "another release of the simulator?"
        )
    if image.shape[:2] == (size, size):
        return image.copy()
    rows, columns = (_area_weights(n, size) for n in image.shape[:2])
    mean = np.einsum("ih,hwc,jw->ijc", rows, image.astype(np.float32), columns, optimize=True)
    return np.rint(mean).astype(np.uint8)


def no_demonstrations(env: Any, seed: int, split: str, skills: list[str], noise: float) -> Any:
    """Raise ConfigError: the simulator has no scripted expert."""
    raise ConfigError(
        f"{type(env.unwrapped).__name__} has no scripted expert; convert its recorded "
        "demonstrations to RLDS with octolike convert"
    )


def no_goal(env: Any, seed: int, options: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Raise ConfigError: the simulator cannot show a finished task."""
    raise ConfigError(
        f"{type(env.unwrapped).__name__} cannot make goal images: it has no expert to finish the "
        "task; evaluate a policy that is conditioned on language"
    )


def _area_weights(source: int, target: int) -> np.ndarray:
    """Return weights [target, source]; every row sums to 1."""
    edges = np.linspace(0, source, target + 1)
    low, high = np.arange(source), np.arange(source) + 1
    overlap = np.minimum(high, edges[1:, None]) - np.maximum(low, edges[:-1, None])
    overlap = np.clip(overlap, 0, None)
    return (overlap / overlap.sum(1, keepdims=True)).astype(np.float32)
