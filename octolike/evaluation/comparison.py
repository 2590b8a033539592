"""Compare runs that differ in one setting: success over seeds, and cost.

A comparison is a directory of evaluated runs named <variant>-<seed>. Episode seeds are the same in
every run, so all policies meet the same scenes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from octolike.evaluation import figures, outcomes
from octolike.evaluation.success import SuccessRate, split_name, success_rate
from octolike.tables import markdown_table
from octolike.train import metrics
from octolike.train.checkpoint import COSTS


@dataclass(frozen=True)
class VariantSummary:
    """One variant, summarised over its seeds.

    success: {split: one rate per seed}, with keys "robot: split" if any run has several robots;
    action_error: per seed, in normalised units; step_seconds: per seed, the median of the run;
    parameters, flops (per step): None for older runs without that record; skills: {skill: rate
    over all seeds} on the first split; missing: number of episodes that crashed or were not run.
    """

    variant: str
    success: dict[str, tuple[SuccessRate, ...]]
    action_error: tuple[float, ...]
    step_seconds: tuple[float, ...]
    parameters: int | None
    flops: float | None
    skills: dict[str, SuccessRate] = field(default_factory=dict)
    missing: int = 0

    def pooled(self, split: str) -> SuccessRate:
        """Return the rate over the episodes of all seeds."""
        rates = self.success.get(split, ())
        return SuccessRate(sum(r.successes for r in rates), sum(r.episodes for r in rates))

    @property
    def worst(self) -> str:
        """The skill with the lowest rate; "" without any."""
        return min(self.skills, key=lambda s: self.skills[s].rate, default="")

    @property
    def mean(self) -> float:
        """The mean rate over skills, each with the same weight; NaN without any."""
        return float(np.mean([r.rate for r in self.skills.values()])) if self.skills else np.nan


def read(directory: str | Path) -> list[VariantSummary]:
    """Return the evaluated variants of a comparison in alphabetical order.

    Only episodes of the runs' own settings count (`outcomes`). Raises FileNotFoundError without
    any evaluated run.
    """
    variants: dict[str, list[Path]] = {}
    for run in sorted(Path(directory).glob("*-*")):
        if outcomes.result_files(run):
            variants.setdefault(run.name.rpartition("-")[0], []).append(run)
    if not variants:
        raise FileNotFoundError(
            f"{directory} contains no evaluated run <variant>-<seed>/{outcomes.RESULTS}; create "
            "them with octolike compare"
        )
    # If any run has several robots, splits carry the robot's name in all runs.
    runs = [run for variant_runs in variants.values() for run in variant_runs]
    with_robots = any("" not in outcomes.result_files(run) for run in runs)
    return [_summarize(name, runs, with_robots) for name, runs in variants.items()]


def table(summaries: Sequence[VariantSummary], first: str = "") -> str:
    """Return a Markdown table: the variant `first`, then by success on the first split.

    A cell holds the rate over all seeds, its Wilson 95 % interval, and the lowest and highest seed.
    With several skills, the table has a column per skill (on the first split), the worst skill and
    the mean over skills.
    """
    splits = list(dict.fromkeys(split for v in summaries for split in v.success))
    skills = list(dict.fromkeys(skill for v in summaries for skill in v.skills))
    skills = skills if len(skills) > 1 else []
    headers = ["variant", "seeds", *map(split_name, splits), *skills]
    headers += ["worst skill", "mean over skills"] if skills else []
    headers += ["action error", "parameters", "GFLOP/step", "ms/step"]
    rows = [
        [
            v.variant,
            len(v.action_error),
            *(_split_cell(v, split) for split in splits),
            *(_skill_cells(v, skills) if skills else ()),
            f"{np.mean(v.action_error):.3f}",
            f"{v.parameters / 1e6:.2f} M" if v.parameters else "–",
            f"{v.flops / 1e9:.2f}" if v.flops else "–",
            f"{1e3 * np.median(v.step_seconds):.0f}",
        ]
        for v in ordered(summaries, first)
    ]
    text = markdown_table(rows, headers)
    missing = [f"{v.variant} {v.missing}" for v in summaries if v.missing]
    if missing:
        text += f"\n\nEpisodes that crashed or were not run: {', '.join(missing)}."
    return text


def ordered(summaries: Sequence[VariantSummary], first: str = "") -> list[VariantSummary]:
    """Return the variant `first`, then the others by descending success on the first split."""
    split = next(iter(summaries[0].success))
    return sorted(summaries, key=lambda v: (v.variant != first, -v.pooled(split).rate))


def draw(summaries: Sequence[VariantSummary], path: Path, first: str = "") -> Path:
    """Draw success per variant and split, with intervals and a dot per seed; return the path."""
    summaries = ordered(summaries, first)
    splits = list(dict.fromkeys(split for v in summaries for split in v.success))
    with matplotlib.rc_context({"text.parse_math": False}):
        figure, (axis,) = figures.new(9, 0.42 * len(summaries) * len(splits) / 2 + 1.2, 1)
        height = 0.8 / len(splits)
        for i, split in enumerate(splits):
            y = np.arange(len(summaries)) + (i - (len(splits) - 1) / 2) * height
            _draw_split(axis, summaries, split, y, height, figures.split_colour(split, i))
        axis.set_yticks(np.arange(len(summaries)), [v.variant for v in summaries])
        axis.invert_yaxis()
        axis.set_xlim(0, 1)
        axis.set_xlabel("success rate; bar: all seeds, line: 95 % interval, dots: single seeds")
        axis.legend(loc="lower right")
        return figures.save(figure, path)


def _draw_split(
    axis: Any,
    summaries: Sequence[VariantSummary],
    split: str,
    y: np.ndarray,
    height: float,
    colour: str,
) -> None:
    rates = [v.pooled(split) for v in summaries]
    low, high = np.array([r.interval for r in rates]).T
    share = np.array([r.rate for r in rates])
    finite = np.isfinite(share)
    axis.barh(y[finite], share[finite], height, color=colour, label=split_name(split))
    errors = np.stack([share - low, high - share])[:, finite]
    axis.errorbar(
        share[finite], y[finite], xerr=errors, fmt="none", ecolor=figures.INK, elinewidth=0.8
    )
    for position, summary in zip(y, summaries, strict=True):
        dots = [r.rate for r in summary.success.get(split, ())]
        axis.plot(dots, [position] * len(dots), ".", color=figures.INK, markersize=4)


def _without_robot(split: str) -> str:
    return split.rpartition(": ")[2]


def _summarize(variant: str, runs: Sequence[Path], with_robots: bool) -> VariantSummary:
    success: dict[str, list[SuccessRate]] = {}
    errors, seconds, costs = [], [], {}
    first_split: list[dict[str, Any]] = []
    missing = 0
    for run in runs:
        rows = []
        for outcome in outcomes.read_outcomes(run):
            robot = f"{outcome.robot}: " if with_robots else ""
            rows += [row | {"split": f"{robot}{row['split']}"} for row in outcome.rows]
            missing += outcome.missing
        for split in dict.fromkeys(r["split"] for r in rows):
            success.setdefault(split, []).append(success_rate(rows, split=split))
        split = _without_robot(rows[0]["split"])
        first_split += [r for r in rows if _without_robot(r["split"]) == split]
        log = metrics.read(run / metrics.FILE)
        action_errors = [v for r in log for k, v in r.items() if k.endswith("/action_error")]
        errors.append(action_errors[-1] if action_errors else np.nan)
        times = np.array([(r["step"], r["seconds"]) for r in log if "loss" in r])
        seconds.append(float(np.median(np.diff(times[:, 1]) / np.diff(times[:, 0]))))
        if (run / COSTS).exists():
            costs = json.loads((run / COSTS).read_text(encoding="utf-8"))
    skills = dict.fromkeys(r["skill"] for r in first_split)
    return VariantSummary(
        variant,
        {split: tuple(rates) for split, rates in success.items()},
        tuple(errors),
        tuple(seconds),
        costs.get("parameters"),
        costs.get("flops_per_step"),
        {s: success_rate(first_split, skill=s) for s in skills},
        missing,
    )


def _skill_cells(summary: VariantSummary, skills: Sequence[str]) -> list[str]:
    """Return the cells of each skill, the worst one, and the mean."""
    cells = [_rate_cell(summary.skills[s]) if s in summary.skills else "–" for s in skills]
    worst = (
        f"{summary.worst} {_percent(summary.skills[summary.worst].rate)}" if summary.worst else "–"
    )
    return [*cells, worst, _percent(summary.mean)]


def _rate_cell(rate: SuccessRate) -> str:
    low, high = rate.interval
    return f"{_percent(rate.rate)} [{_percent(low)}, {_percent(high)}]"


def _split_cell(summary: VariantSummary, split: str) -> str:
    rates = summary.success.get(split, ())
    if not rates:
        return "–"
    seeds = [r.rate for r in rates]
    spread = f"; seeds {_percent(min(seeds))} to {_percent(max(seeds))}" if len(seeds) > 1 else ""
    return _rate_cell(summary.pooled(split)) + spread


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
