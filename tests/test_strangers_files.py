"""Somebody else's runs, datasets and recordings: no code is executed, no other file is read."""

import dataclasses
import json
import os
import pickle
import runpy
import shutil
import signal
import struct
import sys
import zlib
from pathlib import Path

import h5py
import numpy as np
import policy_fakes as fakes
import pytest
import recordings
import stored
import tensorflow_datasets as tfds
from hypothesis import given
from hypothesis import strategies as st

from octolike import files, manifest, types
from octolike.config import ConfigError, plugins, stored_config
from octolike.data.onboarding import infer_spec
from octolike.data.onboarding.convert import conversion, frame_encoding, video
from octolike.data.onboarding.convert.hdf5 import open_hdf5
from octolike.data.onboarding.survey import survey_dataset
from octolike.data.rlds import decode, known_features, statistics
from octolike.data.rlds.reader import Reader
from octolike.data.specs.catalog import load_specs
from octolike.embodiment import embodiments_from_json, embodiments_to_json
from octolike.errors import DataError, RunError
from octolike.evaluation import evaluate
from octolike.text import HuggingFaceTokenizer
from octolike.train import checkpoint, run_manifest

SCRIPTS = Path(__file__).parents[1] / "scripts"
EVIL = "from pathlib import Path\nPath({path!r}).touch()\nDATASETS = []\n"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    image = tfds.features.Image(shape=(8, 8, 3), encoding_format="jpeg")
    shard = [stored.example(4, lambda t, rng: {"image": stored.picture(rng)})]
    return stored.write(root, "robot", {"image": image}, {"train": [shard]})


