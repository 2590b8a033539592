"""Writing RLDS datasets: any reader reads them, and only complete datasets are read."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from octolike.data.rlds.synthetic import fake_episodes, write_fake_dataset
from octolike.data.rlds.writer import Writer, rlds_episode
from octolike.errors import DataError

CAMERAS = {"primary": 16, "wrist": 12}


def episodes(count, seed=0):
    return list(fake_episodes(seed, count, steps=5, cameras=CAMERAS))


def test_any_rlds_reader_reads_the_dataset(tmp_path):
    wrote = episodes(5)
    writer = Writer(str(tmp_path), "fake", "1.0.0", {"train": 2, "val": 1})
    writer.write("train", 0, wrote[:3])
    writer.write("train", 1, wrote[3:])
    writer.write("val", 0, episodes(1, seed=9))
    builder = tfds.builder_from_directory(writer.finish())
    assert builder.info.splits["train"].shard_lengths == [3, 2]
    read = list(builder.as_dataset(split="train"))
    for ours, theirs in zip(wrote, read, strict=True):
        steps = list(theirs["steps"].as_numpy_iterator())
        state = np.stack([s["observation"]["state"] for s in steps])
        np.testing.assert_array_equal(state, ours["steps"]["observation"]["state"])
        image = np.stack([s["observation"]["image_wrist"] for s in steps])
        np.testing.assert_array_equal(image, ours["steps"]["observation"]["image_wrist"])
        text = ours["steps"]["language_instruction"].encode()
        assert all(s["language_instruction"] == text for s in steps)
        n = len(steps)
        assert [s["is_first"] for s in steps] == [True] + [False] * (n - 1)
        assert [s["is_last"] for s in steps] == [False] * (n - 1) + [True]
        assert steps[-1]["reward"] == 1
        assert theirs["episode_metadata"]["success"].numpy()


def test_a_failed_episode_is_not_terminal():
    episode = episodes(1)[0]
    episode["episode_metadata"]["success"] = False
    steps = rlds_episode(episode, "here")["steps"]
    assert steps["is_last"][-1]
    assert not steps["is_terminal"].any()
    assert not steps["reward"].any()


def test_shards_written_in_parallel_make_the_same_dataset(tmp_path):
    for name, workers in (("one", 1), ("many", 4)):
        writer = Writer(str(tmp_path / name), "fake", "1.0.0", {"train": 4})
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda i, w=writer: w.write("train", i, episodes(2, seed=i)), range(4)))
        writer.finish()
    files = [sorted((tmp_path / n).rglob("*.*")) for n in ("one", "many")]
    for a, b in zip(*files, strict=True):
        assert a.is_dir() or a.read_bytes() == b.read_bytes()


def test_the_bytes_of_a_shard_do_not_depend_on_the_process(tmp_path):
    writer = Writer(str(tmp_path), "fake", "1.0.0", {"train": 1})
    writer.write("train", 0, episodes(2))
    for record in tf.data.TFRecordDataset(str(next(writer.finish().glob("*tfrecord*")))):
        example = tf.train.Example.FromString(record.numpy())
        assert record.numpy() == example.SerializeToString(deterministic=True)


def test_an_interruption_loses_only_the_unfinished_shard(tmp_path):
    def interrupted():
        yield episodes(1)[0]
        raise KeyboardInterrupt

    writer = Writer(str(tmp_path), "fake", "1.0.0", {"train": 2})
    writer.write("train", 0, episodes(2), failed=3)
    with pytest.raises(KeyboardInterrupt):
        writer.write("train", 1, interrupted())
    assert writer.shard_note("train", 0)["failed"] == 3
    assert writer.shard_note("train", 1) is None
    assert writer.write("train", 0, iter([])) == 2  # it exists: no episode is requested
    with pytest.raises(DataError, match=r"shards \[1\] of 2 are not written"):
        writer.finish()
    assert not writer.finished
    assert not writer.directory.exists()
    writer.write("train", 1, episodes(1))
    writer.finish()
    names = sorted(p.name for p in writer.directory.iterdir())
    assert names == [
        "dataset_info.json",
        "fake-train.tfrecord-00000-of-00002",
        "fake-train.tfrecord-00001-of-00002",
        "features.json",
    ]


def test_remnants_of_an_interrupted_writer_are_not_in_the_dataset(tmp_path):
    writer = Writer(str(tmp_path), "fake", "1.0.0", {"val": 1})
    writer.write("val", 0, episodes(1))
    place = tmp_path / "fake" / "1.0.0.incomplete"
    (place / ".fake-val.tfrecord-00000-of-00001.123").write_bytes(b"half")
    assert not [p for p in writer.finish().iterdir() if p.name.startswith(".")]


def test_shards_of_another_plan_are_rejected(tmp_path):
    Writer(str(tmp_path), "fake", "1.0.0", {"train": 3}).write("train", 2, episodes(1))
    with pytest.raises(DataError, match="00002-of-00003, which is not one of the planned"):
        Writer(str(tmp_path), "fake", "1.0.0", {"train": 2})
    assert Writer(str(tmp_path), "fake", "1.0.0", {"train": 3}).shard_note("train", 2)


def test_a_number_under_steps_applies_to_every_step(tmp_path):
    episode = episodes(1)[0]
    episode["steps"]["weight"] = np.float32(2.5)
    writer = Writer(str(tmp_path), "fake", "1.0.0", {"train": 1})
    writer.write("train", 0, [episode])
    (read,) = tfds.builder_from_directory(writer.finish()).as_dataset(split="train")
    steps = list(read["steps"].as_numpy_iterator())
    assert [s["weight"] for s in steps] == [2.5] * len(episode["steps"]["action"])


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lambda e: e["steps"].pop("action"), "episode 1 does not match the features.*'action'"),
        (lambda e: e["episode_metadata"].pop("success"), "does not match the features.*'success'"),
        (lambda e: e["steps"].update(weight=np.float32("nan")), "steps.weight is not finite"),
        (lambda e: e["episode_metadata"].update(success=np.inf), "metadata.success is not finite"),
        (lambda e: e.pop("steps"), "expected 'steps'"),
    ],
)
def test_an_episode_of_another_structure_is_rejected(tmp_path, corrupt, message):
    writer = Writer(str(tmp_path), "fake", "1.0.0", {"train": 1})
    bad = episodes(2)
    corrupt(bad[1])
    with pytest.raises(DataError, match=f"(?s){message}"):
        writer.write("train", 0, bad)
    assert writer.shard_note("train", 0) is None
    assert not list((tmp_path / "fake" / "1.0.0.incomplete").iterdir())


def test_the_error_names_a_bad_episode(tmp_path):
    writer = Writer(str(tmp_path), "fake", "1.0.0", {"train": 1})
    bad = episodes(2)
    bad[1]["steps"]["action"][3, 2] = np.nan
    with pytest.raises(
        DataError, match=r"shard 0, episode 1: steps.action is not finite at step 3"
    ):
        writer.write("train", 0, bad)
    bad[1]["steps"]["action"] = bad[1]["steps"]["action"][:-1]
    with pytest.raises(DataError, match="expected one length"):
        writer.write("train", 0, bad)
    odd = [*episodes(1), *fake_episodes(0, 1, steps=5, cameras={"primary": 20, "wrist": 12})]
    with pytest.raises(DataError, match="does not match the features"):
        writer.write("train", 0, odd)
    with pytest.raises(DataError, match="no episodes"):
        writer.write("train", 0, [])


def test_shards_without_episodes_are_written_on_request(tmp_path):
    writer = Writer(str(tmp_path), "fake", "1.0.0", {"train": 3, "val": 1})
    for split, index, count in (("train", 0, 0), ("train", 1, 2), ("train", 2, 0), ("val", 0, 0)):
        assert writer.write(split, index, episodes(count), may_be_empty=True) == count
        assert writer.write(split, index, episodes(3)) == count  # it exists
    builder = tfds.builder_from_directory(writer.finish())
    assert list(builder.info.splits) == ["train"]
    assert builder.info.splits["train"].shard_lengths == [0, 2, 0]
    assert len([*builder.as_dataset("train")]) == len([*builder.as_dataset("train[:2]")]) == 2
    assert not [*writer.directory.glob("*-val.*")]
    alone = Writer(str(tmp_path), "empty", "1.0.0", {"train": 1})
    alone.write("train", 0, [], may_be_empty=True)
    with pytest.raises(DataError, match=r"^empty has no episodes"):
        alone.finish()


def test_synthetic_data_are_a_function_of_the_seed(tmp_path):
    a = write_fake_dataset(tmp_path / "a", train=3, val=1)
    b = write_fake_dataset(tmp_path / "b", train=3, val=1)
    c = write_fake_dataset(tmp_path / "c", train=3, val=1, seed=5)

    def read(directory):
        return [f.read_bytes() for f in sorted(directory.glob("*tfrecord*"))]

    assert read(a) == read(b) != read(c)
