"""A run directory has one owner: a second start is refused, a dead owner is replaced."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from train_fakes import FakeSource, Tiny, config

from octolike import owner_file
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
import select, sys
from octolike.train.lease import RunLease
from octolike.errors import RunError
print("ready", flush=True)
sys.stdin.readline()
try:
    with RunLease(sys.argv[1], 0.3) as lease:
        while not select.select([sys.stdin], [], [], 0.1)[0]:
            lease.check()
    print("owned", flush=True)
except RunError:
    print("refused", flush=True)
"""


def test_of_simultaneous_starts_one_owns_the_directory(tmp_path):
    command = [sys.executable, "-c", START, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    started = [subprocess.Popen(command, **pipes) for _ in range(3)]
    assert [process.stdout.readline() for process in started] == ["ready\n"] * 3
    for process in started:
        process.stdin.write("\n")
    end = time.monotonic() + 60
    while sum(p.poll() is None for p in started) > 1 and time.monotonic() < end:
        time.sleep(0.05)
    outputs = [p.communicate("\n" if p.poll() is None else None)[0] for p in started]
    results = sorted(output.splitlines()[-1] for output in outputs)
    assert results == ["owned", "refused", "refused"]


def test_another_process_is_refused_while_the_owner_lives(tmp_path):
    """A process of the same host, alive by its number."""
    command = [sys.executable, "-c", START, str(tmp_path)]
    with RunLease(tmp_path, INTERVAL) as lease:
        done = subprocess.run(command, input="\n", capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "refused"
        lease.check()


def test_an_owner_notices_that_it_was_replaced(tmp_path):
    with RunLease(tmp_path, INTERVAL) as lease:
        lease.check()
        write_owner(tmp_path)
        with pytest.raises(RunError, match="running process, 1 on elsewhere"):
            lease.check()
    assert owner(tmp_path)["token"] == "another"  # left alone


def test_an_owner_notices_that_its_run_was_removed(tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "config.json").touch()
    with RunLease(directory, INTERVAL) as lease:
        lease.check()
        shutil.rmtree(directory)
        (directory / "checkpoints").mkdir(parents=True)  # as orbax would make it again
        with pytest.raises(RunError, match="was removed or emptied while its run was training"):
            lease.check()


# The rules of a network file system, on a local one: other hosts, no locks, the two ways to create.


def lease_of(host, directory, monkeypatch):
    """Return a lease as another host of the file system would make it."""
    identity = {**owner_file._process(), "host": host, "machine": f"boot of {host}"}
    with monkeypatch.context() as patch:
        patch.setattr(owner_file, "_process", lambda: identity)
        return RunLease(directory, INTERVAL)


def no_hard_links(source, target):
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")


def lost_answer(source, target, link=os.link):
    """NFS repeats a request without an answer: the second one finds the file of the first."""
    link(source, target)
    raise FileExistsError(errno.EEXIST, "File exists")


def no_locks(*args):
    raise AssertionError("locks are not reliable on every file system")


@pytest.mark.parametrize("link", [os.link, no_hard_links, lost_answer], ids=lambda f: f.__name__)
def test_hosts_of_a_shared_file_system_agree_on_one_owner(link, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "link", link)
    for name in ("flock", "lockf"):
        monkeypatch.setattr(fcntl, name, no_locks)
    first = lease_of("a", tmp_path, monkeypatch)
    second = lease_of("b", tmp_path, monkeypatch)
    with first:
        assert owner(tmp_path)["host"] == "a"
        assert not capsys.readouterr().out  # the own file is not another owner's
        with pytest.raises(RunError, match=r"running process, \d+ on a;"):
            second.__enter__()
        first._file._stop.set()  # the machine is lost: no more beats
        first._file._thread.join()
        with second:
            assert owner(tmp_path)["host"] == "b"
            with pytest.raises(RunError, match=r"running process, \d+ on b;"):
                first.check()
    assert "its process has ended; taking over" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


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
