"""History, plans of chunks, ensembling, delays and prefixes: the executed actions."""

import types

import numpy as np
import pytest

from octolike.policy.execution import (
    ActionPrefix,
    ChunkPlan,
    ExecutionSettings,
    FrameHistory,
    check_prefix,
    plan_for,
    prefix_weights,
)

H, A = 6, 3
ABSOLUTE = (False, False, True)  # two changes and a gripper
GRIPPER = (False, False, True)


def plan(**settings):
    return ChunkPlan(ExecutionSettings(**settings), ABSOLUTE, GRIPPER)


def chunk_of(number):
    """Return a chunk with 100 · number + index in its first dimension."""
    chunk = np.zeros((H, A), np.float32)
    chunk[:, 0] = 100 * number + np.arange(H)
    return chunk


def marks(actions):
    return np.asarray(actions)[:, 0].tolist()


def test_history_repeats_the_first_frame_and_masks_it():
    history = FrameHistory(3)
    for _ in range(2):  # the second episode has no history of the first
        history.clear()
        for t in range(5):
            history.append({"proprio": np.array([t]), "image_primary": None})
            stacked, times = history.stacked(), [max(0, t - 2), max(0, t - 1), t]
            assert stacked["proprio"][:, 0].tolist() == times
            assert stacked["image_primary"] is None
            assert stacked["timestep_mask"].tolist() == [t >= 2, t >= 1, True]
            assert stacked["timestep_mask"].dtype == bool
    with pytest.raises(ValueError, match="window is 0"):
        FrameHistory(0)


def test_a_chunk_that_comes_late_is_entered_at_its_own_step():
    """The drawing of the module."""
    robot = plan(execute=3)
    assert marks(robot.round(chunk_of(0), delay=2)) == [0, 1, 2], "the first chunk is waited for"
    assert marks(robot.round(chunk_of(3), delay=2)) == [3, 4, 302]
    assert marks(robot.round(chunk_of(6), delay=2)) == [303, 304, 602]


def test_a_delay_beyond_execute_makes_rounds_longer():
    robot = plan(execute=1)
    robot.round(chunk_of(0), delay=4)
    assert marks(robot.round(chunk_of(1), delay=4)) == [1, 2, 3, 4]
    assert marks(robot.round(chunk_of(5), delay=4)) == [104, 105, 0, 0], "changes of 0: held still"


def test_a_waiting_robot_holds_still_and_loses_no_action():
    robot = plan(execute=2, overlap="wait")
    first = chunk_of(1)
    first[:, 2] = 0.7
    robot.round(first, delay=3)
    actions = robot.round(chunk_of(2), delay=3)
    assert marks(actions) == [0, 0, 0, 200, 201]
    np.testing.assert_allclose(actions[:3, 2], 0.7)  # a target is repeated, a change is 0


