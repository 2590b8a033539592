"""Episode to frames, goals and standard numbers: functions against spelt-out definitions."""

import itertools

import numpy as np
import pytest
from data_fakes import opened, shown, write_numbered

from octolike.data import frames, goals
from octolike.data.standardize import binarize_gripper, bridge, wrap_angle


@pytest.mark.parametrize(("window", "length"), list(itertools.product((1, 2, 3), range(1, 7))))
def test_windows_equal_their_definition(window, length):
    for t in range(length):
        steps, mask = frames.window_steps(t, window)
        for w in range(window):
            step = t - (window - 1) + w
            assert mask[w] == (step >= 0)
            assert steps[w] == (step if step >= 0 else 0)


@pytest.mark.parametrize(
    ("window", "horizon", "length"),
    list(itertools.product((1, 2, 3), range(1, 6), range(1, 7))),
)
def test_chunks_equal_their_definition(window, horizon, length):
    for t, end in itertools.product(range(length), range(length + 1)):
        steps, valid = frames.chunk_steps(t, window, horizon, length, end)
        assert steps.shape == valid.shape == (window, horizon)
        for w, h in itertools.product(range(window), range(horizon)):
            start = t - (window - 1) + w
            assert steps[w, h] == min(max(start + h, 0), length - 1)
            assert valid[w, h] == (start >= 0 and start + h < end)


def test_padding_adds_zeros_on_the_right_only():
    x = np.ones((2, 3, 4), np.float32)
    padded = frames.pad_last(x, 6)
    np.testing.assert_array_equal(padded[..., :4], x)
    assert padded.shape == (2, 3, 6)
    assert not padded[..., 4:].any()
    np.testing.assert_array_equal(frames.pad_last(x, 4), x)


def draw(n=4000, **changes):
    """Return n tasks of frame 2 in an episode of 7 steps."""
    settings = {
        "strategy": "uniform",
        "keep_language": 1.0,
        "keep_goal": 1.0,
        "has_language": True,
    }
    rng = np.random.default_rng(0)
    return [goals.choose(rng, 2, 7, **(settings | changes)) for _ in range(n)]


def test_uniform_goals_lie_after_the_frame_each_as_often():
    drawn = [task.goal for task in draw()]
    values, counts = np.unique(drawn, return_counts=True)
    assert values.tolist() == [3, 4, 5, 6]
    np.testing.assert_allclose(counts / len(drawn), 1 / 4, atol=0.03)


def test_the_last_frame_has_nothing_but_itself_as_its_goal():
    rng = np.random.default_rng(0)
    for strategy in ("uniform", "last"):
        task = goals.choose(
            rng, 6, 7, strategy=strategy, keep_language=1, keep_goal=1, has_language=True
        )
        assert task.goal == 6


def test_last_goals_are_the_last_step():
    assert {task.goal for task in draw(strategy="last", n=50)} == {6}


def test_no_goals_leave_the_instruction_alone():
    tasks = draw(strategy="none", keep_language=0.0, n=50)
    assert set(tasks) == {goals.Task(None, True)}
    assert set(draw(strategy="none", has_language=False, n=50)) == {goals.Task(None, False)}


def test_dropout_is_as_frequent_as_asked_and_never_takes_both():
    tasks = draw(keep_language=0.7, keep_goal=0.6)
    assert all(task.goal is not None or task.language for task in tasks)
    assert np.mean([task.language for task in tasks]) == pytest.approx(0.7, abs=0.02)
    # without an instruction the goal stays: 0.3 + 0.7 · 0.6
    assert np.mean([task.goal is not None for task in tasks]) == pytest.approx(0.72, abs=0.02)
    kept = [task.goal is not None for task in tasks if task.language]
    assert np.mean(kept) == pytest.approx(0.6, abs=0.03)


def test_an_episode_without_language_keeps_its_goal():
    tasks = draw(has_language=False, keep_goal=0.0, n=50)
    assert all(task.goal is not None and not task.language for task in tasks)


def test_one_setting_leaves_the_draws_of_the_others_alone():
    everything = draw(n=100)
    without = draw(n=100, keep_language=0.5, keep_goal=0.5)
    assert all(b.goal in (None, a.goal) for a, b in zip(everything, without, strict=True))


