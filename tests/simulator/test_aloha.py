"""ALOHA: episodes and rewards, exact replays of demonstrations, bad input."""

import numpy as np
import pytest

pytest.importorskip("mujoco", reason="needs pip install 'octolike[sim]'")
pytest.importorskip("gym_aloha", reason="needs pip install 'octolike[aloha]'")

from octolike.config import ConfigError
from octolike.envs.aloha import AlohaEnv, collect_episode
from octolike.envs.aloha.aloha_env import NAMES, insertion_reward, transfer_reward
from octolike.envs.replays import replay
from octolike.envs.simulators import AlohaSettings

CUBE = {"split": "train", "skills": ["transfer_cube"]}


@pytest.fixture(scope="module")
def env():
    env = AlohaEnv(AlohaSettings(primary_size=16))
    yield env
    env.close()


def test_a_demonstration_succeeds_and_replays_exactly(env):
    episode = collect_episode(env, 3, "train", ["transfer_cube"], 0.5)
    steps = episode["steps"]
    assert episode["episode_metadata"]["success"]
    count = len(steps["action"])
    assert steps["observation"]["image_primary"].shape == (count, 16, 16, 3)
    assert steps["observation"]["state"].shape == steps["executed_action"].shape == (count, 14)
    recorded = dict(steps["observation"])
    recorded["proprio"] = recorded.pop("state")
    result = replay(env, 3, CUBE, steps["executed_action"], recorded)
    assert result.success
    assert result.steps == count
    assert result.proprio.max() == 0
    assert result.pixels.max() == 0


def test_the_seed_alone_determines_the_positions(env):
    env.reset(seed=1, options=CUBE)
    first = env.scene.object_positions()
    env.reset(seed=2, options=CUBE)
    assert np.abs(env.scene.object_positions() - first).max() > 1e-3
    env.reset(seed=1, options=CUBE)
    np.testing.assert_array_equal(env.scene.object_positions(), first)


def test_a_narrower_view_enlarges_the_cube_and_wrist_images_follow_their_hand():
    settings = AlohaSettings(primary_size=64, zoom=2.0, hand_size=16)
    narrow, wide = AlohaEnv(settings), AlohaEnv(AlohaSettings(primary_size=64))
    try:
        observation, _ = narrow.reset(seed=0, options=CUBE)
        usual, _ = wide.reset(seed=0, options=CUBE)
        assert set(observation) == set(narrow.observation_space.spaces)
        assert set(usual) == {"image_primary", "proprio"}
        assert _red_pixels(observation) > 3 * max(_red_pixels(usual), 1)
        moved = observation["proprio"].copy()
        moved[7] += 0.3  # the right arm's waist
        for _ in range(40):
            after, *_ = narrow.step(moved)
        right = np.abs(np.subtract(after["image_wrist"], observation["image_wrist"], dtype=float))
        left = np.abs(
            np.subtract(after["image_left_wrist"], observation["image_left_wrist"], dtype=float)
        )
        assert right.mean() > 3 * left.mean()  # whose camera sees the right arm
    finally:
        narrow.close()
        wide.close()


def _red_pixels(observation):
    red, green, _ = np.moveaxis(observation["image_primary"].astype(int), -1, 0)
    return int(((red > 120) & (green < 60)).sum())


def test_proprio_and_actions_have_the_same_meaning(env):
    observation, _ = env.reset(seed=0, options=CUBE)
    target = observation["proprio"].copy()
    target[6] = target[13] = 0.9
    target[7] += 0.2  # the right arm's waist
    for _ in range(60):
        observation, *_ = env.step(target)
    assert len(NAMES) == 14
    np.testing.assert_allclose(observation["proprio"], target, atol=0.05)


def test_rewards_equal_the_benchmarks():
    def pair(*names):
        return {frozenset(names)}

    left, right = (f"vx300s_{a}/10_{a}_gripper_finger" for a in ("left", "right"))
    table = pair("red_box", "table")
    assert transfer_reward(set()) == 0
    assert transfer_reward(pair("red_box", right) | table) == 1
    assert transfer_reward(pair("red_box", right)) == 2
    assert transfer_reward(pair("red_box", left) | table) == 3
    assert transfer_reward(pair("red_box", left)) == 4
    both = pair("red_peg", right) | pair("socket-2", left)
    assert insertion_reward(both | pair("red_peg", "table")) == 1
    assert insertion_reward(both) == 2
    assert insertion_reward(pair("red_peg", "socket-3")) == 3
    assert insertion_reward(pair("red_peg", "pin") | pair("red_peg", "table")) == 4


@pytest.mark.parametrize(
    ("action", "message"),
    [(np.zeros(7), r"got shape \[7\]"), (np.full(14, np.nan), "14 finite numbers")],
)
def test_bad_actions_are_errors(env, action, message):
    env.reset(seed=0, options=CUBE)
    with pytest.raises(ValueError, match=message):
        env.step(action)


def test_an_unstable_simulation_truncates_the_episode_with_the_reason(env, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    env.reset(seed=0, options=CUBE)
    env.unwrapped.scene.data.qvel[:] = 1e12
    _, reward, terminated, truncated, info = env.step(np.zeros(14))
    assert (reward, terminated, truncated) == (0.0, False, True)
    assert (info["success"], info["failure"]) == (False, "the simulation became unstable")
    assert not list(tmp_path.iterdir())  # no log file of MuJoCo
    env.reset(seed=0, options=CUBE)
    assert env.step(env.unwrapped.scene.joints())[4]["failure"] == ""


def test_unknown_names_are_errors(env):
    with pytest.raises(ConfigError, match="transfer_cube"):
        env.reset(seed=0, options={"skills": ["transfer_cub"]})
    with pytest.raises(ConfigError, match="train"):
        env.reset(seed=0, options={"split": "trian"})
