"""Groups of steps in which transfer studies are to find planted conflicts."""

import numpy as np

from octolike.data.specs.catalog import DATASETS
from octolike.evaluation.transfer import group_sample

TRAITS = group_sample.traits_of(DATASETS["tabletop"])
EPISODES, STEPS = 60, 8


def sample(
    name, seed, change=None, traits=TRAITS, text=("go left", "go right"), shift=0.0, noise=0.3
):
    """Return steps of a noisy expert; its actions depend on proprio and the image's brightness.

    change: function of its actions, [n, 7] to [n, 7]; shift: of its states.
    """
    rng = np.random.default_rng(seed)
    n = EPISODES * STEPS
    proprio = rng.uniform(-1, 1, (n, 7)) + shift
    target = np.repeat(rng.uniform(-1, 1, (EPISODES, 1)), STEPS, 0)
    choice = rng.integers(0, len(text), EPISODES)
    action = np.zeros((n, 7))
    action[:, :3] = 0.05 * (np.sin(2 * (proprio[:, :3] - shift)) + [[0.5, 0, 0]] * target)
    action[:, :3] += 0.05 * noise * rng.normal(size=(n, 3))
    action[:, 6] = proprio[:, 6] - shift > 0
    images = np.zeros((n, 4, 4, 3)) + 0.5 * (target[:, :, None, None] + 1)
    return group_sample.GroupSample(
        name,
        traits,
        change(action) if change else action,
        proprio.astype(np.float32),
        images.astype(np.float32),
        np.repeat(np.arange(EPISODES), STEPS),
        np.repeat(np.array(text)[choice], STEPS),
        np.repeat(np.array(text)[choice], STEPS),
    )


def mirrored(action):
    return action * [1, -1, 1, 1, 1, 1, 1]