def write_text(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def change_json(path: Path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("key", ["pythonClassName", "type"])
def test_a_features_json_imports_no_module(dataset, tmp_path, monkeypatch, key):
    directory = shutil.copytree(dataset, tmp_path / "robot" / "1.0.0")
    (tmp_path / "evil_module.py").write_text(EVIL.format(path=str(tmp_path / "executed")))
    monkeypatch.syspath_prepend(tmp_path)
    change_json(directory / "features.json", lambda d: d.update({key: "evil_module.Feature"}))
    message = r"names the class 'evil_module.Feature', and reading it would execute"
    with pytest.raises(DataError, match=message):
        Reader(stored.spec("robot"), str(tmp_path), "train")
    with pytest.raises(DataError, match=message):
        survey_dataset(directory)
    assert not (tmp_path / "executed").exists()


def test_a_dataset_info_reads_only_files_of_its_directory(dataset, tmp_path):
    directory = shutil.copytree(dataset, tmp_path / "robot" / "1.0.0")
    template = "../../../secret-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    change_json(
        directory / "dataset_info.json",
        lambda d: d["splits"][0].update({"filepathTemplate": template}),
    )
    with pytest.raises(DataError, match=r"\A.*robot.*(not in the dataset's directory|cannot be).*"):
        Reader(stored.spec("robot"), str(tmp_path), "train")


@pytest.mark.parametrize("length", ["-5", "999999999999"])
def test_an_impossible_number_of_episodes_is_one_line(dataset, tmp_path, length):
    directory = shutil.copytree(dataset, tmp_path / "robot" / "1.0.0")
    change_json(
        directory / "dataset_info.json", lambda d: d["splits"][0].update(shardLengths=[length])
    )
    with pytest.raises(DataError, match=r"\Arobot: .*dataset_info.json states shards of [^\n]*\Z"):
        Reader(stored.spec("robot"), str(tmp_path), "train")


@pytest.mark.parametrize("key", ["filepathTemplate", "filepath_template"])
@pytest.mark.parametrize(
    "template", ["{DATASET:999999999}-{SPLIT}", "{SPLIT.__class__}", "{SHARD_X_OF_Y!r}", "{0}", 5]
)
def test_the_name_of_a_shard_has_no_other_fields(dataset, tmp_path, template, key):
    """A width of a billion would make a message of a gigabyte."""
    directory = shutil.copytree(dataset, tmp_path / "robot" / "1.0.0")

    def change(info):
        info["splits"][0].pop("filepathTemplate")
        info["splits"][0][key] = template

    change_json(directory / "dataset_info.json", change)
    with pytest.raises(DataError, match=r"\Arobot: .* names its shards [^\n]*\Z") as error:
        Reader(stored.spec("robot"), str(tmp_path), "train")
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize(
    "name", ["features.json", "dataset_info.json", "settings.json", "x.labels.txt", "a-shard"]
)
def test_a_pipe_or_device_in_a_dataset_is_one_line(dataset, tmp_path, name, kind, patience):
    """tensorflow_datasets would wait for the pipe, and fill the memory with the device."""
    directory = shutil.copytree(dataset, tmp_path / "robot" / "1.0.0")
    (directory / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(directory / name)
    else:
        (directory / name).symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"\A[^\n]*(a pipe or device|not an RLDS)[^\n]*\Z"):
        survey_dataset(tmp_path / "robot")
    with pytest.raises(DataError, match=r"\A[^\n]*a pipe or device[^\n]*\Z"):
        Reader(stored.spec("robot"), str(tmp_path), "train")


def test_a_link_in_a_circle_does_not_hinder_reading(dataset, tmp_path):
    directory = shutil.copytree(dataset, tmp_path / "robot" / "1.0.0")
    (directory / "circle").symlink_to("circle")
    assert survey_dataset(directory).count == 1
    assert Reader(stored.spec("robot"), str(tmp_path), "train").counts == [1]


def test_a_json_file_with_a_key_twice_is_one_line(tmp_path):
    (tmp_path / "twice.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(DataError, match="has the key 'a' twice"):
        known_features.read_json(str(tmp_path / "twice.json"))


def change_field(directory: Path, name: str, shape, **changes) -> None:
    """Write a field of the steps into features.json: a tensor of a shape, with other settings."""

    def change(data):
        steps = data["featuresDict"]["features"]["steps"]["sequence"]["feature"]
        fields = steps["featuresDict"]["features"]
        field = json.loads(json.dumps(fields["action"]))
        field["tensor"].update(shape={"dimensions": [str(x) for x in shape]}, **changes)
        fields[name] = field

    change_json(directory / "features.json", change)


@pytest.mark.parametrize("name", ["action", "unused"])
@pytest.mark.parametrize("shape", [[2**40], [2**40, 2**40], [2**27, 2, 2], [1] * 300])
def test_a_field_of_an_impossible_shape_is_one_line(dataset, tmp_path, name, shape):
    """TensorFlow ends the process for two of them, one fills the memory."""
    directory = shutil.copytree(dataset, tmp_path / "robot" / "1.0.0")
    change_field(directory, name, shape, optional=True)
    for read in (lambda: survey_dataset(directory), lambda: read_all(tmp_path)):
        with pytest.raises(DataError, match=r"\A[^\n]*has a field of shape [^\n]*\Z"):
            read()


PARSED = {
    "no values": ([0], {}, "has the shape"),
    "compressed": ([3], {"encoding": "zlib"}, "is stored as bytes or zlib"),
    "of bytes": ([3], {"encoding": "bytes"}, "is stored as bytes or zlib"),
    "complex numbers": ([3], {"dtype": "complex128"}, "cannot be parsed"),
    "optional": ([3], {"optional": True}, "cannot be parsed"),
    "of unknown shape": ([-1, -1], {}, "cannot be parsed"),
}


@pytest.mark.parametrize("name", PARSED)
def test_a_field_that_is_never_parsed_is_one_line(dataset, tmp_path, name):
    """TensorFlow divides by the 0 of a shape, which ends the process."""
    shape, changes, message = PARSED[name]
    directory = shutil.copytree(dataset, tmp_path / "robot" / "1.0.0")
    change_field(directory, "action", shape, **changes)
    with pytest.raises(DataError, match=rf"\Arobot: [^\n]*{message}[^\n]*\Z"):
        read_all(tmp_path)


@pytest.mark.parametrize("name", ["no values", "compressed"])
def test_a_field_that_is_never_parsed_may_be_there(dataset, tmp_path, name):
    shape, changes, message = PARSED[name]
    directory = shutil.copytree(dataset, tmp_path / "robot" / "1.0.0")
    expected = read_all(tmp_path)
    change_field(directory, "unused", shape, **changes)
    assert read_all(tmp_path) == expected
    survey = survey_dataset(directory)
    assert "unused" not in survey.numbers
    assert message in survey.features["unused"]


@pytest.mark.parametrize("name", ["ro\nbot", "ro\x1b[2Jbot"])
def test_a_directory_with_control_characters_is_one_line(dataset, tmp_path, name):
    directory = shutil.copytree(dataset, tmp_path / name / "1.0.0")
    message = r"\A[^\n\x1b]*control characters[^\n\x1b]*\Z"
    with pytest.raises(DataError, match=message):
        survey_dataset(directory)
    with pytest.raises(DataError, match=message):
        Reader(stored.spec("1.0.0"), str(tmp_path / name), "train")


def read_all(root: Path) -> list:
    """Return the actions of all episodes of the dataset "robot"."""
    reader = Reader(stored.spec("robot"), str(root), "train")
    index = statistics.index_episodes(reader, threads=1, cache="", drop_bad=False)
    rows = zip(index.shard, index.offset, index.length, strict=True)
    return [reader.read_episode(*map(int, row)).action.tolist() for row in rows]


NAMES = st.sampled_from(["featuresDict", "features", "tensor", "shape", "dimensions", "type", "x"])
LEAVES = st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=6)
TREES = st.recursive(
    LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(NAMES, x, max_size=3), max_leaves=9
)


@given(TREES)
def test_any_other_features_json_is_one_line(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("robot") / "robot" / "1.0.0"
    directory.mkdir(parents=True)
    (directory / "features.json").write_text(json.dumps(data))
    with pytest.raises(DataError) as error:
        Reader(stored.spec("robot"), str(directory.parent.parent), "train")
    assert "\n" not in str(error.value)


def test_deep_and_huge_json_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "deep.json").write_text("[" * 200_000)
    with pytest.raises(DataError, match="nested too deeply"):
        known_features.read_json(str(tmp_path / "deep.json"))
    monkeypatch.setattr(known_features, "LARGEST", 1000)
    with pytest.raises(DataError, match="expected at most 1,000"):
        known_features.read_json(str(tmp_path / "deep.json"))


def external_link(file, secret):
    file["obs/link"] = h5py.ExternalLink(str(secret), "/x")


def external_storage(file, secret):
    file.create_dataset("obs/raw", (4,), "u1", external=[(str(secret), 0, 4)])


def virtual(file, secret):
    layout = h5py.VirtualLayout((3,), "f4")
    layout[:] = h5py.VirtualSource(str(secret), "/x", (3,))
    file.create_virtual_dataset("obs/view", layout)


def bomb(file, secret):
    file.create_dataset("obs/big", (1 << 40,), "u1", chunks=(1 << 20,), compression="gzip")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (external_link, r"'/obs/link' is a link into '.*secret.h5'"),
        (external_storage, r"'/obs/raw' has its values in '.*secret.h5'"),
        (virtual, "'/obs/view' is a view of other files"),
        (bomb, r"'/obs/big' has 1,099,511,627,776 bytes"),
    ],
)
def test_an_hdf5_file_reads_no_other_file(tmp_path, part, message):
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["x"] = np.arange(3, dtype=np.float32)
    with h5py.File(tmp_path / "episode.h5", "w") as file:
        file["action"] = np.zeros((3, 7))
        file.create_group("obs")
        file["obs/again"] = h5py.SoftLink("/obs")  # a circle
        part(file, secret)
    with pytest.raises(DataError, match=message):
        open_hdf5(tmp_path / "episode.h5")


