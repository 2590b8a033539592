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
    """

    env: str
    skills: str
    splits: str
    tasks_of: str
    collect_episode: str
    goal: str

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
        skills="octolike.envs.tabletop.tasks:SKILLS",
        splits="octolike.envs.tabletop.tasks:SPLITS",
        tasks_of="octolike.envs.tabletop.tasks:tasks_of",
        collect_episode="octolike.envs.demonstrations:tabletop_episode",
        goal="octolike.envs.demonstrations:tabletop_goal",
    ),
}
