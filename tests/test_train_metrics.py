"""metrics.jsonl, its truncation on resume, the lines and the bar."""

import json

import pytest

from octolike.train import metrics


def write(path, rows, tail=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


ROWS = [{"step": s, "seconds": 2.0 * s, "loss": 1.0 / s} for s in (2, 4, 6)]


def test_rows_past_the_resumed_step_are_dropped(tmp_path):
    path = tmp_path / metrics.FILE
    write(path, ROWS)
    assert metrics.truncate(path, 4) == 8.0
    assert metrics.read(path) == ROWS[:2]
    assert metrics.truncate(path, 0) == 0.0
    assert metrics.read(path) == []


def test_a_half_written_last_row_is_dropped_and_a_broken_one_inside_is_an_error(tmp_path):
    path = tmp_path / metrics.FILE
    write(path, ROWS, tail='{"step": 8, "lo')
    assert metrics.truncate(path, 100) == 12.0
    assert metrics.read(path) == ROWS
    write(path, ROWS[:1], tail='{"step": 3\n{"step": 4}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*metrics.jsonl is no JSON"):
        metrics.read(path)


def test_a_resumed_log_goes_on_in_rows_and_seconds(tmp_path, capsys):
    write(tmp_path / metrics.FILE, ROWS)
    with metrics.Metrics(tmp_path, step=4, steps=8, batch_size=10) as log:
        log.train(5, {"loss": 0.5}, waited=1e9, held=2**29)
        log.validation(5, {"bridge": {"action_error": 0.25}})
    rows = metrics.read(tmp_path / metrics.FILE)
    assert [row["step"] for row in rows] == [2, 4, 5, 5]
    assert rows[2]["seconds"] >= 8.0
    assert rows[2]["data_wait"] == 1.0
    assert rows[2]["data_memory_gib"] == 0.5
    assert 0.01 < rows[2]["memory_gib"] < 100
    assert rows[3]["validation/bridge/action_error"] == 0.25
    said = capsys.readouterr().out
    assert "step 5/8  loss 0.5000" in said
    assert "GiB (data 0.5)" in said
    assert "held-out bridge: action error 0.2500" in said
    assert "\r" not in said


def test_rates_leave_out_what_is_paused(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    with metrics.Metrics(tmp_path, step=0, steps=8, batch_size=10) as log:
        now[0] = 1.0
        with log.paused():
            now[0] = 100.0
        now[0] = 101.0
        log.train(4, {"loss": 0.5}, waited=0.5)
    (row,) = metrics.read(tmp_path / metrics.FILE)
    assert row["examples_per_second"] == pytest.approx(20.0)
    assert row["data_wait"] == pytest.approx(0.25)


def test_a_terminal_gets_a_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics.sys.stderr, "isatty", lambda: True, raising=False)
    with metrics.Metrics(tmp_path, step=0, steps=2, batch_size=10) as log:
        log.advance()
        log.train(1, {"loss": 0.5}, waited=0.0)
        log.advance()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "loss 0.5000" in shown.err
    assert "2/2" in shown.err


def test_means_are_weighted_and_start_again():
    means = metrics.Means()
    means.add({"a": 1.0, "b": 5.0})
    means.add({"a": 4.0}, weight=3)
    means.add({"c": 1.0}, weight=0)
    assert means.take() == {"a": 3.25, "b": 5.0}
    assert means.take() == {}


@pytest.mark.parametrize(("seconds", "words"), [(12.4, "12 s"), (600, "10 min"), (7200, "2.0 h")])
def test_durations_read_well(seconds, words):
    assert metrics.duration(seconds) == words
