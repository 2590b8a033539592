"""Inspecting a dataset without a spec: its survey, its problems and its inferred spec."""

import runpy

import numpy as np
import pytest
import recordings
from data_fakes import numbered, write

from octolike.data.onboarding import infer_spec, survey_figures
from octolike.data.onboarding.column_problems import field_problems
from octolike.data.onboarding.convert.conversion import ConversionPlan, convert
from octolike.data.onboarding.infer_layout import infer_layout
from octolike.data.onboarding.problems import find_problems
from octolike.data.onboarding.survey import describe_survey, survey_dataset
from octolike.data.rlds.reader import Reader
from octolike.data.rlds.synthetic import fake_episodes, write_fake_dataset
from octolike.data.specs import catalog
from octolike.errors import DataError


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    return survey_dataset(write_fake_dataset(tmp_path_factory.mktemp("data")))


def test_keys_of_a_sound_dataset_are_inferred(survey):
    spec = infer_spec.infer(survey)
    assert spec.cameras == {"primary": "image_primary", "wrist": "image_wrist"}
    assert spec.language == "language_instruction"
    assert (spec.action, spec.proprio) == (("action",), ("observation.state",))
    assert spec.grippers == (6,)
    assert spec.action_names[:3] == ("dx", "dy", "dz")
    assert spec.absolute[6]
    assert not any(spec.absolute[:3])
    text = describe_survey(survey)
    assert "episodes train 12, val 4; control rate unknown" in text
    assert "steps.observation.image_wrist" in text


def test_histograms_and_contact_sheets_are_png(survey, tmp_path):
    figures = [survey_figures.histograms(survey, infer_spec.infer(survey))]
    figures += [survey_figures.contact_sheet(survey, key) for key in survey.images]
    for i, figure in enumerate(figures):
        path = survey_figures.save(figure, tmp_path / "sub" / f"{i}.png")
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_spec_file_reads_the_same_episodes_as_the_known_spec(survey, tmp_path):
    path = infer_spec.write_spec(tmp_path / "my_robot.py", survey, infer_spec.infer(survey))
    (spec,) = runpy.run_path(str(path))["DATASETS"]
    root = str(survey.directory.parent.parent)
    reader = Reader(spec, root, "train")
    for raw in reader.read_records(0):
        episode = reader.parse_episode(raw, "here")
        expected = Reader(catalog.find_spec("fake"), root, "train").parse_episode(raw, "here")
        np.testing.assert_array_equal(episode.action, expected.action)
        np.testing.assert_array_equal(episode.proprio, expected.proprio)
        assert episode.images == expected.images
        assert episode.instructions == expected.instructions


def test_a_converted_dataset_keeps_names_and_rate(tmp_path):
    path = recordings.lerobot(tmp_path / "in", 2, 3, images=True)
    plan = ConversionPlan(workers=1, validation=0)
    survey = survey_dataset(convert(path, str(tmp_path), "mine", plan)[0])
    spec = infer_spec.infer(survey)
    assert spec.action_names == spec.proprio_names == ("a", "b", "grip")
    assert spec.control_hz == recordings.FPS
    assert spec.cameras == {"primary": "top"}


def test_problems_are_found(tmp_path):
    bad = list(fake_episodes(0, 4, steps=20, cameras={"primary": 8, "wrist": 8}))
    steps = [e["steps"] for e in bad]
    for s in steps:
        s["action"] = np.array(s["action"])
        s["action"][:, 3] = 0
        s["observation"]["state"] = s["observation"]["state"].copy()
    steps[0]["language_instruction"] = ""
    steps[1]["action"][:, 6] = 1
    steps[1]["language_instruction"] = np.array(
        ["reach"] * 12 + ["lift"] * (len(steps[1]["action"]) - 12)
    )
    steps[2]["action"][:, :6] = 0
    steps[3]["observation"]["state"][:, 5] = np.where(
        np.arange(len(steps[3]["action"])) % 2, 3.1, -3.1
    )
    survey = survey_dataset(write(tmp_path, "odd", {"train": bad}))
    problems = "\n".join(find_problems(survey, infer_spec.infer(survey)))
    assert "1 of 4 episodes have no instruction" in problems
    assert "language_instruction: the text changes within 1 of 4 episodes" in problems
    assert "action: dimensions [3, 4, 5] never change" in problems
    assert "observation.state: dimensions [5] jump by about 2π" in problems
    assert "are idle" in problems
    assert "gripper (dimension 6) never moves in 1 episodes" in problems
    assert (
        "observation.image_primary: the first and last images are identical in 4 of 4" in problems
    )