def test_an_hdf5_file_with_views_of_itself_is_read(tmp_path):
    with h5py.File(tmp_path / "episode.h5", "w") as file:
        file["x"] = np.arange(3, dtype=np.float32)
        layout = h5py.VirtualLayout((3,), "f4")
        layout[:] = h5py.VirtualSource(".", "/x", (3,))
        file.create_virtual_dataset("view", layout)
    with open_hdf5(tmp_path / "episode.h5") as file:
        np.testing.assert_array_equal(file["view"], [0, 1, 2])


def png_header(side: int) -> bytes:
    """Return a PNG of side × side that decompresses to gigabytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [9_000, 60_000, 2**31 - 1])
def test_a_decompression_bomb_is_refused_by_its_header(side):
    image = png_header(side)
    with pytest.raises(DataError, match="place"):
        frame_encoding.is_depth_image(image, "place")
    with pytest.raises(decode.tf.errors.OpError, match="more than 67,108,864 pixels"):
        decode.check_image(image)


@pytest.mark.parametrize("format", ["", "progressive"])
def test_a_giant_jpeg_is_refused_by_its_header(format):
    """The header of an ordinary JPEG, rewritten to 65,535 × 65,535."""
    picture = stored.picture(np.random.default_rng(0))
    image = decode.tf.io.encode_jpeg(picture, progressive=bool(format)).numpy()
    height, width = picture.shape[:2]
    size = struct.pack(">HH", height, width)
    assert image.count(size) == 1
    giant = image.replace(size, b"\xff" * 4)
    assert not decode.size_problem(image)
    assert decode.size_problem(giant)
    # libjpeg decodes these, too: bytes between segments, fill bytes, a marker without a length
    end = 4 + int.from_bytes(image[4:6], "big")  # of the first segment
    for between in (b"ab", b"\xff\xff", b"\xff\x01", b"\xff\x00"):
        decode.check_image(image[:end] + between + image[end:])
        assert decode.size_problem(giant[:end] + between + giant[end:])
    for end in range(len(image)):  # truncated anywhere: no error, and not giant
        assert not decode.size_problem(image[:end])


def test_a_gif_is_refused():
    """All of its frames are decompressed, and each has a size of its own."""
    with pytest.raises(decode.tf.errors.OpError, match="expected PNG or JPEG"):
        decode.check_image(b"GIF89a" + struct.pack("<HH", 64, 48) + bytes(20))


@pytest.mark.parametrize("step", [0, 2])
def test_a_dataset_with_a_giant_image_is_named_before_the_stream_decodes_it(step):
    frames = [png_header(64)] * 4
    frames[step] = png_header(60_000)
    with pytest.raises(decode.UndecodableFrameError) as caught:
        decode.black_frames(decode.tf.constant(frames))
    assert caught.value.step == step
    assert "pixels" in str(caught.value.error)


def test_ordinary_images_are_not_giant():
    rng = np.random.default_rng(0)
    for encode in (decode.tf.io.encode_png, decode.tf.io.encode_jpeg):
        assert not decode.size_problem(encode(stored.picture(rng)).numpy())
    for start in (b"", b"\xff\xd8", b"\xff\xd8\xff", b"\x89PNG"):
        assert not decode.size_problem(start)


@pytest.mark.parametrize(
    "text",
    ["#EXTM3U\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile {secret}\n"],
)
def test_a_video_file_that_is_a_playlist_reads_no_other_file(tmp_path, text):
    (tmp_path / "playlist.mp4").write_text(text.format(secret=tmp_path / "secret.ts"))
    with pytest.raises(DataError, match="cannot be decoded"):
        video.list_frames(tmp_path / "playlist.mp4")


def test_a_video_with_giant_frames_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    recordings.video(tmp_path / "video.mp4", recordings.frames(0))
    monkeypatch.setattr(video, "MOST_PIXELS", recordings.SIDE**2 - 1)
    with pytest.raises(DataError, match=r"frames of 16 × 16 pixels; expected at most 255"):
        video.list_frames(tmp_path / "video.mp4")


def test_a_postscript_picture_is_not_given_to_ghostscript():
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(DataError, match="place, step 0 is not an image"):
        frame_encoding.encode([script], frame_encoding.ConvertOptions(), "place")


BAD_INFO = {
    "a width of a billion digits": {"data_path": "data/{episode_index:0900000000d}.parquet"},
    "an attribute": {"data_path": "{video_key.__class__}"},
    "a path outside": {"data_path": "../../secret-{episode_index}.parquet"},
    "an absolute path": {"data_path": "/etc/passwd"},
    "a path that is no text": {"data_path": [1]},
    "features that are no object": {"features": []},
    "a feature without a type": {"features": {"action": {}}},
    "a rate that is no number": {"fps": "x"},
    "a rate of zero": {"fps": 0},
    "splits of words": {"splits": {"train": "a:b", "val": "c:d"}},
    "chunks of no size": {"chunks_size": None},
}


@pytest.mark.parametrize("name", BAD_INFO)
def test_a_malformed_lerobot_dataset_is_one_line(tmp_path, name):
    root = recordings.lerobot(tmp_path / "in", 2, 1, images=True)
    change_json(root / "meta" / "info.json", lambda d: d.update(BAD_INFO[name]))
    with pytest.raises(DataError) as error:
        conversion.convert(root, str(tmp_path / "out"), "robot", conversion.ConversionPlan())
    assert "\n" not in str(error.value)
    assert str(root) in str(error.value)


class Touch:
    """Executes something when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self):
        return Path.touch, (self._path,)


