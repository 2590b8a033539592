"""Intervals and tests for success rates over training seeds and scenes.

Success is measured on a grid. A row is one trained policy (a training seed), a column is one scene
(the start of an episode, with its task), a cell is 1 or 0. Policies that are compared meet the same
scenes.

                  scene 1   2   3   4 …
    seed 0              1   0   1   1        two seeds of a variant differ more than chance
    seed 1              0   0   1   1        allows, and some scenes are hard for every policy:
    seed 2              1   0   0   1        neither rows nor columns are independent episodes

The questions, in the order of this file:

 1. How often does one policy succeed? `wilson_interval`; two independent groups of episodes:
    `rate_difference`. They hold for this policy, not for the recipe that trained it.
 2. How often does a recipe succeed? `recipe_rate`: seeds and scenes are crossed random effects.
 3. Which of two recipes, or of two policies, is better? `paired_difference`: scene by scene. One
    recipe on two splits: `split_difference`. For other measures than success, one value per seed:
    `seed_difference`.
 4. Which of many? `holm` adjusts the p-values of a table, `compact_letters` writes them into it.
 5. Are two equal? `is_equivalent`: the whole 90 % interval lies within a margin.

Studies ask further questions with these answers: which difference they can detect, and whether they
may stop (`study_design`), and how many demonstrations a recipe is worth (`equivalent_count`).
`tests/test_statistics.py` simulates the coverage of every interval and the rate of false alarms.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

LEVEL = 0.05  # all intervals are 95 %
Z = float(stats.norm.isf(LEVEL / 2))
_PAIRED = "same scenes"  # start of the method of a paired difference

# 1. one policy


def wilson_interval(successes: float, episodes: float, z: float = Z) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion, 95 % by default; (0, 1) without episodes.

    Wilson (1927). Unlike the normal approximation it is valid at 0 and 1 and for few episodes.
    """
    if not 0 <= successes <= episodes:
        raise ValueError(f"{successes} successes of {episodes} episodes is impossible")
    if not episodes:
        return 0.0, 1.0
    p, n = successes / episodes, episodes
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    # At 0 and 1 the bounds are exact; rounding must not move them past the rate.
    low = 0.0 if successes == 0 else max(0.0, middle - half)
    high = 1.0 if successes == episodes else min(1.0, middle + half)
    return low, high


