"""A run directory has one owner: a second start is refused, a dead owner is replaced."""

import json
import os
import subprocess
import sys

import pytest
from train_fakes import FakeSource, Tiny, config

from octolike.errors import RunError
from octolike.train import loop
from octolike.train.lease import FILE, RunLease

INTERVAL = 0.1


def owner(tmp_path):
    return json.loads((tmp_path / FILE).read_text())


def write_owner(tmp_path, **changes):
    values = {"host": "elsewhere", "pid": 1, "token": "another", "beat": 3} | changes
    (tmp_path / FILE).write_text(json.dumps(values))


def test_a_second_start_is_refused_and_the_first_keeps_the_directory(tmp_path):
    with RunLease(tmp_path, INTERVAL):
        first = owner(tmp_path)["token"]
        with pytest.raises(RunError, match=f"running process, {os.getpid()} on .*workdir"):
            RunLease(tmp_path, INTERVAL).__enter__()
        assert owner(tmp_path)["token"] == first
    assert not (tmp_path / FILE).exists()


def test_an_owner_that_stands_still_on_another_host_is_replaced(tmp_path, capsys):
    write_owner(tmp_path)
    with RunLease(tmp_path, INTERVAL):
        assert owner(tmp_path)["pid"] == os.getpid()
    assert "does not respond; taking over" in capsys.readouterr().out


def test_a_dead_process_of_this_host_is_replaced_at_once(tmp_path, capsys):
    code = "import os, socket; print(os.getpid(), socket.gethostname())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    pid, host = done.stdout.split()
    write_owner(tmp_path, host=host, pid=int(pid))
    with RunLease(tmp_path, INTERVAL):
        assert owner(tmp_path)["pid"] == os.getpid()
    assert not capsys.readouterr().out


def test_an_owner_notices_that_it_was_replaced(tmp_path):
    with RunLease(tmp_path, INTERVAL) as lease:
        lease.check()
        write_owner(tmp_path)
        with pytest.raises(RunError, match="running process, 1 on elsewhere"):
            lease.check()
    assert owner(tmp_path)["token"] == "another"  # left alone


@pytest.mark.parametrize("text", ["", "no JSON", "[]"])
def test_a_damaged_file_has_no_owner(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with RunLease(tmp_path, INTERVAL):
        assert owner(tmp_path)["pid"] == os.getpid()


def test_training_refuses_a_directory_in_use_and_writes_nothing(tmp_path):
    with RunLease(tmp_path, INTERVAL) as lease:
        before = sorted(tmp_path.iterdir())
        with pytest.raises(RunError, match="running process"):
            loop.train(config(tmp_path), FakeSource(), model=Tiny())
        assert sorted(tmp_path.iterdir()) == before
        lease.check()
