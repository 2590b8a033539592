"""Success rates, their intervals, and the verdicts that a report draws from them."""

import pytest

from octolike.evaluation import success
from octolike.evaluation.success import (
    SuccessRate,
    generalization_gaps,
    rate_difference,
    wilson_interval,
)


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
    assert rate_difference(SuccessRate(56, 70), SuccessRate(48, 80)) == pytest.approx(
        (0.2, 0.0524, 0.3339), abs=5e-5
    )


def test_impossible_counts_are_rejected():
    with pytest.raises(ValueError, match="3 successes of 2 episodes"):
        wilson_interval(3, 2)


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
