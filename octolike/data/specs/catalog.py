"""One row per dataset. A new dataset is a new row.

The Open X-Embodiment datasets are in `oxe`; rows of one's own may live outside the package, in a
Python file that config.data.specs names (`load_specs`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from octolike.config import ConfigError, load_module, unknown
from octolike.data.specs import standardize
from octolike.data.specs.oxe import OXE
from octolike.data.specs.spec import EEF_DELTA, EEF_POSE, DatasetSpec
from octolike.embodiment import Layout

# Everything that this project's simulators and tests write has the same fields.
_OWN = DatasetSpec(
    name="tabletop",
    version="1.0.0",
    cameras={"primary": "image_primary", "wrist": "image_wrist"},
    language="language_instruction",
    label="episode.episode_metadata.task",
    action=EEF_DELTA,
    proprio=EEF_POSE,
    gripper="absolute, 1 = open",
    control_hz=5,
    robot="simulated two-finger gripper (octolike.envs.tabletop)",
    standardize=standardize.as_stored,
)
# Episodes of rlds/synthetic.py; the robot's name is that of stored runs.
_FAKE = replace(_OWN, name="fake", label="", robot="none: octolike.data.fake")

# The same table again, for what one policy is to learn beside, or after, the rest.
_TARGET = replace(_OWN, name="tabletop_target")

# Robots that mean another thing by their numbers (octolike.envs.tabletop.conventions), in conflict
# on purpose; and demonstrations whose tasks are the skills, to sample by.
_CONFLICTING = tuple(
    replace(_OWN, name=f"tabletop_{how}", robot=f"{_OWN.robot}, actions {how}")
    for how in ("mirrored", "rescaled")
)
_BY_SKILL = replace(
    _OWN, name="tabletop_by_skill", label="episode.episode_metadata.skill", embodiment="tabletop"
)

# A dataset for each skill of one robot, to ask what they are to one another: scripts/transfer.py.
_SKILLS = tuple(
    replace(_OWN, name=f"tabletop_{skill}", embodiment="tabletop")
    for skill in ("touch", "push", "lift", "put", "stack")
)

# Meta-World as octolike.envs.metaworld shows it: one camera, and of the state the hand alone.
_METAWORLD = replace(
    _OWN,
    name="metaworld",
    cameras={"primary": "image_primary"},
    action=Layout(
        names=("dx", "dy", "dz", "gripper"),
        units=("cm", "cm", "cm", ""),
        absolute=(False, False, False, True),
        normalized=(True, True, True, False),
    ),
    proprio=Layout(
        names=("x", "y", "z", "gripper"),
        units=("m", "m", "m", ""),
        absolute=(True,) * 4,
        normalized=(True,) * 4,
    ),
    gripper="effort, -1 opens and 1 closes",
    control_hz=80,
    robot="simulated Sawyer (octolike.envs.metaworld)",
)

# The two simulated arms of gym-aloha: targets and positions of fourteen joints, left arm first.
_ARM = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")
_BIMANUAL = Layout(
    names=tuple(f"{side}_{joint}" for side in ("left", "right") for joint in _ARM),
    units=("rad", "rad", "rad", "rad", "rad", "rad", "") * 2,
    absolute=(True,) * 14,
    normalized=(True,) * 14,
)
_ALOHA = replace(
    _OWN,
    name="aloha",
    cameras={"primary": "image_primary"},
    action=replace(_BIMANUAL, normalized=((True,) * 6 + (False,)) * 2),
    proprio=_BIMANUAL,
    control_hz=50,
    robot="two simulated ViperX arms (octolike.envs.aloha)",
)

_TABLES = (_OWN, _TARGET, *_CONFLICTING, _BY_SKILL, *_SKILLS)
DATASETS = {row.name: row for row in (*_TABLES, _METAWORLD, _ALOHA, _FAKE, *OXE)}


def find_spec(name: str, rows: Mapping[str, DatasetSpec] = DATASETS) -> DatasetSpec:
    """Return the row of a dataset; ConfigError with the nearest name where there is none."""
    if name not in rows:
        known = unknown("dataset in data.mix", name, rows)
        raise ConfigError(f"{known}; one's own dataset is a row of a file in data.specs")
    return rows[name]


def load_specs(paths: Sequence[str]) -> dict[str, DatasetSpec]:
    """Return all rows: ours, and those of Python files that define DATASETS (rows, or a dict).

    A file's row takes the place of ours of the same name. ConfigError for a file that is missing,
    does not run, has no DATASETS or something else in it, and where two files name one dataset.
    """
    found: dict[str, str] = {}
    rows = dict(DATASETS)
    for path in paths:
        given = getattr(load_module(path), "DATASETS", None)
        listed: Iterable[Any] = given.values() if isinstance(given, Mapping) else given or ()
        if not isinstance(given, (Mapping, list, tuple)) or not given:
            raise ConfigError(f"{path} defines no DATASETS = [DatasetSpec(...), ...]")
        for row in listed:
            if not isinstance(row, DatasetSpec):
                raise ConfigError(
                    f"DATASETS of {path} has {row!r}; expected rows: DatasetSpec(...)"
                )
            if row.name in found:
                raise ConfigError(f"dataset {row.name!r} is in {found[row.name]} and in {path}")
            found[row.name], rows[row.name] = path, row
    return rows


def describe_uncertain(rows: Iterable[DatasetSpec]) -> str:
    """Return a line per dataset of which the sources leave something open; "" for none."""
    return "\n".join(f"uncertain: {r.name}: {'; '.join(r.uncertain)}" for r in rows if r.uncertain)
