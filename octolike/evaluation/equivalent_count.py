"""How many demonstrations alone a recipe with other data is worth: against a measured curve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize

from octolike.evaluation.statistics import (
    Difference,
    OutcomeGrid,
    SeedEffect,
    paired_difference,
    seed_effect,
)

_POINTS_PER_COUNT = 16  # steps of a curve from one count to the next: 4 % if the count doubles


@dataclass(frozen=True)
class EquivalentCount:
    """The number on a curve at which it succeeds as often as a recipe, with a 95 % interval.

    A value or bound beyond the measured counts is 0 (fewer than the smallest) or inf (more than
    the largest).
    """

    value: float
    low: float
    high: float


def equivalent_count(
    recipe: OutcomeGrid, curve: Mapping[int, OutcomeGrid], seeds: SeedEffect | None = None
) -> EquivalentCount:
    """Return the number of demonstrations alone that a recipe with other data is worth.

    Between two measured counts, the curve's outcomes are interpolated scene by scene over the
    logarithm of the count. The interval holds every count whose interpolated rate does not differ
    from the recipe's (`paired_difference`, 5 %), and those between. The value is where the curve,
    made monotone by isotonic regression, reaches the recipe's rate.

    Args:
        recipe: the outcomes of the recipe.
        curve: {count: outcomes}, at least two counts, with as many seeds at each.
        seeds: the effect pooled over all recipes of the study; default: of these alone.

    Raises:
        ValueError: the curve has fewer than two counts, or other seeds at some of them.
    """
    counts = sorted(curve)
    if len(counts) < 2 or len({len(curve[n].outcomes) for n in counts}) > 1:
        raise ValueError(
            f"a curve over {counts} demonstrations with "
            f"{[len(curve[n].outcomes) for n in counts]} seeds; expected at least two counts, and "
            "the same number of seeds at each"
        )
    effect = seed_effect([recipe, *curve.values()]) if seeds is None else seeds
    between = np.geomspace(counts[0], counts[-1], 1 + _POINTS_PER_COUNT * (len(counts) - 1))
    differences = [
        paired_difference(recipe, _interpolated(curve, counts, x), effect) for x in between
    ]
    equal = [x for x, d in zip(between, differences, strict=True) if d.low <= 0 <= d.high]
    low, high = (equal[0], equal[-1]) if equal else _crossing(between, differences)
    low = 0.0 if low == between[0] else float(low)
    high = math.inf if high == between[-1] else float(high)

    rates = optimize.isotonic_regression([curve[n].rate for n in counts]).x
    if recipe.rate < rates[0]:
        value = 0.0
    elif recipe.rate > rates[-1]:
        value = math.inf
    else:
        rising = np.interp(np.log(between), np.log(counts), rates)
        value = float(between[int(np.argmax(rising >= recipe.rate - 1e-12))])
    return EquivalentCount(value, min(low, value), max(high, value))


def _interpolated(
    curve: Mapping[int, OutcomeGrid], counts: Sequence[int], count: float
) -> OutcomeGrid:
    """Return the outcomes at a count between two measured ones, over their common scenes."""
    i = min(max(int(np.searchsorted(counts, count)), 1), len(counts) - 1)
    below, above = counts[i - 1], counts[i]
    share = math.log(count / below) / math.log(above / below)
    met = set(curve[above].scenes)
    common = [x for x in curve[below].scenes if x in met]
    a, b = curve[below].select(common), curve[above].select(common)
    outcomes = (1 - share) * a.outcomes + share * b.outcomes
    return OutcomeGrid(outcomes, a.scenes, a.strata)


def _crossing(counts: np.ndarray, differences: Sequence[Difference]) -> tuple[float, float]:
    """Return the bounds if the recipe differs from the curve at every count that was tried."""
    if differences[-1].value > 0:
        return float(counts[-1]), math.inf
    if differences[0].value < 0:
        return 0.0, float(counts[0])
    last = max(i for i, d in enumerate(differences) if d.value > 0)
    return float(counts[last]), float(counts[last + 1])
