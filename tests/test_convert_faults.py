"""Faults of recordings that could pass in silence: each is read right, refused or stated."""

import json

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import recordings
import tensorflow as tf
from recordings import STEPS, frames, numbers

from octolike.data.onboarding.convert import recording
from octolike.data.onboarding.convert.conversion import ConversionPlan, convert
from octolike.data.onboarding.convert.frame_encoding import ConvertOptions
from octolike.data.onboarding.convert.hdf5 import Hdf5Recording, RobomimicRecording
from octolike.data.onboarding.convert.lerobot import LeRobotRecording
from octolike.data.onboarding.convert.npz import NpzRecording
from octolike.errors import DataError

PLAN = ConversionPlan(workers=1, validation=0)


def read(kind, path, number=0, **options):
    """Return an episode of a recording, as the converter reads it."""
    source = kind(path, ConvertOptions(**options))
    return source.read(source.episodes()[number])


def hdf5(path, attributes=None, **arrays):
    """Write an episode with an action, a state and further arrays; "__" in a name is "/"."""
    with h5py.File(path, "w") as file:
        for name, x in {
            "action": numbers(0, 6),
            "observations__qpos": numbers(0, 6) + 1,
            **arrays,
        }.items():
            file[name.replace("__", "/")] = x
        file.attrs.update(attributes or {})
    return path


def change_table(path, change):
    """Rewrite the parquet files of a LeRobot dataset of version 2 or 3 by a function of columns."""
    for file in (path / "data").rglob("*.parquet"):
        columns = pq.read_table(file).to_pydict()
        change(columns)
        pq.write_table(pa.table(columns), file)
    return path


def test_a_column_without_values_is_left_out(tmp_path):
    """RoboTwin writes point clouds [T, 0] without a camera for them; TensorFlow divides by 0."""
    path = hdf5(tmp_path / "a.hdf5", observations__cloud=np.zeros((STEPS, 0, 3)))
    result = convert(path, str(tmp_path), "mine", PLAN)
    assert result.left_out["cloud"] == "float64 [0, 3] has no values"
    with pytest.raises(DataError, match=r"has no action .*no values"):
        read(Hdf5Recording, hdf5(tmp_path / "b.hdf5", action=np.zeros((STEPS, 0))))


def test_counters_are_no_actions(tmp_path):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:  # AgiBot's layout
        file["action/joint/position"] = numbers(0, 6)
        file["action/joint/index"] = np.arange(STEPS)
        file["action/tool_index"] = np.array([3, 3, 5, 5, 3, 3])
        file["state/joint/position"] = numbers(0, 6)
    episode = read(Hdf5Recording, tmp_path / "a.hdf5")
    assert set(episode["steps"]["action"]) == {"joint_position", "tool_index"}
    assert episode["left_out"]["action.joint_index"] == "a counter of the rows"


def test_images_in_six_channels_and_of_16_bits_are_stated(tmp_path):
    six, deep = np.concatenate([frames(0)] * 2, -1), frames(0)[..., 0].astype(np.uint16)
    changed = read(Hdf5Recording, hdf5(tmp_path / "a.hdf5", obs__rgb=six, obs__ir=deep))["changed"]
    assert "uint8 [16, 16, 6] kept as numbers: a camera has 1, 3 or 4" in changed["rgb"]
    assert "uint16 [16, 16] kept as numbers" in changed["ir"]


def test_numbers_that_float32_cannot_hold_are_stated_or_refused(tmp_path):
    times = 1.7e9 + 0.05 * np.arange(STEPS)
    changed = read(Hdf5Recording, hdf5(tmp_path / "a.hdf5", obs__stamp=times))["changed"]
    assert "float32, which keeps steps of 128" in changed["observation.stamp"]
    assert not read(Hdf5Recording, hdf5(tmp_path / "b.hdf5"))["changed"]
    for huge in (np.full(STEPS, 1e39), np.full(STEPS, 2**63, np.uint64)):
        with pytest.raises(DataError, match="big has values up to"):
            read(Hdf5Recording, hdf5(tmp_path / "c.hdf5", obs__big=huge))


def test_texts_that_are_not_utf_8_are_stated(tmp_path):
    path = hdf5(tmp_path / "a.hdf5", language_instruction=np.array([b"caf\xe9"]))
    assert "not UTF-8" in read(Hdf5Recording, path)["changed"]["language_instruction"]