@pytest.mark.parametrize("k", [1, 2, 3])
def test_ensembling_equals_its_definition(k):
    """Every executed action is the weighted mean of all predictions for its step."""
    m, robot = 0.3, plan(execute=k, ensemble=0.3)
    for seed in range(2):  # the second episode starts with an empty ensemble
        robot.clear()
        chunks = np.random.default_rng(seed).normal(size=(6, H, A)).astype(np.float32)
        executed = np.concatenate([robot.round(chunk, delay=0) for chunk in chunks])
        for step, action in enumerate(executed):
            starts = [s for s in range(0, step + 1, k) if step < s + H]
            predictions = [chunks[s // k][step - s] for s in starts]
            expected = np.average(predictions, axis=0, weights=np.exp(m * np.array(starts)))
            expected[2] = predictions[-1][2]  # a gripper is not averaged
            np.testing.assert_allclose(action, expected, atol=1e-6)


def test_a_gripper_keeps_its_target_within_the_band():
    robot = plan(execute=H, gripper_band=0.3)
    chunk = chunk_of(0)
    chunk[:, 2] = [0, 0.2, 0.9, 0.65, 0.5, 0.1]
    np.testing.assert_allclose(robot.round(chunk, 0)[:, 2], [0, 0, 0.9, 0.9, 0.5, 0.1])


def test_after_a_release_the_chunk_is_continued():
    opening, closed = chunk_of(1), chunk_of(0)
    opening[:, 2] = 1
    robot = plan(execute=1, release=3)
    assert marks(robot.round(closed, 0)) == [0]
    assert marks(robot.round(opening, 0)) == [100, 101, 102, 103], "and three further actions"
    assert marks(robot.round(opening, 0)) == [100], "it stays open"
    assert marks(robot.round(closed, 0)) == [0], "closing is no release"
    assert len(robot.round(opening, 0)) == 4
    robot.clear()
    assert marks(robot.round(opening, 0)) == [100], "an episode may start open"
    longer = plan(execute=1, release=9)
    longer.round(closed, 0)
    assert len(longer.round(opening, 0)) == H, "at most the chunk"


def test_the_prefix_is_what_the_robot_executes_meanwhile():
    robot = plan(execute=3, real_time="guided")
    assert robot.prefix(2) is None
    robot.round(chunk_of(0), 2)
    prefix = robot.prefix(2)
    assert (marks(prefix.actions), prefix.delay, prefix.method) == ([3, 4, 5], 2, "guided")
    executed = robot.round(chunk_of(3), 2)
    np.testing.assert_array_equal(executed[:2], prefix.actions[:2])
    assert plan(execute=3).prefix(2) is None


def test_weights_are_one_then_decay_to_nothing():
    weights = prefix_weights(2, 4, H)
    assert weights[:2].tolist() == [1, 1]
    assert 1 > weights[2] > weights[3] > 0
    assert weights[4:].tolist() == [0, 0]
    c = 2 / 3  # (length − i) / (length − delay + 1) at i = 2
    assert weights[2] == pytest.approx(c * np.expm1(c) / np.expm1(1))
    assert not prefix_weights(0, 0, H).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"execute": 0}, "execute is 0"),
        ({"overlap": "skip"}, "overlap is 'skip'"),
        ({"real_time": "magic"}, "real_time is 'magic'"),
        ({"real_time": "guided", "ensemble": 1.0}, "needs the plain chunks"),
        ({"ensemble": -1.0}, "must not be negative"),
        ({"release": -1}, "release is -1"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        ExecutionSettings(**settings)


def policy_of(real_time="guided", absolute=ABSOLUTE):
    action = {"names": ["dx", "dy", "g"], "absolute": absolute, "not_averaged": GRIPPER}
    metadata = {"horizon": H, "window": 1, "real_time": real_time, "action": action}
    return types.SimpleNamespace(metadata=metadata)


@pytest.mark.parametrize(
    ("settings", "real_time", "message"),
    [
        ({"execute": 7}, "", "execute is 7; the policy predicts 6 actions"),
        ({"real_time": "guided"}, "", "real_time needs a policy with a diffusion or flow head"),
        ({"real_time": "trained"}, "guided", "trained without prefixes"),
    ],
)
def test_settings_must_fit_the_policy(settings, real_time, message):
    with pytest.raises(ValueError, match=message):
        plan_for(policy_of(real_time), ExecutionSettings(**settings))


def test_ensembling_changes_is_warned_about_and_targets_are_not():
    settings = ExecutionSettings(ensemble=0.1)
    with pytest.warns(UserWarning, match=r"ensembling averages changes \(dx, dy\)"):
        plan_for(policy_of(), settings)
    plan_for(policy_of(absolute=(True, True, True)), settings)


@pytest.mark.parametrize(
    ("actions", "delay", "message"),
    [
        (np.zeros((7, A)), 0, r"actions \[7, 3\]; expected \[n, 3\] with n at most"),
        (np.zeros((2, A)), 3, "a delay of 3 and 2 actions"),
        (np.full((2, A), np.inf), 0, "not finite"),
    ],
)
def test_prefixes_are_checked(actions, delay, message):
    with pytest.raises(ValueError, match=message):
        check_prefix(ActionPrefix(actions, delay), H, A)


def test_bad_chunks_are_rejected():
    with pytest.raises(ValueError, match=r"shape \[2, 2\]; expected \[H, 3\]"):
        plan().add(np.zeros((2, 2)), 0)
    with pytest.raises(ValueError, match="not finite"):
        plan().add(np.full((2, A), np.nan), 0)
