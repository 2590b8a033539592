"""The dataset specs by name.

The specs of Open X-Embodiment are in `oxe`. Further specs may be outside the package, in Python
files that config.data.specs lists (`load_specs`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from octolike.config import ConfigError, load_module, plugins, unknown
from octolike.data.specs import standardize
from octolike.data.specs.expressions import functions_used
from octolike.data.specs.oxe import OXE
from octolike.data.specs.spec import EEF_DELTA, EEF_POSE, DatasetSpec
from octolike.embodiment import Layout

# All datasets that this project's simulators and tests write have these fields.
_OWN = DatasetSpec(
    name="tabletop",
    version="1.0.0",
    cameras={"primary": "image_primary", "wrist": "image_wrist"},
    language="language_instruction",
    label="episode.episode_metadata.task",
    subtask="subtask",
    action=EEF_DELTA,
    proprio=EEF_POSE,
    gripper="absolute, 1 = open",
    control_hz=5,
    robot="simulated two-finger gripper (octolike.envs.tabletop)",
    standardize=standardize.as_stored,
)
# Episodes of rlds/synthetic.py; the robot's name is that of stored runs.
_FAKE = replace(_OWN, name="fake", label="", subtask="", robot="none: octolike.data.fake")

# The same robot again: the target of cotraining and finetuning experiments.
_TARGET = replace(_OWN, name="tabletop_target")

# Robots that conflict deliberately (octolike.envs.tabletop.conventions), in their actions or in
# gripper and look alone; and demonstrations labelled by skill, for sampling by task.
_CONFLICTING = (
    *(
        replace(_OWN, name=f"tabletop_{convention}", robot=f"{_OWN.robot}, actions {convention}")
        for convention in ("mirrored", "rescaled")
    ),
    replace(_OWN, name="tabletop_inverted", gripper="absolute, 1 = closed"),
    replace(_OWN, name="tabletop_turned", robot=f"{_OWN.robot}, gripper turned"),
    replace(_OWN, name="tabletop_repainted", robot=f"{_OWN.robot}, repainted"),
)
# The table as a conveyor belt, for actions that arrive late (configs/experiments/real_time.py).
_BELT = replace(_OWN, name="tabletop_belt", control_hz=10, robot=f"{_OWN.robot}, moving table")
# Demonstrations that end with an image of the finished task without the gripper.
_BARE_GOAL = replace(_OWN, name="tabletop_bare_goal")
_BY_SKILL = replace(
    _OWN, name="tabletop_by_skill", label="episode.episode_metadata.skill", embodiment="tabletop"
)

# One dataset per skill of one robot, for the transfer study: octolike transfer.
_SKILLS = tuple(
    replace(_OWN, name=f"tabletop_{skill}", embodiment="tabletop")
    for skill in ("touch", "push", "lift", "put", "stack")
)

# Meta-World as in octolike.envs.metaworld: one camera; of the state, only the hand.
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

# The same with the camera on the hand.
_METAWORLD_WRIST = replace(
    _METAWORLD,
    name="metaworld_wrist",
    cameras={"primary": "image_primary", "wrist": "image_wrist"},
    embodiment="metaworld",
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
# The same with the cameras on the hands.
_ALOHA_WRIST = replace(
    _ALOHA,
    name="aloha_wrist",
    cameras={
        "primary": "image_primary",
        "wrist": "image_wrist",
        "left_wrist": "image_left_wrist",
    },
    embodiment="aloha",
)

_TABLETOP = (_OWN, _TARGET, *_CONFLICTING, _BELT, _BARE_GOAL, _BY_SKILL, *_SKILLS)
DATASETS = {
    spec.name: spec
    for spec in (*_TABLETOP, _METAWORLD, _METAWORLD_WRIST, _ALOHA, _ALOHA_WRIST, _FAKE, *OXE)
}


def find_spec(name: str, specs: Mapping[str, DatasetSpec] = DATASETS) -> DatasetSpec:
    """Return the spec of a dataset; ConfigError with the nearest name if it is unknown."""
    if name not in specs:
        raise ConfigError(
            unknown("dataset in data.mix", name, specs)
            + "; describe your own dataset in a file listed in data.specs"
        )
    return specs[name]


def load_specs(paths: Sequence[str]) -> dict[str, DatasetSpec]:
    """Return all specs by name: those of the package and of Python files that define DATASETS.

    DATASETS is a sequence or a dict of specs; a spec of a file replaces the package's spec of the
    same name. Raises ConfigError for a file that is missing, fails to run, has no or an invalid
    DATASETS, and if two files describe the same dataset.
    """
    plugins.refuse_stored(paths, "dataset specs")
    files: dict[str, str] = {}
    specs = dict(DATASETS)
    for path in {Path(path).resolve(): path for path in paths}.values():  # a file given twice
        datasets = getattr(load_module(path), "DATASETS", None)
        items: Iterable[Any] = (
            datasets.values() if isinstance(datasets, Mapping) else datasets or ()
        )
        if not isinstance(datasets, (Mapping, list, tuple)) or not datasets:
            raise ConfigError(f"{path} does not define DATASETS = [DatasetSpec(...), ...]")
        for spec in items:
            if not isinstance(spec, DatasetSpec):
                raise ConfigError(
                    f"DATASETS of {path} contains {spec!r}; expected dataset specs: "
                    "DatasetSpec(...)"
                )
            if spec.name in files:
                raise ConfigError(f"dataset {spec.name!r} is in {files[spec.name]} and in {path}")
            files[spec.name], specs[spec.name] = path, spec
    return specs


def describe_uncertain(specs: Iterable[DatasetSpec]) -> str:
    """Return a line per dataset with open questions, and per inferred field; "" without any."""
    lines = []
    for spec in specs:
        if spec.uncertain:
            lines.append(f"uncertain: {spec.name}: {'; '.join(spec.uncertain)}")
        lines += [f"inferred: {spec.name}: {k}: {v}" for k, v in spec.inferred.items()]
    return "\n".join(lines)


def describe_binarised(specs: Iterable[DatasetSpec]) -> list[str]:
    """Return a line per dataset with actions that its spec reduces to two values."""
    lines = []
    for spec in specs:
        texts = [
            x for x in spec.action_from if {"binarize", "rel2abs"} & functions_used([x]).keys()
        ]
        if texts:
            lines.append(
                f"binarised: {spec.name}: {'; '.join(texts)}: actions in between become 0 or 1"
            )
    return lines
