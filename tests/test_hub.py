"""Push and pull of runs: a directory, and a local stand-in for the hub with the real signatures."""

import inspect
import json
import os
import shutil
import types

import numpy as np
import pytest
from policy_fakes import SIDE, P, run_of, save_run

from octolike.errors import ConfigError, RunError
from octolike.hub import transfer
from octolike.hub.card import model_card
from octolike.hub.transfer import parse_location, pull, push
from octolike.policy import Policy
from octolike.train.verify import FAULTY, verify_run

RATES = {"successes": 7, "episodes": 10, "crashed": 0, "rate": 0.7, "low": 0.4, "high": 0.89}
REPORT = {
    "headline": "It succeeds in 7 of 10 episodes.",
    "setup": {},
    "success": {"trained": {"train": {"lift": RATES}}},
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "run"
    save_run(directory, run_of())
    (directory / "evaluation").mkdir()
    (directory / "evaluation" / "report.json").write_text(json.dumps(REPORT))
    return directory


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub in a directory: each commit is a folder. Every call must fit the real HfApi."""
    HfApi = pytest.importorskip("huggingface_hub").HfApi

    class LocalHub:
        root, commits, private = tmp_path / "hub", [], {}

        def __getattribute__(self, name):
            method = object.__getattribute__(self, name)
            if not inspect.ismethod(method):
                return method

            def checked(*args, **kwargs):
                inspect.signature(getattr(HfApi, name)).bind(None, *args, **kwargs)
                return method(*args, **kwargs)

            return checked

        def create_repo(self, repo_id, *, repo_type, private, exist_ok):
            assert exist_ok
            self.private[repo_id] = private

        def upload_folder(
            self, *, repo_id, repo_type, folder_path, commit_message, delete_patterns
        ):
            oid = f"{len(self.commits) + 1:040x}"
            shutil.copytree(folder_path, self.root / oid)
            (self.root / oid / ".gitattributes").write_text("the hub's own")
            self.commits.append(oid)
            return types.SimpleNamespace(oid=oid)

        def model_info(self, repo_id, *, revision):
            if revision and revision not in self.commits:
                raise ValueError(f"404: revision {revision}")
            return types.SimpleNamespace(sha=revision or self.commits[-1])

        def snapshot_download(self, repo_id, *, repo_type, revision, local_dir):
            shutil.copytree(self.root / revision, local_dir, dirs_exist_ok=True)

    hub = LocalHub()
    monkeypatch.setattr(transfer, "hub_api", lambda: hub)
    return hub


def act(directory):
    policy = Policy.load(directory)
    inputs = {"image_primary": np.full((SIDE, SIDE, 3), 9, np.uint8), "proprio": np.ones(P)}
    return policy.sample_actions(inputs, policy.create_task(instruction="lift"), seed=1)


def test_a_pulled_run_acts_as_the_pushed_one(run_dir, hub, tmp_path):
    for name, target in (("a", str(tmp_path / "shelf")), ("b", "hf://someone/arm")):
        pinned = push(run_dir, target)
        assert pinned.startswith(f"{target}@")
        assert pull(pinned, tmp_path / name) == pinned
        np.testing.assert_array_equal(act(tmp_path / name), act(run_dir))
        assert json.loads((tmp_path / name / "origin.json").read_text()) == {"pulled_from": pinned}
        assert not [f for f in verify_run(tmp_path / name) if f.state == FAULTY]
        inside = {p.name for p in (tmp_path / name / "checkpoints" / "7").iterdir()}
        assert "params" in inside
        assert not inside & {"optimizer", "data"}
        again = pull(target, tmp_path / f"{name}2")  # the newest
        assert again == pinned
    assert hub.private == {"someone/arm": True}
    complete = push(run_dir, str(tmp_path / "whole"), 7, with_optimizer=True)
    assert (tmp_path / "whole" / "checkpoints" / "7" / "optimizer").is_dir()
    assert complete.partition("@")[2] != pinned.partition("@")[2]


def test_a_pushed_run_can_be_pushed_on(run_dir, tmp_path):
    pull(push(run_dir, str(tmp_path / "a")), tmp_path / "b")
    pull(push(tmp_path / "b", str(tmp_path / "c")), tmp_path / "d")
    np.testing.assert_array_equal(act(tmp_path / "d"), act(run_dir))


def test_an_older_revision_stays_available_and_an_unknown_one_is_an_error(run_dir, hub, tmp_path):
    first = push(run_dir, "hf://someone/arm")
    second = push(run_dir, "hf://someone/arm", license="mit")
    assert first != second
    pull(first, tmp_path / "a")
    assert "license" not in (tmp_path / "a" / "README.md").read_text()
    pull(second, tmp_path / "b")
    assert "license: mit" in (tmp_path / "b" / "README.md").read_text()
    with pytest.raises(RunError, match="404: revision"):
        pull("hf://someone/arm@abc", tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_changed_content_is_refused_and_leaves_nothing(run_dir, tmp_path):
    shelf = tmp_path / "shelf"
    pinned = push(run_dir, str(shelf))
    record = shelf / "embodiments.json"
    text = record.read_text()
    record.write_text(text.replace('"m"', '"mm"'))
    with pytest.raises(RunError, match="its content has changed"):
        pull(pinned, tmp_path / "a")
    with pytest.raises(ConfigError, match="a revision needs at least 12 characters"):
        pull(pinned[: pinned.index("@") + 4], tmp_path / "a")
    with pytest.raises(RunError, match=r"embodiments\.json has"):  # its manifest, without a pin
        pull(str(shelf), tmp_path / "a")
    record.write_text(text)
    largest = max((shelf / "checkpoints").rglob("*"), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    with pytest.raises(RunError, match="files are damaged"):
        pull(str(shelf), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.raises(RunError, match="files are damaged"):  # nor is it pushed on
        push(shelf, str(tmp_path / "b"))
    assert not (tmp_path / "b").exists()


def test_bad_places_are_one_line(run_dir, hub, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="hf://OWNER/NAME"):
        push(run_dir, "hf://nobody")
    with pytest.raises(ConfigError, match="a push makes a new one"):
        push(run_dir, "hf://a/b@main")
    with pytest.raises(ConfigError, match="not empty"):
        push(run_dir, str(run_dir))
    with pytest.raises(ConfigError, match="neither a local path nor a URI"):
        push(run_dir, "http://host/run")
    with pytest.raises(FileNotFoundError, match="is not a run"):
        push(tmp_path, str(tmp_path / "a"))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 5; it has \[7\]"):
        push(run_dir, str(tmp_path / "a"), 5)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        pull(str(tmp_path / "none"), tmp_path / "a")
    with pytest.raises(ConfigError, match="not empty"):
        pull(str(run_dir), run_dir)

    def refuse(*_, **__):
        raise OSError("401 Unauthorized")

    def refuse_scheme(*_):
        raise NotImplementedError("s3")  # as tensorflow does

    monkeypatch.setattr(transfer, "_copy_out", refuse_scheme)
    with pytest.raises(RunError, match=r"s3://a/b cannot be opened: NotImplementedError: s3"):
        push(run_dir, "s3://a/b")
    hub.create_repo = refuse
    with pytest.raises(RunError, match=r"401 Unauthorized\. Log in with: hf auth login"):
        push(run_dir, "hf://someone/arm")


def test_locations_are_read():
    assert parse_location("hf://a/b@c1") == ("a/b", True, "c1")
    assert parse_location("hf://a/b") == ("a/b", True, "")
    assert parse_location("gs://b/run@ff") == ("gs://b/run", False, "ff")
    assert parse_location("/media/me@home/run") == ("/media/me@home/run", False, "")


def test_the_card_states_data_conventions_and_success(run_dir):
    from octolike import files

    card = model_card(files.as_path(run_dir), 7, "hf://someone/arm", "mit")
    for text in (
        "| datasets | data |",
        "simulated at 5 actions per second. Gripper: 1 = open.",
        "| x | m | change | 1 to 1 |",
        "| gripper | m | target | 0 to 1 |",
        "| image_primary | RGB, 16 x 16 pixels |",
        "| the task is given by | instructions |",
        "| trained | seen tasks | lift | 70% [40%, 89%] | 7/10 |\n\nThis is one training run: ",
        "Another training seed of the same recipe can differ by more",
        "octolike pull hf://someone/arm@REVISION",
    ):
        assert text in card, text
    data = pytest.importorskip("huggingface_hub").ModelCard(card).data
    assert (data.license, data.library_name, data.datasets) == ("mit", "octolike", ["data"])
    assert "robot:arm" in data.tags


def test_a_run_without_an_evaluation_says_so(run_dir, tmp_path):
    from octolike import files

    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "evaluation")
    assert "Not evaluated in closed loop" in model_card(files.as_path(copy), 7, "x")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("names.json", "{}"),
        ("names.json", "[1]"),
        ("config.json", '{"data": 3}'),
        ("embodiments.json", "[3]"),
        ("costs.json", "[]"),
        ("versions.json", "3"),
        ("evaluation/report.json", '{"success": []}'),
    ],
)
def test_a_card_of_malformed_files_is_one_line(run_dir, tmp_path, name, text):
    from octolike import files

    copy = shutil.copytree(run_dir, tmp_path / "run")
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text(text)
    with pytest.raises(RunError, match=r"\A[^\n]*malformed[^\n]*\Z"):
        model_card(files.as_path(copy), 7, "x")


def test_a_link_out_of_the_source_is_not_pulled(run_dir, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    source = shutil.copytree(run_dir, tmp_path / "source")
    (source / "parameters.txt").unlink(missing_ok=True)
    (source / "parameters.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(RunError, match=r"'parameters.txt' is not a file below .*: a link"):
        pull(str(source), tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


@pytest.mark.parametrize("name", ["README.md", "scores.json", "tokenizer/tokenizer.json"])
def test_a_pipe_is_neither_pulled_nor_pushed(run_dir, tmp_path, name):
    source = shutil.copytree(run_dir, tmp_path / "source")
    (source / name).unlink(missing_ok=True)
    (source / name).parent.mkdir(exist_ok=True)
    os.mkfifo(source / name)
    with pytest.raises(RunError, match="is not a regular file"):
        pull(str(source), tmp_path / "pulled")
    if name == "scores.json":  # a push writes the card, and takes a tokenizer that training wrote
        with pytest.raises(RunError, match="is not a regular file"):
            push(source, str(tmp_path / "pushed"))


def test_a_push_takes_only_files_that_training_wrote(run_dir, tmp_path):
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "key").write_text("secret")
    source = shutil.copytree(run_dir, tmp_path / "source")
    (source / "plugins").symlink_to(tmp_path / "secrets")
    (source / "checkpoints" / "7" / "extra").symlink_to(tmp_path / "secrets" / "key")
    push(source, str(tmp_path / "pushed"))
    assert not [p for p in (tmp_path / "pushed").rglob("*") if p.name in ("key", "extra")]


def test_a_config_that_is_nested_too_deeply_is_one_line(run_dir, tmp_path):
    source = shutil.copytree(run_dir, tmp_path / "source")
    (source / "config.json").write_text("[" * 100_000)
    with pytest.raises(RunError, match=r"config\.json cannot be read as JSON"):
        pull(str(source), tmp_path / "pulled")