@dataclass(frozen=True)
class SuccessRate:
    """`successes` out of `episodes`, with a Wilson 95 % interval.

    `crashed` episodes have no outcome and are not part of `episodes`.
    """

    successes: int
    episodes: int
    crashed: int = 0

    @property
    def rate(self) -> float:
        """The share of successes; NaN without episodes."""
        return self.successes / self.episodes if self.episodes else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The Wilson 95 % confidence interval."""
        return wilson_interval(self.successes, self.episodes)

    def to_json(self) -> dict[str, Any]:
        """Return plain data for report.json."""
        low, high = self.interval
        return {
            "successes": self.successes,
            "episodes": self.episodes,
            "crashed": self.crashed,
            "rate": self.rate if self.episodes else None,
            "low": low,
            "high": high,
        }


@dataclass(frozen=True)
class Difference:
    """A difference of two rates with its 95 % interval and two-sided p-value.

    method: the interval and the test, for the reader. NaN if one side has no outcome. left_out: the
    number of scenes without an outcome on both sides, if scenes were paired.
    """

    value: float
    low: float
    high: float
    p: float
    method: str
    left_out: int = 0

    @property
    def is_paired(self) -> bool:
        """Whether both sides met the same scenes."""
        return self.method.startswith(_PAIRED)

    @property
    def is_positive(self) -> bool:
        """Whether it is above zero beyond chance, without adjustment for other comparisons."""
        return self.p < LEVEL and self.value > 0

    def to_json(self) -> dict[str, Any]:
        """Return plain data for report.json."""
        numbers = {"difference": self.value, "low": self.low, "high": self.high, "p": self.p}
        finite = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
        return finite | {"method": self.method, "scenes_left_out": self.left_out}


def left_out_note(scenes: int) -> str:
    """Return the number of scenes that a paired comparison leaves out, in words; "" for none."""
    plural = "" if scenes == 1 else "s"
    return f"{scenes} scene{plural} left out, as a side has no outcome there" if scenes else ""


def rate_difference(a: SuccessRate, b: SuccessRate) -> Difference:
    """Return a − b for independent episodes: Newcombe's interval (1998) and Fisher's exact test."""
    (low_a, high_a), (low_b, high_b) = a.interval, b.interval
    d = a.rate - b.rate
    low = d - math.hypot(a.rate - low_a, high_b - b.rate)
    high = d + math.hypot(high_a - a.rate, b.rate - low_b)
    table = [[r.successes, r.episodes - r.successes] for r in (a, b)]
    p = float(stats.fisher_exact(table).pvalue)
    return Difference(d, low, high, p, "independent episodes: Newcombe's interval, Fisher's test")


# 2. a recipe: seeds and scenes are crossed


@dataclass(frozen=True)
class OutcomeGrid:
    """The outcomes of a recipe: float [seeds S, scenes N], 1 for success, 0 for failure.

    scenes: a key per column; policies met equal scenes under equal keys. strata: a name per column,
    such as its skill; the choice of strata is fixed, so differences between them are not noise.
    incomplete: keys of the scenes without an outcome for every seed (crashed or missing episodes),
    which have no column.
    """

    outcomes: np.ndarray
    scenes: tuple[Hashable, ...]
    strata: tuple[str, ...]
    incomplete: tuple[Hashable, ...] = ()

    @classmethod
    def from_seeds(
        cls, seeds: Sequence[Mapping[Any, bool | None]], strata: Mapping[Any, str]
    ) -> OutcomeGrid:
        """Return the grid of {scene: success or None} per seed, over the scenes of all seeds."""
        scenes = dict.fromkeys(scene for seed in seeds for scene in seed)
        complete = tuple(x for x in scenes if all(s.get(x) is not None for s in seeds))
        incomplete = tuple(scenes.keys() - set(complete))
        outcomes = np.array([[float(bool(s[x])) for x in complete] for s in seeds])
        outcomes = outcomes.reshape(len(seeds), len(complete))
        names = tuple(strata[x] for x in complete)
        return cls(outcomes, complete, names, incomplete)

    @property
    def left_out(self) -> int:
        """The number of scenes without an outcome for every seed."""
        return len(self.incomplete)

    @property
    def rate(self) -> float:
        """The mean over seeds and scenes; NaN without any."""
        return float(self.outcomes.mean()) if self.outcomes.size else math.nan

    def of_strata(self, names: Collection[str]) -> OutcomeGrid:
        """Return the columns of the named strata."""
        scenes = zip(self.scenes, self.strata, strict=True)
        return self.select([scene for scene, stratum in scenes if stratum in names])

    def select(self, scenes: Iterable[Hashable]) -> OutcomeGrid:
        """Return the columns of the given scenes, in their order."""
        column = {x: i for i, x in enumerate(self.scenes)}
        chosen = [column[x] for x in scenes]
        strata = tuple(self.strata[i] for i in chosen)
        return OutcomeGrid(self.outcomes[:, chosen], tuple(scenes), strata, self.incomplete)


@dataclass(frozen=True)
class SeedEffect:
    """The training seed's share of an outcome's variance, pooled over recipes.

    In shares of p (1 − p), the variance of an outcome, which shrinks towards 0 % and 100 %.

    excess: the seed's share, an unbiased estimate that can be negative. residual: the share that
    neither seed nor scene explains. freedom: degrees of freedom, 0 if no recipe has two seeds;
    recipes near 0 and 100 % say little of the share and add little (Satterthwaite 1946).
    """

    excess: float = 0.0
    residual: float = 1.0
    freedom: float = 0.0

    @property
    def share(self) -> float:
        """The seed's share, between 0 and 1."""
        return min(1.0, max(0.0, self.excess))

    def between_seeds(self, scenes: int) -> float:
        """Return the variance of a seed's rate over `scenes`, as observed: seed and noise."""
        return max(0.0, self.excess + self.residual / scenes)

    def of(self, grid: OutcomeGrid) -> SeedEffect:
        """Return the effect for one recipe: its own if that is larger, else the pooled one.

        The seeds of one recipe may differ more than those of the others. Its own estimate alone
        would have few degrees of freedom, the pooled one alone would be too small. If its seeds
        differ twice as much as the others', intervals of its rate cover about 90 %.
        """
        own = seed_effect([grid])
        if not own.freedom or own.excess <= self.excess:
            return self
        return SeedEffect(own.excess, own.residual, self.freedom)


