"""A trace of some steps for TensorBoard or Perfetto: --config.train.profile=100:110."""

from __future__ import annotations

import jax

from octolike import files, types
from octolike.train.state import TrainState

DIRECTORY = "profile"  # in the run's directory


class ProfileHook:
    """Records the activity of host and devices between two steps, on the first process."""

    def __init__(self, steps: tuple[int, int], workdir: files.PathLike, first: int = 0) -> None:
        """steps: (start, stop); first: the number of steps done before this process."""
        self._start, self._stop = max(steps[0], first), steps[1]
        self._path = files.as_path(workdir) / DIRECTORY
        self._running = False

    def due(self, step: int) -> bool:
        """Return whether the trace starts or ends before this step."""
        return step == self._start < self._stop or (self._running and step == self._stop)

    def call(self, step: int, state: TrainState, batch: types.Batch) -> None:
        """Start or end the trace; the devices finish their work first."""
        jax.block_until_ready(state)
        if step == self._start:
            jax.profiler.start_trace(str(self._path))
            self._running = True
        else:
            self.close()

    def close(self) -> None:
        """End a trace that is still running, such as that of a run that ends before it."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            print(
                f"profiled steps {self._start} to {self._stop}: tensorboard --logdir {self._path}"
            )


def parse(text: str) -> tuple[int, int] | None:
    """Return (start, stop) of 'start:stop', None for ''."""
    if not text:
        return None
    start, stop = text.split(":")
    return int(start), int(stop)
