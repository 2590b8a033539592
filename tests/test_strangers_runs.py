"""Somebody else's runs: no code is executed, and whatever is malformed is one line."""

import json
import os
from pathlib import Path

import policy_fakes as fakes
import pytest
from hypothesis import given
from strangers import EVIL, TREES, change_json

from octolike import files, manifest, types
from octolike.config import ConfigError, plugins, stored_config
from octolike.data.specs.catalog import load_specs
from octolike.embodiment import embodiments_from_json, embodiments_to_json
from octolike.errors import RunError
from octolike.evaluation import evaluate
from octolike.text import HuggingFaceTokenizer
from octolike.train import checkpoint, run_manifest


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
