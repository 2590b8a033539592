"""From a run's directory to its report: load, roll out, film, draw."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from octolike.config import Config, ConfigError
from octolike.envs.pool import EnvPool, default_workers
from octolike.envs.registry import check_robot, environment_of, kind_of, simulator
from octolike.evaluation import report, rollouts, suites
from octolike.evaluation.figures import ChunkComparison, VideoClip, duration
from octolike.evaluation.report import LearningCurves, ReportContent
from octolike.evaluation.success import count
from octolike.policy import Policy, Task
from octolike.train import metrics
from octolike.train.checkpoint import load_run

ALL = "all"  # as an embodiment's name: each of the run's that the simulator can be
TOLD = {
    "language": "an instruction in words",
    "goal": "pictures of the goal",
    "task_id": "the task's number",
}


@dataclasses.dataclass(frozen=True)
class DemonstratedEpisode:
    """A demonstrated episode as a robot saw it.

    observation: image_<camera> uint8 [T, h, w, 3], proprio float32 [T, P] in the robot's units;
    action: float32 [T, A] in the robot's units; task: its name, "" where it has none.
    """

    observation: Mapping[str, np.ndarray]
    action: np.ndarray
    instruction: str
    task: str = ""


def robots(
    run_dir: str | Path, embodiment: str | None = None
) -> tuple[list[str | None], list[str]]:
    """Return the robots to evaluate one after the other: the one asked for, or 'all' of the run's.

    Without one, the run's own setting; [None] where that leaves it open, or where there is no run
    (which `Evaluation` says). Beside them, of 'all', a sentence for each that the simulator cannot
    be; ConfigError where it can be none.
    """
    files = [Path(run_dir) / name for name in ("config.json", "names.json")]
    if not all(path.is_file() for path in files):
        return [embodiment], []
    config, names = (json.loads(path.read_text(encoding="utf-8")) for path in files)
    asked = embodiment or config["evaluate"]["embodiment"]
    if asked != ALL:
        return [asked or None], []
    kind_of(config["environment"])
    found, left_out = [], []
    for name in names["embodiments"]:
        try:
            check_robot(config["environment"], name, config["collect"]["dataset"])
            found.append(name)
        except ConfigError as error:
            left_out.append(str(error))
    if not found:
        raise ConfigError(left_out[0])
    return found, left_out


class Evaluation:
    """One evaluation of one checkpoint; stopped half-way, the next one goes on where it was.

    Attributes:
        policy: with one row per environment.
        plan: the episodes.
        results: their rows, in RUN/evaluation/results.jsonl; in RUN/evaluation/<robot> where the
            run knows several.
        environment: the run's, made the robot's own (`registry.environment_of`).
    """

    def __init__(
        self,
        run_dir: str | Path,
        suite: str | None = None,
        overrides: Mapping[str, Any] | None = None,
        step: int | None = None,
        embodiment: str | None = None,
    ) -> None:
        """Load a run and choose what to run.

        Args:
            run_dir: what training wrote.
            suite: a name of `suites.SUITES`; default: the run's own settings.
            overrides: fields of the suite: splits, skills, episodes, seed.
            step: the checkpoint; default: the newest.
            embodiment: the robot, where the run knows several.

        Raises:
            ConfigError: no simulator in the run's config, one that is another robot, an unknown
                suite, split or skill.
            ValueError, FileNotFoundError: the run cannot be loaded, or holds several robots.
        """
        self.directory = Path(run_dir)
        run = load_run(run_dir, step=step)
        self.config, settings = run.config, run.config.evaluate
        environment = run.config.environment
        if suite:
            chosen = suites.named(suite, environment)
        else:
            chosen = suites.from_config(environment, settings, tuple(run.config.collect.skills))
        self.plan = dataclasses.replace(chosen, **(overrides or {})).plan()
        embodiment = embodiment or settings.embodiment or None
        self.policy = Policy(run, embodiment, min(settings.batch, len(self.plan)))
        robot = self.policy.embodiment.name
        check_robot(environment, robot, run.config.collect.dataset)
        self.environment = environment_of(environment, robot)
        self._own = robot if len(run.embodiments) > 1 else ""
        self.setup = {
            "checkpoint": self.policy.step,
            "embodiment": robot,
            "environment": self.environment,
            "execute": settings.execute,
            "ensemble": settings.ensemble,
            "tell": list(settings.condition_on),
            "batch": settings.batch,
        }
        pieces = self.directory / "evaluation" / self._own
        self.results = rollouts.ResultsFile(pieces, self.setup, settings.videos)
        self._remarks = suites.caveats(self.plan, self.config.collect)
        self._clips: list[VideoClip] = []

    def run(self) -> None:
        """Run every episode that has no result yet, trained and untrained, and film some.

        Raises ValueError or RuntimeError before the first episode where policy and simulator do
        not fit, or the simulator cannot be built.
        """
        settings = self.config.evaluate
        for remark in self._remarks:
            print(f"note: {remark}")
        make = rollouts.env_maker(
            self.policy, self.environment, settings.execute, settings.ensemble
        )
        slots = self.policy.batch_size
        policies = {"trained": self.policy}
        if settings.untrained:
            policies["untrained"] = self.policy.untrained(self.config.seed)
        with EnvPool(make, slots, settings.workers or default_workers(slots)) as pool:
            rollouts.check_fit(self.policy, pool)
            for label, policy in policies.items():
                self._run_one(label, policy, pool)
            self._clips = self._film(pool)

    def _run_one(self, label: str, policy: Policy, pool: EnvPool) -> None:
        left = sum(not self.results.done(label, e) for e in self.plan)
        with tqdm(total=left, desc=f"{label} policy", unit="episode", disable=not left) as bar:

            def progress(_: Any) -> None:
                bar.update()
                rate = count(self.results.rows, policy=label)
                bar.set_postfix_str(f"success {rate.successes}/{rate.episodes}")

            tell = self.config.evaluate.condition_on
            goal = simulator(kind_of(self.config.environment)).load("goal")
            timing = rollouts.run(
                policy,
                label,
                self.plan,
                pool,
                self.results,
                progress,
                tell,
                goal,
                task_namer(self.config, self.policy),
            )
        if label == "trained" and left:
            how = f"{pool.slots} environments at once"
            self._remarks.append(f"Throughput: {timing.sentence()}, {how}.")

    def _film(self, pool: EnvPool) -> list[VideoClip]:
        """Film the episodes of the trained policy whose actions were kept."""
        kept = [r for r in self.rows if r["policy"] == "trained" and r["actions"]]
        films = rollouts.film(pool, kept, self.results.directory)
        bar = tqdm(films, total=len(kept), desc="filming", unit="episode", disable=not kept)
        clips = []
        for row, found in zip(kept, bar):
            if isinstance(found, str):
                bar.write(found)
                self._remarks.append(found)
            else:
                clips.append(VideoClip(row, found))
        return clips

    def imitate(
        self, demonstrations: Sequence[DemonstratedEpisode], samples: int = 6
    ) -> ChunkComparison:
        """Let the policy act on one frame of each demonstration, beside what was demonstrated.

        The frames go through the door that a robot uses, not through the data pipeline: where the
        two disagree, the curves here do too.
        """
        names, horizon = self.policy.embodiment.action.names, self.policy.horizon
        moments = [
            int(part * (len(d.action) - 1))
            for d, part in zip(demonstrations, np.linspace(0.15, 0.85, len(demonstrations)))
        ]
        seen, tasks = [], []
        shape = (len(moments), horizon, len(names))
        demonstrated, mask = np.zeros(shape, np.float32), np.zeros(shape, bool)
        for i, (d, t) in enumerate(zip(demonstrations, moments)):
            frames = slice(max(0, t + 1 - self.policy.window), t + 1)
            seen.append({k: v[frames] for k, v in d.observation.items()})
            tasks.append(self._task(d))
            following = d.action[t : t + horizon]
            demonstrated[i, : len(following)], mask[i, : len(following)] = following, True
        predicted = [
            self.policy.sample_batch(seen, tasks, [s * len(seen) + i for i in range(len(seen))])
            for s in range(samples)
        ]
        camera = next(iter(self.policy.image_shapes))
        return ChunkComparison(
            pictures=np.stack([frames[camera][-1] for frames in seen]),
            instructions=[d.instruction for d in demonstrations],
            names=names,
            demonstrated=demonstrated,
            mask=mask,
            predicted=np.stack(predicted, axis=1),
        )

    def _task(self, demonstration: DemonstratedEpisode) -> Task:
        tell = self.config.evaluate.condition_on
        ends = {k: v[-1] for k, v in demonstration.observation.items()}
        goals = {k.removeprefix("image_"): ends[k] for k in self.policy.goal_shapes}
        known = {"task": demonstration.task, "instruction": demonstration.instruction}
        number = task_namer(self.config, self.policy)(known)
        return self.policy.create_task(
            instruction=demonstration.instruction if "language" in tell else None,
            goal_images=goals if "goal" in tell else None,
            task_id=number if "task_id" in tell else None,
        )

    def report(self, chunks: ChunkComparison | None = None) -> Path:
        """Write the report; returns the page's path, RUN/report.html."""
        material = ReportContent(
            title=f"What {self.directory.name} learned" + (f": {self._own}" if self._own else ""),
            facts=self.facts(),
            setup=self.setup,
            rows=self.rows,
            curves=read_curves(self.directory),
            clips=self._clips,
            chunks=chunks,
            remarks=self._remarks,
            groups=self.groups,
        )
        name = f"report-{self._own}.html" if self._own else "report.html"
        return report.write(material, self.results.directory, self.directory / name)

    @property
    def groups(self) -> Mapping[str, str]:
        """Return {skill: its group} of the simulator; {} where it has none."""
        row = simulator(kind_of(self.environment))
        return row.load("groups") if row.groups else {}

    def facts(self) -> dict[str, str]:
        """Say what was trained, on what, for how long."""
        c, spec = self.config, self.policy.spec
        cameras = ", ".join(
            f"{key.removeprefix('image_')} {h}×{w}"
            for key, (h, w, _) in self.policy.image_shapes.items()
        )
        seconds = read_curves(self.directory).seconds
        demonstrations = ", ".join(f"{n} {skill}" for skill, n in c.collect.skills.items())
        heads = ", ".join(h["kind"] for h in c.model.heads.values())
        return {
            "Learned from": f"{c.data.mix}" + (f": {demonstrations}" if demonstrations else ""),
            "Sees": f"{cameras}" + (", its own pose" if "observation.proprio" in spec else ""),
            "Is told": " and ".join(TOLD[way] for way in c.evaluate.condition_on) or "nothing",
            "Does": f"{self.policy.horizon} actions ahead, of which {c.evaluate.execute} executed "
            f"before it looks again ({', '.join(self.policy.embodiment.action.names)})",
            "Network": f"transformer, {c.model.layers} layers of width {c.model.width}, "
            f"{heads} head, {self.policy.parameter_count / 1e6:.2f} M parameters",
            "Training": f"{self.policy.step} steps of {c.data.batch_size} examples"
            + (f", {duration(seconds)}" if seconds else ""),
        }

    @property
    def rows(self) -> list[Any]:
        """Return the rows of this plan, in its order; the file may hold more."""
        wanted = {e: i for i, e in enumerate(self.plan)}
        mine = [r for r in self.results.rows if rollouts.episode_of(r) in wanted]
        return sorted(mine, key=lambda r: (r["policy"], wanted[rollouts.episode_of(r)]))


def task_namer(config: Config, policy: Policy) -> Callable[[Mapping[str, Any]], str]:
    """Return what says, from an episode's info, the name by which the run knows its task.

    Where tasks are datasets (data.tasks), the number of the task is that of the robot's dataset.
    """
    if config.data.tasks == "dataset":
        return lambda info: policy.embodiment.datasets[0]
    key = "instruction" if config.data.tasks == "instruction" else "task"
    return lambda info: info[key]


def read_curves(directory: Path) -> LearningCurves:
    """Return what metrics.jsonl in a run's directory holds; empty curves where it is missing."""
    rows = metrics.read(directory / metrics.FILE)
    held_out: dict[str, dict[str, list[tuple[float, float]]]] = {"loss": {}, "action_error": {}}
    for row in rows:
        for name, value in row.items():
            what, _, rest = name.partition("/")
            dataset, _, number = rest.rpartition("/")
            if what == "validation" and number in held_out:
                held_out[number].setdefault(dataset, []).append((row["step"], value))
    return LearningCurves(
        train=[(r["step"], r["loss"]) for r in rows if "loss" in r],
        validation=held_out["loss"],
        action_error=held_out["action_error"],
        seconds=rows[-1]["seconds"] if rows else None,
    )
