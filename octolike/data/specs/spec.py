"""DatasetSpec: the fields of a dataset and their meaning."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from octolike.config import ConfigError, unknown
from octolike.data.specs import expressions
from octolike.data.specs.episode_filter import build_filter
from octolike.data.specs.expressions import NUMPY, Operations
from octolike.data.specs.fingerprint import code_digest
from octolike.data.specs.standardize import StandardSteps
from octolike.data.specs.subtask_rules import SubtaskRule, check_rules
from octolike.embodiment import Layout


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """The fields of one RLDS dataset and their meaning.

    Attributes:
        name: name of the RLDS dataset; its directory is <data.root>/<name>/<version>.
        folder: directory name of the public release if it differs from `name`; preferred if it
            exists.
        version: RLDS version that the spec was written for; "" if no source states one: the only
            version on disk is read.
        cameras: camera name (primary, secondary, wrist, ...): key under steps.observation; "a.b"
            for a nested key, "observation" for an observation that is an image itself,
            "steps.a" for an image next to the observation.
        bgr: cameras stored with their channels in the order blue, green, red, unless they are
            JPEG: those are copies in the order red, green, blue.
        views: interchangeable cameras, such as two stands without a fixed place: with
            data.draw_views, training shows one as any other.
        depth: camera name: key of its depth image under steps.observation.
        depth_unit: metres per stored unit of depth.
        language: path of the instruction under steps, or "". With several paths, an episode has
            several instructions, and training draws one of them.
        language_informative: False if the text does not describe the task.
        subtask: path of a text under steps that names the subtask of each step, for data.subtasks:
            "grasp the cup", then "put it on the plate"; "" for none.
        subtask_rules: without such a text, how it follows from instruction and gripper.
        label: path of a text that names the task (data.tasks="label"), under steps or as
            "episode.<field>"; "" for none.
        action, proprio: layouts of the standard actions and proprio; proprio None for none.
        action_from, proprio_from: expressions over raw fields (`expressions`) that compute them, or
        standardize: a function of the raw steps that does.
        every: keep every k-th step, starting with the first.
        filters: fields of EpisodeFilter (episode_filter): which episodes to use.
        keep: "episode.<field>" of a flag; episodes with a false flag are excluded and counted.
        gripper: its convention in words.
        control_hz: steps per second, after `every`; 0 if the sources disagree.
        robot, end_effector: the hardware; "" if unknown.
        embodiment: name of the record shared by datasets of one robot and convention; "": the
            dataset's own.
        uncertain: open questions about the dataset, printed at the start of a run.
        inferred: {"action.units", "control_hz", …: evidence} of fields that inspect_data inferred
            and no user has verified yet, printed likewise.
        steps, episodes: size of the complete dataset; 0 if unknown.
    """

    name: str
    version: str
    folder: str = ""
    cameras: Mapping[str, str]
    bgr: tuple[str, ...] = ()
    views: tuple[str, ...] = ()
    depth: Mapping[str, str] = field(default_factory=dict)
    depth_unit: float = 0.001
    language: str | tuple[str, ...] = ""
    language_informative: bool = True
    subtask: str = ""
    subtask_rules: tuple[SubtaskRule, ...] = ()
    label: str = ""
    action: Layout
    proprio: Layout | None
    action_from: tuple[str, ...] = ()
    proprio_from: tuple[str, ...] = ()
    standardize: Callable[[Mapping[str, Any]], StandardSteps] | None = None
    every: int = 1
    keep: str = ""
    filters: Mapping[str, Any] = field(default_factory=dict)
    gripper: str
    control_hz: float = 0.0
    robot: str
    end_effector: str = ""
    embodiment: str = ""
    uncertain: tuple[str, ...] = ()
    inferred: Mapping[str, str] = field(default_factory=dict)
    steps: int = 0
    episodes: int = 0

    def __post_init__(self) -> None:
        title = f"the spec of dataset {self.name!r}"
        if (self.standardize is None) == (not self.action_from):
            raise ConfigError(
                f"{title} needs either action_from (expressions) or standardize (a function)"
            )
        for expression in (*self.action_from, *self.proprio_from):
            try:
                expressions.check_expression(expression)
            except ValueError as error:
                raise ConfigError(f"{title}: {error}") from None
        for camera in (*self.bgr, *self.views, *self.depth):
            if camera not in self.cameras:
                raise ConfigError(unknown(f"camera in {title}", camera, self.cameras))
        if set(self.views) & set(self.depth) or set(self.views) & set(self.bgr) not in (
            set(),
            set(self.views),
        ):
            raise ConfigError(
                f"{title}: views {', '.join(self.views)} are interchangeable only without depth, "
                "and with one order of red and blue"
            )
        build_filter(self.filters, title=f"filters of {title}")
        if self.subtask and self.subtask_rules:
            raise ConfigError(f"{title} has both subtask and subtask_rules; expected one of them")
        check_rules(self.subtask_rules, self.action.names, title)
        if self.every < 1:
            raise ConfigError(f"{title}: every is {self.every}; expected at least 1")

    @property
    def language_paths(self) -> tuple[str, ...]:
        """The paths of the instructions under steps."""
        if isinstance(self.language, str):
            return (self.language,) if self.language else ()
        return self.language

    def standard_steps(self, steps: Mapping[str, Any]) -> StandardSteps:
        """Return the actions and proprio of raw steps, already thinned to every k-th one."""
        if self.standardize is not None:
            return self.standardize(steps)
        return evaluate_parts(self.action_from, self.proprio_from, steps)

    def fingerprint(self) -> str:
        """Return a digest of the fields and the code that the index and statistics depend on."""
        layouts = [x and _statistical(x) for x in (self.action, self.proprio)]
        fields = (self.version, self.language_paths, self.label, *layouts, self.every, self.keep)
        # The index counts the bytes and the black frames of each camera, in this order.
        fields += (dict(self.cameras), dict(self.depth))
        if self.standardize is not None:
            return code_digest(fields, self.standardize)
        texts = (self.action_from, self.proprio_from)
        functions = expressions.functions_used(self.action_from + self.proprio_from)
        return code_digest(
            fields, texts, evaluate_parts, functions, without=(expressions.FUNCTIONS,)
        )


def _statistical(layout: Layout) -> dict[str, Any]:
    """Return the fields of a layout; how a dimension is normalised does not change statistics."""
    return {k: v for k, v in dataclasses.asdict(layout).items() if k != "normalization"}


def evaluate_parts(
    action_from: tuple[str, ...],
    proprio_from: tuple[str, ...],
    steps: Mapping[str, Any],
    operations: Operations = NUMPY,
) -> StandardSteps:
    """Return the actions and proprio that expressions over the raw steps compute."""
    action = expressions.evaluate(action_from, steps, operations)
    if not proprio_from:
        return StandardSteps(action, None)
    proprio = expressions.evaluate(proprio_from, steps, operations)
    return StandardSteps(*operations.trim([action, proprio]))


_POSE = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
_METRIC = ("m", "m", "m", "rad", "rad", "rad", "")

EEF_DELTA = Layout(
    names=("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"),
    units=_METRIC,
    absolute=(False,) * 6 + (True,),
    normalized=(True,) * 6 + (False,),
)
EEF_POSE = Layout(names=_POSE, units=_METRIC, absolute=(True,) * 7, normalized=(True,) * 7)
