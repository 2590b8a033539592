"""Reads the metrics of each step one step late, so that the device never waits for the host."""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np

from octolike import types
from octolike.config import Config
from octolike.train import sharding
from octolike.train.checkpoint_store import CheckpointStore
from octolike.train.device_feeder import DeviceBatch, DeviceFeeder, save_bad_batch
from octolike.train.metrics import MetricsLogger, RunningMeans

MOST_NAMES = 50  # datasets or tasks with log entries of their own


class UnreadStep(NamedTuple):
    """A step that was dispatched; metrics: future of (numpy metrics, time when they were ready)."""

    step: int
    batch: DeviceBatch
    metrics: Future


class MetricsReader:
    """Reads steps in order: checks that their numbers are finite, and logs means over log_every.

    A context manager: it owns the thread that waits for the device.

    Attributes:
        signal: the signal of any of several processes, in the steps read so far; None for none.
    """

    def __init__(
        self,
        config: Config,
        names: types.Names,
        feeder: DeviceFeeder,
        checkpoints: CheckpointStore,
        log: MetricsLogger,
    ) -> None:
        self._config, self._feeder = config, feeder
        self._checkpoints, self._log = checkpoints, log
        self._datasets, self._tasks = logged_names(names.datasets), logged_names(names.tasks)
        self._unread: collections.deque[UnreadStep] = collections.deque()
        self.signal: int | None = None
        self._means, self._waited, self._last_loss = RunningMeans(), 0.0, math.nan
        self._thread = ThreadPoolExecutor(1)

    def __enter__(self) -> MetricsReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown()

    def submit(self, step: int, batch: DeviceBatch, metrics: Mapping[str, jax.Array]) -> None:
        """Start to read the metrics of a step that was just dispatched; do not wait."""
        batch = batch._replace(arrays={})  # else a third batch would stay on the devices
        self._unread.append(UnreadStep(step, batch, self._thread.submit(_to_host, metrics)))

    def read_previous(self, *, next_ready: float) -> None:
        """Read all steps but the newest; next_ready: time when the batch after them was ready."""
        while len(self._unread) > 1:
            self._read(self._unread.popleft(), next_ready)

    def read_all(self, *, next_ready: float) -> None:
        """Read all steps; next_ready: as in `read_previous`, 0 without a next batch."""
        while self._unread:
            self._read(self._unread.popleft(), next_ready)

    def _read(self, unread: UnreadStep, next_ready: float) -> None:
        self._checkpoints.check()
        metrics, finished = unread.metrics.result()
        self._waited += max(0.0, next_ready - finished)
        if sharding.SIGNAL in metrics:
            self.signal = self.signal or int(metrics.pop(sharding.SIGNAL)) or None
        scalars = {k: float(v) for k, v in metrics.items() if v.ndim == 0}
        self._check_finite(unread, scalars)
        self._means.add(scalars)
        self._add_per_name(metrics)
        self._log.advance()
        step, options = unread.step, self._config.train
        if step % options.log_every == 0 or step == options.steps:
            self._log.train(step, self._means.take(), self._waited, self._feeder.memory())
            self._waited = 0.0

    def _add_per_name(self, metrics: Mapping[str, np.ndarray]) -> None:
        """Add the losses and expert shares of each dataset and each task to the means."""
        losses = metrics["loss_per_example"]
        experts = metrics.get("experts_per_example", np.zeros((len(losses), 0)))
        columns = np.column_stack([losses, experts])
        for ids, names in (metrics["dataset"], self._datasets), (metrics["task"], self._tasks):
            if not names:
                continue
            # One pass for all names, since this thread dispatches the steps.
            is_member = ids[None, :] == np.arange(len(names))[:, None]
            counts = is_member.sum(axis=1)
            means = is_member @ columns / np.maximum(counts, 1)[:, None]
            shares = counts / len(ids)
            for name, count, share, row in zip(names, counts, shares, means, strict=True):
                if not name:  # examples without a task
                    continue
                self._means.add({f"share/{name}": share})
                if count:
                    values = {f"loss/{name}": row[0]}
                    values |= {f"expert_{e}/{name}": x for e, x in enumerate(row[1:])}
                    self._means.add(values, weight=count)

    def _check_finite(self, unread: UnreadStep, scalars: Mapping[str, float]) -> None:
        bad = [f"{k} is {v}" for k, v in scalars.items() if not math.isfinite(v)]
        if bad:
            steps = self._checkpoints.complete()
            saved = f"Checkpoint {steps[-1]} is intact" if steps else "No checkpoint was due yet"
            options, workdir = self._config.optim, self._config.workdir
            batch = save_bad_batch(unread.batch, workdir, unread.step)
            raise FloatingPointError(
                f"{', '.join(bad)} at step {unread.step}; the loss was {self._last_loss:.4g} at "
                f"the step before. {saved} in {workdir}. {batch} Common causes: a learning rate "
                f"that is too high (optim.learning_rate is {options.learning_rate:g}, warmup "
                f"{options.warmup}); no gradient clipping (optim.clip is {options.clip:g}); or "
                "non-finite values in the data"
            )
        self._last_loss = scalars["loss"]


def logged_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names that get log entries of their own: none for one name, or for too many."""
    # One name adds nothing to the total; hundreds belong in the report, not in the log.
    return names if 1 < len(names) <= MOST_NAMES else ()


def _to_host(metrics: Mapping[str, jax.Array]) -> tuple[dict[str, np.ndarray], float]:
    """Return the metrics as numpy arrays, and the time when the device had finished them."""
    values = jax.device_get(jax.block_until_ready(metrics))
    return {k: np.asarray(v) for k, v in values.items()}, time.perf_counter()
