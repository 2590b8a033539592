"""Functions that all simulators share: input checks, `info`, the record of a demonstration."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from octolike.envs.task_tables import check_choice

_RESET_OPTIONS = ("split", "skills")


def parse_reset_options(
    options: Mapping[str, Any] | None, tasks_of: Callable[..., Sequence[str]]
) -> tuple[str, Sequence[str]]:
    """Return (split, skills to draw from) of reset's options; ConfigError for unknown names."""
    options = {"split": "train", "skills": None} | dict(options or {})
    for key in options:
        check_choice("reset option", key, _RESET_OPTIONS)
    return options["split"], tasks_of(options["split"], options["skills"])


def episode_info(instruction: str, skill: str, success: bool, failure: str) -> dict[str, Any]:
    """Return the `info` of reset and step for simulators in which each skill is one task."""
    return {
        "instruction": instruction,
        "task": skill,
        "skill": skill,
        "success": bool(success),
        "failure": failure,
    }


def scene_digest(names: Sequence[str], state: np.ndarray) -> str:
    """Return a short digest of a scene: the names of its objects, and all positions (metres).

    Episodes with equal digests started equally, though perhaps with other instructions;
    `info["scene"]` of reset. The evaluation pairs them.
    """
    text = "\n".join(names).encode() + np.round(state, 6).astype("<f8").tobytes()
    return hashlib.sha256(text).hexdigest()[:12]


def check_action(action: np.ndarray, size: int, meaning: str) -> np.ndarray:
    """Return an action as float64 [size]; ValueError unless it has `size` finite numbers.

    meaning: names of the numbers, for the error.
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


def demonstration_record(
    observations: Sequence[Mapping[str, np.ndarray]],
    labels: Sequence[np.ndarray],
    executed: Sequence[np.ndarray],
    info: Mapping[str, Any],
    *,
    seed: int,
    split: str,
) -> dict[str, Any]:
    """Return the episode dict of a demonstration of T steps.

    Args:
        observations: from the simulator, one per step.
        labels: the expert's actions [A], one per step.
        executed: the executed actions [A], one per step.
        info: the info of the last step.
        seed: seed of the episode.
        split: split of the task.

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


def last_images(episode: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the last image of each camera in a recorded episode: uint8 [h, w, 3]."""
    observation = episode["steps"]["observation"]
    return {key: frames[-1] for key, frames in observation.items() if key.startswith("image_")}
