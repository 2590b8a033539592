"""Names, units, and targets or changes, of vectors in the conventions that robots have."""

import numpy as np
import pytest

from octolike.data.onboarding.infer_layout import infer_layout

T = 60
DEGREES = np.array([30, -60, 90, 0, 10, 2])  # the last joint stays within a few degrees


def walk(seed, dims, scale=0.05):
    """Return a slow random walk, float64 [T, dims]."""
    return np.cumsum(np.random.default_rng(seed).normal(size=(T, dims)), axis=0) * scale


def noise(seed, dims):
    return np.random.default_rng(seed).normal(size=(T, dims))


def changes(x):
    return np.diff(x, axis=0, append=x[-1:])


def hand(seed, low=0.0, high=1.0):
    return np.where((np.arange(T) + seed) % 30 < 15, low, high)[:, None]


def joints(seed):
    return walk(seed, 6, 2) * (DEGREES != 2) + DEGREES


def infer(action_fields, state_fields, episode):
    """Return the inferred layouts of (action, state); episode: seed → (action, state)."""
    pairs = [episode(seed) for seed in range(4)]
    actions, states = ([p[i] for p in pairs] for i in range(2))
    state = infer_layout("proprio", state_fields, states)
    action = infer_layout("action", action_fields, actions, (), states, state.layout)
    return action, state


def test_one_joint_that_hardly_moves_has_the_unit_of_the_others():
    action, state = infer(
        {"action.joints": 6}, {"observation.joints": 6}, lambda i: (joints(i), joints(i))
    )
    assert set(action.layout.units) == set(state.layout.units) == {"deg"}
    assert all(action.layout.absolute)


@pytest.mark.parametrize("scale", [1.0, 0.2])  # the changes exceed 2π, or stay below it
def test_changes_of_joints_in_degrees_are_neither_cartesian_nor_radians(scale):
    action, _ = infer(
        {"action": 6}, {"observation.qpos": 6}, lambda i: (scale * changes(joints(i)), joints(i))
    )
    assert action.layout.names == tuple(f"joint_{i}" for i in range(6))
    assert set(action.layout.units) == {"deg"}
    assert not any(action.layout.absolute)


def test_velocities_of_joints_are_changes_without_a_unit():
    def episode(i):
        velocity = 0.3 * noise(i, 6)
        return velocity, np.cumsum(velocity, axis=0) * 0.1

    fields = {"action.joint_velocity": 6}, {"observation.joint_positions": 6}
    action, state = infer(*fields, episode)
    assert action.layout.names[0] == "joint_velocity_0"
    assert set(action.layout.units) == {""}
    assert not any(action.layout.absolute)
    assert set(state.layout.units) == {"rad"}


def test_a_dict_of_actions_may_have_another_order_than_the_state():
    scale = np.array([300, 300, 300, 1, 1, 1])

    def episode(i):
        pose = walk(i, 6) * scale
        return np.c_[hand(i, 0, 85), pose], np.c_[pose, hand(i, 0, 85)]

    action, _ = infer({"action.gripper": 1, "action.tcp": 6}, {"observation.state": 7}, episode)
    assert action.grippers == (0,)
    assert all(action.layout.absolute)
    assert not any("look like targets" in x for x in action.doubts)


def test_targets_that_lead_the_state_and_columns_that_stand_still_are_targets():
    def episode(i):
        q = walk(i, 6)
        q[:, 3] = 0.5
        return np.roll(q, -3, axis=0), q

    action, _ = infer({"action": 6}, {"observation.qpos": 6}, episode)
    assert all(action.layout.absolute)
    assert action.layout.names == tuple(f"joint_{i}" for i in range(6))
    assert "columns 3 follow no state" in action.evidence["absolute"]


def test_targets_and_changes_in_one_field_are_doubtful():
    def episode(i):
        arm, base = walk(i, 6), walk(i + 9, 2)
        return np.c_[np.roll(arm, -1, axis=0), changes(base)], np.c_[arm, base]

    action, _ = infer({"action": 8}, {"observation.qpos": 8}, episode)
    assert action.layout.absolute == (True,) * 6 + (False,) * 2
    assert "look like targets, but" in action.doubts[0]


