"""The training log: metrics.jsonl and its truncation on resume, lines, progress bar, W&B."""

import errno
import json
import sys
import types

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from octolike.config import Config, ConfigError
from octolike.errors import RunError
from octolike.train import device_flops, metrics, metrics_reader, wandb_logger
from octolike.types import Names


def write(path, rows, tail=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


ROWS = [{"step": s, "seconds": 2.0 * s, "loss": 1.0 / s} for s in (2, 4, 6)]


def test_rows_after_the_resumed_step_are_dropped(tmp_path):
    path = tmp_path / metrics.FILE
    write(path, ROWS)
    assert metrics.truncate(path, 4) == 8.0
    assert metrics.read(path) == ROWS[:2]
    assert metrics.truncate(path, 0) == 0.0
    assert metrics.read(path) == []


def test_a_truncated_last_row_is_dropped_and_a_corrupted_inner_row_is_an_error(tmp_path):
    path = tmp_path / metrics.FILE
    write(path, ROWS, tail='{"step": 8, "lo')
    assert metrics.truncate(path, 100) == 12.0
    assert metrics.read(path) == ROWS
    write(path, ROWS[:1], tail='{"step": 3\n{"step": 4}\n')
    with pytest.raises(RunError, match=r"line 2 of .*metrics.jsonl is not JSON"):
        metrics.read(path)


def test_a_resumed_log_continues_rows_and_seconds(tmp_path, capsys):
    write(tmp_path / metrics.FILE, ROWS)
    with metrics.MetricsLogger(tmp_path, step=4, steps=8, batch_size=10) as log:
        log.train(5, {"loss": 0.5}, waited=1e9, data_bytes=2**29)
        log.validation(5, {"bridge": {"action_error": 0.25}})
    rows = metrics.read(tmp_path / metrics.FILE)
    assert [row["step"] for row in rows] == [2, 4, 5, 5]
    assert rows[2]["seconds"] >= 8.0
    assert rows[2]["data_wait"] == 1.0
    assert rows[2]["data_memory_gib"] == 0.5
    assert 0.01 < rows[2]["memory_gib"] < 100
    assert rows[3]["validation/bridge/action_error"] == 0.25
    output = capsys.readouterr().out
    assert "step 5/8  loss 0.5000" in output
    assert "GiB (data 0.5)" in output
    assert "held-out bridge: action error 0.2500" in output
    assert "\r" not in output


def test_a_full_disk_is_named_with_its_remedy(tmp_path):
    def write(text):
        raise OSError(errno.ENOSPC, "No space left on device")

    def train():
        with metrics.MetricsLogger(tmp_path, step=0, steps=2, batch_size=1) as logger:
            logger._file.close()
            logger._file = types.SimpleNamespace(write=write, close=lambda: write(""))
            logger.train(1, {"loss": 1.0}, 0.0)

    message = rf"step 1 could not be written to {tmp_path}.*No space.*Remedy: free some space"
    with pytest.raises(OSError, match=message):
        train()


def test_rates_exclude_paused_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    with metrics.MetricsLogger(tmp_path, step=0, steps=8, batch_size=10) as log:
        now[0] = 1.0
        with log.paused():
            now[0] = 100.0
        now[0] = 101.0
        log.train(4, {"loss": 0.5}, waited=0.5)
    (row,) = metrics.read(tmp_path / metrics.FILE)
    assert row["examples_per_second"] == pytest.approx(20.0)
    assert row["data_wait"] == pytest.approx(0.25)


def test_a_terminal_gets_a_progress_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics.sys.stderr, "isatty", lambda: True, raising=False)
    with metrics.MetricsLogger(tmp_path, step=0, steps=2, batch_size=10) as log:
        log.advance()
        log.train(1, {"loss": 0.5}, waited=0.0)
        log.advance()
    output = capsys.readouterr()
    assert output.out == ""
    assert "loss 0.5000" in output.err
    assert "2/2" in output.err


def test_running_means_are_weighted_and_reset():
    means = metrics.RunningMeans()
    means.add({"a": 1.0, "b": 5.0})
    means.add({"a": 4.0}, weight=3)
    means.add({"c": 1.0}, weight=0)
    assert means.take() == {"a": 3.25, "b": 5.0}
    assert means.take() == {}


@pytest.mark.parametrize(("seconds", "words"), [(12.4, "12 s"), (600, "10 min"), (7200, "2.0 h")])
def test_durations_have_a_readable_unit(seconds, words):
    assert metrics.format_duration(seconds) == words


@pytest.mark.parametrize(
    ("peak", "words", "mfu"), [(1e12, "MFU 20.0%", 0.2), (None, "200 GFLOP/s", None)]
)
def test_device_throughput_is_logged(tmp_path, monkeypatch, capsys, peak, words, mfu):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    log = metrics.MetricsLogger(tmp_path, step=0, steps=8, batch_size=10, flops=1e11, peak=peak)
    with log:
        now[0] = 2.0
        log.train(4, {"loss": 0.5}, waited=0.5)
    (row,) = metrics.read(tmp_path / metrics.FILE)
    assert row["gflops_per_second"] == pytest.approx(200)
    assert row.get("mfu") == (mfu and pytest.approx(mfu))
    assert f"20 examples/s  {words}  data wait 25%" in capsys.readouterr().out


