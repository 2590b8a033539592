"""A run directory has one owner: a second start is refused, a dead owner is replaced."""

import json
import os
import subprocess
import sys
import time

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
    assert "its process has ended; taking over" in capsys.readouterr().out


def test_a_dead_process_of_this_host_is_replaced_at_once(tmp_path, capsys):
    code = "import sys; from octolike.train.lease import RunLease; import os; "
    code += "RunLease(sys.argv[1]).__enter__(); os._exit(1)"
    subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    assert owner(tmp_path)["pid"] != os.getpid()
    with RunLease(tmp_path, INTERVAL):
        assert owner(tmp_path)["pid"] == os.getpid()
    assert not capsys.readouterr().out


def test_a_requeued_job_takes_over_its_earlier_start_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    write_owner(tmp_path, job="4711", restart="0")
    with RunLease(tmp_path, INTERVAL):
        assert owner(tmp_path)["restart"] == "1"
        assert not capsys.readouterr().out
        with pytest.raises(RunError, match="running process"):  # a second step of the same job
            RunLease(tmp_path, INTERVAL).__enter__()


def test_a_reused_process_number_is_a_dead_owner(tmp_path, capsys):
    with RunLease(tmp_path, INTERVAL):
        values = owner(tmp_path)
    for pid in (os.getpid(), os.getppid()):
        (tmp_path / FILE).write_text(json.dumps(values | {"pid": pid, "started": "1"}))
        with RunLease(tmp_path, INTERVAL):
            assert owner(tmp_path)["pid"] == os.getpid()
    assert not capsys.readouterr().out


START = """
import sys, time
from octolike.train.lease import RunLease
from octolike.errors import RunError
while time.time() < float(sys.argv[2]):
    pass
try:
    with RunLease(sys.argv[1], 0.3) as lease:
        for _ in range(20):
            time.sleep(0.1)
            lease.check()
    print("owned")
except RunError:
    print("refused")
"""


def test_of_simultaneous_starts_one_owns_the_directory(tmp_path):
    begin = str(time.time() + 8)  # all have imported by then
    command = [sys.executable, "-c", START, str(tmp_path), begin]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    results = [process.communicate(timeout=60)[0].splitlines()[-1] for process in started]
    assert sorted(results) == ["owned", "refused", "refused"]


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
