"""Demonstrated episodes as raw robot data, given to a policy as on a robot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from octolike.config import Config
from octolike.policy import Policy, Task


@dataclass(frozen=True)
class DemonstratedEpisode:
    """A demonstrated episode as raw robot data.

    observation: image_<camera> uint8 [T, h, w, 3], proprio float32 [T, P] in the robot's units;
    action: float32 [T, A] in the robot's units; task: its name, "" for none.
    """

    observation: Mapping[str, np.ndarray]
    action: np.ndarray
    instruction: str
    task: str = ""

    @classmethod
    def from_episode(cls, episode: Any) -> DemonstratedEpisode:
        """Return a decoded episode of `octolike.data.pipeline.decoded_episodes`."""
        observation = {f"image_{camera}": x for camera, x in episode.images.items()}
        if episode.proprio is not None:
            observation["proprio"] = episode.proprio
        return cls(observation, episode.action, episode.instruction, episode.label)

    def history(self, policy: Policy, step: int) -> dict[str, np.ndarray]:
        """Return the policy's observation at a step: {key: [at most W, …]}, the newest last."""
        window = slice(max(0, step + 1 - policy.window), step + 1)
        return {key: self.observation[key][window] for key in policy.observation_keys}

    def create_task(self, policy: Policy, config: Config, dataset: str) -> Task:
        """Return the policy's task of the episode, by the conditioning of the run's evaluation.

        The last images are the goal images. dataset: the episode's, its task if tasks are datasets
        (data.tasks).
        """
        names = {"dataset": dataset, "label": self.task, "instruction": self.instruction}
        goals = {k.removeprefix("image_"): self.observation[k][-1] for k in policy.goal_shapes}
        conditioning = config.evaluate.condition_on
        return policy.create_task(
            instruction=self.instruction if "language" in conditioning else None,
            goal_images=goals if "goal" in conditioning else None,
            task_id=names[config.data.tasks] if "task_id" in conditioning else None,
        )
