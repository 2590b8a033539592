"""Evaluation suites (splits × skills × seeds) and the episodes that they plan.

A split defines the distribution of tasks (see `octolike.evaluation.success.SPLIT_MEANINGS`). Seeds
are fixed, so every policy meets the same scenes:

    below 1,000,000              demonstrations
    BLOCKS["development"] + i    the default: for choosing a recipe, looked at as often as one likes
    BLOCKS["test"] + i           for the figures that are reported, once the recipe is chosen
    BLOCKS["test2"] + i          the same, if failures in "test" have led to another recipe
    + 10,000,000 per skill       the scenes of two skills are independent
    + 5,000,000                  in splits with scenes of their own; the splits SAME_SCENES have the
                                 seeds of the seen one, and differ from it in words, task or
                                 distractors alone (LIBERO-PRO's also in the places of objects, of
                                 which its suites have initial states of their own)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from octolike.config import ConfigError, EvaluateConfig, unknown
from octolike.envs import simpler_tasks
from octolike.envs.libero import libero_tasks
from octolike.envs.metaworld.metaworld_tasks import BENCHMARKS
from octolike.envs.registry import choose_names, kind_of, simulator
from octolike.envs.task_tables import FIRST_SEED, OTHER_SCENES, seed_offset
from octolike.evaluation.success import SPLIT_MEANINGS

BLOCKS = {"development": FIRST_SEED, "test": 3_000_000, "test2": 4_000_000}
TURN = 10  # episodes of a task before the slot's next task, see keep_tasks


@dataclass(frozen=True)
class EpisodePlan:
    """One episode to run; split, skill and seed determine its scene."""

    split: str
    skill: str
    seed: int

    @property
    def options(self) -> dict[str, Any]:
        """The options of the environment's reset."""
        return {"split": self.split, "skills": [self.skill]}


@dataclass(frozen=True)
class Suite:
    """`episodes` episodes of every skill in every split; () for all of the simulator's.

    skills_of: {split: its skills}, for splits with other skills than `skills`.
    """

    simulator: str
    about: str
    splits: tuple[str, ...] = ()
    skills: tuple[str, ...] = ()
    episodes: int = 50
    seed: int = FIRST_SEED
    skills_of: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)

    def plan(self) -> list[EpisodePlan]:
        """Return the episodes: the first of each (split, skill), then the second of each, …

        Pairs of a split and a skill without tasks are omitted. Raises ConfigError for unknown names
        for an empty plan, and for more episodes of a task than a benchmark has initial states.
        """
        entry = simulator(self.simulator)
        splits = choose_names("split", self.splits, entry.load("splits"))
        all_skills = entry.load("skills")
        skills = {
            split: choose_names("skill", self.skills_of.get(split, self.skills), all_skills)
            for split in splits
        }
        if self.episodes < 1 or not 0 <= self.seed <= OTHER_SCENES - self.episodes:
            raise ConfigError(
                f"{self.episodes} episodes from seed {self.seed}; expected at least one episode "
                f"and seeds from 0 to {OTHER_SCENES - 1:,}"
            )
        if entry.states:
            self._check_states(entry.load("states"))
        tasks_of = entry.load("tasks_of")
        pairs = [
            (split, skill)
            for split in splits
            for skill in skills[split]
            if tasks_of(split, (skill,))
        ]
        if not pairs:
            names = dict.fromkeys(skill for split in splits for skill in skills[split])
            raise ConfigError(
                f"none of the splits {', '.join(splits)} has tasks of the skills {', '.join(names)}"
            )
        first = {p: self.seed + seed_offset(p[0], tuple(all_skills).index(p[1])) for p in pairs}
        return [EpisodePlan(*pair, first[pair] + i) for i in range(self.episodes) for pair in pairs]

    def _check_states(self, states: int) -> None:
        """Raise ConfigError for scenes that a benchmark with fixed initial states does not have."""
        if self.episodes > states:
            raise ConfigError(
                f"{self.episodes} episodes of each task; expected at most {states}: a task of "
                f"{self.simulator} has {states} initial states, and repeated ones are no "
                "independent episodes"
            )
        if self.seed >= BLOCKS["test"]:
            raise ConfigError(
                f"{self.simulator} has no block 'test' (seed {self.seed:,}): its {states} initial "
                "states are the same in every block; leave out --block test, or set evaluate.seed "
                f"to {FIRST_SEED:,}"
            )


