"""The recording of LIBERO's demonstrations, without the package: the simulation is a fake."""

import types

import numpy as np

from octolike.envs.libero import libero_expert


class FakeEnv:
    """Succeeds after a number of actions, which it records."""

    skill, instruction = "object/0", "pick up the fake"

    def __init__(self, steps):
        self.steps, self.acted = steps, []
        raw = {
            "robot0_eef_pos": np.zeros(3),
            "robot0_eef_quat": np.array([0.0, 0.0, 0.0, 1.0]),
            "robot0_gripper_qpos": np.zeros(2),
            "robot0_joint_pos": np.zeros(7),
        }
        self.sim = types.SimpleNamespace(env=None, raw=raw, frame=lambda: None)

    def reset(self, seed, options):
        self.acted.clear()

    def act(self, action):
        self.acted.append(action)
        done = len(self.acted) == self.steps
        return float(done), done, False, {"success": done}

    def images(self, frame):
        return dict.fromkeys(("image_primary", "image_wrist"), np.zeros((2, 2, 3), np.uint8))


def test_steps_with_an_idle_label_are_neither_executed_nor_recorded(monkeypatch):
    """Whatever noise they would have had; a change of the gripper alone is recorded."""
    move, still = [0.5, 0, 0, 0, 0, 0], [0, 0, 5e-5, 0, 0, 0]
    labels = [[*still, -1], [*move, -1], [*still, -1], [*still, 1], [*still, 1], [*move, 1]]
    monkeypatch.setattr(libero_expert, "Scene", lambda env: None)
    monkeypatch.setattr(libero_expert, "servo", lambda scene, target: np.array(target.label))
    monkeypatch.setattr(
        libero_expert,
        "plan",
        lambda *_: (types.SimpleNamespace(label=x, is_delicate=False) for x in labels),
    )
    env = FakeEnv(steps=3)
    for noise in (0.0, 0.5):
        episode = libero_expert.collect_episode(env, 3, "train", ["object/0"], noise)
        assert episode["episode_metadata"]["success"]
        assert episode["episode_metadata"]["idle"] == 3
        kept = [labels[1], labels[3], labels[5]]
        np.testing.assert_array_equal(episode["steps"]["action"], np.array(kept, np.float32))
        executed = episode["steps"]["executed_action"]
        assert np.array_equal(executed, np.array(kept, np.float32)) == (noise == 0)
        np.testing.assert_array_equal(env.acted, [libero_expert.to_env(x) for x in executed])
