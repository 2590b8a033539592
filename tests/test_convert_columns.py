"""Every column of a recording is used, or listed as left out with the reason."""

import io
import json
import re

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import recordings
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image
from recordings import STEPS, frames, numbers

from octolike.data.onboarding.convert.conversion import ConversionPlan, convert
from octolike.data.onboarding.convert.frame_encoding import ConvertOptions, encode
from octolike.data.rlds.decode import decode_depth
from octolike.errors import DataError

PLAN = ConversionPlan(workers=1, validation=0, episodes_per_shard=8)


def first_episode(result) -> dict:
    """Return the steps of the episode with the first name, images encoded."""
    skip = {"steps": tfds.decode.SkipDecoding()}
    dataset = tfds.builder_from_directory(result.directory).as_dataset("train", decoders=skip)
    episodes = {e["episode_metadata"]["source"].numpy(): e["steps"] for e in dataset}
    return tf.nest.map_structure(lambda x: x.numpy(), episodes[min(episodes)])


def decoded(column) -> np.ndarray:
    return np.stack([tf.io.decode_image(x).numpy() for x in column])


def demos(path, observation, count=1):
    """Write robomimic's layout with an observation of one's own."""
    with h5py.File(path, "w") as file:
        for i in range(count):
            file[f"data/demo_{i}/actions"] = numbers(i, 7)
            for name, x in observation.items():
                file[f"data/demo_{i}/obs/{name}"] = x
    return path


@pytest.mark.parametrize(
    ("stored", "form"),
    [
        (frames(0) / np.float32(255), "floats in 0 to 1: rounded to 8 bits"),
        (frames(0).astype(np.float32), "floats in 0 to 255: rounded to 8 bits"),
        (frames(0).transpose(0, 3, 1, 2), "channels first"),
        (frames(0).transpose(0, 3, 1, 2) / 255.0, "channels first.*; floats in 0 to 1"),
        (np.concatenate([frames(0), frames(0)[..., :1]], -1), "the fourth, transparency or depth"),
        (frames(0)[..., 0], "one channel: repeated"),
    ],
)
def test_pictures_in_any_form_become_a_camera(tmp_path, stored, form):
    path = demos(tmp_path / "a.hdf5", {"table_cam": stored, "pose": numbers(0, 3)})
    result = convert(path, str(tmp_path), "mine", PLAN)
    camera = decoded(first_episode(result)["observation"]["table_cam"])
    np.testing.assert_array_equal(camera, frames(0))
    changed = result.changed.get("table_cam", "")
    assert re.search(form, changed)
    assert not result.left_out


def test_float_pictures_keep_one_range_in_all_episodes(tmp_path):
    light = frames(0) / np.float32(frames(0).max())
    path = demos(tmp_path / "a.hdf5", {"cam": np.clip(light * 1.004, 0, None)})  # resampled
    assert (
        decoded(first_episode(convert(path, str(tmp_path), "a", PLAN))["observation"]["cam"]).max()
        > 200
    )
    with h5py.File(demos(tmp_path / "b.hdf5", {"cam": np.float32(frames(0))}, 2), "a") as file:
        del file["data/demo_1/obs/cam"]
        file["data/demo_1/obs/cam"] = light  # dark, or in another range: ambiguous
    with pytest.raises(
        DataError, match=r"cam range is floats in 0 to (1|255).*first episode floats"
    ):
        convert(tmp_path / "b.hdf5", str(tmp_path), "b", PLAN)
    with h5py.File(tmp_path / "b.hdf5", "a") as file:
        file["data/demo_1/obs/cam"][:] = 0
    convert(tmp_path / "b.hdf5", str(tmp_path), "b", PLAN)
    with h5py.File(tmp_path / "b.hdf5", "a") as file:
        file["data/demo_1/obs/cam"][:] = light * 1.5
    with pytest.raises(DataError, match=r"has no observation; left out: cam"):
        convert(tmp_path / "b.hdf5", str(tmp_path), "c", PLAN)


