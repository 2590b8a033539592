"""Agreement of two groups' actions in similar states, from nearest neighbours.

Distributions alone do not show that two groups answer the same scene with opposite actions.
Neighbours do: near a state of group a, the mean action of one half of a's episodes is compared with
the mean action of the other half ("within") and with group b's ("across").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from octolike.evaluation.transfer.distances import CONSTANT, flat_images, principal_components
from octolike.evaluation.transfer.group_sample import GroupSample

NEIGHBOURS = 8
PROBES = 400  # states of each group at which agreement is measured
MIN_PROBES = 30  # with fewer, agreement is unknown
MIN_PROBED_EPISODES = 12
MIN_SHARED_TEXT = 0.2  # share of steps with a common instruction or task, to match by it


def mean_agreement(
    a: GroupSample, b: GroupSample, actions: Sequence[np.ndarray], rng: np.random.Generator
) -> dict[str, Any]:
    """Return the agreement seen from both groups, averaged.

    Args:
        a: first group.
        b: second group.
        actions: actions of a and of b, [n, D]: their common dimensions in a common scale.
        rng: draws the probed states.

    Returns:
        overlap, probes, states, cosine_within and cosine_across of `GroupComparison`; and dims
        [D, 4]: within, across, ratio and offset of `DimensionComparison`.
    """
    first = _agreement(a, b, actions, rng)
    second = _agreement(b, a, actions[::-1], rng)
    dims = second["dims"].copy()  # ratio and offset, seen from a
    dims[:, 2], dims[:, 3] = 1 / np.maximum(dims[:, 2], CONSTANT), -dims[:, 3]
    if first["probes"] < MIN_PROBES or second["probes"] < MIN_PROBES:
        # If one group lies within the other, only its states have neighbours in both.
        dims = dims if first["probes"] < second["probes"] else first["dims"]
        better = max((first, second), key=lambda x: x["probes"])
        return better | {"dims": dims}
    mean = {k: (first[k] + second[k]) / 2 for k in ("overlap", "cosine_within", "cosine_across")}
    both = np.stack([first["dims"], dims])
    both[..., 2] = np.log(np.maximum(both[..., 2], CONSTANT))
    both = both.mean(axis=0)
    both[:, 2] = np.exp(both[:, 2])
    probes = first["probes"] + second["probes"]
    return {"probes": probes, "states": first["states"], "dims": both, **mean}


def common_share(x: np.ndarray, y: np.ndarray) -> float:
    """Return the share of steps with a text that the other group has too; the smaller of both."""
    common = (set(x.tolist()) & set(y.tolist())) - {""}
    return float(min(np.isin(z, list(common)).mean() for z in (x, y))) if common else 0.0


def _agreement(
    a: GroupSample, b: GroupSample, actions: Sequence[np.ndarray], rng: np.random.Generator
) -> dict[str, Any]:
    """Return the agreement of a's actions with b's at states of a that b has too.

    Among steps with the same instruction if the groups share instructions; with the same task if
    each wording is too rare for that.
    """
    state_names, features = _states(a, b)
    dimensions = actions[0].shape[1]
    unknown = {"overlap": np.nan, "probes": 0, "states": state_names, "cosine_within": np.nan}
    unknown |= {"cosine_across": np.nan, "dims": np.full((dimensions, 4), np.nan)}
    if not dimensions or features is None:
        return unknown
    shared = [
        name
        for name in ("instruction", "task")
        if common_share(getattr(a, name), getattr(b, name)) > MIN_SHARED_TEXT
    ]
    for match in shared or [""]:
        agreement = _matched_agreement(match, a, b, features, actions, rng)
        if "probes" in agreement:
            return unknown | agreement | {"states": (*state_names, *([match] if match else []))}
    return unknown | agreement


def _matched_agreement(
    match: str,
    a: GroupSample,
    b: GroupSample,
    features: Sequence[np.ndarray],
    actions: Sequence[np.ndarray],
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Return the agreement among steps with equal `match` ("instruction" or "task"; "": any).

    features, actions: those of a, then those of b. The result lacks "probes" if they are
    too few.
    """
    probes = rng.choice(len(a), min(PROBES, len(a)), replace=False)
    second_half = [s.is_second_half for s in (a, b)]
    neighbours = []
    for s, i, half in ((a, 0, False), (a, 0, True), (b, 1, False)):
        steps = np.flatnonzero(second_half[i] == half)
        allowed = np.ones((len(probes), len(steps)), bool)
        if s is a:  # within an episode, neighbours are the same moment
            allowed &= a.episode[probes][:, None] != s.episode[steps]
        if match:
            allowed &= getattr(a, match)[probes][:, None] == getattr(s, match)[steps]
        probed = features[0][probes]
        neighbours.append(_neighbour_mean(probed, features[i][steps], actions[i][steps], allowed))
    (first, first_radius), (second, second_radius), (across, across_radius) = neighbours
    is_reached = np.isfinite(first_radius) & np.isfinite(second_radius)
    if not is_reached.any():
        return {}
    usual_radius = np.quantile(second_radius[np.isfinite(second_radius)], 0.9)
    is_common = is_reached & (across_radius <= usual_radius)
    overlap = min(1.0, float(is_common.sum() / max(is_reached.sum(), 1)) / 0.9)
    episodes = np.unique(a.episode[probes[is_common]])
    if is_common.sum() < MIN_PROBES or len(episodes) < MIN_PROBED_EPISODES:
        return {"overlap": overlap}
    first, second, across = first[is_common], second[is_common], across[is_common]
    dims = np.stack(
        [
            _correlations(first, second),
            _correlations(first, across),
            across.std(axis=0) / np.maximum(first.std(axis=0), CONSTANT),
            across.mean(axis=0) - first.mean(axis=0),
        ],
        axis=1,
    )
    cosines = {"cosine_within": _cosine(first, second), "cosine_across": _cosine(first, across)}
    return {"overlap": overlap, "probes": int(is_common.sum()), "dims": dims, **cosines}


