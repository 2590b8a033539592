"""The table of simulators, and functions that build environments from config components."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from octolike.config import ConfigError, build_component, unknown
from octolike.envs.simulators import (
    AlohaSettings,
    LiberoSettings,
    MetaworldSettings,
    SimplerSettings,
    Simulator,
    SimulatorSettings,
    TabletopSettings,
)
from octolike.envs.wrappers import ActionSequence


def simulator(kind: str) -> Simulator:
    """Return the parts of a simulator; ConfigError for an unknown kind."""
    if kind not in ENVIRONMENTS:
        raise ConfigError(unknown("kind at environment", kind, ENVIRONMENTS))
    return ENVIRONMENTS[kind].simulator


def kind_of(component: Mapping[str, Any]) -> str:
    """Return the component's kind; ConfigError if it has none or an unknown one."""
    if "kind" not in component:
        raise ConfigError(
            "the config names no simulator; set environment, e.g. Component(kind='tabletop') "
            f"(choices: {', '.join(sorted(ENVIRONMENTS))})"
        )
    simulator(component["kind"])
    return component["kind"]


def environment_of(component: Mapping[str, Any], embodiment: str) -> dict[str, Any]:
    """Return the component with the fields that make it an embodiment's robot.

    Unchanged if the simulator does not know the embodiment. Raises ConfigError if the component
    contradicts these fields: actions would be executed in another robot's convention.
    """
    robot_fields = simulator(kind_of(component)).load("robots").get(embodiment, {})
    for name, value in robot_fields.items():
        if component.get(name, value) != value:
            raise ConfigError(
                f"environment.{name} is {component[name]!r}, but the robot {embodiment!r} needs "
                f"{value!r}; leave the field out, it follows the embodiment"
            )
    return {**component, **robot_fields}


def check_robot(component: Mapping[str, Any], embodiment: str, recorded: str) -> None:
    """Raise ConfigError unless the simulator is known to be this robot.

    Actions in another robot's convention would run without an error, and every episode would count
    as a failure.

    Args:
        component: the environment.
        embodiment: the policy's robot.
        recorded: dataset name of the simulator's own demonstrations (collect.dataset).
    """
    kind = kind_of(component)
    robots = simulator(kind).load("robots")
    if embodiment not in (*robots, recorded):
        raise ConfigError(
            f"the simulator {kind!r} can be {', '.join(robots)}, not the robot {embodiment!r}: "
            "their actions differ in meaning; if it does simulate that robot, state so in the "
            f"dataset spec: embodiment={next(iter(robots))!r}"
        )


def make_env(component: Mapping[str, Any]) -> Any:
    """Return a new environment from {"kind": …, field: value}; ConfigError for unknown fields."""
    kind_of(component)
    settings = build_component(ENVIRONMENTS, component, "environment")
    return settings.simulator.load("env")(settings)


def make_wrapped_env(component: Mapping[str, Any], window: int) -> ActionSequence:
    """Return a new environment that takes sequences of actions and gives the last observations."""
    return ActionSequence(make_env(component), window)


def choose_names(noun: str, names: Sequence[str], choices: Sequence[str]) -> tuple[str, ...]:
    """Return `names`, or all choices if it is empty; an unknown name raises ConfigError."""
    for name in names:
        if name not in choices:
            raise ConfigError(unknown(noun, name, choices))
    return tuple(names) or tuple(choices)


ENVIRONMENTS: Mapping[str, type[SimulatorSettings]] = {
    "tabletop": TabletopSettings,
    "metaworld": MetaworldSettings,
    "aloha": AlohaSettings,
    "libero": LiberoSettings,
    "simpler": SimplerSettings,
}
