"""Representations of actions: exact inverses, on numpy and TensorFlow, and replays."""

import dataclasses

import numpy as np
import pytest
from data_fakes import config
from data_fakes import opened as opened_rlds
from policy_fakes import SIDE, P, run_of

from octolike.config import ConfigError
from octolike.data.rlds.synthetic import write_fake_dataset
from octolike.embodiment import embodiments_from_json, embodiments_to_json
from octolike.policy import Policy
from octolike.representation import (
    AXES,
    Representation,
    encode_rows,
    euler_angles,
    parse,
    rotation_matrix,
)

POSE = (*AXES, "gripper")
DELTA = (*(f"d{n}" for n in AXES), "gripper")
JOINTS = tuple(f"joint_{i}" for i in range(4))
TEXTS = [
    "as_stored", "as_stored rotation_6d", "absolute", "absolute rotation_6d",
    *(f"{mode}{flags}" for mode in ("relative", "delta")
      for flags in ("", " tool_frame", " rotation_6d", " tool_frame rotation_6d")),
]  # fmt: skip


def plan(text, names=POSE, state=POSE, absolute=None):
    is_change = names[0].startswith("d")
    absolute = absolute or tuple(n == "gripper" or not is_change for n in names)
    return Representation(text, names, absolute, tuple(n != "gripper" for n in names), state)


def targets(n=6, h=5, seed=0):
    """Return pose chunks float32 [n, h, 7] and states [n, 7], with any rotations."""
    rng = np.random.default_rng(seed)
    chunk, state = rng.uniform(-1, 1, (n, h, 7)), rng.uniform(-1, 1, (n, 7))
    for x in (chunk, state):
        x[..., 3:6] *= [3.1, 1.4, 3.1]
    return np.float32(chunk), np.float32(state)


def changes(n=6, h=5):
    """Return chunks of small pose changes, and states."""
    chunk, state = targets(n, h)
    chunk[..., :6] *= 0.05
    return chunk, state


def turns(x):
    """Return the rotation matrices of pose chunks."""
    return rotation_matrix(np.float64(x[..., 3:6]))


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_inverts_encoding_of_poses(text):
    chunk, state = targets()
    back = plan(text).decode(plan(text).encode(chunk, state), state)
    assert back.dtype == np.float32
    np.testing.assert_allclose(back[..., [0, 1, 2, 6]], chunk[..., [0, 1, 2, 6]], atol=2e-6)
    np.testing.assert_allclose(turns(back), turns(chunk), atol=5e-6)


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_inverts_encoding_of_changes(text):
    chunk, state = changes()
    transform = plan(text, DELTA)
    back = transform.decode(transform.encode(chunk, state), state)
    np.testing.assert_allclose(back, chunk, atol=2e-5)


@pytest.mark.parametrize("mode", ["relative", "delta"])
def test_joints_are_relative_to_the_current_state(mode):
    rng = np.random.default_rng(0)
    chunk, state = rng.normal(size=(3, 2, 5, 4)), rng.normal(size=(3, 2, 6))
    names = ("other", *JOINTS, "gripper")
    transform = plan(mode, JOINTS, names)
    learned = transform.encode(chunk, state)
    np.testing.assert_allclose(learned[..., 0, :], chunk[..., 0, :] - state[..., 1:5])
    before = state[..., None, 1:5] if mode == "relative" else chunk[..., :-1, :]
    np.testing.assert_allclose(learned[..., 1:, :], chunk[..., 1:, :] - before)
    np.testing.assert_allclose(transform.decode(learned, state), chunk, atol=1e-6)
    assert transform.needs_state
    assert transform.absolute == (False,) * 4


def test_changes_become_targets_and_sums():
    chunk, state = changes()
    total = np.cumsum(chunk[..., :6], axis=-2)
    absolute = plan("absolute", DELTA).encode(chunk, state)
    np.testing.assert_allclose(absolute[..., :6], total + state[:, None, :6], atol=1e-6)
    joints = Representation("relative", ("base",), (False,), (True,), ())
    assert not joints.needs_state
    np.testing.assert_allclose(joints.encode(chunk[..., :1])[..., 0], total[..., 0], atol=1e-6)
    np.testing.assert_allclose(
        joints.decode(joints.encode(chunk[..., :1])), chunk[..., :1], atol=1e-6
    )


def test_poses_in_the_tool_frame_do_not_depend_on_the_place_of_the_robot():
    chunk, state = targets()
    move, turn = np.array([1.0, -2, 3]), rotation_matrix(np.array([0.3, -0.5, 2.0]))

    def moved(x):
        rotation = euler_angles(turn @ turns(x))
        return np.concatenate([x[..., :3] @ turn.T + move, rotation, x[..., 6:]], axis=-1)

    for text in ("relative tool_frame rotation_6d", "delta tool_frame rotation_6d"):
        here = plan(text).encode(np.float64(chunk), np.float64(state))
        there = plan(text).encode(moved(chunk), moved(state))
        np.testing.assert_allclose(there, here, atol=1e-6)
    base = plan("relative rotation_6d")
    assert np.abs(base.encode(moved(chunk), moved(state)) - base.encode(chunk, state)).max() > 0.1