def _states(a: GroupSample, b: GroupSample) -> tuple[tuple[str, ...], list[np.ndarray] | None]:
    """Return (names of the state features, features [n, F] of both groups or None)."""
    names, parts = [], []
    if a.traits.proprio and a.traits.proprio == b.traits.proprio:
        x, y = (np.asarray(s.proprio, np.float64) for s in (a, b))
        both = np.concatenate([x, y])
        moving = both.std(axis=0) > CONSTANT
        size = both.std(axis=0)[moving] * np.sqrt(max(moving.sum(), 1))
        names.append("proprio")
        parts.append([(z[:, moving] - both.mean(axis=0)[moving]) / size for z in (x, y)])
    if a.images is not None and b.images is not None:
        names.append("pictures")
        parts.append(list(principal_components(flat_images(a), flat_images(b))))
    if not parts:
        return (), None
    return tuple(names), [np.concatenate(group, axis=1) for group in zip(*parts, strict=True)]


def _neighbour_mean(
    states: np.ndarray, candidates: np.ndarray, actions: np.ndarray, allowed: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return (mean action of the nearest allowed candidates, distance of the farthest of them).

    The distance is infinite if fewer than NEIGHBOURS candidates are allowed.
    """
    squares = (states**2).sum(axis=1)[:, None] + (candidates**2).sum(axis=1)
    squares = squares - 2 * states @ candidates.T
    squares = np.where(allowed, np.maximum(squares, 0), np.inf)
    if len(candidates) < NEIGHBOURS:
        return np.zeros((len(states), actions.shape[1])), np.full(len(states), np.inf)
    nearest = np.argpartition(squares, NEIGHBOURS - 1, axis=1)[:, :NEIGHBOURS]
    radius = np.sqrt(np.take_along_axis(squares, nearest, axis=1).max(axis=1))
    return actions[nearest].mean(axis=1), radius


def _correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the correlation of each column; 0 if a column is constant."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    size = np.linalg.norm(x, axis=0) * np.linalg.norm(y, axis=0)
    moving = size > CONSTANT
    return np.where(moving, (x * y).sum(axis=0) / np.where(moving, size, 1), 0.0)


def _cosine(x: np.ndarray, y: np.ndarray) -> float:
    """Return the mean cosine of rows, without rows of length 0."""
    size = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    nonzero = size > CONSTANT
    if not nonzero.any():
        return np.nan
    return float(((x * y).sum(axis=1)[nonzero] / size[nonzero]).mean())