def test_depth_is_stored_as_depth(tmp_path):
    rng = np.random.default_rng(0)
    metres = rng.random((STEPS, 16, 16, 1)).astype(np.float32)
    metres[0, 0, 0] = np.inf  # no echo
    millimetres = rng.integers(0, 9000, (STEPS, 16, 16), dtype=np.uint16)
    path = demos(tmp_path / "a.hdf5", {"front_depth": metres, "depth/back": millimetres})
    result = convert(path, str(tmp_path), "mine", PLAN)
    observation = first_episode(result)["observation"]
    stored = np.stack([decode_depth(x, 16) for x in observation["front_depth"]])
    np.testing.assert_array_equal(stored, np.where(np.isfinite(metres), metres, 0))
    stored = np.stack([decode_depth(x, 16) for x in observation["depth_back"]])
    np.testing.assert_array_equal(stored[..., 0], millimetres)
    assert "not finite became 0" in result.changed["front_depth"]


def test_what_is_no_camera_is_named_with_the_reason(tmp_path):
    observation = {
        "normals": frames(0) / 127.5 - 1,
        "depth_colours": frames(0),
        "stack": np.stack([frames(0), frames(0)], 1),
        "segmentation": frames(0)[..., :1],
        "names": np.array([b"a"] * STEPS),
    }
    result = convert(demos(tmp_path / "a.hdf5", observation), str(tmp_path), "mine", PLAN)
    assert "values from -0.922 to -0.725" in result.left_out["normals"]
    assert "its scale is not recorded" in result.left_out["depth_colours"]
    assert "2 images per step" in result.left_out["stack"]
    assert "a text: use it as the instruction" in result.left_out["names"]
    assert "kept as numbers" in result.changed["segmentation"]
    assert set(first_episode(result)["observation"]) == {"segmentation"}


def test_arrays_outside_obs_and_nested_groups_are_read_or_named(tmp_path):
    path = demos(tmp_path / "a.hdf5", {"policy/joints": numbers(0, 3), "object": numbers(0, 10)})
    with h5py.File(path, "a") as file:
        demo = file["data/demo_0"]
        demo["states"], demo["next_obs/object"] = numbers(0, 30), numbers(0, 10)
        demo["datagen/target"], demo["actions_abs"] = numbers(0, 3), numbers(0, 7)
    result = convert(path, str(tmp_path), "mine", PLAN)
    assert set(result.left_out) == {"states", "next_obs/object", "datagen/target"}
    assert "no robot has" in result.left_out["states"]
    episode = first_episode(result)
    assert set(episode["observation"]) == {"policy_joints", "object"}
    np.testing.assert_array_equal(episode["actions_abs"], numbers(0, 7))


def test_columns_of_lerobot_without_prefix_are_read(tmp_path):
    path = recordings.lerobot(tmp_path / "in", 2, 1, images=True)
    names = {
        "action": "actions",
        "observation.state": "state",
        "observation.images.top": "image",
    }
    info = json.loads((path / "meta/info.json").read_text())
    info["features"] = {names.get(k, k): v for k, v in info["features"].items()}
    scalar = {"dtype": "float32", "shape": [1], "names": None}
    info["features"] |= {"annotation.human": scalar, "next.truncated": scalar, "effort": scalar}
    (path / "meta/info.json").write_text(json.dumps(info))
    for file in path.rglob("*.parquet"):
        table = pq.read_table(file)
        table = table.rename_columns([names.get(k, k) for k in table.column_names])
        for key in ("annotation.human", "next.truncated", "effort", "unlisted"):
            table = table.append_column(key, pa.array([0.5] * STEPS))
        pq.write_table(table, file)
    result = convert(path, str(tmp_path), "mine", PLAN)
    episode = first_episode(result)
    np.testing.assert_array_equal(episode["action"], numbers(0, 3))
    assert set(episode["observation"]) == {"state", "image", "effort"}
    assert set(result.left_out) == {"annotation.human", "next.truncated", "unlisted"}


