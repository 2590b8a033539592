"""What the simulators share: checks of what comes in, and the record of a demonstration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from octolike.config import ConfigError, unknown

_OPTIONS = ("split", "skills")


def skills_of(
    options: Mapping[str, Any] | None, tasks_of: Callable[..., Sequence[str]]
) -> tuple[str, Sequence[str]]:
    """Return reset's split, and the skills that are left to draw from; ConfigError for others."""
    options = {"split": "train", "skills": None} | dict(options or {})
    for key in options:
        if key not in _OPTIONS:
            raise ConfigError(unknown("reset option", key, _OPTIONS))
    return options["split"], tasks_of(options["split"], options["skills"])


def info(instruction: str, skill: str, success: bool, failure: str) -> dict[str, Any]:
    """Return what reset and step say beside the observation, where a skill is one task."""
    return {
        "instruction": instruction,
        "task": skill,
        "skill": skill,
        "success": bool(success),
        "failure": failure,
    }


def checked_action(action: np.ndarray, size: int, meaning: str) -> np.ndarray:
    """Return an action as float64 [size]; ValueError where it is not so many finite numbers.

    meaning: of the numbers, for the error.
    """
    try:
        numbers = np.asarray(action, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"an action is float32 [{size}] ({meaning}): got {action!r}") from error
    if numbers.shape != (size,):
        raise ValueError(
            f"an action is float32 [{size}] ({meaning}): got shape {list(numbers.shape)}"
        )
    if not np.isfinite(numbers).all():
        raise ValueError(f"an action is {size} finite numbers: got {numbers.tolist()}")
    return numbers


def recorded(
    observations: Sequence[Mapping[str, np.ndarray]],
    labels: Sequence[np.ndarray],
    executed: Sequence[np.ndarray],
    info: Mapping[str, Any],
    *,
    seed: int,
    split: str,
) -> dict[str, Any]:
    """Return the episode dict of a demonstration of T steps.

    observations: as the simulator gave them; labels, executed: actions [A] of each step; info: of
    the last step.

    Returns:
        {"steps": {"observation": {"image_<camera>": uint8 [T, h, w, 3], "state": float32 [T, P]},
        "action": float32 [T, A], "executed_action": float32 [T, A], "language_instruction": str},
        "episode_metadata": {"seed": int, "task": str, "skill": str, "split": str, "success": bool}}
    """
    stacked = {key: np.stack([o[key] for o in observations]) for key in observations[0]}
    stacked["state"] = stacked.pop("proprio")
    return {
        "steps": {
            "observation": stacked,
            "action": np.stack(labels),
            "executed_action": np.stack(executed),
            "language_instruction": info["instruction"],
        },
        "episode_metadata": {
            "seed": int(seed),
            "task": info["task"],
            "skill": info["skill"],
            "split": split,
            "success": info["success"],
        },
    }


def last_pictures(episode: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return how a recorded episode ends: {"image_<camera>": uint8 [h, w, 3]}."""
    seen = episode["steps"]["observation"]
    return {key: frames[-1] for key, frames in seen.items() if key.startswith("image_")}
