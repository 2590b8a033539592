"""Success rates, their intervals, and the verdicts that a report draws from them."""

import pytest
from scipy import stats

from octolike.evaluation import success
from octolike.evaluation.statistics import SuccessRate, wilson_interval
from octolike.evaluation.success import generalization_gaps


def rows(policy, split, skill, outcomes, failure="time ran out"):
    return [
        {
            "policy": policy,
            "split": split,
            "skill": skill,
            "seed": i,
            "success": ok,
            "failure": "" if ok else failure,
            "steps": 5,
        }
        for i, ok in enumerate(outcomes)
    ]


def test_equal_scenes_are_paired():
    """16 of 60 scenes lost and 5 won is a loss; as independent episodes it is not."""
    seen = [True] * 30 + [True] * 16 + [False] * 5 + [False] * 9
    held_out = [True] * 30 + [False] * 16 + [True] * 5 + [False] * 9
    both = rows("trained", "train", "lift", seen) + rows(
        "trained", "held_out_phrasing", "lift", held_out
    )
    (gap,) = generalization_gaps(both)
    assert gap.p > 0.05
    assert "other scenes" in gap.sentence
    paired = [r | {"scene": f"scene {r['seed']}"} for r in both]
    (gap,) = generalization_gaps(paired)
    assert gap.p < 0.05
    assert "a significant loss" in gap.sentence
    assert "the same scenes" in gap.sentence
    moved = [r | {"scene": r["scene"] + r["split"]} for r in paired]
    assert "other scenes" in generalization_gaps(moved)[0].sentence


@pytest.mark.parametrize("split", ["train", "counterfactual"])
@pytest.mark.parametrize(
    "fault", [{"success": None}, {"success": None, "scene": ""}, {"scene": "x"}]
)
def test_a_pair_that_crashed_or_has_another_scene_does_not_undo_the_pairing(split, fault):
    """A crash at the start leaves no scene; `counterfactual` draws another scene now and then."""
    seen = [True] * 46 + [False] * 14
    other = [True] * 30 + [False] * 16 + [True] * 5 + [False] * 9
    both = rows("trained", "train", "lift", seen) + rows("trained", "counterfactual", "lift", other)
    both = [r | {"scene": f"scene {r['seed']}"} for r in both]
    both = [r | fault if (r["split"], r["seed"]) == (split, 59) else r for r in both]
    (gap,) = generalization_gaps(both)
    assert gap.p == pytest.approx(stats.binomtest(16, 21).pvalue)
    crashed = "success" in fault
    note = "the same scenes, 1 scene left out, as a side has no outcome there; seen minus held"
    assert (note if crashed else "the same scenes; seen minus held-out") in gap.sentence
    assert gap.to_json()["scenes_left_out"] == crashed


@pytest.mark.parametrize(("lost", "equal"), [(2, True), (6, False)])
def test_equality_is_stated_only_if_it_is_shown(lost, equal):
    """Of 50 scenes, two lost and two won are equal within 10 points; six and six are not."""
    seen = [True] * 40 + [False] * 10
    held_out = [False] * lost + [True] * (40 - lost) + [True] * lost + [False] * (10 - lost)
    both = rows("trained", "train", "lift", seen) + rows(
        "trained", "held_out_phrasing", "lift", held_out
    )
    (gap,) = generalization_gaps([r | {"scene": f"scene {r['seed']}"} for r in both])
    assert ("equal within 10 points" in gap.sentence) == equal
    assert ("no significant gap" in gap.sentence) != equal


@pytest.mark.parametrize(("lost", "informative"), [(1, True), (8, False)])
def test_a_gap_is_informative_if_seen_tasks_succeed_beyond_the_untrained_network(lost, informative):
    """20 against 10 of 100 twice: the scenes that only one of the two wins decide."""
    seen = rows("trained", "train", "lift", [True] * 20 + [False] * 80)
    floor = rows("untrained", "train", "lift", [10 + lost <= i < 20 + lost for i in range(100)])
    held_out = rows("trained", "held_out_phrasing", "lift", [True] * 18 + [False] * 82)
    (gap,) = generalization_gaps(seen + floor + held_out)
    assert ("is not informative" in gap.sentence) != informative
    assert ("succeed more often than without training (the same scenes;" in gap.sentence) != (
        informative
    )


def test_several_gaps_are_adjusted():
    seen = rows("trained", "train", "lift", [True] * 40 + [False] * 20)
    others = [
        rows("trained", f"held_out_{name}", "lift", [True] * 28 + [False] * 32)
        for name in ("phrasing", "combination", "family")
    ]
    (alone,) = generalization_gaps(seen + others[0])
    gaps = generalization_gaps(sum(others, seen))
    assert alone.p < 0.05 < min(g.p for g in gaps)


def test_rates_exclude_crashed_episodes():
    mixed = rows("trained", "train", "touch", [True, False, None, True])
    rate = success.success_rate(mixed)
    assert rate == SuccessRate(2, 3, crashed=1)
    assert success.failure_counts(mixed) == {"time ran out": 1}
    assert success.rate_table(mixed)["trained"]["train"]["all"] == rate


