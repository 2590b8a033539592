"""A small MuJoCo table with five language skills, scripted experts and held-out splits.

`tasks` needs numpy only, so readers of the data can ask for splits without a simulator; the other
names are looked up when first used, and mujoco is imported when a `TabletopEnv` is built.
"""

import importlib

from octolike.envs.tabletop.tasks import SKILLS, SPLITS, Task, sample_task

_LAZY = {
    "TabletopEnv": "octolike.envs.tabletop.env",
    "Expert": "octolike.envs.tabletop.expert",
    "Noise": "octolike.envs.tabletop.expert",
    "collect_episode": "octolike.envs.tabletop.expert",
}
__all__ = ["SKILLS", "SPLITS", "Task", "sample_task", *_LAZY]


def __getattr__(name: str):
    """Import the simulator's own names when they are first asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
