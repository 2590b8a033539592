"""Conversions keep the recorded values, reject bad recordings, and resume after interruptions."""

import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import recordings
import tensorflow as tf
import tensorflow_datasets as tfds
from recordings import STEPS, frames, numbers

from octolike.config import ConfigError
from octolike.data.onboarding.convert import conversion, frame_encoding
from octolike.data.onboarding.convert.conversion import ConversionPlan, convert, detect
from octolike.data.onboarding.convert.frame_encoding import ConvertOptions
from octolike.errors import DataError

ROOT = Path(__file__).parents[1]


def plan(**changes) -> ConversionPlan:
    return ConversionPlan(**{"workers": 1, "validation": 0.25, "episodes_per_shard": 2} | changes)


def read(directory: Path) -> dict[str, dict]:
    """Return {source: episode with its split and metadata}."""
    builder, result = tfds.builder_from_directory(directory), {}
    decoders = {"steps": tfds.decode.SkipDecoding()}
    for split in builder.info.splits:
        for episode in builder.as_dataset(split=split, decoders=decoders):
            episode = tf.nest.map_structure(lambda x: x.numpy(), episode)
            metadata = episode["episode_metadata"]
            result[metadata["source"].decode()] = {"split": split, **metadata, **episode["steps"]}
    return result


def decoded(episode: dict, camera: str) -> np.ndarray:
    return np.stack([tf.io.decode_image(x).numpy() for x in episode["observation"][camera]])


@pytest.mark.parametrize("compressed", [False, True])
def test_aloha_files_are_converted(tmp_path, compressed):
    path = recordings.aloha(tmp_path / "in", compressed=compressed)
    assert detect(path) == "hdf5-aloha"
    settings = plan(options=ConvertOptions(instruction="fold it", control_hz=50))
    episodes = read(convert(path, str(tmp_path / "out"), "mine", settings)[0])
    assert sorted(e["split"] for e in episodes.values()) == ["train"] * 3 + ["val"]
    for i in range(4):
        episode = episodes[f"episode_{i}.hdf5"]
        np.testing.assert_array_equal(episode["action"], numbers(i))
        np.testing.assert_array_equal(episode["observation"]["state"], numbers(i) + np.float32(0.5))
        assert set(episode["language_instruction"]) == {b"fold it"}
        assert episode["control_hz"] == 50
        stored = list(episode["observation"]["cam_high"])
        if compressed:
            assert stored == recordings.jpegs(i)  # the same bytes
        else:
            np.testing.assert_array_equal(decoded(episode, "cam_high"), frames(i))
        assert "success" not in episode
        assert not episode["is_terminal"].any()
        assert not episode["reward"].any()


def test_robomimic_files_are_converted(tmp_path):
    path = recordings.robomimic(tmp_path / "demo.hdf5")
    assert detect(path) == "hdf5-robomimic"
    episodes = read(convert(path, str(tmp_path / "out"), "mine", plan())[0])
    assert [e["split"] for _, e in sorted(episodes.items())] == ["train"] * 3 + ["val"]
    episode = episodes["demo.hdf5:demo_2"]
    np.testing.assert_array_equal(episode["action"], numbers(2, 7))
    np.testing.assert_array_equal(episode["observation"]["robot0_eef_pos"], numbers(2, 3))
    np.testing.assert_array_equal(decoded(episode, "agentview_image"), frames(2))
    assert episode["is_terminal"].tolist() == [False] * (STEPS - 1) + [True]
    assert episode["reward"][-1] == 1
    assert episode["control_hz"] == 20
    assert set(episode["language_instruction"]) == {b"stack the cubes"}


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("images", [False, True])
def test_lerobot_datasets_are_converted(tmp_path, version, images):
    path = recordings.lerobot(tmp_path / "in", version, images=images)
    assert detect(path) == "lerobot"
    directory, *_ = convert(path, str(tmp_path / "out"), "mine", plan())
    episodes = read(directory)
    assert len(episodes) == 4
    for i in range(4):
        episode = episodes[f"episode:{i}"]
        np.testing.assert_array_equal(episode["action"], numbers(i, 3))
        task = b"open the drawer" if i % 2 else b"pick the cup"
        assert set(episode["language_instruction"]) == {task}
        assert episode["control_hz"] == recordings.FPS
        # Videos are lossy; frames differ by 5, so a wrong frame has a larger error.
        error = decoded(episode, "top").astype(float) - frames(i)
        assert np.abs(error).max() <= 2
    about = json.loads((directory / "settings.json").read_text())["about"]
    assert about["names"]["action"] == ["a", "b", "grip"]