def test_attributes_are_read_or_listed(tmp_path):
    attributes = {"success": "False", "task": "pick the cup", "sim": True}
    path = hdf5(tmp_path / "a.hdf5", attributes)
    episode = read(Hdf5Recording, path)
    assert episode["episode_metadata"]["success"] is False
    assert "--field language_instruction=task" in episode["left_out"]["attribute task"]
    assert "attribute sim" in episode["left_out"]
    named = read(Hdf5Recording, path, fields=(("language_instruction", "task"),))
    assert set(named["steps"]["language_instruction"]) == {"pick the cup"}
    assert "attribute task" not in named["left_out"]
    with pytest.raises(DataError, match="success is 'maybe'; expected true or false"):
        read(Hdf5Recording, hdf5(tmp_path / "b.hdf5", {"success": "maybe"}))


def test_the_instruction_of_robocasa_is_read(tmp_path):
    path = recordings.robomimic(tmp_path / "demo.hdf5")
    with h5py.File(path, "a") as file:
        del file["data"].attrs["problem_info"]
        file["data/demo_1"].attrs["ep_meta"] = json.dumps({"lang": "pick the apple"})
    episode = read(RobomimicRecording, path, 1)
    assert set(episode["steps"]["language_instruction"]) == {"pick the apple"}


def test_one_part_of_a_group_of_actions_can_be_the_action(tmp_path):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:  # DROID's layout
        file["action/joint_position"], file["action/joint_velocity"] = numbers(0), numbers(1)
        file["observation/joint_position"] = numbers(0)
    fields = (("action", "action/joint_position"),)
    steps = read(Hdf5Recording, tmp_path / "a.hdf5", fields=fields)["steps"]
    np.testing.assert_array_equal(steps["action"], numbers(0))
    np.testing.assert_array_equal(steps["action_joint_velocity"], numbers(1))


def test_npz_of_single_steps_are_refused_and_flags_of_each_step_are_read(tmp_path):
    path = recordings.npz(tmp_path / "in", success=np.arange(STEPS) > 4, done=np.ones(STEPS))
    episode = read(NpzRecording, path)
    assert episode["episode_metadata"]["success"] is True
    assert episode["steps"]["is_terminal"].dtype == bool
    other = recordings.npz(tmp_path / "other", control_hz=20.0)
    assert "20 in some" in read(NpzRecording, other, control_hz=10.0)["changed"]["control_hz"]
    np.savez(tmp_path / "step.npz", action=np.zeros(7), robot_obs=np.zeros(15), rgb=frames(0)[0])
    with pytest.raises(DataError, match="a single step by the other arrays; expected one file"):
        read(NpzRecording, tmp_path / "step.npz")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["False", "False"], False),
        (["false", "true"], True),
        ([0, 0, 1], True),
        (np.array([False]), False),
        (b"failure", False),
    ],
)
def test_flags_in_any_form(values, expected):
    assert recording.flag(values, "here") is expected


def test_the_success_of_lerobot_as_text_is_read(tmp_path):
    path = recordings.lerobot(tmp_path / "in", 2, images=True)
    info = json.loads((path / "meta/info.json").read_text())
    info["features"]["next.success"] = {"dtype": "string", "shape": [1], "names": None}
    (path / "meta/info.json").write_text(json.dumps(info))
    change_table(path, lambda columns: columns.update({"next.success": ["False"] * STEPS}))
    episode = read(LeRobotRecording, path)
    assert episode["episode_metadata"]["success"] is False
    assert "" not in episode["steps"]


@pytest.mark.parametrize("version", [2, 3])
def test_tasks_are_unambiguous(tmp_path, version):
    path = recordings.lerobot(tmp_path / "in", version, images=True)
    change_table(path, lambda columns: columns.update(task_index=[7] * len(columns["action"])))
    with pytest.raises(DataError, match=r"task_index 7 of episode 0 is not in .*has 0, 1"):
        read(LeRobotRecording, path)
    steps = read(LeRobotRecording, path, instruction="go")["steps"]
    assert set(steps["language_instruction"]) == {"go"}
    tasks = ["pick the cup", "open the drawer"]
    rows = [json.dumps({"task_index": 0, "task": task}) for task in tasks]
    (path / "meta/tasks.jsonl").write_text("\n".join(rows))
    pq.write_table(pa.table({"task_index": [0, 0], "task": tasks}), path / "meta/tasks.parquet")
    with pytest.raises(DataError, match="two tasks of index 0, 'pick the cup' and 'open"):
        read(LeRobotRecording, path)


