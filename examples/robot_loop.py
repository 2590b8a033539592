"""A policy on a robot at a fixed rate; inference runs while the robot moves.

    python examples/robot_loop.py runs/quickstart --instruction "lift the red cube"
    python examples/robot_loop.py runs/quickstart --slow 0.5 --real-time guided

The robot is the simulated table in a process of its own: it moves at its own rate whether or not a
command arrives, as a real one does. `--slow` delays every inference. Replace `Table` by the driver
of your robot: two methods, `observe` and `act`. Expect one line with the outcome, the rate, the
jitter and the delay of the chunks.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from octolike.policy.execution import ExecutionSettings
from octolike.policy.executor import ControlLoop, Executor, LoopReport

LIMITS = np.array([0.05, 0.05, 0.05, 0.3, 0.3, 0.3])  # metres, radians per step: the robot's own


class Table:
    """The robot: `octolike.policy.executor.Robot`, and a reason to stop."""

    def __init__(self, environment: dict[str, Any], seed: int, hz: float) -> None:
        """Start the table's process with a task that `seed` draws; wait until it stands."""
        context = multiprocessing.get_context("spawn")  # a forked child would share jax's threads
        self._pipe, child = context.Pipe()
        self._process = context.Process(
            target=run_table, args=(child, environment, seed, hz), daemon=True
        )
        self._process.start()
        child.close()
        self._outcome = ""
        self._observation, self.instruction = self._pipe.recv()

    def start(self) -> None:
        """Let time pass on the table."""
        self._pipe.send(None)

    def observe(self) -> dict[str, np.ndarray]:
        """Return the newest observation."""
        while self._pipe.poll():
            self._observation, self._outcome = self._pipe.recv()
        return self._observation

    def act(self, action: np.ndarray) -> None:
        """Command a motion; one beyond the robot's limits stops it instead."""
        if (np.abs(action[:6]) > 2 * LIMITS).any():
            self._outcome = f"refused the action {np.round(action, 3).tolist()}"
        elif not self._outcome:
            self._pipe.send(action)

    def stop(self) -> str:
        """Return why the robot must stop, or ''."""
        return self._outcome

    def close(self) -> None:
        """End the table's process."""
        self._pipe.close()
        self._process.join(10)


def run_table(pipe: Connection, environment: dict[str, Any], seed: int, hz: float) -> None:
    """Move the table at its rate until its episode or the connection ends."""
    from octolike.envs.registry import make_env

    env = make_env(environment)
    observation, info = env.reset(seed=seed)
    try:
        pipe.send((observation, info["instruction"]))
        pipe.recv()  # start
        action, due, outcome = np.zeros(7), time.monotonic(), ""
        action[6] = observation["proprio"][6] > 0.5  # the gripper stays as it is
        while not outcome:
            due += 1 / hz
            time.sleep(max(0.0, due - time.monotonic()))
            action[:6] = 0  # a motion is executed once; without a new one the robot stands
            while pipe.poll():  # the newest command counts
                action = np.array(pipe.recv(), float)
            observation, _, terminated, truncated, info = env.step(action)
            if terminated or truncated:
                outcome = "success" if info["success"] else info["failure"] or "time ran out"
            pipe.send((observation, outcome))
        pipe.recv()  # until the other side closes
    except (EOFError, ConnectionError):
        pass
    env.close()


class SlowPolicy:
    """A policy with every inference delayed by `seconds`."""

    def __init__(self, policy: Any, seconds: float) -> None:
        self._policy, self._seconds, self.metadata = policy, seconds, policy.metadata

    def sample_actions(self, *args: Any) -> np.ndarray:
        """Return the policy's actions, late."""
        time.sleep(self._seconds)
        return self._policy.sample_actions(*args)


def drive(
    policy: Any,
    environment: dict[str, Any],
    settings: ExecutionSettings,
    *,
    instruction: str = "",
    seed: int = 0,
    hz: float = 5.0,
    slow: float = 0.0,
    max_steps: int = 100,
) -> LoopReport:
    """Run one episode on the table; instruction: by default that of the table's own task."""
    with contextlib.closing(Table(environment, seed, hz)) as table:
        task = policy.create_task(instruction=instruction or table.instruction)
        with Executor(SlowPolicy(policy, slow), task, settings, seed=seed) as executor:
            table.start()
            loop = ControlLoop(table, executor, hz, stop=table.stop, max_steps=max_steps)
            return loop.run()


def main() -> None:
    """Run an episode with the policy of a run, here or behind a server."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="run directory, or ws://host:port of octolike serve")
    parser.add_argument("--instruction", default="", help="default: the table's own task")
    parser.add_argument("--execute", type=int, default=2, help="steps between two inferences")
    parser.add_argument("--real-time", default="", choices=("", "guided", "trained"))
    parser.add_argument("--slow", type=float, default=0.0, help="seconds added to each inference")
    parser.add_argument("--seed", type=int, default=0, help="of the scene and the noise")
    args = parser.parse_args()
    if args.run.startswith(("ws://", "wss://")):
        from octolike.policy.client import RemotePolicy

        policy: Any = RemotePolicy(args.run)
    else:
        from octolike.policy import Policy

        policy = Policy.load(args.run)
        policy.warmup()  # the first call would compile for seconds
    settings = ExecutionSettings(execute=args.execute, real_time=args.real_time)
    report = drive(
        policy,
        {"kind": "tabletop", "primary_size": 64, "wrist_size": 48},
        settings,
        instruction=args.instruction,
        seed=args.seed,
        hz=policy.metadata["control_hz"],
        slow=args.slow,
    )
    print(report.sentence())


if __name__ == "__main__":
    main()