def seed_effect(grids: Iterable[OutcomeGrid]) -> SeedEffect:
    """Estimate the seed's effect from the recipes with several seeds (analysis of variance)."""
    excess, residual, scale, squares = 0.0, 0.0, 0.0, 0.0
    for grid in grids:
        seeds, scenes = grid.outcomes.shape
        if seeds < 2 or scenes < 2:
            continue
        y = grid.outcomes
        rows, columns = y.mean(axis=1, keepdims=True), y.mean(axis=0, keepdims=True)
        remainder = float(((y - rows - columns + y.mean()) ** 2).sum()) / (scenes - 1)
        residual += remainder
        excess += (seeds - 1) * float(rows.var(ddof=1)) - remainder / scenes
        weight = (seeds - 1) * grid.rate * (1 - grid.rate)
        scale += weight
        squares += weight**2 / (seeds - 1)
    if not scale:
        return SeedEffect()
    return SeedEffect(excess / scale, residual / scale, scale**2 / squares)


def recipe_rate(grid: OutcomeGrid, seeds: SeedEffect | None = None) -> tuple[float, float, float]:
    """Return (rate, low, high) of a recipe over training seeds and scenes, 95 %.

    The wider of two Wilson intervals with an effective number of episodes, rate · (1 − rate) /
    variance (Korn and Graubard 1998): the seeds' rates with a t quantile, and scenes plus the
    seeds' share. The first is valid for few seeds, the second for few scenes.

    Args:
        grid: one recipe.
        seeds: the effect pooled over all recipes of a study; default: of this one alone. With one
            seed and no pooled effect, the interval holds for that policy only.
    """
    effect = seed_effect([grid]) if seeds is None else seeds.of(grid)
    count, scenes = grid.outcomes.shape
    p = grid.rate
    if not scenes:
        return math.nan, 0.0, 1.0
    # At 0 % and 100 % the scenes do not show how they differ: every scene counts once.
    spread = p * (1 - p)
    by_scene = _mean_variance(grid.outcomes.mean(axis=0), grid.strata) / spread if spread else 1.0
    by_scene = max(by_scene, 1 / (count * scenes)) if spread else 1 / scenes
    choices = [(Z, by_scene + effect.share / count)]
    if effect.freedom and spread:
        t = float(stats.t.isf(LEVEL / 2, effect.freedom))
        choices.append((t, effect.between_seeds(scenes) / count))
    quantile, variance = max(choices, key=lambda c: c[0] ** 2 * c[1])
    n = 1 / variance
    return (p, *wilson_interval(p * n, n, quantile))


# 3. two recipes or two policies on the same scenes


