"""Scripted experts, and episodes recorded from them with noise.

The expert decides from the present state alone (no timers, no memory), so that what it does can be
read off one observation: behaviour cloning then has a function to learn.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from octolike.envs import environment
from octolike.envs.tabletop import conventions
from octolike.envs.tabletop import tabletop_tasks as tasks
from octolike.envs.tabletop.scene import SIZE
from octolike.envs.tabletop.tabletop_env import MAX_MOVE, TabletopEnv
from octolike.envs.tabletop.tabletop_tasks import DIRECTIONS, TaskState

OPEN, CLOSED = 1.0, 0.0
SPEED = 0.04  # metres per axis and step; less than MAX_MOVE, so that noise can also speed it up
# All lengths in metres. Heights are those of the fingertips unless they say otherwise.
_GRASP_HEIGHT = 0.022
_HOVER_HEIGHT = 2 * SIZE + 0.006  # just over the objects
_CARRY_HEIGHT = 0.14
_DROP_HEIGHT = 0.075  # over a bowl
_PUSH_HEIGHT = 0.025
_BEHIND = 0.06  # from the object's centre to where a push begins
_ALIGNED = 0.012


class TabletopExpert:
    """Solves the task of the env's present episode by reading the simulator's state."""

    def __init__(self, env: TabletopEnv) -> None:
        self._env = env

    def act(self) -> np.ndarray:
        """Return the action for the present state, in the env's own convention: float32 [7]."""
        now, task = self._env.task_state(), self._env.task
        opening = self._env.pose()[6]
        if task.skill == "touch":
            move, gripper = _touch(now), CLOSED
        elif task.skill == "push":
            move, gripper = _push(now, np.array(DIRECTIONS[task.reference])), CLOSED
        elif task.skill in ("put", "stack") and tasks.placed(task, now):
            move, gripper = np.array([0, 0, SPEED * (opening > 0.8)]), OPEN
        elif now.grasped == task.target:
            move, gripper = _carry(now, task.skill)
        else:
            move, gripper = _grasp(now)
        action = np.array([*_limited(move), 0, 0, 0, gripper], np.float32)
        return conventions.to_robot(action, self._env.action_convention)


def _limited(move: np.ndarray) -> np.ndarray:
    """Shorten a move to what SPEED allows, keeping its direction."""
    return move * min(1.0, SPEED / max(np.abs(move).max(), 1e-9))


def _funnel(now: TaskState, goal: np.ndarray, height: float, slope: float) -> np.ndarray:
    """Move to `goal` over a funnel around it that is `height` high and rises by `slope`."""
    move = goal - now.tip
    distance = np.linalg.norm(move[:2])
    if distance > _ALIGNED:
        move[2] += height + np.clip(slope * (distance - 0.02), 0, 0.08)
    return move


def _touch(now: TaskState) -> np.ndarray:
    top = now.target + (0, 0, now.size)
    return _funnel(now, top - (0, 0, 0.01), height=0.015, slope=0.5)


def _push(now: TaskState, direction: np.ndarray) -> np.ndarray:
    offset = (now.tip - now.target)[:2]
    along = offset @ direction
    aside = offset - along * direction
    if now.tip[2] < 0.05 and along < -0.03 and np.linalg.norm(aside) < 0.02:
        onwards = SPEED * direction - aside
        return np.array([*onwards, _PUSH_HEIGHT - now.tip[2]])
    behind = np.array([*(now.target[:2] - _BEHIND * direction), _PUSH_HEIGHT])
    return _funnel(now, behind, height=0.02, slope=1.5)


def _grasp(now: TaskState) -> tuple[np.ndarray, float]:
    goal = now.target + (0, 0, _GRASP_HEIGHT - now.size)
    move = goal - now.tip
    if np.linalg.norm(move[:2]) < 0.008 and abs(move[2]) < 0.01:
        return move, CLOSED
    straddling = now.tip[2] < now.target[2] + now.size and (np.abs(move[:2]) < (0.035, 0.018)).all()
    if straddling:
        return move, OPEN
    return _funnel(now, goal, height=_HOVER_HEIGHT - _GRASP_HEIGHT, slope=0.5), OPEN


