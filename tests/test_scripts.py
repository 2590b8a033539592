"""What scripts hand on to what they start, and how they end where something is missing."""

import importlib.util
import subprocess
import sys
import types
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def load():
    """Return what imports a script by its name, once: absl's flags can be defined only once."""
    loaded = {}

    def script(name):
        if name not in loaded:
            spec = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS / f"{name}.py")
            loaded[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded[name])
        return loaded[name]

    return script


def started(script, monkeypatch, code=0):
    """Return a list of the commands that a script starts: [script, argument, …]; none is run."""
    commands = []

    def note(command, check):
        commands.append([Path(command[1]).name, *map(str, command[2:])])
        if code:
            raise subprocess.CalledProcessError(code, command)

    fake = types.SimpleNamespace(run=note, CalledProcessError=subprocess.CalledProcessError)
    monkeypatch.setattr(script, "subprocess", fake)
    return commands


def run(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    script.main()


def test_a_transfer_study_reads_all_of_its_data_where_it_is_told_to(load, monkeypatch):
    from octolike.data import excerpts
    from octolike.evaluation.transfer import after, before, study

    roots = []
    monkeypatch.setattr(excerpts, "of_mix", lambda data, **_: roots.append(data.root))
    for module, name in (
        (before, "samples"),
        (study, "compare"),
        (after, "measure_errors"),
        (after, "demonstrations"),
    ):
        monkeypatch.setattr(module, name, lambda *_: None)
    monkeypatch.setattr(study, "write_report", lambda *_: None)
    monkeypatch.setattr(study.report, "summary", lambda _: [])
    script = load("transfer")
    commands = started(script, monkeypatch)
    arguments = ("--config", "configs/transfer.py:debug", "--seeds", "1")
    run(script, monkeypatch, *arguments, "--root", "elsewhere")
    assert roots == ["elsewhere", "elsewhere"]
    assert {c[0] for c in commands} == {"collect.py", "train.py", "evaluate.py"}
    for name, *flags in commands:
        assert (flags[1:] == ["--config.data.root=elsewhere"]) == (name != "evaluate.py")
    commands.clear()
    run(script, monkeypatch, *arguments)
    assert roots[2] != "elsewhere"
    assert all(len(command) == 2 for command in commands)
