"""How an example is conditioned: goal image, instruction, task id, and dropout of each."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Columns of an example's random draws: keep the instruction, which goal, keep the goal, keep the
# task id, which of several instructions, which paraphrase. Every example draws all of them, so that
# a setting changes only its own column.
DRAWS = 6
LANGUAGE, _GOAL, _KEEP_GOAL, TASK_ID, WORDING, PARAPHRASE = range(DRAWS)


class TaskChoice(NamedTuple):
    """The conditioning of B examples, arrays [B].

    step: int, the step of the goal images (only meaningful if `goal`); goal, language, task_id:
    bool, whether the example is conditioned on it.
    """

    step: np.ndarray
    goal: np.ndarray
    language: np.ndarray
    task_id: np.ndarray


def choose(
    draws: np.ndarray,
    t: np.ndarray,
    length: np.ndarray,
    *,
    strategy: str,
    keep_language: float,
    keep_goal: float,
    keep_task_id: float,
    has_language: np.ndarray,
    has_goal: np.ndarray,
    has_task_id: np.ndarray,
) -> TaskChoice:
    """Return the conditioning of frames t [B] of episodes of `length` [B] steps.

    Each kind is kept with its own probability. If dropout would remove all available kinds, the
    example keeps the first available one of: goal image, instruction, task id.

    draws: float [B, DRAWS] in [0, 1). strategy: "uniform": a goal drawn from the steps after t;
    "last": the last step; "none": no goal images. has_*: bool [B], which kinds are available.
    """
    has_goal = has_goal & (strategy != "none")
    step = length - 1
    if strategy == "uniform":
        later = t + 1 + (draws[:, _GOAL] * (length - t - 1)).astype(np.int64)
        step = np.where(t + 1 < length, later, step)
    goal = has_goal & (draws[:, _KEEP_GOAL] < keep_goal)
    language = has_language & (draws[:, LANGUAGE] < keep_language)
    task_id = has_task_id & (draws[:, TASK_ID] < keep_task_id)
    none = ~(goal | language | task_id)
    goal = goal | (none & has_goal)
    language = language | (none & has_language & ~has_goal)
    task_id = task_id | (none & has_task_id & ~has_goal & ~has_language)
    return TaskChoice(step, goal, language, task_id)
