"""Recommend a `data.representation` for targets, with the evidence for it.

A target is the state plus a small motion. The error of a head that learns targets is relative to
their whole spread, which may exceed the motion; a head that learns the motion avoids this. Changes
(`delta`) are recommended if the first one, from the state, is as large as the others. It is not if
the state lags behind its targets or differs from them by an offset: then `relative` is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from octolike.embodiment import MIN_SPREAD, Layout
from octolike.representation import KEPT, Representation

CLOSE = 0.5  # of the spread of a target: the distance to its state
SAME = 1e-4  # of the spread: a smaller distance to the state is a rounding error
REPEATED = 0.2  # of the motion per step: a target that close to its state repeats it
LAG = 3.0  # times the motion per step: a longer distance to the state is a lag or an offset


class Recommendation(NamedTuple):
    """A representation, "" for actions as they are stored, and the reason; "" for none."""

    representation: str = ""
    reason: str = ""


def recommend(
    action: Layout,
    proprio: Layout,
    actions: Sequence[np.ndarray],
    states: Sequence[np.ndarray],
    matches: Sequence[int] = (),
) -> Recommendation:
    """Return the recommended representation of actions.

    Args:
        action: their layout.
        proprio: that of the state.
        actions: float [T, A] of each episode.
        states: float [T, P] of each episode.
        matches: the state column that each action column moves, −1 for none (`infer_targets`).
    """
    pairs, targets = _pairs(action, proprio), _targets(action)
    if not pairs or not states:
        return _unnamed(action, proprio, targets, matches)
    distance, spread, motion = _sizes(pairs, actions, states)
    moving = (spread > MIN_SPREAD) & (distance > SAME * spread)
    if not moving.any() or repeated_states(action, proprio, actions, states):
        return Recommendation()
    share = float(np.median(distance[moving] / spread[moving]))
    if not share <= CLOSE:  # also if it is not finite
        return Recommendation()
    steps = float(np.median(distance[moving] / np.maximum(motion[moving], MIN_SPREAD)))
    reason = (
        f"{moving.sum()} targets are {share:.2f} of their spread away from their states (median): "
        "learned as they are, their error is relative to the spread, not to the motion"
    )
    text = "delta"
    if steps > LAG:
        text = "relative"
        reason += f"; that is {steps:.1f} times their motion per step: a lag or an offset"
    plan = Representation(text, action.names, action.absolute, action.normalized, proprio.names)
    turned = [action.names[d] for d in plan.angles if action.units[d] != "rad"]
    if turned:
        return Recommendation(
            reason=f"{reason}; data.representation={text} needs {', '.join(turned)} in radians: "
            "convert them, and their states, in standardize"
        )
    return Recommendation(text, reason)


def repeated_states(
    action: Layout,
    proprio: Layout,
    actions: Sequence[np.ndarray],
    states: Sequence[np.ndarray],
) -> tuple[str, ...]:
    """Return the names of the targets if all repeat their states of the same step, or ().

    They do if they are far closer to them than the motion of a step. The arguments are those of
    `recommend`. Joints that are not used may equal their states.
    """
    pairs = _pairs(action, proprio)
    if not pairs or not states:
        return ()
    distance, spread, motion = _sizes(pairs, actions, states)
    moving, limit = spread > MIN_SPREAD, np.maximum(SAME * spread, REPEATED * motion)
    if not moving.any() or (distance > limit)[moving].any():
        return ()
    return tuple(action.names[d] for (d, _), moves in zip(pairs, moving, strict=True) if moves)


def _targets(action: Layout) -> list[int]:
    """Return the targets that have a state: not those of grippers."""
    return [
        d
        for d, name in enumerate(action.names)
        if action.absolute[d] and not any(word in name.lower() for word in KEPT)
    ]


def _pairs(action: Layout, proprio: Layout) -> list[tuple[int, int]]:
    """Return (action column, state column) of the targets that share the name of their state."""
    states = {name: column for column, name in enumerate(proprio.names)}
    names = action.names
    return [(d, states[names[d]]) for d in _targets(action) if names[d] in states]


def _sizes(
    pairs: Sequence[tuple[int, int]], actions: Sequence[np.ndarray], states: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (distance to the state, spread, motion per step) of target columns, each [pairs]."""
    of_action, of_state = ([p[i] for p in pairs] for i in range(2))
    targets = [x[:, of_action] for x in actions]
    away = [t - s[:, of_state] for t, s in zip(targets, states, strict=True)]
    moves = [np.diff(t, axis=0) for t in targets]
    size = lambda parts: np.sqrt(np.nanmean(np.square(np.concatenate(parts)), axis=0))
    with np.errstate(invalid="ignore"):  # infinite values: nothing is recommended
        steps = size(moves) if sum(map(len, moves)) else np.zeros(len(pairs))
        return size(away), np.nanstd(np.concatenate(targets), axis=0), steps


def _unnamed(
    action: Layout, proprio: Layout, targets: Sequence[int], matches: Sequence[int]
) -> Recommendation:
    """Return the reason why targets with other names than their states have no representation."""
    followed = [d for d in targets if matches and matches[d] >= 0]
    if not followed:
        return Recommendation()
    names = ", ".join(f"{action.names[d]} follows {proprio.names[matches[d]]}" for d in followed)
    return Recommendation(
        reason=f"one name for a target and its state ({names}), so that "
        "data.representation=delta can learn their difference"
    )