def _carry(now: TaskState, skill: str) -> tuple[np.ndarray, float]:
    if skill == "lift":
        return np.array([0, 0, SPEED]), CLOSED
    aside = (now.reference - now.target)[:2]
    distance = np.linalg.norm(aside)
    low = _DROP_HEIGHT
    if skill == "stack":
        held_at = now.target[2] - now.tip[2]
        low = now.reference[2] + 2 * now.size + 0.004 - held_at
    if distance < _ALIGNED and abs(now.tip[2] - low) < 0.006:
        return np.zeros(3), OPEN
    height = min(low + max(0.0, distance - _ALIGNED), _CARRY_HEIGHT)
    rise = height - now.tip[2]
    # Up first, then across, with a rounded corner: the objects around are as high as this one.
    return np.array([*(aside * np.clip(1 - rise / 0.08, 0.2, 1)), rise]), CLOSED


@dataclass(frozen=True)
class ExpertNoise:
    """What is added to the expert's moves, in metres per axis, so that recoveries are in the data.

    Attributes:
        share: the part of the steps that get gaussian noise of `deviation`.
        kicks: the chance that a kick of about `kick` starts at a step; it lasts one or two steps.
    """

    share: float = 0.5
    deviation: float = 0.008
    kicks: float = 0.05
    kick: float = 0.03


NO_NOISE = ExpertNoise(share=0.0, kicks=0.0)


def collect_episode(
    env: TabletopEnv,
    seed: int,
    split: str = "train",
    skills: Sequence[str] | None = None,
    noise: ExpertNoise | None = None,
) -> dict[str, Any]:
    """Record one demonstration; the caller drops those whose `success` is False.

    The label `action` is the expert's answer to the state that was visited; `executed_action` is
    that plus noise. One step is recorded per action, so the state after the last is not in.

    Args:
        env: the simulator; its episode is replaced.
        seed: decides task, layout and noise.
        split: one of `tasks.SPLITS`.
        skills: some of `tasks.SKILLS`; default all that the split has.
        noise: default `ExpertNoise()`; `NO_NOISE` for none.

    Returns:
        {"steps": {"observation": {"image_primary": uint8 [T, h, w, 3], "image_wrist": uint8
        [T, hw, hw, 3], "state": float32 [T, 7]}, "action": float32 [T, 7], "executed_action":
        float32 [T, 7], "language_instruction": str}, "episode_metadata": {"seed": int, "task":
        str, "skill": str, "split": str, "success": bool}}
    """
    observation, info = env.reset(seed=seed, options={"split": split, "skills": skills})
    expert, jolts = (
        TabletopExpert(env),
        _jolts(np.random.default_rng([seed, 1]), noise or ExpertNoise()),
    )
    observations, labels, executed = [], [], []
    done = False
    while not done:
        observations.append(observation)
        labels.append(expert.act())
        noisy = conventions.to_table(labels[-1], env.action_convention)
        noisy[:3] = np.clip(noisy[:3] + next(jolts), -MAX_MOVE, MAX_MOVE)
        executed.append(conventions.to_robot(noisy, env.action_convention))
        observation, _, terminated, truncated, info = env.step(executed[-1])
        done = terminated or truncated
    return environment.recorded(observations, labels, executed, info, seed=seed, split=split)


def _jolts(rng: np.random.Generator, noise: ExpertNoise) -> Iterator[np.ndarray]:
    """Yield what is added to each step's move: float64 [3] in metres."""
    while True:
        if rng.random() < noise.kicks:
            kick = rng.normal(size=3)
            kick *= noise.kick / np.linalg.norm(kick)
            for _ in range(rng.integers(1, 3)):
                yield kick
        elif rng.random() < noise.share:
            yield rng.normal(scale=noise.deviation, size=3)
        else:
            yield np.zeros(3)
