"""From action chunks to the actions that a robot executes: history and plan, no clock; numpy only.

A chunk [H, A] predicts the actions of the H steps from its observation on. It arrives `delay` steps
after that observation, so its first actions come too late; meanwhile the robot executes those of
the previous chunk (here H = 6, a chunk every 3 steps, delay 2):

    step          0   1   2   3   4   5   6   7   8
    chunk of 0    a0  a1  a2  a3  a4  a5
    chunk of 3                ·   ·   b2  b3  b4  b5
    executed      a0  a1  a2  a3  a4  b2  b3  …

The prefix of the chunk of step 3 is a3 a4 (the robot executes them in any case) and a5 (planned,
but b2 replaces it). Real-time chunking makes the new chunk continue it.

Temporal ensembling: the action of a step is the weighted mean of all chunks that predict it. A
prediction made `age` steps ago has the weight exp(−decay · age), so the newest counts most.
Dimensions in `gripper` are not averaged: a mean of open and closed is neither.
"""

from __future__ import annotations

import itertools
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

OVERLAPS = ("continue", "wait")
METHODS = ("guided", "trained")


class PolicyBusyError(RuntimeError):
    """The policy, on a server, cannot take a request now: ask again later."""


class NonFiniteActionsError(FloatingPointError):
    """Actions that a robot must not execute; rows: their examples of the batch."""

    def __init__(self, message: str, rows: Sequence[int]) -> None:
        super().__init__(message)
        self.rows = tuple(rows)

    def __reduce__(self) -> Any:
        return type(self), (self.args[0], self.rows)


def check_finite(actions: np.ndarray, message: str) -> None:
    """Raise NonFiniteActionsError for actions [B, …] of which some are not finite.

    message: has a place {bad} for the list of these examples.
    """
    bad = np.flatnonzero(~np.isfinite(actions).all(axis=tuple(range(1, actions.ndim)))).tolist()
    if bad:
        raise NonFiniteActionsError(message.format(bad=bad), bad)


class ActionPrefix(NamedTuple):
    """The actions that a robot plans for the first steps of a new chunk, in its units.

    actions: float [n, A], n ≤ H; delay: the number of them that the robot will have executed when
    the chunk arrives, at most n. method: of `METHODS`; "": that of the policy's head.
    """

    actions: np.ndarray
    delay: int
    method: str = ""


