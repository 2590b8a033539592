"""Unusable data: a clear error or, if so configured, excluded and counted."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from data_fakes import numbered, opened, shown, write

from octolike.config import ConfigError
from octolike.data.rlds.writer import rlds_episode
from octolike.data.specs import mixes
from octolike.errors import DataError

CAMERAS = ["image_primary", "image_wrist"]


def episodes(*lengths: int) -> list[dict]:
    return [numbered(i, n, CAMERAS, f"do {i}") for i, n in enumerate(lengths)]


@pytest.fixture
def complete(tmp_path) -> Path:
    """The directory of a dataset of five training and five validation episodes."""
    return write(tmp_path, "fake", {s: episodes(3, 4, 5, 6, 7) for s in ("train", "val")})


def shard(directory: Path, split: str = "train") -> Path:
    return directory / f"fake-{split}.tfrecord-00000-of-00001"


def corrupt(monkeypatch, change) -> None:
    """Let `change(episode, number)` alter episodes after the writer has checked them."""

    def changed(episode, place):
        result = rlds_episode(episode, place)
        change(result, int(place.rpartition(" ")[2]))
        return result

    monkeypatch.setattr("octolike.data.rlds.writer.rlds_episode", changed)


def test_a_wrong_root_is_reported(tmp_path):
    for root in (tmp_path / "nowhere", Path()):
        with pytest.raises(DataError, match=r"fake"):
            opened(root)
    with pytest.raises(DataError, match=r"data\.root '.*nowhere' is not a directory.* holds fake/"):
        opened(tmp_path / "nowhere")


def test_a_missing_dataset_lists_the_existing_names(complete, tmp_path):
    with pytest.raises(DataError, match=r"tabletop/1\.0\.0 does not exist; .* has: .*fake"):
        opened(tmp_path, "tabletop")


def test_a_root_one_folder_too_deep_lists_the_existing_names(complete, tmp_path):
    with pytest.raises(DataError, match=r"has: 1\.0\.0\. Set data\.root to .* holds fake/1\.0\.0"):
        opened(complete.parent, cache=str(tmp_path / "cache"))


def test_another_version_lists_the_existing_names(complete, tmp_path):
    complete.rename(complete.with_name("2.0.0"))
    with pytest.raises(DataError, match=r"fake/1\.0\.0 does not exist; .* has: 2\.0\.0"):
        opened(tmp_path)


def test_an_incomplete_dataset_is_not_read(complete, tmp_path):
    (complete / "features.json").unlink()
    with pytest.raises(DataError, match=r"fake/1\.0\.0 is incomplete"):
        opened(tmp_path)
    complete.rename(complete.with_name("1.0.0.incomplete"))
    with pytest.raises(DataError, match=r"1\.0\.0\.incomplete is incomplete"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json"])
def test_corrupted_metadata_are_named(complete, tmp_path, name):
    (complete / name).write_text((complete / name).read_text()[:100])
    with pytest.raises(DataError, match=rf"fake: .*{name} is not JSON .*; copy the dataset again"):
        opened(tmp_path)


def test_a_missing_shard_is_named(complete, tmp_path):
    shard(complete).unlink()
    with pytest.raises(DataError, match=r"1 of 1 shards .* missing, the first is .*00000-of-00001"):
        opened(tmp_path)


def test_a_missing_split_lists_the_others(complete, tmp_path):
    with pytest.raises(DataError, match=r"no split 'test' .*splits: train, val\)"):
        opened(tmp_path, train_split="test")


def records(path: Path) -> list[bytes]:
    """Return the stored records of a file, each with its length and checksums."""
    data, records = path.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little") + 16
        records.append(data[:size])
        data = data[size:]
    return records


def test_a_truncated_or_corrupted_record_and_its_file_are_named(complete, tmp_path):
    *stored, last = records(shard(complete))
    middle = len(last) // 2
    flipped = last[:middle] + bytes([last[middle] ^ 255]) + last[middle + 1 :]
    for corrupted in (last[:-1], last[:middle], flipped):
        shard(complete).write_bytes(b"".join([*stored, corrupted]))
        with pytest.raises(DataError, match=r"fake-train.*00000-of-00001: record 4 is truncated"):
            opened(tmp_path)
    data = opened(tmp_path, bad_episodes="drop", batch_size=18)
    row = data.describe().splitlines()[1].split()
    assert (row[0], row[1], row[4]) == ("fake/train", "4", "1")
    assert "left out: " in data.describe()
    frames = shown(next(data.train())["observation"]["image_primary"])
    assert {e for ((e, _),) in frames} == {0, 1, 2, 3}


def test_missing_records_are_counted(complete, tmp_path):
    shard(complete).write_bytes(b"".join(records(shard(complete))[:2]))
    with pytest.raises(DataError, match=r"2 records, but dataset_info.json lists 5"):
        opened(tmp_path)
    row = opened(tmp_path, bad_episodes="drop").describe().splitlines()[1].split()
    assert (row[1], row[4]) == ("2", "3")


def test_a_record_that_is_not_an_episode_is_named(complete, tmp_path):
    with tf.io.TFRecordWriter(str(shard(complete))) as file:
        for _ in range(5):
            file.write(b"no episode")
    with pytest.raises(DataError, match=r"episode 0 does not match features.json: Could not par"):
        opened(tmp_path)
    with pytest.raises(DataError, match=r"no usable episode; the first of 5 reasons"):
        opened(tmp_path, bad_episodes="drop")


@pytest.fixture
def not_finite(tmp_path, monkeypatch) -> Path:
    """Training episodes 1 and 3 and validation episode 3 have non-finite numbers."""

    def change(episode, number):
        if number == 3:
            episode["steps"]["action"][2, 1] = np.nan
        if number == 1 and len(episode["steps"]["action"]) == 4:
            episode["steps"]["observation"]["state"][3, 4] = -np.inf

    corrupt(monkeypatch, change)
    write(tmp_path, "fake", {"train": episodes(3, 4, 5, 6, 7), "val": episodes(3, 3, 3, 3)})
    return tmp_path


def test_a_non_finite_number_is_named(not_finite):
    with pytest.raises(
        DataError, match=r"fake: .*train.*episode 1: proprio at step 3 is -inf in dimension 4 \(pit"
    ):
        opened(not_finite)


def test_bad_episodes_are_excluded_counted_and_reported(not_finite):
    data = opened(not_finite, bad_episodes="drop", batch_size=15)
    header, train, val, *notes = data.describe().splitlines()
    assert header.split()[:2] == ["dataset", "episodes"]
    assert train.split()[:5] == ["fake/train", "3", "15", "100.0%", "2"]
    assert val.split()[:6] == ["fake/val", "3", "9", "held", "out", "1"]
    reasons = [x for x in notes if x.startswith("left out: ")]
    assert len(reasons) == 3
    assert "episode 1: proprio at step 3" in reasons[0]
    assert "episode 3: action at step 2 is nan in dimension 1 (dy)" in reasons[1]
    assert "val" in reasons[2]
    frames = shown(next(data.train())["observation"]["image_primary"])
    assert {e for ((e, _),) in frames} == {0, 2, 4}
    record = data.embodiments[0]
    assert (record.action_statistics.episodes, record.action_statistics.steps) == (3, 15)
    assert np.isfinite(record.proprio_statistics.mean).all()
    # the cache stores the reasons: with the other setting, they are still an error
    with pytest.raises(DataError, match=r"proprio at step 3 .* \(2 bad episodes in all\)"):
        opened(not_finite)


def test_a_non_finite_gripper_command_is_found_in_bridge_too(tmp_path, monkeypatch):
    def change(episode, number):
        episode["steps"]["action"][2, 6] = np.nan

    corrupt(monkeypatch, change)
    write(tmp_path, "bridge_dataset", {"train": [numbered(1, 5, ["image_0", "image_1"])]})
    with pytest.raises(DataError, match=r"action at step \d is nan in dimension 6 \(gripper\)"):
        opened(tmp_path, "bridge_dataset")


def test_an_episode_that_is_too_short_is_named(tmp_path):
    write(tmp_path, "bridge_dataset", {"train": [numbered(1, 1, ["image_0", "image_1"])]})
    with pytest.raises(DataError, match=r"bridge_dataset: .*episode 0 has no usable steps"):
        opened(tmp_path, "bridge_dataset")


def test_numbers_of_another_width_are_named(tmp_path):
    episode = numbered(1, 3, CAMERAS)
    episode["steps"]["action"] = episode["steps"]["action"][:, :6]
    write(tmp_path, "fake", {"train": [episode]})
    with pytest.raises(DataError, match=r"action has shape \(3, 6\), expected \[T, 7\] \(dx, dy"):
        opened(tmp_path)


def test_a_missing_field_is_named(tmp_path):
    episode = numbered(1, 3, CAMERAS)
    episode["steps"]["observation"]["proprio"] = episode["steps"]["observation"].pop("state")
    write(tmp_path, "fake", {"train": [episode]})
    with pytest.raises(
        DataError, match=r"has no field '[\w.]*state'.*steps\.observation .*proprio"
    ):
        opened(tmp_path)


def test_an_episode_without_language_is_masked(tmp_path):
    mixed = episodes(3, 3)
    mixed[0]["steps"]["language_instruction"] = " "
    write(tmp_path, "fake", {"train": mixed})
    batch = next(opened(tmp_path, batch_size=6).train())
    has_text = np.array(shown(batch["observation"]["image_primary"]))[:, 0, 0] == 1
    np.testing.assert_array_equal(batch["task"]["present"]["language"], has_text)
    np.testing.assert_array_equal(batch["task"]["language"]["mask"].any(1), has_text)


def test_a_dataset_without_its_instruction_field_is_named(tmp_path):
    episode = numbered(1, 3, CAMERAS)
    episode["steps"]["instruction"] = episode["steps"].pop("language_instruction")
    write(tmp_path, "fake", {"train": [episode]})
    with pytest.raises(DataError, match=r"should be steps\.language_instruction, but .* instruct"):
        opened(tmp_path)


def test_a_camera_that_the_files_lack_is_named(tmp_path):
    write(tmp_path, "fake", {"train": [numbered(0, 3, CAMERAS[:1])]})
    with pytest.raises(
        DataError,
        match=r"camera 'wrist' should be steps\.observation\.image_wrist, but .* has imag",
    ):
        opened(tmp_path)


def test_a_camera_that_no_dataset_has_is_named(complete, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.cameras: 'top' \(choices: primary, wrist\)"):
        opened(tmp_path, cameras={"top": 8})


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ("fake=0", "weight 0 of fake must be a positive number; to exclude a dataset, remove"),
        ("fake=-1", "must be a positive number"),
        ("fake=nan", "must be a positive number"),
        ("fake=inf", "must be a positive number"),
        ("fake=much", "weight 'much' of fake is not a number"),
        ("fake=", "weight '' of fake is not a number"),
        ("fake,fake", "names fake twice"),
        ("fakes", "unknown mix or dataset in data.mix: 'fakes'; did you mean 'fake'"),
        ("bridge_datset=1", "did you mean 'bridge_dataset'"),
        ("", r"data\.mix is empty; .*mixes: .*bridge_and_tabletop.*; datasets: .*fake"),
        (" , ", "unknown mix or dataset"),
    ],
)
def test_invalid_mixtures_are_rejected(mix, message):
    with pytest.raises(ConfigError, match=message):
        mixes.parse(mix, "shares")


def test_spaces_in_a_mixture_are_ignored():
    assert mixes.parse("fake = 2 , tabletop", "shares").weights == {"fake": 2.0, "tabletop": 1.0}
    assert mixes.parse("bridge_and_tabletop", "multipliers").kind == "shares"
    weights = mixes.parse("fake,magic_soup=2", "multipliers").weights
    soup = mixes.MIXES["magic_soup"].weights
    assert weights == {"fake": 1.0} | {name: 2 * w for name, w in soup.items()}
    with pytest.raises(ConfigError, match="weights of 'magic_soup' are multipliers"):
        mixes.parse("fake,magic_soup", "shares")


def test_an_image_that_the_pass_cannot_decode_is_named(complete, tmp_path):
    picture = opened(tmp_path)._sources[0].load(0).images["primary"][0]
    stored = [record.numpy() for record in tf.data.TFRecordDataset(str(shard(complete)))]
    with tf.io.TFRecordWriter(str(shard(complete))) as file:
        for record in stored:
            file.write(record.replace(picture[:8], b"\0" * 8))
    with pytest.raises(
        DataError, match=r"fake: .*: primary image of step 0 cannot be decoded: Unkn"
    ):
        opened(tmp_path)
