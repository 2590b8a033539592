"""The simulators: the settings of each, and the location of its parts.

Each class lists the fields of one kind of `environment` component. No simulator is imported here,
so the settings can be listed, and a config checked, without any of them installed.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, ClassVar

from octolike.config import option
from octolike.config.components import check_fields


@dataclass(frozen=True)
class Simulator:
    """Locations of a simulator's parts, each as 'module:name'; a part is imported when used.

    env: class with gymnasium's reset, step, render, close and action_space, built from its
        settings. reset takes options={"split": …, "skills": [skill]}; info has task, skill,
        instruction, success, failure.
    skills, splits: tuples of names.
    tasks_of: (split, skills) -> their tasks; empty if the split has none.
    collect_episode: (env, seed, split, skills, noise in [0, 1]) -> episode dict, with
        episode_metadata.success.
    goal: (env, seed, options of reset) -> {"image_<camera>": view of the finished task}.
    robots: {embodiment: the settings that make the environment that robot}.
    groups: {skill: its group}, if results are also reported as means over groups.
    check: (env, [(split, skill), …]) -> a sentence on missing files of the installation, or "".
    scene_version: skills -> a number stored with their demonstrations; another one means that the
        same seeds gave other scenes in an earlier version. 0 for the first.
    expert_version: the same for the actions of the expert.
    states: the number of initial states of each task, if a benchmark fixes them; an evaluation has
        no other scenes.
    odd_tasks: {(split, skill): a sentence on a task whose success says less than its name}.
    published_demonstrations: how those behind published scores were made, as the end of a sentence,
        if scores of policies trained on other demonstrations are not comparable.
    keeps_task: whether building a task's simulation takes seconds, so that an environment should
        keep its task.
    """

    env: str
    skills: str
    splits: str
    tasks_of: str
    collect_episode: str
    goal: str
    robots: str
    groups: str = ""
    check: str = ""
    scene_version: str = ""
    expert_version: str = ""
    states: str = ""
    odd_tasks: str = ""
    published_demonstrations: str = ""
    keeps_task: bool = False

    def load(self, part: str) -> Any:
        """Import one part: 'env', 'skills', …"""
        module, name = getattr(self, part).split(":")
        return getattr(importlib.import_module(module), name)


class SimulatorSettings:
    """Checks its fields also when it is not built from a component."""

    simulator: ClassVar[Simulator]

    def __post_init__(self) -> None:
        check_fields(self, "environment.")


@dataclass(frozen=True)
class TabletopSettings(SimulatorSettings):
    """`tabletop`: a MuJoCo table with coloured objects and a two-finger gripper."""

    simulator: ClassVar[Simulator] = Simulator(
        env="octolike.envs.tabletop:TabletopEnv",
        skills="octolike.envs.tabletop.tabletop_tasks:SKILLS",
        splits="octolike.envs.tabletop.tabletop_tasks:SPLITS",
        tasks_of="octolike.envs.tabletop.tabletop_tasks:tasks_of",
        collect_episode="octolike.envs.tabletop.tabletop_expert:noisy_episode",
        goal="octolike.envs.tabletop.tabletop_expert:goal",
        robots="octolike.envs.tabletop.conventions:ROBOTS",
        expert_version="octolike.envs.tabletop.tabletop_expert:expert_version",
    )
    primary_size: int | tuple[int, int] = option(
        96, "height and width of image_primary in pixels; one number for both", low=8, high=640
    )
    wrist_size: int = option(64, "height and width of image_wrist in pixels", low=8, high=640)
    num_distractors: int = option(
        2,
        "objects on the table that the instruction does not name; two more (as far as they fit) "
        "in the split `distractors`",
        low=0,
        high=3,  # more do not fit on the table
    )
    action_convention: str = option(
        "standard",
        "axes and unit of dx, dy, dz, and the gripper's open number "
        "(envs/tabletop/conventions.py); follows the embodiment",
        choices=("standard", "mirrored", "rescaled", "inverted"),
    )
    gripper: str = option(
        "standard",
        "how gripper and wrist camera are mounted; follows the embodiment",
        choices=("standard", "turned"),
    )
    look: str = option(
        "standard",
        "colours of table and gripper, and light; follows the embodiment",
        choices=("standard", "repainted"),
    )
    control_hz: int = option(
        5, "actions per second; a move is shorter at a higher rate", choices=(5, 10)
    )
    belt: float = option(
        0.0, "speed in m/s at which the table carries what lies on it to the right", low=0, high=0.1
    )
    bare_goal: bool = option(
        False, "goal images of an evaluation show the finished task without the gripper"
    )
    bare_goal_frame: bool = option(
        False,
        "a demonstration ends with a step that shows the finished task without the gripper, the "
        "goal image of data.goal='last'; bare_goal, too; follows the embodiment",
    )


@dataclass(frozen=True)
class MetaworldSettings(SimulatorSettings):
    """`metaworld`: the fifty tasks of Meta-World on a Sawyer arm."""

    simulator: ClassVar[Simulator] = Simulator(
        env="octolike.envs.metaworld.metaworld_env:MetaworldEnv",
        skills="octolike.envs.metaworld.metaworld_tasks:SKILLS",
        splits="octolike.envs.metaworld.metaworld_tasks:SPLITS",
        tasks_of="octolike.envs.metaworld.metaworld_tasks:tasks_of",
        collect_episode="octolike.envs.metaworld.metaworld_expert:collect_episode",
        goal="octolike.envs.metaworld.metaworld_expert:goal",
        robots="octolike.envs.metaworld.metaworld_tasks:ROBOTS",
        groups="octolike.envs.metaworld.metaworld_tasks:GROUPS",
    )
    primary_size: int = option(96, "height and width of image_primary in pixels", low=8, high=640)
    zoom: float = option(
        1.0,
        "enlarges the middle of image_primary; at 1.6, the objects and goals of MT10 stay in view",
        low=1,
        high=4,
    )
    hand_size: int = option(
        0, "height and width of image_wrist, of the camera on the hand; 0: none", low=0, high=640
    )


@dataclass(frozen=True)
class AlohaSettings(SimulatorSettings):
    """`aloha`: gym-aloha's bimanual tasks on two ViperX arms."""

    simulator: ClassVar[Simulator] = Simulator(
        env="octolike.envs.aloha:AlohaEnv",
        skills="octolike.envs.aloha:SKILLS",
        splits="octolike.envs.aloha:SPLITS",
        tasks_of="octolike.envs.aloha:tasks_of",
        collect_episode="octolike.envs.aloha:collect_episode",
        goal="octolike.envs.aloha:goal",
        robots="octolike.envs.aloha:ROBOTS",
    )
    primary_size: int = option(96, "height and width of image_primary in pixels", low=8, high=640)
    zoom: float = option(1.0, "enlarges the middle of image_primary", low=1, high=4)
    hand_size: int = option(
        0,
        "height and width of image_wrist and image_left_wrist, of the cameras on the hands; "
        "0: none",
        low=0,
        high=640,
    )


