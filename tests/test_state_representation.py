"""Representations of proprio: angles without jumps, the same for the data and the policy."""

import dataclasses

import numpy as np
import pytest
from data_fakes import config, opened
from policy_fakes import SIDE, P, run_of

from octolike.config import ConfigError
from octolike.data import open_data
from octolike.data.rlds.synthetic import write_fake_dataset
from octolike.data.specs.planned import batch_spec
from octolike.embodiment import embodiments_from_json, embodiments_to_json
from octolike.policy.observations import ObservationEncoder
from octolike.representation import rotation_matrix
from octolike.state_representation import StateRepresentation

POSE = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
UNITS = ("m",) * 3 + ("rad",) * 3 + ("",)
JOINTS = ("joint_0", "joint_1", "gripper")


def plan(text, names=POSE, units=UNITS):
    return StateRepresentation(text, names, units, (True,) * len(names))


def states(n=8, width=7, seed=0):
    return np.float32(np.random.default_rng(seed).uniform(-3, 3, (n, width)))


def test_the_sine_and_cosine_give_the_angle_back_and_do_not_jump():
    transform, x = plan("sin_cos", JOINTS, ("rad", "rad", "")), states(width=3)
    y = transform.encode(x * 10, x)
    assert transform.names == (
        "gripper",
        "sin_joint_0",
        "sin_joint_1",
        "cos_joint_0",
        "cos_joint_1",
    )
    np.testing.assert_array_equal(y[:, 0], x[:, 2] * 10)  # as it was normalised
    np.testing.assert_allclose(np.arctan2(y[:, 1:3], y[:, 3:]), x[:, :2], atol=1e-6)
    ends = np.array([[np.pi - 1e-3, 0, 0], [1e-3 - np.pi, 0, 0]])
    assert np.ptp(transform.encode(ends, ends), axis=0).max() < 3e-3


def test_a_rotation_in_six_dimensions_is_that_of_its_angles():
    transform, x = plan("rotation_6d"), states()
    y = transform.encode(x, x)
    assert transform.names == ("x", "y", "z", "gripper", *(f"rotation_{i}" for i in range(6)))
    np.testing.assert_allclose(y[:, 4:7], rotation_matrix(x[:, 3:6])[:, :, 0], atol=1e-6)
    np.testing.assert_allclose(y[:, 7:], rotation_matrix(x[:, 3:6])[:, :, 1], atol=1e-6)


def test_both_leave_the_joints_to_the_sines_and_the_poses_to_the_rotations():
    names = ("left_roll", "left_pitch", "left_yaw", "joint_0", "yaw")
    transform = plan("sin_cos rotation_6d", names, ("rad",) * 5)
    rotation = tuple(f"left_rotation_{i}" for i in range(6))
    assert transform.names == ("sin_joint_0", "sin_yaw", "cos_joint_0", "cos_yaw", *rotation)


@pytest.mark.parametrize(
    ("text", "units", "message"),
    [
        ("cosine", UNITS, "'cosine' is not 'as_stored', or one or both of sin_cos, rotation_6d"),
        ("sin_cos", ("m",) * 3 + ("deg",) * 3 + ("",), r"needs angles in radians; .*roll \(deg\)"),
        ("rotation_6d", ("m",) * 7, "needs roll, pitch and yaw in radians"),
    ],
)
def test_a_representation_that_does_not_apply_is_an_error(text, units, message):
    with pytest.raises(ValueError, match=message):
        plan(text, POSE, units)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    write_fake_dataset(directory)
    return directory


@pytest.mark.parametrize("text", ["sin_cos", "rotation_6d"])
def test_batches_show_what_the_record_makes_of_the_stored_proprio(root, text):
    stored, data = opened(root, window=2), opened(root, window=2, proprio_representation=text)
    (plain,), (arm,) = stored.embodiments, data.embodiments
    shift, scale = plain.affine("proprio")
    raw = next(stored.train())["observation"]["proprio"] * scale + shift
    proprio = next(data.train())["observation"]["proprio"]
    assert proprio.shape == (4, 2, 10) == (4, 2, len(arm.proprio_names))
    np.testing.assert_allclose(proprio, arm.normalize_proprio(raw), atol=1e-5)
    np.testing.assert_array_equal(plain.proprio_statistics.mean, arm.proprio_statistics.mean)
    assert f"proprio of fake is shown as '{text}': x, y, z, gripper, " in data.describe()
    planned = batch_spec(
        config(root, window=2, proprio_representation=text).data, [data.source("fake").spec]
    )
    assert (
        planned["observation.proprio"] == data.spec["observation.proprio"] == ((2, 10), "float32")
    )


def test_a_wrong_word_is_refused_at_the_start(root):
    with pytest.raises(ConfigError, match="did you mean 'sin_cos'"):
        open_data(config(root, proprio_representation="sin_co"))


def test_the_policy_takes_proprio_as_stored():
    run = run_of()
    (arm,) = run.embodiments
    names = tuple(f"joint_{i}" for i in range(P))
    units = (*["rad"] * 2, *[""] * (P - 2))
    layout = dataclasses.replace(arm.proprio, names=names, units=units)
    new = dataclasses.replace(arm, proprio=layout, proprio_representation="sin_cos")
    (again,) = embodiments_from_json(embodiments_to_json([new]))
    assert again.proprio_names == new.proprio_names
    (window, width), kind = run.spec["observation.proprio"]
    spec = {**run.spec, "observation.proprio": ((window, width + 2), kind)}
    encoder = ObservationEncoder(spec, new, "area")
    proprio = np.linspace(-1, 1, P, dtype=np.float32)
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    encoded = encoder.encode({"image_primary": image, "proprio": proprio})["proprio"]
    np.testing.assert_allclose(encoded[-1], new.normalize_proprio(proprio), atol=1e-6)
    assert encoded.shape[-1] == P + 2
