"""Runs that differ in one setting, side by side: success over seeds, and what it cost.

A comparison is a directory of evaluated runs named <variant>-<seed>. Episodes have the same seeds
in every run, so all policies meet the same tables.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from octolike.evaluation import figures, outcomes
from octolike.evaluation.success import SuccessRate, count
from octolike.train import metrics
from octolike.train.checkpoint import COSTS


@dataclass(frozen=True)
class VariantSummary:
    """One variant over its seeds.

    success: {split: one rate per seed}; "robot: split" for runs with several robots;
    action_error: per seed, in normalised units; step_seconds: per seed, the median over the run;
    parameters, flops (per step): None where an older run did not write them; skills:
    {skill: rate over all seeds} on the first split; missing: episodes that crashed or were not run.
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
        """Return the rate over all seeds' episodes."""
        rates = self.success.get(split, ())
        return SuccessRate(sum(r.successes for r in rates), sum(r.episodes for r in rates))

    @property
    def worst(self) -> str:
        """The skill with the lowest rate; "" where nothing is known."""
        return min(self.skills, key=lambda s: self.skills[s].rate, default="")

    @property
    def mean(self) -> float:
        """The mean over skills, each counting the same; NaN where nothing is known."""
        return float(np.mean([r.rate for r in self.skills.values()])) if self.skills else np.nan


def read(directory: str | Path) -> list[VariantSummary]:
    """Return the variants of a comparison, in alphabetical order, those with results alone.

    Episodes are those of the runs' own settings (`outcomes`). Raises FileNotFoundError where there
    is no evaluated run.
    """
    variants: dict[str, list[Path]] = {}
    for run in sorted(Path(directory).glob("*-*")):
        if outcomes.files(run):
            variants.setdefault(run.name.rpartition("-")[0], []).append(run)
    if not variants:
        raise FileNotFoundError(
            f"{directory} holds no evaluated run <variant>-<seed>/{outcomes.RESULTS}; make them "
            "with scripts/compare.py"
        )
    # A run with one robot stands beside those with several under the name of its robot.
    several = any("" not in outcomes.files(run) for runs in variants.values() for run in runs)
    return [_entry(name, runs, several) for name, runs in variants.items()]


def table(entries: Sequence[VariantSummary], first: str = "") -> str:
    """Return a Markdown table, the variant `first` on top, then by success on the first split.

    A cell is the share over all seeds, its Wilson 95 % interval, and the lowest and highest seed.
    Several skills have columns of their own, on the first split, as have the worst and their mean.
    """
    splits = list(dict.fromkeys(s for e in entries for s in e.success))
    skills = list(dict.fromkeys(s for e in entries for s in e.skills))
    skills = skills if len(skills) > 1 else []
    head = ["variant", "seeds", *map(figures.split_name, splits), *skills]
    head += ["worst skill", "mean over skills"] if skills else []
    head += ["action error", "parameters", "GFLOP/step", "ms/step"]
    rows = [head, ["---"] * len(head)]
    for e in ordered(entries, first):
        rows.append(
            [
                e.variant,
                str(len(e.action_error)),
                *(_cell(e, split) for split in splits),
                *(_skill_cells(e, skills) if skills else ()),
                f"{np.mean(e.action_error):.3f}",
                f"{e.parameters / 1e6:.2f} M" if e.parameters else "–",
                f"{e.flops / 1e9:.2f}" if e.flops else "–",
                f"{1e3 * np.median(e.step_seconds):.0f}",
            ]
        )
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lacking = [f"{e.variant} {e.missing}" for e in entries if e.missing]
    if lacking:
        lines += ["", f"Episodes that crashed or were not run: {', '.join(lacking)}."]
    return "\n".join(lines)


def ordered(entries: Sequence[VariantSummary], first: str = "") -> list[VariantSummary]:
    """Return the entries, `first` on top, then the most successful ones."""
    split = next(iter(entries[0].success))
    return sorted(entries, key=lambda e: (e.variant != first, -e.pooled(split).rate))


