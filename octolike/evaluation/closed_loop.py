"""Success during training: a few quick episodes with the current parameters.

The difficulty-weighted sampler (octolike.data.pipeline.sampling, measure "success") draws more
examples of tasks with a low success rate. The trainer calls `ClosedLoop`: (parameters, step) ->
{name: success rate}. Episodes run in worker processes, as software rendering must not share a
process with tensorflow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from octolike import files, types
from octolike.config import Config, ConfigError
from octolike.embodiment import Embodiment
from octolike.envs.pool import EnvPool, default_workers
from octolike.envs.registry import check_robot, environment_of, kind_of
from octolike.evaluation import rollouts, suites
from octolike.evaluation.results_file import ResultsFile
from octolike.evaluation.success import success_rate
from octolike.policy import Policy
from octolike.train.checkpoint import Run

DIRECTORY = "closed_loop"
FIRST_SEED = 2_000_000  # these scenes influence training, so no evaluation may use them
SLOTS = 8


class ClosedLoop:
    """Measures success per skill; the simulator starts at the first call and keeps running.

    Each call runs `episodes` of every skill on seen tasks, always in the same scenes, and writes
    their rows to RUN/closed_loop/<step>: a resumed run reads the rows that exist.
    """

    def __init__(
        self,
        config: Config,
        embodiments: Sequence[Embodiment],
        spec: types.BatchSpec,
        names: types.Names,
        episodes: int = 8,
    ) -> None:
        """Plan the episodes; ConfigError without a simulator, a skill or a single robot."""
        settings = config.evaluate
        skills = tuple(settings.skills) or tuple(config.collect.skills)
        kind = kind_of(config.environment)
        suite = suites.Suite(kind, "", ("train",), skills, episodes, FIRST_SEED)
        self._plan, self._config = suite.plan(), config
        self._directory = files.output_directory(config.workdir, "config.workdir") / DIRECTORY
        self._run = Run(config, list(embodiments), spec, names, params={}, step=0)
        self._policy: Policy | None = None
        self._pool: EnvPool | None = None
        is_robot = settings.embodiment in names.embodiments
        self._robot = settings.embodiment if is_robot else None
        if len(embodiments) > 1 and not is_robot:
            raise ConfigError(
                "success during training is measured with one robot, and this run has "
                f"{', '.join(names.embodiments)}; choose one in evaluate.embodiment"
            )
        robot = self._robot or embodiments[0].name
        check_robot(config.environment, robot, config.collect.dataset)

    def __call__(self, params: Any, step: int) -> dict[str, float]:
        """Return success rates by skill and by the run's names of tasks.

        The sampler ignores names that it does not know. Crashed episodes are not counted; a skill
        is omitted if all its episodes crashed.
        """
        policy, pool = self._ready(params, step)
        directory = self._directory / f"{step:08d}"
        results = ResultsFile(directory, {"checkpoint": step})
        rollouts.run_episodes(
            policy,
            "trained",
            self._plan,
            pool,
            results,
            lambda row: None,
            rollouts.RolloutSettings.from_run(self._config, policy),
        )
        return self._rates(results.rows, policy)

    def close(self) -> None:
        """Stop the simulator's processes."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _ready(self, params: Any, step: int) -> tuple[Policy, EnvPool]:
        if self._policy is None:
            run = dataclasses.replace(self._run, params=params)
            self._policy = Policy(run, self._robot, min(SLOTS, len(self._plan)))
        if self._pool is None:
            settings, slots = self._config.evaluate, self._policy.batch_size
            robot = environment_of(self._config.environment, self._policy.embodiment.name)
            make = rollouts.env_maker(self._policy, robot)
            self._pool = EnvPool(make, slots, settings.workers or default_workers(slots))
            rollouts.check_fit(self._policy, self._pool)
        self._policy = self._policy.with_params(params, step)
        return self._policy, self._pool

    def _rates(self, rows: Sequence[Mapping[str, Any]], policy: Policy) -> dict[str, float]:
        rows_of: dict[str, list[Mapping[str, Any]]] = {}
        task_name = rollouts.task_name_function(self._config, policy)
        for row in rows:
            for name in {row["skill"], task_name(row)}:
                rows_of.setdefault(name, []).append(row)
        rates = {name: success_rate(named_rows) for name, named_rows in rows_of.items()}
        return {name: r.rate for name, r in rates.items() if r.episodes}