def paired_difference(
    a: OutcomeGrid, b: OutcomeGrid, seeds: SeedEffect | None = None
) -> Difference:
    """Return rate(a) − rate(b) over the scenes that both met; NaN without a common one.

    Scenes that only one side met, or that lack an outcome of a seed, are counted (`left_out`).

    With one seed each and no pooled effect: the interval of Bonett and Price (2012) and McNemar's
    exact test; they hold for this pair of policies. Otherwise the wider of two intervals and the
    larger of their p-values: over the seeds' rates, with a t quantile, and over scenes plus the
    seeds' share.
    """
    met = set(b.scenes)
    common = [x for x in a.scenes if x in met]
    left_out = _left_out(a, b, len(common))
    if not common:
        return Difference(math.nan, math.nan, math.nan, math.nan, "no common scene", left_out)
    a, b = a.select(common), b.select(common)
    pooled = seed_effect([a, b]) if seeds is None else seeds
    counts = len(a.outcomes), len(b.outcomes)
    per_scene = a.outcomes.mean(axis=0) - b.outcomes.mean(axis=0)
    value = float(per_scene.mean())
    # Two more scenes, won once by each side, keep the interval valid near 0 and 1. Their weight
    # is that of a scene averaged over seeds.
    won = math.sqrt((1 / counts[0] + 1 / counts[1]) / 2)
    padded = np.array([*per_scene, won, -won])
    by_scene = float(padded.var()) / len(padded)
    weighted = [
        (pooled.of(g), g.rate * (1 - g.rate) / n) for g, n in zip((a, b), counts, strict=True)
    ]
    by_seed = sum(effect.share * weight for effect, weight in weighted)
    deviations = [(math.inf, math.sqrt(by_scene + by_seed))]
    if pooled.freedom:
        between = sum(effect.between_seeds(len(common)) * weight for effect, weight in weighted)
        deviations.append((pooled.freedom, math.sqrt(between)))
    half = max(float(stats.t.isf(LEVEL / 2, f)) * s for f, s in deviations)
    middle = float(padded.mean())  # of both, so that p < 5 % exactly if 0 is outside
    if pooled.freedom:
        p = max(float(2 * stats.t.sf(abs(middle) / s, f)) if s else 0.0 for f, s in deviations)
        method = f"{_PAIRED}, over training seeds and scenes"
    else:
        p = _mcnemar(per_scene)
        method = f"{_PAIRED}: Bonett and Price's interval, McNemar's test"
    low, high = max(-1.0, middle - half), min(1.0, middle + half)
    return Difference(value, min(low, value), max(high, value), p, method, left_out)


def split_difference(a: OutcomeGrid, b: OutcomeGrid) -> Difference:
    """Return rate(a) − rate(b) of one recipe on two splits; row s of both is the same policy.

    What a seed adds to both splits cancels. The wider of two intervals and the larger of their
    p-values: over the seeds' differences (t), and over scenes. Scenes that both splits have are
    paired and the rest is left out and counted; without any, the splits are independent. With one
    seed, over scenes alone. NaN without scenes.
    """
    if len(a.outcomes) != len(b.outcomes):
        raise ValueError(f"{len(a.outcomes)} and {len(b.outcomes)} seeds; expected the same ones")
    seeds = len(a.outcomes)
    if not (a.outcomes.size and b.outcomes.size):
        return Difference(math.nan, math.nan, math.nan, math.nan, "no scene")
    left_out, met = 0, set(b.scenes)
    # As in `paired_difference`, two more scenes keep the interval valid near 0 and 1.
    if common := [x for x in a.scenes if x in met]:
        left_out = _left_out(a, b, len(common))
        a, b = a.select(common), b.select(common)
        paired = (a.outcomes - b.outcomes).mean(axis=0)
        by_scene = _mean_variance(paired, a.strata) + 2 / seeds / len(paired) ** 2
        scenes = _PAIRED
    else:
        by_scene = sum(
            _mean_variance(g.outcomes.mean(axis=0), g.strata) + 0.5 / seeds / len(g.scenes) ** 2
            for g in (a, b)
        )
        scenes = "other scenes"
    per_seed = a.outcomes.mean(axis=1) - b.outcomes.mean(axis=1)
    value = float(per_seed.mean())
    deviations = [(math.inf, math.sqrt(by_scene))]
    if seeds > 1:
        deviations.append((seeds - 1, float(per_seed.std(ddof=1)) / math.sqrt(seeds)))
    half = max(float(stats.t.isf(LEVEL / 2, f)) * s for f, s in deviations)
    p = max(
        float(2 * stats.t.sf(abs(value) / s, f)) if s else float(not value) for f, s in deviations
    )
    method = f"{scenes}, over training seeds and scenes" if seeds > 1 else f"{scenes}, one seed"
    low, high = max(-1.0, value - half), min(1.0, value + half)
    return Difference(value, low, high, p, method, left_out)