def test_lerobot_rows_without_values_and_repeated_numbers_are_named(tmp_path):
    path = recordings.lerobot(tmp_path / "in", 2, images=True)
    change_table(path, lambda columns: columns["action"].__setitem__(3, None))
    with pytest.raises(DataError, match="action is missing at step 3"):
        read(LeRobotRecording, path)
    path = recordings.lerobot(tmp_path / "twice", 2, images=True)
    change_table(path, lambda columns: columns.update(frame_index=[0, 1, 2] * 2))
    with pytest.raises(DataError, match="frame_index 0 twice: several recordings in one episode"):
        read(LeRobotRecording, path)


def test_an_episode_with_two_different_rows_is_refused(tmp_path):
    for version, remark in ((2, "twice, with different values"), (2, "expected a number from 0")):
        path = recordings.lerobot(tmp_path / remark[:5], version)
        file = path / "meta/episodes.jsonl"
        lines = file.read_text().splitlines()
        file.write_text("\n".join([*lines, lines[0]]))  # the same again is harmless
        assert len(LeRobotRecording(path, ConvertOptions()).episodes()) == len(lines)
        change = {"length": 99} if "twice" in remark else {"episode_index": "0"}
        file.write_text("\n".join([*lines, json.dumps(json.loads(lines[0]) | change)]))
        with pytest.raises(DataError, match=remark):
            LeRobotRecording(path, ConvertOptions()).episodes()


def test_images_as_lists_of_numbers_are_read(tmp_path):
    path = recordings.lerobot(tmp_path / "in", 2, images=True)
    lists = {"observation.images.top": frames(0).tolist()}
    change_table(path, lambda columns: columns.update(lists))
    camera = read(LeRobotRecording, path)["steps"]["observation"]["top"]
    shown = [tf.io.decode_image(x).numpy() for x in camera.frames]
    np.testing.assert_array_equal(shown, frames(0))


def test_the_names_of_gr00t_are_read(tmp_path):
    path = recordings.lerobot(tmp_path / "in", 2, images=True)
    info = json.loads((path / "meta/info.json").read_text())
    info["features"]["action"]["names"] = None
    (path / "meta/info.json").write_text(json.dumps(info))
    parts = {"grip": {"start": 2, "end": 3}, "arm": {"start": 0, "end": 2}}
    (path / "meta/modality.json").write_text(json.dumps({"action": parts}))
    names = LeRobotRecording(path, ConvertOptions()).metadata()["names"]
    assert names["action"] == ["arm_0", "arm_1", "grip"]
    assert names["state"] == ["a", "b", "grip"]  # of info.json


def test_names_of_gr00t_with_gaps_or_overlaps_are_stated(tmp_path):
    path = recordings.lerobot(tmp_path / "in", 2, images=True)
    info = json.loads((path / "meta/info.json").read_text())
    info["features"]["action"]["names"] = None
    (path / "meta/info.json").write_text(json.dumps(info))
    for end, names, remark in (
        (1, ["arm", "unnamed_1", "grip"], "dimensions without a name in meta/modality.json: 1"),
        (3, None, "meta/modality.json: part grip overlaps or does not fit"),
    ):
        parts = {"grip": {"start": 2, "end": 3}, "arm": {"start": 0, "end": end}}
        (path / "meta/modality.json").write_text(json.dumps({"action": parts}))
        assert LeRobotRecording(path, ConvertOptions()).metadata()["names"].get("action") == names
        target = tmp_path / f"out{end}"
        assert remark in convert(path, str(target), "mine", PLAN).changed["action"]


def test_folders_of_failures_are_stated(tmp_path):
    for folder in ("success", "failure"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        hdf5(tmp_path / "in" / folder / "a.hdf5")
    result = convert(tmp_path / "in", str(tmp_path), "mine", PLAN)
    assert "1 of 2 lie in folders named failed or failure" in result.changed["episodes"]


@pytest.mark.parametrize("value", [float("nan"), np.float32("nan"), None, "perhaps"])
def test_a_success_that_is_neither_true_nor_false_is_refused(value):
    with pytest.raises(DataError, match=r"success is .*; expected true or false"):
        recording.flag([False, value], "success")