BAD_NPZ = {
    "pickled objects": lambda path: np.savez(
        path, action=np.zeros((4, 3)), x=np.array([Touch(path.with_name("executed"))] * 4)
    ),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Touch(path.with_name("executed")))),
    "an npy file": lambda path: np.save(path.open("wb"), np.zeros(3)),
    "a success of several values": lambda path: np.savez(
        path, action=np.zeros((4, 3)), success=np.ones(2)
    ),
    "a rate that is no number": lambda path: np.savez(
        path, action=np.zeros((4, 3)), control_hz="fast"
    ),
}


@pytest.mark.parametrize("name", BAD_NPZ)
def test_a_malformed_npz_recording_is_one_line_and_executes_nothing(tmp_path, name):
    (tmp_path / "in").mkdir()
    BAD_NPZ[name](tmp_path / "in" / "episode.npz")
    with pytest.raises(DataError) as error:
        conversion.convert(
            tmp_path / "in", str(tmp_path / "out"), "robot", conversion.ConversionPlan()
        )
    assert "\n" not in str(error.value)
    assert not (tmp_path / "in" / "executed").exists()


def test_names_of_a_dataset_do_not_become_code_in_its_spec(dataset, tmp_path):
    mark = tmp_path / "executed"
    code = f'x"""\nimport pathlib; pathlib.Path({str(mark)!r}).touch()\n"""'
    survey = dataclasses.replace(survey_dataset(dataset), name=code, version=code)
    text = infer_spec.spec_text(survey, infer_spec.infer(survey))
    runpy.run_path(str(write_text(tmp_path / "spec.py", text)))
    assert not mark.exists()