def _left_out(a: OutcomeGrid, b: OutcomeGrid, common: int) -> int:
    """Return the number of scenes of either side, also incomplete ones, that are not common."""
    return len({*a.scenes, *b.scenes, *a.incomplete, *b.incomplete}) - common


def _mcnemar(per_scene: np.ndarray) -> float:
    """Return the exact p-value of McNemar's test from differences in {−1, 0, 1}."""
    wins, losses = int((per_scene > 0).sum()), int((per_scene < 0).sum())
    if wins + losses == 0:
        return 1.0
    return float(stats.binomtest(wins, wins + losses).pvalue)


def _mean_variance(values: np.ndarray, strata: Sequence[str]) -> float:
    """Return the variance of the mean of values [N], around the means of their strata."""
    names = np.array(strata)
    centred = values.copy()
    for name in set(strata):
        centred[names == name] -= values[names == name].mean()
    freedom = max(1, len(values) - len(set(strata)))
    return float((centred**2).sum() / freedom / len(values))


def seed_difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Return mean(a) − mean(b) of values per training seed, such as errors: Welch's t.

    With unequal numbers of values, the degrees of freedom are those of the smaller, which never
    covers too little (Hsu 1938). NaN bounds if either has one value.
    """
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    d = float(x.mean() - y.mean())
    method = "training seeds: Welch's t"
    if min(len(x), len(y)) < 2:
        return Difference(d, math.nan, math.nan, math.nan, method)
    u, v = x.var(ddof=1) / len(x), y.var(ddof=1) / len(y)
    if u + v == 0:
        return Difference(d, d, d, float(d == 0), method)
    freedom = (u + v) ** 2 / (u**2 / (len(x) - 1) + v**2 / (len(y) - 1))
    if len(x) != len(y):  # two values against eight: Welch's own 95 % interval covers 86 %
        freedom = min(len(x), len(y)) - 1
    half = float(stats.t.isf(LEVEL / 2, freedom) * math.sqrt(u + v))
    p = float(2 * stats.t.sf(abs(d) / math.sqrt(u + v), freedom))
    return Difference(d, d - half, d + half, p, method)


# 4. many comparisons


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values (1979): below 0.05 with 5 % chance of any false alarm.

    NaN (not measured) stays NaN and does not count.
    """
    p = np.asarray(p_values, np.float64)
    adjusted = np.full(p.shape, math.nan)
    order = [int(i) for i in np.argsort(p) if math.isfinite(p[i])]
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, float(p[i]) * (len(order) - rank)))
        adjusted[i] = largest
    return [float(x) for x in adjusted]


def compact_letters(names: Sequence[str], different: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return {name: letters}: two names share a letter unless they are significantly different.

    Piepho (2004), insert and absorb. names: best first, so that "a" marks the best.
    """
    columns: list[set[str]] = [set(names)]
    for a, b in different:
        split = []
        for column in columns:
            split += [column - {a}, column - {b}] if {a, b} <= column else [column]
        columns = [c for i, c in enumerate(split) if not _absorbed(c, i, split)]
    columns.sort(key=lambda c: sorted(names.index(n) for n in c))
    letters = "abcdefghijklmnopqrstuvwxyz"
    marks = [letters[i % 26] * (1 + i // 26) for i in range(len(columns))]
    return {n: "".join(m for m, c in zip(marks, columns, strict=True) if n in c) for n in names}


def _absorbed(column: set[str], i: int, columns: Sequence[set[str]]) -> bool:
    return any(column < c or (column == c and j < i) for j, c in enumerate(columns))


# 5. equality


def is_equivalent(difference: Difference, margin: float) -> bool:
    """Return whether two rates are equal within ± margin: two one-sided tests at 5 %.

    "No significant difference" is not equality. The 90 % interval is taken as the 95 % one, shrunk
    by the ratio of normal quantiles.
    """
    shrink = float(stats.norm.isf(LEVEL)) / Z
    middle = (difference.low + difference.high) / 2
    half = shrink * (difference.high - difference.low) / 2
    return bool(-margin < middle - half and middle + half < margin)