@dataclass(frozen=True)
class LiberoSettings(SimulatorSettings):
    """`libero`: LIBERO's 130 tasks on a Panda arm, and LIBERO-PRO's variants of 40 of them."""

    simulator: ClassVar[Simulator] = Simulator(
        env="octolike.envs.libero.libero_env:LiberoEnv",
        skills="octolike.envs.libero.libero_tasks:SKILLS",
        splits="octolike.envs.libero.libero_tasks:SPLITS",
        tasks_of="octolike.envs.libero.libero_tasks:tasks_of",
        collect_episode="octolike.envs.libero.libero_expert:collect_episode",
        goal="octolike.envs.libero.libero_expert:goal",
        robots="octolike.envs.libero.libero_tasks:ROBOTS",
        groups="octolike.envs.libero.libero_tasks:GROUPS",
        check="octolike.envs.libero.libero_package:missing_task",
        scene_version="octolike.envs.libero.libero_tasks:scene_version",
        states="octolike.envs.libero.libero_tasks:STATES",
        odd_tasks="octolike.envs.libero.libero_tasks:ODD_TASKS",
        published_demonstrations="were recorded by people",
        keeps_task=True,
    )
    primary_size: int = option(256, "height and width of image_primary in pixels", low=8, high=256)
    wrist_size: int = option(256, "height and width of image_wrist in pixels", low=8, high=256)
    settle_steps: int = option(
        10, "steps without motion before an episode, in which objects come to rest", low=0
    )


@dataclass(frozen=True)
class SimplerSettings(SimulatorSettings):
    """`simpler`: SimplerEnv's tasks of the WidowX and the Google robot."""

    simulator: ClassVar[Simulator] = Simulator(
        env="octolike.envs.simpler:SimplerEnv",
        skills="octolike.envs.simpler_tasks:SKILLS",
        splits="octolike.envs.simpler_tasks:SPLITS",
        tasks_of="octolike.envs.simpler_tasks:tasks_of",
        collect_episode="octolike.envs.adapters:no_demonstrations",
        goal="octolike.envs.adapters:no_goal",
        robots="octolike.envs.simpler_tasks:ROBOTS",
    )
    primary_size: int = option(128, "height and width of image_primary in pixels", low=8, high=640)
