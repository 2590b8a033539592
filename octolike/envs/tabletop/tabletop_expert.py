"""Scripted experts for the table, and demonstrations recorded from them with noise.

The expert's action depends on the present state alone (no timers, no memory), so it can be read off
one observation, and behaviour cloning has a function to learn.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from octolike.envs.environment import demonstration_record, last_images
from octolike.envs.tabletop import conventions
from octolike.envs.tabletop import tabletop_tasks as tasks
from octolike.envs.tabletop.scene import SIZE
from octolike.envs.tabletop.tabletop_env import MAX_MOVE, TabletopEnv
from octolike.envs.tabletop.tabletop_tasks import DIRECTIONS, TabletopTask, TaskState

OPEN, CLOSED = 1.0, 0.0
SPEED = 0.04  # metres per axis and step at 5 Hz; below MAX_MOVE, so that noise can also increase it
# Lengths in metres; heights are those of the fingertips.
_GRASP_HEIGHT = 0.022
_HOVER_HEIGHT = 2 * SIZE + 0.006  # just above the objects
_CARRY_HEIGHT = 0.14
_DROP_HEIGHT = 0.075  # above a bowl
# A bowl catches what is dropped so far from its middle, and so much above or below that height. As
# wide as it can be: a policy that has to hit a narrow place hangs there with a closed gripper.
_DROP_RADIUS, _DROP_MARGIN = 0.03, 0.02
_STACK_MARGIN = 0.006  # above or below the height of release on an object
_PUSH_HEIGHT = 0.025
_BEHIND = 0.06  # from the object's centre to the start of a push
_ALIGNED = 0.012


class TabletopExpert:
    """Solves the present task of an environment from the simulator's state."""

    def __init__(self, env: TabletopEnv) -> None:
        self._env = env

    def act(self) -> np.ndarray:
        """Return the action for the present state in the env's convention: float32 [7]."""
        state, task = self._env.task_state(), self._env.present_task
        opening = self._env.pose()[6]
        if task.skill == "touch":
            move, gripper = _touch(state), CLOSED
        elif task.skill == "push":
            move, gripper = _push(state, np.array(DIRECTIONS[task.reference])), CLOSED
        elif task.skill in ("put", "stack") and tasks.placed(task, state):
            move, gripper = np.array([0, 0, SPEED * (opening > 0.8)]), OPEN
        elif state.grasped == task.target:
            move, gripper = _carry(state, task.skill)
        else:
            move, gripper = _grasp(state, self._env.settings.gripper == "turned")
        move = _limit_speed(move, SPEED * self._env.step_share)
        action = np.array([*move, 0, 0, 0, gripper], np.float32)
        return conventions.to_robot(action, self._env.settings.action_convention)


def subtask(task: TabletopTask, state: TaskState) -> str:
    """Return the expert's present subtask, in words that name one object.

    While it is held, the target is "it". The words follow from the object in the hand, which a
    robot can feel: after placing they are those of the grasp, and the images show the hand retreat.
    """
    target, reference = task.target.words, task.reference.replace("_", " ")
    if task.skill == "touch":
        return f"touch the {target}"
    if task.skill == "push":
        return f"push the {target} to the {reference}"
    if state.grasped != task.target:
        return f"grasp the {target}"
    if task.skill == "lift":
        return "lift it"
    return f"put it {'into' if task.skill == 'put' else 'on'} the {reference}"


def _limit_speed(move: np.ndarray, speed: float) -> np.ndarray:
    """Shorten a move to `speed`, metres per axis and step, keeping its direction."""
    return move * min(1.0, speed / max(np.abs(move).max(), 1e-9))


def _funnel(state: TaskState, goal: np.ndarray, height: float, slope: float) -> np.ndarray:
    """Return a move to `goal` that stays above a funnel around it.

    The funnel is `height` above the goal and rises by `slope` with the distance.
    """
    move = goal - state.tip
    distance = np.linalg.norm(move[:2])
    if distance > _ALIGNED:
        move[2] += height + np.clip(slope * (distance - 0.02), 0, 0.08)
    return move


def _touch(state: TaskState) -> np.ndarray:
    top = state.target + (0, 0, state.size)
    return _funnel(state, top - (0, 0, 0.01), height=0.015, slope=0.5)


def _push(state: TaskState, direction: np.ndarray) -> np.ndarray:
    offset = (state.tip - state.target)[:2]
    along = offset @ direction
    sideways = offset - along * direction
    if state.tip[2] < 0.05 and along < -0.03 and np.linalg.norm(sideways) < 0.02:
        forward = SPEED * direction - sideways
        return np.array([*forward, _PUSH_HEIGHT - state.tip[2]])
    behind = np.array([*(state.target[:2] - _BEHIND * direction), _PUSH_HEIGHT])
    return _funnel(state, behind, height=0.02, slope=1.5)


