"""ALOHA in simulation: two arms at one table, 14 joint targets, one camera from above."""

from octolike.envs.aloha.aloha_env import ROBOTS, SKILLS, SPLITS, AlohaEnv, tasks_of
from octolike.envs.aloha.aloha_expert import collect_episode, goal

__all__ = [
    "ROBOTS",
    "SKILLS",
    "SPLITS",
    "AlohaEnv",
    "collect_episode",
    "goal",
    "tasks_of",
]
