"""Windows, chunks, goals and standardised numbers against their explicit definitions."""

import itertools

import numpy as np
import pytest
from data_fakes import opened, shown, write_numbered

from octolike.data.pipeline import goals, windows
from octolike.data.specs.catalog import find_spec


@pytest.mark.parametrize(("window", "length"), list(itertools.product((1, 2, 3), range(1, 7))))
def test_windows_equal_their_definition(window, length):
    for t in range(length):
        steps, mask = windows.window_steps(t, window)
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
        steps, valid = windows.chunk_steps(t, window, horizon, length, end)
        assert steps.shape == valid.shape == (window, horizon)
        for w, h in itertools.product(range(window), range(horizon)):
            start = t - (window - 1) + w
            assert steps[w, h] == min(max(start + h, 0), length - 1)
            assert valid[w, h] == (start >= 0 and start + h < end)


def draw(n=4000, *, t=2, language=True, goal=True, task_id=False, **changes):
    """Return the conditioning of n examples of frame t in an episode of 7 steps."""
    settings = {"strategy": "uniform", "keep_language": 1.0, "keep_goal": 1.0, "keep_task_id": 1.0}
    available = {"has_language": language, "has_goal": goal, "has_task_id": task_id}
    return goals.choose(
        np.random.default_rng(0).random((n, goals.DRAWS)),
        np.full(n, t),
        np.full(n, 7),
        **(settings | changes),
        **{k: np.full(n, v) for k, v in available.items()},
    )


def test_uniform_goals_are_uniform_over_the_steps_after_the_frame():
    task = draw()
    assert task.goal.all()
    values, counts = np.unique(task.step, return_counts=True)
    assert values.tolist() == [3, 4, 5, 6]
    np.testing.assert_allclose(counts / 4000, 1 / 4, atol=0.03)


def test_the_last_frame_is_its_own_goal():
    for strategy in ("uniform", "last"):
        assert set(draw(n=50, t=6, strategy=strategy).step) == {6}


def test_last_goals_are_the_last_step():
    assert set(draw(strategy="last", n=50).step) == {6}


def test_without_goals_the_instruction_is_never_dropped():
    for language in (True, False):
        task = draw(strategy="none", keep_language=0.0, language=language, n=50)
        assert not task.goal.any()
        assert (task.language == language).all()


@pytest.mark.parametrize("available", list(itertools.product((True, False), repeat=3)))
def test_dropout_has_the_configured_rates_and_never_removes_everything(available):
    goal, language, task_id = available
    keep = {"keep_goal": 0.6, "keep_language": 0.7, "keep_task_id": 0.2}
    task = draw(goal=goal, language=language, task_id=task_id, **keep)
    actual = np.stack([task.goal, task.language, task.task_id])
    assert (actual.any(0) == any(available)).all()
    assert not actual[~np.array(available)].any()
    rates = np.array(list(keep.values())) * available
    # the first available kind is kept if all would be dropped
    rates[np.argmax(available)] += np.prod(1 - rates) * any(available)
    np.testing.assert_allclose(actual.mean(1), rates, atol=0.03)


@pytest.mark.parametrize("available", list(itertools.product((True, False), repeat=2)))
@pytest.mark.parametrize(
    ("keep_goal", "keep_language", "share"), [(0.5, 0.5, 0.5), (0.6, 0.2, 0.75)]
)
def test_exclusive_keeps_one_of_goal_and_instruction(available, keep_goal, keep_language, share):
    goal, language = available
    keep = {"keep_goal": keep_goal, "keep_language": keep_language, "exclusive": True}
    task = draw(goal=goal, language=language, **keep)
    assert not (task.goal & task.language).any()
    assert ((task.goal | task.language) == (goal or language)).all()
    np.testing.assert_allclose(task.goal.mean(), goal * (share if language else 1), atol=0.03)


def test_a_setting_does_not_change_the_draws_of_others():
    task = draw(n=100)
    with_dropout = draw(n=100, keep_language=0.5, keep_goal=0.5)
    np.testing.assert_array_equal(task.step, with_dropout.step)


@pytest.mark.parametrize("goal", ["uniform", "last", "none"])
def test_batches_match_the_definitions_of_windows_chunks_and_goals(goal, tmp_path):
    window, horizon, lengths = 2, 3, [4, 1, 6]
    frames = write_numbered(tmp_path, "fake", lengths)
    data = opened(tmp_path, window=window, horizon=horizon, goal=goal, batch_size=len(frames))
    batch = next(data.train())
    observation, task = batch["observation"], batch["task"]
    record = data.embodiments[0]
    assert sorted(tuple(p[-1]) for p in shown(observation["image_primary"])) == frames
    assert ("image_primary" in task) == (goal != "none")
    for b, images in enumerate(shown(observation["image_primary"])):
        episode, t = images[-1]
        length = lengths[episode]
        end = length
        if goal != "none":
            goal_episode, end = shown(task["image_primary"])[b]
            assert goal_episode == episode
            assert t < end < length or t == end == length - 1
            assert goal == "uniform" or end == length - 1
        for w in range(window):
            start = t - (window - 1) + w
            assert images[w] == [episode, max(start, 0)]
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


def test_dropped_conditioning_is_masked_in_the_batch(tmp_path):
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


@pytest.mark.parametrize("stream", ["train", "validation"])
def test_no_example_shows_goal_and_instruction_if_they_are_exclusive(tmp_path, stream):
    """Half each; validation, which drops nothing else, resembles training."""
    write_numbered(tmp_path, "fake", [30, 30])
    data = opened(tmp_path, goal="uniform", exclusive=True, batch_size=60)
    batches = data.train() if stream == "train" else data.validation()["fake"]()
    present = next(batches)["task"]["present"]
    assert (present["language"] ^ present["image_primary"]).all()
    assert 0.2 < present["language"].mean() < 0.8


def test_without_cameras_there_are_no_goals(tmp_path):
    write_numbered(tmp_path, "fake", [5, 5])
    for cameras in ({}, {"primary": 8}):
        settings = {"goal": "last", "keep_language": 0.0, "batch_size": 10}
        batch = next(opened(tmp_path, cameras=cameras, **settings).train())
        assert batch["task"]["present"]["language"].all() == (not cameras)
        assert batch["action_mask"][:, 0, 0].all() == (not cameras)


def test_bridge_actions_are_state_changes_with_wrapped_angles():
    state = np.zeros((3, 7), np.float32)
    state[:, 0], state[:, 3], state[:, 6] = [0, 0.1, 0.3], [3.1, -3.1, -3.0], [1, 0.5, 0]
    action = np.zeros((3, 7), np.float32)
    action[:, 6] = [0.5, 0.5, 0]
    steps = {"observation": {"state": state}, "action": action, "is_first": state[:, 0] * 0}
    standard = find_spec("bridge_dataset").standard_steps(steps)
    np.testing.assert_allclose(standard.action[:, 0], [0.1, 0.2], atol=1e-6)
    np.testing.assert_allclose(standard.action[:, 3], [2 * np.pi - 6.2, 0.1], atol=1e-6)
    np.testing.assert_array_equal(standard.action[:, 6], [0, 0])
    np.testing.assert_array_equal(standard.proprio, state[:2])
    assert standard.action.dtype == standard.proprio.dtype == np.float32
