"""What an example is told to do: goal image, instruction, task id, and dropout between them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# What a draw decides: keep the instruction, which goal, keep the goal, keep the task id, which of
# several instructions, which wording. Every example has all of them, so that what one setting does
# leaves the other draws alone.
DRAWS = 6
LANGUAGE, _GOAL, _KEEP_GOAL, TASK_ID, WORDING, PARAPHRASE = range(DRAWS)


class TaskChoice(NamedTuple):
    """What B examples keep, arrays [B].

    step: int, the step whose images are the goal, where there is one; goal, language, task_id:
    bool, whether the example is told so.
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
    """Return the tasks of frames t [B] of episodes of `length` [B] steps.

    draws: float [B, DRAWS] in [0, 1). strategy: "uniform": a goal drawn from the steps after t;
    "last": the last step; "none": no goal images. has_*: bool [B], what there is to be told.

    Each is kept with its own probability. Where dropout would take everything that there is, the
    example keeps the first there is of: goal image, instruction, task id.
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
