"""What is evaluated: suites of split × skill × seeds, and the episodes that each stands for.

A split is where tasks come from (see `octolike.evaluation.success.MEANING`); seeds are fixed, so
every policy meets the same tables. Seeds of demonstrations lie below `FIRST_SEED`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from octolike.config import ConfigError, EvaluateConfig, unknown
from octolike.envs.registry import choose_names, kind_of, simulator

FIRST_SEED = 1_000_000


@dataclass(frozen=True)
class Episode:
    """One episode to run; equal episodes are equal in every run of the program."""

    split: str
    skill: str
    seed: int

    @property
    def options(self) -> dict[str, Any]:
        """What the environment's reset is told."""
        return {"split": self.split, "skills": [self.skill]}


@dataclass(frozen=True)
class Suite:
    """`episodes` episodes of every skill in every split; () for all that the simulator has."""

    simulator: str
    about: str
    splits: tuple[str, ...] = ()
    skills: tuple[str, ...] = ()
    episodes: int = 50
    seed: int = FIRST_SEED

    def plan(self) -> list[Episode]:
        """Return the episodes, first of each (split, skill), then second of each, …

        A split that has no tasks of a skill leaves that pair out. Raises ConfigError for unknown
        names and for an empty plan.
        """
        row = simulator(self.simulator)
        splits = choose_names("split", self.splits, row.load("splits"))
        skills = choose_names("skill", self.skills, row.load("skills"))
        if self.episodes < 1 or self.seed < 0:
            raise ConfigError(
                f"{self.episodes} episodes from seed {self.seed}; expected at least one episode "
                "and no negative seed"
            )
        tasks_of = row.load("tasks_of")
        pairs = [
            (split, skill) for split in splits for skill in skills if tasks_of(split, (skill,))
        ]
        if not pairs:
            raise ConfigError(
                f"none of the splits {', '.join(splits)} has tasks of {', '.join(skills)}"
            )
        return [Episode(*pair, self.seed + i) for i in range(self.episodes) for pair in pairs]


def from_config(
    environment: Mapping[str, Any], config: EvaluateConfig, trained: Sequence[str]
) -> Suite:
    """Return the suite of a run's own settings; `trained` are the skills it was trained on."""
    return Suite(
        kind_of(environment),
        "the run's own settings",
        tuple(config.splits),
        tuple(config.skills) or tuple(trained),
        config.episodes,
        config.seed,
    )


def named(name: str, environment: Mapping[str, Any]) -> Suite:
    """Return a suite by name; raises ConfigError where it is unknown or of another simulator."""
    if name not in SUITES:
        raise ConfigError(unknown("suite", name, SUITES))
    suite, kind = SUITES[name], kind_of(environment)
    if suite.simulator != kind:
        fitting = [n for n, s in SUITES.items() if s.simulator == kind]
        raise ConfigError(
            f"suite {name!r} is of simulator {suite.simulator!r}, but the run's environment is "
            f"{kind!r} (its suites: {', '.join(fitting)})"
        )
    return suite


SUITES = {
    "tabletop": Suite("tabletop", "every skill, seen and all three held-out splits"),
    "tabletop_seen": Suite("tabletop", "every skill on seen tasks", splits=("train",)),
    "tabletop_quick": Suite(
        "tabletop",
        "every skill, seen and held-out combinations, few episodes",
        splits=("train", "held_out_combination"),
        episodes=10,
    ),
}
