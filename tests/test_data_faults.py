"""Data that become unusable while a stream runs: one clear error, or the rows are replaced."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from data_fakes import numbered, opened, shown, write

from octolike import types
from octolike.data.pipeline import stream as data_stream
from octolike.data.pipeline.example_graph import MAX_STEPS
from octolike.data.pipeline.stream import BadRows
from octolike.data.rlds.episode import Episode
from octolike.data.specs import catalog
from octolike.errors import DataError

# 32 frames: an epoch has four batches of two lanes with four rows each.
LENGTHS, BATCH, LANES, EPOCH = (3, 4, 5, 6, 7, 7), 8, 2, 4
SIDE = 24  # such images are not small enough to be taken for black ones
CAMERAS = {"primary": SIDE, "wrist": SIDE}
BAD, CAMERA = 3, "image_wrist"  # the episode that becomes bad
NAME = "fake-train.tfrecord-00000-of-00001"


def episode_of_noise(number: int, steps: int) -> dict:
    """Return a numbered episode with noise around the first pixel."""
    episode = numbered(number, steps, (), f"do {number}")
    image = np.random.default_rng(number).integers(1, 255, (steps, SIDE, SIDE, 3)).astype(np.uint8)
    image[:, 0, 0, 0], image[:, 0, 0, 1] = number, np.arange(steps)
    for t in range(steps):  # images of equal size count as arrays, which are all decoded
        image[t, SIDE - 1 - t :] = 200
    episode["steps"]["observation"] |= {"image_primary": image, CAMERA: image}
    return episode


class Faulty:
    """A dataset with files that change after it was opened, and its batches before.

    Attributes:
        data: the opened dataset.
        batches: the first three epochs of the unchanged files.
        shard: its only file; content: the unchanged bytes.
        offset, length: of the record of the episode that becomes bad.
    """

    def __init__(self, root: Path, change: Callable[[Path], None] = lambda shard: None) -> None:
        """change: of the file, before it is opened."""
        episodes = [episode_of_noise(i, n) for i, n in enumerate(LENGTHS)]
        self.shard = write(root, "fake", {"train": episodes}) / NAME
        change(self.shard)
        self.content = self.shard.read_bytes()
        settings = {"batch_size": BATCH, "lanes": LANES, "window": 2, "cameras": CAMERAS}
        settings |= {"validation_split": "", "prefetch": 1, "bad_episodes": "drop"}
        self.data = opened(root, **settings)
        index = self.data._sources[0].index
        assert len(index.steps) == len(LENGTHS)
        self.offset, self.length = int(index.offset[BAD]), int(index.length[BAD])
        self.batches: list[dict] = []

    def train(self, kind: str = "drop", start=None, process=(0, 1)):
        """Return the stream; kind: data.bad_episodes, which the graph does not depend on."""
        self.data._config.bad_episodes = kind
        return self.data.train(start, process)

    def take(self, count: int, start=None, process=(0, 1)) -> list[dict]:
        """Return the leaves of the first batches."""
        stream = self.train("drop", start, process)
        batches = [dict(types.flatten(next(stream))) for _ in range(count)]
        stream.close()
        return batches

    @property
    def record(self) -> bytes:
        """The record of the episode, framed by its length and checksums."""
        return self.content[self.offset : self.offset + 16 + self.length]

    def replace(self, record: bytes) -> None:
        """Replace the framed record of the episode by another one of the same length."""
        assert len(record) == len(self.record)
        self.shard.write_bytes(self.content.replace(self.record, record))

    def flip(self, byte: int) -> None:
        """Flip a bit of the framed record."""
        changed = bytearray(self.record)
        changed[byte] ^= 4
        self.replace(bytes(changed))

    def truncate(self) -> None:
        """Cut the file in the middle of the record."""
        self.shard.write_bytes(self.content[: self.offset + self.length // 2])

    def forget(self) -> None:
        """Replace the record by zeros; the checksums fit."""
        self.replace(framed(bytes(self.length), self.shard.parent))

    def alter(self) -> None:
        """Change the actions of the record; its checksums fit, and its fields can be parsed."""
        data = self.record[12:-4]
        changed = data.replace(np.float32(BAD).tobytes(), np.float32(77).tobytes())
        assert changed != data
        self.replace(framed(changed, self.shard.parent))

    def reorder(self) -> None:
        """Put the records after the first one in the reverse order."""
        head, *records = framed_records(self.content)
        self.shard.write_bytes(b"".join([head, *reversed(records)]))


def break_image(shard: Path) -> None:
    """Make an image of step 2 one that cannot be decoded; checksums and lengths stay valid."""
    records = framed_records(shard.read_bytes())
    picture = tf.io.encode_png(
        episode_of_noise(BAD, LENGTHS[BAD])["steps"]["observation"][CAMERA][2]
    )
    data, picture = records[BAD][12:-4], picture.numpy()
    assert data.count(picture) == 2  # both cameras have it
    at = data.rindex(picture)
    broken = data[: at + 40] + bytes(len(picture) - 40) + data[at + len(picture) :]
    records[BAD] = framed(broken, shard.parent)
    shard.write_bytes(b"".join(records))


def framed(data: bytes, folder: Path) -> bytes:
    """Return a record with its length and checksums."""
    path = folder / "framed"
    with tf.io.TFRecordWriter(str(path)) as file:
        file.write(data)
    record = path.read_bytes()
    path.unlink()
    return record


def framed_records(content: bytes) -> list[bytes]:
    records = []
    while content:
        size = int.from_bytes(content[:8], "little") + 16
        records.append(content[:size])
        content = content[size:]
    return records


@pytest.fixture(scope="module")
def opened_once(tmp_path_factory):
    result = Faulty(tmp_path_factory.mktemp("faulty"))
    result.batches = result.take(3 * EPOCH)
    return result


@pytest.fixture
def faulty(opened_once):
    """The dataset, with unchanged files."""
    opened_once.shard.write_bytes(opened_once.content)
    return opened_once


@pytest.fixture(scope="module")
def with_bad_image(tmp_path_factory, opened_once):
    """The dataset with an image that cannot be decoded, and the batches of the other one."""
    result = Faulty(tmp_path_factory.mktemp("image"), break_image)
    result.batches = opened_once.batches
    return result


FAULTS: dict[str, tuple[Callable[[Faulty], None], str]] = {
    "bit of the data": (lambda x: x.flip(12 + x.length // 2), "byte {offset}: corrupted record"),
    "bit of the checksum": (lambda x: x.flip(-1), "byte {offset}: corrupted record"),
    "bit of the length": (lambda x: x.flip(1), "byte {offset}: corrupted record"),
    "truncated": (Faulty.truncate, "byte {offset}: truncated record .* the file has changed"),
    "another record": (Faulty.forget, "byte {offset}: another record is there; the file has chang"),
    "altered": (Faulty.alter, "byte {offset}: another record is there; the file has chang"),
    "removed": (lambda x: x.shard.unlink(), "could not be read: .*No such file"),
    "reordered": (Faulty.reorder, "the file has changed or is corrupted since it was indexed"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_ends_the_stream_with_its_place(faulty, kind):
    break_it, message = FAULTS[kind]
    break_it(faulty)
    assert_ends(faulty, message)


def test_an_image_that_cannot_be_decoded_ends_the_stream_with_its_place(with_bad_image):
    message = "byte {offset}: wrist image of step 2 cannot be decoded: .*; set data.bad_episodes='d"
    assert_ends(with_bad_image, message)


def assert_ends(faulty, message):
    """Expect the batches before the fault, then an error of one line, again and again."""
    stream, returned = faulty.train("error"), []
    with pytest.raises(DataError, match=f"{NAME}.*" + message.format(offset=faulty.offset)) as e:
        returned.extend(dict(types.flatten(next(stream))) for _ in range(2 * EPOCH))
    assert "\n" not in str(e.value)
    assert e.value.__cause__ is None
    with pytest.raises(DataError) as again:  # the error repeats
        next(stream)
    assert str(again.value) == str(e.value)
    # the batches before it are returned
    assert stream.state()["batches"] == len(returned) < 2 * EPOCH
    for batch, expected in zip(returned, faulty.batches, strict=False):
        for path, x in expected.items():
            np.testing.assert_array_equal(batch[path], x, err_msg=path)


def frames_of(batches: list[dict]) -> np.ndarray:
    """Return int [lanes, batches, rows, 2], the last (episode, step) of each row's window."""
    images = [shown(b["observation.image_primary"][:, -1]) for b in batches]
    return np.array(images).reshape(len(batches), LANES, -1, 2).swapaxes(0, 1)


