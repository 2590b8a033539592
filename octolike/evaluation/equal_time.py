"""Variants in equal training time: each one's steps from the measured duration of its step.

Measured once, before the first run, and stored beside the runs: a repeated command, more seeds and
other machines train the same number of steps.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from octolike import files
from octolike.config import Config, ConfigError
from octolike.errors import RunError
from octolike.evaluation.study_design import StudyRun
from octolike.tables import text_table

FILE = "equal_time.json"
ROUND = 10  # of steps

Measure = Callable[[Mapping[str, Config]], Mapping[str, float]]


def plan(runs: Sequence[StudyRun], measure: Measure) -> tuple[list[StudyRun], str]:
    """Return (the runs with steps that take as long as those of the first variant, a table).

    The runs get directories of their own, <comparison>-equal-time/<variant>-<seed>, where the
    measurement is stored. Warm-up and intervals of checkpoints and validation keep their share of
    the run, and so does the learning rate's cosine; other schedules do not know the run's length.

    measure: {variant: config of one of its runs} -> {variant: seconds of a training step}.

    Raises:
        ConfigError: the reference of the stored measurement is not among the variants.
        RunError: the stored measurement is malformed.
    """
    configs = {run.variant: run.config for run in reversed(runs)}  # the first seed's
    configs = {run.variant: configs[run.variant] for run in runs}
    path = files.local_path(_directory(runs[0].config.workdir), "config.workdir") / FILE
    stored: dict[str, Any] = {"reference": runs[0].variant, "variants": {}}
    if path.exists():
        stored = _read(path)
    reference, rows = stored["reference"], stored["variants"]
    missing = [v for v in configs if v not in rows]
    if missing:
        if reference not in configs:
            raise ConfigError(
                f"{path} relates steps to the variant {reference!r}: add it to --variants, so that "
                f"{', '.join(missing)} can be measured with it"
            )
        names = dict.fromkeys([reference, *missing])
        seconds = measure({v: configs[v] for v in names})
        for variant in missing:
            ratio = seconds[reference] / seconds[variant]
            rows[variant] = {
                "seconds_per_step": seconds[variant],
                "of_reference": seconds[reference],
                "steps": max(1, round(configs[variant].train.steps * ratio / ROUND)) * ROUND,
            }
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, stored)
    table = text_table(
        [
            (v, f"{1e3 * rows[v]['seconds_per_step']:.1f}", config.train.steps, rows[v]["steps"])
            for v, config in configs.items()
        ],
        ("variant", "ms/step", "steps", "in equal time"),
        "lrrr",
    )
    return [_with_steps(run, rows[run.variant]["steps"]) for run in runs], f"{table}\n{path}"


def _with_steps(run: StudyRun, steps: int) -> StudyRun:
    """Return a run with another number of steps, in the directory of runs in equal time."""
    config, share = copy.deepcopy(run.config), steps / run.config.train.steps
    changes: dict[str, str | int] = {
        "workdir": f"{_directory(config.workdir)}/{Path(config.workdir).name}",
        "train.steps": steps,
        "optim.warmup": round(config.optim.warmup * share),
        "train.checkpoint_every": max(1, round(config.train.checkpoint_every * share)),
    }
    if config.train.validate_every:
        changes["train.validate_every"] = max(1, round(config.train.validate_every * share))
    for name, value in changes.items():
        *section, option = name.split(".")
        setattr(getattr(config, section[0]) if section else config, option, value)
    overrides = tuple(f"--config.{name}={value}" for name, value in changes.items())
    return dataclasses.replace(run, config=config, overrides=overrides)


def _directory(workdir: str) -> str:
    return f"{Path(workdir).parent}-equal-time"


def _read(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        rows = stored["variants"].values()
        _ = stored["reference"], [(row["seconds_per_step"], row["steps"]) for row in rows]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(
            f"{path} is not a measurement of steps ({files.cause(error)}); move it away, with the "
            "runs beside it, to measure again"
        ) from None
    return stored
