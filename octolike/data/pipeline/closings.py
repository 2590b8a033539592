"""The next closing of the gripper: a label from hindsight, of episodes of any suitable dataset.

    gripper target   1 1 1 0 0 0 1 1 0 0         1 = open
    step             0 1 2 3 4 5 6 7 8 9
    next closing     3 3 3 3 8 8 8 8 8 −         the first step from here on that closes it

The label of a step is the gripper's position at that step, relative to its present one: a point in
space that the demonstrator had in mind, without any annotation. It needs a gripper among the
actions and the gripper's position among proprio (`position_columns`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from octolike.config import ConfigError
from octolike.data.pipeline.dataset_split import DatasetSplit
from octolike.data.pipeline.subtasks import is_closed
from octolike.data.specs.spec import DatasetSpec
from octolike.data.specs.subtask_rules import GRIPPER
from octolike.embodiment import Layout, one_is_open
from octolike.errors import DataError

POSITION = ("x", "y", "z")
METRES = "m"
SAMPLED = 32  # episodes of a dataset in which labels are counted at the start


def unlabelled_reason(spec: DatasetSpec) -> str:
    """Return why no step of a dataset can have a label; "" if steps can."""
    action = spec.action
    if GRIPPER not in action.names:
        return f"no action is named {GRIPPER!r}"
    if not action.absolute[action.names.index(GRIPPER)]:
        return f"the action {GRIPPER!r} is a change, not a target"
    if not one_is_open(spec.gripper):
        return f"the spec's gripper is {spec.gripper!r}, which does not state '1 = open'"
    if spec.proprio is None:
        return "it has no proprio"
    missing = [name for name in POSITION if not _is_position(spec.proprio, name)]
    if missing:
        return f"its proprio has no position {', '.join(missing)} in metres"
    return ""


def check_labels(specs: Sequence[DatasetSpec]) -> None:
    """Raise ConfigError if no dataset has labels."""
    reasons = {spec.name: unlabelled_reason(spec) for spec in specs}
    if all(reasons.values()):
        raise ConfigError(
            "data.closings: no dataset of the mix can have the position of the next closing ("
            + "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
            + "). Set data.closings=False and remove the heads of model.auxiliary that read it"
        )


def describe_labels(splits: Sequence[DatasetSplit]) -> list[str]:
    """Return a line per dataset: why it has no labels, or how many steps of a sample have one."""
    lines = []
    for split in splits:
        name, reason = split.spec.name, unlabelled_reason(split.spec)
        if reason:
            steps = int(split.index.steps.sum())
            lines.append(f"no next closing in {name}: {reason}; its {steps:,} steps have no label")
            continue
        counts = [_count(split, episode) for episode in _sample(len(split.index.steps))]
        readable = [count for count in counts if count is not None]
        labelled, total = np.sum(readable or [(0, 0)], axis=0)
        lines.append(
            f"next closing in {name}: {labelled:,} of {total:,} steps in {len(readable)} episodes "
            "have a label; the gripper does not close after the other steps"
        )
    return lines


def position_columns(layout: Layout | None) -> list[int]:
    """Return the columns of x, y, z in proprio; zeros for a layout without them."""
    if layout is None or not all(_is_position(layout, name) for name in POSITION):
        return [0] * len(POSITION)
    return [layout.names.index(name) for name in POSITION]


def next_closings(gripper: tf.Tensor) -> tf.Tensor:
    """Return the first step from each step on that closes the gripper, int64 [T]; −1: none does.

    gripper: float32 [T], the target, 1 = open. A step closes the gripper if its target is closed
    and that of the step before is open, so a gripper that starts closed has to open first.
    """
    closed = is_closed(gripper)
    closing = tf.where(closed[1:] & ~closed[:-1])[:, 0] + 1
    steps = tf.range(tf.size(gripper, tf.int64))
    index = tf.searchsorted(closing, steps, side="left")
    return tf.gather(tf.concat([closing, [-1]], axis=0), index)


def _is_position(layout: Layout, name: str) -> bool:
    if name not in layout.names:
        return False
    i = layout.names.index(name)
    return layout.units[i] == METRES and layout.absolute[i]


def _sample(episodes: int) -> list[int]:
    """Return at most SAMPLED episodes, evenly spread."""
    return np.unique(np.linspace(0, episodes - 1, min(SAMPLED, episodes)).astype(int)).tolist()


def _count(split: DatasetSplit, episode: int) -> tuple[int, int] | None:
    """Return (labelled steps, steps) of an episode; None for a bad one, which others report."""
    try:
        action = split.read(episode).action
    except DataError:
        return None
    gripper = action[:, split.spec.action.names.index(GRIPPER)]
    return int((next_closings(tf.constant(gripper)).numpy() >= 0).sum()), len(action)