def next_good(bad: np.ndarray) -> np.ndarray:
    """Return the index of the first row from each on that is not bad, cyclic."""
    good, n = np.flatnonzero(~bad), len(bad)
    return np.array(
        [good[(good >= i).argmax()] if (good >= i).any() else good[0] for i in range(n)]
    )


def replaced_rows(faulty: Faulty, kind: str) -> list[dict]:
    """Return the expected batches after a fault in an episode or in the image of its step 2."""
    frames = frames_of(faulty.batches)
    bad = frames[..., 0] == BAD
    if kind == "image":  # of a window of two steps
        bad &= np.isin(frames[..., 1], (2, 3))
        groups = bad.reshape(-1, bad.shape[-1])  # the rows of a lane in a batch
    else:
        groups = bad.reshape(LANES * 3, -1)  # the rows of a lane in an epoch, which are one phase
    index = np.concatenate([i * len(g) + next_good(g) for i, g in enumerate(groups)])
    by_row = {path: np.stack([b[path] for b in faulty.batches]) for path in faulty.batches[0]}
    batches = []
    order = index.reshape(LANES, len(faulty.batches), -1).swapaxes(0, 1)  # batch, lane, row
    for rows in order.reshape(len(faulty.batches), -1):
        lane, batch, row = np.unravel_index(rows, frames.shape[:3])
        batches.append({k: x[batch, lane * frames.shape[2] + row] for k, x in by_row.items()})
    return batches


