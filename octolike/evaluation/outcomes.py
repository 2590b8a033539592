"""What evaluations have left of a run, kept to the run's own settings: like beside like.

A run may have been evaluated by other suites too, or at an earlier checkpoint: of that nothing may
slip into a comparison.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octolike.config import stored_config
from octolike.evaluation import suites
from octolike.evaluation.rollouts import episode_of, whole_lines
from octolike.evaluation.success import MEANING

RESULTS = "evaluation/results.jsonl"


@dataclass(frozen=True)
class RobotOutcomes:
    """The trained policy's rows for one robot, seen tasks first, and how many of its plan lack."""

    robot: str
    rows: tuple[dict[str, Any], ...]
    missing: int


def files(run: Path) -> dict[str, Path]:
    """Return the results of each robot of a run; of "" where it knows but one."""
    found = {path.parent.name: path for path in sorted(run.glob("evaluation/*/results.jsonl"))}
    return {"": run / RESULTS} if (run / RESULTS).exists() else found


def read(run: Path) -> list[RobotOutcomes]:
    """Return what the run's policy did in the episodes of its own settings, robot by robot.

    Raises ValueError where none of them was evaluated, or not at the end of training.
    """
    config, found = stored_config(str(run)), []
    trained = tuple(config.collect.skills)
    plan = suites.from_config(config.environment, config.evaluate, trained).plan()
    for path in files(run).values():
        head, *rows = map(json.loads, whole_lines(path.read_text(encoding="utf-8")))
        step = head["setup"]["checkpoint"]
        if step != config.train.steps:
            raise ValueError(
                f"{path} is of step {step:,}, and the run goes to {config.train.steps:,}; finish "
                f"it, or evaluate its last checkpoint: python scripts/evaluate.py --run {run}"
            )
        latest = {episode_of(row): row for row in rows if row["policy"] == "trained"}
        mine = tuple(latest[e] for e in plan if e in latest)
        if not mine:
            raise ValueError(
                f"{path} has no episode of the run's own settings (evaluate.splits, skills, "
                f"episodes, seed); make them: python scripts/evaluate.py --run {run}"
            )
        missing = len(plan) - sum(row["success"] is not None for row in mine)
        found.append(RobotOutcomes(head["setup"]["embodiment"], _seen_first(mine), missing))
    return found


def _seen_first(rows: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    rank = {split: i for i, split in enumerate(MEANING)}
    return tuple(sorted(rows, key=lambda r: (rank.get(r["split"], len(rank)), r["split"])))