def test_the_name_of_a_camera_is_no_path_of_its_picture(tmp_path, monkeypatch, capsys):
    outside = tmp_path / "outside"
    image = tfds.features.Image(shape=(8, 8, 3), encoding_format="jpeg")
    shard = [stored.example(4, lambda t, rng: {str(outside): stored.picture(rng)})]
    directory = stored.write(tmp_path, "robot", {str(outside): image}, {"train": [shard]})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["inspect_data", str(directory)])
    runpy.run_path(str(SCRIPTS / "inspect_data.py"), run_name="__main__")
    assert not outside.with_suffix(".png").exists()
    assert len(list((tmp_path / "robot_pictures").iterdir())) == 2


def test_the_code_of_a_tokenizer_is_not_executed(tmp_path):
    mark = tmp_path / "executed"
    (tmp_path / "evil.py").write_text(EVIL.format(path=str(mark)))
    code = {"AutoTokenizer": ["evil.Evil", None], "AutoConfig": "evil.Evil"}
    for name in ("tokenizer_config.json", "config.json"):
        settings = {"tokenizer_class": "Evil", "model_type": "evil", "auto_map": code}
        (tmp_path / name).write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"\A[^\n]*neither a directory with a tokenizer[^\n]*\Z"):
        _ = HuggingFaceTokenizer(path=str(tmp_path)).vocabulary
    assert not mark.exists()


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A stranger's run with dataset specs that would execute something."""
    run = fakes.run_of()
    specs = tmp_path / "theirs.py"
    specs.write_text(EVIL.format(path=str(tmp_path / "executed")))
    run.config.data.specs = (str(specs),)
    fakes.save_run(tmp_path / "run", run)
    return tmp_path / "run"


