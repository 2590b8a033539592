"""Wrappers between a policy and an environment: history, chunk execution, ensembling.

Wrappers follow gymnasium's protocol (reset, step, render, close) and nest from the inside out:

    env                      step(action [A])         observation of one step
    History(env, 2)          step(action [A])         observation of the last W steps
    ChunkExecution(…, 4)     step(chunk [H, A])       executes k of the chunk's H actions

History is the inner wrapper, since it needs every step, not only the last one of each chunk.

Temporal ensembling, here for k = 1 and H = 3. Each chunk (a row) predicts the actions of three
steps; the action executed at a step is the weighted mean of its column. A prediction made `age`
steps ago has weight exp(-m · age), so the newest counts most:

    step     0    1    2    3
    chunk 0  a00  a01  a02
    chunk 1       a11  a12  a13      step 2: a22 + exp(-m) a12 + exp(-2m) a02, over 1 + …
    chunk 2            a22  a23  …

Gripper dimensions are not averaged: a mean of open and closed is neither.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

Observation = dict[str, Any]
StepResult = tuple[Observation, float, bool, bool, dict[str, Any]]


class Wrapper:
    """An environment around another one; attributes it lacks are the inner environment's."""

    def __init__(self, env: Any) -> None:
        self.env = env

    def __getattr__(self, name: str) -> Any:
        if name == "env":  # during unpickling there is no inner environment yet
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


class History(Wrapper):
    """Stacks the last W observations: each array gets a leading axis W, oldest first.

    Early in an episode the first observation is repeated at the front, with False in
    `timestep_mask` bool [W], as in training.
    """

    def __init__(self, env: Any, window: int) -> None:
        super().__init__(env)
        if window < 1:
            raise ValueError(f"window is {window}; it must be at least 1")
        self._window = window
        self._frames: deque[Observation] = deque(maxlen=window)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Start an episode with an empty history."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._frames.clear()
        self._frames.append(observation)
        return self._stack(), info

    def step(self, action: np.ndarray) -> StepResult:
        """Act and append the new observation."""
        observation, *outcome = self.env.step(action)
        self._frames.append(observation)
        return self._stack(), *outcome

    def _stack(self) -> Observation:
        padding = self._window - len(self._frames)
        frames = [self._frames[0]] * padding + list(self._frames)
        stacked = {key: np.stack([f[key] for f in frames]) for key in frames[-1]}
        stacked["timestep_mask"] = np.arange(self._window) >= padding
        return stacked


class TemporalEnsemble:
    """Merges overlapping action chunks; see the drawing at the top of this file."""

    def __init__(self, decay: float, execute: int, gripper: Sequence[bool]) -> None:
        """Set up.

        Args:
            decay: m per step of age, above 0.
            execute: k, steps between two chunks.
            gripper: per action dimension, True to use the newest prediction unchanged.
        """
        if not decay > 0:
            raise ValueError(f"the ensemble's decay is {decay}; it must be above 0")
        self._decay, self._execute = decay, execute
        self._gripper = np.asarray(gripper, bool)
        self._chunks: list[np.ndarray] = []

    def reset(self) -> None:
        """Forget the chunks of the previous episode."""
        self._chunks.clear()

    def add(self, chunk: np.ndarray) -> np.ndarray:
        """Add the newest chunk [H, A]; return the k actions [k, A] to execute now."""
        if chunk.shape[-1] != len(self._gripper):
            raise ValueError(
                f"the chunk has {chunk.shape[-1]} action dimensions; expected {len(self._gripper)}"
            )
        k = self._execute
        # A chunk added n calls ago predicts the present step at index n·k.
        self._chunks = [chunk, *self._chunks][: -(-len(chunk) // k)]
        merged = np.zeros((k, chunk.shape[-1]))
        total = np.zeros((k, 1))
        for calls, past_chunk in enumerate(self._chunks):
            part = past_chunk[calls * k : calls * k + k]
            weight = np.exp(-self._decay * calls * k)
            merged[: len(part)] += weight * part
            total[: len(part)] += weight
        merged /= total
        return np.where(self._gripper, chunk[:k], merged).astype(chunk.dtype)


class ChunkExecution(Wrapper):
    """Executes k actions of each chunk [H, A] and sums their rewards; stops at an episode's end.

    `info["actions"]` contains the executed actions, float32 [≤ k, A].
    """

    def __init__(
        self,
        env: Any,
        execute: int,
        ensemble: float = 0.0,
        gripper: Sequence[bool] = (),
    ) -> None:
        """Wrap an environment that takes single actions.

        Args:
            env: the inner environment.
            execute: k.
            ensemble: decay of temporal ensembling; 0 for none.
            gripper: per action dimension, True to exclude it from ensembling.
        """
        super().__init__(env)
        if execute < 1:
            raise ValueError(f"execute is {execute}; it must be at least 1")
        self._execute = execute
        self._ensemble = TemporalEnsemble(ensemble, execute, gripper) if ensemble else None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Start an episode and forget the chunks of the previous one."""
        if self._ensemble:
            self._ensemble.reset()
        return self.env.reset(seed=seed, options=options)

    def step(self, chunk: np.ndarray) -> StepResult:
        """Execute k actions of a chunk."""
        chunk = np.asarray(chunk)
        if chunk.ndim != 2 or len(chunk) < self._execute:
            raise ValueError(
                f"the chunk has shape {list(chunk.shape)}; expected [H, A] "
                f"with H at least {self._execute}"
            )
        if not np.isfinite(chunk).all():
            raise ValueError("the chunk contains non-finite actions")
        actions = self._ensemble.add(chunk) if self._ensemble else chunk[: self._execute]
        total, executed = 0.0, []
        for action in actions:
            observation, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            executed.append(action)
            if terminated or truncated:
                break
        return observation, total, terminated, truncated, {**info, "actions": np.stack(executed)}


def spaces(env: Any) -> tuple[tuple[int, ...], dict[str, tuple[int, ...]]]:
    """Return (shape of an action, {key: shape of the observation})."""
    observation = env.observation_space.spaces
    return env.action_space.shape, {key: space.shape for key, space in observation.items()}
