"""Intervals and tests: published values, simulated coverage, and rates of false alarms.

The simulations are seeded and small; bounds allow for their own noise (3 standard errors), so that
a wrong formula fails and chance does not.
"""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from scipy import optimize, stats

from octolike.evaluation import statistics, study_design
from octolike.evaluation.equivalent_count import EquivalentCount, equivalent_count
from octolike.evaluation.statistics import (
    Difference,
    OutcomeGrid,
    SuccessRate,
    compact_letters,
    holm,
    is_equivalent,
    paired_difference,
    rate_difference,
    recipe_rate,
    seed_difference,
    seed_effect,
    split_difference,
    wilson_interval,
)
from octolike.evaluation.study_design import SignFlipProcess

REPEATS = 300
NOISE = 3 * math.sqrt(0.05 * 0.95 / REPEATS)


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_wilson_equals_the_published_table(successes, episodes, low, high):
    assert wilson_interval(successes, episodes) == pytest.approx((low, high), abs=5e-5)


def test_newcombe_equals_the_published_table():
    # Newcombe 1998, Statistics in Medicine 17:873, table II (a), method 10: 56/70 - 48/80
    d = rate_difference(SuccessRate(56, 70), SuccessRate(48, 80))
    assert (d.value, d.low, d.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    assert d.p == pytest.approx(stats.fisher_exact([[56, 14], [48, 32]]).pvalue)


def test_impossible_counts_are_rejected():
    with pytest.raises(ValueError, match="3 successes of 2 episodes"):
        wilson_interval(3, 2)


def test_welch_equals_the_textbook():
    d = seed_difference([1.0, 2.0, 3.0], [4.0, 6.0, 8.0])
    assert d.value == -4  # s² = 1 and 4, se = √(5/3), 2.94 degrees of freedom, t = 3.218
    assert (d.low, d.high) == pytest.approx((-4 - 4.154, -4 + 4.154), abs=0.02)
    assert d.p == pytest.approx(
        stats.ttest_ind([1.0, 2, 3], [4.0, 6, 8], equal_var=False).pvalue, abs=1e-9
    )
    assert math.isnan(seed_difference([1.0], [1.0, 2.0]).low)


def grid(outcomes):
    outcomes = np.asarray(outcomes, float)
    return OutcomeGrid(outcomes, tuple(range(outcomes.shape[1])), ("skill",) * outcomes.shape[1])


def pair(both, only_a, only_b, neither):
    """Return the grids of two policies from the counts of a paired table."""
    a = [1] * (both + only_a) + [0] * (only_b + neither)
    b = [1] * both + [0] * only_a + [1] * only_b + [0] * neither
    return grid([a]), grid([b])


def test_pairing_finds_what_independent_intervals_miss():
    """20 of 100 scenes lost, 5 won: p = 0.004 paired, and 0.045 without the pairs."""
    a, b = pair(45, 20, 5, 30)
    d = paired_difference(a, b)
    assert d.value == pytest.approx(0.15)
    assert d.p == pytest.approx(stats.binomtest(20, 25).pvalue)
    independent = rate_difference(SuccessRate(65, 100), SuccessRate(50, 100))
    assert d.p < 0.01 < independent.p
    assert d.high - d.low < independent.high - independent.low
    # Bonett and Price 2012, their formula (9): (n12 + 1) / (n + 2) and (n21 + 1) / (n + 2)
    p12, p21 = 21 / 102, 6 / 102
    half = statistics.Z * math.sqrt((p12 + p21 - (p12 - p21) ** 2) / 102)
    assert (d.low, d.high) == pytest.approx((p12 - p21 - half, p12 - p21 + half), abs=1e-9)


def test_crashed_scenes_are_left_out_and_counted():
    seeds = [{"a": True, "b": None, "c": False}, {"a": False, "b": True, "c": True, "d": True}]
    g = OutcomeGrid.from_seeds(seeds, dict.fromkeys("abcd", "skill"))
    assert (g.scenes, g.left_out) == (("a", "c"), 2)
    other = OutcomeGrid.from_seeds([{"a": True, "c": None, "e": True}], dict.fromkeys("ace", "s"))
    d = paired_difference(g, other)
    assert (d.value, d.left_out) == (pytest.approx(-0.5), 4), "of a to e, only a has both outcomes"
    assert g.outcomes.tolist() == [[1, 0], [0, 1]]
    disjoint = OutcomeGrid.from_seeds([{"c": True, "z": True}], dict.fromkeys("cz", "skill"))
    assert paired_difference(g, disjoint).value == pytest.approx(-0.5)
    nothing = OutcomeGrid.from_seeds([{"z": True}], {"z": "skill"})
    assert math.isnan(paired_difference(g, nothing).value)


def simulate(rng, seeds, scenes, logit, seed_deviation, difficulty):
    """Draw the outcomes of a recipe: logit + difficulty of the scene + luck of the seed."""
    luck = rng.normal(0, seed_deviation, (seeds, 1))
    p = stats.logistic.cdf(logit + difficulty + luck)
    return grid(rng.random((seeds, scenes)) < p)


def true_rate(logit, seed_deviation, scene_deviation):
    x = np.linspace(-6, 6, 4001) * math.hypot(seed_deviation, scene_deviation) + logit
    weights = stats.norm.pdf(np.linspace(-6, 6, 4001))
    return float((stats.logistic.cdf(x) * weights).sum() / weights.sum())


def coverage(logits, deviations, seeds, own=False, strata=("skill",)):
    """Simulate a study; return the counts of covered rates and differences, and of false alarms.

    One recipe per logit, with the standard deviation of its seeds' luck; the first two are looked
    at. own: the seeds' effect comes from the first recipe alone, not from all.
    """
    rng, scenes = np.random.default_rng(0), 60
    offsets = np.linspace(-1, 1, len(strata)) if len(strata) > 1 else np.zeros(1)
    names = np.repeat(strata, scenes // len(strata))
    shift = np.repeat(offsets, scenes // len(strata))
    truth = [
        np.mean([true_rate(x + offset, deviation, 1.0) for offset in offsets])
        for x, deviation in zip(logits[:2], deviations[:2], strict=True)
    ]
    rates = differences = alarms = 0
    for _ in range(REPEATS):
        difficulty = shift + rng.normal(0, 1, scenes)
        grids = [
            dataclasses.replace(g, strata=tuple(names))
            for g in (
                simulate(rng, seeds, scenes, x, deviation, difficulty)
                for x, deviation in zip(logits, deviations, strict=True)
            )
        ]
        effect = seed_effect(grids)
        _, low, high = recipe_rate(grids[0], None if own else effect)
        rates += low <= truth[0] <= high
        d = paired_difference(grids[0], grids[1], effect)
        differences += d.low <= truth[0] - truth[1] <= d.high
        alarms += d.p < statistics.LEVEL
        assert (d.p < statistics.LEVEL) == (not d.low <= 0 <= d.high)
    return np.array([rates, differences, alarms])


LOGITS, DEVIATIONS = ((0.0, 0.0), (2.2, 2.2), (1.4, 0.0)), (0.0, 0.4, 0.8)


@pytest.mark.parametrize("seeds", [2, 3, 5, 8])
def test_coverage_and_false_alarms(seeds):
    """At least 93 % of the 95 % intervals cover, for few and many seeds, near 50 % and 90 %."""
    cells = {
        (logits, deviation): coverage(logits, (deviation, deviation), seeds) / REPEATS
        for logits in LOGITS
        for deviation in DEVIATIONS
    }
    assert min(c[:2].min() for c in cells.values()) > 0.93 - NOISE
    together = np.mean(list(cells.values()), axis=0)  # 2,700 studies: chance moves it by 1 %
    assert together[:2].min() > 0.935
    equal = [c[2] for (logits, _), c in cells.items() if logits[0] == logits[1]]
    assert np.mean(equal) < 0.06
    if seeds >= 5:  # a difference of 27 points is found
        assert min(cells[LOGITS[2], deviation][2] for deviation in DEVIATIONS[:2]) > 0.8


@pytest.mark.parametrize(
    "study",
    [
        {"logits": (4.5, 4.5), "deviations": (0.8, 0.8), "seeds": 3},  # 97 %
        {"logits": (-4.5, -4.5), "deviations": (0.0, 0.0), "seeds": 3},  # 2 %
        {"logits": (0.0, 0.0), "deviations": (0.8, 0.8), "seeds": 3, "own": True},
        {"logits": (2.2, 2.2), "deviations": (0.8, 0.8), "seeds": 5, "own": True},
        {"logits": (0.0, *[9.0] * 5), "deviations": (0.8,) * 6, "seeds": 3},  # the others at 100 %
        {"logits": (1.0, 1.0), "deviations": (0.4, 0.4), "seeds": 3, "strata": ("a", "b", "c")},
        {"logits": (1.0, 1.0), "deviations": (0.8, 0.8), "seeds": 5, "strata": ("a", "b", "c")},
    ],
    ids=str,
)
def test_coverage_near_certainty_of_one_recipe_of_unequal_ones_and_of_skills(study):
    rates, differences, _ = coverage(**study) / REPEATS
    assert min(rates, differences) > 0.93 - NOISE / 2


@pytest.mark.parametrize(
    "study",
    [
        {"logits": (0.0,) * 6, "deviations": (0.8, *[0.4] * 5), "seeds": 3},
        {"logits": (0.0,) * 6, "deviations": (0.8, *[0.4] * 5), "seeds": 8},
        {"logits": (0.0, *[3.0] * 5), "deviations": (0.8,) * 6, "seeds": 3},
    ],
    ids=str,
)
def test_coverage_of_a_recipe_whose_seeds_differ_more_than_the_others(study):
    """About 90 %. Pooling alone would cover 84 %; the recipe's own effect counts if larger."""
    rates, differences, _ = coverage(**study) / REPEATS
    assert rates > 0.86
    assert differences > 0.9


@pytest.mark.parametrize("deviation", [0.0, 0.4])
def test_recipes_that_differ_by_the_margin_are_rarely_called_equal(deviation):
    """60 and 50 % with a margin of 10 points: at most 5 %, and equal ones are found."""
    rng, logit = np.random.default_rng(8), 0.0
    spread = math.hypot(deviation, 1.0)
    other = optimize.brentq(
        lambda x: true_rate(x, spread, 0.0) - true_rate(logit, spread, 0.0) - 0.1, 0, 2
    )
    called = {other: 0, logit: 0}
    for second in called:
        for _ in range(REPEATS):
            difficulty = rng.normal(0, 1, 400)
            grids = [simulate(rng, 8, 400, x, deviation, difficulty) for x in (logit, second)]
            called[second] += is_equivalent(paired_difference(*grids), 0.1)
    assert called[other] / REPEATS < 0.05 + NOISE / 2
    assert called[logit] / REPEATS > (0.95 if deviation == 0 else 0.3)


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("shared", [True, False])
def test_coverage_of_what_a_recipe_loses_on_another_split(seeds, shared):
    """Over seeds that are good on both splits, and better on one of them."""
    rng, covers, alarms, repeats = np.random.default_rng(9), 0, 0, 0
    for logits in ((0.0, 0.0), (2.2, 2.2), (3.5, 2.5)):
        truth = [true_rate(x, math.hypot(0.6, 0.4), 1.0) for x in logits]
        for _ in range(REPEATS):
            luck, difficulty = rng.normal(0, 0.6, (seeds, 1)), rng.normal(0, 1, (2, 60))
            grids = []
            for i, logit in enumerate(logits):
                hard = difficulty[0 if shared else i]
                more = luck + rng.normal(0, 0.4, (seeds, 1))
                p = stats.logistic.cdf(logit + hard + more)
                scenes = tuple((0 if shared else i, x) for x in range(60))
                outcomes = (rng.random(p.shape) < p).astype(float)
                grids.append(OutcomeGrid(outcomes, scenes, ("skill",) * 60))
            d = split_difference(*grids)
            covers += d.low <= truth[0] - truth[1] <= d.high
            alarms += d.p < statistics.LEVEL and logits[0] == logits[1]
            repeats += 1
    assert covers / repeats > 0.94
    assert alarms / repeats < 0.05
    assert d.method.startswith("same scenes" if shared else "other scenes")


def test_two_splits_need_the_same_seeds():
    with pytest.raises(ValueError, match="2 and 3 seeds; expected the same ones"):
        split_difference(grid(np.ones((2, 5))), grid(np.ones((3, 5))))
    assert math.isnan(split_difference(grid(np.ones((2, 5))), grid(np.ones((2, 0)))).value)
    few = dataclasses.replace(grid(np.ones((2, 4))), incomplete=(4,))  # one crashed
    paired = split_difference(grid(np.zeros((2, 5))), few)
    assert (paired.value, paired.left_out, paired.is_paired) == (-1, 1, True)
    certain = split_difference(grid(np.ones((2, 5))), grid(np.ones((2, 5))))
    assert certain.low < 0 < certain.high
    assert certain.p == 1


def test_freedom_is_that_of_the_recipes_that_say_something():
    """Five recipes at 100 % and one at 50 %, three seeds: two degrees of freedom, not twelve."""
    half, certain = grid([[1, 0] * 10, [0, 1] * 10, [1, 1, 0, 0] * 5]), grid(np.ones((3, 20)))
    assert seed_effect([half, *[certain] * 5]).freedom == pytest.approx(2)
    assert seed_effect([half] * 6).freedom == pytest.approx(12)
    assert seed_effect([certain]).freedom == 0


RATES = np.linspace(0.05, 0.95, 19)


@pytest.mark.parametrize("episodes", [20, 60, 200])
def test_the_interval_of_one_policy_covers(episodes):
    """Exactly, over all outcomes: 95 % on average, never below 90 % (discrete outcomes)."""
    k = np.arange(episodes + 1)
    low, high = np.array([wilson_interval(x, episodes) for x in k]).T
    covers = (low <= RATES[:, None]) & (RATES[:, None] <= high)
    coverage = (stats.binom.pmf(k, episodes, RATES[:, None]) * covers).sum(axis=1)
    assert coverage.mean() > 0.94
    assert coverage.min() > 0.9


def test_the_interval_and_test_of_independent_episodes_hold():
    """Exactly, over all outcomes of 20 and 30 episodes."""
    m, n = 20, 30
    found = [
        [rate_difference(SuccessRate(i, m), SuccessRate(j, n)) for j in range(n + 1)]
        for i in range(m + 1)
    ]
    low, high, p = (
        np.array([[getattr(d, x) for d in r] for r in found]) for x in ("low", "high", "p")
    )
    coverage, alarms = [], []
    for a in RATES:
        for b in RATES:
            chance = np.outer(
                stats.binom.pmf(range(m + 1), m, a), stats.binom.pmf(range(n + 1), n, b)
            )
            coverage.append((chance * ((low <= a - b) & (a - b <= high))).sum())
            alarms += [(chance * (p < statistics.LEVEL)).sum()] if a == b else []
    assert np.mean(coverage) > 0.94
    assert min(coverage) > 0.9
    assert max(alarms) < statistics.LEVEL


def test_the_interval_and_test_of_paired_episodes_hold():
    """Exactly, over all outcomes of 40 pairs of two policies."""
    n = 40
    won, lost = np.array([(i, j) for i in range(n + 1) for j in range(n + 1 - i)]).T
    found = [paired_difference(*pair(0, i, j, n - i - j)) for i, j in zip(won, lost, strict=True)]
    low, high, p = (np.array([getattr(d, x) for d in found]) for x in ("low", "high", "p"))
    coverage, alarms = [], []
    for a in (0.02, 0.1, 0.2, 0.4):
        for b in (0.02, 0.1, 0.2, 0.4):
            chance = stats.multinomial.pmf(
                np.stack([won, lost, n - won - lost], axis=1), n, [a, b, 1 - a - b]
            )
            coverage.append((chance * ((low <= a - b) & (a - b <= high))).sum())
            alarms += [(chance * (p < statistics.LEVEL)).sum()] if a == b else []
    assert np.mean(coverage) > 0.94
    assert min(coverage) > 0.9
    assert max(alarms) < statistics.LEVEL


@pytest.mark.parametrize("seeds", [(1, 5), (2, 8), (3, 12)])
@pytest.mark.parametrize("seed_deviation", [0.0, 0.8])
def test_coverage_with_unequal_numbers_of_seeds(seeds, seed_deviation):
    """As in a study that stopped some variants early, or is still running."""
    rng, covers, alarms = np.random.default_rng(4), 0, 0
    for _ in range(REPEATS):
        difficulty = rng.normal(0, 1, 60)
        a, b = (simulate(rng, n, 60, 0.0, seed_deviation, difficulty) for n in seeds)
        d = paired_difference(a, b, seed_effect([a, b]))
        covers += d.low <= 0 <= d.high
        alarms += d.p < statistics.LEVEL
    assert covers / REPEATS > 0.93 - NOISE
    assert alarms / REPEATS < 0.07 + NOISE


@pytest.mark.parametrize("seeds", [(2, 2), (3, 3), (8, 8), (2, 8), (3, 12)])
@pytest.mark.parametrize("deviations", [(1.0, 1.0), (1.0, 3.0), (3.0, 1.0)])
def test_coverage_of_other_measures(seeds, deviations):
    rng, covers, alarms = np.random.default_rng(5), 0, 0
    for _ in range(REPEATS):
        a, b = (rng.normal(0, s, n) for n, s in zip(seeds, deviations, strict=True))
        d = seed_difference(a, b)
        covers += d.low <= 0 <= d.high
        alarms += d.p < statistics.LEVEL
    assert covers / REPEATS > 0.93 - NOISE
    assert alarms / REPEATS < 0.07 + NOISE


@pytest.mark.parametrize("seed_deviation", [0.0, 0.8])
def test_a_table_of_equal_recipes_rarely_has_any_letter_but_a(seed_deviation):
    """Six equal recipes, 15 pairs, three seeds: 5 % of the tables have a false alarm."""
    rng, alarms = np.random.default_rng(6), 0
    for _ in range(REPEATS):
        difficulty = rng.normal(0, 1, 60)
        grids = [simulate(rng, 3, 60, 0.0, seed_deviation, difficulty) for _ in range(6)]
        effect = seed_effect(grids)
        pairs = itertools.combinations(grids, 2)
        p_values = holm([paired_difference(a, b, effect).p for a, b in pairs])
        alarms += min(p_values) < statistics.LEVEL
    assert alarms / REPEATS < 0.05 + NOISE


def test_pooled_episodes_would_be_too_narrow():
    """The interval over 3 × 60 episodes as if independent covers far less than 95 %."""
    rng = np.random.default_rng(1)
    truth, covers = true_rate(0.0, 0.8, 1.0), 0
    for _ in range(REPEATS):
        g = simulate(rng, 3, 60, 0.0, 0.8, rng.normal(0, 1, 60))
        low, high = wilson_interval(g.outcomes.sum(), g.outcomes.size)
        covers += low <= truth <= high
    assert covers / REPEATS < 0.75


def test_skills_of_different_difficulty_are_no_noise():
    """Two skills at 0 and 100 %: the rate of the recipe is certain, not 50 ± 10 %."""
    outcomes = np.repeat([[1.0] * 30 + [0.0] * 30], 3, axis=0)
    strata = ("touch",) * 30 + ("stack",) * 30
    _, low, high = recipe_rate(OutcomeGrid(outcomes, tuple(range(60)), strata))
    _, low_pooled, high_pooled = recipe_rate(grid(outcomes))
    assert high - low < 0.7 * (high_pooled - low_pooled)


def test_holm_equals_the_textbook():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    adjusted = holm([0.04, math.nan, 0.03])
    assert adjusted[::2] == pytest.approx([0.06, 0.06])
    assert math.isnan(adjusted[1])
    assert holm([]) == []


@pytest.mark.parametrize("seed", range(20))
def test_letters_are_shared_exactly_by_pairs_that_do_not_differ(seed):
    rng = np.random.default_rng(seed)
    names = [f"v{i}" for i in range(6)]
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    different = [p for p in pairs if rng.random() < 0.4]
    letters = compact_letters(names, different)
    for a, b in pairs:
        assert (not set(letters[a]) & set(letters[b])) == ((a, b) in different)
    assert "a" in letters["v0"]


def test_equality_needs_a_narrow_interval():
    wide, narrow = (Difference(0.0, -x, x, 1.0, "") for x in (0.3, 0.04))
    assert not is_equivalent(wide, 0.1)
    assert is_equivalent(narrow, 0.1)
    assert not is_equivalent(Difference(0.2, 0.16, 0.24, 0.0, ""), 0.1)


def test_a_study_finds_the_difference_that_its_design_promises():
    """At the announced difference, about 80 % of simulated studies find it."""
    rng, seeds, scenes = np.random.default_rng(2), 5, 100
    smallest = study_design.detectable_difference(seeds, scenes)
    assert 0.1 < smallest < 0.35
    spread = 0.25
    detections = 0
    for _ in range(REPEATS):
        difficulty = rng.normal(0, math.sqrt(study_design.SCENE_SHARE * spread), scenes)
        grids = []
        for rate in (0.5 + smallest / 2, 0.5 - smallest / 2):
            luck = rng.normal(0, math.sqrt(study_design.SEED_SHARE * spread), (seeds, 1))
            p = np.clip(rate + difficulty + luck, 0, 1)
            grids.append(grid(rng.random((seeds, scenes)) < p))
        detections += paired_difference(*grids).p < statistics.LEVEL
    assert 0.65 < detections / REPEATS < 0.92
    more = [study_design.detectable_difference(n, scenes) for n in (2, 3, 5, 12)]
    assert more == sorted(more, reverse=True)
    assert study_design.detectable_difference(5, scenes, comparisons=10) > smallest
    assert study_design.detectable_difference(1, scenes) == 1


@pytest.mark.parametrize(("recipes", "seeds"), [(6, 3), (10, 3), (3, 5)])
def test_a_table_finds_the_difference_that_its_design_promises(recipes, seeds):
    """The seed's effect is estimated from all recipes; Holm's strictest step finds the pair."""
    rng, scenes, spread = np.random.default_rng(7), 60, 0.25
    pairs = recipes * (recipes - 1) // 2
    smallest = study_design.detectable_difference(seeds, scenes, pairs, recipes)
    detections = 0
    for _ in range(REPEATS):
        difficulty = rng.normal(0, math.sqrt(study_design.SCENE_SHARE * spread), scenes)
        grids = []
        for rate in (0.5 + smallest / 2, *[0.5 - smallest / 2] * (recipes - 1)):
            luck = rng.normal(0, math.sqrt(study_design.SEED_SHARE * spread), (seeds, 1))
            p = np.clip(rate + difficulty + luck, 0, 1)
            grids.append(grid(rng.random((seeds, scenes)) < p))
        p_value = paired_difference(grids[0], grids[1], seed_effect(grids)).p
        detections += p_value < statistics.LEVEL / pairs
    assert 0.65 < detections / REPEATS < 0.92


def test_evidence_of_a_family_is_valid_after_every_seed():
    """Four equal variants, Holm at every look: at most 5 % of the studies decide anything."""
    rng, alarms = np.random.default_rng(10), 0
    for _ in range(1000):
        processes = [SignFlipProcess() for _ in range(4)]
        decided = False
        for _ in range(12):
            reference = rng.normal(0, 0.1)
            for process in processes:
                process.update(reference + rng.normal(0, 0.1))
            decided |= min(holm([p.p for p in processes])) <= statistics.LEVEL
        alarms += decided
    assert alarms / 1000 < 0.05


def test_evidence_may_be_read_after_every_seed():
    rng, alarms, detections, needed = np.random.default_rng(3), 0, 0, []
    for _ in range(2000):
        process = SignFlipProcess()
        alarms += any(process.update(d) >= 20 for d in rng.normal(0, 0.1, 30))
    assert alarms / 2000 < 0.05
    for _ in range(200):
        process = SignFlipProcess()
        for d in rng.normal(0.2, 0.1, 12):
            process.update(d)
            if process.p <= 0.05:
                detections += 1
                needed.append(process.seeds)
                break
    assert detections / 200 > 0.8
    assert np.median(needed) <= 8


# equivalent demonstrations

COUNTS = (10, 20, 40, 80, 160)


def curve_logit(count):
    return -2.0 + 0.9 * math.log2(count / 10)


def simulate_curve(rng, seeds, difficulty, deviation):
    return {
        n: simulate(rng, seeds, len(difficulty), curve_logit(n), deviation, difficulty)
        for n in COUNTS
    }


def test_equivalent_counts_cover():
    """At least 93 % of the intervals hold the true number, at a count and between two."""
    rng, repeats, inside = np.random.default_rng(2), 60, 0
    for seeds, deviation, truth in ((3, 0.5, 28), (8, 0.5, 80), (8, 0.0, 28)):
        for _ in range(repeats):
            difficulty = rng.normal(0, 1, 60)
            curve = simulate_curve(rng, seeds, difficulty, deviation)
            recipe = simulate(rng, seeds, 60, curve_logit(truth), deviation, difficulty)
            worth = equivalent_count(recipe, curve)
            assert worth.low <= worth.value <= worth.high
            inside += worth.low <= truth <= worth.high
    assert inside / repeats / 3 > 0.93 - 1.5 * math.sqrt(0.05 * 0.95 / repeats / 3)


def test_equivalent_counts_beyond_the_curve_and_between_its_points():
    rng = np.random.default_rng(3)
    difficulty = rng.normal(0, 1, 100)
    curve = simulate_curve(rng, 8, difficulty, 0.0)
    best, worst = grid(np.ones((8, 100))), grid(np.zeros((8, 100)))
    assert equivalent_count(best, curve) == EquivalentCount(math.inf, 160.0, math.inf)
    assert equivalent_count(worst, curve) == EquivalentCount(0.0, 0.0, 10.0)
    # a point of the curve is worth itself, within an interval that excludes the far ones
    worth = equivalent_count(curve[40], curve)
    assert worth.value == pytest.approx(40)
    assert 20 < worth.low < 40 < worth.high < 80


def test_a_curve_needs_two_counts_with_equal_seeds():
    one = grid(np.ones((2, 5)))
    with pytest.raises(ValueError, match=r"\[10\].*at least two counts"):
        equivalent_count(one, {10: one})
    with pytest.raises(ValueError, match=r"\[2, 1\] seeds"):
        equivalent_count(one, {10: one, 20: grid(np.ones((1, 5)))})