def test_npz_files_are_converted_with_success(tmp_path):
    path = recordings.npz(tmp_path / "in")
    episodes = read(convert(path, str(tmp_path / "out"), "mine", plan())[0])
    episode = episodes["episode_1.npz"]
    assert episode["success"]
    assert episode["is_terminal"][-1]
    assert set(episode["language_instruction"]) == {b"do 1"}
    np.testing.assert_array_equal(episode["observation"]["state"], numbers(1, 7))


def test_large_frames_become_jpeg_and_small_ones_png():
    rng = np.random.default_rng(0)
    big = np.repeat(rng.integers(0, 256, (1, 16, 16, 3), dtype=np.uint8), 8, 1).repeat(8, 2)
    jpeg = frame_encoding.encode(big, ConvertOptions(), "here")
    assert jpeg.format == "jpeg"
    assert jpeg.frames[0].startswith(frame_encoding.JPEG)
    exact = frame_encoding.encode(big, ConvertOptions(jpeg=0), "here")
    assert exact.format == "png"
    np.testing.assert_array_equal(tf.io.decode_image(exact[0]), big[0])
    swapped = frame_encoding.encode(big, ConvertOptions(jpeg=0, bgr=True), "here")
    np.testing.assert_array_equal(tf.io.decode_image(swapped[0]), big[0, ..., ::-1])
    assert frame_encoding.encode(recordings.frames(0), ConvertOptions(), "here").format == "png"


# Bad recordings


def _replace(path, key, value=None):
    with h5py.File(path, "a") as file:
        del file[key]
        if value is not None:
            file[key] = value


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: _replace(f, "action"),
            "episode_2.hdf5 has no action; found: .*observation.qvel",
        ),
        (
            lambda f: _replace(f, "action", numbers(2)[:-1]),
            "length is one row more than the action",
        ),
        (lambda f: _replace(f, "action", numbers(2)[:-2]), "lengths action 4, .* expected one"),
        (lambda f: _replace(f, "action", numbers(2) * np.nan), "action at step 0 is not finite"),
        (lambda f: _replace(f, "observations/images/cam_high"), "lacks observation.cam_high"),
        (lambda f: _replace(f, "action", numbers(2, 7)), r"action is float32 \(7,\), in the first"),
        (
            lambda f: _replace(f, "observations/images/cam_high", frames(2, side=20)),
            r"cam_high is png image \(20, 20, 3\), in the first",
        ),
        (lambda f: f.write_bytes(f.read_bytes()[:900]), "not a complete HDF5 file"),
    ],
)
def test_a_bad_episode_is_named_or_left_out(tmp_path, damage, message):
    path = recordings.aloha(tmp_path / "in", 3)
    damage(path / "episode_2.hdf5")
    with pytest.raises(DataError, match=f"(?s)episode_2.hdf5.*{message}|{message}"):
        convert(path, str(tmp_path / "out"), "mine", plan(validation=0))
    with pytest.raises(DataError, match=r"--drop-bad leaves out|first"):
        convert(path, str(tmp_path / "out"), "mine", plan(validation=0))
    assert not (tmp_path / "out/mine/1.0.0").exists()
    dropping = plan(validation=0, drop_bad=True)
    directory, dropped, *_ = convert(path, str(tmp_path / "out"), "mine", dropping)
    assert len(dropped) == 1
    assert "episode_2.hdf5" in dropped[0]
    assert len(read(directory)) == 2


def test_folders_of_unknown_formats_are_rejected(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"unknown format.*contains nothing"):
        detect(tmp_path / "empty")
    with pytest.raises(DataError, match="does not exist"):
        detect(tmp_path / "nowhere")
    (tmp_path / "empty" / "a.bag").touch()
    with pytest.raises(DataError, match=r"unknown format.*a\.bag"):
        detect(tmp_path / "empty")
    with h5py.File(tmp_path / "odd.hdf5", "w") as file:
        file["poses"] = [1.0]
    with pytest.raises(DataError, match=r"no action; found: .*poses.*--field action="):
        convert(tmp_path / "odd.hdf5", str(tmp_path), "mine", plan())
    with pytest.raises(DataError, match=r"no meta/info.json"):
        convert(tmp_path / "empty", str(tmp_path), "mine", plan(format="lerobot"))
    with pytest.raises(ConfigError, match="unknown format: 'lerobt'; did you mean 'lerobot'"):
        convert(tmp_path / "empty", str(tmp_path), "mine", plan(format="lerobt"))


