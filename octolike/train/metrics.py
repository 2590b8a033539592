"""What training tells: a progress bar or lines, metrics.jsonl, TensorBoard, W&B where asked for.

metrics.jsonl has one JSON object per line: "step" and "seconds" (of training, over all resumes),
and numbers by name: those of training (loss, loss/<dataset>, grad_norm/<module>, learning_rate, …)
every `log_every` steps, and validation/<dataset>/<name> at each validation.

Beside the rate stands what it makes of the devices: gflops_per_second, the operations that the
compiler counts in a step over the time it took, waits included; and mfu, their share of the
devices' peak where that is known (octolike.train.device_flops). With rematerialisation the
compiler counts recomputed operations twice; it may not see those of hand-written kernels at all.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorboardX
from tqdm import tqdm

from octolike import files
from octolike.errors import RunError
from octolike.train import wandb_logger

FILE = "metrics.jsonl"
TENSORBOARD = "tensorboard"
UPLOAD_SECONDS = 60.0  # between uploads, if the run directory lies in a bucket


class Metrics:
    """The log of one run; a context manager. Rates are over the time since the previous row."""

    def __init__(
        self,
        workdir: files.PathLike,
        *,
        step: int,
        steps: int,
        batch_size: int,
        flops: float = math.nan,
        peak: float | None = None,
        wandb: str = "",
    ) -> None:
        """Open the log at a step: rows past it, of a run that was interrupted, are dropped.

        flops: operations of a step on all devices, NaN if not known; peak: theirs per second;
        wandb: project of Weights & Biases.
        """
        self._flops, self._peak = flops, peak
        self.steps, self.batch_size = steps, batch_size
        self._files, self._upload_time = files.Mirror(workdir), time.monotonic()
        for name in (FILE, wandb_logger.FILE, "config.json"):
            self._files.fetch(name)
        path = self._files.local / FILE
        self._before = truncate(path, step)
        self._file = path.open("a", encoding="utf-8")
        self._board = tensorboardX.SummaryWriter(
            str(self._files.local / TENSORBOARD), purge_step=step + 1 if step else None
        )
        self._start = self._row_time = time.perf_counter()
        self._row_step = step
        self._page = wandb_logger.Board(wandb, self._files.local) if wandb else None
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def seconds(self) -> float:
        """Seconds of training, those before a resume included."""
        return self._before + time.perf_counter() - self._start

    def advance(self) -> None:
        """Move the progress bar by one step."""
        if self._bar is not None:
            self._bar.update()

    def train(self, step: int, values: Mapping[str, float], waited: float, held: int = 0) -> None:
        """Log means over the steps since the last such row, and the seconds without a batch.

        held: bytes that the data hold, told beside the memory of the whole process.
        """
        now = time.perf_counter()
        passed, done = max(now - self._row_time, 1e-9), step - self._row_step
        rate = done * self.batch_size / passed
        self._row_time, self._row_step = now, step
        speed = {"examples_per_second": rate, "data_wait": min(waited / passed, 1.0)}
        use = self._use(done / passed)
        memory = {"memory_gib": resident() / 2**30, "data_memory_gib": held / 2**30}
        self._write(step, {**values, **speed, **use, **memory})
        used = "{memory_gib:.1f} GiB (data {data_memory_gib:.2g})".format(**memory)
        loss, wait = f"{values['loss']:.4f}", f"{speed['data_wait']:.0%}"
        rates = ", ".join(part for part in (f"{rate:.0f} examples/s", use_in_words(use)) if part)
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss}, {rates}, data wait {wait}, {used}")
            return
        left = (self.steps - step) * passed / max(done, 1)
        wide = len(str(self.steps))
        print(
            f"step {step:{wide}}/{self.steps}  loss {loss}  {rates.replace(', ', '  ')}  "
            f"data wait {wait}  {used}  {duration(left)} left",
            flush=True,
        )

    def validation(self, step: int, values: Mapping[str, Mapping[str, float]]) -> None:
        """Log {dataset: {name: number}} of a validation."""
        flat = {f"validation/{d}/{k}": v for d, row in values.items() for k, v in row.items()}
        self._write(step, flat)
        for dataset, row in values.items():
            numbers = "  ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in row.items())
            self.say(f"step {step}  held-out {dataset}: {numbers}")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what is done inside, saving and validating, out of the rates."""
        started = time.perf_counter()
        yield
        self._row_time += time.perf_counter() - started

    def say(self, text: str) -> None:
        """Print a line without breaking the progress bar."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Close bar and files; every row is on disk already."""
        if self._bar is not None:
            self._bar.close()
        self._file.close()
        self._board.close()
        if self._page is not None:
            self._page.close()
        self._files.upload()

    def _use(self, steps_per_second: float) -> dict[str, float]:
        """Return what is made of the devices, as far as it is known."""
        if not math.isfinite(self._flops):
            return {}
        achieved = self._flops * steps_per_second
        share = {"mfu": achieved / self._peak} if self._peak else {}
        return {"gflops_per_second": achieved / 1e9, **share}

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        row = {"step": step, "seconds": round(self.seconds, 3)}
        row.update({k: float(v) for k, v in values.items()})
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, float(value), step)
        if self._page is not None:
            self._page.write(step, {k: float(v) for k, v in values.items()})
        if time.monotonic() - self._upload_time > UPLOAD_SECONDS:
            self._files.upload()
            self._upload_time = time.monotonic()


