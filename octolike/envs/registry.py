"""Which simulators there are, and how to build one from its config component.

A row says where the parts are; nothing is imported before it is used, so that a simulator which is
not installed costs nothing.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from octolike.config import ConfigError, unknown
from octolike.envs.wrappers import ChunkExecution, History


@dataclass(frozen=True)
class Simulator:
    """Where a simulator's parts are, each as 'module:name'.

    env: a class with gymnasium's reset, step, render, close and action_space. reset takes
        options={"split": …, "skills": [skill]}; info has task, skill, instruction, success,
        failure.
    skills, splits: tuples of names.
    tasks_of: (split, skills) -> the tasks there, empty where a split has none.
    collect_episode: (env, seed, split, skills, noise in [0, 1]) -> episode dict, with
        episode_metadata.success.
    goal: (env, seed, options of reset) -> {"image_<camera>": how it looks when the task is done}.
    robots: {embodiment: fields of env that make it that robot}, of all that it can be.
    groups: {skill: its group}, of simulators whose results are also given as means over groups.
    """

    env: str
    skills: str
    splits: str
    tasks_of: str
    collect_episode: str
    goal: str
    robots: str
    groups: str = ""

    def load(self, part: str) -> Any:
        """Import one part: 'env', 'skills', …"""
        module, name = getattr(self, part).split(":")
        return getattr(importlib.import_module(module), name)


def simulator(kind: str) -> Simulator:
    """Return the row of a simulator; raises ConfigError for an unknown name."""
    if kind not in ENVIRONMENTS:
        raise ConfigError(unknown("kind at environment", kind, ENVIRONMENTS))
    return ENVIRONMENTS[kind]


def kind_of(component: Mapping[str, Any]) -> str:
    """Return the component's simulator; raises ConfigError where the config names none."""
    if "kind" not in component:
        raise ConfigError(
            "the config names no simulator; set environment, e.g. Component(kind='tabletop') "
            f"(choices: {', '.join(sorted(ENVIRONMENTS))})"
        )
    simulator(component["kind"])
    return component["kind"]


def environment_of(component: Mapping[str, Any], embodiment: str) -> dict[str, Any]:
    """Return the component with the fields that make it an embodiment's robot.

    Unchanged where the simulator does not know the embodiment. Raises ConfigError where the
    component says otherwise: the robot's actions would be taken for another one's.
    """
    row = simulator(kind_of(component))
    own = row.load("robots").get(embodiment, {})
    for name, value in own.items():
        if component.get(name, value) != value:
            raise ConfigError(
                f"environment.{name} is {component[name]!r}, but the robot {embodiment!r} needs "
                f"{value!r}; leave the field out, it follows the embodiment"
            )
    return {**component, **own}


def check_robot(component: Mapping[str, Any], embodiment: str, recorded: str) -> None:
    """Raise ConfigError where the simulator is not known to be this robot.

    Numbers that mean another thing would be carried out all the same, and each episode be counted
    as a failure. recorded: what the simulator's own demonstrations are called (collect.dataset).
    """
    kind = kind_of(component)
    robots = simulator(kind).load("robots")
    if embodiment not in (*robots, recorded):
        raise ConfigError(
            f"the simulator {kind!r} can be {', '.join(robots)}, not the robot {embodiment!r}, "
            "whose actions mean something else; where it is that robot after all, say so in the "
            f"dataset's row: embodiment={next(iter(robots))!r}"
        )


def make_env(component: Mapping[str, Any]) -> Any:
    """Return a fresh environment for {"kind": …, field: value}; ConfigError for unknown fields."""
    kind = kind_of(component)
    fields = {k: v for k, v in component.items() if k != "kind"}
    env: Callable[..., Any] = simulator(kind).load("env")
    known = set(inspect.signature(env).parameters)
    for name in fields:
        if name not in known:
            raise ConfigError(unknown(f"field of environment ({kind!r})", name, known))
    return env(**fields)


def make_wrapped_env(
    component: Mapping[str, Any],
    window: int,
    execute: int,
    ensemble: float,
    gripper: Sequence[bool],
) -> ChunkExecution:
    """Return a fresh environment that shows histories and takes action chunks: a policy's view."""
    return ChunkExecution(History(make_env(component), window), execute, ensemble, gripper)


def choose_names(what: str, names: Sequence[str], choices: Sequence[str]) -> tuple[str, ...]:
    """Return `names`, or all choices where none are given; an unknown one raises ConfigError."""
    for name in names:
        if name not in choices:
            raise ConfigError(unknown(what, name, choices))
    return tuple(names) or tuple(choices)


ENVIRONMENTS = {
    "tabletop": Simulator(
        env="octolike.envs.tabletop:TabletopEnv",
        skills="octolike.envs.tabletop.tabletop_tasks:SKILLS",
        splits="octolike.envs.tabletop.tabletop_tasks:SPLITS",
        tasks_of="octolike.envs.tabletop.tabletop_tasks:tasks_of",
        collect_episode="octolike.envs.demonstrations:tabletop_episode",
        goal="octolike.envs.demonstrations:tabletop_goal",
        robots="octolike.envs.tabletop.conventions:ROBOTS",
    ),
    "metaworld": Simulator(
        env="octolike.envs.metaworld.metaworld_env:MetaworldEnv",
        skills="octolike.envs.metaworld.metaworld_tasks:SKILLS",
        splits="octolike.envs.metaworld.metaworld_tasks:SPLITS",
        tasks_of="octolike.envs.metaworld.metaworld_tasks:tasks_of",
        collect_episode="octolike.envs.metaworld.metaworld_expert:collect_episode",
        goal="octolike.envs.metaworld.metaworld_expert:goal",
        robots="octolike.envs.metaworld.metaworld_tasks:ROBOTS",
        groups="octolike.envs.metaworld.metaworld_tasks:GROUPS",
    ),
    "aloha": Simulator(
        env="octolike.envs.aloha:AlohaEnv",
        skills="octolike.envs.aloha:SKILLS",
        splits="octolike.envs.aloha:SPLITS",
        tasks_of="octolike.envs.aloha:tasks_of",
        collect_episode="octolike.envs.aloha:collect_episode",
        goal="octolike.envs.aloha:goal",
        robots="octolike.envs.aloha:ROBOTS",
    ),
    "libero": Simulator(
        env="octolike.envs.libero:LiberoEnv",
        skills="octolike.envs.libero:SKILLS",
        splits="octolike.envs.libero:SPLITS",
        tasks_of="octolike.envs.libero:tasks_of",
        collect_episode="octolike.envs.adapters:no_demonstrations",
        goal="octolike.envs.adapters:no_goal",
        robots="octolike.envs.libero:ROBOTS",
    ),
    "simpler": Simulator(
        env="octolike.envs.simpler:SimplerEnv",
        skills="octolike.envs.simpler:SKILLS",
        splits="octolike.envs.simpler:SPLITS",
        tasks_of="octolike.envs.simpler:tasks_of",
        collect_episode="octolike.envs.adapters:no_demonstrations",
        goal="octolike.envs.adapters:no_goal",
        robots="octolike.envs.simpler:ROBOTS",
    ),
}