def _grasp(state: TaskState, turned: bool) -> tuple[np.ndarray, float]:
    goal = state.target + (0, 0, _GRASP_HEIGHT - state.size)
    move = goal - state.tip
    if np.linalg.norm(move[:2]) < 0.008 and abs(move[2]) < 0.01:
        return move, CLOSED
    below_top = state.tip[2] < state.target[2] + state.size
    straddle = (0.018, 0.035) if turned else (0.035, 0.018)
    if below_top and (np.abs(move[:2]) < straddle).all():  # the fingers straddle the object
        return move, OPEN
    return _funnel(state, goal, height=_HOVER_HEIGHT - _GRASP_HEIGHT, slope=0.5), OPEN


def _carry(state: TaskState, skill: str) -> tuple[np.ndarray, float]:
    if skill == "lift":
        return np.array([0, 0, SPEED]), CLOSED
    assert state.reference is not None  # put and stack have one
    offset = (state.reference - state.target)[:2]
    distance = float(np.linalg.norm(offset))
    release_height, radius, margin = _DROP_HEIGHT, _DROP_RADIUS, _DROP_MARGIN
    if skill == "stack":
        radius, margin = _ALIGNED, _STACK_MARGIN
        held_at = state.target[2] - state.tip[2]
        release_height = state.reference[2] + 2 * state.size + 0.004 - held_at
    if distance < radius and abs(state.tip[2] - release_height) < margin:
        return np.zeros(3), OPEN
    height = min(release_height + max(0.0, distance - _ALIGNED), _CARRY_HEIGHT)
    rise = height - state.tip[2]
    # Up first, then across, with a rounded corner: the other objects are as high as this one.
    return np.array([*(offset * np.clip(1 - rise / 0.08, 0.2, 1)), rise]), CLOSED


@dataclass(frozen=True)
class ExpertNoise:
    """Noise on the expert's moves, in metres per axis, so that the data contains recoveries.

    Attributes:
        share: fraction of the steps with Gaussian noise.
        deviation: standard deviation of that noise.
        kicks: probability per step that a kick starts; it lasts one or two steps.
        kick: length of a kick.
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
    """Record one demonstration; the caller drops those with `success` False.

    The label `action` is the expert's action in each visited state; `executed_action` is the label
    plus noise. There is one step per action; the final state is not recorded, except, without
    the gripper, with the environment's `bare_goal_frame`.

    Args:
        env: the simulator; its present episode is replaced.
        seed: determines task, layout and noise.
        split: one of `tabletop_tasks.SPLITS`.
        skills: some of `tabletop_tasks.SKILLS`; default: all skills of the split.
        noise: default `ExpertNoise()`; `NO_NOISE` for none.

    Returns:
        The episode dict of `demonstration_record`, with image_primary, image_wrist and the
        actions as described in `TabletopEnv`.
    """
    observation, info = env.reset(seed=seed, options={"split": split, "skills": skills})
    expert = TabletopExpert(env)
    offsets = _noise_offsets(np.random.default_rng([seed, 1]), noise or ExpertNoise())
    convention = env.settings.action_convention
    observations, labels, executed, subtasks = [], [], [], []
    done = False
    while not done:
        observations.append(observation)
        subtasks.append(subtask(env.present_task, env.task_state()))
        labels.append(expert.act())
        noisy = conventions.to_table(labels[-1], convention)
        most = MAX_MOVE * env.step_share
        noisy[:3] = np.clip(noisy[:3] + next(offsets), -most, most)
        executed.append(conventions.to_robot(noisy, convention))
        observation, _, terminated, truncated, info = env.step(executed[-1])
        done = terminated or truncated
    if env.settings.bare_goal_frame:
        # Never acted upon: a chunk ends before its goal image.
        still = np.array([*np.zeros(6), labels[-1][6]], np.float32)
        observations.append(env.observe_bare())
        labels.append(still)
        executed.append(still)
        subtasks.append(subtasks[-1])
    record = demonstration_record(observations, labels, executed, info, seed=seed, split=split)
    record["steps"]["subtask"] = np.array(subtasks)
    return record


def noisy_episode(
    env: Any, seed: int, split: str, skills: Sequence[str], noise: float
) -> dict[str, Any]:
    """Return `collect_episode` with an amount of noise: 0.5 is its default, 0 is none."""
    return collect_episode(env, seed, split, skills, ExpertNoise(share=noise, kicks=noise / 10))


def expert_version(skills: Sequence[str]) -> int:
    """Return the version of the expert that demonstrates these skills.

    1: it opens wherever the bowl catches the object. It aimed at the middle before, as it still
    does on an object; the other skills are unchanged (version 0).
    """
    return int("put" in skills)


def goal(env: Any, seed: int, options: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the cameras' images, uint8 [h, w, 3], at the end of the expert's episode.

    Without the gripper if the environment's `bare_goal` is set. The environment stays in that
    state: reset it before the policy's episode.
    """
    table = env.unwrapped
    episode = collect_episode(table, seed, options["split"], options["skills"], NO_NOISE)
    if table.settings.bare_goal:
        return {k: v for k, v in table.observe_bare().items() if k.startswith("image_")}
    return last_images(episode)


def _noise_offsets(rng: np.random.Generator, noise: ExpertNoise) -> Iterator[np.ndarray]:
    """Yield the noise of each step's move: float64 [3] in metres."""
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