def test_the_dataset_specs_of_a_stored_run_are_executed_only_by_name(run_dir, tmp_path):
    for config in (checkpoint.load_run(run_dir).config, stored_config(run_dir)):
        with pytest.raises(ConfigError, match=r"not executed unless you allow it: --plugins=.*the"):
            load_specs(config.data.specs)
    assert not (tmp_path / "executed").exists()
    config = checkpoint.load_run(run_dir, plugin_files=("theirs.py",)).config
    with pytest.raises(ConfigError, match="does not define DATASETS"):
        load_specs(config.data.specs)
    assert (tmp_path / "executed").exists()


def test_a_file_of_ones_own_takes_the_place_of_the_stored_one(tmp_path):
    local = tmp_path / "theirs.py"
    local.write_text("")
    assert plugins.approved(["/nowhere/theirs.py"], [str(local)]) == (str(local),)
    assert isinstance(plugins.approved(["/nowhere/theirs.py"], []), plugins.StoredFiles)


def spoil(name, change):
    def apply(directory: Path) -> None:
        change_json(directory / name, change)
        run_manifest.accept(run_manifest.files.as_path(directory))

    return apply


MALFORMED = {
    "a shape that is no list": spoil("batch_spec.json", lambda d: d["action"].update(shape="x")),
    "a giant shape": spoil("batch_spec.json", lambda d: d["action"].update(shape=[1, 1, 2**40])),
    "an unknown dtype": spoil("batch_spec.json", lambda d: d["action"].update(dtype="O")),
    "no action": spoil("batch_spec.json", lambda d: d.pop("action")),
    "names that are numbers": spoil("names.json", lambda d: d.update(tasks=[1])),
    "names of another kind": spoil("names.json", lambda d: d.update(evil=["x"])),
    "other robots": spoil("names.json", lambda d: d.update(embodiments=["x"])),
    "records that are no list": spoil("embodiments.json", lambda d: d.__setitem__(0, 3)),
    "a negative size": spoil("config.json", lambda d: d["data"].update(batch_size=-1)),
    "at odds with itself": spoil("config.json", lambda d: d["evaluate"].update(execute=10**6)),
    "text for a section": spoil("config.json", lambda d: d.update(data="x")),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_of_a_run_is_one_line_at_load(tmp_path, name):
    fakes.save_run(tmp_path / "run", fakes.run_of())
    MALFORMED[name](tmp_path / "run")
    with pytest.raises((RunError, ConfigError)) as error:
        checkpoint.load_run(tmp_path / "run")
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


BAD_JSON = {
    "nothing": "",
    "deep": "[" * 100_000,
    "deep but JSON": '{"a":' * 900 + "1" + "}" * 900,
    "a list": "[1]",
    "null": "null",
    "a number of 5,000 digits": f'{{"seed": {"9" * 5000}}}',
    "no text": "\xff{",
    "control characters": json.dumps({"\x1b[2J\n": "\n"}),
}


@pytest.mark.parametrize("text", BAD_JSON.values(), ids=BAD_JSON)
@pytest.mark.parametrize("name", ["config.json", "names.json", "embodiments.json"])
def test_bad_json_of_a_run_is_one_line_for_each_command(tmp_path, name, text):
    """Serving, evaluating, resuming, and starting from it."""
    run = fakes.save_run(tmp_path / "run", fakes.run_of())
    (tmp_path / "run" / name).write_bytes(text.encode("latin-1"))
    (tmp_path / "run" / "manifest.json").unlink()
    readers = [
        lambda: checkpoint.load_run(tmp_path / "run"),
        lambda: checkpoint.check_same_run(run.config, run.embodiments, run.spec, run.names),
    ]
    if name != "embodiments.json":
        readers.append(lambda: evaluate.robots_to_evaluate(tmp_path / "run", "all"))
    if name == "config.json":
        readers.append(lambda: stored_config(tmp_path / "run"))
    for read in readers:
        with pytest.raises((RunError, ConfigError)) as error:
            read()
        message = str(error.value)
        # each difference from a run that could be resumed has a line of its own
        assert "\n" not in message or "holds another run" in message
        assert name in message


RECORD_CHANGES = {
    "NaN mean": lambda s: s["mean"].__setitem__(0, float("nan")),
    "infinite max": lambda s: s["max"].__setitem__(0, float("inf")),
    "absurd std": lambda s: s["std"].__setitem__(0, 1e8),
    "negative std": lambda s: s["std"].__setitem__(0, -1.0),
    "min above max": lambda s: s["min"].__setitem__(0, 1e6),
    "mean outside": lambda s: s["mean"].__setitem__(0, 50.0),
    "too short": lambda s: s["std"].pop(),
    "text": lambda s: s["std"].__setitem__(0, "x"),
    "gigantic": lambda s: s.update({k: [1e12] * 7 for k in ("mean", "min", "max", "p01", "p99")}),
}


@pytest.mark.parametrize("part", ["action", "proprio"])
@pytest.mark.parametrize("name", RECORD_CHANGES)
def test_impossible_statistics_are_refused(name, part):
    data = embodiments_to_json([fakes.robot()])
    assert embodiments_from_json(data)[0].name == "arm"
    RECORD_CHANGES[name](data[0][f"{part}_statistics"])
    with pytest.raises(ValueError, match="embodiment") as error:
        embodiments_from_json(data)
    assert "\n" not in str(error.value)


@given(TREES)
def test_any_other_batch_spec_or_names_are_one_line(data):
    for parse in (types.spec_from_json, types.names_from_json):
        with pytest.raises(ValueError) as error:
            parse(data)
        assert "\n" not in str(error.value)


@pytest.fixture
def patience():
    """End a test that waits for a pipe or reads a device without end."""

    def stop(*args):
        raise TimeoutError("it waits forever")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "huge"])