def test_a_text_named_by_the_user_comes_before_the_task(tmp_path):
    key = "annotation.human.task_description"
    root = recordings.lerobot(tmp_path / "in", 2)
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    info["features"][key] = {"dtype": "string", "shape": [1], "names": None}
    path.write_text(json.dumps(info))
    for file in root.rglob("episode_*.parquet"):
        table = pq.read_table(file)
        pq.write_table(table.append_column(key, pa.array(["grab it"] * len(table))), file)
    result = convert(root, str(tmp_path), "task", PLAN)
    assert result.left_out[key] == f"a text: use it with --field language_instruction={key}"
    assert b"grab it" not in first_episode(result)["language_instruction"]
    options = ConvertOptions(fields=(("language_instruction", key),))
    plan = ConversionPlan(workers=1, validation=0, options=options)
    result = convert(root, str(tmp_path), "named", plan)
    assert set(first_episode(result)["language_instruction"]) == {b"grab it"}


def test_parts_of_an_action_become_a_dict_of_actions(tmp_path):
    path = recordings.lerobot(tmp_path / "in", 3, 2, images=True)
    info = json.loads((path / "meta/info.json").read_text())
    features = info["features"]
    features["actions.joint.position"] = features.pop("action")
    features["actions.effector"] = {"dtype": "float32", "shape": [1], "names": None}
    (path / "meta/info.json").write_text(json.dumps(info))
    for file in (path / "data").rglob("*.parquet"):
        table = pq.read_table(file)
        columns = ["actions.joint.position" if k == "action" else k for k in table.column_names]
        table = table.rename_columns(columns)
        column = pa.array([0.5] * len(table), pa.float32())
        pq.write_table(table.append_column("actions.effector", column), file)
    result = convert(path, str(tmp_path), "mine", PLAN)
    assert set(first_episode(result)["action"]) == {"joint_position", "effector"}
    about = json.loads((result.directory / "settings.json").read_text())["about"]
    assert about["names"]["action.joint_position"] == ["a", "b", "grip"]


def test_fields_of_a_layout_of_ones_own_are_named_by_the_user(tmp_path):
    path = tmp_path / "in" / "log.h5"
    path.parent.mkdir()
    with h5py.File(path, "w") as file:
        for i in range(3):
            file[f"run_{i}/cmd/q"] = numbers(i, 6)
            file[f"run_{i}/robot/q"] = numbers(i, 6)
            file[f"run_{i}/cam0/rgb"] = frames(i)
            file[f"run_{i}/calibration"] = np.eye(3)
            file[f"run_{i}"].attrs["instruction"] = f"do {i}"
    fields = (("action", "cmd/q"), ("front", "cam0/rgb"), ("state", "robot/q"))
    plan = ConversionPlan(workers=1, validation=0, options=ConvertOptions(fields=fields))
    result = convert(path, str(tmp_path), "mine", plan)
    episodes = {}
    for episode in tfds.builder_from_directory(result.directory).as_dataset("train"):
        source = episode["episode_metadata"]["source"].numpy().decode()
        episodes[source] = next(iter(episode["steps"].batch(STEPS)))
    assert set(episodes) == {f"log.h5:run_{i}" for i in range(3)}
    steps = episodes["log.h5:run_1"]
    np.testing.assert_array_equal(steps["action"], numbers(1, 6))
    assert set(steps["observation"]) == {"front", "state"}
    assert steps["language_instruction"][0] == b"do 1"
    assert "not one entry per step" in result.left_out["calibration"]


def test_every_wording_of_an_instruction_is_stored_or_named(tmp_path):
    path = tmp_path / "log.h5"
    with h5py.File(path, "w") as file:
        for i in range(2):
            run = file.create_group(f"run_{i}")
            run["action"] = numbers(i, 6)
            run["observation/state"] = numbers(i, 6)
            run["language_instruction"] = "put it down"
            run["language_instruction_2"] = "place it"
            run["annotation/human/task"] = "set it on the table"
            run["notes"] = ["a", "b", "c"]
    result = convert(path, str(tmp_path), "mine", PLAN)
    steps = first_episode(result)
    assert set(steps["language_instruction"]) == {b"put it down"}
    assert set(steps["language_instruction_2"]) == {b"place it"}
    reason = "a text: use it as the instruction with --field language_instruction="
    assert result.left_out["annotation/human/task"] == f"{reason}annotation/human/task"
    assert reason in result.left_out["notes"]
    for field, expected in (("annotation/human/task", b"set it on the table"), ("notes", b"a")):
        options = ConvertOptions(fields=(("language_instruction", field),))
        plan = ConversionPlan(workers=1, validation=0, options=options)
        result = convert(path, str(tmp_path), f"by_{field[:5]}", plan)
        assert set(first_episode(result)["language_instruction"]) == {expected}
    assert "3 texts for 6 steps: the first one is used" in result.changed["notes"]


