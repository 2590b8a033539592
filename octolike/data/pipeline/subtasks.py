"""The subtask of each step, in the graph: a text of the record, or derived by rules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from octolike.data.pipeline.dataset_split import DatasetSplit
from octolike.data.rlds.texts import graph_texts
from octolike.data.specs.spec import DatasetSpec
from octolike.data.specs.subtask_rules import GRIPPER

_CLOSED = 0.5  # gripper targets below are closed: standard actions have 1 for open


def describe_labels(splits: Iterable[DatasetSplit]) -> list[str]:
    """Return lines on the datasets with steps that are labelled by their instruction."""
    lines = []
    without = [s.spec.name for s in splits if not s.reader.has_subtasks]
    if without:
        lines.append(
            f"no subtasks in {', '.join(without)}: every step is labelled by its instruction"
        )
    for split in splits:
        tasks = split.index.tasks if split.spec.subtask_rules else ()
        unmatched = _unmatched(split.spec, tasks)
        if unmatched:
            lines.append(
                f"the subtask_rules of {split.spec.name} match {len(tasks) - len(unmatched)} of "
                f"{len(tasks)} instructions; the steps of the others are labelled by their "
                f"instruction, e.g. {unmatched[0]!r}"
            )
    return lines


def _unmatched(spec: DatasetSpec, instructions: Sequence[str]) -> list[str]:
    """Return the instructions that no rule of a dataset spec matches."""
    text = tf.strings.lower(tf.constant(instructions, tf.string), encoding="utf-8")
    matches = tf.zeros(len(instructions), tf.bool)
    for rule in spec.subtask_rules:
        matches |= tf.strings.regex_full_match(text, rule.pattern)
    return [x for x, is_match in zip(instructions, matches.numpy(), strict=True) if not is_match]


def graph_subtasks(
    spec: DatasetSpec, steps: Mapping[str, Any], action: tf.Tensor, instruction: tf.Tensor
) -> tf.Tensor:
    """Return the subtasks of the steps, string [T]; "" for none.

    steps: parsed; action: float32 [T, A], standard; instruction: string [T].
    """
    if spec.subtask:
        return graph_texts(steps, spec.subtask, tf.shape(action)[0])
    subtasks = tf.fill(tf.shape(instruction), "")
    if not spec.subtask_rules:
        return subtasks
    is_held = gripper_holds(action[:, spec.action.names.index(GRIPPER)])
    text = tf.strings.lower(instruction, encoding="utf-8")
    for rule in spec.subtask_rules:
        pattern = f"^(?:{rule.pattern})$"
        open_text, held_text = (
            tf.strings.regex_replace(text, pattern, part) for part in (rule.open, rule.held)
        )
        is_first_match = tf.strings.regex_full_match(text, rule.pattern) & (subtasks == "")
        subtasks = tf.where(is_first_match, tf.where(is_held, held_text, open_text), subtasks)
    return subtasks


def is_closed(gripper: tf.Tensor) -> tf.Tensor:
    """Return whether each target of a gripper, 1 = open, is a closed one."""
    return gripper < _CLOSED


def gripper_holds(gripper: tf.Tensor) -> tf.Tensor:
    """Return whether the step before closed the gripper or kept it closed, bool [T].

    gripper: float32 [T], the target, 1 = open. A gripper that starts closed holds nothing until it
    has been open.
    """
    closed = is_closed(gripper)
    was_open = tf.cumsum(tf.cast(~closed, tf.int32)) > 0
    return tf.concat([tf.zeros_like(closed[:1]), (closed & was_open)[:-1]], axis=0)