@pytest.mark.parametrize("goal", ["uniform", "last", "none"])
def test_batches_show_and_mask_what_the_definitions_say(goal, tmp_path):
    window, horizon, lengths = 2, 3, [4, 1, 6]
    known = write_numbered(tmp_path, "fake", lengths)
    data = opened(tmp_path, window=window, horizon=horizon, goal=goal, batch_size=len(known))
    batch = next(data.train())
    observation, task = batch["observation"], batch["task"]
    record = data.embodiments[0]
    assert sorted(tuple(p[-1]) for p in shown(observation["image_primary"])) == known
    assert ("image_primary" in task) == (goal != "none")
    for b, pictures in enumerate(shown(observation["image_primary"])):
        episode, t = pictures[-1]
        length = lengths[episode]
        end = length
        if goal != "none":
            goal_episode, end = shown(task["image_primary"])[b]
            assert goal_episode == episode
            assert t < end < length or t == end == length - 1
            assert goal == "uniform" or end == length - 1
        for w in range(window):
            start = t - (window - 1) + w
            assert pictures[w] == [episode, max(start, 0)]
            assert observation["timestep_mask"][b, w] == (start >= 0)
            mean, std = record.proprio_statistics.mean, record.proprio_statistics.std
            proprio = observation["proprio"][b, w, :2] * std[:2] + mean[:2]
            np.testing.assert_allclose(proprio, [episode, max(start, 0)], atol=1e-5)
            for h in range(horizon):
                assert (batch["action_mask"][b, w, h] == (start >= 0 and start + h < end)).all()
                step = min(max(start + h, 0), length - 1)
                action = record.unnormalize_action(batch["action"][b, w, h])
                np.testing.assert_allclose(action[:2], [episode, step], atol=1e-5)
                assert action[6] == step % 2


def test_dropout_shows_in_the_batch(tmp_path):
    write_numbered(tmp_path, "fake", [5, 5])
    data = opened(tmp_path, goal="uniform", keep_language=0.5, keep_goal=0.5, batch_size=200)
    task = next(data.train())["task"]
    language, goal = task["present"]["language"], task["present"]["image_primary"]
    assert (language | goal).all()
    assert 0.35 < language.mean() < 0.65
    assert 0.6 < goal.mean() < 0.9
    np.testing.assert_array_equal(task["language"]["mask"].any(1), language)
    np.testing.assert_array_equal(task["language"]["ids"].any(1), language)
    np.testing.assert_array_equal(task["image_primary"].any((1, 2, 3)), goal)


def test_a_goal_that_no_camera_shows_is_none(tmp_path):
    write_numbered(tmp_path, "fake", [5, 5])
    for cameras in ({}, {"primary": 8}):
        batch = next(opened(tmp_path, goal="last", keep_language=0.0, cameras=cameras).train())
        assert batch["task"]["present"]["language"].all() == (not cameras)
        assert batch["action_mask"][:, 0, 0].all() == (not cameras)


def test_small_angles_are_left_exactly_alone():
    x = np.linspace(-3.14, 3.14, 1001).astype(np.float32)
    np.testing.assert_array_equal(wrap_angle(x), x)


def test_wrapped_angles_are_the_same_angles_in_the_half_open_circle():
    x = np.concatenate([np.linspace(-20, 20, 4001), np.pi * np.arange(-5, 6)])
    y = wrap_angle(x)
    assert (y > -np.pi).all()
    assert (y <= np.pi).all()
    np.testing.assert_allclose(np.exp(1j * y), np.exp(1j * x), atol=1e-12)
    assert wrap_angle(np.array([np.pi, -np.pi])).tolist() == [np.pi, np.pi]


def by_definition(x):
    """Return each step's gripper: its own or the next extreme, else the last command's side."""
    result = []
    for t in range(len(x)):
        extremes = [v for v in x[t:] if v < 0.05 or v > 0.95]
        result.append(float(extremes[0] > 0.95) if extremes else float(x[-1] > 0.5))
    return result


def test_binary_grippers_equal_their_definition():
    for x in itertools.product((0.0, 0.04, 0.3, 0.7, 1.0), repeat=5):
        found = binarize_gripper(np.array(x, np.float32))
        assert found.dtype == np.float32
        assert found.tolist() == by_definition(x), x


def test_a_gripper_command_that_is_no_number_is_not_taken_for_one():
    found = binarize_gripper(np.array([1, 0.5, np.nan, 0.5, 0, np.inf, 0.5], np.float32))
    np.testing.assert_array_equal(found, [1, np.nan, np.nan, 0, 0, np.nan, 0])


def test_binary_grippers_are_octos_where_it_decides(shared):
    with np.load(shared / "golden" / "octo_parts" / "helpers.npz") as golden:
        for i in range(3):
            x, octos = golden[f"binarize/{i}/in"], golden[f"binarize/{i}/out"]
            # after the last extreme Octo leaves the raw value, which is neither open nor closed
            np.testing.assert_array_equal(binarize_gripper(x), np.where(octos > 0.5, 1, 0))


def test_bridge_actions_are_the_reached_changes_with_wrapped_angles():
    state = np.zeros((3, 7), np.float32)
    state[:, 0], state[:, 3], state[:, 6] = [0, 0.1, 0.3], [3.1, -3.1, -3.0], [1, 0.5, 0]
    action = np.zeros((3, 7), np.float32)
    action[:, 6] = [0.5, 0.5, 0]
    standard = bridge({"observation": {"state": state}, "action": action})
    np.testing.assert_allclose(standard.action[:, 0], [0.1, 0.2], atol=1e-6)
    np.testing.assert_allclose(standard.action[:, 3], [2 * np.pi - 6.2, 0.1], atol=1e-6)
    np.testing.assert_array_equal(standard.action[:, 6], [0, 0])
    np.testing.assert_array_equal(standard.proprio, state[:2])
    assert standard.action.dtype == standard.proprio.dtype == np.float32