@pytest.mark.parametrize(
    "name", ["config.json", "names.json", "manifest.json", "checkpoints/7/manifest.json"]
)
def test_what_is_not_a_regular_file_is_one_line(name, kind, tmp_path, patience, monkeypatch):
    fakes.save_run(tmp_path / "run", fakes.run_of())
    path = tmp_path / "run" / name
    text = path.read_text()
    path.unlink()
    if kind == "huge":
        monkeypatch.setattr(files, "LARGEST_TEXT", len(text) - 1)
        path.write_text(text)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises((RunError, ConfigError, FileNotFoundError)) as error:
        checkpoint.load_run(tmp_path / "run")
    assert "\n" not in str(error.value)


def test_a_pipe_in_a_checkpoint_without_a_manifest_is_one_line(tmp_path, patience):
    fakes.save_run(tmp_path / "run", fakes.run_of())
    folder = tmp_path / "run" / "checkpoints" / "7"
    (folder / "manifest.json").unlink()
    (folder / "params" / "manifest.ocdbt").unlink()
    os.mkfifo(folder / "params" / "manifest.ocdbt")
    with pytest.raises(RunError, match=r"manifest\.ocdbt is not a regular"):
        checkpoint.load_run(tmp_path / "run")


def test_folders_that_link_in_circles_are_listed_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").touch()
    for name in "bcd":
        (tmp_path / "a" / name).symlink_to(tmp_path)
    assert manifest.list_files(tmp_path) == ["a/x"]
