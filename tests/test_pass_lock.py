"""One process makes an index, others wait for its file, and a dead one blocks none."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from octolike import files
from octolike.data.rlds import pass_lock, statistics
from octolike.data.rlds.pass_lock import make_once
from octolike.data.rlds.reader import Reader
from octolike.data.rlds.synthetic import write_fake_dataset
from octolike.data.specs.catalog import find_spec

PROGRAM = """
import sys, time
from pathlib import Path
from octolike.data.rlds.pass_lock import make_once

folder, number = Path(sys.argv[1]), sys.argv[2]
result = folder / "result"

def make():
    (folder / f"maker-{number}").touch()
    time.sleep(float(sys.argv[3]))
    result.write_text("the index")
    return "the index"

load = lambda: result.read_text() if result.exists() else None
print(make_once(f"{folder}/lock", load, make, "statistics"))
"""


def start(folder: Path, number: int, seconds: float) -> subprocess.Popen:
    arguments = [sys.executable, "-c", PROGRAM, str(folder), str(number), str(seconds)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_of_two_processes_one_makes_and_the_other_waits(tmp_path):
    processes = [start(tmp_path, i, 3) for i in range(2)]
    outputs = [p.communicate(timeout=60) for p in processes]
    assert [out for out, _ in outputs] == ["the index\n"] * 2
    assert len(list(tmp_path.glob("maker-*"))) == 1
    assert sum("waiting for its file" in err for _, err in outputs) <= 1
    assert not (tmp_path / "lock").exists()


def test_a_killed_process_blocks_nobody(tmp_path):
    first = start(tmp_path, 0, 1000)
    while not (tmp_path / "maker-0").exists():
        time.sleep(0.05)
    first.kill()
    first.wait()
    assert (tmp_path / "lock").exists()
    second = start(tmp_path, 1, 0)
    assert second.communicate(timeout=60)[0] == "the index\n"


def owner(**fields) -> str:
    values = {"host": socket.gethostname(), "pid": os.getpid(), "token": "x", "beat": 0}
    return json.dumps(values | fields)


def test_a_silent_owner_on_another_host_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(pass_lock, "INTERVAL", 0.05)
    monkeypatch.setattr(pass_lock, "POLL", 0.02)
    (tmp_path / "lock").write_text(owner(host="elsewhere", pid=1))
    begin = time.monotonic()
    assert make_once(f"{tmp_path}/lock", lambda: None, lambda: 3, "statistics") == 3
    assert time.monotonic() - begin >= 0.2


def test_a_living_owner_on_another_host_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(pass_lock, "INTERVAL", 1)
    monkeypatch.setattr(pass_lock, "POLL", 0.02)
    stored = []

    def live():
        for beat in range(20):
            files.write_text(tmp_path / "lock", owner(host="elsewhere", pid=1, beat=beat))
            time.sleep(0.05)
        stored.append("theirs")
        (tmp_path / "lock").unlink()

    thread = threading.Thread(target=live)
    thread.start()
    while not (tmp_path / "lock").exists():
        time.sleep(0.01)
    value = make_once(f"{tmp_path}/lock", lambda: next(iter(stored), None), lambda: "mine", "x")
    thread.join()
    assert value == "theirs"


@pytest.mark.parametrize("content", ["", "{}", "not JSON"])
def test_a_corrupted_lock_is_replaced(tmp_path, content):
    (tmp_path / "lock").write_text(content)
    assert make_once(f"{tmp_path}/lock", lambda: None, lambda: 3, "statistics") == 3
    assert not (tmp_path / "lock").exists()


def test_the_lock_is_removed_after_an_error(tmp_path):
    def fail():
        raise ValueError("a bad episode")

    with pytest.raises(ValueError, match="a bad episode"):
        make_once(f"{tmp_path}/lock", lambda: None, fail, "statistics")
    assert not (tmp_path / "lock").exists()


def test_two_openings_at_the_same_time_pass_once_over_the_records(tmp_path, monkeypatch):
    write_fake_dataset(tmp_path)
    passes, scan = [], statistics.scan_split
    monkeypatch.setattr(
        statistics, "scan_split", lambda *a: passes.append(1) or time.sleep(1) or scan(*a)
    )
    reader = Reader(find_spec("fake"), str(tmp_path), "train")
    results = []

    def open_index():
        results.append(statistics.index_episodes(reader, threads=1, cache="", drop_bad=False))

    threads = [threading.Thread(target=open_index) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(passes) == 1
    assert results[0].steps.tolist() == results[1].steps.tolist()
    assert [p.suffix for p in (tmp_path / "fake/1.0.0/.octolike").iterdir()] == [".npz"]
