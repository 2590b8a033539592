"""Before training, planted conflicts between groups are found, and nothing else."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from transfer_fakes import TRAITS, mirrored, sample

from octolike.data.specs.catalog import DATASETS
from octolike.evaluation.transfer import (
    action_agreement,
    advice,
    distances,
    group_comparison,
    group_sample,
)


@pytest.fixture(scope="module")
def base():
    return sample("base", 0)


def with_rare_wordings(s):
    """Return the sample with a different wording per episode; both groups have all wordings."""
    return dataclasses.replace(s, instruction=np.array([f"wording {e}" for e in s.episode]))


def test_states_are_matched_by_task_if_each_wording_is_rare(base):
    mirror = with_rare_wordings(sample("mirror", 1, mirrored))
    pair, result = compared(with_rare_wordings(base), mirror)
    assert pair.states == ("proprio", "pictures", "task")
    assert pair.of_kind("mirrored") == ("dy",)
    assert "Conflicting actions: dy have opposite directions under the same task" in result.sentence


def test_clearly_opposite_actions_need_no_similar_states_within_a_group():
    dimension = group_comparison.DimensionComparison("dx", "m", 0, 0, 0, 0, 0.2, -0.8, 1, 0)
    assert dimension.kind == "mirrored"
    assert dataclasses.replace(dimension, across=-0.3).kind == "unknown"
    assert dataclasses.replace(dimension, across=np.nan).kind == "unknown"


def rescaled(action):
    return action * [2.5, 2.5, 2.5, 1, 1, 1, 1]


def compared(first, second):
    pair = group_comparison.compare_groups(first, second)
    return pair, advice.advise(first.traits, second.traits, pair)


def test_data_of_the_same_expert_are_shared(base):
    pair, result = compared(base, sample("twin", 1))
    assert result.verdict == "share"
    assert "same end-effector and workspace" in result.sentence.lower()
    assert pair.overlap > 0.8
    assert pair.states == ("proprio", "pictures", "instruction")
    assert {d.kind for d in pair.dimensions if d.name in ("dx", "dy", "dz")} == {"same"}
    assert pair.joint < 2.5 * pair.joint_floor
    assert abs(pair.cosine_across - pair.cosine_within) < 0.15


def test_mirrored_actions_in_the_same_scene_are_detected(base):
    """The distributions are equal; only neighbours show the difference."""
    pair, result = compared(base, sample("mirror", 1, mirrored))
    assert pair.of_kind("mirrored") == ("dy",)
    assert result.verdict == "separate heads"
    assert (
        "Conflicting actions: dy have opposite directions under the same instruction"
        in result.sentence
    )
    dy = pair.dimensions[1]
    assert dy.scaled < 3 * dy.floor
    assert dy.across < -0.3 < 0.3 < dy.within


def test_rescaled_actions_in_the_same_scene_are_detected(base):
    pair, result = compared(base, sample("big", 1, rescaled))
    assert pair.of_kind("rescaled") == ("dx", "dy", "dz")
    assert pair.dimensions[0].ratio == pytest.approx(2.5, rel=0.15)
    assert "times as large in big" in result.sentence
    assert result.verdict == "separate heads"
    # normalised separately, as by separate embodiment records, the groups are equal again
    assert pair.dimensions[0].scaled > 3 * pair.dimensions[0].normalised
    turned = group_comparison.compare_groups(sample("big", 1, rescaled), base)
    assert turned.dimensions[0].ratio == pytest.approx(1 / 2.5, rel=0.15)


def test_a_constant_offset_is_detected(base):
    moved = sample("moved", 1, lambda a: a + [0, 0, 0.2, 0, 0, 0, 0])
    pair, result = compared(base, moved)
    assert pair.of_kind("shifted") == ("dz",)
    assert result.verdict == "convert first"


def test_different_tasks_in_the_same_scene_need_conditioning(base):
    permuted = sample("other", 1, lambda a: a[:, [1, 2, 0, 3, 4, 5, 6]], text=("lift",))
    pair, result = compared(base, permuted)
    assert pair.states == ("proprio", "pictures")
    assert pair.same_instructions == 0
    assert set(pair.of_kind("unrelated")) == {"dx", "dy", "dz"}
    assert result.verdict == "share with conditioning"


def test_opposite_tasks_with_different_instructions_do_not_conflict(base):
    """Both groups have both instructions; matched by instruction, nothing contradicts."""
    data = [sample(n, i, None if i else mirrored, text=("one", "two")) for i, n in enumerate("ab")]
    swapped = []
    for s, sign in zip(data, (1, 1), strict=True):
        second = s.instruction == "two"
        action = np.where(second[:, None], mirrored(s.action), s.action) * sign
        swapped.append(dataclasses.replace(s, action=mirrored(action) if s.name == "a" else action))
    pair = group_comparison.compare_groups(*swapped)
    assert pair.of_kind("mirrored") == ()
    assert "dy" in pair.of_kind("same")


def test_distant_states_cannot_contradict(base):
    pair, result = compared(base, sample("far", 1, mirrored, shift=9.0))
    assert pair.overlap < 0.1
    assert all(d.kind == "unknown" for d in pair.dimensions)
    assert result.verdict == "share"
    assert "Little common ground" in " ".join(f.sentence for f in result.findings)


def test_noise_is_not_a_conflict(base):
    a, b = (sample(n, i, noise=40.0) for i, n in enumerate("ab"))
    pair, _ = compared(a, b)
    assert {d.kind for d in pair.dimensions[:3]} <= {"unknown"}


def with_tasks_of(s, episodes):
    """Return the sample with a new wording and task after every `episodes` episodes."""
    words = np.array([f"wording {e // episodes}" for e in s.episode])
    return dataclasses.replace(s, instruction=words, task=words)


def test_neighbours_come_from_other_episodes(base):
    """With two episodes per task, one in each half, similar states exist only in the episode."""
    twin = sample("twin", 1)
    two, result = compared(with_tasks_of(base, 2), with_tasks_of(twin, 2))
    assert two.probes == 0
    assert result.verdict == "share"
    assert "The actions were not compared: 0 similar states" in result.sentence
    assert not result.sentence.endswith("share.")
    assert {d.kind for d in two.dimensions} == {"unknown"}
    four, _ = compared(with_tasks_of(base, 4), with_tasks_of(twin, 4))
    assert four.probes >= action_agreement.MIN_PROBES


def test_a_sample_is_split_by_episodes_and_too_few_are_rejected(base):
    first, two = base.halves()
    assert not set(first.episode) & set(two.episode)
    assert len(first) + len(two) == len(base)
    few = base.take(base.episode < 3)
    with pytest.raises(ValueError, match="base has 3 episodes; a comparison needs at least 4"):
        group_comparison.compare_all([few, few])


def test_distances_equal_their_definitions():
    x = np.random.default_rng(0).normal(size=(4000, 2))
    moved = x + [3.0, 0.0]
    assert distances.wasserstein(x, moved) == pytest.approx([3, 0])
    assert distances.wasserstein(x, 2 * x)[0] == pytest.approx(np.abs(x[:, 0]).mean(), rel=0.05)
    # the mean over directions of |3 cos| is 6 / π
    assert distances.sliced_wasserstein(x, moved) == pytest.approx(6 / np.pi, rel=0.15)


def change(**fields):
    return dataclasses.replace(TRAITS, **fields)


@pytest.mark.parametrize(
    ("other", "verdict", "about"),
    [
        (change(end_effector="CLASH hand"), "keep apart", "Gripper against hand: keep apart"),
        (change(end_effector="pushing stick"), "keep apart", "Gripper against stick"),
        (change(gripper="absolute, 1 = closed"), "convert first", "Gripper conventions differ"),
        (change(control_hz=20.0), "convert first", "5 against 20 actions per second"),
        (change(units=("mm", *TRAITS.units[1:])), "convert first", "dx: m against mm"),
        (change(absolute=(True,) * 7), "convert first", "dx, .*: deltas against absolute targets"),
        (
            change(action=tuple(f"joint_{i}" for i in range(6)) + ("gripper",)),
            "separate heads",
            "End-effector against joint angles",
        ),
        (change(cameras=("side",)), "share with conditioning", "No common camera"),
        (change(robot="Franka", end_effector="Robotiq 2F-85"), "share", "Different robots"),
    ],
)
def test_mismatches_of_specs_are_reported(base, other, verdict, about):
    import re

    twin = dataclasses.replace(sample("twin", 1), traits=other)
    _, result = compared(base, twin)
    assert result.verdict == verdict
    assert any(re.search(about, f.sentence) for f in result.findings)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ("tabletop", "gripper"),
        ("bridge_dataset", "gripper"),
        ("language_table", "stick"),
        ("aloha_static_dataset", "gripper"),
    ],
)
def test_end_effectors_of_real_specs(row, kind):
    assert advice.end_effector(group_sample.traits_of(DATASETS[row])) == kind


def test_every_spec_has_a_named_action_space():
    spaces = {
        name: advice.action_space(group_sample.traits_of(row)) for name, row in DATASETS.items()
    }
    assert spaces["bridge_dataset"] == "end-effector"
    assert spaces["aloha_static_dataset"].startswith("two arms' joint angles")
    assert "other actions" not in spaces.values() or len(set(spaces.values())) > 3


def test_a_single_dataset_is_compared_by_task():
    def episode(label, text, pictures=True):
        images = {"primary": np.zeros((3, 4, 4, 3), np.uint8)} if pictures else {}
        return SimpleNamespace(
            action=np.zeros((3, 7)), proprio=None, images=images, label=label, instruction=text
        )

    rows = [episode("lift/red", "lift it")] * 5 + [episode("", "push")] * 4 + [episode("", "no")]
    lift, two = group_sample.group_samples([(DATASETS["tabletop"], rows)])
    assert (lift.name, two.name, len(lift), len(two)) == ("lift", "push", 15, 12)
    assert lift.images.shape == (15, 4, 4, 3)
    mixed = group_sample.group_sample(
        "x", DATASETS["tabletop"], [rows[0], episode("", "", pictures=False)]
    )
    assert mixed.images is None
    with pytest.raises(ValueError, match="one dataset, with 1 tasks of at least 4 of 5 episodes"):
        group_sample.group_samples([(DATASETS["tabletop"], rows[:5])])
