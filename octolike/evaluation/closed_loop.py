"""Success while training: a few quick episodes with the parameters of the moment.

The difficulty-weighted sampler (octolike.data.pipeline.sampling, measure "success") shows more of
what goes badly; validation error is one witness of that, doing it is another. `ClosedLoop` is what
the trainer asks: (parameters, step) -> {name: rate of success}, in worker processes, as software
rendering must not share a process with tensorflow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from octolike import types
from octolike.config import Config, ConfigError
from octolike.embodiment import Embodiment
from octolike.envs.pool import EnvPool, default_workers
from octolike.envs.registry import check_robot, environment_of, kind_of, simulator
from octolike.evaluation import rollouts, suites
from octolike.evaluation.evaluate import task_namer
from octolike.evaluation.success import count
from octolike.policy import Policy
from octolike.train.checkpoint import Run

DIRECTORY = "closed_loop"
FIRST_SEED = 2_000_000  # these tables decide what is trained on, so no evaluation may use them
SLOTS = 8


class ClosedLoop:
    """Measures success per skill; the simulator starts at the first call and stays.

    Each call runs `episodes` of every skill on seen tasks, the same tables every time, and keeps
    their rows in RUN/closed_loop/<step>: a resumed run reads what it has measured already.
    """

    def __init__(
        self,
        config: Config,
        embodiments: Sequence[Embodiment],
        spec: types.BatchSpec,
        names: types.Names,
        episodes: int = 8,
    ) -> None:
        """Prepare; ConfigError where no simulator, skill or single robot is named."""
        settings = config.evaluate
        skills = tuple(settings.skills) or tuple(config.collect.skills)
        kind = kind_of(config.environment)
        suite = suites.Suite(kind, "", ("train",), skills, episodes, FIRST_SEED)
        self._plan, self._config = suite.plan(), config
        self._run = Run(config, list(embodiments), spec, names, params={}, step=0)
        self._policy: Policy | None = None
        self._pool: EnvPool | None = None
        known = settings.embodiment in names.embodiments
        self._robot = settings.embodiment if known else None
        if len(embodiments) > 1 and not known:
            raise ConfigError(
                "success while training is of one robot, and this run has "
                f"{', '.join(names.embodiments)}; name it in evaluate.embodiment"
            )
        robot = self._robot or embodiments[0].name
        check_robot(config.environment, robot, config.collect.dataset)

    def __call__(self, params: Any, step: int) -> dict[str, float]:
        """Return rates of success by skill and by the run's own names of tasks.

        A name that data.sampling does not know is left aside there. Crashed episodes count for
        nothing; a skill of which all crashed is left out.
        """
        policy, pool = self._ready(params, step)
        directory = Path(self._config.workdir) / DIRECTORY / f"{step:08d}"
        results = rollouts.ResultsFile(directory, {"checkpoint": step})
        rollouts.run(
            policy,
            "trained",
            self._plan,
            pool,
            results,
            lambda row: None,
            self._config.evaluate.condition_on,
            simulator(kind_of(self._config.environment)).load("goal"),
            task_namer(self._config, policy),
        )
        return self._rates(results.rows, policy)

    def close(self) -> None:
        """End the simulator's processes."""
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
            make = rollouts.env_maker(self._policy, robot, settings.execute, settings.ensemble)
            self._pool = EnvPool(make, slots, settings.workers or default_workers(slots))
            rollouts.check_fit(self._policy, self._pool)
        self._policy = self._policy.with_params(params, step)
        return self._policy, self._pool

    def _rates(self, rows: Sequence[Mapping[str, Any]], policy: Policy) -> dict[str, float]:
        named: dict[str, list[Mapping[str, Any]]] = {}
        own = task_namer(self._config, policy)
        for row in rows:
            for name in {row["skill"], own(row)}:
                named.setdefault(name, []).append(row)
        rates = {name: count(mine) for name, mine in named.items()}
        return {name: r.rate for name, r in rates.items() if r.episodes}
