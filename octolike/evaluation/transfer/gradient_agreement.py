"""During training: agreement of the groups' gradients, from a run's conflicts.jsonl.

Early in training all groups correct the same coarse errors; conflicts appear later if at all.
Training is therefore split into periods, and each pair of groups is judged in each period by the
sign of its mean cosine: noise makes cosines smaller but does not change their sign.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from octolike.evaluation.transfer.finite_json import finite_json
from octolike.train import conflicts, metrics

MAX_POINTS = 20  # of the curves over training
MAX_PERIODS, MIN_COMPARISONS = 3, 8  # periods of training; comparisons per period
LEVEL = 0.05  # probability of any significant cosine in a run without effects; half are conflicts


@dataclass(frozen=True, eq=False)
class GradientPeriod:
    """The comparisons of a period of training, from step `first` to step `last`.

    cosine, low, high: [G, G], mean and interval, corrected for the number of pairs and periods.
    """

    first: int
    last: int
    comparisons: int
    cosine: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        arrays = {k: getattr(self, k).tolist() for k in ("cosine", "low", "high")}
        steps = {"first": self.first, "last": self.last, "comparisons": self.comparisons}
        return finite_json({**steps, **arrays})


@dataclass(frozen=True)
class GradientConflict:
    """Two groups with conflicting gradients in a period."""

    a: str
    b: str
    first: int
    last: int
    cosine: float
    low: float
    high: float

    @property
    def sentence(self) -> str:
        """The groups, the steps and the cosine."""
        return (
            f"{self.a} and {self.b} from step {self.first:,} to {self.last:,} (cosine "
            f"{self.cosine:+.2f} [{self.low:+.2f}, {self.high:+.2f}])"
        )


@dataclass(frozen=True, eq=False)
class GradientSummary:
    """The gradient comparisons of the runs of one variant.

    groups: G names; cosine: [G, G], mean over all comparisons; periods: the same per period, with
    intervals; within: [G], the expected cosine of two full batches of one group, extrapolated from
    half batches (`full_batch_cosine`); rate: share of conflicting pairs over all comparisons;
    modules: {module: (mean cosine of the pairs, conflict rate)}; curve: [n, 3], step, mean cosine
    of the pairs, conflict rate; cost: duration of a comparison in training steps, NaN if unknown.
    Cosines are NaN for groups that never shared a batch.
    """

    variant: str
    groups: tuple[str, ...]
    comparisons: int
    cosine: np.ndarray
    periods: tuple[GradientPeriod, ...]
    within: np.ndarray
    rate: float
    modules: Mapping[str, tuple[float, float]]
    curve: np.ndarray
    cost: float

    def conflicting(self) -> list[GradientConflict]:
        """Return the pairs and periods with an interval below zero, most negative first."""
        conflicting = [
            GradientConflict(
                self.groups[i],
                self.groups[j],
                p.first,
                p.last,
                *(float(x[i, j]) for x in (p.cosine, p.low, p.high)),
            )
            for p in self.periods
            for i, j in _pairs(len(self.groups))
            if p.high[i, j] < 0
        ]
        return sorted(conflicting, key=lambda x: x.cosine)

    def to_json(self) -> dict[str, Any]:
        """Return plain data for report.json."""
        return finite_json(
            {
                "variant": self.variant,
                "groups": self.groups,
                "comparisons": self.comparisons,
                "cosine": self.cosine.tolist(),
                "periods": [p.to_json() for p in self.periods],
                "within": self.within.tolist(),
                "conflict_rate": self.rate,
                "modules": {
                    k: {"cosine": c, "conflict_rate": r} for k, (c, r) in self.modules.items()
                },
                "curve": self.curve.tolist(),
                "cost_in_steps": self.cost,
            }
        )


def read_gradients(variant: str, runs: Sequence[Path]) -> GradientSummary | None:
    """Return the summary of a variant's runs; None if no run compared gradients.

    Raises ValueError if two runs compare different groups.
    """
    rows_of = {run: rows for run in runs if (rows := conflicts.read(run))}
    if not rows_of:
        return None
    groups_of = {run: tuple(rows[0]["groups"]) for run, rows in rows_of.items()}
    first, groups = next(iter(groups_of.items()))
    for run, names in groups_of.items():
        if names != groups:
            raise ValueError(
                f"{run} compares the gradients of {names}, {first} those of {groups}; runs of one "
                "variant must have the same mix"
            )
    rows = [row for run_rows in rows_of.values() for row in run_rows]
    costs = [cost_in_steps(x, metrics.read(run / metrics.FILE)) for run, x in rows_of.items()]
    finite = [c for c in costs if np.isfinite(c)]
    return summarize(variant, groups, rows, float(np.median(finite)) if finite else np.nan)


def summarize(
    variant: str, groups: Sequence[str], rows: Sequence[Mapping[str, Any]], cost: float
) -> GradientSummary:
    """Return the summary of comparisons (rows of conflicts.jsonl)."""
    matrices = np.array([row["cosine"] for row in rows], np.float64)  # None becomes NaN
    pair = np.triu_indices(len(groups), 1)
    pairs = matrices[:, *pair]  # [C, pairs]
    modules = {}
    for name in rows[0]["modules"]:
        cosines = np.array([row["modules"][name]["cosine"] for row in rows], np.float64)[:, *pair]
        if np.isfinite(cosines).any():
            modules[name] = float(np.nanmean(cosines)), _conflict_rate(cosines)
    order = np.argsort([row["step"] for row in rows], kind="stable")
    chunks = [c for c in np.array_split(order, min(MAX_POINTS, len(rows))) if len(c)]
    steps = np.array([row["step"] for row in rows], np.float64)
    curve = [(steps[c].mean(), _finite_mean(pairs[c]), _conflict_rate(pairs[c])) for c in chunks]
    within = full_batch_cosine(
        mean_interval(np.array([row["within"] for row in rows], np.float64))[0]
    )
    count = max(1, min(MAX_PERIODS, len(rows) // MIN_COMPARISONS))
    tests = count * len(pairs[0])
    periods = [
        gradient_period([rows[i] for i in indices], tests)
        for indices in np.array_split(order, count)
        if len(indices)
    ]
    return GradientSummary(
        variant=variant,
        groups=tuple(groups),
        comparisons=len(rows),
        cosine=mean_interval(matrices)[0],
        periods=tuple(periods),
        within=within,
        rate=_conflict_rate(pairs),
        modules=modules,
        curve=np.array(curve),
        cost=cost,
    )


def full_batch_cosine(halves: np.ndarray) -> np.ndarray:
    """Return the expected cosine of full batches from the cosine of half batches: 2 r / (1 + r).

    The Spearman-Brown formula: half batches are noisier, so halves of one group agree less than
    full batches of two groups with equal gradients. Cosines below zero are noise and stay.
    """
    return np.where(halves > 0, 2 * halves / (1 + np.maximum(halves, 0)), halves)


def gradient_period(rows: Sequence[Mapping[str, Any]], tests: int) -> GradientPeriod:
    """Return the summary of a period; its intervals are corrected for `tests` tests."""
    steps = [row["step"] for row in rows]
    cosines = np.array([row["cosine"] for row in rows], np.float64)
    return GradientPeriod(min(steps), max(steps), len(rows), *mean_interval(cosines, tests))


def mean_interval(values: np.ndarray, tests: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (mean, low, high) over the first axis, ignoring NaN.

    The t interval is 95 %, Bonferroni-corrected for `tests` tests. Comparisons are many steps apart
    and use different examples, so they count as independent.
    """
    finite = np.isfinite(values)
    count = finite.sum(axis=0)
    safe = np.maximum(count, 1)
    mean = np.where(count > 0, np.where(finite, values, 0).sum(axis=0) / safe, np.nan)
    square = np.where(finite, np.square(values - mean), 0).sum(axis=0)
    error = np.sqrt(square / np.maximum(count - 1, 1) / safe)
    z = stats.t.ppf(1 - LEVEL / 2 / tests, np.maximum(count - 1, 1))
    half = np.where(count > 1, z * error, np.inf)
    return mean, mean - half, mean + half