def test_a_gripper_alone_that_looks_like_a_change_is_no_doubt():
    def episode(i):
        arm, angle = walk(i, 6), np.arange(T) / 4 + i
        speed, opening = 0.5 + 0.5 * np.sin(angle), 0.5 - 0.5 * np.cos(angle)
        return np.c_[np.roll(arm, -1, axis=0), speed], np.c_[arm, opening]

    action, _ = infer({"action": 7}, {"observation.qpos": 7}, episode)
    assert all(action.layout.absolute)
    assert not any("look like targets" in x for x in action.doubts)


def test_a_noisy_controller_has_changes_in_its_own_scale():
    def episode(i):
        command = np.clip(noise(i, 6) / 2, -1, 1)
        pose = 0.03 * np.cumsum(np.r_[np.zeros((1, 6)), command[:-1]], axis=0)
        return np.c_[command, hand(i, -1)], np.c_[pose + 0.005 * noise(i + 9, 6), hand(i, 0, 0.04)]

    action, _ = infer({"action": 7}, {"observation.state": 7}, episode)
    assert action.layout.absolute == (False,) * 6 + (True,)
    assert action.layout.names == ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")
    assert action.layout.units[:6] == ("",) * 6  # neither metres nor radians
    assert action.layout.normalized == (True,) * 6 + (False,)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_quaternions_and_rotation_matrices_are_recognised_by_their_values():
    def quaternion(i):
        return unit(walk(i, 4, 0.3) + np.array([0, 0, 0, 1]))

    def columns(i):
        a, b = unit(noise(i, 3)), noise(i + 9, 3)
        return np.c_[a, unit(b - (a * b).sum(1, keepdims=True) * a)]

    field = {"observation.eef_pose": 7}
    poses = [np.c_[walk(i, 3), quaternion(i)] for i in range(4)]
    pose = infer_layout("proprio", field, poses)
    assert pose.layout.names[3:] == tuple(f"quaternion_{i}" for i in range(4))
    assert "w first or last: the data do not say" in pose.evidence["names"]
    assert "sign flips" not in pose.doubts[0]
    poses[0][30:, 3:] *= -1
    assert "sign flips in 1 steps" in infer_layout("proprio", field, poses).doubts[0]
    rotations = [np.c_[walk(i, 3), columns(i), hand(i)] for i in range(4)]
    layout = infer_layout("proprio", {"observation.state": 10}, rotations).layout
    assert layout.names[3:9] == tuple(f"rotation_{i}" for i in range(6))
    euler = [np.c_[walk(i, 6), hand(i)] for i in range(4)]
    named = infer_layout("proprio", {"observation.eef_pose": 7}, euler).layout.names
    assert named == ("x", "y", "z", "roll", "pitch", "yaw", "gripper")


def test_cosines_and_constants_have_no_unit():
    cosines = [np.cos(walk(i, 6)) for i in range(4)]
    layout = infer_layout("proprio", {"observation.joint_pos_cos": 6}, cosines).layout
    assert layout.names[0] == "joint_pos_cos_0"
    assert set(layout.units) == {""}
    zeros = [np.zeros((T, 6))] * 4
    assert set(infer_layout("proprio", {"observation.qpos": 6}, zeros).layout.units) == {""}


def test_all_columns_at_the_end_with_two_values_are_grippers():
    fingers = [np.c_[walk(i, 7), hand(i, 0, 0.04), hand(i, -0.04, 0)] for i in range(4)]
    assert infer_layout("action", {"action": 9}, fingers).grippers == (7, 8)
    rare = [np.c_[walk(i, 7), np.arange(T)[:, None] == 30] for i in range(4)]
    assert infer_layout("action", {"action": 8}, rare).grippers == ()  # a base, rarely used