def suite_from_config(
    environment: Mapping[str, Any], config: EvaluateConfig, trained: Sequence[str]
) -> Suite:
    """Return the suite of a run's own settings; `trained` are the skills of its demonstrations."""
    return Suite(
        kind_of(environment),
        "the run's own settings",
        tuple(config.splits),
        tuple(config.skills) or tuple(trained),
        config.episodes,
        config.seed,
    )


def overrides(
    splits: Sequence[str] | None = None,
    skills: Sequence[str] | None = None,
    episodes: int | None = None,
    block: str | None = None,
) -> dict[str, Any]:
    """Return the fields of `Suite` that a command replaces; block: a name of BLOCKS."""
    if block and block not in BLOCKS:
        raise ConfigError(unknown("block of scenes", block, BLOCKS))
    seed = BLOCKS[block] if block else None
    choices = {"splits": splits and tuple(splits), "skills": skills and tuple(skills)}
    fields = choices | {"episodes": episodes, "seed": seed}
    return {name: value for name, value in fields.items() if value is not None}


def suite_by_name(name: str, environment: Mapping[str, Any]) -> Suite:
    """Return a suite; raises ConfigError if it is unknown or belongs to another simulator."""
    if name not in SUITES:
        raise ConfigError(unknown("suite", name, SUITES))
    suite, kind = SUITES[name], kind_of(environment)
    if suite.simulator != kind:
        names = [n for n, s in SUITES.items() if s.simulator == kind]
        raise ConfigError(
            f"suite {name!r} belongs to simulator {suite.simulator!r}, but the run's environment "
            f"is {kind!r} (its suites: {', '.join(names)})"
        )
    return suite


def block_of(episode: EpisodePlan) -> str:
    """Return the block of an episode's seed, a name of BLOCKS or "demonstrations"."""
    seed = episode.seed % OTHER_SCENES
    return next((n for n in reversed(BLOCKS) if seed >= BLOCKS[n]), "demonstrations")


def keep_tasks(plan: Sequence[EpisodePlan], slots: int) -> list[EpisodePlan]:
    """Return a plan in an order in which `plan[slot::slots]` seldom changes the task.

    For simulators that build a task's simulation for seconds. A slot gets whole tasks, each
    slots-th, and a share of those that remain. It runs TURN episodes of one, then of the next, and
    so on, so an interrupted evaluation has run as many of each task, but for a turn.
    """
    tasks: dict[tuple[str, str], list[EpisodePlan]] = {}
    for episode in plan:
        tasks.setdefault((episode.split, episode.skill), []).append(episode)
    whole = len(tasks) // slots * slots
    if len({len(x) for x in tasks.values()}) > 1:
        whole = 0  # else some slots would have more to do
    queues: list[list[list[EpisodePlan]]] = [[] for _ in range(slots)]
    for i, episodes in enumerate(list(tasks.values())[:whole]):
        queues[i % slots].append(episodes)
    rest = [e for episodes in list(tasks.values())[whole:] for e in episodes]
    start = 0
    for slot, queue in enumerate(queues):
        end = start + len(rest) // slots + (slot < len(rest) % slots)
        shares: dict[tuple[str, str], list[EpisodePlan]] = {}
        for episode in rest[start:end]:
            shares.setdefault((episode.split, episode.skill), []).append(episode)
        queue += shares.values()
        start = end
    orders = [_take_turns(queue) for queue in queues]
    return [order[i] for i in range(len(orders[0])) for order in orders if i < len(order)]


