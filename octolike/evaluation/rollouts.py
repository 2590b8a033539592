"""Closed-loop episodes: many environments in lock-step, one policy call for all of them.

What a round goes through:

 1. every free slot of the pool starts its next episode
 2. the observations of all slots become one batch, one policy call gives each a chunk of actions
 3. every slot executes k actions of its chunk (envs.wrappers.ChunkExecution)
 4. episodes that ended become rows of results, on disk at once

Episode i of the plan always runs in slot i mod N, and slot s is always row s of the batch; the
noise of a call depends on the episode's seed and the step. So results depend neither on the workers
nor on an interruption. An environment that crashes has its episode run again once; if that fails
too, the row says so (success null) and no rate counts it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from octolike import files
from octolike.envs.pool import CallCommand, EnvCrash, EnvPool, ResetCommand, StepCommand
from octolike.envs.registry import make_wrapped_env
from octolike.envs.wrappers import replay, spaces
from octolike.evaluation.success import ResultRow
from octolike.evaluation.suites import EpisodePlan
from octolike.policy import Policy, Task

ATTEMPTS = 2


class ResultsFile:
    """The rows of an evaluation, as a file that grows line by line: results.jsonl.

    The first line is the setup that the rows belong to (checkpoint, execution, environment); rows
    of another setup are put aside as results.old.jsonl, never mixed in.
    """

    def __init__(self, directory: str | Path, setup: Mapping[str, Any], videos: int = 0) -> None:
        """Open or start the file; of `videos` episodes of each kind the actions are kept."""
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.path = self.directory / "results.jsonl"
        self.videos = videos
        self._rows: dict[tuple[str, EpisodePlan], dict[str, Any]] = {}
        if self.path.exists() and not self._read(dict(setup)):
            self.path.replace(self.path.with_name("results.old.jsonl"))
        if not self.path.exists():
            files.write_json(self.path, {"setup": setup}, indent=None)

    @property
    def rows(self) -> list[ResultRow]:
        """All rows, the latest of each episode."""
        return list(self._rows.values())

    def done(self, policy: str, episode: EpisodePlan) -> bool:
        """Whether an episode has an outcome already; a crashed one has none."""
        row = self._rows.get((policy, episode))
        return row is not None and row["success"] is not None

    def add(self, row: dict[str, Any], actions: Sequence[np.ndarray]) -> None:
        """Append a row; keep the actions of the first few of each kind, for `film`."""
        kind = ("policy", "split", "skill", "success")
        alike = [r for r in self.rows if r["actions"] and all(r[k] == row[k] for k in kind)]
        row["actions"] = ""
        if row["success"] is not None and len(alike) < self.videos:
            row["actions"] = "actions/{policy}-{split}-{skill}-{seed}.npy".format(**row)
            path = self.directory / row["actions"]
            path.parent.mkdir(exist_ok=True)
            np.save(path, np.concatenate(actions))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._rows[row["policy"], episode_of(row)] = row

    def _read(self, setup: dict[str, Any]) -> bool:
        """Read the rows; False where they belong to another setup."""
        text = self.path.read_text(encoding="utf-8")
        whole = whole_lines(text)
        if not whole or json.loads(whole[0]) != json.loads(json.dumps({"setup": setup})):
            return False
        for row in map(json.loads, whole[1:]):
            self._rows[row["policy"], episode_of(row)] = row
        if "".join(whole) != text:
            files.write_text(self.path, "".join(whole))
        return True


def whole_lines(text: str) -> list[str]:
    """Return the lines of a results.jsonl but for a last one that a kill has cut off."""
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


@dataclasses.dataclass
class RolloutTiming:
    """What the rounds cost: seconds and counts."""

    policy_seconds: float = 0.0
    policy_calls: int = 0
    environment_seconds: float = 0.0
    environment_steps: int = 0

    def sentence(self) -> str:
        """Return the throughput in words."""
        if not self.policy_calls or not self.environment_steps:
            return "nothing was run"
        return (
            f"{self.environment_steps / self.environment_seconds:.0f} environment steps/s, "
            f"{self.policy_calls / self.policy_seconds:.1f} batched policy calls/s"
        )


@dataclasses.dataclass
class _Running:
    """An episode under way in a slot."""

    episode: EpisodePlan
    attempt: int
    goal: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    task: Task | None = None
    observation: Any = None
    info: dict[str, Any] = dataclasses.field(default_factory=dict)
    actions: list[np.ndarray] = dataclasses.field(default_factory=list)
    total: float = 0.0

    @property
    def steps(self) -> int:
        return sum(map(len, self.actions))


def _task_of(info: Mapping[str, Any]) -> str:
    return info["task"]


def env_maker(policy: Policy, environment: Mapping[str, Any], execute: int, ensemble: float) -> Any:
    """Return a picklable function that makes environments for `policy`.

    Raises ValueError when `execute` exceeds the policy's chunk.
    """
    if not 1 <= execute <= policy.horizon:
        raise ValueError(
            f"execute is {execute}; the policy predicts {policy.horizon} actions at a time"
        )
    gripper = tuple(policy.gripper)
    return functools.partial(
        make_wrapped_env, dict(environment), policy.window, execute, ensemble, gripper
    )


def check_fit(policy: Policy, pool: EnvPool) -> None:
    """Raise ValueError where an environment's cameras, proprio or actions do not fit the policy.

    Raises RuntimeError where the environment cannot even be built.
    """
    reply = pool.run({0: CallCommand(spaces)})[0]
    if isinstance(reply, EnvCrash):
        raise RuntimeError(f"the environment cannot say what it is:\n{reply.text}")
    actions, observations = reply
    width = len(policy.embodiment.action.names)
    if actions != (width,):
        raise ValueError(
            f"the policy's actions ({policy.embodiment.name}) have {width} dimensions, "
            f"the environment takes {list(actions)}"
        )
    lacking = [k for k in policy.observation_keys if k not in observations]
    if lacking:
        raise ValueError(
            f"the environment does not give {', '.join(lacking)}, which the policy was trained "
            f"with; it gives {', '.join(observations)}"
        )
    if "proprio" in policy.observation_keys:
        names = policy.embodiment.proprio.names if policy.embodiment.proprio else ()
        if observations["proprio"] != (len(names),):
            raise ValueError(
                f"the policy's proprio ({policy.embodiment.name}) has {len(names)} dimensions, "
                f"the environment gives {list(observations['proprio'])}"
            )


def run(
    policy: Policy,
    label: str,
    plan: Sequence[EpisodePlan],
    pool: EnvPool,
    results: ResultsFile,
    progress: Any,
    tell: Sequence[str] = ("language",),
    goal: Any = None,
    task_of: Callable[[Mapping[str, Any]], str] = _task_of,
) -> RolloutTiming:
    """Run what is left of a plan and add its rows to `results`.

    Args:
        policy: its batch_size must be the pool's number of slots, so that each slot keeps its row.
        label: 'trained', 'untrained': the rows' `policy`.
        plan: all episodes; those that `results` has are left out.
        pool: of environments made by `env_maker`.
        results: where rows go.
        progress: called with (row) after each episode.
        tell: how the policy is told its task: any of "language", "goal", "task_id".
        goal: the simulator's function that shows how the task looks when it is done.
        task_of: info of an episode -> the name by which the run knows its task (with "task_id").
    """
    if policy.batch_size != pool.slots:
        raise ValueError(
            f"the policy's batch size is {policy.batch_size}, the pool has {pool.slots} slots"
        )
    queues = [
        deque(_Running(e, 1) for e in plan[slot :: pool.slots] if not results.done(label, e))
        for slot in range(pool.slots)
    ]
    active: dict[int, _Running] = {}
    timing = RolloutTiming()

    def finish(slot: int, success: bool | None, failure: str) -> None:
        running = active.pop(slot)
        if success is None and running.attempt < ATTEMPTS:
            queues[slot].appendleft(_Running(running.episode, running.attempt + 1))
            return
        row = _row(label, running, success, failure)
        results.add(row, running.actions)
        progress(row)

    while active or any(queues):
        _start(policy, pool, queues, active, finish, tell, goal, task_of)
        if active:
            chunks = _ask(policy, pool.slots, active, timing)
            _execute(pool, chunks, active, finish, timing)
    return timing


def _start(
    policy: Policy,
    pool: EnvPool,
    queues: list[deque],
    active: dict,
    finish: Any,
    tell: Sequence[str],
    goal: Any,
    task_of: Callable[[Mapping[str, Any]], str],
) -> None:
    """Begin the next episode in every free slot."""
    free = [s for s, queue in enumerate(queues) if queue and s not in active]
    for slot in free:
        active[slot] = queues[slot].popleft()
    if "goal" in tell:
        episodes = {s: active[s].episode for s in free}
        wishes = {s: CallCommand(goal, (e.seed, e.options)) for s, e in episodes.items()}
        for slot, reply in pool.run(wishes).items():
            if isinstance(reply, EnvCrash):
                finish(slot, None, _crashed(reply))
                free.remove(slot)
            else:
                active[slot].goal = reply
    commands = {s: ResetCommand(active[s].episode.seed, active[s].episode.options) for s in free}
    for slot, reply in pool.run(commands).items():
        if isinstance(reply, EnvCrash):
            finish(slot, None, _crashed(reply))
        else:
            running = active[slot]
            running.observation, running.info = reply
            number = task_of(running.info) if "task_id" in tell else None
            running.task = _task(policy, running, tell, number)


def _task(policy: Policy, running: _Running, tell: Sequence[str], number: str | None) -> Task:
    """Return what the policy is told: of the goal, the cameras that it was trained on."""
    prefix = "image_"
    goals = {k: v for k, v in running.goal.items() if k in policy.goal_shapes}
    return policy.create_task(
        instruction=running.info["instruction"] if "language" in tell else None,
        goal_images={k.removeprefix(prefix): v for k, v in goals.items()} or None,
        task_id=number,
    )


def _ask(policy: Policy, slots: int, active: dict, timing: RolloutTiming) -> np.ndarray:
    """Return a chunk per slot [N, H, A]; free slots repeat another's observation."""
    filler = next(iter(active.values()))
    rows = [active.get(slot, filler) for slot in range(slots)]
    keys = (*policy.observation_keys, "timestep_mask")
    begin = time.perf_counter()
    chunks = policy.sample_batch(
        [{k: r.observation[k] for k in keys} for r in rows],
        [r.task for r in rows],
        [_noise_seed(r) for r in rows],
    )
    timing.policy_seconds += time.perf_counter() - begin
    timing.policy_calls += 1
    return chunks


