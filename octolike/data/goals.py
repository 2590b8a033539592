"""What an example is told to do: instruction, goal image, and dropout between them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Task(NamedTuple):
    """goal: the step whose images are the goal, or None; language: is the instruction kept?"""

    goal: int | None
    language: bool


def choose(
    rng: np.random.Generator,
    t: int,
    length: int,
    *,
    strategy: str,
    keep_language: float,
    keep_goal: float,
    has_language: bool,
) -> Task:
    """Return the task of frame t of an episode of `length` steps.

    strategy: "uniform": a goal drawn from the steps after t; "last": the last step; "none": no goal
    images. An example never loses both: where dropout would take everything, it keeps the goal if
    there may be one, else the instruction.

    Always draws three numbers, so that what one setting does leaves the other draws alone.
    """
    u = rng.random(3)
    language = has_language and u[0] < keep_language
    if strategy == "none":
        return Task(None, has_language)
    goal = length - 1
    if strategy == "uniform" and t + 1 < length:
        goal = t + 1 + int(u[1] * (length - t - 1))
    keep = u[2] < keep_goal or not language
    return Task(goal if keep else None, language)