def test_a_trajectory_of_droid_is_read_with_its_videos(tmp_path):
    folder = tmp_path / "in" / "Fri_Jul"
    (folder / "recordings/MP4").mkdir(parents=True)
    with h5py.File(folder / "trajectory.h5", "w") as file:
        file["action/joint_position"] = numbers(0, 7)
        file["action/gripper_position"] = numbers(0, 1)[:, 0]
        file["observation/robot_state/joint_positions"] = numbers(0, 7)
        file["observation/timestamp/control/step_start"] = np.arange(STEPS)
    (folder / "metadata_x.json").write_text(json.dumps({"current_task": "open the drawer"}))
    recordings.video(folder / "recordings/MP4/123.mp4", frames(0))
    recordings.video(folder / "recordings/MP4/456.mp4", frames(0)[:3])
    result = convert(tmp_path / "in", str(tmp_path), "droid", PLAN)
    episode = first_episode(result)
    assert set(episode["action"]) == {"joint_position", "gripper_position"}
    error = decoded(episode["observation"]["camera_123"]).astype(float) - frames(0)
    assert np.abs(error).max() <= 2
    assert result.left_out == {"camera_456": "456.mp4 does not have one frame per step"}
    assert set(episode["language_instruction"]) == {b"open the drawer"}


def test_one_observation_more_than_actions_is_reported(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        for i in range(2):
            file[f"traj_{i}/actions"] = numbers(i, 3)
            file[f"traj_{i}/obs/agent/qpos"] = numbers(i, 3, STEPS + 1)
    result = convert(path, str(tmp_path), "mine", PLAN)
    assert "the last is not used" in result.changed["observation"]
    assert len(first_episode(result)["observation"]["agent_qpos"]) == STEPS


def test_encoded_frames_keep_their_bytes_only_if_they_are_rgb():
    picture = Image.fromarray(frames(0)[0])
    for mode, image_format, keeps in [
        ("RGB", "JPEG", True),
        ("RGB", "PNG", True),
        ("L", "JPEG", False),
        ("L", "PNG", False),
        ("RGBA", "PNG", False),
        ("P", "PNG", False),
        ("CMYK", "JPEG", False),
        ("RGB", "WEBP", False),
        ("RGB", "BMP", False),
    ]:
        buffer = io.BytesIO()
        converted = picture.convert(mode)
        converted.save(buffer, image_format)
        encoded = encode([buffer.getvalue()], ConvertOptions(), "here")
        assert (encoded[0] == buffer.getvalue()) == keeps, (mode, image_format)
        assert encoded.shape == (16, 16, 3)
        pixels = tf.io.decode_image(encoded[0]).numpy().astype(int)
        assert pixels.shape == (16, 16, 3)
        expected = np.asarray(converted.convert("RGB"), int)
        assert np.abs(pixels - expected).max() <= 8, (mode, image_format)


def test_the_odd_first_episode_is_the_one_that_is_dropped(tmp_path):
    path = recordings.aloha(tmp_path / "in", 5)
    with h5py.File(path / "episode_0.hdf5", "a") as file:
        file["observations/extra"] = numbers(0)
    plan = ConversionPlan(workers=1, validation=0, drop_bad=True)
    result = convert(path, str(tmp_path), "mine", plan)
    assert len(result.dropped) == 1
    assert "episode_0.hdf5 has observation.extra" in result.dropped[0]