def test_a_camera_that_shows_nothing_is_named(tmp_path):
    rng, t = np.random.default_rng(0), 6
    episodes = [numbered(i, t, ["image_cap", "image_blue", "image_good"]) for i in range(3)]
    for episode in episodes:
        observation = episode["steps"]["observation"]
        shape = observation["image_cap"].shape
        observation["image_cap"] = rng.integers(0, 6, shape).astype(np.uint8)
        observation["image_blue"] = np.full(shape, (0, 0, 255), np.uint8)
        observation["image_good"] = rng.integers(0, 255, shape).astype(np.uint8)
    survey = survey_dataset(write(tmp_path, "dark", {"train": episodes}))
    problems = "\n".join(find_problems(survey, infer_spec.infer(survey)))
    assert "image_cap: the middle frame is nearly black in 3 of 3 episodes" in problems
    assert "image_blue: the middle frame is of nearly one colour in 3 of 3" in problems
    assert "image_good" not in problems


def test_a_jump_and_numbers_that_are_not_finite():
    smooth = np.cumsum(np.full((300, 2), 0.01), axis=0)
    assert field_problems("state", [smooth]) == []
    smooth[150:, 1] += 5
    assert field_problems("state", [smooth]) == [
        "state: jumps in dimensions [1], larger than 10 times the 99th percentile"
    ]
    smooth[3, 0] = np.nan
    assert "not finite in 1 episodes, the first is 0" in field_problems("state", [smooth])[0]


@pytest.mark.parametrize(
    ("keys", "cameras"),
    [
        (["cam_high", "cam_left_wrist"], {"primary": "cam_high", "wrist": "cam_left_wrist"}),
        (
            ["cam_high", "cam_left_wrist", "cam_right_wrist"],
            {"primary": "cam_high", "wrist": "cam_right_wrist", "left_wrist": "cam_left_wrist"},
        ),
        (["image_1", "image_0"], {"primary": "image_0", "secondary": "image_1"}),
        (
            ["agentview_image", "robot0_eye_in_hand_image"],
            {"primary": "agentview_image", "wrist": "robot0_eye_in_hand_image"},
        ),
        ([], {}),
    ],
)
def test_cameras_by_their_names(keys, cameras):
    assert infer_spec._cameras([f"observation.{k}" for k in keys]) == cameras


def test_targets_and_changes_are_distinguished():
    state = np.cumsum(np.random.default_rng(0).normal(0, 0.1, (50, 3)), axis=0) + 1
    change = np.diff(state, axis=0, append=state[-1:])
    target = state + change
    layout = infer_layout("action", {"action": 3}, [target], state=[state]).layout
    assert layout.absolute == (True,) * 3
    changes = infer_layout("action", {"action": 3}, [change], state=[state])
    assert changes.layout.absolute == (False,) * 3
    assert "closer to the next state than to its change" in changes.evidence["absolute"]


def columns(*functions, steps=200):
    """Return one episode [T, dims] of functions of the step."""
    t = np.arange(steps)
    return [np.stack([np.broadcast_to(f(t), t.shape) for f in functions], axis=1).astype(float)]


SLOW = [lambda t, i=i: np.sin(t / 40 + i) for i in range(6)]


@pytest.mark.parametrize(
    ("closed", "open_", "normalized", "unit"),
    [
        (0, 1, False, ""),
        (-1, 1, False, ""),
        (3, 62, True, "%"),
        (0, 255, True, ""),
        (0, 0.08, True, "m"),
    ],
)
def test_a_gripper_is_left_as_it_is_only_if_it_is_a_share(closed, open_, normalized, unit):
    x = columns(*SLOW, lambda t: np.where(t % 60 < 30, closed, open_))
    for names in ((), tuple("abcdef") + ("gripper",)):
        inferred = infer_layout("action", {"action": 7}, x, names)
        assert inferred.grippers == (6,)
        assert inferred.layout.normalized[6] == normalized
        assert inferred.layout.units[6] == unit
        assert inferred.layout.normalization == (("",) * 6 + ("share",) if normalized else ())
        assert f"{closed} to {open_}" in inferred.evidence["gripper"]
        assert bool(inferred.doubts) == normalized