def test_incomplete_lerobot_datasets_are_rejected(tmp_path):
    path = recordings.lerobot(tmp_path / "in", 3, 2)
    video = next(path.rglob("*.mp4"))
    content = video.read_bytes()
    recordings.video(video, frames(0)[:2])
    with pytest.raises(DataError, match=r"episode:.*frames|cannot be decoded"):
        convert(path, str(tmp_path / "out"), "mine", plan())
    video.write_bytes(content[:100])
    with pytest.raises(DataError, match="cannot be decoded"):
        convert(path, str(tmp_path / "out"), "mine", plan())
    video.unlink()
    with pytest.raises(DataError, match=r"its video .* is missing"):
        convert(path, str(tmp_path / "out"), "mine", plan())
    info = json.loads((path / "meta/info.json").read_text()) | {"codebase_version": "v1.6"}
    (path / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match=r"codebase_version is 'v1.6'"):
        convert(path, str(tmp_path / "out"), "mine", plan())


def test_a_shard_that_reads_back_differently_is_rejected(tmp_path, monkeypatch):
    path = recordings.npz(tmp_path / "in", 2)
    fingerprints, calls = conversion.fingerprints, itertools.count()

    def changed(steps):
        return fingerprints(steps | {"action": steps["action"] + next(calls)})

    monkeypatch.setattr(conversion, "fingerprints", changed)
    with pytest.raises(DataError, match=r"differs from the recording in \['action'\]"):
        convert(path, str(tmp_path / "out"), "mine", plan(validation=0))
    assert not list((tmp_path / "out").rglob("*tfrecord*"))


# Interruptions


def test_a_partial_conversion_does_not_resume_with_other_settings(tmp_path):
    path = recordings.npz(tmp_path / "in")
    damaged = path / "episode_3.npz"
    content = damaged.read_bytes()
    damaged.write_bytes(b"\0" * len(content))
    with pytest.raises(DataError):
        convert(path, str(tmp_path), "mine", plan(validation=0, episodes_per_shard=1))
    damaged.write_bytes(content)
    changed_plan = plan(
        validation=0, episodes_per_shard=1, options=ConvertOptions(instruction="else")
    )
    with pytest.raises(DataError, match=r"was started with .*'instruction': ''.*now it is .*else"):
        convert(path, str(tmp_path), "mine", changed_plan)
    directory, *_ = convert(path, str(tmp_path), "mine", plan(validation=0, episodes_per_shard=1))
    assert len(read(directory)) == 4
    with pytest.raises(DataError, match="was started with"):
        convert(path, str(tmp_path), "mine", changed_plan)


def test_a_conversion_resumes_after_a_full_disk(tmp_path):
    path = recordings.npz(tmp_path / "in", 2, blob=np.random.default_rng(0).random((STEPS, 9000)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the maximum size of a file
    try:
        with pytest.raises(OSError, match=r"could not be written|too large"):
            convert(path, str(tmp_path), "mine", plan())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "mine/1.0.0").exists()
    assert len(read(convert(path, str(tmp_path), "mine", plan())[0])) == 2


@pytest.mark.slow
def test_a_killed_conversion_with_processes_resumes(tmp_path):
    path = recordings.npz(tmp_path / "in", 12)
    command = [sys.executable, "scripts/convert.py", "--source", str(path), "--name", "mine"]
    command += ["--target", str(tmp_path), "--workers", "2", "--episodes-per-shard", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    started = subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL, start_new_session=True
    )
    partial = tmp_path / "mine" / "1.0.0.incomplete"
    while len(list(partial.glob("mine-*.json"))) < 3 and started.poll() is None:
        time.sleep(0.02)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert not (tmp_path / "mine" / "1.0.0").exists()
    time.sleep(1)
    before = len(list(partial.glob("mine-*.json")))
    time.sleep(0.5)
    assert before == len(list(partial.glob("mine-*.json")))  # the workers have ended
    assert 2 <= before < 12
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "next: octolike inspect_data" in done.stdout
    assert len(read(tmp_path / "mine" / "1.0.0")) == 12


def test_collecting_with_other_noise_is_rejected(tmp_path):
    from octolike.config import CollectConfig
    from octolike.data.rlds.synthetic import fake_episodes
    from octolike.data.rlds.writer import Writer
    from octolike.envs import demonstrations

    def writer(**changes) -> Writer:
        collect = CollectConfig(skills={"touch": 2}, **changes)
        settings = demonstrations.settings({"kind": "tabletop"}, collect)
        return Writer(str(tmp_path), "tabletop", "1.0.0", {"train": 1}, settings)

    writer().write("train", 0, fake_episodes(0, 1, cameras={"primary": 8}))
    writer()
    with pytest.raises(
        DataError, match=r"was started with \{'noise': 0.5\}, but now it is \{'noise': 0.2\}"
    ):
        writer(noise=0.2)
    writer().finish()
    with pytest.raises(DataError, match="was started with"):
        writer(noise=0.2)
