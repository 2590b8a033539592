"""A small MuJoCo table with five language skills, scripted experts and held-out splits.

`tabletop_tasks` works without a simulator, so that other modules can list splits; the other names
are imported at first use, and mujoco when a `TabletopEnv` is built.
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
    """Import the names that need the simulator at first use."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
