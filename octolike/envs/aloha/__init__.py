"""ALOHA in simulation: two arms at one table, fourteen joint targets, one camera from above."""

from octolike.envs.aloha.env import SKILLS, SPLITS, AlohaEnv, tasks_of
from octolike.envs.aloha.expert import collect_episode, goal

__all__ = [
    "SKILLS",
    "SPLITS",
    "AlohaEnv",
    "collect_episode",
    "goal",
    "tasks_of",
]
