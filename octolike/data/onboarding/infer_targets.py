"""Infer which action columns are targets and which are changes, from the states that follow.

A target moves with the next state, a change or a velocity with the difference of two states. The
correlations decide, because they know neither units nor the order of the columns: a dict of actions
may list the gripper first, a state last. If they are undecided, an action that is much closer to
the state or to its change decides; columns that are still undecided follow their field.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LAGS = (-1, 0, 1, 2)  # steps by which the state may precede or follow the change of an action
DECISIVE = 0.15  # difference of the two correlations
STRONG = 0.5  # the least correlation that decides
EQUAL = 0.02  # correlations that differ by less are equal
FEWEST = 20  # steps; few of them correlate by chance
CLOSER = 3.0  # the factor by which an action is closer to one of the two
SLOW = 0.2  # of the spread: targets move less than this in a step
EARLIER = 0.25  # of the unexplained variance: less remains if the state moves before the action


class InferredTargets(NamedTuple):
    """For each action column: whether it is a target, and the state column that it moves.

    matches: -1 where no state column follows. evidence: a clause. mixed: groups of columns, by
    their indices, that contain both targets and changes.
    """

    absolute: tuple[bool, ...]
    matches: tuple[int, ...]
    evidence: str
    mixed: tuple[tuple[int, ...], ...] = ()


def infer_targets(
    action: Sequence[np.ndarray],
    state: Sequence[np.ndarray],
    groups: Sequence[Sequence[int]],
    two_valued: Sequence[bool],
) -> InferredTargets:
    """Return which columns are targets.

    Args:
        action: float [T, A] of each episode.
        state: float [T, S] of each episode; () or no columns for none.
        groups: the columns of each field of the action; undecided columns follow their field.
        two_valued: bool per column, for grippers and switches: they are no evidence for others.
    """
    dims = action[0].shape[1] if action else 0
    pairs = [i for i, x in enumerate(action) if len(x) > 1]
    if not pairs:
        return InferredTargets(
            (False,) * dims, (-1,) * dims, "too few steps to see whether actions are targets"
        )
    has_state = bool(state) and state[0].shape[1] > 0
    if has_state:
        votes, matches = _votes_by_state([action[i] for i in pairs], [state[i] for i in pairs])
        reason = "targets are closer to the next state than to its change"
    else:
        matches = np.full(dims, -1)
        reason = "no state; targets change slowly relative to their spread"
    if not has_state:
        votes = _votes_by_speed([action[i] for i in pairs], groups, two_valued)
    absolute, mixed = np.zeros(dims, bool), []
    voters = ~np.asarray(two_valued, bool)
    overall = votes[voters].sum()
    for group in groups:
        members = np.array(group, int)
        counted = members[voters[members]]
        majority = votes[counted].sum() or overall
        absolute[members] = np.where(votes[members] == 0, majority, votes[members]) > 0
        if 0 < absolute[counted].sum() < len(counted):
            mixed.append(tuple(counted.tolist()))
    undecided = [str(d) for d in np.flatnonzero((votes == 0) & voters)]
    if undecided and len(undecided) < dims:
        reason += f"; columns {', '.join(undecided)} follow no state and count as the others"
    count = int(absolute.sum())
    return InferredTargets(
        tuple(absolute.tolist()),
        tuple(matches.tolist()),
        f"{count} of {dims} are targets: {reason}",
        tuple(mixed),
    )


def leading_states(
    action: Sequence[np.ndarray], state: Sequence[np.ndarray], matches: Sequence[int]
) -> dict[int, tuple[float, float]]:
    """Return the action columns that their states precede: {column: its two correlations}.

    The first is with the change of the state that ends at the step of the action, the second the
    largest with a change that begins there or later. matches: as of `InferredTargets`.
    """
    pairs = [i for i, x in enumerate(action) if len(x) > 1]
    columns = [d for d, m in enumerate(matches) if m >= 0]
    if not pairs or not columns or not len(state):
        return {}
    a = np.concatenate(_each([action[i] for i in pairs], 0, -1))
    moves = [_moves([state[i] for i in pairs], lag) for lag in LAGS]
    finite = np.isfinite(a).all(1) & np.all([np.isfinite(m).all(1) for m in moves], axis=0)
    if finite.sum() < FEWEST:
        return {}
    of_state = [matches[d] for d in columns]
    correlations = np.array(
        [np.diagonal(_correlation(a[finite][:, columns], m[finite][:, of_state])) for m in moves]
    )
    before, after = correlations[0], correlations[1:].max(axis=0)
    unexplained = [1 - np.square(np.maximum(x, 0)) for x in (before, after)]
    is_earlier = (before > STRONG) & (unexplained[0] < EARLIER * unexplained[1])
    return {columns[i]: (float(before[i]), float(after[i])) for i in np.flatnonzero(is_earlier)}


def _votes_by_state(
    action: Sequence[np.ndarray], state: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return (1 for targets, -1 for changes, 0 for undecided [A]; the state column of each [A])."""
    a, after = (np.concatenate(x) for x in (_each(action, 0, -1), _each(state, 1, None)))
    moves = [_moves(state, lag) for lag in LAGS]
    finite = np.isfinite(a).all(1) & np.isfinite(after).all(1)
    a, after, moves = a[finite], after[finite], [m[finite] for m in moves]
    dims, is_square = a.shape[1], a.shape[1] == after.shape[1]
    if len(a) < 2:
        return np.zeros(dims), np.full(dims, -1)
    target = _correlation(a, after)
    change = np.max([_correlation(a, m) for m in moves], axis=0)
    matches = _matches(np.maximum(target, change))
    column = np.where(matches >= 0, matches, np.arange(dims) if is_square else 0)
    rows, has_state = np.arange(dims), (matches >= 0) | is_square
    difference = target[rows, column] - change[rows, column]
    is_clear = (matches >= 0) & (np.abs(difference) > DECISIVE) & (len(a) >= FEWEST)
    to_state = np.median(np.abs(a - after[:, column]), axis=0)
    to_change = np.median(np.abs(a - moves[LAGS.index(0)][:, column]), axis=0)
    moves_at_all = has_state & (np.ptp(a, axis=0) > 0) & (np.ptp(after[:, column], axis=0) > 0)
    nearer = np.where(CLOSER * to_state < to_change, 1, 0)
    nearer -= np.where(CLOSER * to_change < to_state, 1, 0)
    return np.where(is_clear, np.sign(difference), nearer * moves_at_all), matches


