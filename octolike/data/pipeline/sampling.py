"""Who is in a batch: strategies that give each group of episodes its share of the examples.

A group is a dataset or a task (`over`). `SAMPLING` is looked up by config.data.sampling:

    mix           the weights of data.mix, or of `weights` where the groups are tasks
    proportional  as many examples as there are steps
    uniform       every group the same: rare ones are shown more often
    temperature   share ∝ steps^(1/t): t = 1 is proportional, large t uniform
    curriculum    ordered stages, or the easiest groups first; a function of the batch number
    difficulty    more of what goes badly, by the results that the trainer feeds back
    cotrain       a target at a share that may change over time, beside a prior mix
    group_dro     shares that follow the excess loss (scripts/learn_mix.py learns a mix with it)

Shares are a pure function of the batch number and of `memory`, one number per group that feedback
leaves behind. `SamplingSchedule` keeps the memories with the batches from which they hold; a
checkpoint stores it.
"""

from __future__ import annotations

import base64
import fnmatch
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from octolike.config import ConfigError, unknown

OVER = ("dataset", "task")


@dataclass(frozen=True, eq=False)
class SamplingGroups:
    """The groups of a run: names, and how many steps each has (int64 [G]).

    asked: their weights in data.mix where they are datasets, float64 [G]; else None.
    kind: data.mix_weights (of a named mix: its own): "multipliers" of steps, or "shares".
    """

    names: tuple[str, ...]
    steps: np.ndarray
    asked: np.ndarray | None = None
    kind: str = "multipliers"

    def number(self, name: str, where: str) -> int:
        """Return a group's number; ConfigError with the nearest name where there is none."""
        if name not in self.names:
            raise ConfigError(unknown(f"dataset or task in {where}", name, self.names))
        return self.names.index(name)

    def spread(self, values: Mapping[str, float], where: str, other: float) -> np.ndarray:
        """Return a number per group, float64 [G], from {name or pattern such as 'put *': number}.

        The first pattern that fits a group counts; a group that none fits gets `other`. A pattern
        that fits nothing is a ConfigError with the nearest name.
        """
        result, free = np.full(len(self.names), other, np.float64), np.ones(len(self.names), bool)
        for pattern, value in values.items():
            fits = np.array([fnmatch.fnmatchcase(name, pattern) for name in self.names])
            if not fits.any():
                raise ConfigError(unknown(f"dataset or task in {where}", pattern, self.names))
            result[fits & free], free = value, free & ~fits
        return result


@dataclass
class Sampling:
    """What every strategy does; by default constant shares that feedback leaves alone."""

    over: str = "dataset"

    def __post_init__(self) -> None:
        if self.over not in OVER:
            raise ConfigError(unknown("value of data.sampling.over", self.over, OVER))

    def shares(self, groups: SamplingGroups, batch: int, memory: np.ndarray) -> np.ndarray:
        """Return the share of each group in a batch, float64 [G], summing to 1.

        memory: float64 [G], NaN for groups of which nothing has been fed back.
        """
        raise NotImplementedError

    def since(self, batch: int) -> int:
        """Return the first batch, at most `batch`, from which the shares have been the same."""
        return 0

    def remember(self, memory: np.ndarray, results: np.ndarray) -> np.ndarray:
        """Return the memory after feedback; results: float64 [G], NaN where there is none."""
        return memory


@dataclass
class MixtureSampling(Sampling):
    """Explicit weights: those of data.mix for datasets, `weights` {task: number} for tasks.

    They multiply steps or are shares, as data.mix_weights says; tasks without one have weight 1.
    """

    weights: dict[str, float] = field(default_factory=dict)

    def shares(self, groups: SamplingGroups, batch: int, memory: np.ndarray) -> np.ndarray:
        if groups.asked is not None:
            if self.weights:
                raise ConfigError("data.sampling.weights are of tasks; data.mix weighs datasets")
            weights = groups.asked
        else:
            where = "data.sampling.weights"
            weights = groups.spread(_positive(self.weights, where), where, 1.0)
        return _share(weights * groups.steps if groups.kind == "multipliers" else weights)


@dataclass
class ProportionalSampling(Sampling):
    """As many examples of a group as it has steps."""

    def shares(self, groups: SamplingGroups, batch: int, memory: np.ndarray) -> np.ndarray:
        return _share(groups.steps)


@dataclass
class UniformSampling(Sampling):
    """The same share for every group, however rare."""

    def shares(self, groups: SamplingGroups, batch: int, memory: np.ndarray) -> np.ndarray:
        return _share(np.ones(len(groups.names)))


