"""Corrupted, changed and foreign files: one line or a counted drop, never another number."""

import gzip
import json
import os
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import stored
import tensorflow as tf
import tensorflow_datasets as tfds

from octolike.data.onboarding.survey import survey_dataset
from octolike.data.rlds import record_files, statistics
from octolike.data.rlds.reader import Reader
from octolike.errors import DataError

EPISODES, SHARDS, SIDE = 3, 2, 8
IMAGE = tfds.features.Image(shape=(SIDE, SIDE, 3), encoding_format="jpeg")
SPEC = stored.spec("robot")


def observe(t, rng):
    return {"image": stored.picture(rng)}


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> Path:
    shards = [
        [stored.example(4 + i, observe, seed=10 * s + i) for i in range(EPISODES)]
        for s in range(SHARDS)
    ]
    return stored.write(
        tmp_path_factory.mktemp("intact"), "robot", {"image": IMAGE}, {"train": shards}
    )


@pytest.fixture
def directory(intact, tmp_path) -> Path:
    shutil.copytree(intact, tmp_path / "robot/1.0.0")
    return tmp_path / "robot/1.0.0"


def reader_of(directory: Path) -> Reader:
    return Reader(SPEC, str(directory.parent.parent), "train")


def index_of(reader: Reader, *, drop_bad: bool = False):
    return statistics.index_episodes(reader, threads=2, cache="", drop_bad=drop_bad)


def actions(reader: Reader, index) -> dict[int, np.ndarray]:
    """Return {content: actions} of all indexed episodes."""
    result = {}
    for row in zip(index.shard, index.offset, index.length, index.content, strict=True):
        shard, offset, length, content = map(int, row)
        record = reader.read_record(shard, offset, length, content)
        result[content] = reader.parse_episode(record, "here").action
    return result


def shard_path(directory: Path, number: int = 0) -> Path:
    return directory / f"robot-train.tfrecord-{number:05d}-of-{SHARDS:05d}"


def spans(path: Path) -> list[tuple[int, int]]:
    """Return (offset, length) of each record."""
    data, offset, result = path.read_bytes(), 0, []
    while offset < len(data):
        (length,) = struct.unpack_from("<Q", data, offset)
        result.append((offset, length))
        offset += length + 16
    return result