class Silent(Metrics):
    """The log of a process that is not the first of several: it writes and says nothing."""

    def __init__(self, workdir: files.PathLike, *, step: int, **other: Any) -> None:
        """Take what a log takes."""
        self._before, self._start, self._row_time = 0.0, time.perf_counter(), 0.0

    def advance(self) -> None:
        """Do nothing."""

    def train(self, step: int, values: Mapping[str, float], waited: float, held: int = 0) -> None:
        """Do nothing."""

    def validation(self, step: int, values: Mapping[str, Mapping[str, float]]) -> None:
        """Do nothing."""

    def say(self, text: str) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class Means:
    """Running means by name, of numbers that may come at some steps only."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, values: Mapping[str, float], weight: float = 1.0) -> None:
        """Add numbers; a weight of 0 adds nothing."""
        for name, value in values.items():
            total, count = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = total + weight * float(value), count + weight

    def take(self) -> dict[str, float]:
        """Return the means and start again."""
        means = {k: total / count for k, (total, count) in self._sums.items() if count}
        self._sums.clear()
        return means


def truncate(path: files.PathLike, step: int) -> float:
    """Drop the rows of metrics.jsonl past `step`, and a half-written last one.

    Returns the seconds of training of the last row kept, 0 without one.
    """
    kept = [row for row in read(path) if row["step"] <= step]
    if files.as_path(path).exists():
        files.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    return kept[-1]["seconds"] if kept else 0.0


def read(path: files.PathLike) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl, without a half-written last one; none without a file."""
    path = files.as_path(path)
    if not path.exists():
        return []
    return list(_rows(path.read_text(encoding="utf-8").splitlines(), path))


def resident() -> int:
    """Return the memory of this process in bytes: now, or where that is not told, its peak."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def use_in_words(use: Mapping[str, float]) -> str:
    """Return the use of the devices for the progress line, '' where it is not known."""
    if "mfu" in use:
        return f"MFU {use['mfu']:.1%}"
    return f"{use['gflops_per_second']:.3g} GFLOP/s" if use else ""


def duration(seconds: float) -> str:
    """Return a duration in words: '45 s', '12 min', '3.2 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _rows(lines: list[str], path: files.PathLike) -> Iterable[dict[str, Any]]:
    for i, line in enumerate(lines):
        try:
            yield json.loads(line)
        except ValueError as error:
            if i + 1 < len(lines):
                raise RunError(f"line {i + 1} of {path} is no JSON: {line[:80]!r}") from error
