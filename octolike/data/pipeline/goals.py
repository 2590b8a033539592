"""How an example is conditioned: goal image, instruction, task id, and dropout of each."""

from __future__ import annotations

from typing import Any, NamedTuple

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

    step: Any
    goal: Any
    language: Any
    task_id: Any


def choose(
    draws: Any,
    t: Any,
    length: Any,
    *,
    strategy: str,
    keep_language: float,
    keep_goal: float,
    keep_task_id: float,
    has_language: Any,
    has_goal: Any,
    has_task_id: Any,
    exclusive: bool = False,
    xp: Any = np,
) -> TaskChoice:
    """Return the conditioning of frames t [B] of episodes of `length` [B] steps.

    Each kind is kept with its own probability. If dropout would remove all available kinds, the
    example keeps the first available one of: goal image, instruction, task id.

    exclusive: an example with a goal image and an instruction keeps one of them, the goal image
    with probability keep_goal / (keep_goal + keep_language); an example with one of them keeps it.

    draws: float [B, DRAWS] in [0, 1). strategy: "uniform": a goal drawn from the steps after t;
    "last": the last step; "none": no goal images. has_*: bool [B], which kinds are available. xp:
    the module of the arrays, numpy or tensorflow.experimental.numpy.
    """
    has_goal = has_goal & (strategy != "none")
    step = length - 1
    if strategy == "uniform":
        ahead = xp.asarray(xp.floor(xp.multiply(draws[:, _GOAL], length - t - 1)), np.int64)
        step = xp.where(t + 1 < length, t + 1 + ahead, step)
    if exclusive:
        share = keep_goal / (keep_goal + keep_language)
        goal = has_goal & ((draws[:, _KEEP_GOAL] < share) | ~has_language)
        language = has_language & ~goal
    else:
        goal = has_goal & (draws[:, _KEEP_GOAL] < keep_goal)
        language = has_language & (draws[:, LANGUAGE] < keep_language)
    task_id = has_task_id & (draws[:, TASK_ID] < keep_task_id)
    none = ~(goal | language | task_id)
    goal = goal | (none & has_goal)
    language = language | (none & has_language & ~has_goal)
    task_id = task_id | (none & has_task_id & ~has_goal & ~has_language)
    return TaskChoice(step, goal, language, task_id)