def test_seven_absolute_columns_without_names_are_not_called_a_pose():
    inferred = infer_layout("action", {"action": 7}, columns(*SLOW, SLOW[0]))
    assert inferred.layout.names == tuple(f"action_{i}" for i in range(7))
    assert inferred.grippers == ()
    assert "joints or of a pose, the data do not say" in inferred.evidence["names"]
    states = tuple(f"state_{i}" for i in range(7))
    layout = infer_layout("proprio", {"state": 7}, columns(*SLOW, SLOW[0]), states).layout
    named = infer_layout("action", {"action": 7}, columns(*SLOW, SLOW[0]), state_layout=layout)
    assert named.layout.names == states
    assert "named after the state" in named.evidence["names"]
    field = {"observation.tcp_pose": 6}
    assert infer_layout("proprio", field, columns(*SLOW)).layout.names[0] == "x"
    field = {"observation.qpos": 6}
    assert infer_layout("proprio", field, columns(*SLOW)).layout.names[5] == "joint_5"


def test_angles_beyond_a_full_turn_are_degrees():
    x = columns(*(lambda t, f=f: 57 * f(t) for f in SLOW))
    named = infer_layout("action", {"action": 6}, x, [f"shoulder_{i}.pos" for i in range(6)])
    assert set(named.layout.units) == {"deg"}
    unnamed = infer_layout("action", {"action": 6}, x)
    for inferred in (named, unnamed):
        assert "exceed 2π" in inferred.doubts[0]
    assert infer_layout("action", {"action": 6}, columns(*SLOW)).doubts == ()


def test_columns_of_several_fields_are_named_after_them_in_the_order_of_their_names(tmp_path):
    rng, t = np.random.default_rng(0), 30
    episode = numbered(0, t, ["image_primary"])
    episode["steps"]["action"] = {
        "translation": rng.normal(size=(t, 3)).astype(np.float32),
        "gripper": (np.arange(t) > 15).astype(np.float32)[:, None],
        "rotation": rng.normal(size=(t, 3)).astype(np.float32),
    }
    survey = survey_dataset(write(tmp_path, "dict", {"train": [episode]}))
    spec = infer_spec.infer(survey)
    assert spec.action == ("action.gripper", "action.rotation", "action.translation")
    assert spec.action_names == (
        "gripper",
        *(f"rotation_{i}" for i in range(3)),
        *(f"translation_{i}" for i in range(3)),
    )
    assert spec.grippers == (0,)
    assert spec.action_layout.layout.normalized == (False, *(True,) * 6)


def test_what_was_inferred_is_marked_with_its_evidence(survey, tmp_path, capsys):
    spec = infer_spec.infer(survey)
    assert "inferred action.names: 7 columns without names in the file" in (
        infer_spec.describe_spec(spec)
    )
    path = infer_spec.write_spec(tmp_path / "my_robot.py", survey, spec)
    (written,) = runpy.run_path(str(path))["DATASETS"]
    assert {"action.names", "action.units", "control_hz", "gripper"} <= written.inferred.keys()
    assert "inferred: fake: control_hz: not in the data" in catalog.describe_uncertain([written])


def test_directories_that_are_not_datasets_are_rejected(tmp_path):
    with pytest.raises(DataError, match="is not a directory"):
        survey_dataset(tmp_path / "nowhere")
    (tmp_path / "a.txt").touch()
    with pytest.raises(
        DataError, match=r"it has a\.txt, expected features\.json.*octolike convert"
    ):
        survey_dataset(tmp_path)
    (tmp_path / "mine" / "1.0.0.incomplete").mkdir(parents=True)
    with pytest.raises(DataError, match="is not complete"):
        survey_dataset(tmp_path / "mine")
    directory = write(tmp_path, "fine", {"train": [numbered(0, 4, ["image_primary"])]})
    assert survey_dataset(directory.parent).version == "1.0.0"  # without the version
    with pytest.raises(DataError, match=r"no split 'test'; it has train"):
        survey_dataset(directory, split="test")
    shard = next(directory.glob("*tfrecord*"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(DataError, match="cannot be read"):
        survey_dataset(directory)
    shard.unlink()
    with pytest.raises(DataError, match="is missing"):
        survey_dataset(directory)
