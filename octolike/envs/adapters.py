"""What the adapters to other people's simulators share: checks, turning, settling, clear errors."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from octolike.config import ConfigError, unknown
from octolike.envs import environment


def load(module: str, simulator: str, remedy: str) -> Any:
    """Import a simulator's module; ConfigError with how to install it where that fails."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{simulator} cannot be imported ({error}); install it: {remedy}"
        ) from error


def choose_tasks(
    simulator: str, split: str, skills: Sequence[str] | None = None, *, choices: Sequence[str]
) -> tuple[str, ...]:
    """Return the skills, or all where none are given; there is one split, `train`."""
    if split != "train":
        raise ConfigError(unknown("split", split, ("train",)))
    for skill in skills or ():
        if skill not in choices:
            raise ConfigError(unknown(f"{simulator} task", skill, choices))
    return tuple(skills or choices)


def checked(action: np.ndarray) -> np.ndarray:
    """Return an arm's action as float64 [7]; ValueError for anything but finite numbers."""
    return environment.checked_action(action, 7, "dx dy dz, rotation, gripper")


def picture(image: Any, size: int, source: str) -> np.ndarray:
    """Return a simulator's picture, uint8 [h, w, 3], as [size, size, 3], by averaging areas."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
        raise ValueError(
            f"{source} is {image.dtype} {list(image.shape)}; expected uint8 [h, w, 3]: "
            "another release of the simulator?"
        )
    if image.shape[:2] == (size, size):
        return image.copy()
    rows, columns = (_averages(n, size) for n in image.shape[:2])
    mean = np.einsum("ih,hwc,jw->ijc", rows, image.astype(np.float32), columns, optimize=True)
    return np.rint(mean).astype(np.uint8)


def no_demonstrations(env: Any, seed: int, split: str, skills: list[str], noise: float) -> Any:
    """Raise ConfigError: there is no scripted expert."""
    raise ConfigError(
        f"{type(env.unwrapped).__name__} has no scripted expert; convert its recorded "
        "demonstrations to RLDS with scripts/convert.py"
    )


def no_goal(env: Any, seed: int, options: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Raise ConfigError: the simulator cannot show how a finished task looks."""
    raise ConfigError(
        f"{type(env.unwrapped).__name__} cannot make goal images: it has no expert to finish the "
        "task; evaluate a policy that is told by language"
    )


def _averages(source: int, target: int) -> np.ndarray:
    """Return weights [target, source] that sum to 1 in every row."""
    edges = np.linspace(0, source, target + 1)
    low, high = np.arange(source), np.arange(source) + 1
    share = np.minimum(high, edges[1:, None]) - np.maximum(low, edges[:-1, None])
    share = np.clip(share, 0, None)
    return (share / share.sum(1, keepdims=True)).astype(np.float32)