def test_throughput_is_omitted_if_the_operations_are_unknown(tmp_path, capsys):
    with metrics.MetricsLogger(tmp_path, step=0, steps=8, batch_size=10, peak=1e12) as log:
        log.train(4, {"loss": 0.5}, waited=0.0)
    assert "mfu" not in metrics.read(tmp_path / metrics.FILE)[0]
    assert "examples/s  data wait" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA RTX A6000", 155),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("NVIDIA H20", 148),
        ("NVIDIA GB200", 2500),
        ("NVIDIA B200", 2250),
        ("TPU7x", 1153.5),
    ],
)
def test_peak_flops_are_found_by_device_name(kind, tera):
    assert device_flops.peak_flops(kind) == tera * 1e12


@pytest.mark.parametrize("kind", ["cpu", "TPU v99", "NVIDIA H2000", "NVIDIA L400"])
def test_peak_flops_of_unknown_devices_are_none(kind):
    assert device_flops.peak_flops(kind) is None


def test_gradient_norms_of_modules_are_in_metrics_and_tensorboard(tmp_path):
    norms = {"grad_norm": 5.0, "grad_norm/heads_action": 3.0, "grad_norm/transformer": 4.0}
    with metrics.MetricsLogger(tmp_path, step=0, steps=8, batch_size=10) as log:
        log.train(4, {"loss": 0.5, **norms}, waited=0.0)
    (row,) = metrics.read(tmp_path / metrics.FILE)
    assert {k: row[k] for k in norms} == norms
    output = scalars(tmp_path / metrics.TENSORBOARD)
    assert {k: output[k] for k in norms} == {k: [(4, v)] for k, v in norms.items()}


def scalars(directory):
    """Return {name: [(step, value)]} of the event files in a directory."""
    values_by_name = {}
    for path in sorted(directory.glob("events.*")):
        data = path.read_bytes()
        while data:  # length (8 bytes), its checksum (4), the event, its checksum (4)
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            for value in event.summary.value:
                values_by_name.setdefault(value.tag, []).append((event.step, value.simple_value))
            data = data[16 + size :]
    return values_by_name


class FakePages:
    """A stand-in for the wandb package."""

    def __init__(self):
        self.pages, self.rows, self.finished = [], [], 0

    def module(self):
        module = types.ModuleType("wandb")
        module.init = lambda **how: self.pages.append(how) or self
        return module

    def log(self, values, step):
        self.rows.append((step, values))

    def finish(self):
        self.finished += 1


def test_a_resumed_run_uses_the_same_wandb_page(tmp_path, monkeypatch):
    fake = FakePages()
    monkeypatch.setitem(sys.modules, "wandb", fake.module())
    (tmp_path / "config.json").write_text('{"seed": 3}')
    for step in (2, 4):  # the second one is a resumed run
        how = {"steps": 8, "batch_size": 10, "wandb": "robots"}
        with metrics.MetricsLogger(tmp_path, step=step - 2, **how) as log:
            log.train(step, {"loss": 0.5}, waited=0.0)
            log.validation(step, {"bridge": {"loss": 0.25}})
    first, second = fake.pages
    assert first["id"] == second["id"]
    assert first["project"] == "robots"
    assert first["config"] == {"seed": 3}
    assert first["resume"] == "allow"
    assert [step for step, _ in fake.rows] == [2, 2, 4, 4]
    assert fake.rows[0][1]["loss"] == 0.5
    assert fake.rows[1][1] == {"validation/bridge/loss": 0.25}
    assert fake.finished == 2


def test_a_missing_wandb_package_is_an_error_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"'robots', but .*pip install wandb, or set"):
        wandb_logger.import_wandb("robots")


def test_metrics_per_name_equal_their_definition():
    rng = np.random.default_rng(0)
    names = Names(("a", "b", "never"), ("arm",), ("lift", "", "push"))
    reader = metrics_reader.MetricsReader(Config(workdir="unused"), names, None, None, None)
    values = {
        "dataset": rng.integers(0, 2, 50),
        "task": rng.integers(0, 3, 50),
        "loss_per_example": rng.random(50),
        "experts_per_example": rng.random((50, 2)),
    }
    reader._add_per_name(values)
    reader._add_per_name({k: v[:20] for k, v in values.items()})
    means = reader._means.take()
    assert "loss/never" not in means
    assert means["share/never"] == 0
    assert not any(key.endswith("/") for key in means)
    both = {k: np.concatenate([v, v[:20]]) for k, v in values.items()}
    for key, index, name in (("dataset", 1, "b"), ("task", 2, "push")):
        member = both[key] == index
        assert means[f"loss/{name}"] == pytest.approx(both["loss_per_example"][member].mean())
        expected = both["experts_per_example"][member, 1].mean()
        assert means[f"expert_1/{name}"] == pytest.approx(expected)
