"""The training log: a progress bar or lines, metrics.jsonl, TensorBoard, optionally W&B.

metrics.jsonl has one JSON object per line: "step", "seconds" (of training, over all resumes), and
numbers by name: training metrics (loss, loss/<dataset>, grad_norm/<module>, learning_rate, …) every
`log_every` steps, and validation/<dataset>/<name> at each validation.

Device throughput: gflops_per_second is the compiler's count of operations in a step, divided by the
time of a step, waits included; mfu is its share of the devices' peak, if that is known
(octolike.train.device_flops). With rematerialisation the compiler counts recomputed operations
twice; it may not count hand-written kernels at all.
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

from octolike import files
from octolike.errors import RunError
from octolike.progress import LogLines, TerminalBar, progress
from octolike.train import wandb_logger

FILE = "metrics.jsonl"
TENSORBOARD = "tensorboard"
UPLOAD_SECONDS = 60.0  # between uploads, if the run directory lies in a bucket


class MetricsLogger:
    """The log of one run; a context manager. Rates cover the time since the previous row."""

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
        """Open the log, and drop the rows after `step` that an interrupted run has left.

        Args:
            workdir: the run directory.
            step: steps done so far.
            steps: final step.
            batch_size: examples per step.
            flops: operations of a step on all devices; NaN if unknown.
            peak: operations per second of all devices at best; None if unknown.
            wandb: project of Weights & Biases; "" for none.
        """
        self._flops, self._peak = flops, peak
        self.steps, self.batch_size = steps, batch_size
        self._files, self._upload_time = files.Mirror(workdir), time.monotonic()
        for name in (FILE, wandb_logger.FILE, "config.json"):
            self._files.fetch(name)
        path = self._files.local / FILE
        self._seconds_before = truncate(path, step)
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard = tensorboardX.SummaryWriter(
            str(self._files.local / TENSORBOARD), purge_step=step + 1 if step else None
        )
        self._start = self._row_time = time.perf_counter()
        self._row_step = step
        self._wandb = wandb_logger.WandbLogger(wandb, self._files.local) if wandb else None
        # A log file gets lines with loss and rates instead (`train`).
        self._bar: TerminalBar | LogLines | None = None
        if sys.stderr.isatty():
            self._bar = progress("training", total=steps, unit="steps", initial=step)

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
            return
        with contextlib.suppress(OSError):  # the first error stays the one that is reported
            self.close()

    @property
    def seconds(self) -> float:
        """Seconds of training, including those before a resume."""
        return self._seconds_before + time.perf_counter() - self._start

    def advance(self) -> None:
        """Advance the progress bar by one step."""
        if self._bar is not None:
            self._bar.update()

    def train(
        self, step: int, values: Mapping[str, float], waited: float, data_bytes: int = 0
    ) -> None:
        """Log training metrics.

        Args:
            step: steps done.
            values: means over the steps since the previous call.
            waited: seconds that the device waited for data in these steps.
            data_bytes: memory held by the data.
        """
        now = time.perf_counter()
        seconds, steps = max(now - self._row_time, 1e-9), step - self._row_step
        rate = steps * self.batch_size / seconds
        self._row_time, self._row_step = now, step
        speed = {"examples_per_second": rate, "data_wait": min(waited / seconds, 1.0)}
        throughput = self._throughput(steps / seconds)
        memory = {"memory_gib": resident_memory() / 2**30, "data_memory_gib": data_bytes / 2**30}
        self._write_row(step, {**values, **speed, **throughput, **memory})
        used = "{memory_gib:.1f} GiB (data {data_memory_gib:.2g})".format(**memory)
        loss, wait = f"{values['loss']:.4f}", f"{speed['data_wait']:.0%}"
        rates = [f"{rate:.0f} examples/s", *format_throughput(throughput)]
        if self._bar is not None:
            self._bar.note(", ".join([f"loss {loss}", *rates, f"data wait {wait}", used]))
            return
        left = (self.steps - step) * seconds / max(steps, 1)
        width = len(str(self.steps))
        fields = [f"step {step:{width}}/{self.steps}", f"loss {loss}", *rates]
        fields += [f"data wait {wait}", used, f"{format_duration(left)} left"]
        print("  ".join(fields), flush=True)

    def validation(self, step: int, values: Mapping[str, Mapping[str, float]]) -> None:
        """Log {dataset: {name: number}} of a validation."""
        flat = {f"validation/{d}/{k}": v for d, row in values.items() for k, v in row.items()}
        self._write_row(step, flat)
        for dataset, row in values.items():
            numbers = "  ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in row.items())
            self.write(f"step {step}  held-out {dataset}: {numbers}")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of the block, such as saving and validation, from the rates."""
        started = time.perf_counter()
        yield
        self._row_time += time.perf_counter() - started

    def write(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Close the progress bar and the files; every row is on disk already."""
        if self._bar is not None:
            self._bar.close()
        self._file.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.close()
        self._files.upload()

    def _throughput(self, steps_per_second: float) -> dict[str, float]:
        """Return {gflops_per_second, mfu}, as far as they are known."""
        if not math.isfinite(self._flops):
            return {}
        achieved = self._flops * steps_per_second
        mfu = {"mfu": achieved / self._peak} if self._peak else {}
        return {"gflops_per_second": achieved / 1e9, **mfu}

    def _write_row(self, step: int, values: Mapping[str, float]) -> None:
        row = {"step": step, "seconds": round(self.seconds, 3)}
        row.update({k: float(v) for k, v in values.items()})
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            for name, value in values.items():
                self._tensorboard.add_scalar(name, float(value), step)
        except OSError as error:
            raise OSError(
                f"the metrics of step {step} could not be written to {self._files.target}: "
                f"{files.cause(error)}. Remedy: {files.remedy(error) or 'repair the storage'}; "
                "then the same command resumes from the newest checkpoint"
            ) from error
        if self._wandb is not None:
            self._wandb.write(step, {k: float(v) for k, v in values.items()})
        if time.monotonic() - self._upload_time > UPLOAD_SECONDS:
            self._files.upload()
            self._upload_time = time.monotonic()


class SilentMetrics(MetricsLogger):
    """The log of a process that is not the first of several: it writes and prints nothing."""

    def __init__(self, workdir: files.PathLike, *, step: int, **options: Any) -> None:
        """Take the arguments of `MetricsLogger`."""
        self._seconds_before, self._start, self._row_time = 0.0, time.perf_counter(), 0.0

    def advance(self) -> None:
        """Do nothing."""

    def train(
        self, step: int, values: Mapping[str, float], waited: float, data_bytes: int = 0
    ) -> None:
        """Do nothing."""

    def validation(self, step: int, values: Mapping[str, Mapping[str, float]]) -> None:
        """Do nothing."""

    def write(self, text: str) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class RunningMeans:
    """Weighted means of named numbers; not every step needs to have every name."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, values: Mapping[str, float], weight: float = 1.0) -> None:
        """Add numbers; a weight of 0 adds nothing."""
        for name, value in values.items():
            total, count = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = total + weight * float(value), count + weight

    def take(self) -> dict[str, float]:
        """Return the means, and reset."""
        means = {k: total / count for k, (total, count) in self._sums.items() if count}
        self._sums.clear()
        return means


def truncate(path: files.PathLike, step: int) -> float:
    """Drop the rows of metrics.jsonl after `step`, and a truncated last one.

    Returns the seconds of training of the last remaining row, 0 without one.
    """
    rows = [row for row in read(path) if row["step"] <= step]
    if files.as_path(path).exists():
        files.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows[-1]["seconds"] if rows else 0.0


def read(path: files.PathLike) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl, without a truncated last one; [] without the file."""
    source = files.as_path(path)
    if not source.exists():
        return []
    if not files.is_regular(source):
        raise RunError(f"{source} is not a regular file; restore the file that was written there")
    return list(_parse_rows(source.read_text(encoding="utf-8").splitlines(), source))


def resident_memory() -> int:
    """Return the resident memory of this process in bytes; the peak if only that is known."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def format_throughput(throughput: Mapping[str, float]) -> list[str]:
    """Return the device throughput for the progress line; [] if it is unknown."""
    if "mfu" in throughput:
        return [f"MFU {throughput['mfu']:.1%}"]
    return [f"{throughput['gflops_per_second']:.3g} GFLOP/s"] if throughput else []


def format_duration(seconds: float) -> str:
    """Return a duration with its unit: '45 s', '12 min', '3.2 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _parse_rows(lines: list[str], path: files.PathLike) -> Iterable[dict[str, Any]]:
    for i, line in enumerate(lines):
        try:
            yield json.loads(line)
        except ValueError as error:
            if i + 1 < len(lines):
                raise RunError(f"line {i + 1} of {path} is not JSON: {line[:80]!r}") from error
