"""The benchmark's scripted experts, their demonstrations, and how a finished task looks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from octolike.envs import environment
from octolike.envs.metaworld.metaworld_env import MetaworldEnv

# Of executed moves, per unit of noise: enough to show how one gets back on course, little enough
# for the experts that place precisely.
DEVIATION = 0.4


def collect_episode(
    env: MetaworldEnv, seed: int, split: str, skills: Sequence[str], noise: float
) -> dict[str, Any]:
    """Record one demonstration; the caller drops those whose `success` is False.

    The label `action` is the expert's answer to the state that was visited; `executed_action` is
    that plus noise of its moves, not of its gripper.

    Returns what `environment.recorded` makes.
    """
    observation, info = env.reset(seed=seed, options={"split": split, "skills": list(skills)})
    expert, rng = _expert(info["skill"]), np.random.default_rng([seed, 1])
    observations, labels, executed = [], [], []
    done = False
    while not done:
        observations.append(observation)
        labels.append(_act(expert, env.privileged_state()))
        jolt = np.append(rng.normal(scale=DEVIATION, size=3), 0) * noise
        executed.append(np.clip(labels[-1] + jolt, -1, 1).astype(np.float32))
        observation, _, terminated, truncated, info = env.step(executed[-1])
        done = terminated or truncated
    return environment.recorded(observations, labels, executed, info, seed=seed, split=split)


def goal(env: Any, seed: int, options: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the camera's picture, uint8 [h, w, 3], at the end of the expert's own episode.

    The environment is left at that end: reset it before the policy's turn.
    """
    episode = collect_episode(env.unwrapped, seed, options["split"], options["skills"], 0.0)
    return environment.last_pictures(episode)


def _expert(skill: str) -> Any:
    from metaworld.policies import ENV_POLICY_MAP

    return ENV_POLICY_MAP[f"{skill}-v3"]()


def _act(expert: Any, state: np.ndarray) -> np.ndarray:
    """Return what the expert does, clipped as the benchmark clips it: float32 [4]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they warn whenever they ask for more than can be done
        return np.clip(expert.get_action(state), -1, 1).astype(np.float32)
