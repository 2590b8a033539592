"""One row per dataset: where its fields are and what they mean. A new dataset is a new row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from octolike.config import ConfigError, unknown
from octolike.data import standardize
from octolike.data.standardize import Standard
from octolike.normalize import Layout


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """A dataset's row.

    Attributes:
        name: of the RLDS dataset; its folder is <data.root>/<name>/<version>.
        version: RLDS version that the row was written for.
        cameras: camera name (primary, secondary, wrist): key under steps.observation.
        language: key of the instruction under steps; "" for none.
        label: key under steps of a text that names the task (data.tasks="label"); "" for none.
        language_informative: False where the text does not say what to do.
        action, proprio: what `standardize` returns; proprio None where there is none.
        gripper: its convention in words.
        control_hz: steps per second.
        robot: the machine.
        standardize: raw steps to Standard.
    """

    name: str
    version: str
    cameras: Mapping[str, str]
    language: str
    label: str = ""
    language_informative: bool = True
    action: Layout
    proprio: Layout | None
    gripper: str
    control_hz: float
    robot: str
    standardize: Callable[[Mapping[str, Any]], Standard]


_POSE = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
_METRIC = ("m", "m", "m", "rad", "rad", "rad", "")

EEF_DELTA = Layout(
    names=("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"),
    units=_METRIC,
    absolute=(False,) * 6 + (True,),
    normalized=(True,) * 6 + (False,),
)
EEF_POSE = Layout(names=_POSE, units=_METRIC, absolute=(True,) * 7, normalized=(True,) * 7)

_ROWS = (
    DatasetSpec(
        name="bridge_dataset",
        version="1.0.0",
        cameras={"primary": "image_0", "secondary": "image_1"},
        language="language_instruction",
        action=EEF_DELTA,
        proprio=EEF_POSE,
        gripper="absolute, 1 = open",
        control_hz=5,
        robot="WidowX 250",
        standardize=standardize.bridge,
    ),
)

# Everything that this project's simulators and tests write has the same fields.
_OWN = DatasetSpec(
    name="tabletop",
    version="1.0.0",
    cameras={"primary": "image_primary", "wrist": "image_wrist"},
    language="language_instruction",
    action=EEF_DELTA,
    proprio=EEF_POSE,
    gripper="absolute, 1 = open",
    control_hz=5,
    robot="simulated two-finger gripper (octolike.envs.tabletop)",
    standardize=standardize.as_stored,
)
_FAKE = replace(_OWN, name="fake", robot="none: octolike.data.fake")

DATASETS = {row.name: row for row in (*_ROWS, _OWN, _FAKE)}


def find(name: str) -> DatasetSpec:
    """Return the row of a dataset; ConfigError with the nearest name where there is none."""
    if name not in DATASETS:
        raise ConfigError(unknown("dataset in data.mix", name, DATASETS))
    return DATASETS[name]
