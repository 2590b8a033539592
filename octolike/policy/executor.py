"""Executor: from single observations to single actions; inference runs while the robot moves.

    executor = Executor(policy, task, ExecutionSettings(execute=4, real_time="guided"))
    report = ControlLoop(robot, executor, hz=10, stop=lambda: "done" if robot.done else "").run()

`policy` is a `Policy` or a `RemotePolicy` (octolike.policy.client). Numpy only. At every step:

    1. the observation enters the history
    2. a chunk that has arrived replaces the planned actions from its own step on: the actions that
       came too late are skipped
    3. if `execute` steps have passed since the last request, and no gripper has just opened
       (`release`), the next chunk is requested; a thread computes it while the robot executes the
       present one
    4. the planned action is returned

The delay that real-time chunking must bridge is the longest of the last inferences, in steps.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from octolike.policy.execution import (
    ActionPrefix,
    ChunkPlan,
    ExecutionSettings,
    FrameHistory,
    PolicyBusyError,
    plan_for,
)

RECENT = 10  # inferences; the longest of their delays is expected next


class ChunkPolicy(Protocol):
    """The part of `Policy` and `RemotePolicy` that an executor uses."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The description of the policy for a robot; `Policy.metadata`."""

    def sample_actions(
        self,
        observation: Mapping[str, Any],
        task: Any,
        seed: int = 0,
        prefix: ActionPrefix | None = None,
    ) -> np.ndarray:
        """Return an action chunk float32 [H, A] in the robot's units."""


class Robot(Protocol):
    """A robot: its sensors and its motors."""

    def observe(self) -> Mapping[str, Any]:
        """Return the newest observation: image_<camera> uint8 [h, w, 3], proprio float [P]."""

    def act(self, action: np.ndarray) -> None:
        """Command an action float [A]; return at once."""


