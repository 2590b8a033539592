"""What stands between a policy and an environment: history, chunk execution, ensembling.

Wrappers follow gymnasium's protocol (reset, step, render, close) and nest from the inside out:

    env                      step(action [A])         observation of one moment
    History(env, 2)          step(action [A])         observation of the last W moments
    ChunkExecution(…, 4)     step(chunk [H, A])       executes k of the chunk's H actions

History is the inner one: it must see every step, not only the last of each chunk.

Temporal ensembling, here for k = 1 and H = 3. Each chunk (a row) predicts the actions of three
moments; the action executed at a moment is the weighted mean of its column, with weight exp(-m ·
age) for a prediction made `age` steps ago, so that the newest counts most:

    moment   0    1    2    3
    chunk 0  a00  a01  a02
    chunk 1       a11  a12  a13      moment 2: a22 + exp(-m) a12 + exp(-2m) a02, over 1 + …
    chunk 2            a22  a23  …

Gripper dimensions are not averaged: between open and closed there is nothing to want.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

Observation = dict[str, Any]
StepResult = tuple[Observation, float, bool, bool, dict[str, Any]]


class Wrapper:
    """An environment around another one; what is not overridden is the inner one's."""

    def __init__(self, env: Any) -> None:
        self.env = env

    def __getattr__(self, name: str) -> Any:
        if name == "env":  # while unpickling there is no inner environment yet
            raise AttributeError(name)
        return getattr(self.env, name)

    @property
    def unwrapped(self) -> Any:
        """The innermost environment."""
        return getattr(self.env, "unwrapped", self.env)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Start an episode; returns (observation, info)."""
        return self.env.reset(seed=seed, options=options)

    def step(self, action: np.ndarray) -> StepResult:
        """Act; returns (observation, reward, terminated, truncated, info)."""
        return self.env.step(action)


class History(Wrapper):
    """Stacks the last W observations: each array gets a leading axis W, oldest first.

    Before W observations were made, the first is repeated in front and marked False in
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
        return self._stacked(), info

    def step(self, action: np.ndarray) -> StepResult:
        """Act and append what is seen then."""
        observation, *rest = self.env.step(action)
        self._frames.append(observation)
        return self._stacked(), *rest

    def _stacked(self) -> Observation:
        lead = self._window - len(self._frames)
        frames = [self._frames[0]] * lead + list(self._frames)
        stacked = {key: np.stack([f[key] for f in frames]) for key in frames[-1]}
        stacked["timestep_mask"] = np.arange(self._window) >= lead
        return stacked


class TemporalEnsemble:
    """Merges overlapping action chunks; see the module's drawing."""

    def __init__(self, decay: float, execute: int, gripper: Sequence[bool]) -> None:
        """Set up.

        Args:
            decay: m per step of age, above 0.
            execute: k, steps between two chunks.
            gripper: per action dimension, True where the newest prediction is taken as it is.
        """
        if not decay > 0:
            raise ValueError(f"the ensemble's decay is {decay}; it must be above 0")
        self._decay, self._execute = decay, execute
        self._gripper = np.asarray(gripper, bool)
        self._chunks: list[np.ndarray] = []

    def reset(self) -> None:
        """Forget the chunks of the last episode."""
        self._chunks.clear()

    def add(self, chunk: np.ndarray) -> np.ndarray:
        """Take the newest chunk [H, A]; returns the k actions [k, A] to execute now."""
        if chunk.shape[-1] != len(self._gripper):
            raise ValueError(
                f"the chunk has {chunk.shape[-1]} action dimensions; expected {len(self._gripper)}"
            )
        k = self._execute
        # A chunk that is n calls old predicts the coming moment at its index n·k.
        self._chunks = [chunk, *self._chunks][: -(-len(chunk) // k)]
        merged = np.zeros((k, chunk.shape[-1]))
        total = np.zeros((k, 1))
        for calls, old in enumerate(self._chunks):
            part = old[calls * k : calls * k + k]
            weight = np.exp(-self._decay * calls * k)
            merged[: len(part)] += weight * part
            total[: len(part)] += weight
        merged /= total
        return np.where(self._gripper, chunk[:k], merged).astype(chunk.dtype)


class ChunkExecution(Wrapper):
    """Executes k actions of each chunk [H, A]; rewards add up, an episode's end stops the chunk.

    `info["actions"]` are the actions that were executed, float32 [≤ k, A].
    """

    def __init__(
        self,
        env: Any,
        execute: int,
        ensemble: float = 0.0,
        gripper: Sequence[bool] = (),
    ) -> None:
        """Wrap.

        Args:
            env: takes single actions.
            execute: k.
            ensemble: decay of temporal ensembling; 0: off.
            gripper: for ensembling, per action dimension: True for those not to be averaged.
        """
        super().__init__(env)
        if execute < 1:
            raise ValueError(f"execute is {execute}; it must be at least 1")
        self._execute = execute
        self._ensemble = TemporalEnsemble(ensemble, execute, gripper) if ensemble else None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Start an episode; chunks of the last one are forgotten."""
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
            raise ValueError("the chunk holds actions that are not finite")
        actions = self._ensemble.add(chunk) if self._ensemble else chunk[: self._execute]
        total, done = 0.0, []
        for action in actions:
            observation, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            done.append(action)
            if terminated or truncated:
                break
        return observation, total, terminated, truncated, {**info, "actions": np.stack(done)}


def replay(
    env: Any, seed: int, options: dict[str, Any], actions: np.ndarray
) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Play an episode again from its actions [T, A].

    Returns the T + 1 pictures that the innermost environment renders, and the last `info`.
    """
    env = getattr(env, "unwrapped", env)
    _, info = env.reset(seed=seed, options=options)
    pictures = [env.render()]
    for action in actions:
        *_, info = env.step(action)
        pictures.append(env.render())
    return pictures, info


def spaces(env: Any) -> tuple[tuple[int, ...], dict[str, tuple[int, ...]]]:
    """Return the shape of an environment's actions, and the shapes of what it observes."""
    observation = env.observation_space.spaces
    return env.action_space.shape, {key: space.shape for key, space in observation.items()}
