"""CheckpointWatcher: loads newer checkpoints of a run while a server serves an older one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from octolike.errors import RunError
from octolike.files import PathLike, as_path
from octolike.policy.policy import Policy
from octolike.train.checkpoint import load_run
from octolike.train.checkpoint_store import CHECKPOINTS, checkpoint_steps


class CheckpointWatcher:
    """Looks for newer checkpoints of a run, and loads them on threads of their own."""

    def __init__(self, run_dir: PathLike, plugins: Sequence[str] = ()) -> None:
        self._directory, self._plugins = as_path(run_dir), tuple(plugins)
        self._failed: set[int] = set()

    def newer(self, policy: Policy) -> Policy | None:
        """Return the policy with the newest checkpoint's parameters; None if it has them.

        Raises ValueError or OSError for one that cannot be loaded; it is not tried again.
        """
        steps = [s for s in checkpoint_steps(self._directory / CHECKPOINTS) if s > policy.step]
        steps = [s for s in steps if s not in self._failed]
        if not steps:
            return None
        try:
            run = load_run(self._directory, steps[-1], self._plugins)
            if not all(np.isfinite(x).all() for x in jax.tree.leaves(run.params)):
                raise RunError(f"checkpoint {run.step} has parameters that are not finite")
            return policy.with_params(run.params, run.step)
        except Exception:
            self._failed.add(steps[-1])
            raise

    async def watch(
        self,
        seconds: float,
        current: Callable[[], Policy],
        replace: Callable[[Policy], Any],
        fail: Callable[[Exception], Any],
    ) -> None:
        """Call replace(policy) for a newer checkpoint, fail(error) for one that does not load."""
        while True:
            await asyncio.sleep(seconds)
            try:
                policy = await asyncio.to_thread(self.newer, current())
            except Exception as error:  # after any error, the present policy keeps serving
                fail(error)
                continue
            if policy is not None:
                replace(policy)
