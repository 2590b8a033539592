"""Closed-loop episodes: many environments in lock-step, one policy call for all of them.

A round:

 1. every free slot of the pool starts its next episode
 2. the observations of all slots form one batch; one policy call returns a chunk of actions each
 3. every slot executes the actions until the next prediction (policy.execution.ChunkPlan)
 4. finished episodes become result rows, written to disk at once

Episode i of the plan always runs in slot i mod N, slot s is always row s of the batch, and the
noise of a call depends on the episode's seed and the step. Results therefore depend neither on the
number of workers nor on interruptions. A crashed episode is run a second time; if that crashes too,
its row has success null and enters no rate.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from octolike import files
from octolike.config import Config, EvaluateConfig
from octolike.envs.pool import (
    EPISODE_LIMIT,
    CallCommand,
    EnvCrash,
    EnvPool,
    ResetCommand,
    StepCommand,
)
from octolike.envs.registry import kind_of, make_wrapped_env, simulator
from octolike.envs.replays import Film, render_replay
from octolike.envs.wrappers import spaces
from octolike.evaluation.results_file import ResultsFile, planned_episode
from octolike.evaluation.success import ResultRow
from octolike.evaluation.suites import EpisodePlan
from octolike.policy import Policy, Task
from octolike.policy.execution import ChunkPlan, ExecutionSettings, FrameHistory, plan_for
from octolike.policy.sampler import noise_seed

ATTEMPTS = 2
# Optional reports of an environment about an episode: whether the scene's original task was done;
# {milestone: passed} in order; the first object that was grasped, "" for none; the one to grasp.
OUTCOMES = ("instead", "milestones", "grasped", "target")


@dataclasses.dataclass
class RolloutTiming:
    """Time and counts of policy calls, environment steps and episodes."""

    policy_seconds: float = 0.0
    policy_calls: int = 0
    environment_seconds: float = 0.0
    environment_steps: int = 0
    episodes: int = 0
    seconds: float = 0.0  # resets included

    def sentence(self) -> str:
        """Return the throughput as a phrase."""
        if not self.policy_calls or not self.environment_steps:
            return "no episode was run"
        return (
            f"{3600 * self.episodes / self.seconds:.0f} episodes/h, "
            f"{self.environment_steps / self.environment_seconds:.0f} environment steps/s, "
            f"{self.policy_calls / self.policy_seconds:.1f} batched policy calls/s"
        )


def _info_task(info: Mapping[str, Any]) -> str:
    return info["task"]


@dataclasses.dataclass(frozen=True)
class RolloutSettings:
    """How the policy is conditioned and its chunks are executed.

    Attributes:
        conditioning: any of "language", "goal", "task_id".
        goal: the simulator's function that renders goal images.
        task_name: info of an episode -> the run's name of its task (for "task_id").
        execution: how chunks are executed.
        delay: steps from an observation to its chunk, as if inference took so long.
    """

    conditioning: Sequence[str] = ("language",)
    goal: Any = None
    task_name: Callable[[Mapping[str, Any]], str] = _info_task
    execution: ExecutionSettings = dataclasses.field(default_factory=ExecutionSettings)
    delay: int = 0

    @classmethod
    def from_run(cls, config: Config, policy: Policy) -> RolloutSettings:
        """Return the settings of a run's own evaluation."""
        settings = config.evaluate
        return cls(
            conditioning=settings.condition_on,
            goal=simulator(kind_of(config.environment)).load("goal"),
            task_name=task_name_function(config, policy),
            execution=execution_of(settings),
            delay=settings.delay,
        )


def execution_of(settings: EvaluateConfig) -> ExecutionSettings:
    """Return how chunks are executed by a config's evaluation."""
    return ExecutionSettings(
        execute=settings.execute,
        overlap=settings.overlap,
        real_time=settings.real_time,
        ensemble=settings.ensemble,
        gripper_band=settings.gripper_band,
        release=settings.release,
    )


def task_name_function(config: Config, policy: Policy) -> Callable[[Mapping[str, Any]], str]:
    """Return a function from an episode's info to the run's name of its task.

    If tasks are datasets (data.tasks), that is the name of the robot's dataset.
    """
    if config.data.tasks == "dataset":
        return lambda info: policy.embodiment.datasets[0]
    key = "instruction" if config.data.tasks == "instruction" else "task"
    return lambda info: info[key]


