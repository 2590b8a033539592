"""During training: what a run's conflicts.jsonl says of the groups' gradients.

Early on all groups mend the same coarse errors, and a conflict shows later if at all. So training
is cut into periods, and each pair of groups is judged in each, by the sign of its mean cosine:
noise makes cosines small, but does not turn them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from octolike.evaluation.transfer.group_comparison import no_nan
from octolike.train import conflicts, metrics

WINDOWS = 20  # points of the curves over training, at most
PERIODS, FEWEST = 3, 8  # that training is cut into, at most; comparisons in one, at least
LEVEL = 0.05  # of finding any conflict in a run where there is none; half of it is below zero


@dataclass(frozen=True, eq=False)
class GradientPeriod:
    """The comparisons of a part of training, from the first step to the last.

    cosine, low, high: [G, G], mean with an interval that is as much wider as there are pairs and
    periods to be wrong about.
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
        return no_nan({**steps, **arrays})


@dataclass(frozen=True)
class GradientConflict:
    """Two groups whose gradients pull against one another in a period."""

    a: str
    b: str
    first: int
    last: int
    cosine: float
    low: float
    high: float

    @property
    def sentence(self) -> str:
        """Name the groups, when, and how much."""
        return (
            f"{self.a} and {self.b} from step {self.first:,} to {self.last:,} (cosine "
            f"{self.cosine:+.2f} [{self.low:+.2f}, {self.high:+.2f}])"
        )


@dataclass(frozen=True, eq=False)
class GradientSummary:
    """The comparisons of the runs of one variant, C in all.

    groups: G names; cosine: [G, G], means over all comparisons; periods: the same by period, and
    judged; within: [G], the cosine that two batches of one group would have, each as large as the
    one compared, by those of its halves (`of_wholes`); rate: share of conflicting pairs, over all
    comparisons; modules: {module: (mean cosine of the pairs, conflict rate)}; curve: [n, 3], step,
    mean cosine of the pairs, conflict rate; cost: a comparison's time as multiples of a step, NaN
    where the log does not tell; NaN: never both in a batch.
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
        """Return the pairs and periods whose interval lies below zero, the worst first."""
        found = [
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
        return sorted(found, key=lambda x: x.cosine)

    def to_json(self) -> dict[str, Any]:
        """Return plain data for report.json."""
        return no_nan(
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


def read(variant: str, runs: Sequence[Path]) -> GradientSummary | None:
    """Return what the runs of a variant have noted; None where none has.

    Raises ValueError where two of them compare other groups.
    """
    noted = [(run, rows) for run in runs if (rows := conflicts.read(run))]
    if not noted:
        return None
    groups = [tuple(rows[0]["groups"]) for _, rows in noted]
    for run, names in zip(noted, groups, strict=True):
        if names != groups[0]:
            raise ValueError(
                f"{run[0]} compares the gradients of {names}, {noted[0][0]} those of {groups[0]}; "
                "runs of one variant must have the same mix"
            )
    rows = [row for _, mine in noted for row in mine]
    costs = [cost(mine, metrics.read(run / metrics.FILE)) for run, mine in noted]
    known = [c for c in costs if np.isfinite(c)]
    return summarize(variant, groups[0], rows, float(np.median(known)) if known else np.nan)


def summarize(
    variant: str, groups: Sequence[str], rows: Sequence[Mapping[str, Any]], cost: float
) -> GradientSummary:
    """Return the summary of comparisons (rows of conflicts.jsonl)."""
    matrices = np.array([row["cosine"] for row in rows], np.float64)  # None becomes NaN
    pair = np.triu_indices(len(groups), 1)
    pairs = matrices[:, *pair]  # [C, pairs]
    modules = {}
    for name in rows[0]["modules"]:
        mine = np.array([row["modules"][name]["cosine"] for row in rows], np.float64)[:, *pair]
        if np.isfinite(mine).any():
            modules[name] = float(np.nanmean(mine)), _rate(mine)
    order = np.argsort([row["step"] for row in rows], kind="stable")
    chunks = [c for c in np.array_split(order, min(WINDOWS, len(rows))) if len(c)]
    steps = np.array([row["step"] for row in rows], np.float64)
    curve = [(steps[c].mean(), _mean(pairs[c]), _rate(pairs[c])) for c in chunks]
    within = of_wholes(interval(np.array([row["within"] for row in rows], np.float64))[0])
    count = max(1, min(PERIODS, len(rows) // FEWEST))
    tests = count * len(pairs[0])
    periods = [
        period([rows[i] for i in part], tests) for part in np.array_split(order, count) if len(part)
    ]
    return GradientSummary(
        variant=variant,
        groups=tuple(groups),
        comparisons=len(rows),
        cosine=interval(matrices)[0],
        periods=tuple(periods),
        within=within,
        rate=_rate(pairs),
        modules=modules,
        curve=np.array(curve),
        cost=cost,
    )


def of_wholes(halves: np.ndarray) -> np.ndarray:
    """Return the cosine of wholes whose halves agree so: by Spearman and Brown, 2 r / (1 + r).

    Half of the examples are noisier, so halves of one group agree less than two groups that pull
    the same way. Below zero there is nothing but noise, and a cosine stays as it is.
    """
    return np.where(halves > 0, 2 * halves / (1 + np.maximum(halves, 0)), halves)


def period(rows: Sequence[Mapping[str, Any]], tests: int) -> GradientPeriod:
    """Return what the comparisons of a period say, as one of so many tests."""
    steps = [row["step"] for row in rows]
    found = interval(np.array([row["cosine"] for row in rows], np.float64), tests)
    return GradientPeriod(min(steps), max(steps), len(rows), *found)


def interval(values: np.ndarray, tests: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the mean over the first axis and its interval, NaN entries aside.

    95 %, or as much more as so many tests at once need. Comparisons are many steps apart and of
    other examples, and so taken as independent.
    """
    known = np.isfinite(values)
    count = known.sum(axis=0)
    safe = np.maximum(count, 1)
    mean = np.where(count > 0, np.where(known, values, 0).sum(axis=0) / safe, np.nan)
    square = np.where(known, np.square(values - mean), 0).sum(axis=0)
    error = np.sqrt(square / np.maximum(count - 1, 1) / safe)
    z = stats.t.ppf(1 - LEVEL / 2 / tests, np.maximum(count - 1, 1))
    half = np.where(count > 1, z * error, np.inf)
    return mean, mean - half, mean + half


def cost(rows: Sequence[Mapping[str, Any]], log: Sequence[Mapping[str, Any]]) -> float:
    """Return the median time of a comparison over that of a step; NaN where it is not known.

    rows: of conflicts.jsonl; log: of metrics.jsonl. The time between two rows of the log, less the
    comparisons in between, is that of its steps.
    """
    at = [(r["step"], r["seconds"]) for r in log if "loss" in r]
    steps = []
    for (a, start), (b, end) in itertools.pairwise(at):
        compared = sum(r["seconds"] for r in rows if a <= r["step"] < b)
        if b > a and end - start > compared:
            steps.append((end - start - compared) / (b - a))
    if not steps or not rows:
        return float("nan")
    return float(np.median([r["seconds"] for r in rows]) / np.median(steps))


def _pairs(count: int) -> list[tuple[int, int]]:
    return list(zip(*np.triu_indices(count, 1), strict=True))


def _rate(pairs: np.ndarray) -> float:
    known = pairs[np.isfinite(pairs)]
    return float((known < 0).mean()) if len(known) else float("nan")


def _mean(pairs: np.ndarray) -> float:
    known = pairs[np.isfinite(pairs)]
    return float(known.mean()) if len(known) else float("nan")