class Executor:
    """Executes the chunks of a policy for one task on one robot.

    Attributes:
        settings: how chunks are executed.
        delays: steps that the last inferences took.
        held: steps without a planned action, in which the robot held still.
        has_plan: whether the last step had a planned action.
        inferences: chunks received in this episode.
        refused: requests of this episode that a busy server refused; they were made again.
        seconds: durations of the last inferences.
    """

    def __init__(
        self,
        policy: ChunkPolicy,
        task: Any,
        settings: ExecutionSettings | None = None,
        *,
        seed: int = 0,
        asynchronous: bool = True,
    ) -> None:
        """Set up for the first episode.

        Args:
            policy: local or remote.
            task: from its `create_task`.
            settings: default: `ExecutionSettings()`.
            seed: seed of the sampling noise; it changes with every inference.
            asynchronous: infer in a thread. False: `step` waits for each chunk, as if no time
                passed, e.g. in a simulator without a clock.

        Raises:
            ValueError: the settings do not fit the policy.
        """
        self.settings = settings or ExecutionSettings()
        self._policy, self._task, self._seed = policy, task, seed
        self._plan: ChunkPlan = plan_for(policy, self.settings)
        self._history = FrameHistory(policy.metadata["window"])
        self._pool = ThreadPoolExecutor(1, "inference") if asynchronous else None
        self.delays: deque[int] = deque(maxlen=RECENT)
        self.seconds: deque[float] = deque(maxlen=RECENT)
        self._pending: Future[np.ndarray] | None = None
        self.reset()

    def reset(self, task: Any = None) -> None:
        """Start an episode, with another task if one is given; a chunk on its way is dropped."""
        self._task = self._task if task is None else task
        if self._pending is not None:
            self._pending.cancel()
        self._pending = None
        self._plan.clear()
        self._history.clear()
        self.held = self.inferences = self.refused = 0
        self.has_plan = False
        self._since, self._start = self.settings.execute, 0  # steps since, plan step of, a request

    def step(self, observation: Mapping[str, Any]) -> np.ndarray | None:
        """Return the action [A] of this step; None while nothing was ever planned.

        Errors of the policy are raised here: the robot must then be stopped. A busy server is
        asked again, while the robot executes the rest of its plan.
        """
        self._history.append(observation)
        self._receive()
        if self._pending is None and (
            (self._since >= self.settings.execute and not self._plan.is_releasing)
            or not self._plan.remaining
        ):
            self._request()
            self._receive()  # at once, if inference is synchronous
        self._since += 1
        is_waiting = self._pending is not None and self.settings.overlap == "wait"
        self.has_plan = self._plan.remaining > 0 and not is_waiting
        self.held += not self.has_plan and self.inferences > 0
        return self._plan.next() if self.has_plan else self._plan.hold()

    @property
    def expected_delay(self) -> int:
        """The longest of the last delays, in steps; 0 before the first."""
        return max(self.delays, default=0)

    def close(self) -> None:
        """Wait for a chunk on its way, and end the thread."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(self) -> None:
        seed = int(np.random.SeedSequence([self._seed, self.inferences]).generate_state(1)[0])
        prefix = self._plan.prefix(self.expected_delay)
        arguments = self._history.stacked(), self._task, seed, prefix
        self._since, self._start = 0, self._plan.step
        if self._pool is not None:
            self._pending = self._pool.submit(self._infer, *arguments)
            return
        self._pending = Future()
        try:
            self._pending.set_result(self._infer(*arguments))
        except PolicyBusyError as error:
            self._pending.set_exception(error)

    def _infer(self, *arguments: Any) -> np.ndarray:
        start = time.monotonic()
        chunk = self._policy.sample_actions(*arguments)
        self.seconds.append(time.monotonic() - start)
        return chunk

    def _receive(self) -> None:
        """Plan with a chunk that has arrived."""
        if self._pending is None or not self._pending.done():
            return
        pending, self._pending = self._pending, None
        try:
            chunk = pending.result()
        except PolicyBusyError:
            self.refused += 1
            self._since = self.settings.execute
            return
        if self.inferences:  # the first one finds the robot at rest, and may compile
            self.delays.append(self._since)
        self._plan.add(chunk, self._start)
        self.inferences += 1


@dataclasses.dataclass
class LoopReport:
    """The outcome of a control loop.

    reason: why it ended. steps: actions sent. overruns: steps that began after the next one was
    due; the missed ones are skipped, not caught up. jitter: milliseconds by which steps began late,
    {"p50", "p99", "max"}. held: steps without a planned action. delay: the longest of the last
    inferences, in steps; inference_ms: their median. refused: requests that a busy server refused.
    """

    reason: str
    steps: int
    seconds: float
    overruns: int
    jitter: dict[str, float]
    held: int
    inferences: int
    delay: int
    inference_ms: float
    refused: int = 0

    def sentence(self) -> str:
        """Return the report as one line."""
        refused = f", {self.refused} requests refused by a busy server" if self.refused else ""
        return (
            f"{self.reason}: {self.steps} steps in {self.seconds:.1f} s "
            f"({self.steps / max(self.seconds, 1e-9):.1f} Hz), jitter p50/p99/max "
            f"{self.jitter['p50']:.1f}/{self.jitter['p99']:.1f}/{self.jitter['max']:.1f} ms, "
            f"{self.overruns} overruns, {self.inferences} inferences of "
            f"{self.inference_ms:.0f} ms, at most {self.delay} steps late, {self.held} steps held"
            f"{refused}"
        )


class ControlLoop:
    """Calls an executor at a fixed rate, on the monotonic clock, until a condition stops it."""

    def __init__(
        self,
        robot: Robot,
        executor: Executor,
        hz: float,
        *,
        stop: Callable[[], str] = lambda: "",
        max_steps: int = 0,
        patience: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Set up.

        Args:
            robot: commanded once per step; not commanded before the first chunk.
            executor: computes the actions.
            hz: steps per second, those of the training data (`metadata["control_hz"]`).
            stop: called at every step; a reason ends the loop, "" does not.
            max_steps: ends the loop; 0: no limit.
            patience: seconds without a planned action, after the first chunk, before the loop ends.
            clock: seconds that never go back; another one for tests.
            sleep: waits for seconds of that clock.
        """
        if not hz > 0:
            raise ValueError(f"hz is {hz}; it must be above 0")
        self._robot, self._executor, self._period = robot, executor, 1 / hz
        self._stop, self._max_steps, self._patience = stop, max_steps, patience
        self._clock, self._sleep = clock, sleep

    def run(self) -> LoopReport:
        """Run one episode; Ctrl-C ends it, too."""
        executor, late, overruns, steps, held_in_row = self._executor, [], 0, 0, 0
        executor.reset()
        begin = due = self._clock()
        reason = ""
        try:
            while not (reason := self._reason(steps, held_in_row)):
                late.append(self._clock() - due)
                action = executor.step(self._robot.observe())
                held_in_row = (
                    held_in_row + 1 if executor.inferences and not executor.has_plan else 0
                )
                if action is not None:
                    self._robot.act(action)
                    steps += 1
                due += self._period
                missed = int((self._clock() - due) // self._period) + 1
                if missed > 0:
                    overruns += missed
                    due += missed * self._period
                self._sleep(max(0.0, due - self._clock()))
        except KeyboardInterrupt:
            reason = "interrupted"
        return self._report(reason, steps, self._clock() - begin, overruns, late)

    def _reason(self, steps: int, held_in_row: int) -> str:
        if self._max_steps and steps >= self._max_steps:
            return "step limit"
        if held_in_row * self._period > self._patience:
            return f"no planned action for {self._patience:g} s"
        return self._stop()

    def _report(
        self, reason: str, steps: int, seconds: float, overruns: int, late: list[float]
    ) -> LoopReport:
        executor = self._executor
        p50, p99 = (1e3 * np.percentile(late or [0.0], q) for q in (50, 99))
        return LoopReport(
            reason=reason,
            steps=steps,
            seconds=seconds,
            overruns=overruns,
            jitter={"p50": float(p50), "p99": float(p99), "max": 1e3 * max(late, default=0.0)},
            held=executor.held,
            inferences=executor.inferences,
            delay=executor.expected_delay,
            inference_ms=1e3 * float(np.median(executor.seconds or [0.0])),
            refused=executor.refused,
        )