def cost_in_steps(rows: Sequence[Mapping[str, Any]], log: Sequence[Mapping[str, Any]]) -> float:
    """Return the median duration of a comparison in training steps; NaN if unknown.

    rows: rows of conflicts.jsonl; log: rows of metrics.jsonl. The duration of steps is the time
    between two rows of the log minus the comparisons in between.
    """
    times = [(r["step"], r["seconds"]) for r in log if "loss" in r]
    steps = []
    for (a, start), (b, end) in itertools.pairwise(times):
        compared = sum(r["seconds"] for r in rows if a <= r["step"] < b)
        if b > a and end - start > compared:
            steps.append((end - start - compared) / (b - a))
    if not steps or not rows:
        return float("nan")
    return float(np.median([r["seconds"] for r in rows]) / np.median(steps))


def _pairs(count: int) -> list[tuple[int, int]]:
    return list(zip(*np.triu_indices(count, 1), strict=True))


def _conflict_rate(cosines: np.ndarray) -> float:
    finite = cosines[np.isfinite(cosines)]
    return float((finite < 0).mean()) if len(finite) else float("nan")


def _finite_mean(cosines: np.ndarray) -> float:
    finite = cosines[np.isfinite(cosines)]
    return float(finite.mean()) if len(finite) else float("nan")
