"""Measure the speed of closed-loop evaluation and the share of its parts.

    octolike benchmark evaluate                          the network of configs/tabletop.py
    octolike benchmark evaluate --config quickstart --slots 1,16 --workers 1
    octolike benchmark --output evaluate.json evaluate --rounds 60

Parameters are random: speed does not depend on them, and a policy that never succeeds keeps every
environment busy. Prints a row per number of environments that share one batched policy call.
`floor` is the time that physics and rendering take in one process; several workers can be faster.
"""

from __future__ import annotations

import argparse
import functools
import time
from typing import Any

import numpy as np


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.add_argument("--config", default="configs/tabletop.py", help="network and simulator")
    parser.add_argument(
        "--slots", default="1,4,16", help="numbers of parallel environments, comma-separated"
    )
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: one per core")
    parser.add_argument("--rounds", type=int, default=30, help="timed policy calls")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row per number of environments."""
    from octolike.config import load_module

    config = load_module(args.config).get_config("")
    return [_measure(args, config, int(n)) for n in args.slots.split(",")]


def _measure(args: argparse.Namespace, config: Any, slots: int) -> dict[str, Any]:
    from benchmarks._random_policy import random_policy

    from octolike.envs.pool import CallCommand, EnvPool, ResetCommand, StepCommand, default_workers
    from octolike.envs.registry import make_wrapped_env
    from octolike.policy.execution import FrameHistory

    workers, execute = args.workers or default_workers(slots), config.evaluate.execute
    policy = random_policy(config, slots)
    make = functools.partial(make_wrapped_env, dict(config.environment), policy.window)
    skill = config.evaluate.skills or tuple(config.collect.skills)
    options = {"split": "train", "skills": [skill[0]]}
    seconds = {"policy": 0.0, "environments": 0.0}
    with EnvPool(make, slots, workers) as pool:
        parts = pool.run({0: CallCommand(profile, (options,))})[0]
        replies = pool.run({s: ResetCommand(s, options) for s in range(slots)})
        task = policy.create_task(instruction=replies[0][1]["instruction"])
        histories = [FrameHistory(policy.window) for _ in range(slots)]
        steps = 0
        for number in range(args.rounds + 2):  # the first two warm up
            begin = time.perf_counter()
            for history, frame in ((histories[s], f) for s in range(slots) for f in replies[s][0]):
                history.append({key: frame[key] for key in policy.observation_keys})
            observations = [history.stacked() for history in histories]
            chunks = policy.sample_batch(observations, [task] * slots, list(range(slots)))
            middle = time.perf_counter()
            # without motion no episode ends before its limit
            still = np.zeros_like(chunks[:, :execute])
            replies = pool.run({s: StepCommand(still[s]) for s in range(slots)})
            end = time.perf_counter()
            over = [s for s in range(slots) if replies[s][2] or replies[s][3]]
            if number >= 2:
                seconds["policy"] += middle - begin
                seconds["environments"] += end - middle
                steps += sum(len(replies[s][4]["actions"]) for s in range(slots))
            for s in over:
                histories[s].clear()
            replies |= pool.run({s: ResetCommand(number, options) for s in over})
    total = sum(seconds.values())
    return {
        "environments": slots,
        "workers": workers,
        "environment steps/s": steps / total,
        "policy calls/s": args.rounds / total,
        "policy ms/call": 1e3 * seconds["policy"] / args.rounds,
        "actions/s of the policy": slots * args.rounds / seconds["policy"],
        "policy share": seconds["policy"] / total,
        "simulator share": seconds["environments"] / total,
        "rendering, of simulator": parts["rendering"] / sum(parts.values()),
        "physics ms/step": 1e3 * parts["physics"],
        "rendering ms/step": 1e3 * parts["rendering"],
        "floor ms/round": 1e3 * sum(parts.values()) * slots * execute,
        "ms/round": 1e3 * total / args.rounds,
    }


def profile(env: Any, options: dict[str, Any], steps: int = 40) -> dict[str, float]:
    """Return the seconds per step of physics and of rendering."""
    env = env.unwrapped
    env.reset(seed=0, options=options)
    still = np.zeros(env.action_space.shape, np.float32)
    total, rendering = [], []
    for _ in range(steps):
        begin = time.perf_counter()
        *_, terminated, truncated, _ = env.step(still)  # physics, then an observation
        middle = time.perf_counter()
        env.observe()
        total.append(middle - begin)
        rendering.append(time.perf_counter() - middle)
        if terminated or truncated:
            env.reset(seed=0, options=options)
    seconds = float(np.median(rendering))
    return {"physics": float(np.median(total)) - seconds, "rendering": seconds}