@dataclasses.dataclass
class _RunningEpisode:
    """The state of an episode that a slot is running."""

    episode: EpisodePlan
    attempt: int
    goal: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    task: Task | None = None
    plan: ChunkPlan | None = None
    history: FrameHistory | None = None
    info: dict[str, Any] = dataclasses.field(default_factory=dict)
    actions: list[np.ndarray] = dataclasses.field(default_factory=list)
    total: float = 0.0

    def observe(self, frames: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
        """Add observations to the history."""
        assert self.history is not None  # since the episode's start
        for frame in frames:
            self.history.append({key: frame[key] for key in keys})

    @property
    def steps(self) -> int:
        return sum(map(len, self.actions))


def env_maker(policy: Policy, environment: Mapping[str, Any]) -> Any:
    """Return a picklable function that creates environments for `policy`."""
    return functools.partial(make_wrapped_env, dict(environment), policy.window)


def check_fit(policy: Policy, pool: EnvPool) -> None:
    """Raise ValueError if an environment's cameras, proprio, actions or rate do not fit the policy.

    Raises RuntimeError if the environment cannot be built.
    """
    reply = pool.run({0: CallCommand(spaces)})[0]
    if isinstance(reply, EnvCrash):
        raise RuntimeError(f"the environment cannot be built: {reply.error}")
    actions, observations, hz = reply
    width = len(policy.embodiment.action.names)
    if actions != (width,):
        raise ValueError(
            f"the policy's actions ({policy.embodiment.name}) have {width} dimensions, "
            f"the environment expects {list(actions)}"
        )
    if hz and policy.embodiment.control_hz and hz != policy.embodiment.control_hz:
        raise ValueError(
            f"the policy's actions ({policy.embodiment.name}) are "
            f"{policy.embodiment.control_hz:g} per second, the environment executes {hz:g}: each "
            "would last too long or too short"
        )
    missing = [k for k in policy.observation_keys if k not in observations]
    if missing:
        raise ValueError(
            f"the environment does not provide {', '.join(missing)}, which the policy was trained "
            f"with; it provides {', '.join(observations)}"
        )
    if "proprio" in policy.observation_keys:
        names = policy.embodiment.proprio.names if policy.embodiment.proprio else ()
        if observations["proprio"] != (len(names),):
            raise ValueError(
                f"the policy's proprio ({policy.embodiment.name}) has {len(names)} dimensions, "
                f"the environment provides {list(observations['proprio'])}"
            )


def check_tasks(pool: EnvPool, plan: Sequence[EpisodePlan], check: Any) -> None:
    """Raise ValueError if a simulator's installation lacks a task of the plan.

    check: the simulator's function `check`.
    """
    pairs = list(dict.fromkeys((episode.split, episode.skill) for episode in plan))
    reply = pool.run({0: CallCommand(check, (pairs,))})[0]
    if isinstance(reply, EnvCrash):
        raise RuntimeError(f"the tasks cannot be checked: {reply.error}")
    if reply:
        raise ValueError(reply)


def run_episodes(
    policy: Policy,
    label: str,
    plan: Sequence[EpisodePlan],
    pool: EnvPool,
    results: ResultsFile,
    on_episode: Callable[[ResultRow], Any],
    settings: RolloutSettings,
) -> RolloutTiming:
    """Run the remaining episodes of a plan and add their rows to `results`.

    Args:
        policy: its batch_size must equal the pool's number of slots: slot s is row s.
        label: 'trained' or 'untrained', for the rows' field `policy`.
        plan: all episodes; those with an outcome in `results` are skipped.
        pool: pool of environments made by `env_maker`.
        results: receives the rows.
        on_episode: called with each new row.
        settings: conditioning and execution.

    Raises:
        ValueError: the pool or `settings.execution` does not fit the policy.
    """
    plan_for(policy, settings.execution)  # raises before the first episode
    if policy.batch_size != pool.slots:
        raise ValueError(
            f"the policy's batch size is {policy.batch_size}, the pool has {pool.slots} slots"
        )
    queues = [
        deque(_RunningEpisode(e, 1) for e in plan[slot :: pool.slots] if not results.done(label, e))
        for slot in range(pool.slots)
    ]
    active: dict[int, _RunningEpisode] = {}
    timing, begin = RolloutTiming(), time.perf_counter()

    def finish(slot: int, success: bool | None, failure: str) -> None:
        running = active.pop(slot)
        if success is None and running.attempt < ATTEMPTS:
            queues[slot].appendleft(_RunningEpisode(running.episode, running.attempt + 1))
            return
        row = _row(label, running, success, failure)
        results.add(row, running.actions)
        timing.episodes += 1
        on_episode(row)

    while active or any(queues):
        _start(policy, pool, queues, active, finish, settings)
        if active:
            chunks = _predict(policy, pool.slots, active, timing, settings.delay)
            _execute(pool, chunks, active, finish, timing, settings.delay)
    timing.seconds = time.perf_counter() - begin
    return timing


def _start(
    policy: Policy,
    pool: EnvPool,
    queues: list[deque],
    active: dict,
    finish: Any,
    settings: RolloutSettings,
) -> None:
    """Start the next episode in every free slot."""
    free = [s for s, queue in enumerate(queues) if queue and s not in active]
    for slot in free:
        active[slot] = queues[slot].popleft()
    if "goal" in settings.conditioning:
        episodes = {s: active[s].episode for s in free}
        goals = {s: CallCommand(settings.goal, (e.seed, e.options)) for s, e in episodes.items()}
        for slot, reply in pool.run(goals).items():
            if isinstance(reply, EnvCrash):
                finish(slot, None, f"crashed: {reply.error}")
                free.remove(slot)
            else:
                active[slot].goal = reply
    commands = {s: ResetCommand(active[s].episode.seed, active[s].episode.options) for s in free}
    for slot, reply in pool.run(commands).items():
        if isinstance(reply, EnvCrash):
            finish(slot, None, f"crashed: {reply.error}")
        else:
            running = active[slot]
            frames, running.info = reply
            running.plan = plan_for(policy, settings.execution)
            running.history = FrameHistory(policy.window)
            running.observe(frames, policy.observation_keys)
            running.task = _task(policy, running, settings)


def _task(policy: Policy, running: _RunningEpisode, settings: RolloutSettings) -> Task:
    """Return the policy's task; goal images are limited to the cameras that it was trained on."""
    conditioning, prefix = settings.conditioning, "image_"
    goals = {k: v for k, v in running.goal.items() if k in policy.goal_shapes}
    return policy.create_task(
        instruction=running.info["instruction"] if "language" in conditioning else None,
        goal_images={k.removeprefix(prefix): v for k, v in goals.items()} or None,
        task_id=settings.task_name(running.info) if "task_id" in conditioning else None,
    )


def _predict(
    policy: Policy, slots: int, active: dict, timing: RolloutTiming, delay: int
) -> np.ndarray:
    """Return a chunk per slot [N, H, A]; free slots repeat the observation of an active one."""
    filler = next(iter(active.values()))
    rows = [active.get(slot, filler) for slot in range(slots)]
    prefixes = [r.plan.prefix(delay) for r in rows]
    begin = time.perf_counter()
    chunks = policy.sample_batch(
        [r.history.stacked() for r in rows],
        [r.task for r in rows],
        [_noise_seed(r) for r in rows],
        prefixes if any(prefixes) else None,
    )
    timing.policy_seconds += time.perf_counter() - begin
    timing.policy_calls += 1
    return chunks


def _execute(
    pool: EnvPool,
    chunks: np.ndarray,
    active: dict,
    finish: Any,
    timing: RolloutTiming,
    delay: int,
) -> None:
    """Let every active slot act until the next prediction; finish the episodes that have ended."""
    actions = {slot: running.plan.round(chunks[slot], delay) for slot, running in active.items()}
    begin = time.perf_counter()
    replies = pool.run({slot: StepCommand(actions[slot]) for slot in active})
    timing.environment_seconds += time.perf_counter() - begin
    for slot, reply in replies.items():
        if isinstance(reply, EnvCrash):
            finish(slot, None, f"crashed: {reply.error}")
            continue
        running = active[slot]
        frames, reward, terminated, truncated, info = reply
        running.observe(frames, running.history.keys)
        running.total += reward
        running.actions.append(info["actions"])
        timing.environment_steps += len(info["actions"])
        # Not known at reset; the rest stays as at reset, as the policy got it.
        running.info = running.info | {k: info[k] for k in OUTCOMES if k in info}
        if terminated or truncated:
            success = bool(info["success"])
            finish(slot, success, "" if success else info["failure"] or "time ran out")


def render_episodes(
    pool: EnvPool, rows: Sequence[ResultRow], directory: Path
) -> Iterator[Film | str]:
    """Replay episodes from their stored actions; yield each one's film.

    Yields an explanation instead if a replay ends differently from its row: the simulator is then
    not deterministic, and the images would show something that did not happen.
    """
    for start in range(0, len(rows), pool.slots):
        batch = rows[start : start + pool.slots]
        commands = {}
        for slot, row in enumerate(batch):
            episode = planned_episode(row)
            actions = np.load(files.child(directory, row["actions"]), allow_pickle=False)
            arguments = (episode.seed, episode.options, actions)
            commands[slot] = CallCommand(render_replay, arguments, EPISODE_LIMIT)
        replies = pool.run(commands)
        for slot, row in enumerate(batch):
            reply = replies[slot]
            missing = "No video of {skill}, {split}, seed {seed}".format(**row)
            if isinstance(reply, EnvCrash):
                yield f"{missing}: its replay crashed: {reply.error}."
                continue
            film: Film = reply
            ending = _ending(film.info["success"], film.steps[-1])
            recorded_ending = _ending(row["success"], row["steps"])
            yield (
                film
                if ending == recorded_ending
                else (
                    f"{missing}: the simulator is not deterministic; with the same actions the "
                    f"replay ended with {ending}, the episode with {recorded_ending}."
                )
            )


def _ending(success: bool, steps: int) -> str:
    return f"{'success' if success else 'failure'} after {steps} steps"


def _row(
    label: str, running: _RunningEpisode, success: bool | None, failure: str
) -> dict[str, Any]:
    # With a counterfactual instruction: whether the scene's training task was done instead.
    instead = {"instead": bool(running.info["instead"])} if "instead" in running.info else {}
    return {
        "policy": label,
        **dataclasses.asdict(running.episode),
        "task": running.info.get("task", ""),
        "instruction": running.info.get("instruction", ""),
        "scene": running.info.get("scene", ""),  # equal for episodes that started equally
        "success": success,
        "failure": failure,
        "steps": running.steps,
        "return": running.total,
        **instead,
        **{k: running.info[k] for k in OUTCOMES[1:] if k in running.info},
    }


def _noise_seed(running: _RunningEpisode) -> int:
    return noise_seed(running.episode.seed, running.steps)
