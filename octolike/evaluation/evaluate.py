"""Evaluate a run: load it, run episodes, render videos, and write the report."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from octolike import files
from octolike.config import ConfigError, stored_config
from octolike.config import plugins as plug_ins
from octolike.envs.pool import EnvPool, default_workers
from octolike.envs.registry import check_robot, environment_of, kind_of, simulator
from octolike.evaluation import caveats, report, rollouts, success_tables, suites
from octolike.evaluation.caveats import Demonstrated
from octolike.evaluation.demonstrated_episode import DemonstratedEpisode
from octolike.evaluation.figures import ChunkComparison, VideoClip, duration
from octolike.evaluation.report import LearningCurves, ReportContent
from octolike.evaluation.results_file import ResultsFile, planned_episode
from octolike.evaluation.success import ResultRow, success_rate
from octolike.evaluation.suites import EpisodePlan
from octolike.policy import Policy
from octolike.progress import progress
from octolike.train import checkpoint, metrics
from octolike.train.checkpoint import load_run

ALL = "all"  # in place of an embodiment's name: every robot of the run that the simulator supports
CONDITIONING = {"language": "a language instruction", "goal": "goal images", "task_id": "a task id"}


def robots_to_evaluate(
    run_dir: str | Path, embodiment: str | None = None, plugins: Sequence[str] = ()
) -> tuple[list[str | None], list[str]]:
    """Return (robots to evaluate one after the other, why others are skipped).

    `embodiment` names one robot, or 'all' of the run's; default: the run's setting
    evaluate.embodiment. [None] if that is empty, or without a run (`Evaluation` reports it).
    With 'all', robots that the simulator does not support are skipped, a sentence each; ConfigError
    if it supports none of them. `plugins`: plug-ins of the run that may be executed.
    """
    paths = [Path(run_dir) / name for name in ("config.json", "names.json")]
    if not all(path.is_file() for path in paths):
        return [embodiment], []
    config, names = stored_config(run_dir), checkpoint.read_names(run_dir)
    embodiment = embodiment or config.evaluate.embodiment
    if embodiment != ALL:
        return [embodiment or None], []
    plug_ins.allow(run_dir, plugins)  # the simulator may be a plug-in's
    kind_of(config.environment)
    supported: list[str | None] = []
    skipped: list[str] = []
    for name in names.embodiments:
        try:
            check_robot(config.environment, name, config.collect.dataset)
            supported.append(name)
        except ConfigError as error:
            skipped.append(str(error))
    if not supported:
        raise ConfigError(skipped[0])
    return supported, skipped


class Evaluation:
    """The evaluation of one checkpoint; after an interruption, a new one continues it.

    Attributes:
        policy: its batch has one row per environment.
        plan: the episodes.
        results: their rows, in RUN/evaluation/results.jsonl, or in RUN/evaluation/<robot> if the
            run has several robots.
        environment: the run's environment, adapted to the robot (`registry.environment_of`).
    """

    def __init__(
        self,
        run_dir: str | Path,
        suite: str | None = None,
        overrides: Mapping[str, Any] | None = None,
        step: int | None = None,
        embodiment: str | None = None,
        plugins: Sequence[str] = (),
        untrained: bool | None = None,
    ) -> None:
        """Load a run and plan its episodes.

        Args:
            run_dir: the directory that training wrote.
            suite: a name of `suites.SUITES`; default: the run's own settings.
            overrides: fields of the suite: splits, skills, episodes, seed.
            step: the checkpoint; default: the newest.
            embodiment: the robot, required if the run has several.
            plugins: plug-ins of the run that may be executed.
            untrained: also evaluate the untrained network; default: the run's own setting.

        Raises:
            ConfigError: the run's config has no simulator, the simulator does not support the
                robot, or the suite, split or skill is unknown.
            ValueError: the run cannot be loaded, or has several robots and none was chosen.
            FileNotFoundError: the run is incomplete.
        """
        self.directory = files.local_path(run_dir, "the run")
        run = load_run(run_dir, step, plugins)
        files.check_writable(run_dir, "the evaluation's directory")
        self.config, settings = run.config, run.config.evaluate
        environment = run.config.environment
        if suite:
            base = suites.suite_by_name(suite, environment)
        else:
            base = suites.suite_from_config(environment, settings, tuple(run.config.collect.skills))
        self.plan = dataclasses.replace(base, **(overrides or {})).plan()
        embodiment = embodiment or settings.embodiment or None
        self.policy = Policy(run, embodiment, min(settings.batch, len(self.plan)))
        robot = self.policy.embodiment.name
        check_robot(environment, robot, run.config.collect.dataset)
        self.environment = environment_of(environment, robot)
        self._subdirectory = files.file_name(robot) if len(run.embodiments) > 1 else ""
        self.setup = {
            "checkpoint": self.policy.step,
            "embodiment": robot,
            "environment": self.environment,
            "execution": dataclasses.asdict(rollouts.execution_of(settings)),
            "delay": settings.delay,
            "tell": list(settings.condition_on),  # renamed, every stored result would be redone
            "batch": settings.batch,
        }
        directory = self.directory / "evaluation" / self._subdirectory
        self.results = ResultsFile(directory, self.setup, settings.videos)
        self._untrained = settings.untrained if untrained is None else untrained
        self._names = run.names
        self._demonstrated = caveats.find_demonstrated(run.config, run.names.datasets)
        self._remarks: list[str] = []
        self._clips: list[VideoClip] = []

    def run(self) -> None:
        """Run every episode without a result, trained and untrained, and render videos of some.

        Before the first episode, raises ValueError if policy and simulator do not fit, and
        RuntimeError if the simulator cannot be built.
        """
        settings = self.config.evaluate
        for caveat in self.caveats:
            print(f"note: {caveat}")
        make = rollouts.env_maker(self.policy, self.environment)
        slots = self.policy.batch_size
        policies = {"trained": self.policy}
        if self._untrained:
            policies["untrained"] = self.policy.untrained(self.config.seed)
        with EnvPool(make, slots, settings.workers or default_workers(slots)) as pool:
            rollouts.check_fit(self.policy, pool)
            parts = simulator(kind_of(self.environment))
            if parts.check:
                rollouts.check_tasks(pool, self.plan, parts.load("check"))
            for label, policy in policies.items():
                self._run_policy(label, policy, pool)
            self._clips = self._render_clips(pool)

    def _run_policy(self, label: str, policy: Policy, pool: EnvPool) -> None:
        finished = sum(self.results.done(label, e) for e in self.plan)
        with progress(f"{label} policy", len(self.plan), "episodes", finished) as bar:

            def show_row(_: ResultRow) -> None:
                rate = success_rate(self.results.rows, policy=label)
                bar.note(f"success {rate.successes}/{rate.episodes}")
                bar.update()

            timing = rollouts.run_episodes(
                policy,
                label,
                self._order(pool.slots),
                pool,
                self.results,
                show_row,
                rollouts.RolloutSettings.from_run(self.config, self.policy),
            )
        if label == "trained" and finished < len(self.plan):
            throughput = f"Throughput: {timing.sentence()}, {pool.slots} environments in parallel."
            print(throughput)
            self._remarks.append(throughput)

    def _order(self, slots: int) -> list[EpisodePlan]:
        """Return the plan in the order in which its episodes are run."""
        keeps_task = simulator(kind_of(self.environment)).keeps_task
        return suites.keep_tasks(self.plan, slots) if keeps_task else self.plan

    def _render_clips(self, pool: EnvPool) -> list[VideoClip]:
        """Render the episodes of the trained policy with stored actions."""
        rows = [r for r in self.rows if r["policy"] == "trained" and r["actions"]]
        clips = []
        with progress("videos", len(rows), "episodes") as bar:
            videos = rollouts.render_episodes(pool, rows, self.results.directory)
            for row, film in zip(rows, videos):
                if isinstance(film, str):  # the reason for a missing video
                    bar.write(film)
                    self._remarks.append(film)
                else:
                    clips.append(VideoClip(row, film.images, film.steps))
                bar.update()
        return clips

    def predict_chunks(
        self, demonstrations: Sequence[DemonstratedEpisode], samples: int = 6
    ) -> ChunkComparison:
        """Return predicted next to demonstrated actions, for one frame of each demonstration.

        The frames take the path of a deployed policy, not the data pipeline: a mismatch between
        the two shows here.
        """
        names, horizon = self.policy.embodiment.action.names, self.policy.horizon
        dataset = next(iter(self.policy.embodiment.datasets), "")  # a record may name none
        steps = [
            int(fraction * (len(d.action) - 1))
            for d, fraction in zip(demonstrations, np.linspace(0.15, 0.85, len(demonstrations)))
        ]
        observations, tasks = [], []
        shape = (len(steps), horizon, len(names))
        demonstrated, mask = np.zeros(shape, np.float32), np.zeros(shape, bool)
        for i, (d, t) in enumerate(zip(demonstrations, steps)):
            observations.append(d.history(self.policy, t))
            tasks.append(d.create_task(self.policy, self.config, dataset))
            chunk = d.action[t : t + horizon]
            demonstrated[i, : len(chunk)], mask[i, : len(chunk)] = chunk, True
        n = len(observations)
        predicted = [
            self.policy.sample_batch(observations, tasks, [s * n + i for i in range(n)])
            for s in range(samples)
        ]
        camera = next(iter(self.policy.image_shapes))
        return ChunkComparison(
            images=np.stack([o[camera][-1] for o in observations]),
            instructions=[d.instruction for d in demonstrations],
            names=names,
            demonstrated=demonstrated,
            mask=mask,
            predicted=np.stack(predicted, axis=1),
        )

    def report(self, chunks: ChunkComparison | None = None) -> Path:
        """Write the report and return its page: RUN/report.html, or RUN/report-<robot>.html."""
        robot = self._subdirectory
        content = ReportContent(
            title=f"Evaluation of {self.directory.name}" + (f": {robot}" if robot else ""),
            facts=self.facts(),
            setup=self.setup,
            rows=self.rows,
            curves=read_curves(self.directory),
            clips=self._clips,
            chunks=chunks,
            remarks=self._remarks,
            groups=self.groups,
            caveats=self.caveats,
            undemonstrated=self.demonstrated.missing(e.skill for e in self.plan),
        )
        name = f"report-{robot}.html" if robot else "report.html"
        return report.write(content, self.results.directory, self.directory / name)

    def table(self) -> str:
        """Return the success table for a terminal."""
        return success_tables.success_table(self.rows, self.groups, self.caveats)

    @property
    def demonstrated(self) -> Demonstrated:
        """What is known of the demonstrations; more after the episodes (`compare_instructions`)."""
        has_instructions = self.config.data.tasks == "instruction"
        tasks = self._names.tasks if has_instructions else ()
        return caveats.compare_instructions(self._demonstrated, self.rows, tasks)

    @property
    def caveats(self) -> list[str]:
        """Sentences on the meaning of the rates."""
        return caveats.sentences(self.environment, self.plan, self.demonstrated)

    @property
    def groups(self) -> Mapping[str, str]:
        """{skill: group} of the simulator; {} if it defines no groups."""
        entry = simulator(kind_of(self.environment))
        return entry.load("groups") if entry.groups else {}

    def facts(self) -> dict[str, str]:
        """Return {name: text} about the training: data, inputs, outputs, network, duration."""
        config, spec = self.config, self.policy.spec
        cameras = ", ".join(
            f"{key.removeprefix('image_')} {h}×{w}"
            for key, (h, w, _) in self.policy.image_shapes.items()
        )
        seconds = read_curves(self.directory).seconds
        demonstrations = ", ".join(f"{n} {skill}" for skill, n in config.collect.skills.items())
        heads = ", ".join(h["kind"] for h in config.model.heads.values())
        execute = config.evaluate.execute
        return {
            "Training data": config.data.mix
            + (f": {demonstrations} demonstrations" if demonstrations else ""),
            "Observations": cameras + (", proprio" if "observation.proprio" in spec else ""),
            "Scenes": " and ".join(dict.fromkeys(suites.block_of(e) for e in self.plan))
            + " block of seeds",
            "Conditioned on": " and ".join(CONDITIONING[x] for x in config.evaluate.condition_on)
            or "nothing",
            "Actions": f"chunks of {self.policy.horizon} steps; the first {execute} are executed "
            f"before the next prediction ({', '.join(self.policy.embodiment.action.names)})",
            "Network": f"transformer, {config.model.layers} layers of width {config.model.width}, "
            f"{heads} head, {self.policy.parameter_count / 1e6:.2f} M parameters",
            "Training": f"{self.policy.step:,} steps of {config.data.batch_size} examples"
            + (f", {duration(seconds)}" if seconds else ""),
        }

    @property
    def rows(self) -> list[Any]:
        """The result rows of this plan, in its order; the file may hold more."""
        order = {e: i for i, e in enumerate(self.plan)}
        rows = [r for r in self.results.rows if planned_episode(r) in order]
        return sorted(rows, key=lambda r: (r["policy"], order[planned_episode(r)]))


def read_curves(directory: Path) -> LearningCurves:
    """Return the curves in a run's metrics.jsonl; empty curves if it does not exist.

    A malformed one has empty curves, too, which is printed: an evaluation is not lost for it.
    """
    path = directory / metrics.FILE
    try:
        return _curves(metrics.read(path))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        print(f"no learning curves: {path} is malformed ({files.cause(error)})", file=sys.stderr)
        return _curves([])


def _curves(rows: Sequence[Mapping[str, Any]]) -> LearningCurves:
    validation: dict[str, dict[str, list[tuple[float, float]]]] = {"loss": {}, "action_error": {}}
    for row in rows:
        for name, value in row.items():
            prefix, _, path = name.partition("/")
            dataset, _, measure = path.rpartition("/")
            if prefix == "validation" and measure in validation:
                validation[measure].setdefault(dataset, []).append((row["step"], value))
    return LearningCurves(
        train=[(r["step"], r["loss"]) for r in rows if "loss" in r],
        validation=validation["loss"],
        action_error=validation["action_error"],
        seconds=rows[-1]["seconds"] if rows else None,
    )
