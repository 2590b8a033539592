"""Before training: how far apart are actions and pictures of two groups, and do they contradict?

A group is a dataset or a task, given by steps of its episodes (`GroupSample`). Of two groups:

    distances     of the actions' distributions, per dimension and jointly, in the robot's units and
                  each group normalised by itself
    agreement     of the actions in similar states. Distributions do not show that the same scene is
                  answered by mirrored actions; neighbours do: what group a does near a state, as
                  told by one half of its episodes, is set beside what the other half says (within)
                  and what b says (across)
    pictures      distances of colours and of small pictures

Every distance has a floor beside it: what two halves of one group's episodes are apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

NEIGHBOURS = 8
PROBES = 400  # states of each group at which agreement is measured
FEWEST_EPISODES = 4
FEWEST = 30  # probes below which agreement says nothing
FEWEST_PROBED = 12  # and the episodes that they must be of, at least
KNOWN = 0.3  # correlation within a group below which its actions do not follow from the state
CLEAR = 0.5  # negative correlation across groups that says enough by itself
SCALE = 1.5  # factor between actions of both groups from which they count as rescaled
STILL = 1e-6  # a dimension with a smaller spread does not move
COMPONENTS = 8  # principal components of pictures
PROJECTIONS = 64


@dataclass(frozen=True)
class GroupTraits:
    """What a dataset's row says: names, units and kinds of numbers, rate, machine, cameras."""

    action: tuple[str, ...]
    units: tuple[str, ...]
    absolute: tuple[bool, ...]
    proprio: tuple[str, ...]
    cameras: tuple[str, ...]
    control_hz: float
    gripper: str
    robot: str
    end_effector: str


@dataclass(frozen=True, eq=False)
class GroupSample:
    """Steps of a group: n of them.

    action: float [n, A], proprio: float [n, P] or None, both in robot units; images: float
    [n, s, s, 3] in 0 to 1, or None; episode: int [n]; instruction, task: str [n], "" for none.
    """

    name: str
    facts: GroupTraits
    action: np.ndarray
    proprio: np.ndarray | None
    images: np.ndarray | None
    episode: np.ndarray
    instruction: np.ndarray
    task: np.ndarray

    def __len__(self) -> int:
        return len(self.action)

    def take(self, which: np.ndarray) -> GroupSample:
        """Return some of the steps, by numbers or bools."""
        part = lambda x: None if x is None else x[which]
        names = ("action", "proprio", "images", "episode", "instruction", "task")
        return replace(self, **{k: part(getattr(self, k)) for k in names})

    def halves(self) -> tuple[GroupSample, GroupSample]:
        """Return the steps of every other episode, and those of the rest."""
        odd = np.unique(self.episode, return_inverse=True)[1] % 2 == 1
        return self.take(~odd), self.take(odd)


@dataclass(frozen=True)
class DimensionComparison:
    """An action dimension that both groups have.

    raw: Wasserstein-1 distance in the robot's units; scaled: in standard deviations over both;
    normalised: with each group normalised by itself; floor: of `scaled`. Of actions in similar
    states, NaN where nothing can be said: within, across: correlations; ratio: spread in the second
    group over that in the first; offset: mean difference, in standard deviations.
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
        if self.across <= -CLEAR:  # a like state decides, even where none is found within a group
            return "mirrored"
        if not self.within >= KNOWN or not np.isfinite(self.across):
            return "unknown"
        if self.across <= -self.within / 2:
            return "mirrored"
        if self.across < self.within / 2:
            return "unrelated"
        if not 1 / SCALE <= self.ratio <= SCALE:
            return "rescaled"
        return "shifted" if abs(self.offset) > 1 else "same"


@dataclass(frozen=True)
class GroupComparison:
    """Two groups compared.

    joint: sliced Wasserstein distance of the actions, in standard deviations over both groups, and
    joint_floor. overlap: share of the states of one group that are states of the other too;
    probes: how many of them agreement was measured at, by what (`states`): "proprio", "pictures",
    "instruction". cosine_within, cosine_across: of actions in similar states. colours: total
    variation of the colour histograms; brightness: difference, of 1; pictures: sliced distance of
    small pictures' principal components; each with its floor. NaN: could not be compared.
    same_instructions: share of the steps whose instruction the other group has too.
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
        """Return plain data; None for what could not be compared."""
        found = asdict(self)
        found["dimensions"] = [asdict(d) | {"kind": d.kind} for d in self.dimensions]
        return no_nan(found)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> GroupComparison:
        """Return the pair that `to_json` told of."""
        number = lambda v: np.nan if v is None else v
        dimensions = tuple(
            DimensionComparison(**{k: number(v) for k, v in d.items() if k != "kind"})
            for d in data["dimensions"]
        )
        rest = {k: number(v) for k, v in data.items() if k != "dimensions"}
        return cls(**rest | {"dimensions": dimensions, "states": tuple(data["states"])})


