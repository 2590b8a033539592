"""Somebody else's datasets: no code is executed, no other file is read, no read hangs."""

import dataclasses
import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import stored
import tensorflow_datasets as tfds
from hypothesis import given
from strangers import EVIL, TREES, change_json, write_text

from octolike.data.onboarding import infer_spec
from octolike.data.onboarding.survey import survey_dataset
from octolike.data.rlds import known_features, statistics
from octolike.data.rlds.reader import Reader
from octolike.errors import DataError

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    image = tfds.features.Image(shape=(8, 8, 3), encoding_format="jpeg")
    shard = [stored.example(4, lambda t, rng: {"image": stored.picture(rng)})]
    return stored.write(root, "robot", {"image": image}, {"train": [shard]})


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