@dataclass(frozen=True, kw_only=True)
class ExecutionSettings:
    """How chunks are executed.

    Attributes:
        execute: steps between two inferences, at least 1.
        overlap: behaviour while a chunk is computed: "continue" with the previous chunk at the
            same time, or "wait" and hold still.
        real_time: "guided" or "trained": chunks continue the actions executed meanwhile; "": off.
        ensemble: decay of temporal ensembling; 0: off.
        gripper_band: a gripper keeps its target until a prediction differs by more than this;
            0: off. It stops a gripper that chatters about its threshold.
        release: number of further actions of the same chunk to execute after a gripper opens,
            before the next inference; 0: off. To a policy without memory, a hand that has just
            placed an object looks like one that is about to grasp it.
    """

    execute: int = 1
    overlap: str = "continue"
    real_time: str = ""
    ensemble: float = 0.0
    gripper_band: float = 0.0
    release: int = 0

    def __post_init__(self) -> None:
        if self.execute < 1:
            raise ValueError(f"execute is {self.execute}; it must be at least 1")
        if self.overlap not in OVERLAPS:
            raise ValueError(f"overlap is {self.overlap!r}; choose one of {', '.join(OVERLAPS)}")
        if self.real_time not in ("", *METHODS):
            raise ValueError(
                f"real_time is {self.real_time!r}; choose '' (off), {' or '.join(METHODS)}"
            )
        if self.real_time and (self.ensemble or self.overlap == "wait"):
            raise ValueError(
                "real-time chunking needs the plain chunks of a robot that continues: set ensemble "
                "to 0 and overlap to 'continue', or real_time to ''"
            )
        for name in ("ensemble", "gripper_band", "release"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")


class FrameHistory:
    """The last W observations of an episode."""

    def __init__(self, window: int) -> None:
        if window < 1:
            raise ValueError(f"window is {window}; it must be at least 1")
        self._window = window
        self._frames: deque[Mapping[str, Any]] = deque(maxlen=window)

    def clear(self) -> None:
        """Start an episode."""
        self._frames.clear()

    def append(self, observation: Mapping[str, Any]) -> None:
        """Add the observation of one step: arrays without a frame axis, None for no sensor."""
        self._frames.append(observation)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the newest observation."""
        return tuple(self._frames[-1]) if self._frames else ()

    def stacked(self) -> dict[str, Any]:
        """Return each array with a leading axis W, oldest first.

        Early in an episode the first observation is repeated at the front, with False in
        `timestep_mask` bool [W], as in training.
        """
        padding = self._window - len(self._frames)
        frames = [self._frames[0]] * padding + list(self._frames)
        stacked: dict[str, Any] = {
            key: None if value is None else np.stack([f[key] for f in frames])
            for key, value in frames[-1].items()
        }
        stacked["timestep_mask"] = np.arange(self._window) >= padding
        return stacked


class ChunkPlan:
    """The actions that one robot plans in one episode; see the drawings at the top of this file.

    Attributes:
        settings: how chunks are executed.
        step: the number of planned actions executed so far; steps of holding still do not count.
    """

    def __init__(
        self, settings: ExecutionSettings, absolute: Sequence[bool], gripper: Sequence[bool]
    ) -> None:
        """Set up.

        Args:
            settings: how chunks are executed.
            absolute: per action dimension, True for a target, which holding still repeats; a change
                is 0.
            gripper: per action dimension, True for targets that must not be averaged.
        """
        self.settings = settings
        self._absolute, self._gripper = np.asarray(absolute, bool), np.asarray(gripper, bool)
        self.clear()

    def clear(self) -> None:
        """Start an episode."""
        self.step = 0
        self._chunks: list[tuple[int, np.ndarray]] = []  # (step of its first action, chunk)
        self._last: np.ndarray | None = None
        self._released = 0  # actions that are still to be executed after a gripper opened

    @property
    def is_releasing(self) -> bool:
        """Whether the newest chunk is continued because a gripper has just opened."""
        return self._released > 0 and self.remaining > 0

    @property
    def remaining(self) -> int:
        """The number of steps from now on that the newest chunk covers."""
        return max(0, self._end - self.step)

    def prefix(self, delay: int) -> ActionPrefix | None:
        """Return the prefix of a chunk that starts now and arrives `delay` steps later."""
        if not self.settings.real_time or not self.remaining:
            return None
        start, chunk = self._chunks[0]
        actions = chunk[self.step - start :]
        return ActionPrefix(actions, min(delay, len(actions)), self.settings.real_time)

    def add(self, chunk: np.ndarray, start: int) -> None:
        """Add a chunk [H, A], predicted from the observation of the step `start`."""
        if chunk.ndim != 2 or chunk.shape[-1] != len(self._gripper):
            raise ValueError(
                f"the chunk has shape {list(chunk.shape)}; expected [H, {len(self._gripper)}]"
            )
        if not np.isfinite(chunk).all():
            raise ValueError("the chunk contains actions that are not finite")
        if not self.settings.ensemble:
            self._chunks.clear()
        self._chunks.insert(0, (start, chunk))

    def next(self) -> np.ndarray | None:
        """Return the action [A] of this step and go to the next; without one, hold still."""
        action = self._planned()
        if action is None:
            return self.hold()
        if self.settings.gripper_band and self._last is not None:
            is_near = np.abs(action - self._last) <= self.settings.gripper_band
            action = np.where(self._gripper & is_near, self._last, action)
        self._released = self.settings.release if self._opens(action) else self._released - 1
        self.step, self._last = self.step + 1, action
        return action

    def hold(self) -> np.ndarray | None:
        """Return the action [A] that holds still: targets are repeated, changes are 0.

        The plan's step stays. None before the first action.
        """
        return None if self._last is None else np.where(self._absolute, self._last, 0.0)

    def round(self, chunk: np.ndarray, delay: int) -> np.ndarray:
        """Return the actions [n, A] until the next inference, for a chunk that takes `delay` steps.

        For simulations, in which no time passes during inference. The first chunk of an episode
        has no delay: the robot starts when the chunk has arrived.
        """
        delay = 0 if self._last is None else delay
        start, actions = self.step, []
        if self.settings.overlap == "wait":
            actions, delay = [self.hold() for _ in range(delay)], 0
        steps = max(self.settings.execute, delay)
        for i in itertools.count():
            if i == delay:
                self.add(chunk, start)
            if i >= steps and not (i > delay and self.is_releasing):
                break
            actions.append(self.next())
        return np.stack([a for a in actions if a is not None]).astype(chunk.dtype)

    def _opens(self, action: np.ndarray) -> bool:
        """Return whether a gripper's target rises by more than half its range: 1 is open."""
        if not self.settings.release or self._last is None:
            return False
        return bool(((action - self._last)[self._gripper] > 0.5).any())

    @property
    def _end(self) -> int:
        return self._chunks[0][0] + len(self._chunks[0][1]) if self._chunks else 0

    def _planned(self) -> np.ndarray | None:
        """Return the planned action of this step, or None."""
        self._chunks = [(s, c) for s, c in self._chunks if self.step - s < len(c)]
        if not self._chunks:
            return None
        starts = np.array([start for start, _ in self._chunks])
        predictions = np.stack([chunk[self.step - start] for start, chunk in self._chunks])
        if len(predictions) == 1:
            return predictions[0]
        weights = np.exp(-self.settings.ensemble * (starts.max() - starts))
        mean = (weights[:, None] * predictions).sum(axis=0) / weights.sum()
        return np.where(self._gripper, predictions[0], mean).astype(predictions.dtype)


def plan_for(policy: Any, settings: ExecutionSettings) -> ChunkPlan:
    """Return an empty plan for a policy, local or remote, from its `metadata`.

    Raises ValueError if the settings do not fit its chunks or its head. Warns if changes are
    ensembled: they were predicted from states that the robot was not in.
    """
    horizon, can = policy.metadata["horizon"], policy.metadata["real_time"]
    if settings.execute > horizon:
        raise ValueError(
            f"execute is {settings.execute}; the policy predicts {horizon} actions at a time"
        )
    if settings.real_time and not can:
        raise ValueError(
            "real_time needs a policy with a diffusion or flow head; this one predicts a chunk in "
            "one pass: leave real_time empty"
        )
    if settings.real_time == "trained" and can != "trained":
        raise ValueError(
            "real_time is 'trained', but this policy was trained without prefixes "
            "(heads.action.prefix is 0); use 'guided'"
        )
    action = policy.metadata["action"]
    changes = [n for n, target in zip(action["names"], action["absolute"]) if not target]
    if settings.ensemble and changes:
        warnings.warn(
            f"temporal ensembling averages changes ({', '.join(changes)}) that were predicted from "
            "earlier states and no longer fit the present one; learn targets "
            "(data.representation), or use real_time instead",
            stacklevel=2,
        )
    return ChunkPlan(settings, action["absolute"], action["not_averaged"])


def check_prefix(prefix: ActionPrefix, horizon: int, width: int) -> None:
    """Raise ValueError unless a prefix has at most `horizon` finite actions of `width` numbers."""
    actions = np.asarray(prefix.actions)
    if actions.ndim != 2 or actions.shape[1] != width or len(actions) > horizon:
        raise ValueError(
            f"the prefix has actions {list(actions.shape)}; expected [n, {width}] with n at most "
            f"the chunk's {horizon}"
        )
    if not 0 <= prefix.delay <= len(actions):
        raise ValueError(
            f"the prefix has a delay of {prefix.delay} and {len(actions)} actions; the delay must "
            "be 0 to their number"
        )
    if not np.isfinite(actions).all():
        raise ValueError("the prefix has actions that are not finite")


def prefix_weights(delay: int, length: int, horizon: int) -> np.ndarray:
    """Return how closely a chunk must follow its prefix, float32 [H] (Black et al. 2025, eq. 5).

    1 for the `delay` known actions, then an exponential decay over the other planned ones, up to
    `length`; 0 beyond.
    """
    i = np.arange(horizon)
    c = np.clip((length - i) / (length - delay + 1), 0, 1)
    decay = c * np.expm1(c) / np.expm1(1)
    return np.where(i < delay, 1, np.where(i < length, decay, 0)).astype(np.float32)