def facts(row: Any) -> GroupTraits:
    """Return what matters of a dataset's row (octolike.data.specs.spec.DatasetSpec)."""
    return GroupTraits(
        action=tuple(row.action.names),
        units=tuple(row.action.units),
        absolute=tuple(row.action.absolute),
        proprio=tuple(row.proprio.names) if row.proprio else (),
        cameras=tuple(row.cameras),
        control_hz=row.control_hz,
        gripper=row.gripper,
        robot=row.robot,
        end_effector=row.end_effector,
    )


def samples(found: Sequence[tuple[Any, Sequence[Any]]], most: int = 12) -> list[GroupSample]:
    """Return a sample per dataset; of a single dataset, one per task, the `most` frequent ones.

    found: specs and the episodes of each (`decoded_episodes.decode_mix`). A task is an episode's
    label up to the first "/", else its instruction. Raises ValueError for fewer than two groups.
    """
    if len(found) > 1:
        return [sample(row.name, row, episodes) for row, episodes in found]
    row, episodes = found[0]
    tasks: dict[str, list[Any]] = {}
    for e in episodes:
        tasks.setdefault(e.label.partition("/")[0] or e.instruction, []).append(e)
    enough = {k: v for k, v in tasks.items() if k and len(v) >= FEWEST_EPISODES}
    names = sorted(enough, key=lambda k: -len(enough[k]))[:most]
    if len(names) < 2:
        raise ValueError(
            f"{row.name} is one dataset, with {len(names)} tasks of at least {FEWEST_EPISODES} of "
            f"{len(episodes)} episodes; a comparison needs two: look at more --episodes"
        )
    return [sample(name, row, enough[name]) for name in names]


def sample(name: str, row: Any, episodes: Sequence[Any]) -> GroupSample:
    """Return the steps of a group's episodes; pictures and proprio only where all have them."""
    count = [len(e.action) for e in episodes]
    join = lambda parts: np.concatenate(list(parts))
    camera = next(iter(episodes[0].images), None) if episodes else None
    seen = all(camera in e.images for e in episodes)
    felt = all(e.proprio is not None for e in episodes)
    return GroupSample(
        name=name,
        facts=facts(row),
        action=join(e.action for e in episodes),
        proprio=join(e.proprio for e in episodes) if felt else None,
        images=join(e.images[camera] for e in episodes) / np.float32(255) if seen else None,
        episode=np.repeat(np.arange(len(episodes)), count),
        instruction=np.repeat([e.instruction for e in episodes], count),
        task=np.repeat([e.label for e in episodes], count),
    )


def compare_all(samples: Sequence[GroupSample], seed: int = 0) -> list[GroupComparison]:
    """Return every pair of groups compared; ValueError where a group has too few steps."""
    for s in samples:
        if (count := len(np.unique(s.episode))) < FEWEST_EPISODES:
            raise ValueError(
                f"{s.name} has {count} episodes; a comparison needs at least {FEWEST_EPISODES}"
            )
    return [compare(a, b, seed) for i, a in enumerate(samples) for b in samples[i + 1 :]]


