"""Fake environments for rollouts; worker processes import this file, so it imports little."""

import os
from pathlib import Path

import numpy as np

from octolike.envs.wrappers import ActionSequence


class Walk:
    """Succeeds when the summed first action exceeds a threshold that the seed draws."""

    crashes = ()

    def reset(self, *, seed=None, options=None):
        self.seed, self.steps, self.position = seed, 0, 0.0
        self.goal = np.random.default_rng(seed).uniform(0, 8)
        self.skill = options["skills"][0]
        return self._observation(), self._info()

    def step(self, action):
        self.steps += 1
        self.position += float(action[0])
        if (self.skill, self.seed, self.steps) in type(self).crashes:
            raise ArithmeticError("the physics exploded")
        done = self.position > self.goal
        return self._observation(), float(done), done, self.steps >= 9 and not done, self._info()

    def _observation(self):
        return {"proprio": np.array([self.position], np.float32), "image_extra": np.zeros(3)}

    def _info(self):
        success = self.position > self.goal
        return {"instruction": f"go {self.skill}", "task": "t", "success": success, "failure": ""}

    def render(self):
        return np.full((4, 4, 3), min(255, int(self.position)), np.uint8)

    def close(self):
        pass


class CrashesAlways(Walk):
    crashes = (("walk", 0, 3),)


class CrashesOnce(Walk):
    left = 1

    def step(self, action):
        if (self.seed, self.steps) == (0, 3) and CrashesOnce.left:
            CrashesOnce.left -= 1
            raise ArithmeticError("the physics exploded")
        return super().step(action)


class DiesOnce(Walk):
    """Kills its process once; the file DIES_ONCE marks that it has happened."""

    def step(self, action):
        marker = Path(os.environ["DIES_ONCE"])
        if (self.skill, self.seed, self.steps) == ("walk", 0, 1) and not marker.exists():
            marker.touch()
            os._exit(9)
        return super().step(action)


class Counterfactual(Walk):
    """Reports after the first step whether the scene's original task was done: for even seeds."""

    def _info(self):
        instead = self.steps > 0 and self.seed % 2 == 0
        return super()._info() | {"original": "o", "instead": instead}


def make(kind=Walk):
    return ActionSequence(kind(), 2)
