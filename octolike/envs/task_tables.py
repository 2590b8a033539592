"""The simulators' tables of tasks: wordings, seeds, and checks of names. Imports no numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from octolike.config import ConfigError, unknown

FIRST_SEED = 1_000_000  # of evaluations; smaller ones are those of demonstrations
SAME_SCENES = ("train", "held_out_phrasing", "counterfactual", "distractors")
# Multiples of the numbers of initial states that benchmarks fix: LIBERO starts from seed mod 50.
PER_SKILL, OTHER_SCENES = 10_000_000, 5_000_000


class Phrasings(NamedTuple):
    """The wordings of a task: for training, and for the split `held_out_phrasing`."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]

    def for_split(self, split: str) -> tuple[str, ...]:
        """Return the wordings that occur in a split."""
        return self.held_out if split == "held_out_phrasing" else self.train


def seed_offset(split: str, skill: int) -> int:
    """Return the offset of an evaluation's seeds, from its split and the skill's number.

    `octolike.evaluation.suites` explains the seeds.
    """
    return PER_SKILL * skill + OTHER_SCENES * (split not in SAME_SCENES)


def check_choice(noun: str, name: str, choices: Sequence[str]) -> str:
    """Return a name that is among the choices; ConfigError otherwise."""
    if name not in choices:
        raise ConfigError(unknown(noun, name, choices))
    return name


def choose_tasks(
    simulator: str,
    split: str,
    skills: Sequence[str] | None = None,
    *,
    choices: Sequence[str],
    splits: Sequence[str] = ("train",),
) -> tuple[str, ...]:
    """Return the skills, or all choices by default, for simulators with all tasks in every split.

    Raises ConfigError for an unknown split or skill.
    """
    check_choice("split", split, splits)
    for skill in skills or ():
        check_choice(f"{simulator} task", skill, choices)
    return tuple(skills or choices)
