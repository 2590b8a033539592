"""A dataset's row: where its fields are and what they mean."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from octolike.config import ConfigError, unknown
from octolike.data.specs import expressions, standardize
from octolike.data.specs.standardize import StandardSteps
from octolike.embodiment import Layout


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """A dataset's row.

    Attributes:
        name: of the RLDS dataset; its folder is <data.root>/<name>/<version>.
        folder: its name in the public release where that is another; read where it is there.
        version: RLDS version that the row was written for; "" where no source states one: then
            the only one on disk is read.
        cameras: camera name (primary, secondary, wrist, ...): key under steps.observation.
        bgr: cameras whose colours are stored in the order blue, green, red.
        depth: camera name: key of its depth image under steps.observation.
        depth_unit: metres per stored unit of depth.
        language: path of the instruction under steps, "" for none; several where an episode has
            several instructions, of which training draws one.
        language_informative: False where the text does not say what to do.
        label: path under steps, or "episode.<field>", of a text that names the task
            (data.tasks="label"); "" for none.
        action, proprio: layouts of what comes out; proprio None where there is none.
        action_from, proprio_from: expressions over raw fields (`expressions`) that give them, or
        standardize: a function of the raw steps that does.
        every: each so many-th step is kept, the first one included.
        keep: "episode.<field>" of a flag; episodes where it is false are left out, and counted.
        gripper: its convention in words.
        control_hz: steps per second, after `every`; 0 where the sources do not agree.
        robot, end_effector: the machine; "" where unknown.
        embodiment: name of the record that datasets of one robot and convention share; "": its own.
        uncertain: what the sources leave open, in sentences; said at the start of a run.
        steps, episodes: what the whole dataset has, as far as known; 0 where not.
    """

    name: str
    version: str
    folder: str = ""
    cameras: Mapping[str, str]
    bgr: tuple[str, ...] = ()
    depth: Mapping[str, str] = field(default_factory=dict)
    depth_unit: float = 0.001
    language: str | tuple[str, ...] = ""
    language_informative: bool = True
    label: str = ""
    action: Layout
    proprio: Layout | None
    action_from: tuple[str, ...] = ()
    proprio_from: tuple[str, ...] = ()
    standardize: Callable[[Mapping[str, Any]], StandardSteps] | None = None
    every: int = 1
    keep: str = ""
    gripper: str
    control_hz: float = 0.0
    robot: str
    end_effector: str = ""
    embodiment: str = ""
    uncertain: tuple[str, ...] = ()
    steps: int = 0
    episodes: int = 0

    def __post_init__(self) -> None:
        if (self.standardize is None) == (not self.action_from):
            raise ConfigError(
                f"the row of dataset {self.name!r} needs either action_from (expressions) or "
                "standardize (a function)"
            )
        for part in (*self.action_from, *self.proprio_from):
            try:
                expressions.check_expression(part)
            except ValueError as error:
                raise ConfigError(f"the row of dataset {self.name!r}: {error}") from None
        for camera in (*self.bgr, *self.depth):
            if camera not in self.cameras:
                raise ConfigError(
                    unknown(f"camera in the row of {self.name!r}", camera, self.cameras)
                )
        if self.every < 1:
            raise ConfigError(f"the row of dataset {self.name!r}: every is {self.every}, not ≥ 1")

    @property
    def language_paths(self) -> tuple[str, ...]:
        """The paths of the instructions under steps."""
        return (
            (self.language,) * bool(self.language)
            if isinstance(self.language, str)
            else (self.language)
        )

    def standard_steps(self, steps: Mapping[str, Any]) -> StandardSteps:
        """Return actions and proprio of raw steps, of which `every` has been applied."""
        if self.standardize is not None:
            return self.standardize(steps)
        action = expressions.evaluate(self.action_from, steps)
        if not self.proprio_from:
            return StandardSteps(action, None)
        proprio = expressions.evaluate(self.proprio_from, steps)
        length = min(len(action), len(proprio))
        return StandardSteps(action[:length], proprio[:length])

    def fingerprint(self) -> str:
        """Return a digest of all that statistics of this dataset depend on in the row and code."""
        code = [inspect.getsource(expressions), inspect.getsource(standardize)]
        code += [inspect.getsource(self.standardize)] if self.standardize else []
        row = [self.version, self.language_paths, self.label, self.action_from, self.proprio_from]
        row += [repr(self.action), repr(self.proprio), self.every, self.keep]
        return hashlib.sha256(json.dumps([*code, *row]).encode()).hexdigest()[:16]


_POSE = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
_METRIC = ("m", "m", "m", "rad", "rad", "rad", "")

EEF_DELTA = Layout(
    names=("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"),
    units=_METRIC,
    absolute=(False,) * 6 + (True,),
    normalized=(True,) * 6 + (False,),
)
EEF_POSE = Layout(names=_POSE, units=_METRIC, absolute=(True,) * 7, normalized=(True,) * 7)