@dataclass
class TemperatureSampling(Sampling):
    """Share ∝ steps^(1/t)."""

    t: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("t", self.t, 1e-3)

    def shares(self, groups: SamplingGroups, batch: int, memory: np.ndarray) -> np.ndarray:
        return _share((groups.steps / groups.steps.max()) ** (1 / self.t))


@dataclass
class CurriculumSampling(Sampling):
    """Ordered stages, or the easiest groups first: a function of the batch number alone.

    Stages: ((first batch, {name or pattern: multiplier of steps}), ...), the first from batch 0; a
    group that a stage does not name is not in it.

    Scores: {name or pattern: difficulty}. At batch n the easiest share c(n) of the groups is
    sampled, by size; c goes from `start` at batch 0 to 1 at `batches`, in 20 levels, along
    `pacing`: "linear", "root" (√: fast first) or "quadratic".
    """

    stages: tuple[tuple[int, dict[str, float]], ...] = ()
    scores: dict[str, float] = field(default_factory=dict)
    pacing: str = "linear"
    start: float = 0.2
    batches: int = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.stages) == bool(self.scores):
            raise ConfigError("data.sampling (curriculum) needs either 'stages' or 'scores'")
        firsts = [first for first, _ in self.stages]
        if self.stages and (firsts[0] != 0 or sorted(set(firsts)) != firsts):
            raise ConfigError(
                f"data.sampling.stages begin at batches {firsts}; expected rising numbers from 0"
            )
        for first, weights in self.stages:
            _positive(weights, f"data.sampling.stages (from batch {first})")
            if not weights:
                raise ConfigError(f"data.sampling.stages: the stage from batch {first} is empty")
        if self.pacing not in _PACING:
            raise ConfigError(unknown("value of data.sampling.pacing", self.pacing, _PACING))
        _at_least("batches", self.batches, 1)
        if not 0 < self.start <= 1:
            raise ConfigError(f"data.sampling.start is {self.start}; it must lie in (0, 1]")

    def shares(self, groups: SamplingGroups, batch: int, memory: np.ndarray) -> np.ndarray:
        if self.stages:
            first, weights = [s for s in self.stages if s[0] <= batch][-1]
            for _, other in self.stages:  # a name that nobody knows is said at the start
                groups.spread(other, "data.sampling.stages", 0.0)
            where = f"data.sampling.stages (from batch {first})"
            return _share(groups.spread(weights, where, 0.0) * groups.steps)
        difficulty = groups.spread(self.scores, "data.sampling.scores", np.nan)
        if np.isnan(difficulty).any():
            name = groups.names[int(np.argmax(np.isnan(difficulty)))]
            raise ConfigError(f"data.sampling.scores has no difficulty for {name!r} (or use '*')")
        count = max(1, round(self._opened(batch) * len(difficulty)))
        limit = np.sort(difficulty)[count - 1]  # equally difficult groups come together
        return _share(np.where(difficulty <= limit, groups.steps, 0))

    def since(self, batch: int) -> int:
        if self.stages:
            return [first for first, _ in self.stages if first <= batch][-1]
        if batch >= self.batches:
            return self.batches
        level, low, high = self._opened(batch), 0, batch
        while low < high:  # c never falls: the first batch of this level by bisection
            middle = (low + high) // 2
            low, high = (low, middle) if self._opened(middle) == level else (middle + 1, high)
        return low

    def _opened(self, batch: int) -> float:
        """Return c(batch)."""
        done = _PACING[self.pacing](min(batch / self.batches, 1.0))
        return self.start + (1 - self.start) * int(done * 20) / 20


