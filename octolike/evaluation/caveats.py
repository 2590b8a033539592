"""What limits the meaning of success rates: what was demonstrated, by whom, and odd tasks.

The demonstrated skills are those in the settings.json of the run's datasets, which `octolike
collect` writes. Other datasets hold no names of skills: then the instructions are compared, those
of the run's tasks (names.json) with those of the episodes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from octolike import files
from octolike.config import Config
from octolike.envs.registry import kind_of, simulator
from octolike.envs.task_tables import FIRST_SEED, OTHER_SCENES
from octolike.evaluation.success import HELD_OUT_TASKS, SEEN, ResultRow
from octolike.evaluation.suites import EpisodePlan

SETTINGS = "settings.json"  # of octolike.data.rlds.writer, which needs tensorflow


@dataclass(frozen=True)
class Demonstrated:
    """What is known of the demonstrations that a run was trained on.

    Attributes:
        skills, splits: that are demonstrated.
        others: why more skills may be; "" if there are no others.
        source: what says that the others are not.
        are_own: whether octolike's experts recorded some of them; None: unknown.
    """

    skills: frozenset[str] = frozenset()
    splits: frozenset[str] = frozenset()
    others: str = ""
    source: str = "the settings of the training's datasets"
    are_own: bool | None = None

    def missing(self, skills: Iterable[str]) -> set[str]:
        """Return the skills that are certainly not demonstrated."""
        return set() if self.others else set(skills) - self.skills


def find_demonstrated(config: Config, datasets: Sequence[str]) -> Demonstrated:
    """Return what the settings of a run's datasets, and its config, say of its demonstrations.

    datasets: those of the run's names.json.
    """
    kind, collect = kind_of(config.environment), config.collect
    reasons: list[str] = []
    recorded_by: set[bool | None] = set()
    skills: set[str] = set()
    splits: set[str] = set()
    for dataset in datasets or (collect.dataset,):
        root = config.data.root_of(dataset)
        stored = _stored_settings(root, dataset)
        if stored is None:
            reasons.append(f"{dataset} is not in {root or 'data.root'}")
            recorded_by.add(None)
        for settings in stored or ({},):
            if settings.get("environment", {}).get("kind") == kind:
                recorded_by.add(True)
                skills |= settings.get("skills", {}).keys()
                splits.add(settings.get("split", SEEN))
                continue
            if stored is not None:
                reasons.append(f"{dataset} does not name its skills")
                recorded_by.add(False)
            if dataset == collect.dataset:
                skills |= collect.skills.keys()
                splits.add(collect.split)
    return Demonstrated(
        frozenset(skills),
        frozenset(splits),
        others="; ".join(reasons),
        are_own=True if True in recorded_by else None if None in recorded_by else False,
    )


def _stored_settings(root: str, dataset: str) -> list[Mapping[str, Any]] | None:
    """Return the settings of each version of a dataset, {} for one without; None if it is absent.

    A remote dataset counts as absent: an evaluation does not wait for a network.
    """
    if not root or root.startswith(files.REMOTE):
        return None
    versions = [
        path
        for path in Path(root, dataset).glob("*")
        if path.is_dir() and path.suffix != ".incomplete" and not path.name.startswith(".")
    ]
    settings: list[Mapping[str, Any]] = []
    for version in versions:
        try:
            stored = json.loads((version / SETTINGS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            stored = {}  # recorded elsewhere
        is_ours = isinstance(stored, dict) and isinstance(stored.get("environment"), dict)
        settings.append(stored if is_ours else {})
    return settings or None


def compare_instructions(
    demonstrated: Demonstrated, rows: Iterable[ResultRow], instructions: Iterable[str]
) -> Demonstrated:
    """Return what is known after an evaluation, from the instructions of its seen episodes.

    A skill is demonstrated if an instruction of its episodes is one of the training's. Unchanged if
    the skills are known already, or if a skill's instructions are not: all its episodes crashed.
    """
    known = {_plain(text) for text in instructions}
    asked: dict[str, set[str]] = {}
    for row in rows:
        if row["split"] == SEEN:
            asked.setdefault(row["skill"], set()).add(_plain(row.get("instruction", "")))
    asked = {skill: texts - {""} for skill, texts in asked.items()}
    if not demonstrated.others or not known or not asked or not all(asked.values()):
        return demonstrated
    skills = {skill for skill, texts in asked.items() if texts & known}
    return replace(
        demonstrated,
        skills=demonstrated.skills | skills,
        others="",
        source="the instructions of the training's datasets",
    )


def sentences(
    environment: Mapping[str, Any], plan: Sequence[EpisodePlan], demonstrated: Demonstrated
) -> list[str]:
    """Return a sentence for each reason why a rate means less than it seems to."""
    found = _sentences_on_splits(plan, demonstrated)
    if any(episode.seed % OTHER_SCENES < FIRST_SEED for episode in plan):
        found.append(
            f"Seeds below {FIRST_SEED:,} belong to demonstrations: these scenes may be known."
        )
    parts = simulator(kind_of(environment))
    if parts.odd_tasks:
        pairs = dict.fromkeys((episode.split, episode.skill) for episode in plan)
        odd = parts.load("odd_tasks")
        found += [odd[pair] for pair in pairs if pair in odd]
    if parts.published_demonstrations and demonstrated.are_own is not False:
        ours = "The training's demonstrations are of octolike's scripted experts"
        if demonstrated.are_own is None:
            ours = (
                "Whether octolike's scripted experts recorded the training's demonstrations is "
                "unknown here, as its datasets are not found; if they did"
            )
        found.append(
            f"{ours}: these rates are not comparable with published ones, whose demonstrations "
            f"{parts.published_demonstrations}."
        )
    return found


def _sentences_on_splits(plan: Sequence[EpisodePlan], demonstrated: Demonstrated) -> list[str]:
    """Return a sentence for each split with a misleading name."""
    skills = demonstrated.skills
    found: list[str] = []
    skills_of: dict[str, set[str]] = {}
    for episode in plan:
        skills_of.setdefault(episode.split, set()).add(episode.skill)
    held_out = skills_of.get(HELD_OUT_TASKS, set())
    seen = set().union(*(x for split, x in skills_of.items() if split != HELD_OUT_TASKS))
    if new := demonstrated.missing(seen):
        found.append(
            f"Not demonstrated, by {demonstrated.source}: {_join(new)}. These tasks are not seen, "
            "whatever the split's name."
        )
    elif skills and seen - skills:
        found.append(
            f"The run's config collects no demonstrations of {_join(seen - skills)}: unless "
            "another dataset of its mixture contains some, these tasks are not seen, whatever the "
            "split's name."
        )
    elif seen - skills:
        found.append(
            f"Unknown which of these tasks were demonstrated ({demonstrated.others}): “seen” is "
            "the name of the split."
        )
    if held_out & skills:
        found.append(
            f"Demonstrated, although among the held-out tasks: {_join(held_out & skills)}."
        )
    if others := demonstrated.splits - {SEEN}:
        found.append(
            f"The run's demonstrations are of the split {_join(others)!r}, so that is seen too."
        )
    return found


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _join(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