def flip(place: str, record: int, bit: int = 0) -> Callable[[Path], None]:
    """Return a function that flips one bit of a record of the first shard."""

    def corrupt(directory: Path) -> None:
        path = shard_path(directory)
        offset, length = spans(path)[record]
        starts = {"length": 0, "header checksum": 8, "data": 12, "data checksum": 12 + length}
        positions = {"middle": 12 + length // 2, "last byte": 11 + length} | starts
        data = bytearray(path.read_bytes())
        data[offset + positions[place]] ^= 1 << bit
        path.write_bytes(data)

    return corrupt


def truncate(to: Callable[[list[tuple[int, int]], int], int]) -> Callable[[Path], None]:
    def corrupt(directory: Path) -> None:
        path = shard_path(directory)
        size = to(spans(path), path.stat().st_size)
        path.write_bytes(path.read_bytes()[:size])

    return corrupt


def edit_json(name: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    def corrupt(directory: Path) -> None:
        path = directory / name
        text = path.read_text()
        assert change(text) != text
        path.write_text(change(text))

    return corrupt


def shard_lengths(*numbers: int) -> Callable[[Path], None]:
    def change(text: str) -> str:
        info = json.loads(text)
        info["splits"][0]["shardLengths"] = list(map(str, numbers))
        return json.dumps(info)

    return edit_json("dataset_info.json", change)


def action_feature(**changes) -> Callable[[Path], None]:
    def change(text: str) -> str:
        features = json.loads(text)
        steps = features["featuresDict"]["features"]["steps"]["sequence"]["feature"]
        steps["featuresDict"]["features"]["action"]["tensor"] |= changes
        return json.dumps(features)

    return edit_json("features.json", change)


def rewrite(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Return a function that changes the second record of the first shard, checksums included."""

    def corrupt(directory: Path) -> None:
        path = shard_path(directory)
        records = [x.numpy() for x in tf.data.TFRecordDataset(str(path))]
        records[1] = change(records[1])
        with tf.io.TFRecordWriter(str(path)) as file:
            for record in records:
                file.write(record)

    return corrupt


def break_images(record: bytes) -> bytes:
    assert b"\xff\xd8\xff" in record
    return record.replace(b"\xff\xd8\xff", b"\0\0\0")


def duplicate_file(directory: Path) -> None:
    shutil.copy(shard_path(directory, 0), shard_path(directory, 1))


def append_file(directory: Path) -> None:
    extra = shard_path(directory, 1).read_bytes()
    shard_path(directory).write_bytes(shard_path(directory).read_bytes() + extra)


def swap_lengths(directory: Path) -> None:
    """Exchange the headers of two records of different lengths."""
    path = shard_path(directory)
    (a, _), (b, _), *_ = spans(path)
    data = bytearray(path.read_bytes())
    data[a : a + 12], data[b : b + 12] = data[b : b + 12], data[a : a + 12]
    path.write_bytes(data)


CORRUPTIONS = {
    **{f"length bit {b}": flip("length", 1, b) for b in (0, 3, 7)},
    "giant length": lambda d: flip_byte(d, 7),
    **{f"header checksum of record {r}": flip("header checksum", r) for r in (0, 2)},
    **{f"first byte of record {r}": flip("data", r) for r in (0, 1, 2)},
    **{f"middle of record {r}, bit {b}": flip("middle", r, b) for r in (0, 1, 2) for b in (0, 7)},
    **{f"last byte of record {r}": flip("last byte", r) for r in (0, 2)},
    **{f"data checksum of record {r}": flip("data checksum", r) for r in (0, 1, 2)},
    "truncated by a byte": truncate(lambda s, size: size - 1),
    "truncated in the last checksum": truncate(lambda s, size: size - 4),
    "truncated in the middle of a record": truncate(lambda s, size: s[1][0] + 100),
    "truncated in a header": truncate(lambda s, size: s[1][0] + 5),
    "truncated after a record": truncate(lambda s, size: s[1][0]),
    "truncated to a few bytes": truncate(lambda s, size: 3),
    "zero-byte shard": truncate(lambda s, size: 0),
    "missing shard": lambda d: shard_path(d, 1).unlink(),
    "duplicated shard": duplicate_file,
    "appended shard": append_file,
    "swapped headers": swap_lengths,
    "fewer episodes listed": shard_lengths(2, 3),
    "more episodes listed": shard_lengths(3, 4),
    "fewer shards listed": shard_lengths(3),
    "an action of another width": action_feature(shape={"dimensions": ["2"]}),
    "an action of a divisible width": action_feature(shape={"dimensions": ["1"]}),
    "an action of another type": action_feature(dtype="int64"),
    "features that are not JSON": edit_json("features.json", lambda text: text[:-20]),
    "a dataset_info that is not JSON": edit_json("dataset_info.json", lambda text: text[:40]),
    "a record that is not an episode": rewrite(lambda record: b"no episode"),
    "an empty record": rewrite(lambda record: b""),
    "images that cannot be decoded": rewrite(break_images),
}


def flip_byte(directory: Path, position: int) -> None:
    path = shard_path(directory)
    offset = spans(path)[1][0]
    data = bytearray(path.read_bytes())
    data[offset + position] ^= 0x10
    path.write_bytes(data)


@pytest.fixture(scope="module")
def numbers(intact) -> dict[int, np.ndarray]:
    reader = reader_of(intact)
    return actions(reader, index_of(reader))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_before_the_pass_is_one_line_or_a_counted_drop(directory, numbers, name):
    CORRUPTIONS[name](directory)
    with pytest.raises(DataError, match=r"\A.*robot.*\Z"):
        index_of(reader_of(directory))
    try:
        reader = reader_of(directory)
        index = index_of(reader, drop_bad=True)
    except DataError:
        return
    remaining = actions(reader, index)
    assert len(index.bad) >= 1
    assert len(index.steps) < len(numbers) or name in ("more episodes listed", "appended shard")
    assert index.action.episodes == len(index.steps) == len(remaining)
    for content, action in remaining.items():
        np.testing.assert_array_equal(action, numbers[content])


UNDER_A_RUN = [n for n in CORRUPTIONS if "JSON" not in n and "listed" not in n and "of a" not in n]


@pytest.mark.parametrize("name", [n for n in UNDER_A_RUN if "an action" not in n])
def test_a_corruption_after_the_pass_never_changes_a_number(directory, numbers, name):
    reader = reader_of(directory)
    index = index_of(reader)
    CORRUPTIONS[name](directory)
    messages = []
    for row in zip(index.shard, index.offset, index.length, index.content, strict=True):
        shard, offset, length, content = map(int, row)
        try:
            record = reader.read_record(shard, offset, length, content)
            action = reader.parse_episode(record, "here").action
        except DataError as error:
            messages.append(str(error))
        else:
            np.testing.assert_array_equal(action, numbers[content])
    assert messages or name == "appended shard"  # the old records are all there
    for message in messages:
        assert re.fullmatch(r".*(restore it|could not be read).*", message)
    if name != "missing shard":
        stamps = reader_of(directory).stamps
        assert stamps != reader.stamps  # the next start indexes the files again


def test_a_replaced_shard_of_the_same_lengths_is_noticed_at_the_read(directory):
    reader = reader_of(directory)
    index = index_of(reader)
    path = shard_path(directory)
    records = [x.numpy() for x in tf.data.TFRecordDataset(str(path))]
    changed = [r.replace(struct.pack("<f", 1), struct.pack("<f", 7)) for r in records]
    assert list(map(len, changed)) == list(map(len, records))
    with tf.io.TFRecordWriter(str(path)) as file:
        for record in changed:
            file.write(record)
    with pytest.raises(DataError, match=r"byte 0: another record is there; the file has changed"):
        actions(reader, index)


def test_a_giant_length_with_a_valid_checksum_does_not_end_the_process(directory):
    path, (offset, _) = shard_path(directory), spans(shard_path(directory))[1]
    giant = struct.pack("<Q", 1 << 60)
    data = bytearray(path.read_bytes())
    data[offset : offset + 12] = giant + struct.pack("<I", masked_checksum(giant))
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"record 1 is truncated or corrupted: its header gives 11"):
        index_of(reader_of(directory))
    index = index_of(reader_of(directory), drop_bad=True)
    assert (len(index.steps), len(index.bad)) == (EPISODES, EPISODES)


def masked_checksum(data: bytes) -> int:
    """Return the checksum of a TFRecord: CRC-32C, rotated and shifted."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


@pytest.mark.parametrize(
    ("compress", "message"),
    [
        (gzip.compress, "is a GZIP-compressed TFRecord file; decompress it: gunzip"),
        (zlib.compress, "is a ZLIB-compressed TFRecord file; write it again without compression"),
    ],
)
def test_compressed_files_are_refused_by_their_name(directory, compress, message):
    for number in range(SHARDS):
        path = shard_path(directory, number)
        path.write_bytes(compress(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        index_of(reader_of(directory))
    with pytest.raises(DataError, match=message):
        index_of(reader_of(directory), drop_bad=True)
    with pytest.raises(DataError, match=message):
        survey_dataset(directory)


def test_an_array_record_dataset_is_refused_by_its_name(tmp_path):
    class Builder(tfds.core.GeneratorBasedBuilder):
        """Two episodes."""

        VERSION = tfds.core.Version("1.0.0")
        name = "robot"

        def _info(self):
            steps = tfds.features.Dataset(
                {"action": stored.ACTION, "is_first": stored.FLAG, "observation": {"image": IMAGE}}
            )
            features = tfds.features.FeaturesDict({"steps": steps})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from ((i, stored.example(3, observe, seed=i)) for i in range(2))

    builder = Builder(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    message = r"is stored as array_record, and octolike reads tfrecord; convert it with: tfds conv"
    with pytest.raises(DataError, match=message):
        Reader(SPEC, str(tmp_path), "train")
    with pytest.raises(DataError, match=message):
        survey_dataset(tmp_path / "robot")


def test_a_bucket_is_listed_once_and_never_asked_shard_by_shard(directory, monkeypatch):
    calls = {"listdir": 0, "stat": 0, "exists": 0}
    for name in calls:
        function = getattr(tf.io.gfile, name)

        def counted(path, *rest, name=name, function=function):
            calls[name] += 1
            return function(path, *rest)

        monkeypatch.setattr(tf.io.gfile, name, counted)
    reader = reader_of(directory)
    assert calls["stat"] <= 2  # the sizes of features.json and dataset_info.json
    assert calls["exists"] <= 3  # the dataset, and these two
    calls = dict.fromkeys(calls, 0)
    monkeypatch.setattr(record_files.files, "is_remote", lambda path: True)
    monkeypatch.setattr(record_files, "_fsspec_listing", lambda path: None)
    listing = record_files.list_directory(str(directory))
    assert calls["listdir"] == 1
    assert calls["stat"] == len(listing) == len(list(directory.iterdir()))
    assert [listing[name][0] for name, *_ in reader.stamps] == [s[1] for s in reader.stamps]


def test_fsspec_lists_a_bucket_with_sizes(monkeypatch):
    import fsspec

    system = fsspec.filesystem("memory")
    system.pipe("/bucket/robot/1.0.0/a.tfrecord", b"12345")
    listing = record_files._fsspec_listing("memory://bucket/robot/1.0.0")
    assert listing is not None
    assert listing["a.tfrecord"][0] == 5
    assert record_files._fsspec_listing("gs://bucket/robot") is None  # gcsfs is not installed


def test_a_touched_shard_is_indexed_again(directory):
    reader = reader_of(directory)
    os.utime(shard_path(directory), (1e9, 1e9))
    assert reader_of(directory).stamps != reader.stamps