@dataclass
class DifficultySampling(Sampling):
    """More of what goes badly: share ∝ base · difficulty^power.

    Feedback is {name: number}: "error" (≥ 0, a loss or action error; the difficulty itself) or
    "success" (a rate in [0, 1]; the difficulty is 1 minus it). Groups of which nothing is known
    count as the mean of those that are. `base`: "uniform" or "proportional" to steps; `floor` of
    the examples is always sampled by it, so that no group starves. `smoothing` of the old value
    stays at each feedback.
    """

    measure: str = "error"
    base: str = "uniform"
    power: float = 1.0
    floor: float = 0.1
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (
            ("measure", ("error", "success")),
            ("base", ("uniform", "proportional")),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    unknown(f"value of data.sampling.{name}", getattr(self, name), choices)
                )
        for name in ("floor", "smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"data.sampling.{name} must lie in [0, 1]")
        _at_least("power", self.power, 0)

    def shares(self, groups: SamplingGroups, batch: int, memory: np.ndarray) -> np.ndarray:
        base = _share(groups.steps if self.base == "proportional" else np.ones(len(groups.names)))
        known = np.isfinite(memory)
        if not known.any() or not memory[known].any():
            return base
        weight = np.where(known, memory, memory[known].mean()) ** self.power
        return self.floor * base + (1 - self.floor) * _share(base * weight)

    def remember(self, memory: np.ndarray, results: np.ndarray) -> np.ndarray:
        low, high = np.nanmin(results), np.nanmax(results)
        if low < 0 or (self.measure == "success" and high > 1):
            wanted = "errors of at least 0" if self.measure == "error" else "rates in [0, 1]"
            raise ConfigError(
                f"feedback from {low:g} to {high:g}; data.sampling.measure {self.measure!r} "
                f"expects {wanted}"
            )
        new = results if self.measure == "error" else 1 - results
        new = np.where(np.isnan(new), memory, new)
        kept = np.where(np.isnan(memory), new, memory)
        return self.smoothing * kept + (1 - self.smoothing) * new


@dataclass
class CotrainSampling(Sampling):
    """A target at a share of its own, the rest by size or as data.mix weighs it.

    target: a name or pattern; what it fits is the target, within which the same weights count. Its
    share of the examples goes from `share` at batch 0 to `final` (< 0: it stays) at `batches`, in
    20 levels.
    """

    target: str = ""
    share: float = 0.5
    final: float = -1.0
    batches: int = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.target:
            raise ConfigError(
                "data.sampling (cotrain) needs a 'target': a dataset, task or pattern"
            )
        for name, value in (("share", self.share), ("final", max(self.final, 0.0) or self.share)):
            if not 0 < value < 1:
                raise ConfigError(
                    f"data.sampling.{name} is {value}; it must lie between 0 and 1 (for the target "
                    "alone, leave the others out of data.mix)"
                )
        _at_least("batches", self.batches, 1)

    def shares(self, groups: SamplingGroups, batch: int, memory: np.ndarray) -> np.ndarray:
        target = groups.spread({self.target: 1.0}, "data.sampling.target", 0.0)
        if target.all():
            raise ConfigError(
                f"data.sampling.target {self.target!r} is all there is: "
                f"{', '.join(groups.names)}; add the prior datasets to data.mix"
            )
        weights = MixtureSampling(over=self.over).shares(groups, batch, memory)
        share = self._share_at(batch)
        return share * _share(weights * target) + (1 - share) * _share(weights * (1 - target))

    def since(self, batch: int) -> int:
        if self.final < 0:
            return 0
        if batch >= self.batches:
            return self.batches
        return -(-self._level(batch) * self.batches // 20)  # the first batch of this level

    def _level(self, batch: int) -> int:
        return min(20 * batch // self.batches, 20)

    def _share_at(self, batch: int) -> float:
        if self.final < 0:
            return self.share
        return self.share + (self.final - self.share) * self._level(batch) / 20


@dataclass
class GroupDROSampling(Sampling):
    """Shares that follow the excess loss, by `group_dro`; feedback is {name: excess loss}.

    The start is proportional to steps, `smoothing` of the examples is always uniform.
    """

    step_size: float = 1.0
    smoothing: float = 0.05

    def shares(self, groups: SamplingGroups, batch: int, memory: np.ndarray) -> np.ndarray:
        # the memory is the sum of the excess losses: the log of what has multiplied the weights
        return group_dro(
            np.nan_to_num(memory), _share(groups.steps), self.step_size, self.smoothing
        )

    def remember(self, memory: np.ndarray, results: np.ndarray) -> np.ndarray:
        total = np.nan_to_num(memory) + np.nan_to_num(np.maximum(results, 0))
        return total - total.min()


def group_dro(
    excess_losses: np.ndarray, weights: np.ndarray, step_size: float, smoothing: float
) -> np.ndarray:
    """Return the weights after one step of group distributionally robust optimisation, [G].

    weights ∝ weights · exp(step_size · max(excess loss, 0)), then `smoothing` of them uniform: an
    exponentiated gradient ascent on the worst group's excess over a reference (Re-Mix, DoReMi).
    """
    excess = np.maximum(np.asarray(excess_losses, np.float64), 0)
    grown = np.log(np.asarray(weights, np.float64)) + step_size * excess
    grown = np.exp(grown - grown.max())
    return (1 - smoothing) * grown / grown.sum() + smoothing / len(grown)


SAMPLING = {
    "mix": MixtureSampling,
    "proportional": ProportionalSampling,
    "uniform": UniformSampling,
    "temperature": TemperatureSampling,
    "curriculum": CurriculumSampling,
    "difficulty": DifficultySampling,
    "cotrain": CotrainSampling,
    "group_dro": GroupDROSampling,
}

_PACING = {"linear": lambda x: x, "root": np.sqrt, "quadratic": np.square}


class SamplingSchedule:
    """A strategy's shares over the batches of a run: constant from one batch to another."""

    def __init__(
        self, strategy: Sampling, groups: SamplingGroups, updates: Iterable[tuple[int, str]] = ()
    ) -> None:
        """updates: what `state` returned."""
        self.groups, self.over, self.known = groups, strategy.over, frozenset(groups.names)
        self._strategy = strategy
        nothing = np.full(len(groups.names), np.nan)
        self._updates = [(first, _unpack(text, len(nothing))) for first, text in updates]
        self._updates = self._updates or [(0, nothing)]
        self.shares(0)  # what does not fit is said now

    def since(self, batch: int) -> int:
        """Return the first batch from which the shares have been what they are at `batch`."""
        return max(self._update(batch)[0], self._strategy.since(batch))

    def shares(self, batch: int) -> np.ndarray:
        """Return the share of each group at a batch, float64 [G]."""
        return self._strategy.shares(self.groups, batch, self._update(batch)[1])

    def feedback(self, batch: int, results: Mapping[str, float]) -> bool:
        """Take in results that hold from `batch` on; return whether they change the shares."""
        found = np.full(len(self.groups.names), np.nan)
        for name, value in results.items():
            if not np.isfinite(value):
                raise ConfigError(f"feedback for {name!r} is {value}; expected a finite number")
            found[self.groups.number(name, "feedback")] = value
        _, memory = self._update(batch)
        new = self._strategy.remember(memory, found) if results else memory
        if new is memory:
            return False
        # rounded as it is stored, so that a resumed run has the same shares
        new = _unpack(_pack(new), len(new))
        # the position that is saved next is of the batches before this one
        self._updates = [u for u in self._updates if u[0] != batch][-1:] + [(batch, new)]
        return True

    def state(self) -> list[list[Any]]:
        """Return [[first batch, packed memory], ...]: JSON data."""
        return [[first, _pack(memory)] for first, memory in self._updates]

    def _update(self, batch: int) -> tuple[int, np.ndarray]:
        return [u for u in self._updates if u[0] <= batch or u is self._updates[0]][-1]


def describe_shares(groups: SamplingGroups, shares: np.ndarray, what: str, most: int = 20) -> str:
    """Return a table of the groups with the largest shares, and a line on the others."""
    order = np.argsort(-shares, kind="stable")
    rows = [(what, "steps", "share")]
    rows += [
        (groups.names[g] or "(unknown)", f"{groups.steps[g]:,}", f"{shares[g]:.2%}")
        for g in order[:most]
    ]
    wide = [min(max(map(len, column)), 60) for column in zip(*rows, strict=True)]
    lines = ["  ".join(x[:w].ljust(w) for x, w in zip(r, wide, strict=True)).rstrip() for r in rows]
    rest = order[most:]
    if len(rest):
        low, high = shares[rest].min(), shares[rest].max()
        lines.append(
            f"and {len(rest):,} more: {groups.steps[rest].sum():,} steps, "
            f"{shares[rest].sum():.2%} together, {low:.2g} to {high:.2g} each"
        )
    return "\n".join(lines)


def _share(weights: np.ndarray) -> np.ndarray:
    weights = np.asarray(weights, np.float64)
    return weights / weights.sum()


def _positive(weights: Mapping[str, Any], where: str) -> Mapping[str, float]:
    for name, weight in weights.items():
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not number or not 0 < weight < float("inf"):
            raise ConfigError(
                f"{where}: weight {weight!r} of {name!r} must be a positive number; to leave "
                "something out, leave out its name"
            )
    return weights


def _at_least(name: str, value: float, low: float) -> None:
    if not value >= low:
        raise ConfigError(f"data.sampling.{name} is {value}; it must be at least {low:g}")


def _pack(memory: np.ndarray) -> str:
    """Return a memory as text: two bytes a group, less where little is known."""
    return base64.b85encode(zlib.compress(memory.astype("<f2").tobytes(), 9)).decode()


def _unpack(text: str, count: int) -> np.ndarray:
    memory = np.frombuffer(zlib.decompress(base64.b85decode(text)), "<f2").astype(np.float64)
    if len(memory) != count:
        raise ConfigError(
            f"the saved sampling state is of {len(memory)} groups, this mix has {count}; start a "
            "new run, or restore the data's settings"
        )
    return memory
