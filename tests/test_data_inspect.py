"""Looking at a dataset without a row: what is found, what is guessed, and a row that works."""

import runpy

import numpy as np
import pytest
import recordings
from data_fakes import numbered, write

from octolike.data.onboarding import infer_spec, survey_figures
from octolike.data.onboarding.convert.conversion import ConversionPlan, convert
from octolike.data.onboarding.survey import describe_survey, survey
from octolike.data.rlds.reader import Reader
from octolike.data.rlds.synthetic import fake_episodes, write_fake_dataset
from octolike.data.specs import catalog
from octolike.errors import DataError


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    return survey(write_fake_dataset(tmp_path_factory.mktemp("data")))


def test_a_sound_dataset(seen):
    row = infer_spec.infer(seen)
    assert row.cameras == {"primary": "image_primary", "wrist": "image_wrist"}
    assert row.language == "language_instruction"
    assert (row.action, row.proprio) == (("action",), ("observation.state",))
    assert row.grippers == (6,)
    assert row.action_names[:3] == ("dx", "dy", "dz")
    assert row.absolute[6]
    assert not any(row.absolute[:3])
    text = describe_survey(seen)
    assert "episodes train 12, val 4; control rate unknown" in text
    assert "steps.observation.image_wrist" in text


def test_its_pictures(seen, tmp_path):
    drawn = [survey_figures.histograms(seen, infer_spec.infer(seen))]
    drawn += [survey_figures.contact_sheet(seen, key) for key in seen.pictures]
    for i, figure in enumerate(drawn):
        path = survey_figures.save(figure, tmp_path / "sub" / f"{i}.png")
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_spec_file_is_a_row_that_works(seen, tmp_path):
    path = infer_spec.write_spec(tmp_path / "my_robot.py", seen, infer_spec.infer(seen))
    (row,) = runpy.run_path(str(path))["DATASETS"]
    root = str(seen.directory.parent.parent)
    reader = Reader(row, root, "train")
    for raw in reader.read_records(0):
        episode = reader.parse_episode(raw, "here")
        known = Reader(catalog.find_spec("fake"), root, "train").parse_episode(raw, "here")
        np.testing.assert_array_equal(episode.action, known.action)
        np.testing.assert_array_equal(episode.proprio, known.proprio)
        assert episode.images == known.images
        assert episode.instructions == known.instructions


def test_a_converted_dataset_keeps_names_and_rate(tmp_path):
    path = recordings.lerobot(tmp_path / "in", 2, 3, images=True)
    plan = ConversionPlan(workers=1, validation=0)
    seen = survey(convert(path, str(tmp_path), "mine", plan)[0])
    row = infer_spec.infer(seen)
    assert row.action_names == row.proprio_names == ("a", "b", "grip")
    assert row.control_hz == recordings.FPS
    assert row.cameras == {"primary": "top"}


def test_problems_are_found(tmp_path):
    bad = list(fake_episodes(0, 4, steps=20, cameras={"primary": 8, "wrist": 8}))
    steps = [e["steps"] for e in bad]
    for s in steps:
        s["action"] = np.array(s["action"])
        s["action"][:, 3] = 0
        s["observation"]["state"] = s["observation"]["state"].copy()
    steps[0]["language_instruction"] = ""
    steps[1]["action"][:, 6] = 1
    steps[2]["action"][:, :6] = 0
    steps[3]["observation"]["state"][:, 5] = np.where(
        np.arange(len(steps[3]["action"])) % 2, 3.1, -3.1
    )
    seen = survey(write(tmp_path, "odd", {"train": bad}))
    found = "\n".join(infer_spec.find_problems(seen, infer_spec.infer(seen)))
    assert "1 of 4 episodes have no instruction" in found
    assert "action: dimensions [3, 4, 5] never change" in found
    assert "observation.state: dimensions [5] jump by about 2π" in found
    assert "are idle" in found
    assert "gripper (dimension 6) never moves in 1 episodes" in found
    assert "observation.image_primary: the last image equals the first in 4 of 4" in found


def test_a_jump_and_numbers_that_are_not_finite():
    smooth = np.cumsum(np.full((300, 2), 0.01), axis=0)
    assert infer_spec._field_problems("state", [smooth]) == []
    smooth[150:, 1] += 5
    assert infer_spec._field_problems("state", [smooth]) == [
        "state: jumps in dimensions [1], over 10 times the 99th percentile"
    ]
    smooth[3, 0] = np.nan
    assert (
        "not finite in 1 episodes, the first is 0"
        in infer_spec._field_problems("state", [smooth])[0]
    )


@pytest.mark.parametrize(
    ("keys", "cameras"),
    [
        (["cam_high", "cam_left_wrist"], {"primary": "cam_high", "wrist": "cam_left_wrist"}),
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


def test_targets_and_changes_are_told_apart():
    state = np.cumsum(np.random.default_rng(0).normal(0, 0.1, (50, 3)), axis=0) + 1
    change = np.diff(state, axis=0, append=state[-1:])
    target = state + change
    assert infer_spec._absolute([target], [state]) == (True,) * 3
    assert infer_spec._absolute([change], [state]) == (False,) * 3


def test_directories_that_are_no_dataset(tmp_path):
    with pytest.raises(DataError, match="is no directory"):
        survey(tmp_path / "nowhere")
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match=r"it has a\.txt, expected features\.json.*convert\.py"):
        survey(tmp_path)
    (tmp_path / "mine" / "1.0.0.incomplete").mkdir(parents=True)
    with pytest.raises(DataError, match="is not finished"):
        survey(tmp_path / "mine")
    place = write(tmp_path, "fine", {"train": [numbered(0, 4, ["image_primary"])]})
    assert survey(place.parent).version == "1.0.0"  # found by its name too
    with pytest.raises(DataError, match=r"no split 'test' \(there is: train\)"):
        survey(place, split="test")
    shard = next(place.glob("*tfrecord*"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(DataError, match="cannot be read"):
        survey(place)
    shard.unlink()
    with pytest.raises(DataError, match="is missing"):
        survey(place)