def test_a_pose_at_the_state_is_the_identity_in_the_tool_frame():
    _, state = targets()
    chunk = np.repeat(state[:, None], 3, axis=1)
    for mode in ("relative", "delta"):
        learned = plan(f"{mode} tool_frame").encode(chunk, state)
        np.testing.assert_allclose(learned[..., :6], 0, atol=1e-6)


def test_rotations_in_six_dimensions_are_continuous_where_angles_wrap():
    chunk, state = targets(1, 2)
    chunk[0, 0, 3:6], chunk[0, 1, 3:6] = (0, 0, np.pi - 1e-3), (0, 0, -np.pi + 1e-3)
    transform = plan("absolute rotation_6d")
    learned = transform.encode(chunk, state)
    assert np.abs(learned[0, 0, 3:9] - learned[0, 1, 3:9]).max() < 3e-3
    assert transform.names == ("x", "y", "z", *(f"rotation_{i}" for i in range(6)), "gripper")
    assert transform.source == (0, 1, 2, *(3,) * 6, 6)
    noisy = learned + np.random.default_rng(0).normal(0, 0.05, learned.shape)
    rotation = turns(transform.decode(noisy, state))
    np.testing.assert_allclose(
        rotation @ rotation.swapaxes(-1, -2), np.broadcast_to(np.eye(3), rotation.shape), atol=1e-6
    )


def test_two_arms_are_two_poses():
    names = tuple(f"{side}_{n}" for side in ("left", "right") for n in POSE)
    left, right = targets(seed=1), targets(seed=2)
    chunk, state = (np.concatenate(pair, axis=-1) for pair in zip(left, right, strict=True))
    both = plan("relative tool_frame", names, names, (True,) * 14)
    learned = both.encode(chunk, state)
    for i, (x, s) in enumerate((left, right)):
        encoded = plan("relative tool_frame").encode(x, s)
        np.testing.assert_allclose(learned[..., 7 * i : 7 * i + 6], encoded[..., :6], atol=1e-6)
    assert both.stored == ("left_gripper", "right_gripper")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("names", [POSE, DELTA])
def test_tensorflow_encodes_like_numpy(text, names):
    tf = pytest.importorskip("tensorflow")
    chunk, state = targets()
    transform = plan(text, names)
    learned = transform.encode(tf.constant(chunk), tf.constant(state), tf.experimental.numpy)
    assert learned.dtype == tf.float32
    np.testing.assert_allclose(learned.numpy(), transform.encode(chunk, state), atol=5e-6)


@pytest.mark.parametrize("is_tensorflow", [False, True])
def test_rows_of_several_robots_are_encoded_each_in_its_way(is_tensorflow):
    chunk, state = targets(6)
    record = np.array([0, 1, 2, 2, 1, 0])
    arm, joints = plan("relative rotation_6d"), plan("delta", JOINTS, JOINTS)
    arguments = [chunk, state, record]
    tf = pytest.importorskip("tensorflow") if is_tensorflow else None
    if tf:
        arguments = [tf.constant(x) for x in arguments]
    widths = [(7, 7), (4, 4), (7, 7)]
    rows = encode_rows([arm, joints, None], widths, *arguments, tf.experimental.numpy if tf else np)
    assert rows.shape == (6, 5, 10)
    rows = np.asarray(rows)
    for i, r in enumerate(record):
        x, s = chunk[i], state[i]
        expected = (arm.encode(x, s), joints.encode(x[:, :4], s[:4]), x)[r]
        np.testing.assert_allclose(rows[i, :, : expected.shape[-1]], expected, atol=5e-6)
    assert encode_rows([None], [(7, 7)], chunk, state, record) is chunk


@pytest.mark.parametrize(
    ("text", "names", "state", "message"),
    [
        ("relativ", POSE, POSE, "'relativ' is not one of as_stored, relative"),
        ("relative 6d", POSE, POSE, "followed by any of tool_frame, rotation_6d"),
        ("absolute tool_frame", POSE, POSE, "tool_frame needs 'relative' or 'delta'"),
        ("relative", POSE, (), "no action of x, y, .* has its state among the proprio"),
        ("relative tool_frame", JOINTS, JOINTS, "needs a pose"),
        ("as_stored rotation_6d", JOINTS, JOINTS, "needs roll, pitch and yaw"),
    ],
)
def test_a_representation_that_does_not_apply_is_an_error(text, names, state, message):
    with pytest.raises(ValueError, match=message):
        plan(text, names, state)
    assert parse("delta tool_frame") == ("delta", True, False)


# In the data


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    write_fake_dataset(directory)
    return directory


