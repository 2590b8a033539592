"""Before training: the distance between two groups' actions and images, and contradictions.

distances     of the action distributions, per dimension and jointly, in robot units and with
              each group normalised separately (`distances`)
agreement     of the actions in similar states (`action_agreement`)
images        distances of colours and of small images
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from octolike.evaluation.transfer.action_agreement import common_share, mean_agreement
from octolike.evaluation.transfer.distances import (
    CONSTANT,
    distance_floor,
    half_distance,
    image_distances,
    sliced_wasserstein,
    wasserstein,
)
from octolike.evaluation.transfer.finite_json import finite_json
from octolike.evaluation.transfer.group_sample import MIN_EPISODES, GroupSample

MIN_WITHIN = 0.3  # with a smaller correlation within a group, states do not explain its actions
CLEAR_MIRROR = 0.5  # negative correlation across groups that is conclusive by itself
MAX_RATIO = 1.5  # between the action sizes of two groups; beyond, they count as rescaled


@dataclass(frozen=True)
class DimensionComparison:
    """An action dimension that both groups have.

    raw: Wasserstein-1 distance in robot units; scaled: in standard deviations over both groups;
    normalised: with each group normalised separately; floor: of `scaled`. Of actions in similar
    states, NaN if unknown: within, across: correlations; ratio: spread in the second group over
    spread in the first; offset: mean difference, in standard deviations.
    """

    name: str
    unit: str
    raw: float
    scaled: float
    normalised: float
    floor: float
    within: float
    across: float
    ratio: float
    offset: float

    @property
    def kind(self) -> str:
        """'mirrored', 'rescaled', 'shifted', 'unrelated', 'same', or 'unknown'."""
        if self.across <= -CLEAR_MIRROR:  # conclusive even without similar states within a group
            return "mirrored"
        if not self.within >= MIN_WITHIN or not np.isfinite(self.across):
            return "unknown"
        if self.across <= -self.within / 2:
            return "mirrored"
        if self.across < self.within / 2:
            return "unrelated"
        if not 1 / MAX_RATIO <= self.ratio <= MAX_RATIO:
            return "rescaled"
        return "shifted" if abs(self.offset) > 1 else "same"


@dataclass(frozen=True)
class GroupComparison:
    """The comparison of two groups; NaN for values that could not be compared.

    joint: sliced Wasserstein distance of the actions, in standard deviations over both groups, and
    joint_floor; joint_normalised: with each group normalised separately. overlap: share of one
    group's states that occur in the other; probes: number of states at which agreement was
    measured; states: the features that define similar states, of "proprio", "pictures",
    "instruction", "task". cosine_within, cosine_across: of actions in similar states. colours:
    total variation of colour histograms; brightness: difference, of 1; pictures: sliced distance of
    the images' principal components; each with its floor. same_instructions: share of the steps
    with an instruction that the other group has too.
    """

    a: str
    b: str
    dimensions: tuple[DimensionComparison, ...]
    joint: float
    joint_floor: float
    joint_normalised: float
    overlap: float
    probes: int
    states: tuple[str, ...]
    cosine_within: float
    cosine_across: float
    colours: float
    colours_floor: float
    brightness: float
    pictures: float
    pictures_floor: float
    same_instructions: float

    def of_kind(self, kind: str) -> tuple[str, ...]:
        """Return the names of the dimensions of a kind."""
        return tuple(d.name for d in self.dimensions if d.kind == kind)

    def to_json(self) -> dict[str, Any]:
        """Return plain data; None for values that could not be compared."""
        data = asdict(self)
        data["dimensions"] = [asdict(d) | {"kind": d.kind} for d in self.dimensions]
        return finite_json(data)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> GroupComparison:
        """Return the comparison that `to_json` wrote."""
        fields = {k: _number(v) for k, v in data.items() if k != "dimensions"}
        dimensions = tuple(
            DimensionComparison(**{k: _number(v) for k, v in d.items() if k != "kind"})
            for d in data["dimensions"]
        )
        return cls(**fields | {"dimensions": dimensions, "states": tuple(data["states"])})


def _number(value: Any) -> Any:
    return np.nan if value is None else value


def compare_all(samples: Sequence[GroupSample], seed: int = 0) -> list[GroupComparison]:
    """Return the comparison of every pair; ValueError if a group has too few episodes."""
    for s in samples:
        if (count := len(np.unique(s.episode))) < MIN_EPISODES:
            raise ValueError(
                f"{s.name} has {count} episodes; a comparison needs at least {MIN_EPISODES}"
            )
    return [compare_groups(a, b, seed) for i, a in enumerate(samples) for b in samples[i + 1 :]]


def compare_groups(a: GroupSample, b: GroupSample, seed: int = 0) -> GroupComparison:
    """Return the comparison of two groups, a function of the samples and the seed."""
    rng = np.random.default_rng(seed)
    n = min(len(a), len(b))
    a, b = (s.take(np.sort(rng.choice(len(s), n, replace=False))) for s in (a, b))
    names = [d for d in a.traits.action if d in b.traits.action]
    columns = [[s.traits.action.index(d) for d in names] for s in (a, b)]
    actions = [s.action[:, c].astype(np.float64) for s, c in zip((a, b), columns, strict=True)]
    absolute = np.array([a.traits.absolute[i] for i in columns[0]], bool)
    centre, scale = _centre_and_scale(actions, absolute)
    scaled = [(x - centre) / scale for x in actions]
    agreement = mean_agreement(a, b, scaled, rng)
    dims = agreement.pop("dims")
    units = [a.traits.units[i] for i in columns[0]]
    normalised = [(x - x.mean(axis=0)) / np.maximum(x.std(axis=0), CONSTANT) for x in actions]
    halves = [half_distance(s, x, wasserstein) for s, x in zip((a, b), scaled, strict=True)]
    distances = [wasserstein(*x) for x in (actions, scaled, normalised)]
    rows = zip(names, units, *distances, np.mean(halves, axis=0), *dims.T, strict=True)

    def joint(x: np.ndarray, y: np.ndarray) -> float:
        return sliced_wasserstein(x, y, seed)

    return GroupComparison(
        a=a.name,
        b=b.name,
        dimensions=tuple(DimensionComparison(*row) for row in rows),
        joint=joint(*scaled) if names else np.nan,
        joint_floor=distance_floor((a, b), scaled, joint) if names else np.nan,
        joint_normalised=joint(*normalised) if names else np.nan,
        **(agreement | image_distances(a, b, seed)),
        same_instructions=common_share(a.instruction, b.instruction),
    )


def _centre_and_scale(
    actions: Sequence[np.ndarray], absolute: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return (centre, scale) [A] over both groups with equal weight; deltas are centred at 0."""
    mean = np.mean([x.mean(axis=0) for x in actions], axis=0)
    centre = np.where(absolute, mean, 0.0)
    scale = np.sqrt(np.mean([np.square(x - centre).mean(axis=0) for x in actions], axis=0))
    return centre, np.where(scale > CONSTANT, scale, 1.0)
