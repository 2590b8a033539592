"""ALOHA in simulation: two arms at one table, fourteen joint targets, one camera from above."""

from octolike.envs.aloha.env import ROBOTS, SKILLS, SPLITS, AlohaEnv, tasks_of
from octolike.envs.aloha.expert import collect_episode, goal

__all__ = [
    "ROBOTS",
    "SKILLS",
    "SPLITS",
    "AlohaEnv",
    "collect_episode",
    "goal",
    "tasks_of",
]
