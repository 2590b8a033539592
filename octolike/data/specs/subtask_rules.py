"""Rules that derive the subtask of each step, for a dataset without such a text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from octolike.config import ConfigError

GRIPPER = "gripper"


class SubtaskRule(NamedTuple):
    r"""The subtasks of the instructions that match a pattern.

        SubtaskRule(r"put the (.*) (in|on) the (.*)", r"grasp the \1", r"put it \2 the \3")

    pattern: a regular expression (RE2) of the whole instruction, in lower case. held: the subtask
    of the steps after the one that closes the gripper, up to the one that opens it; open: that of
    the other steps. So the words follow from the object in the hand. Both may contain groups of
    the pattern.
    """

    pattern: str
    open: str
    held: str


def check_rules(rules: Sequence[SubtaskRule], action_names: Sequence[str], title: str) -> None:
    """Raise ConfigError for an invalid pattern, an unknown group, or an action without gripper."""
    if rules and GRIPPER not in action_names:
        raise ConfigError(
            f"{title}: subtask_rules need an action dimension named {GRIPPER!r}; it has "
            f"{', '.join(action_names)}"
        )
    for rule in rules:
        try:
            groups = re.compile(rule.pattern).groups
        except re.error as error:
            raise ConfigError(f"{title}: the subtask rule {rule.pattern!r}: {error}") from None
        numbers = re.findall(r"\\(\d)", rule.open + rule.held)
        for number in map(int, numbers):
            if number > groups:
                raise ConfigError(
                    f"{title}: the subtask rule {rule.pattern!r} has {groups} groups, but its "
                    f"subtasks name \\{number}"
                )