@pytest.mark.parametrize("kind", ["record", "image"])
def test_bad_rows_are_replaced_by_the_next_good_ones_of_their_lane(
    faulty, with_bad_image, kind, capsys
):
    if kind == "image":
        faulty = with_bad_image
    else:
        faulty.flip(-1)
    expected = replaced_rows(faulty, kind)
    capsys.readouterr()
    frames = frames_of(faulty.batches)
    bad = (frames[..., 0] == BAD) & ((kind != "image") | np.isin(frames[..., 1], (2, 3)))
    stream, states = faulty.train(), []
    assert stream.replaced() == {}
    for number, leaves in enumerate(expected):
        batch = dict(types.flatten(next(stream)))
        for path, x in leaves.items():
            np.testing.assert_array_equal(batch[path], x, err_msg=f"{path} of batch {number}")
        assert stream.replaced().get("fake", 0) == bad[:, : number + 1].sum()
        states.append(json.loads(json.dumps(stream.state())))
    assert bad.sum() > 0
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1
    assert printed[0].startswith("replaced in training: ")
    assert f"byte {faulty.offset}" in printed[0]
    stream.close()
    assert f"fake: {bad.sum()} rows of 1 episodes replaced" in capsys.readouterr().err
    for at in (0, 2, 3, 6):
        for batch, leaves in zip(faulty.take(3, states[at]), expected[at + 1 :]):
            for path, x in leaves.items():
                np.testing.assert_array_equal(batch[path], x, err_msg=f"{path} after {at}")
    parts = [faulty.take(5, process=(i, 2)) for i in range(2)]
    for leaves, *both in zip(expected, *parts, strict=False):
        for path, x in leaves.items():
            np.testing.assert_array_equal(np.concatenate([b[path] for b in both]), x, err_msg=path)


