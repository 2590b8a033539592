"""Paths in config.json: a run works from any current directory and after it was moved."""

import json
import shutil
from pathlib import Path

import pytest

from octolike import config as c
from octolike.config import paths
from octolike.config.components import Component

FIXTURE = Path(__file__).parent / "fixtures" / "run_format_1"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Return the current directory, with a data set and an (empty) run."""
    monkeypatch.chdir(tmp_path)
    for name in ("data", "runs/x", "tokenizer"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


def a_config(**data):
    config = c.Config(workdir="runs/x")
    config.data.root = "data"
    for name, value in data.items():
        setattr(config.data, name, value)
    return c.resolve(config)


def stored(config):
    """Return config.json's data."""
    return json.loads(c.to_json(paths.portable(config)))


def loaded(config, run):
    return paths.resolved(c.from_json(c.to_json(paths.portable(c.resolve(config)))), run)


def test_near_paths_are_stored_relative_to_the_run_and_far_ones_absolute(home):
    config = a_config(
        roots=Component(one="/mnt/far/away", two="data/two"),
        specs=("runs/x/spec.py",),
        paraphrases="words.json",
    )
    data = stored(config)["data"]
    assert data["root"] == "{run}/../../data"
    assert data["roots"] == {"one": "/mnt/far/away", "two": "{run}/../../data/two"}
    assert data["specs"] == ["{run}/spec.py"]
    assert data["paraphrases"] == "{run}/../../words.json"
    assert data["cache"] == ""
    assert stored(config)["workdir"] == str(home / "runs" / "x")


def test_the_config_itself_stays_as_it_was(home):
    config = a_config(roots=Component(one="data"))
    paths.portable(config)
    assert config == a_config(roots=Component(one="data"))


def test_a_name_on_a_hub_is_not_a_path(home):
    config = a_config(text=Component(kind="huggingface", path="google-t5/t5-base", length=4))
    config.model.tokenizers = {
        "language": Component(kind="text_encoder", encoder=Component(kind="t5", path="tokenizer"))
    }
    assert stored(config)["data"]["text"]["path"] == "google-t5/t5-base"
    encoder = stored(config)["model"]["tokenizers"]["language"]["encoder"]
    assert encoder["path"] == "{run}/../../tokenizer"
    back = loaded(config, "runs/x")
    assert back.data.text["path"] == "google-t5/t5-base"
    assert back.model.tokenizers["language"]["encoder"]["path"] == "tokenizer"


def test_a_run_is_read_from_another_current_directory(home, monkeypatch):
    config = a_config()
    text = c.to_json(paths.portable(config))
    monkeypatch.chdir(home / "runs")
    back = paths.resolved(c.from_json(text), "x")
    assert Path(back.data.root).resolve() == home / "data"
    assert back.workdir == "x"
    monkeypatch.chdir("/")
    back = paths.resolved(c.from_json(text), home / "runs" / "x")
    assert back.data.root == str(home / "data")


def test_a_run_and_its_data_are_moved_together(home):
    text = c.to_json(paths.portable(a_config()))
    (home / "new" / "runs").mkdir(parents=True)
    for name in ("data", "runs/x"):
        shutil.move(home / name, home / "new" / name)
    back = paths.resolved(c.from_json(text), "new/runs/x")
    assert back.data.root == "new/data"


def test_a_run_that_is_copied_alone_reads_the_data_of_its_first_place(home):
    text = c.to_json(paths.portable(a_config()))
    back = paths.resolved(c.from_json(text), "copies/x/y")
    assert back.data.root == str(home / "data")
    shutil.rmtree(home / "data")
    back = paths.resolved(c.from_json(text), home / "copies" / "x" / "y")
    assert back.data.root == str(home / "copies" / "data")  # the place that an error names


def test_a_run_of_format_1_is_read_from_elsewhere(home, monkeypatch):
    text = c.to_json(a_config())  # as typed
    assert paths.resolved(c.from_json(text), "runs/x").data.root == "data"
    monkeypatch.chdir(home / "runs")
    back = paths.resolved(c.from_json(text), "x")
    assert Path(back.data.root).resolve() == home / "data"
    shutil.rmtree(home / "data")
    assert paths.resolved(c.from_json(text), "x").data.root == "data"


def test_a_bucket_is_not_a_local_folder():
    config = c.Config(workdir="gs://bucket/runs/x")
    config.data.root, config.data.cache = "gs://bucket/data", "gs://other/cache"
    config.data.paraphrases = "/local/words.json"
    data = stored(config)["data"]
    assert data["root"] == "{run}/../../data"
    assert (data["cache"], data["paraphrases"]) == ("gs://other/cache", "/local/words.json")
    back = loaded(config, "gs://bucket/runs/x")
    assert (back.workdir, back.data.root) == ("gs://bucket/runs/x", "gs://bucket/data")


def test_configs_are_compared_with_the_same_spelling(home):
    old = loaded(a_config(), home / "runs" / "x")
    assert old.data.root != "data"
    assert paths.aligned(old, a_config()).data.root == "data"
    moved = a_config(root="elsewhere")
    assert paths.aligned(old, moved).data.root == old.data.root


def test_a_moved_run_is_the_same_run(tmp_path, monkeypatch):
    from octolike.data import open_data
    from octolike.train import checkpoint

    def resumes(run, **options):
        config = c.stored_config(run)
        for name, value in options.items():
            setattr(config.data, name, value)
        data = open_data(config)
        about = config, data.embodiments, data.spec, data.names
        same = checkpoint.check_same_run(*about)
        checkpoint.write_run_files(*about)
        return same

    start = tmp_path / "first"
    shutil.copytree(FIXTURE, start)
    monkeypatch.chdir(start)
    assert resumes("run")
    written = json.loads((start / "run" / "config.json").read_text())
    assert written["data"]["root"] == "{run}/../data"
    shutil.move(start, tmp_path / "second")
    monkeypatch.chdir("/")
    moved = tmp_path / "second" / "run"
    assert resumes(moved)
    assert checkpoint.load_run(moved).config.data.root == str(tmp_path / "second" / "data")
    # The data alone are moved, and the command names their new place.
    shutil.move(tmp_path / "second" / "data", tmp_path / "data")
    assert resumes(moved, root=str(tmp_path / "data"), cache="")
    with pytest.raises(c.ConfigError, match=r"holds another run; its config.json differs.*\n.*mix"):
        resumes(moved, mix="fake=2.0")


def read_only(directory):
    for path in [directory, *directory.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)


def test_a_read_only_run_acts_and_its_evaluation_is_refused_in_one_line(tmp_path):
    from octolike import files
    from octolike.policy import Policy

    run = shutil.copytree(FIXTURE / "run", tmp_path / "run")
    read_only(run)
    assert Policy.load(run).step == 4
    with pytest.raises(c.ConfigError, match=r"evaluation.* cannot be written: .*run is read-only"):
        files.check_writable(run / "evaluation", "the evaluation's directory")


def test_a_run_without_its_data_names_the_missing_directory(tmp_path):
    from octolike.data import open_data
    from octolike.errors import DataError

    run = shutil.copytree(FIXTURE / "run", tmp_path / "copy" / "run")
    with pytest.raises((DataError, c.ConfigError), match=r"data\.root 'data'") as error:
        open_data(c.stored_config(run))
    assert "\n" not in str(error.value)
