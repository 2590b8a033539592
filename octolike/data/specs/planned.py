"""The batch spec and the names of a config's data, from the dataset specs, without any record.

For memory plans and for compiling before the data are there. Sizes and splits are not known here:
`DatasetSpec.steps` is the size of the complete dataset.
"""

from __future__ import annotations

from typing import NamedTuple

from octolike.config import Config, DataConfig, resolve
from octolike.data.specs import catalog, mixes
from octolike.data.specs.spec import DatasetSpec
from octolike.embodiment import Embodiment, recorded_representation
from octolike.types import BatchSpec, Names


class PlannedData(NamedTuple):
    """The batch spec and names of a config's data.

    steps: of all datasets, 0 if one is unknown; embodiments: records without statistics, one per
    name.
    """

    spec: BatchSpec
    names: Names
    steps: int
    embodiments: tuple[Embodiment, ...]


def plan_data(config: Config) -> PlannedData:
    """Return the batch spec and names that `open_data(config)` would find.

    Raises ConfigError for an unknown mix or dataset.
    """
    d, rows = resolve(config).data, catalog.load_specs(config.data.specs)
    datasets = mixes.parse(d.mix, d.mix_weights, rows).weights
    specs = [catalog.find_spec(name, rows) for name in datasets]
    records = {s.embodiment or s.name: _record(s, d) for s in reversed(specs)}
    embodiments = tuple(dict.fromkeys(s.embodiment or s.name for s in specs))
    steps = sum(s.steps for s in specs) if all(s.steps for s in specs) else 0
    # The tasks are known only from the records: with task ids, the number here is a stand-in.
    tasks = ("task",) if d.task_ids else ()
    names = Names(tuple(datasets), embodiments, tasks)
    ordered = tuple(records[name] for name in embodiments)
    return PlannedData(batch_spec(d, specs), names, steps, ordered)


def batch_spec(d: DataConfig, specs: list[DatasetSpec]) -> BatchSpec:
    """Return the spec of a batch of these datasets; d: with all component fields."""
    window, horizon, length = d.window, d.horizon, d.text["length"]
    action = (window, horizon, max(len(_record(s, d).learned) for s in specs))
    leaves: BatchSpec = {
        "observation.timestep_mask": ((window,), "bool"),
        "task.language.ids": ((length,), "int32"),
        "task.language.mask": ((length,), "bool"),
        "task.present.language": ((), "bool"),
        "task.task_id": ((), "int32"),
        "task.present.task_id": ((), "bool"),
        "action": (action, "float32"),
        "action_mask": (action, "bool"),
        "dataset": ((), "int32"),
        "embodiment": ((), "int32"),
    }
    if d.subtasks:
        leaves["task.subtask.ids"] = ((window, length), "int32")
        leaves["task.subtask.mask"] = ((window, length), "bool")
    if d.closings:
        leaves["closing.position"] = ((window, 3), "float32")
        leaves["closing.mask"] = ((window,), "bool")
    proprio = max(len(_record(s, d).proprio_names) for s in specs)
    if d.use_proprio and proprio:
        leaves["observation.proprio"] = ((window, proprio), "float32")
        leaves["observation.present.proprio"] = ((window,), "bool")
    for camera, side in d.cameras.items():
        leaves[f"observation.image_{camera}"] = ((window, side, side, 3), "uint8")
        leaves[f"observation.present.image_{camera}"] = ((window,), "bool")
        if d.goal != "none":
            leaves[f"task.image_{camera}"] = ((side, side, 3), "uint8")
            leaves[f"task.present.image_{camera}"] = ((), "bool")
    for camera, side in d.depth.items():
        leaves[f"observation.depth_{camera}"] = ((window, side, side, 1), "float32")
        leaves[f"observation.present.depth_{camera}"] = ((window,), "bool")
    return dict(sorted(leaves.items()))


def _record(spec: DatasetSpec, d: DataConfig) -> Embodiment:
    return Embodiment(
        name=spec.embodiment or spec.name,
        robot=spec.robot,
        control_hz=spec.control_hz,
        gripper=spec.gripper,
        action=spec.action,
        proprio=spec.proprio,
        representation=recorded_representation(d.representation),
        proprio_representation=recorded_representation(d.proprio_representation),
    )