def test_a_batch_without_a_good_row_ends_the_stream(faulty):
    corrupt(faulty, range(len(LENGTHS)))
    stream = faulty.train()
    with pytest.raises(
        DataError, match=r"no usable row; bad rows so far: fake: 8 rows of \d epi"
    ) as e:
        next(stream)
    assert "\n" not in str(e.value)


def corrupt(faulty: Faulty, episodes) -> None:
    records = framed_records(faulty.content)
    for e in episodes:
        records[e] = records[e][:-1] + bytes([records[e][-1] ^ 1])
    faulty.shard.write_bytes(b"".join(records))


def test_a_process_whose_part_has_no_good_row_goes_on_as_one_process_does(faulty, monkeypatch):
    of_lane = [set(x[:EPOCH, :, 0].reshape(-1).tolist()) for x in frames_of(faulty.batches)]
    assert of_lane[0] - of_lane[1]
    corrupt(faulty, of_lane[1])
    single = faulty.take(EPOCH)
    assert not any(b["action_mask"][BATCH // 2 :].any() for b in single)
    assert all(b["action_mask"][: BATCH // 2].any() for b in single)
    parts = [faulty.take(EPOCH, process=(i, 2)) for i in range(2)]
    for leaves, *both in zip(single, *parts, strict=True):
        for path, x in leaves.items():
            np.testing.assert_array_equal(np.concatenate([b[path] for b in both]), x, err_msg=path)
    monkeypatch.setattr(data_stream, "_PATIENCE", 3)
    stream = faulty.train(process=(1, 2))
    next(stream), next(stream)
    with pytest.raises(DataError, match="3 batches of this host have no usable row; bad rows so f"):
        next(stream)


def test_bad_episodes_after_the_first_five_are_counted(faulty, capsys):
    corrupt(faulty, range(1, len(LENGTHS)))
    stream = faulty.train()
    for _ in range(EPOCH):
        try:
            next(stream)
        except DataError:
            break
    lines = capsys.readouterr().err.splitlines()
    named = [x for x in lines if x.startswith("replaced in training: ")]
    assert len(named) == len(set(named)) == 5
    assert "fake: further bad episodes are counted, not printed" in lines


def test_last_steps_with_goals_are_no_bad_rows(tmp_path):
    write(tmp_path, "fake", {"train": [episode_of_noise(i, 1) for i in range(4)]})
    data = opened(tmp_path, goal="last", keep_language=0.0, cameras=CAMERAS, validation_split="")
    batch = next(data.train())
    assert not batch["action_mask"].any()
    assert batch["task"]["present"]["image_primary"].all()


@pytest.mark.parametrize("stored_depth", ["png", "array"])
def test_a_depth_image_that_cannot_be_decoded_is_named(stored_depth):
    """The episode is read once more, whatever its depth images are."""
    array = np.full((8, 8, 1), 900, np.uint16)
    png = tf.io.encode_png(array).numpy()
    frames = [png, png[:40], png] if stored_depth == "png" else [array] * 3
    picture = tf.io.encode_png(np.zeros((8, 8, 3), np.uint8)).numpy()
    images = {"primary": [picture, picture if stored_depth == "png" else picture[:40], picture]}
    episode = Episode(np.zeros((3, 7), np.float32), None, [""] * 3, images, {"primary": frames})
    split = SimpleNamespace(
        spec=catalog.find_spec("fake"),
        load=lambda number: episode,
        name_of=lambda number: "a place",
    )
    rows = BadRows(SimpleNamespace(find=lambda number: (split, number)), drop=False)
    with pytest.raises(DataError, match="fake: a place: primary image of step 1 cannot be decoded"):
        rows.check(np.array([-1, 2 * MAX_STEPS]), masked=False)