def draw(entries: Sequence[VariantSummary], path: Path, first: str = "") -> Path:
    """Draw success per variant and split, with intervals and one dot per seed; return the path."""
    entries = ordered(entries, first)
    splits = list(dict.fromkeys(s for e in entries for s in e.success))
    figure, (axis,) = figures.new(9, 0.42 * len(entries) * len(splits) / 2 + 1.2, 1)
    height = 0.8 / len(splits)
    for i, split in enumerate(splits):
        y = np.arange(len(entries)) + (i - (len(splits) - 1) / 2) * height
        rates = [e.pooled(split) for e in entries]
        low, high = np.array([r.interval for r in rates]).T
        share = np.array([r.rate for r in rates])
        known = np.isfinite(share)
        colour = figures.split_colour(split, i)
        axis.barh(y[known], share[known], height, color=colour, label=figures.split_name(split))
        errors = np.stack([share - low, high - share])[:, known]
        axis.errorbar(
            share[known], y[known], xerr=errors, fmt="none", ecolor=figures.INK, elinewidth=0.8
        )
        for row, entry in zip(y, entries, strict=True):
            dots = [r.rate for r in entry.success.get(split, ())]
            axis.plot(dots, [row] * len(dots), ".", color=figures.INK, markersize=4)
    axis.set_yticks(np.arange(len(entries)), [e.variant for e in entries])
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.set_xlabel("success; bar: all seeds, line: 95 % interval, dots: single seeds")
    axis.legend(loc="lower right")
    return figures.save(figure, path)


def _plain(split: str) -> str:
    """Return a split without its robot."""
    return split.rpartition(": ")[2]


def _entry(variant: str, runs: Sequence[Path], several: bool) -> VariantSummary:
    success: dict[str, list[SuccessRate]] = {}
    errors, seconds, costs = [], [], {}
    first: list[dict[str, Any]] = []
    missing = 0
    for run in runs:
        rows = []
        for found in outcomes.read(run):  # with several robots, splits name theirs
            robot = f"{found.robot}: " if several else ""
            rows += [row | {"split": f"{robot}{row['split']}"} for row in found.rows]
            missing += found.missing
        for split in dict.fromkeys(r["split"] for r in rows):
            success.setdefault(split, []).append(count(rows, split=split))
        first += [r for r in rows if _plain(r["split"]) == _plain(rows[0]["split"])]
        log = metrics.read(run / metrics.FILE)
        known = [v for r in log for k, v in r.items() if k.endswith("/action_error")]
        errors.append(known[-1] if known else np.nan)
        at = np.array([(r["step"], r["seconds"]) for r in log if "loss" in r])
        seconds.append(float(np.median(np.diff(at[:, 1]) / np.diff(at[:, 0]))))
        if (run / COSTS).exists():
            costs = json.loads((run / COSTS).read_text(encoding="utf-8"))
    return VariantSummary(
        variant,
        {split: tuple(rates) for split, rates in success.items()},
        tuple(errors),
        tuple(seconds),
        costs.get("parameters"),
        costs.get("flops_per_step"),
        {s: count(first, skill=s) for s in dict.fromkeys(r["skill"] for r in first)},
        missing,
    )


def _skill_cells(entry: VariantSummary, skills: Sequence[str]) -> list[str]:
    """Return the cells of each skill, of the worst one, and of the mean."""
    cells = [_rate_cell(entry.skills[s]) if s in entry.skills else "–" for s in skills]
    worst = f"{entry.worst} {entry.skills[entry.worst].rate:.0%}" if entry.worst else "–"
    return [*cells, worst.replace("%", " %"), f"{entry.mean:.0%}".replace("%", " %")]


def _rate_cell(rate: SuccessRate) -> str:
    low, high = rate.interval
    return f"{rate.rate:.0%} [{low:.0%}, {high:.0%}]".replace("%", " %")


def _cell(entry: VariantSummary, split: str) -> str:
    rates = entry.success.get(split, ())
    if not rates:
        return "–"
    pooled, seeds = entry.pooled(split), [r.rate for r in rates]
    spread = f"; seeds {min(seeds):.0%} to {max(seeds):.0%}" if len(seeds) > 1 else ""
    return _rate_cell(pooled) + spread.replace("%", " %")
