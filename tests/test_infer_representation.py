"""Which representation inspect_data recommends for targets, and that the spec file can use it."""

import runpy

import numpy as np
import pytest
from data_fakes import numbered, write

from octolike.data.onboarding import infer_spec
from octolike.data.onboarding.infer_representation import recommend, repeated_states
from octolike.data.onboarding.survey import survey_dataset
from octolike.embodiment import Layout
from octolike.representation import Representation

T, JOINTS = 80, tuple(f"joint_{i}" for i in range(6))


def layout(names, absolute=True, unit="rad"):
    size = len(names)
    return Layout(
        names=names, units=(unit,) * size, absolute=(absolute,) * size, normalized=(True,) * size
    )


def episodes(offset=0.0):
    """Return (targets, states): each state is the target before, less the offset."""
    targets, states = [], []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        moves = 0.05 * np.cumsum(rng.normal(size=(T + 1, 6)) / np.sqrt(T), axis=0)
        x = rng.uniform(-1, 1, 6) + moves
        targets.append(x[1:])
        states.append(x[:-1] - offset)
    return targets, states


def test_targets_close_to_their_states_are_to_be_learned_as_changes():
    found = recommend(layout(JOINTS), layout(JOINTS), *episodes())
    assert found.representation == "delta"
    assert "6 targets are 0.01 of their spread away" in found.reason


def test_targets_with_an_offset_are_to_be_learned_relative_to_the_state():
    found = recommend(layout(JOINTS), layout(JOINTS), *episodes(offset=0.1))
    assert found.representation == "relative"
    assert "a lag or an offset" in found.reason


@pytest.mark.parametrize(
    ("action", "offset"),
    [
        (layout(JOINTS, absolute=False), 0.0),  # changes already
        (layout(JOINTS), 5.0),  # each target is far from its state
        (layout(tuple(f"gripper_{i}" for i in range(6))), 0.0),  # learned as stored
    ],
)
def test_other_actions_are_learned_as_they_are(action, offset):
    found = recommend(action, layout(action.names), *episodes(offset))
    assert found == ("", "")


def test_values_that_are_not_finite_recommend_nothing():
    targets, states = episodes()
    targets[0][3] = np.inf
    assert recommend(layout(JOINTS), layout(JOINTS), targets, states).representation == ""


def test_targets_named_otherwise_than_their_states_are_reported():
    other = layout(tuple(f"command_{i}" for i in range(6)))
    found = recommend(other, layout(JOINTS), *episodes(), matches=(0, 1, 2, 3, 4, -1))
    assert found.representation == ""
    assert "command_4 follows joint_4" in found.reason
    assert "command_5" not in found.reason


def test_a_pose_in_degrees_is_to_be_converted_first():
    pose = ("x", "y", "z", "roll", "pitch", "yaw")
    found = recommend(layout(pose, unit="deg"), layout(pose, unit="deg"), *episodes())
    assert found.representation == ""
    assert "roll, pitch, yaw in radians" in found.reason


def test_targets_that_repeat_their_states_are_named():
    layouts, (_, states) = (layout(JOINTS), layout(JOINTS)), episodes()
    assert repeated_states(*layouts, states, states) == JOINTS
    assert recommend(*layouts, states, states) == ("", "")


def test_some_joints_may_stand_still():
    layouts, (targets, states) = (layout(JOINTS), layout(JOINTS)), episodes()
    for target, state in zip(targets, states, strict=True):
        target[:, :4] = state[:, :4]
    assert repeated_states(*layouts, targets, states) == ()
    found = recommend(*layouts, targets, states)
    assert found.representation == "delta"
    assert found.reason.startswith("2 targets are ")


def test_the_spec_file_and_its_command_agree_with_the_recommendation(tmp_path):
    recorded = []
    for i, (target, state) in enumerate(zip(*episodes(), strict=True)):
        episode = numbered(i, T, ["image"])
        episode["steps"]["action"] = target.astype(np.float32)
        episode["steps"]["observation"]["state"] = state.astype(np.float32)
        recorded.append(episode)
    survey = survey_dataset(write(tmp_path, "arm", {"train": recorded}))
    spec = infer_spec.infer(survey)
    assert infer_spec.representation_options(spec) == ("--config.data.representation=delta",)
    assert "recommended --config.data.representation=delta: 6 t" in infer_spec.describe_spec(spec)
    path = infer_spec.write_spec(tmp_path / "arm.py", survey, spec)
    assert "    --config.data.representation=delta\n" in path.read_text()
    (stored,) = runpy.run_path(str(path))["DATASETS"]
    a = stored.action
    plan = Representation("delta", a.names, a.absolute, a.normalized, stored.proprio.names)
    assert plan.stored == ()
