"""What is evaluated: suites of split × skill × seeds, and the episodes that each stands for.

A split is where tasks come from (see `octolike.evaluation.success.MEANING`); seeds are fixed, so
every policy meets the same tables. Seeds of demonstrations lie below `FIRST_SEED`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from octolike.config import CollectConfig, ConfigError, EvaluateConfig, unknown
from octolike.envs.metaworld.metaworld_tasks import BENCHMARKS
from octolike.envs.registry import choose_names, kind_of, simulator

FIRST_SEED = 1_000_000


@dataclass(frozen=True)
class EpisodePlan:
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
    """`episodes` episodes of every skill in every split; () for all that the simulator has.

    skills_of: {split: its skills}, where a split is to have others than `skills`.
    """

    simulator: str
    about: str
    splits: tuple[str, ...] = ()
    skills: tuple[str, ...] = ()
    episodes: int = 50
    seed: int = FIRST_SEED
    skills_of: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)

    def plan(self) -> list[EpisodePlan]:
        """Return the episodes, first of each (split, skill), then second of each, …

        A split that has no tasks of a skill leaves that pair out. Raises ConfigError for unknown
        names and for an empty plan.
        """
        row = simulator(self.simulator)
        splits = choose_names("split", self.splits, row.load("splits"))
        known = row.load("skills")
        skills = {
            s: choose_names("skill", self.skills_of.get(s, self.skills), known) for s in splits
        }
        if self.episodes < 1 or self.seed < 0:
            raise ConfigError(
                f"{self.episodes} episodes from seed {self.seed}; expected at least one episode "
                "and no negative seed"
            )
        tasks_of = row.load("tasks_of")
        pairs = [
            (split, skill)
            for split in splits
            for skill in skills[split]
            if tasks_of(split, (skill,))
        ]
        if not pairs:
            raise ConfigError(
                f"none of the splits {', '.join(splits)} has tasks of "
                f"{', '.join(dict.fromkeys(s for some in skills.values() for s in some))}"
            )
        return [EpisodePlan(*pair, self.seed + i) for i in range(self.episodes) for pair in pairs]


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


def caveats(plan: Sequence[EpisodePlan], collect: CollectConfig) -> list[str]:
    """Return what the names of splits would hide: where seen is not what was demonstrated.

    collect: what the run's own config collects; datasets made by others are not known here.
    """
    known, said = set(collect.skills), []
    of_split: dict[str, set[str]] = {}
    for episode in plan:
        of_split.setdefault(episode.split, set()).add(episode.skill)
    shown = of_split.get("held_out_task", set()) & known
    fresh = set().union(*(x for s, x in of_split.items() if s != "held_out_task")) - known
    listed = lambda names: ", ".join(sorted(names))
    if known and fresh:
        said.append(
            f"The run's own config collects no demonstrations of {listed(fresh)}: unless another "
            "dataset of its mix has some, those tasks are not seen ones, whatever their split says."
        )
    if shown:
        said.append(f"Demonstrated all the same, though among the held-out tasks: {listed(shown)}.")
    if collect.split != "train":
        said.append(
            f"The run's own config collects demonstrations of the split {collect.split!r}: that "
            "one is seen too."
        )
    if any(episode.seed < FIRST_SEED for episode in plan):
        said.append(
            f"Seeds below {FIRST_SEED:,} are those of demonstrations: layouts may be known."
        )
    return said


SUITES = {
    "tabletop": Suite(
        "tabletop",
        "every skill, seen and held out, with other instructions, with more things on the table",
    ),
    "tabletop_seen": Suite("tabletop", "every skill on seen tasks", splits=("train",)),
    "tabletop_held_out": Suite(
        "tabletop",
        "every skill, seen and the three held-out splits: memorising or learning?",
        splits=("train", "held_out_combination", "held_out_phrasing", "held_out_family"),
    ),
    "tabletop_language": Suite(
        "tabletop",
        "every skill, seen and on the same tables with another instruction",
        splits=("train", "counterfactual"),
    ),
    "tabletop_distractors": Suite(
        "tabletop",
        "every skill, on tables as in training and on fuller ones",
        splits=("train", "distractors"),
    ),
    "tabletop_quick": Suite(
        "tabletop",
        "every skill, seen and held-out combinations, few episodes",
        splits=("train", "held_out_combination"),
        episodes=10,
    ),
    **{
        f"metaworld_{name}": Suite(
            "metaworld",
            f"Meta-World's {name.upper()}, in known and in other words, at positions never shown",
            splits=("train", "held_out_phrasing"),
            skills=BENCHMARKS[name].train,
        )
        for name in ("mt10", "mt50")
    },
    **{
        f"metaworld_{name}": Suite(
            "metaworld",
            f"Meta-World's {name.upper()}: its training tasks, and its test tasks",
            splits=("train", "held_out_task"),
            skills=BENCHMARKS[name].train,
            skills_of={"held_out_task": BENCHMARKS[name].test},
        )
        for name in ("ml10", "ml45")
    },
    "aloha": Suite("aloha", "two arms: hand a cube over, put a peg into a socket"),
    "aloha_transfer_cube": Suite("aloha", "two arms: hand a cube over", skills=("transfer_cube",)),
    "aloha_insertion": Suite("aloha", "two arms: put a peg into a socket", skills=("insertion",)),
    **{
        f"libero_{name}": Suite(
            "libero",
            f"LIBERO's suite {name}, every task",
            skills=tuple(f"{name}/{i}" for i in range(tasks)),
        )
        for name, tasks in (("spatial", 10), ("object", 10), ("goal", 10), ("10", 10), ("90", 90))
    },
    "simpler_widowx": Suite(
        "simpler",
        "the WidowX's four tasks of Bridge",
        skills=(
            "widowx_spoon_on_towel",
            "widowx_carrot_on_plate",
            "widowx_stack_cube",
            "widowx_put_eggplant_in_basket",
        ),
        episodes=24,
    ),
    "simpler_google": Suite(
        "simpler",
        "the Google robot's tasks",
        skills=(
            "google_robot_pick_coke_can",
            "google_robot_pick_object",
            "google_robot_move_near",
            "google_robot_open_drawer",
            "google_robot_close_drawer",
            "google_robot_place_apple_in_closed_top_drawer",
        ),
    ),
}
