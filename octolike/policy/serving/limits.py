"""ActionLimits: the range and the largest step of a robot's actions, per dimension."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from octolike.config import unknown
from octolike.embodiment import Embodiment
from octolike.errors import ConfigError
from octolike.policy.serving.options import ServeOptions

FIELDS = ("low", "high", "step")
LARGEST = float(np.finfo(np.float32).max)


class LimitError(ValueError):
    """Actions beyond a limit, which therefore stay unexecuted."""


class ActionLimits(NamedTuple):
    """Limits of a robot's actions in its units, float32 [A] each; infinite for none.

    low, high: bounds of an action. step: largest change between consecutive actions of a chunk.
    is_clipped: whether actions beyond them are clipped, or refused.
    """

    names: tuple[str, ...]
    low: np.ndarray
    high: np.ndarray
    step: np.ndarray
    is_clipped: bool

    def apply(self, actions: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
        """Return actions [H, A] within the limits, and {dimension: number of clipped actions}.

        Raises LimitError if there are actions beyond a limit, and limits refuse.
        """
        if not np.isfinite(actions).all():
            raise LimitError("the policy's actions are not finite")
        result = np.clip(actions, self.low, self.high)
        for i in range(1, len(result)):  # in order: each one bounds the next
            result[i] = np.clip(result[i], result[i - 1] - self.step, result[i - 1] + self.step)
        # a limit of the robot's units as float32 must not refuse itself
        is_changed = ~np.isclose(result, actions, rtol=1e-5, atol=1e-7)
        counts = is_changed.sum(axis=0)
        beyond = {n: int(c) for n, c in zip(self.names, counts, strict=True) if c}
        if beyond and not self.is_clipped:
            dims = [self.names.index(name) for name in beyond]
            raise LimitError(
                "actions beyond the limits are not executed: "
                + ", ".join(self._describe(d, actions[:, d]) for d in dims)
            )
        return (result if beyond else actions), beyond

    def _describe(self, dim: int, values: np.ndarray) -> str:
        step = np.abs(np.diff(values)).max() if len(values) > 1 else 0
        return (
            f"{self.names[dim]} from {values.min():.4g} to {values.max():.4g} with steps up to "
            f"{step:.4g} (limits {self.low[dim]:.4g} to {self.high[dim]:.4g}, steps "
            f"{self.step[dim]:.4g})"
        )

    def sentence(self) -> str:
        """Return the limits in words, or '' if there are none."""
        dims = [
            d
            for d in range(len(self.names))
            if np.isfinite([self.low[d], self.high[d], self.step[d]]).any()
        ]
        texts = [
            f"{self.names[d]} {self.low[d]:.4g} to {self.high[d]:.4g}, steps {self.step[d]:.4g}"
            for d in dims
        ]
        return "; ".join(texts)


def action_limits(options: ServeOptions, record: Embodiment) -> ActionLimits:
    """Return the limits that the options choose for a robot.

    Raises ConfigError for a limit from a record that lacks it, and for a bad file.
    """
    names, width = record.action.names, len(record.action)
    low, high, step = (np.full(width, x, np.float32) for x in (-np.inf, np.inf, np.inf))
    for name in ("limit_range", "limit_step"):
        if -1 < getattr(options, name) < 0:
            raise ConfigError(
                f"{name} is {getattr(options, name)}; expected 0 or more, or -1 for none"
            )
    if max(options.limit_range, options.limit_step) >= 0:
        smallest, largest = _recorded_range(record)
        span = largest - smallest
        if options.limit_range >= 0:
            low, high = (
                smallest - options.limit_range * span,
                largest + options.limit_range * span,
            )
        if options.limit_step >= 0:
            # a gripper may open and close at once; a change has no step of its own
            is_target = np.array(record.action.absolute) & np.array(record.action.normalized)
            if not is_target.any():
                raise ConfigError(
                    f"--limit_step limits targets, but all actions of {record.name!r} are changes "
                    "or grippers; limit changes with --limit_range"
                )
            step = np.where(is_target, options.limit_step * span, np.inf).astype(np.float32)
    if options.limits:
        for name, values in _read(options.limits, names).items():
            arrays = dict(zip(FIELDS, (low, high, step), strict=True))
            for field, value in values.items():
                arrays[field][names.index(name)] = value
    if (low > high).any() or (step < 0).any():
        bad = [names[d] for d in np.flatnonzero((low > high) | (step < 0))]
        raise ConfigError(f"the limits of {', '.join(bad)} allow no action: low is above high")
    return ActionLimits(names, low, high, step, options.on_limit == "clip")


def _recorded_range(record: Embodiment) -> tuple[np.ndarray, np.ndarray]:
    if record.representation or record.action_statistics is None:
        reason = (
            f"its actions are learned as {record.representation!r}, and its statistics are of those"
            if record.representation
            else "it has no action statistics"
        )
        raise ConfigError(
            f"the record of {record.name!r} has no range of actions in the robot's units ({reason})"
            "; give the limits in a file: --limits FILE"
        )
    return record.action_statistics.min.copy(), record.action_statistics.max.copy()


def _read(path: str, names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"limits {path} cannot be read as JSON: {error}") from error
    if not isinstance(data, Mapping):
        raise ConfigError(f"limits {path} is a {type(data).__name__}; expected an object")
    for name, values in data.items():
        if name not in names:
            raise ConfigError(unknown(f"action dimension in {path}", name, names))
        _check_values(f"{path}: {name}", values)
    return dict(data)


def _check_values(where: str, values: Any) -> None:
    if not isinstance(values, Mapping) or not values:
        raise ConfigError(f"{where} is {values!r}; expected an object with {', '.join(FIELDS)}")
    for field, value in values.items():
        if field not in FIELDS:
            raise ConfigError(unknown(f"field of {where}", field, FIELDS))
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not abs(value) <= LARGEST:
            raise ConfigError(f"{where}.{field} is {value!r}; expected a finite number")
