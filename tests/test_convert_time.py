"""A row of a LeRobot dataset gets the picture that was taken at its time, or the row is refused."""

import gc
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import recordings
import tensorflow as tf
import tensorflow_datasets as tfds
from recordings import FPS, STEPS, frames

from octolike.data.onboarding.convert.conversion import ConversionPlan, convert
from octolike.data.onboarding.convert.video import list_frames, read_frames
from octolike.errors import DataError

PLAN = ConversionPlan(workers=1, validation=0, episodes_per_shard=2)


def pictures_and_steps(directory: Path) -> dict[str, list[tuple[float, int]]]:
    """Return per episode the step that each picture shows, and the step of its row's numbers."""
    result = {}
    for episode in tfds.builder_from_directory(directory).as_dataset("train"):
        source = episode["episode_metadata"]["source"].numpy().decode()
        number = int(source.rpartition(":")[2])
        result[source] = [
            (
                (float(step["observation"]["top"].numpy().mean()) - 10 - 40 * number) / 5,
                round(10 * (float(step["observation"]["state"][0]) - number)),
            )
            for step in episode["steps"]
        ]
    return result


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(("first_row", "repeat"), [(2, 1), (0, 3), (2, 3)])
def test_cut_rows_and_other_frame_rates_do_not_shift_pictures(tmp_path, version, first_row, repeat):
    path = recordings.lerobot(tmp_path / "in", version, first_row=first_row, repeat=repeat)
    result = convert(path, str(tmp_path / "out"), "mine", PLAN)
    episodes = pictures_and_steps(result.directory)
    assert len(episodes) == 4
    for pairs in episodes.values():
        assert [step for _, step in pairs] == list(range(first_row, STEPS))
        assert all(abs(shown - step) < 0.45 for shown, step in pairs)
    assert "row has the frame" in result.changed["top"]


@pytest.mark.parametrize("version", [2, 3])
def test_rows_more_than_half_a_frame_from_every_picture_are_refused(tmp_path, version):
    fine = recordings.lerobot(tmp_path / "fine", version, late=0.4 / FPS)
    convert(fine, str(tmp_path / "out"), "fine", PLAN)
    late = recordings.lerobot(tmp_path / "late", version, late=0.6 / FPS)
    with pytest.raises(
        DataError, match=r"camera top: the row of step 5 is at 0\.560 s.*half a fra"
    ):
        convert(late, str(tmp_path / "out"), "late", PLAN)


def test_rows_without_timestamps_are_matched_by_number_and_reported(tmp_path):
    path = recordings.lerobot(tmp_path / "in", 2)
    info = json.loads((path / "meta/info.json").read_text())
    del info["features"]["timestamp"]
    (path / "meta/info.json").write_text(json.dumps(info))
    for file in path.rglob("*.parquet"):
        recordings.pq.write_table(recordings.pq.read_table(file).drop(["timestamp"]), file)
    result = convert(path, str(tmp_path / "out"), "mine", PLAN)
    assert "computed from 10 rows per second" in result.changed["timestamp"]
    for pairs in pictures_and_steps(result.directory).values():
        assert all(abs(shown - step) < 0.45 for shown, step in pairs)


def test_any_frame_of_a_video_is_found_by_its_time(tmp_path):
    recordings.video(tmp_path / "a.mp4", np.concatenate([frames(0, 30), frames(0, 30)]), 30)
    listing = list_frames(tmp_path / "a.mp4")
    np.testing.assert_allclose(listing.times, np.arange(60) / 30, atol=1e-6)
    numbers = [7, 7, 19, 44, 59]
    greys = [x.mean() for x in read_frames(listing, numbers, "here")]
    np.testing.assert_allclose(greys, [10 + 5 * (n % 30) for n in numbers], atol=2)


