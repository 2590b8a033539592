"""Wrappers of environments: any environment, and one that executes sequences of actions.

Wrappers follow gymnasium's protocol (reset, step, render, close). The actions to
execute are planned from a policy's chunks in octolike.policy.execution, for simulators and robots.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

Observation = dict[str, Any]
StepResult = tuple[Any, float, bool, bool, dict[str, Any]]


class Wrapper:
    """An environment around another one; attributes it lacks are the inner environment's."""

    def __init__(self, env: Any) -> None:
        self.env = env

    def __getattr__(self, name: str) -> Any:
        if name == "env":  # during unpickling the inner environment is still missing
            raise AttributeError(name)
        return getattr(self.env, name)

    @property
    def unwrapped(self) -> Any:
        """The innermost environment."""
        return getattr(self.env, "unwrapped", self.env)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Start an episode; return (observation, info)."""
        return self.env.reset(seed=seed, options=options)

    def step(self, action: np.ndarray) -> StepResult:
        """Act; return (observation, reward, terminated, truncated, info)."""
        return self.env.step(action)


class ActionSequence(Wrapper):
    """Executes a sequence of actions [n, A] and sums their rewards; stops at an episode's end.

    `reset` and `step` return the observations of the last W steps as a list, oldest first, for the
    policy's history (octolike.policy.execution). `info["actions"]` contains the executed actions,
    float32 [≤ n, A]. An environment that has `act` and `observe`, its step in two halves, renders
    only these observations.
    """

    def __init__(self, env: Any, window: int) -> None:
        super().__init__(env)
        if window < 1:
            raise ValueError(f"window is {window}; it must be at least 1")
        self._window = window

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Start an episode."""
        observation, info = self.env.reset(seed=seed, options=options)
        return [observation], info

    def step(self, action: np.ndarray) -> StepResult:
        """Execute actions [n, A], n at least 1."""
        actions = np.asarray(action)
        if actions.ndim != 2 or not len(actions):
            raise ValueError(
                f"the actions have shape {list(actions.shape)}; expected [n, A] with n at least 1"
            )
        if not np.isfinite(actions).all():
            raise ValueError("the actions contain values that are not finite")
        total, executed = 0.0, []
        frames: deque[Observation] = deque(maxlen=self._window)
        is_lazy = hasattr(self.env, "act") and hasattr(self.env, "observe")
        for left, single in zip(range(len(actions), 0, -1), actions):
            if is_lazy:
                reward, terminated, truncated, info = self.env.act(single)
                if left <= self._window or terminated or truncated:
                    frames.append(self.env.observe())
            else:
                observation, reward, terminated, truncated, info = self.env.step(single)
                frames.append(observation)
            total += float(reward)
            executed.append(single)
            if terminated or truncated:
                break
        return list(frames), total, terminated, truncated, {**info, "actions": np.stack(executed)}


def spaces(env: Any) -> tuple[tuple[int, ...], dict[str, tuple[int, ...]], float]:
    """Return (shape of an action, {key: shape of the observation}, steps per second or 0).

    The rate is `metadata["control_hz"]`, of environments with a fixed rate.
    """
    observation = env.observation_space.spaces
    shapes = {key: space.shape for key, space in observation.items()}
    return env.action_space.shape, shapes, getattr(env, "metadata", {}).get("control_hz", 0.0)
