"""A small MuJoCo table with five language skills, scripted experts and held-out splits.

`tasks` needs numpy only, so readers of the data can ask for splits without a simulator; the other
names are looked up when first used, and mujoco is imported when a `TabletopEnv` is built.
"""

import importlib

from octolike.envs.tabletop.tabletop_tasks import SKILLS, SPLITS, TabletopTask, sample_task

_LAZY = {
    "TabletopEnv": "octolike.envs.tabletop.tabletop_env",
    "TabletopExpert": "octolike.envs.tabletop.tabletop_expert",
    "ExpertNoise": "octolike.envs.tabletop.tabletop_expert",
    "collect_episode": "octolike.envs.tabletop.tabletop_expert",
}
__all__ = ["SKILLS", "SPLITS", "TabletopTask", "sample_task", *_LAZY]


def __getattr__(name: str):
    """Import the simulator's own names when they are first asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
