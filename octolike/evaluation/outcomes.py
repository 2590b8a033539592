"""The evaluation outcomes of runs, restricted to the episodes of each run's own settings, or to
those of another block of scenes.

A run may also have been evaluated by other suites or at an earlier checkpoint; comparisons must not
mix those in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octolike.config import stored_config
from octolike.errors import RunError
from octolike.evaluation import suites
from octolike.evaluation.results_file import NAME, complete_lines, parse_row, planned_episode
from octolike.evaluation.success import SPLIT_MEANINGS

RESULTS = f"evaluation/{NAME}"


@dataclass(frozen=True)
class RobotOutcomes:
    """The trained policy's rows for one robot, seen tasks first.

    missing: the number of planned episodes without an outcome; settings: of the evaluation, which
    the seeds of a variant share (`check_settings`).
    """

    robot: str
    rows: tuple[dict[str, Any], ...]
    missing: int
    settings: Mapping[str, Any]


class NoEpisodesError(ValueError):
    """A run has no episode that counts: its evaluation has not begun, or was of other scenes."""


def by_variant(runs: Iterable[Path]) -> dict[str, dict[str, Path]]:
    """Return {variant: {seed: run}} of runs <variant>-<seed>, seeds in ascending order.

    A run <variant> beside them has the seed of its config. Prints which others are left out.
    """
    variants: dict[str, dict[str, Path]] = {}
    unnumbered = []
    for run in runs:
        variant, _, seed = run.name.rpartition("-")
        if seed.isdecimal():
            variants.setdefault(variant, {})[seed] = run
        else:
            unnumbered.append(run)
    for run in unnumbered:
        others = variants.get(run.name, {})
        seed = str(stored_config(str(run)).seed) if others else ""
        if others and seed not in others:
            others[seed] = run
        else:
            print(f"note: {run} is left out: its name does not end with -<seed>")
    return {v: dict(sorted(r.items(), key=lambda x: int(x[0]))) for v, r in variants.items()}


def result_files(run: Path) -> dict[str, Path]:
    """Return {robot: results file} of a run; the robot is "" if the run has only one."""
    files = {path.parent.name: path for path in sorted(run.glob(f"evaluation/*/{NAME}"))}
    return {"": run / RESULTS} if (run / RESULTS).exists() else files


def read_outcomes(run: Path, block: str = "", episodes: int | None = None) -> list[RobotOutcomes]:
    """Return the outcomes of the run's planned episodes, robot by robot.

    block: of scenes, a name of `suites.BLOCKS`; "": the run's own. episodes: of each skill and
    split; None: as many as the run's own settings have.

    Raises NoEpisodesError if none of them was evaluated; ValueError if not with the last
    checkpoint, or for a malformed file.
    """
    config = stored_config(str(run))
    skills = tuple(config.collect.skills)
    own = suites.suite_from_config(config.environment, config.evaluate, skills)
    suite = dataclasses.replace(own, **suites.overrides(episodes=episodes, block=block))
    plan, outcomes = suite.plan(), []
    of_block, option = (f" in the block {block}", f" --block {block}") if block else ("", "")
    option += f" --episodes {episodes}" if episodes else ""
    for path in result_files(run).values():
        setup, lines = _read_results(path)
        step = setup["checkpoint"]
        if step != config.train.steps:
            raise ValueError(
                f"{path} is an evaluation of step {step:,}, but the run has {config.train.steps:,} "
                "steps; finish training or evaluate the last checkpoint: "
                f"octolike evaluate --run {run}"
            )
        latest = {planned_episode(row): row for row in lines if row["policy"] == "trained"}
        rows = tuple(latest[e] for e in plan if e in latest)
        if not rows:
            raise NoEpisodesError(
                f"{path} has no episode of the run's own settings (evaluate.splits, skills, "
                f"episodes, seed){of_block}; run them: octolike evaluate --run {run}{option}"
            )
        missing = len(plan) - sum(row["success"] is not None for row in rows)
        planned = {name: getattr(suite, name) for name in ("splits", "skills", "episodes", "seed")}
        settings = setup | {f"evaluate.{name}": value for name, value in planned.items()}
        outcomes.append(RobotOutcomes(setup["embodiment"], _seen_first(rows), missing, settings))
    return outcomes


def check_settings(outcomes: Mapping[Path, Sequence[RobotOutcomes]]) -> None:
    """Raise ValueError if the runs of a variant were trained or evaluated with other settings."""
    first: dict[str, tuple[Path, Mapping[str, Any]]] = {}
    for run, robots in outcomes.items():
        for outcome in robots:
            other, expected = first.setdefault(outcome.robot, (run, outcome.settings))
            differences = [
                f"{name} {outcome.settings.get(name)}, not {expected.get(name)}"
                for name in sorted(expected.keys() | outcome.settings.keys())
                if outcome.settings.get(name) != expected.get(name)
            ]
            if differences:
                raise ValueError(
                    f"{run} was trained or evaluated with other settings than {other}, of the same "
                    f"variant: {'; '.join(differences)}; train and evaluate both with equal "
                    "settings, or move one of them away"
                )


def _read_results(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return (setup, rows) of a results.jsonl."""
    lines = complete_lines(path.read_text(encoding="utf-8"))
    head, *rows = [parse_row(path, i, line) for i, line in enumerate(lines, start=1)] or [{}]
    setup = head.get("setup")
    if not isinstance(setup, dict) or not {"checkpoint", "embodiment"} <= setup.keys():
        raise RunError(
            f"{path} does not begin with the setup of an evaluation; move the file away and "
            "evaluate the run again"
        )
    return setup, rows


def _seen_first(rows: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    rank = {split: i for i, split in enumerate(SPLIT_MEANINGS)}
    return tuple(sorted(rows, key=lambda r: (rank.get(r["split"], len(rank)), r["split"])))
