"""Runs that differ in one setting, side by side: success over seeds, and what it cost.

A comparison is a directory of evaluated runs named <variant>-<seed>. Episodes have the same seeds
in every run, so all policies meet the same tables.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from octolike.evaluation import figures
from octolike.evaluation.success import Rate, count
from octolike.train import metrics
from octolike.train.checkpoint import COSTS

RESULTS = "evaluation/results.jsonl"


@dataclass(frozen=True)
class Entry:
    """One variant over its seeds.

    success: {split: one Rate per seed}; action_error: per seed, in normalised units;
    step_seconds: per seed, the median over the run; parameters, flops (per step): None where an
    older run did not write them.
    """

    variant: str
    success: dict[str, tuple[Rate, ...]]
    action_error: tuple[float, ...]
    step_seconds: tuple[float, ...]
    parameters: int | None
    flops: float | None

    def pooled(self, split: str) -> Rate:
        """Return the rate over all seeds' episodes."""
        rates = self.success.get(split, ())
        return Rate(sum(r.successes for r in rates), sum(r.episodes for r in rates))


def read(directory: str | Path) -> list[Entry]:
    """Return the variants of a comparison, in alphabetical order, those with results alone.

    Raises FileNotFoundError where there is no evaluated run.
    """
    variants: dict[str, list[Path]] = {}
    for run in sorted(Path(directory).glob("*-*")):
        if (run / RESULTS).exists():
            variants.setdefault(run.name.rpartition("-")[0], []).append(run)
    if not variants:
        raise FileNotFoundError(
            f"{directory} holds no evaluated run <variant>-<seed>/{RESULTS}; make them with "
            "scripts/compare.py"
        )
    return [_entry(name, runs) for name, runs in variants.items()]


def table(entries: Sequence[Entry], first: str = "") -> str:
    """Return a Markdown table, the variant `first` on top, then by success on the first split.

    A cell is the share over all seeds, its Wilson 95 % interval, and the lowest and highest seed.
    """
    splits = list(dict.fromkeys(s for e in entries for s in e.success))
    head = ["variant", "seeds", *map(figures.split_name, splits)]
    head += ["action error", "parameters", "GFLOP/step", "ms/step"]
    rows = [head, ["---"] * len(head)]
    for e in ordered(entries, first):
        rows.append(
            [
                e.variant,
                str(len(e.action_error)),
                *(_cell(e, split) for split in splits),
                f"{np.mean(e.action_error):.3f}",
                f"{e.parameters / 1e6:.2f} M" if e.parameters else "–",
                f"{e.flops / 1e9:.2f}" if e.flops else "–",
                f"{1e3 * np.median(e.step_seconds):.0f}",
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def ordered(entries: Sequence[Entry], first: str = "") -> list[Entry]:
    """Return the entries, `first` on top, then the most successful ones."""
    split = next(iter(entries[0].success))
    return sorted(entries, key=lambda e: (e.variant != first, -e.pooled(split).rate))


def draw(entries: Sequence[Entry], path: Path, first: str = "") -> Path:
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


def _entry(variant: str, runs: Sequence[Path]) -> Entry:
    success: dict[str, list[Rate]] = {}
    errors, seconds, costs = [], [], {}
    for run in runs:
        lines = (run / RESULTS).read_text(encoding="utf-8").splitlines()[1:]
        rows = [r for r in map(json.loads, lines) if r["policy"] == "trained"]
        for split in dict.fromkeys(r["split"] for r in rows):
            success.setdefault(split, []).append(count(rows, split=split))
        log = metrics.read(run / metrics.FILE)
        found = [v for r in log for k, v in r.items() if k.endswith("/action_error")]
        errors.append(found[-1] if found else np.nan)
        at = np.array([(r["step"], r["seconds"]) for r in log if "loss" in r])
        seconds.append(float(np.median(np.diff(at[:, 1]) / np.diff(at[:, 0]))))
        if (run / COSTS).exists():
            costs = json.loads((run / COSTS).read_text(encoding="utf-8"))
    return Entry(
        variant,
        {split: tuple(rates) for split, rates in success.items()},
        tuple(errors),
        tuple(seconds),
        costs.get("parameters"),
        costs.get("flops_per_step"),
    )


def _cell(entry: Entry, split: str) -> str:
    rates = entry.success.get(split, ())
    if not rates:
        return "–"
    pooled, seeds = entry.pooled(split), [r.rate for r in rates]
    low, high = pooled.interval
    spread = f"; seeds {min(seeds):.0%} to {max(seeds):.0%}" if len(seeds) > 1 else ""
    return f"{pooled.rate:.0%} [{low:.0%}, {high:.0%}]{spread}".replace("%", " %")