def _matches(correlation: np.ndarray) -> np.ndarray:
    """Return the state column that each action column [A, S] moves, -1 for none: int [A].

    Both are each other's best, so that slow columns that happen to drift alike do not match. Of
    equals, the column at the same place is preferred.
    """
    best = correlation.max(axis=1)
    column = correlation.argmax(axis=1)
    if correlation.shape[0] == correlation.shape[1]:
        same = np.diagonal(correlation)
        column = np.where(same >= best - EQUAL, np.arange(len(same)), column)
    mutual = best >= correlation.max(axis=0)[column] - EQUAL
    return np.where(mutual & (best >= STRONG), column, -1)


def _votes_by_speed(
    action: Sequence[np.ndarray], groups: Sequence[Sequence[int]], two_valued: Sequence[bool]
) -> np.ndarray:
    """Return 1 for the columns of fields that move slowly relative to their spread, or -1: [A]."""
    spread = np.nanstd(np.concatenate(action), axis=0) + 1e-12
    moves = np.concatenate([np.abs(np.diff(x, axis=0)) for x in action])
    share = np.nanmedian(moves, axis=0) / spread
    votes = np.zeros(len(share))
    for group in groups:
        counted = [d for d in group if not two_valued[d] and spread[d] > 1e-9] or list(group)
        votes[list(group)] = 1 if np.median(share[counted]) < SLOW else -1
    return votes


def _each(episodes: Sequence[np.ndarray], begin: int, end: int | None) -> list[np.ndarray]:
    return [x[begin:end] for x in episodes]


def _moves(state: Sequence[np.ndarray], lag: int) -> np.ndarray:
    """Return state[t + 1 + lag] - state[t + lag] for t of all steps but the last, 0 beyond."""
    result = []
    for x in state:
        change, count = np.diff(x, axis=0), len(x) - 1
        shifted = np.zeros_like(change)
        source = np.arange(count) + lag
        inside = (source >= 0) & (source < count)
        shifted[inside] = change[source[inside]]
        result.append(shifted)
    return np.concatenate(result)


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the correlations of the columns of a [N, A] and b [N, S]: [A, S]; 0 of constants."""
    a, b = (x - x.mean(axis=0) for x in (a, b))
    norms = np.outer(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=0))
    product = a.T @ b
    return np.divide(product, norms, out=np.zeros_like(product), where=norms > 1e-9)
