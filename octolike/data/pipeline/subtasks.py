"""The subtask of each step, in the graph: a text of the record, or derived by rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from octolike.data.rlds.texts import graph_texts
from octolike.data.specs.spec import DatasetSpec
from octolike.data.specs.subtask_rules import GRIPPER

_CLOSED = 0.5  # gripper targets below are closed: standard actions have 1 for open


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
    held = gripper_holds(action[:, spec.action.names.index(GRIPPER)])
    text = tf.strings.lower(instruction, encoding="utf-8")
    for rule in spec.subtask_rules:
        whole = f"^(?:{rule.pattern})$"
        open_text, held_text = (
            tf.strings.regex_replace(text, whole, part) for part in (rule.open, rule.held)
        )
        is_first_match = tf.strings.regex_full_match(text, rule.pattern) & (subtasks == "")
        subtasks = tf.where(is_first_match, tf.where(held, held_text, open_text), subtasks)
    return subtasks


def gripper_holds(gripper: tf.Tensor) -> tf.Tensor:
    """Return whether the step before closed the gripper or kept it closed, bool [T].

    gripper: float32 [T], the target, 1 = open. A gripper that starts closed holds nothing until it
    has been open.
    """
    closed = gripper < _CLOSED
    was_open = tf.cumsum(tf.cast(~closed, tf.int32)) > 0
    return tf.concat([tf.zeros_like(closed[:1]), (closed & was_open)[:-1]], axis=0)