def test_a_truncated_video_is_named_and_leaves_no_open_pipe(tmp_path, recwarn):
    path = tmp_path / "a.mkv"
    noise = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), np.uint8)
    recordings.video(path, noise)
    listing = list_frames(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"here: .*a\.mkv cannot be decoded from frame \d+ of 40"):
        list(read_frames(listing, range(40), "here"))
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.mkv cannot be decoded"):
        list_frames(path)
    gc.collect()
    assert not [w for w in recwarn if issubclass(w.category, ResourceWarning)]


def test_depth_videos_become_depth_or_are_left_out(tmp_path):
    path = recordings.lerobot(tmp_path / "in", 2, 2)
    info = json.loads((path / "meta/info.json").read_text())
    top = info["features"]["observation.images.top"]
    for name in ("coloured_depth", "metric_depth", "range"):
        info["features"][f"observation.images.{name}"] = dict(top)
    info["features"]["observation.images.range"]["info"] = {"video.is_depth_map": True}
    (path / "meta/info.json").write_text(json.dumps(info))
    millimetres = np.arange(STEPS * 256, dtype=np.uint16).reshape(STEPS, 16, 16) * 7
    for i in range(2):
        directory = path / "videos/chunk-000"
        for name in ("coloured_depth", "range"):
            recordings.video(
                directory / f"observation.images.{name}/episode_{i:06d}.mp4", frames(i)
            )
        # named mp4 by the layout of the folder; ffmpeg detects the format by content
        file = directory / f"observation.images.metric_depth/episode_{i:06d}.mkv"
        options = {"pix_fmt_in": "gray16le", "codec": "ffv1", "pix_fmt_out": "gray16le"}
        recordings.video(file, millimetres, **options)
        file.rename(file.with_suffix(".mp4"))
    result = convert(path, str(tmp_path / "out"), "mine", PLAN)
    assert "in 8 bits (yuv420p), not a camera" in result.left_out["observation.images.range"]
    assert "not a camera" in result.left_out["observation.images.coloured_depth"]
    assert result.changed["metric_depth"] == "depth, stored as uint16"
    skip = {"steps": tfds.decode.SkipDecoding()}
    builder = tfds.builder_from_directory(result.directory)
    episode = next(iter(builder.as_dataset("train", decoders=skip)))
    observation = episode["steps"]["observation"]
    assert set(observation) == {"state", "top", "metric_depth"}
    stored = [tf.io.decode_png(x, dtype=tf.uint16) for x in observation["metric_depth"]]
    np.testing.assert_array_equal(np.stack(stored)[..., 0], millimetres)


def test_rows_without_a_time_are_matched_by_their_number_or_refused(tmp_path):
    path = recordings.lerobot(tmp_path / "in", 2)
    set_times(path, [None] * STEPS)
    result = convert(path, str(tmp_path / "out"), "mine", PLAN)
    for pairs in pictures_and_steps(result.directory).values():
        assert all(abs(shown - step) < 0.45 for shown, step in pairs)
    assert "missing: computed from" in result.changed["timestamp"]
    for bad in (None, np.nan):
        set_times(path, [t / FPS if t != 4 else bad for t in range(STEPS)])
        with pytest.raises(DataError, match="timestamp of step 4 is missing or not finite"):
            convert(path, str(tmp_path / "out"), "bad", PLAN)


def set_times(path, times):
    for file in (path / "data").rglob("*.parquet"):
        columns = pq.read_table(file).to_pydict() | {"timestamp": pa.array(times, pa.float32())}
        pq.write_table(pa.table(columns), file)


def test_episodes_that_claim_the_same_frames_are_refused(tmp_path):
    """A faulty merge of datasets of LeRobot 3 lets episodes point to the frames of others."""
    path = recordings.lerobot(tmp_path / "in", 3)
    file = path / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(file).to_pylist()
    for row in rows:
        row["videos/observation.images.top/from_timestamp"] = 0.0
        row["videos/observation.images.top/to_timestamp"] = STEPS / FPS
    pq.write_table(pa.Table.from_pylist(rows), file)
    with pytest.raises(DataError, match="episodes 0 and 1 have the same frames of one video file"):
        convert(path, str(tmp_path / "out"), "mine", PLAN)
