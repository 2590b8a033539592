"""Manifests: any flipped bit of any file of a run is noticed before the file is used."""

import contextlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import policy_fakes as fakes
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octolike import manifest
from octolike.errors import RunError
from octolike.policy import Policy
from octolike.train import checkpoint, checkpoint_manifest, run_manifest, verify

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "a"
    fakes.save_run(directory, fakes.run_of())
    return directory


@pytest.fixture
def directory(original, tmp_path) -> Path:
    return shutil.copytree(original, tmp_path / "a")


# Loading a policy checks only the files that it reads.
NOT_READ = ("checkpoints/7/optimizer/", "checkpoints/7/data/")


def flip(path: Path, seed: int) -> None:
    """Flip one random bit of a file."""
    data, rng = bytearray(path.read_bytes()), random.Random(seed)
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def files_of(directory: Path) -> list[str]:
    """Return the files that determine a policy's actions."""
    skipped = (*checkpoint_manifest.COMMIT_FILES, "versions.json")
    paths = [p for p in directory.rglob("*") if p.is_file() and p.stat().st_size]
    return sorted(str(p.relative_to(directory)) for p in paths if p.name not in skipped)


def test_a_flipped_bit_in_any_file_is_refused_by_load_and_named_by_verify(original, directory):
    names = files_of(original)
    assert len(names) > 8
    for name in names:
        for seed in range(3):
            flip(directory / name, seed)
            if name.startswith(NOT_READ):
                checkpoint.load_run(directory)
            elif name == "checkpoints/7/manifest.json":  # it may be the entry of one of those
                with contextlib.suppress(RunError):
                    checkpoint.load_run(directory)
            else:
                with pytest.raises((RunError, ValueError)) as error:
                    checkpoint.load_run(directory)
                assert "\n" not in str(error.value)
            faulty = [f for f in verify.verify_run(directory) if f.state == verify.FAULTY]
            assert faulty, name
            shutil.copy(original / name, directory / name)
    checkpoint.load_run(directory)
    assert not [f for f in verify.verify_run(directory) if f.state != verify.INTACT]


def test_the_policy_refuses_a_damaged_checkpoint_and_names_its_file(directory):
    folder = directory / "checkpoints" / "7"
    name = max(files_of(folder), key=lambda n: (folder / n).stat().st_size)
    flip(folder / name, 0)
    with pytest.raises(RunError, match=rf"checkpoint 7 of .* damaged: {name} has changed \(sha256"):
        Policy.load(directory)


def test_a_checkpoint_of_another_step_or_with_a_missing_file_is_refused(directory):
    folder = directory / "checkpoints"
    (folder / "7").rename(folder / "8")
    with pytest.raises(RunError, match="its manifest is of step 7, not 8"):
        checkpoint.load_run(directory)
    (folder / "8").rename(folder / "7")
    (folder / "7" / "params" / "manifest.ocdbt").unlink()
    with pytest.raises(RunError, match=r"params/manifest.ocdbt is missing"):
        checkpoint.load_run(directory)


def test_a_run_of_an_older_version_loads_with_one_line(directory, capsys):
    for path in directory.rglob("manifest.json"):
        path.unlink()
    checkpoint.load_run(directory)
    checkpoint.load_run(directory)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2, lines  # the run's files, and its checkpoints
    assert all("written by an older version" in line for line in lines)
    states = {f.part: f.state for f in verify.verify_run(directory)}
    assert states["run files"] == states["checkpoint 7"] == verify.UNVERIFIED


def test_an_edit_is_accepted_by_name(directory):
    path = directory / "embodiments.json"
    path.write_text(path.read_text().replace('"simulated"', '"another"'))
    with pytest.raises(RunError, match=r"embodiments.json has .* octolike verify .*/a --accept"):
        checkpoint.load_run(directory)
    command = [sys.executable, ROOT / "scripts" / "verify.py", directory]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stderr) == (1, "")
    assert "FAULTY" in refused.stdout
    command.append("--accept")
    accepted = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "accepted: embodiments.json" in accepted.stdout
    assert checkpoint.load_run(directory).embodiments[0].robot == "another"


@pytest.mark.parametrize("written", range(6))
def test_a_kill_while_the_run_files_are_written_again_leaves_a_run_that_loads(
    directory, monkeypatch, written
):
    """The n-th write is the last one."""
    run, count, write = checkpoint.load_run(directory), [0], manifest.files.write_text

    def write_some(path, text):
        count[0] += 1
        if count[0] > written:
            raise KeyboardInterrupt
        write(path, text)

    monkeypatch.setattr(manifest.files, "write_text", write_some)
    run.config.workdir, run.config.evaluate.episodes = str(directory), 77
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_run_files(run.config, run.embodiments, run.spec, run.names)
    assert checkpoint.load_run(directory).config.evaluate.episodes in (20, 77)


def test_spec_files_are_compared_with_those_of_training(directory, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("DATASETS = []\n")
    run_manifest.write_with(manifest.files.as_path(directory), {}, [str(path)])
    assert not run_manifest.changed_specs(directory, [str(path)])
    path.write_text("DATASETS = [1]\n")
    assert "has changed since" in run_manifest.changed_specs(directory, [str(path)])[0]
    assert "is missing" in run_manifest.changed_specs(directory, ["/nowhere/mine.py"])[0]


NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
ENTRIES = st.builds(lambda b: manifest.entry_of(b), st.binary(max_size=40))


@given(st.dictionaries(NAMES, st.lists(ENTRIES, min_size=1, max_size=2), max_size=4), st.integers())
def test_a_manifest_is_read_as_it_was_written_or_refused(tmp_path_factory, entries, step):
    folder = tmp_path_factory.mktemp("m")
    written = manifest.Manifest({"step": step}, {k: tuple(v) for k, v in entries.items()})
    manifest.write(folder, written)
    try:
        stored = manifest.parse((folder / manifest.NAME).read_bytes())
    except ValueError:
        assert any(".." in n.split("/") or n[0] == "/" or "\\" in n or "\0" in n for n in entries)
        return
    assert stored.about == written.about
    assert stored.entries == written.entries


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3),
    max_leaves=12,
)


@given(st.binary(max_size=80) | JSON.map(lambda x: json.dumps(x).encode()))
def test_any_other_content_is_one_line(content):
    with pytest.raises(ValueError) as error:
        manifest.parse(content)
    assert "\n" not in str(error.value)[:1]


@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"a":' * 100_000])
def test_deep_nesting_is_one_line(data):
    with pytest.raises(ValueError, match="nested too deeply"):
        manifest.parse(data)


def test_a_hash_is_that_of_the_whole_file(tmp_path):
    content = np.random.default_rng(0).bytes(3 * manifest.BLOCK + 5)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "y").write_bytes(content)
    assert manifest.list_files(tmp_path) == ["x/y"]
    assert manifest.hash_files(tmp_path, ["x/y"]) == {"x/y": manifest.entry_of(content)}
