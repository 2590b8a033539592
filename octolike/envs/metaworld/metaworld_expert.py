"""Demonstrations and goal images from the benchmark's scripted experts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from octolike.envs.environment import demonstration_record, last_images
from octolike.envs.metaworld.metaworld_env import MetaworldEnv

# Standard deviation of executed moves per unit of noise: enough to record recoveries, and small
# enough for the experts that place objects precisely.
DEVIATION = 0.4


def collect_episode(
    env: MetaworldEnv, seed: int, split: str, skills: Sequence[str], noise: float
) -> dict[str, Any]:
    """Record one demonstration; the caller drops those with `success` False.

    The label `action` is the expert's action in each visited state; `executed_action` is the label
    plus noise on the moves, not on the gripper.

    Returns:
        The episode dict of `demonstration_record`.
    """
    observation, info = env.reset(seed=seed, options={"split": split, "skills": list(skills)})
    expert, rng = _expert(info["skill"]), np.random.default_rng([seed, 1])
    observations, labels, executed = [], [], []
    done = False
    while not done:
        observations.append(observation)
        labels.append(_act(expert, env.privileged_state()))
        offset = np.append(rng.normal(scale=DEVIATION, size=3), 0) * noise
        executed.append(np.clip(labels[-1] + offset, -1, 1).astype(np.float32))
        observation, _, terminated, truncated, info = env.step(executed[-1])
        done = terminated or truncated
    return demonstration_record(observations, labels, executed, info, seed=seed, split=split)


def goal(env: Any, seed: int, options: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the camera's image, uint8 [h, w, 3], at the end of the expert's episode.

    The environment stays in that state: reset it before the policy's episode.
    """
    episode = collect_episode(env.unwrapped, seed, options["split"], options["skills"], 0.0)
    return last_images(episode)


def _expert(skill: str) -> Any:
    from metaworld.policies import ENV_POLICY_MAP

    return ENV_POLICY_MAP[f"{skill}-v3"]()


def _act(expert: Any, state: np.ndarray) -> np.ndarray:
    """Return the expert's action, clipped as in the benchmark: float32 [4]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the experts warn about every action out of range
        return np.clip(expert.get_action(state), -1, 1).astype(np.float32)