def _take_turns(tasks: Sequence[Sequence[EpisodePlan]]) -> list[EpisodePlan]:
    """Return the episodes of some tasks: TURN of each, then the next TURN of each, …"""
    longest = max(map(len, tasks), default=0)
    starts = range(0, longest, TURN)
    return [e for start in starts for task in tasks for e in task[start : start + TURN]]


def _libero_suites() -> dict[str, Suite]:
    """Return LIBERO's suites, 50 episodes of each task, and LIBERO-PRO's."""
    names = tuple(libero_tasks.COUNTS)
    skills = {n: tuple(s for s in libero_tasks.SKILLS if s.startswith(f"{n}/")) for n in names}
    published = tuple(skill for n in names if n != "90" for skill in skills[n])
    suites = {
        "libero": Suite("libero", "LIBERO's spatial, object, goal and 10", ("train",), published)
    }
    pro = f"LIBERO-PRO's {', '.join(libero_tasks.PERTURBATIONS.values())}"
    for name in names:
        about = f"LIBERO's suite {name}, every task"
        suites[f"libero_{name}"] = Suite("libero", about, ("train",), skills[name])
        for split in libero_tasks.PERTURBATIONS if name != "90" else ():
            suite = libero_tasks.suite_name(split, name)
            about = f"LIBERO-PRO's suite {suite}: {SPLIT_MEANINGS[split]}"
            suites[suite] = Suite("libero", about, (split,), skills[name])
        if name != "90":
            about = f"LIBERO's suite {name}, and {pro} of it"
            suites[f"libero_{name}_pro"] = Suite("libero", about, libero_tasks.SPLITS, skills[name])
    return suites


LIBERO_SUITES = _libero_suites()
SUITES = {
    "tabletop": Suite(
        "tabletop",
        "every skill: seen, held out, with other instructions, and with more objects",
    ),
    "tabletop_seen": Suite("tabletop", "every skill on seen tasks", splits=("train",)),
    "tabletop_held_out": Suite(
        "tabletop",
        "every skill: seen and the three held-out splits; memorising or learning?",
        splits=("train", "held_out_combination", "held_out_phrasing", "held_out_family"),
    ),
    "tabletop_language": Suite(
        "tabletop",
        "every skill: seen, and in the same scenes with another instruction",
        splits=("train", "counterfactual"),
    ),
    "tabletop_distractors": Suite(
        "tabletop",
        "every skill: seen, and with more objects on the table",
        splits=("train", "distractors"),
    ),
    "tabletop_quick": Suite(
        "tabletop",
        "every skill: seen and held-out combinations, few episodes",
        splits=("train", "held_out_combination"),
        episodes=10,
    ),
    **{
        f"metaworld_{name}": Suite(
            "metaworld",
            f"Meta-World's {name.upper()} at new positions, in known and in new wordings",
            splits=("train", "held_out_phrasing"),
            skills=BENCHMARKS[name].train,
        )
        for name in ("mt10", "mt50")
    },
    **{
        f"metaworld_{name}": Suite(
            "metaworld",
            f"Meta-World's {name.upper()}: its training tasks and its test tasks",
            splits=("train", "held_out_task"),
            skills=BENCHMARKS[name].train,
            skills_of={"held_out_task": BENCHMARKS[name].test},
        )
        for name in ("ml10", "ml45")
    },
    "aloha": Suite("aloha", "two arms: transfer a cube, insert a peg"),
    "aloha_transfer_cube": Suite("aloha", "two arms: transfer a cube", skills=("transfer_cube",)),
    "aloha_insertion": Suite("aloha", "two arms: insert a peg", skills=("insertion",)),
    **LIBERO_SUITES,
    "simpler_widowx": Suite(
        "simpler",
        "the four WidowX tasks of Bridge",
        skills=simpler_tasks.WIDOWX,
        episodes=24,
    ),
    "simpler_google": Suite(
        "simpler",
        "the tasks of the Google robot",
        skills=simpler_tasks.GOOGLE,
    ),
}