def _execute(
    pool: EnvPool, chunks: np.ndarray, active: dict, finish: Any, timing: RolloutTiming
) -> None:
    """Let every active slot execute its chunk; end the episodes that are over."""
    begin = time.perf_counter()
    replies = pool.run({slot: StepCommand(chunks[slot]) for slot in active})
    timing.environment_seconds += time.perf_counter() - begin
    for slot, reply in replies.items():
        if isinstance(reply, EnvCrash):
            finish(slot, None, _crashed(reply))
            continue
        running = active[slot]
        running.observation, reward, terminated, truncated, info = reply
        running.total += reward
        running.actions.append(info["actions"])
        timing.environment_steps += len(info["actions"])
        if "instead" in info:  # reset cannot know; all else stays as the policy was told it
            running.info = {**running.info, "instead": info["instead"]}
        if terminated or truncated:
            success = bool(info["success"])
            finish(slot, success, "" if success else info["failure"] or "time ran out")


def film(
    pool: EnvPool, rows: Sequence[ResultRow], directory: Path
) -> Iterator[list[np.ndarray] | str]:
    """Play episodes again from their actions; yields each one's pictures, uint8 [h, w, 3].

    In place of them a sentence where an episode ends otherwise than its row says: the simulator
    does not repeat itself, and the pictures would show something that did not happen.
    """
    for start in range(0, len(rows), pool.slots):
        part = rows[start : start + pool.slots]
        commands = {}
        for slot, row in enumerate(part):
            episode, actions = episode_of(row), np.load(directory / row["actions"])
            commands[slot] = CallCommand(replay, (episode.seed, episode.options, actions))
        replies = pool.run(commands)
        for slot, row in enumerate(part):
            reply = replies[slot]
            none = "No film of {skill}, {split}, seed {seed}".format(**row)
            if isinstance(reply, EnvCrash):
                yield f"{none}: when played again it {_crashed(reply)}."
                continue
            pictures, info = reply
            found = _ending(info["success"], len(pictures) - 1)
            expected = _ending(row["success"], row["steps"])
            yield (
                pictures
                if found == expected
                else (
                    f"{none}: the simulator did not repeat the episode; played again from the same "
                    f"actions it ended with {found}, the results say {expected}."
                )
            )


def _ending(success: bool, steps: int) -> str:
    return f"{'success' if success else 'failure'} after {steps} steps"


def _row(label: str, running: _Running, success: bool | None, failure: str) -> dict[str, Any]:
    # Where another task than the table was laid for is asked for: whether that one was done.
    instead = {"instead": bool(running.info["instead"])} if "instead" in running.info else {}
    return {
        "policy": label,
        **dataclasses.asdict(running.episode),
        "task": running.info.get("task", ""),
        "instruction": running.info.get("instruction", ""),
        "success": success,
        "failure": failure,
        "steps": running.steps,
        "return": running.total,
        **instead,
    }


def episode_of(row: ResultRow) -> EpisodePlan:
    """Return the episode that a row tells of."""
    return EpisodePlan(row["split"], row["skill"], row["seed"])


def _noise_seed(running: _Running) -> int:
    return int(np.random.SeedSequence([running.episode.seed, running.steps]).generate_state(1)[0])


def _crashed(crash: EnvCrash) -> str:
    return f"crashed: {crash.text.strip().splitlines()[-1]}"
