"""During training: what a run's conflicts.jsonl says of the groups' gradients."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from octolike.evaluation.success import Z
from octolike.evaluation.transfer.before import no_nan
from octolike.train import conflicts, metrics

WINDOWS = 20  # points of the curves over training, at most


@dataclass(frozen=True, eq=False)
class Gradients:
    """The comparisons of the runs of one variant, C in all.

    groups: G names; cosine, low, high: [G, G], means over the comparisons with 95 % intervals;
    within: [G], the mean cosine of two halves of one group; rate: share of conflicting pairs, over
    all comparisons; modules: {module: (mean cosine of the pairs, conflict rate)}; curve: [n, 3],
    step, mean cosine of the pairs, conflict rate; cost: a comparison's time as multiples of a step,
    NaN where the log does not tell; NaN: never both in a batch.
    """

    variant: str
    groups: tuple[str, ...]
    comparisons: int
    cosine: np.ndarray
    low: np.ndarray
    high: np.ndarray
    within: np.ndarray
    rate: float
    modules: Mapping[str, tuple[float, float]]
    curve: np.ndarray
    cost: float

    def conflicting(self) -> list[tuple[str, str, float]]:
        """Return (a, b, cosine) of the pairs whose interval lies below zero, the worst first."""
        pairs = zip(*np.triu_indices(len(self.groups), 1), strict=True)
        found = [
            (self.groups[i], self.groups[j], float(self.cosine[i, j]))
            for i, j in pairs
            if self.high[i, j] < 0
        ]
        return sorted(found, key=lambda x: x[2])

    def to_json(self) -> dict[str, Any]:
        """Return plain data for report.json."""
        return no_nan(
            {
                "variant": self.variant,
                "groups": self.groups,
                "comparisons": self.comparisons,
                "cosine": self.cosine.tolist(),
                "low": self.low.tolist(),
                "high": self.high.tolist(),
                "within": self.within.tolist(),
                "conflict_rate": self.rate,
                "modules": {
                    k: {"cosine": c, "conflict_rate": r} for k, (c, r) in self.modules.items()
                },
                "curve": self.curve.tolist(),
                "cost_in_steps": self.cost,
            }
        )


def read(variant: str, runs: Sequence[Path]) -> Gradients | None:
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
) -> Gradients:
    """Return the summary of comparisons (rows of conflicts.jsonl)."""
    matrices = np.array([row["cosine"] for row in rows], np.float64)  # None becomes NaN
    mean, low, high = interval(matrices)
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
    within = interval(np.array([row["within"] for row in rows], np.float64))[0]
    return Gradients(
        variant=variant,
        groups=tuple(groups),
        comparisons=len(rows),
        cosine=mean,
        low=low,
        high=high,
        within=within,
        rate=_rate(pairs),
        modules=modules,
        curve=np.array(curve),
        cost=cost,
    )


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the mean over the first axis and its 95 % interval, NaN entries aside.

    Comparisons are many steps apart and of other examples, and so taken as independent.
    """
    known = np.isfinite(values)
    count = known.sum(axis=0)
    safe = np.maximum(count, 1)
    mean = np.where(count > 0, np.where(known, values, 0).sum(axis=0) / safe, np.nan)
    square = np.where(known, np.square(values - mean), 0).sum(axis=0)
    error = np.sqrt(square / np.maximum(count - 1, 1) / safe)
    half = np.where(count > 1, Z * error, np.inf)
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


def _rate(pairs: np.ndarray) -> float:
    known = pairs[np.isfinite(pairs)]
    return float((known < 0).mean()) if len(known) else float("nan")


def _mean(pairs: np.ndarray) -> float:
    known = pairs[np.isfinite(pairs)]
    return float(known.mean()) if len(known) else float("nan")