@pytest.mark.parametrize(
    "text", ["relative", "absolute rotation_6d", "relative tool_frame rotation_6d"]
)
def test_batches_hold_the_normalised_representation_of_their_chunks(root, text):
    stored = next(opened_rlds(root, window=2, horizon=3).train())
    plain = opened_rlds(root, window=2, horizon=3).embodiments[0]
    data = opened_rlds(root, window=2, horizon=3, representation=text)
    batch, (arm,) = next(data.train()), data.embodiments
    chunk = plain.unnormalize_action(stored["action"])
    proprio = stored["observation"]["proprio"]
    state = proprio * plain.affine("proprio")[1] + plain.affine("proprio")[0]
    expected = arm.encode(chunk, state)
    mask = batch["action_mask"]
    assert mask.shape == batch["action"].shape == (4, 2, 3, len(arm.learned))
    np.testing.assert_allclose(batch["action"][mask], expected[mask], atol=2e-3)
    np.testing.assert_array_equal(mask[..., 0], stored["action_mask"][..., 0])
    back = arm.decode(batch["action"], state)
    valid = stored["action_mask"][..., 0]
    np.testing.assert_allclose(back[valid], chunk[valid], atol=1e-4)


def test_statistics_are_those_of_the_learned_chunks(root):
    (arm,) = opened_rlds(root, horizon=4, representation="relative").embodiments
    (stored,) = opened_rlds(root, horizon=4).embodiments
    assert arm.action_statistics.steps > stored.action_statistics.steps
    assert (arm.action_statistics.std[:3] > 1.2 * stored.action_statistics.std[:3]).all()
    (short,) = opened_rlds(root, horizon=1, representation="relative").embodiments
    assert (short.action_statistics.std[:3] < arm.action_statistics.std[:3]).all()
    (again,) = embodiments_from_json(embodiments_to_json([arm]))
    assert again.representation == "relative"
    assert again.learned == arm.learned
    text = opened_rlds(root, representation="relative").describe()
    names = "dx, dy, dz, droll, dpitch, dyaw"
    assert f"actions of fake are learned as 'relative': {names}; as stored: gripper" in text
    assert "representation" not in embodiments_to_json([stored])[0]


def test_a_representation_that_does_not_apply_is_refused_at_the_start(root):
    with pytest.raises(ConfigError, match="did you mean 'relative'"):
        opened_rlds(root, representation="relativ")
    with pytest.raises(ConfigError, match=r"needs the robot's state; set data.use_proprio"):
        config(root, representation="relative", use_proprio=False)


def test_arrays_give_the_same_batches_statistics_and_record(root):
    from octolike.data.arrays import ArrayFrames, ArraySource

    data = opened_rlds(root, horizon=3, representation="relative tool_frame")
    split = data.source("fake")
    reader, index = split.reader, split.index
    episodes = [
        reader.read_episode(int(i), int(j), int(k))
        for i, j, k in zip(index.shard, index.offset, index.length, strict=True)
    ]
    frames = ArrayFrames(
        images={"primary": np.ones((sum(map(len, episodes)), 8, 8, 3), np.uint8)},
        proprio=np.concatenate([e.proprio for e in episodes]),
        action=np.concatenate([e.action for e in episodes]),
        starts=np.cumsum([0, *map(len, episodes)]),
        instructions=("go",) * len(episodes),
        tasks=("go",) * len(episodes),
    )
    (arm,) = data.embodiments
    robot = dataclasses.replace(arm, action_statistics=None, proprio_statistics=None)
    settings = config(root, horizon=3, representation="relative tool_frame", tasks="dataset")
    source = ArraySource(settings, frames, None, robot)
    (record,) = source.embodiments
    assert record.learned == arm.learned
    t = 5
    chunk = frames.action[[t, t + 1, t + 2]]
    batch = source._builder.batch(frames, np.array([t]), None)
    np.testing.assert_array_equal(batch["action"][0, 0], record.encode(chunk, frames.proprio[t]))


# In the policy


def test_a_policy_returns_targets_from_its_relative_chunks():
    run = run_of()
    (arm,) = run.embodiments
    joints = tuple(f"joint_{i}" for i in range(7))
    layout = dataclasses.replace(
        arm.action, names=joints, absolute=(True,) * 7, normalized=(True,) * 7
    )
    arm = dataclasses.replace(arm, action=layout, proprio=layout, representation="relative")
    policy = Policy(dataclasses.replace(run, embodiments=[arm]))
    plain = Policy(
        dataclasses.replace(run, embodiments=[dataclasses.replace(arm, representation="")])
    )
    task = policy.create_task(instruction="go")
    observation = {
        "image_primary": np.zeros((SIDE, SIDE, 3), np.uint8),
        "proprio": np.linspace(0, 1, P, dtype=np.float32),
    }
    history = observation | {
        "image_primary": np.zeros((2, SIDE, SIDE, 3), np.uint8),
        "proprio": np.stack([1.2 * observation["proprio"], observation["proprio"]]),
    }
    for sample in (observation, history):
        targets = policy.sample_actions(sample, task)
        moves = plain.sample_actions(sample, task)
        np.testing.assert_allclose(targets, moves + observation["proprio"], atol=1e-5)
    with pytest.raises(ValueError, match=r"learned as 'relative', so .*must not be None"):
        policy.sample_actions(observation | {"proprio": None}, task)
