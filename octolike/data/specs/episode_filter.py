"""Filters of episodes, by instruction, length, size of the actions and a flag; and of idle steps.

A dataset spec or data.filters of the config sets them. Filtered episodes are counted by reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from octolike.config import ConfigError, option, unknown
from octolike.config.components import check_fields
from octolike.embodiment import Layout


@dataclass(frozen=True)
class EpisodeFilter:
    """The episodes to use; the defaults use all."""

    labelled: bool = option(False, "only episodes with an instruction")
    keep: str = option("", "only episodes with this flag: 'episode.<field>', e.g. success")
    min_steps: int = option(0, "only episodes with at least this many usable steps", low=0)
    max_steps: int = option(0, "only episodes with at most this many steps; 0: any", low=0)
    max_action: float = option(
        0.0, "only episodes whose actions are at most this large, in robot units; 0: any", low=0
    )

    idle: float = option(
        0.0,
        "drop idle steps: no change of the gripper, and no motion above this, in robot units per "
        "step; 0: keep all steps",
        low=0,
    )

    def kept_steps(self, action: np.ndarray, layout: Layout) -> np.ndarray:
        """Return the positions of the steps that are not idle, int64 [T'], T' ≤ T.

        action: float32 [T, A]. The motion of an absolute dimension is its change since the step
        before; the first step of absolute actions is never idle.
        """
        if not self.idle:
            return np.arange(len(action))
        absolute = np.array(layout.absolute)
        gripper = np.array([not n or "grip" in x for n, x in zip(layout.normalized, layout.names)])
        change = np.abs(np.diff(action, axis=0, prepend=action[:1]))
        change[:1, absolute & ~gripper] = np.inf
        motion = np.where(absolute | gripper, change, np.abs(action))
        return np.flatnonzero((motion > self.idle).any(axis=1))

    def reason_to_exclude(self, action: np.ndarray, texts: Sequence[str]) -> str:
        """Return why an episode with these actions [T, A] and instructions is excluded; or ""."""
        if len(action) == 0:
            return "all steps are idle"
        if self.labelled and not any(text.strip() for text in texts):
            return "no instruction"
        if len(action) < self.min_steps:
            return f"fewer than {self.min_steps} steps"
        if self.max_steps and len(action) > self.max_steps:
            return f"more than {self.max_steps} steps"
        if self.max_action and np.abs(action).max(initial=0) > self.max_action:
            return f"an action above {self.max_action:g}"
        return ""


def build_filter(*settings: Mapping[str, Any], title: str) -> EpisodeFilter:
    """Return the filter of settings; later ones override earlier ones.

    Raises ConfigError, naming `title`, for an unknown field or a value that is not allowed.
    """
    values = {k: v for setting in settings for k, v in setting.items()}
    names = [f.name for f in dataclasses.fields(EpisodeFilter)]
    for name in values:
        if name not in names:
            raise ConfigError(unknown(f"field of {title}", name, names))
    result = EpisodeFilter(**values)
    check_fields(result, f"{title}.")
    return result
