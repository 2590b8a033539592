"""Held-out episodes of any dataset: a split, a slice or a share; filters; missing datasets."""

import dataclasses

import numpy as np
import pytest
import stored
import tensorflow_datasets as tfds
from data_fakes import config, numbered, opened, shown, write

from octolike.config import ConfigError, upgrade
from octolike.data import open_data
from octolike.data.pipeline.decoded_episodes import decode_episodes
from octolike.data.rlds import statistics
from octolike.data.rlds.index import index_digest
from octolike.data.rlds.reader import Reader
from octolike.data.rlds.split_records import HeldOut, MissingSplitError, is_held_out
from octolike.data.specs.catalog import find_spec
from octolike.data.specs.episode_filter import EpisodeFilter
from octolike.errors import DataError

CAMERAS = ["image_primary", "image_wrist"]
COUNT = 40


def episodes(first: int, end: int) -> list[dict]:
    return [numbered(i, 3, CAMERAS, f"do {i}") for i in range(first, end)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A dataset with one split of forty numbered episodes."""
    path = tmp_path_factory.mktemp("data")
    write(path, "fake", {"train": episodes(0, COUNT)})
    return path


def numbers_of(source) -> list[int]:
    """Return the numbers of a split's episodes, from their images."""
    result = []
    for e in range(len(source.index.steps)):
        frame = source.load(e).images["primary"][0]
        image = tfds.features.Image(shape=(None, None, 3)).decode_example(frame).numpy()
        result.append(int(image[0, 0, 0]))
    return result


def parts(data) -> tuple[list[int], list[int]]:
    (source,) = data._sources
    return numbers_of(source), [x for s in data._held_out for x in numbers_of(s)]


def test_a_share_is_held_out_where_there_is_no_split(root):
    data = opened(root, held_out=0.25)
    training, held_out = parts(data)
    assert sorted(training + held_out) == list(range(COUNT))
    assert 4 <= len(held_out) <= 16
    assert data.embodiments[0].action_statistics.episodes == len(training)
    x = np.repeat(training, 3)
    assert data.embodiments[0].action_statistics.mean[0] == pytest.approx(x.mean())
    text = data.describe()
    assert "held out: 0.25 of the episodes of fake/train, by a hash of their records" in text
    assert "no split 'val' (splits: train)" in text
    assert list(data.validation()) == ["fake"]
    assert len(data.contents()) == 3
    again = opened(root, held_out=0.25)
    assert parts(again) == (training, held_out)


def test_the_hash_depends_on_the_record_alone(root, tmp_path):
    write(tmp_path, "fake", {"train": episodes(20, COUNT)[::-1]})
    _, held_out = parts(opened(root, held_out=0.25))
    _, fewer = parts(opened(tmp_path, held_out=0.25))
    assert sorted(fewer) == [x for x in held_out if x >= 20]


def test_a_larger_share_contains_a_smaller_one():
    content = np.random.default_rng(0).integers(0, 2**62, 100_000)
    small, large = is_held_out(content, 0.05), is_held_out(content, 0.2)
    assert not (small & ~large).any()
    assert small.mean() == pytest.approx(0.05, abs=0.003)
    assert not is_held_out(content, 0).any()


def test_a_slice_is_left_out_of_training(root):
    for split, expected in (
        ("train[95%:]", list(range(38, 40))),
        ("train[:10]", list(range(10))),
        ("train[:2]+train[-2:]", [0, 1, 38, 39]),
    ):
        data = opened(root, validation_split=split)
        training, held_out = parts(data)
        assert held_out == expected
        assert training == [x for x in range(COUNT) if x not in expected]
        assert f"held out: {split} of fake, left out of train" in data.describe()
        assert data.embodiments[0].action_statistics.episodes == len(training)


def test_training_can_be_a_slice(root):
    training, held_out = parts(
        opened(root, train_split="train[:50%]", validation_split="train[50%:75%]")
    )
    assert (training, held_out) == (list(range(20)), list(range(20, 30)))


def test_each_dataset_can_have_its_own_held_out_split(root, tmp_path):
    write(tmp_path, "fake", {"train": episodes(0, 4), "val": episodes(4, 6)})
    write(tmp_path, "tabletop", {"train": episodes(0, 4), "test": episodes(6, 9)})
    splits = {"tabletop": "test"}
    data = opened(tmp_path, "fake=1,tabletop=1", validation_splits=splits, held_out=0.5)
    assert [numbers_of(s) for s in data._held_out] == [[4, 5], [6, 7, 8]]
    assert [numbers_of(s) for s in data._sources] == [[0, 1, 2, 3]] * 2
    none = opened(tmp_path, "fake=1,tabletop=1", validation_split="", held_out=0.5)
    assert none._held_out == []


def test_a_split_on_disk_switches_the_hash_off(tmp_path):
    write(tmp_path, "fake", {"train": episodes(0, 20), "val": episodes(20, 22)})
    readers = [
        Reader(find_spec("fake"), str(tmp_path), "train", held_out=HeldOut("val", share))
        for share in (0.0, 0.5)
    ]
    digests = {index_digest(r) for r in readers}
    assert len(digests) == 1
    assert parts(opened(tmp_path, held_out=0.5)) == (list(range(20)), [20, 21])


def test_the_message_for_a_missing_split_names_the_remedies(root):
    with pytest.raises(MissingSplitError, match="no split 'val'") as error:
        opened(root, held_out=0.0).validation()
    for remedy in ("data.validation_splits.fake", "train[95%:]", "data.held_out", "''"):
        assert remedy in str(error.value)
    with pytest.raises(DataError, match=r"train\[x:\].*Error parsing split"):
        opened(root, validation_split="train[x:]")
    with pytest.raises(DataError, match="all episodes of 'train' are held out by 'train'"):
        opened(root, validation_split="train")


def test_decoded_episodes_respect_the_parts(root):
    settings = config(root, held_out=0.25).data
    training, held_out = parts(open_data(config(root, held_out=0.25)))
    for flag, expected in ((False, training), (True, held_out)):
        decoded = decode_episodes(
            find_spec("fake"), settings, {"primary": 0}, episodes=COUNT, held_out=flag
        )
        assert [int(x.images["primary"][0, 0, 0, 0]) for x in decoded] == expected


def test_old_runs_hold_nothing_out():
    stored_config = {"format": 2, "data": {}, "train": {}, "evaluate": {}}
    data = upgrade.upgrade(stored_config, "config.json")["data"]
    assert data["held_out"] == 0.0
    assert data["channel_orders"] == {"*": "spec"}


def test_all_missing_datasets_are_in_one_message(root):
    mix = "fake=1,tabletop=1,bridge_dataset=1"
    with pytest.raises(DataError, match=r"2 of 3 datasets of the mix do not .*: tabletop, bri"):
        opened(root, mix)


def observe(t, rng):
    return {"image": stored.picture(rng)}


FILTERS = [
    ({"min_steps": 4}, [4, 5, 6], {"fewer than 4 steps": 1}),
    ({"max_steps": 4}, [3, 4], {"more than 4 steps": 2}),
    ({"max_action": 4.0}, [3, 4, 5], {"an action above 4": 1}),
    ({"labelled": True}, [4, 5, 6], {"no instruction": 1}),
    (
        {"labelled": True, "max_steps": 5},
        [4, 5],
        {"no instruction": 1, "more than 5 steps": 1},
    ),
]


@pytest.mark.parametrize(("fields", "steps", "reasons"), FILTERS)
@pytest.mark.parametrize("in_spec", [True, False])
def test_filters_exclude_episodes_and_count_the_reasons(tmp_path, fields, steps, reasons, in_spec):
    image = tfds.features.Image(shape=(8, 8, 3))
    shard = [
        stored.example(n, observe, seed=n, text=b"go" if n > 3 else b" ") for n in (3, 4, 5, 6)
    ]
    stored.write(tmp_path, "mixed", {"image": image}, {"train": [shard]}, text=tfds.features.Text())
    spec = stored.spec("mixed", language="text", filters=fields if in_spec else {})
    filters = EpisodeFilter() if in_spec else EpisodeFilter(**fields)
    reader = Reader(spec, str(tmp_path), "train", filters=filters)
    index = statistics.index_episodes(reader, threads=1, cache="", drop_bad=False)
    assert index.steps.tolist() == steps
    assert dict(index.filtered_by) == reasons
    assert index.action.episodes == len(steps)
    unfiltered = Reader(stored.spec("mixed", language="text"), str(tmp_path), "train")
    assert (
        len(statistics.index_episodes(unfiltered, threads=1, cache="", drop_bad=False).steps) == 4
    )


def test_filters_are_in_the_start_table(root):
    text = opened(root, validation_split="", filters={"max_action": 30.0}).describe()
    assert "filtered: fake/train: 9 (an action above 30)" in text


def test_a_flag_of_the_episode_filters(tmp_path):
    mixed = episodes(0, 4)
    mixed[1]["episode_metadata"]["success"] = False
    write(tmp_path, "fake", {"train": mixed})
    filters = {"keep": "episode.episode_metadata.success"}
    data = opened(tmp_path, validation_split="", filters=filters)
    assert numbers_of(data._sources[0]) == [0, 2, 3]
    assert "1 (episode.episode_metadata.success is false)" in data.describe()
    with pytest.raises(DataError, match=r"the spec reads episode\.nothing"):
        opened(tmp_path, filters={"keep": "episode.nothing"})


def test_unknown_filters_are_rejected(root):
    with pytest.raises(ConfigError, match=r"unknown field of data\.filters: 'minimum'"):
        opened(root, filters={"minimum": 3})
    with pytest.raises(ConfigError, match=r"min_steps is -1; it must be at least 0"):
        opened(root, filters={"min_steps": -1})
    with pytest.raises(ConfigError, match=r"filters of the spec of dataset 'fake'"):
        dataclasses.replace(find_spec("fake"), filters={"minimum": 3})


def test_exact_copies_are_counted(tmp_path):
    write(tmp_path, "fake", {"train": [*episodes(0, 3), *episodes(1, 2)]})
    assert "copies: 1 episodes of fake/train equal another one" in (
        opened(tmp_path, validation_split="").describe()
    )


def test_idle_steps_are_dropped_from_numbers_images_and_texts(tmp_path):
    still = np.isin(np.arange(8), [0, 3, 4, 7])
    episode = stored.example(8, observe)
    for t, row in enumerate(episode["steps"]):
        row["action"] = np.array([0 if still[t] else 1 + t, 0, t >= 4], np.float32)
        row["text"] = f"step {t}"
    lazy = stored.example(3, observe)
    for row in lazy["steps"]:
        row |= {"action": np.zeros(3, np.float32), "text": "nothing"}
    layout = dataclasses.replace(
        stored.spec("x").action,
        names=("x", "y", "gripper"),
        absolute=(False, False, True),
        normalized=(True, True, False),
    )
    spec = stored.spec("idle", language="text", action=layout, filters={"idle": 1e-3})
    image = tfds.features.Image(shape=(8, 8, 3))
    shards = {"train": [[lazy, episode], [episode | {}, stored.example(3, observe, text="go")]]}
    stored.write(tmp_path, "idle", {"image": image}, shards, text=tfds.features.Text())
    reader = Reader(spec, str(tmp_path), "train")
    index = statistics.index_episodes(reader, threads=2, cache="", drop_bad=False)
    # At step 4, the gripper changes: it is not idle.
    assert index.steps.tolist() == [5, 5, 2]
    assert [index.positions(e).tolist() for e in range(3)] == [[1, 2, 4, 5, 6]] * 2 + [[1, 2]]
    assert index.idle_steps == 3 + 3 + 1
    assert dict(index.filtered_by) == {"all steps are idle": 1}
    assert index.action.steps == 12
    for e, row in enumerate(zip(index.shard, index.offset, index.length, strict=True)):
        read = reader.read_episode(*map(int, row))
        full = Reader(dataclasses.replace(spec, filters={}), str(tmp_path), "train")
        whole = full.read_episode(*map(int, row))
        positions = index.positions(e)
        np.testing.assert_array_equal(read.action, whole.action[positions])
        assert read.images["primary"] == [whole.images["primary"][i] for i in positions]
        assert read.instructions == [whole.instructions[i] for i in positions]
    cached = statistics.index_episodes(reader, threads=2, cache="", drop_bad=False)
    np.testing.assert_array_equal(cached.kept, index.kept)
    assert cached.take(np.array([2])).positions(0).tolist() == [1, 2]


def test_absolute_actions_are_idle_where_they_do_not_change():
    layout = dataclasses.replace(stored.spec("x").action, absolute=(True,) * 3)
    action = np.array([[1, 1, 1], [1, 1, 1], [1, 2, 1], [1, 2, 1]], np.float32)
    assert EpisodeFilter(idle=0.1).kept_steps(action, layout).tolist() == [0, 2]
    assert EpisodeFilter().kept_steps(action, layout).tolist() == [0, 1, 2, 3]


def test_the_stream_gives_no_idle_steps(tmp_path):
    mixed = episodes(1, 4)
    for number, episode in enumerate(mixed):
        episode["steps"]["action"] = np.zeros((3, 7), np.float32)
        episode["steps"]["action"][1:, 0] = number + 1, 0
    write(tmp_path, "fake", {"train": mixed})
    data = opened(tmp_path, validation_split="", filters={"idle": 1e-3}, batch_size=3)
    assert "idle: 6 steps of fake/train are dropped" in data.describe()
    batch = next(iter(data.train()))
    frames = [frame for (frame,) in shown(batch["observation"]["image_primary"])]
    assert sorted(frames) == [[1, 1], [2, 1], [3, 1]]
    assert batch["observation"]["proprio"].shape[0] == 3