@pytest.mark.parametrize(
    ("seen", "held_out", "floor", "sentence"),
    [
        ([1] * 45 + [0] * 5, [1] * 5 + [0] * 45, [0] * 50, "suggests memorising"),
        ([1] * 45 + [0] * 5, [1] * 30 + [0] * 20, [0] * 50, "a significant loss"),
        ([1] * 45 + [0] * 5, [1] * 44 + [0] * 6, [0] * 50, "no significant gap"),
        ([1] * 20 + [0] * 30, [1] * 45 + [0] * 5, [0] * 50, "succeed more often"),
        ([1] * 3 + [0] * 47, [0] * 50, [1] * 3 + [0] * 47, "the gap is not informative"),
    ],
)
def test_gaps_are_interpreted(seen, held_out, floor, sentence):
    split = "held_out_combination"
    all_rows = rows("trained", "train", "touch", map(bool, seen))
    all_rows += rows("trained", split, "touch", map(bool, held_out))
    all_rows += rows("untrained", "train", "touch", map(bool, floor))
    # a skill that only one of the splits has must not count
    all_rows += rows("trained", "train", "stack", [False] * 50)
    (gap,) = generalization_gaps(all_rows)
    assert gap.skills == ("touch",)
    assert gap.seen == SuccessRate(sum(seen), 50)
    assert sentence in gap.sentence


@pytest.mark.parametrize(
    ("split", "sentence"),
    [
        ("counterfactual", "the scene, not the instruction, decides"),
        ("distractors", "recognises whole scenes"),
    ],
)
def test_gaps_of_scene_splits_have_their_own_interpretation(split, sentence):
    (gap,) = generalization_gaps(
        rows("trained", "train", "touch", [True] * 45 + [False] * 5)
        + rows("trained", split, "touch", [True] * 5 + [False] * 45)
    )
    assert sentence in gap.sentence
    assert gap.to_json()["low"] > 0


@pytest.mark.parametrize(
    ("held_out", "sentence"),
    [(5, "suggests memorising"), (30, "a significant loss"), (44, "no significant gap")],
)
def test_tasks_without_demonstrations_are_compared_with_all_seen_tasks(held_out, sentence):
    """As in Meta-World's ML10, the splits share no task."""
    outcomes = lambda n: [True] * n + [False] * (50 - n)
    all_rows = rows("trained", "train", "reach", outcomes(48))
    all_rows += rows("trained", "train", "push", outcomes(42))
    all_rows += rows("trained", "held_out_task", "sweep", outcomes(held_out))
    all_rows += rows("untrained", "train", "reach", outcomes(1))
    all_rows += rows("untrained", "train", "push", outcomes(1))
    (gap,) = generalization_gaps(all_rows)
    assert gap.skills == ("reach", "push", "sweep")
    assert (gap.seen, gap.held_out) == (SuccessRate(90, 100), SuccessRate(held_out, 50))
    assert gap.sentence.startswith(f"90% on seen tasks, {held_out / 50:.0%} on “held-out task”")
    assert sentence in gap.sentence
    assert "all seen tasks (2 tasks) with all held-out ones (1 task)" in gap.sentence
    assert success.verdicts(all_rows) == [gap.sentence]


def test_tasks_without_demonstrations_and_without_seen_tasks_have_no_gap():
    all_rows = rows("trained", "held_out_task", "sweep", [True] * 5)
    assert generalization_gaps(all_rows) == []
    assert "cannot answer" in success.verdicts(all_rows)[0]


@pytest.mark.parametrize(
    ("asked", "instead", "sentence"),
    [
        (30, 5, "behaviour follows the instruction"),
        (5, 30, "it repeats the task memorised for the scene"),
        (15, 15, "this does not show that the instruction decides"),
        (0, 0, "this does not show that the instruction decides"),
    ],
)
def test_instruction_following_is_interpreted(asked, instead, sentence):
    outcomes = [i < asked for i in range(50)]
    counterfactual = rows("trained", "counterfactual", "touch", [*outcomes, None])
    for i, row in enumerate(counterfactual):
        row["instead"] = asked <= i < asked + instead
    following = success.instruction_following(counterfactual)
    assert (following.instructed, following.original) == (
        SuccessRate(asked, 50, 1),
        SuccessRate(instead, 50, 1),
    )
    assert sentence in following.sentence
    assert success.verdicts(counterfactual) == [following.sentence]
    assert success.instruction_following(rows("trained", "train", "touch", [True])) is None


def test_every_evaluation_has_a_verdict_on_memorising():
    (sentence,) = success.verdicts(rows("trained", "train", "touch", [True, False]))
    assert "cannot answer" in sentence


def test_steps_to_success_count_successful_episodes_only():
    mixed = rows("trained", "train", "touch", [True, True, False, None])
    for row, steps in zip(mixed, (4, 7, 99, 99), strict=True):
        row["steps"] = steps
    assert success.steps_to_success(mixed, skill="touch") == 5.5
    assert success.steps_to_success(mixed, skill="push") is None


def test_intervals_of_means_are_wilsons_of_all_episodes_if_skills_have_equally_many():
    groups = {"a": "one", "b": "one", "c": "two"}
    rates = {"a": SuccessRate(3, 10), "b": SuccessRate(9, 10), "c": SuccessRate(10, 10)}
    intervals = success.mean_intervals(rates | {"all": SuccessRate(22, 30)}, groups)
    assert intervals["one"] == pytest.approx(wilson_interval(12, 20))
    assert intervals["tasks"] == pytest.approx(wilson_interval(22, 30))
    assert intervals["two"] == pytest.approx(wilson_interval(10, 10))
    # c has the weight of a and b together: 1 / (2 * 0.25² / 10 + 0.5² / 10) episodes
    assert intervals["groups"] == pytest.approx(wilson_interval(0.8 * 80 / 3, 80 / 3))
    assert success.mean_intervals({"a": SuccessRate(0, 0, 3)}, groups) == {}