def compare(a: GroupSample, b: GroupSample, seed: int = 0) -> GroupComparison:
    """Return two groups compared; the result is a function of them and the seed alone."""
    rng = np.random.default_rng(seed)
    n = min(len(a), len(b))
    a, b = (s.take(np.sort(rng.choice(len(s), n, replace=False))) for s in (a, b))
    common = [d for d in a.facts.action if d in b.facts.action]
    columns = [[s.facts.action.index(d) for d in common] for s in (a, b)]
    actions = [np.float64(s.action[:, c]) for s, c in zip((a, b), columns, strict=True)]
    absolute = np.array([a.facts.absolute[i] for i in columns[0]], bool)
    centre, scale = _frame(actions, absolute)
    ways = [_agreement(x, y, common, centre, scale, rng) for x, y in ((a, b), (b, a))]
    told = _mean_ways(ways)
    units = [a.facts.units[i] for i in columns[0]]
    scaled = [(x - centre) / scale for x in actions]
    own = [(x - x.mean(axis=0)) / np.maximum(x.std(axis=0), STILL) for x in actions]
    floors = [_halves_apart(s, x, wasserstein) for s, x in zip((a, b), scaled, strict=True)]
    raw, apart, normalised = (wasserstein(*x) for x in (actions, scaled, own))
    floor = np.mean(floors, axis=0)
    dimensions = tuple(
        DimensionComparison(
            name, units[i], raw[i], apart[i], normalised[i], floor[i], *told["dims"][i]
        )
        for i, name in enumerate(common)
    )
    joint = lambda x, y: sliced(x, y, seed)
    known = bool(common)
    return GroupComparison(
        a=a.name,
        b=b.name,
        dimensions=dimensions,
        joint=joint(*scaled) if known else np.nan,
        joint_floor=_floor((a, b), scaled, joint) if known else np.nan,
        joint_normalised=joint(*own) if known else np.nan,
        **{k: v for k, v in told.items() if k != "dims"},
        **_pictures(a, b, seed),
        same_instructions=_common_share(a.instruction, b.instruction),
    )


