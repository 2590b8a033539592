"""Progress: a bar on a terminal, plain lines at intervals in a log."""

import io
import subprocess
import sys

import pytest

from octolike import progress as module
from octolike.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves: seconds in `clock[0]`."""
    seconds = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: seconds[0])
    return seconds


def test_a_log_gets_a_line_every_tenth_of_the_total(clock):
    log = io.StringIO()
    with progress("demonstrations", total=100, unit="episodes", file=log) as bar:
        for _ in range(100):
            clock[0] += 0.5
            bar.update()
    lines = log.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0] == "demonstrations: 10/100 episodes (10 %), 2 episodes/s, 0:00:45 left"
    assert lines[-1] == "demonstrations: 100/100 episodes (100 %), 2 episodes/s, 0:00:00 left"
    assert "\r" not in log.getvalue()


def test_a_log_gets_a_line_every_ten_seconds_with_the_latest_note(clock):
    log = io.StringIO()
    with progress("filming", total=1000, unit="episodes", initial=500, file=log) as bar:
        for i in range(50):
            clock[0] += 1
            bar.note(f"{i} done")
            bar.update()
    lines = log.getvalue().splitlines()
    assert len(lines) == 5
    # items of an earlier run do not enter the rate
    assert lines[0] == "filming: 510/1000 episodes (51 %), 1 episodes/s, 0:08:10 left, 9 done"


def test_an_unknown_total_has_no_share_and_no_time_left(clock):
    log = io.StringIO()
    with progress("reading", unit="records", file=log) as bar:
        clock[0] += 2
        bar.update(5)
    bar.close()  # a second time
    assert log.getvalue() == "reading: 5 records, 2.5 records/s\n"


def test_nothing_to_do_prints_nothing():
    for file in (io.StringIO(), Terminal()):
        with progress("shards", total=3, initial=3, file=file):
            pass
        assert file.getvalue() == ""


def test_a_terminal_gets_a_bar():
    terminal = Terminal()
    with progress("demonstrations", total=4, unit="episodes", file=terminal) as bar:
        bar.note("two failed")
        bar.update(4)
    assert "\r" in terminal.getvalue()
    assert "demonstrations: 100%" in terminal.getvalue()
    assert "two failed" in terminal.getvalue()


@pytest.mark.parametrize("file", [io.StringIO, Terminal])
def test_text_goes_to_stdout(file, capsys):
    with progress("demonstrations", total=2, file=file()) as bar:
        bar.write("one line")
    assert capsys.readouterr().out == "one line\n"


def test_a_log_needs_no_tqdm():
    code = (
        "import sys; from octolike.progress import progress\n"
        "with progress('x', total=1) as bar: bar.update()\n"
        "print('tqdm' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"
    assert run.stderr.startswith("x: 1/1 steps (100 %)")