def wasserstein(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the Wasserstein-1 distance per column of [n, A] and [m, A]: between quantiles."""
    at = (np.arange(200) + 0.5) / 200
    return np.abs(np.quantile(x, at, axis=0) - np.quantile(y, at, axis=0)).mean(axis=0)


def sliced(x: np.ndarray, y: np.ndarray, seed: int = 0) -> float:
    """Return the sliced Wasserstein-1 distance of [n, A] and [m, A]: over random directions."""
    directions = np.random.default_rng(seed).normal(size=(x.shape[1], PROJECTIONS))
    directions /= np.linalg.norm(directions, axis=0)
    return float(wasserstein(x @ directions, y @ directions).mean())


def principal(x: np.ndarray, y: np.ndarray, count: int = COMPONENTS) -> tuple[np.ndarray, ...]:
    """Return the leading principal components of both, [n, K] and [m, K], of total variance 1."""
    both = np.concatenate([x, y])
    mean = both.mean(axis=0)
    _, values, directions = np.linalg.svd(both - mean, full_matrices=False)
    size = np.sqrt((values[:count] ** 2).sum() / len(both))
    return tuple((z - mean) @ directions[:count].T / max(size, STILL) for z in (x, y))


def no_nan(data: Any) -> Any:
    """Return nested plain data with None in place of numbers that are not finite."""
    if isinstance(data, Mapping):
        return {k: no_nan(v) for k, v in data.items()}
    if isinstance(data, (list, tuple)):
        return [no_nan(v) for v in data]
    if isinstance(data, (float, np.floating)):
        return float(data) if np.isfinite(data) else None
    return data.item() if isinstance(data, np.generic) else data


def _frame(actions: Sequence[np.ndarray], absolute: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (centre, scale) [A] over both groups, weighed alike; a change is centred at 0."""
    mean = np.mean([x.mean(axis=0) for x in actions], axis=0)
    centre = np.where(absolute, mean, 0.0)
    scale = np.sqrt(np.mean([np.square(x - centre).mean(axis=0) for x in actions], axis=0))
    return centre, np.where(scale > STILL, scale, 1.0)


def _agreement(
    a: GroupSample,
    b: GroupSample,
    names: Sequence[str],
    centre: np.ndarray,
    scale: np.ndarray,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Return how a's actions agree with b's at states of a that b has too; see `GroupComparison`.

    Under the same instruction, where the groups share theirs; of the same task, where each wording
    is too rare for that.
    """
    states, features = _states(a, b)
    nothing = {"overlap": np.nan, "probes": 0, "states": states, "cosine_within": np.nan}
    nothing |= {"cosine_across": np.nan, "dims": np.full((len(names), 4), np.nan)}
    if not names or features is None:
        return nothing
    columns = [[s.facts.action.index(d) for d in names] for s in (a, b)]
    actions = [(s.action[:, c] - centre) / scale for s, c in zip((a, b), columns, strict=True)]
    shared = [
        what
        for what in ("instruction", "task")
        if _common_share(getattr(a, what), getattr(b, what)) > 0.2
    ]
    for same in shared or [""]:
        found = _agreement_under(same, a, b, features, actions, rng)
        if "probes" in found:
            return nothing | found | {"states": (*states, same) if same else states}
    return nothing | found


def _agreement_under(
    same: str,
    a: GroupSample,
    b: GroupSample,
    features: Sequence[np.ndarray],
    actions: Sequence[np.ndarray],
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Return `_agreement` among steps that have the same instruction or task; "": among all.

    features, actions: of a and of b. Without "probes" where there are too few of them.
    """
    probes = rng.choice(len(a), min(PROBES, len(a)), replace=False)
    odd = [np.unique(s.episode, return_inverse=True)[1] % 2 == 1 for s in (a, b)]
    found = []
    for s, x, half in ((a, 0, False), (a, 0, True), (b, 1, False)):
        mine = np.flatnonzero(odd[x] == half)
        allowed = np.ones((len(probes), len(mine)), bool)
        if s is a:  # neighbours of one episode are the same moment
            allowed &= a.episode[probes][:, None] != s.episode[mine]
        if same:
            allowed &= getattr(a, same)[probes][:, None] == getattr(s, same)[mine]
        found.append(_near(features[0][probes], features[x][mine], actions[x][mine], allowed))
    (one, far_one), (other, far_other), (across, far_across) = found
    reached = np.isfinite(far_one) & np.isfinite(far_other)
    if not reached.any():
        return {}
    usual = np.quantile(far_other[np.isfinite(far_other)], 0.9)
    here = reached & (far_across <= usual)
    overlap = min(1.0, float(here.sum() / max(reached.sum(), 1)) / 0.9)
    if here.sum() < FEWEST or len(np.unique(a.episode[probes[here]])) < FEWEST_PROBED:
        return {"overlap": overlap}
    one, other, across = one[here], other[here], across[here]
    dims = np.stack(
        [
            _correlations(one, other),
            _correlations(one, across),
            across.std(axis=0) / np.maximum(one.std(axis=0), STILL),
            across.mean(axis=0) - one.mean(axis=0),
        ],
        axis=1,
    )
    cosines = {"cosine_within": _cosine(one, other), "cosine_across": _cosine(one, across)}
    return {"overlap": overlap, "probes": int(here.sum()), "dims": dims, **cosines}


def _states(a: GroupSample, b: GroupSample) -> tuple[tuple[str, ...], list[np.ndarray] | None]:
    """Return what states are told by, and features [n, F] of both groups' states, or None."""
    names, parts = [], []
    if a.facts.proprio and a.facts.proprio == b.facts.proprio:
        x, y = np.float64(a.proprio), np.float64(b.proprio)
        both = np.concatenate([x, y])
        moving = both.std(axis=0) > STILL
        size = both.std(axis=0)[moving] * np.sqrt(max(moving.sum(), 1))
        names.append("proprio")
        parts.append([(z[:, moving] - both.mean(axis=0)[moving]) / size for z in (x, y)])
    if a.images is not None and b.images is not None:
        names.append("pictures")
        flat = [s.images.reshape(len(s), -1).astype(np.float64) for s in (a, b)]
        parts.append(list(principal(*flat)))
    if not parts:
        return (), None
    return tuple(names), [np.concatenate(side, axis=1) for side in zip(*parts, strict=True)]


def _near(
    states: np.ndarray, others: np.ndarray, action: np.ndarray, allowed: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean action of the nearest allowed neighbours, and how far the last one is.

    Infinitely far where fewer than NEIGHBOURS are allowed.
    """
    square = (states**2).sum(axis=1)[:, None] + (others**2).sum(axis=1) - 2 * states @ others.T
    square = np.where(allowed, np.maximum(square, 0), np.inf)
    if len(others) < NEIGHBOURS:
        return np.zeros((len(states), action.shape[1])), np.full(len(states), np.inf)
    nearest = np.argpartition(square, NEIGHBOURS - 1, axis=1)[:, :NEIGHBOURS]
    far = np.sqrt(np.take_along_axis(square, nearest, axis=1).max(axis=1))
    return action[nearest].mean(axis=1), far


def _mean_ways(ways: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean of a seen from b and b from a; the ratio is turned round in the second."""
    first, second = ways
    dims = second["dims"].copy()
    dims[:, 2], dims[:, 3] = 1 / np.maximum(dims[:, 2], STILL), -dims[:, 3]
    if first["probes"] < FEWEST or second["probes"] < FEWEST:
        # one group may lie within the other: then only its states can be looked up in both
        dims = dims if first["probes"] < second["probes"] else first["dims"]
        better = max(ways, key=lambda way: way["probes"])
        return better | {"dims": dims}
    mean = {k: (first[k] + second[k]) / 2 for k in ("overlap", "cosine_within", "cosine_across")}
    both = np.stack([first["dims"], dims])
    both[..., 2] = np.log(np.maximum(both[..., 2], STILL))
    both = both.mean(axis=0)
    both[:, 2] = np.exp(both[:, 2])
    probes = first["probes"] + second["probes"]
    return {"probes": probes, "states": first["states"], "dims": both, **mean}


def _pictures(a: GroupSample, b: GroupSample, seed: int) -> dict[str, float]:
    """Return the distances of pictures; NaN where a group has none."""
    if a.images is None or b.images is None:
        names = ("colours", "colours_floor", "brightness", "pictures", "pictures_floor")
        return dict.fromkeys(names, np.nan)
    flat = [s.images.reshape(len(s), -1).astype(np.float64) for s in (a, b)]
    features = list(principal(*flat))
    distance = lambda x, y: sliced(x, y, seed)
    return {
        "colours": _colours(*flat),
        "colours_floor": _floor((a, b), flat, _colours),
        "brightness": float(abs(flat[0].mean() - flat[1].mean())),
        "pictures": distance(*features),
        "pictures_floor": _floor((a, b), features, distance),
    }


def _colours(x: np.ndarray, y: np.ndarray) -> float:
    """Return the total variation, 0 to 1, between histograms of flat pictures; mean of channels."""
    rows = [
        np.stack([np.histogram(z[:, c::3], 16, (0, 1))[0] / z[:, c::3].size for c in range(3)])
        for z in (x, y)
    ]
    return float(np.abs(rows[0] - rows[1]).sum(axis=1).mean() / 2)


def _halves_apart(sample: GroupSample, x: np.ndarray, distance: Any) -> Any:
    odd = np.unique(sample.episode, return_inverse=True)[1] % 2 == 1
    return distance(x[~odd], x[odd])


def _floor(samples: Sequence[GroupSample], x: Sequence[np.ndarray], distance: Any) -> float:
    return float(np.mean([_halves_apart(s, v, distance) for s, v in zip(samples, x, strict=True)]))


def _common_share(x: np.ndarray, y: np.ndarray) -> float:
    """Return the smaller share of steps whose instruction the other group has too."""
    common = (set(x.tolist()) & set(y.tolist())) - {""}
    return float(min(np.isin(z, list(common)).mean() for z in (x, y))) if common else 0.0


def _correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the correlation of each column; 0 where one does not move."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    size = np.linalg.norm(x, axis=0) * np.linalg.norm(y, axis=0)
    return np.where(size > STILL, (x * y).sum(axis=0) / np.where(size > STILL, size, 1), 0.0)


def _cosine(x: np.ndarray, y: np.ndarray) -> float:
    """Return the mean cosine of rows, those without a length aside."""
    size = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    kept = size > STILL
    return float(((x * y).sum(axis=1)[kept] / size[kept]).mean()) if kept.any() else np.nan
