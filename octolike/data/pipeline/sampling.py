"""Sampling strategies: the share of each dataset or task in the examples of a batch.

The groups are datasets or tasks (`over`). `SAMPLING` is looked up by config.data.sampling:

    mix           the weights of data.mix for datasets, `weights` for tasks
    proportional  share ∝ steps
    uniform       equal shares: small groups are repeated more often
    temperature   share ∝ steps^(1/t): t = 1 is proportional, large t uniform
    curriculum    ordered stages, or the easiest groups first; a function of the batch number
    difficulty    larger shares for groups with poor results, which the trainer feeds back
    cotrain       a target at a fixed or scheduled share, next to a prior mix
    group_dro     shares that follow the excess loss (octolike learn_mix learns a mix with it)

Shares are a pure function of the batch number and of `memory`, one number per group that feedback
updates. `SamplingSchedule` stores each memory with the first batch that uses it; checkpoints
contain its state.
"""

from __future__ import annotations

import base64
import fnmatch
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from octolike.config import ConfigError, option, unknown
from octolike.tables import text_table

OVER = ("dataset", "task")


@dataclass(frozen=True, eq=False)
class SamplingGroups:
    """The groups of a run.

    Attributes:
        names: names of the G groups.
        steps: int64 [G].
        weights: float64 [G], the weights in data.mix if the groups are datasets; else None.
        kind: data.mix_weights (or that of a named mix): "multipliers" of steps, or "shares".
    """

    names: tuple[str, ...]
    steps: np.ndarray
    weights: np.ndarray | None = None
    kind: str = "multipliers"

    def index(self, name: str, path: str) -> int:
        """Return the index of a group; ConfigError with the nearest name if it is unknown."""
        if name not in self.names:
            raise ConfigError(unknown(f"dataset or task in {path}", name, self.names))
        return self.names.index(name)

    def expand(self, values: Mapping[str, float], path: str, default: float) -> np.ndarray:
        """Return a number per group, float64 [G], from {name or pattern such as 'put *': number}.

        The first matching pattern counts; groups without a match get `default`. A pattern without a
        match raises ConfigError with the nearest name.
        """
        result = np.full(len(self.names), default, np.float64)
        unmatched = np.ones(len(self.names), bool)
        for pattern, value in values.items():
            matches = np.array([fnmatch.fnmatchcase(name, pattern) for name in self.names])
            if not matches.any():
                raise ConfigError(unknown(f"dataset or task in {path}", pattern, self.names))
            result[matches & unmatched] = value
            unmatched &= ~matches
        return result


@dataclass
class Sampling:
    """The interface of a strategy; by default its shares are constant and ignore feedback."""

    over: str = option("dataset", "groups that are sampled", choices=OVER)

    def shares(self, groups: SamplingGroups, batch: int, memory: np.ndarray) -> np.ndarray:
        """Return the share of each group in a batch, float64 [G], summing to 1.

        memory: float64 [G], NaN for groups without feedback.
        """
        raise NotImplementedError

    def since(self, batch: int) -> int:
        """Return the first batch, at most `batch`, from which the shares have been constant."""
        return 0

    def remember(self, memory: np.ndarray, results: np.ndarray) -> np.ndarray:
        """Return the memory after feedback; results: float64 [G], NaN for groups without one."""
        return memory


@dataclass
class MixtureSampling(Sampling):
    """Explicit weights: those of data.mix for datasets, `weights` for tasks.

    Weights are multipliers of steps or shares, as data.mix_weights defines; the default is 1.
    """

    weights: dict[str, float] = option(dict, "{task or pattern: weight}")

    def shares(self, groups: SamplingGroups, batch: int, memory: np.ndarray) -> np.ndarray:
        if groups.weights is not None:
            if self.weights:
                raise ConfigError(
                    "data.sampling.weights are for tasks; weights of datasets belong in data.mix"
                )
            weights = groups.weights
        else:
            path = "data.sampling.weights"
            weights = groups.expand(_check_positive(self.weights, path), path, 1.0)
        return _normalize(weights * groups.steps if groups.kind == "multipliers" else weights)


@dataclass
class ProportionalSampling(Sampling):
    """Shares proportional to steps."""

    def shares(self, groups: SamplingGroups, batch: int, memory: np.ndarray) -> np.ndarray:
        return _normalize(groups.steps)


@dataclass
class UniformSampling(Sampling):
    """Equal shares for groups of any size."""

    def shares(self, groups: SamplingGroups, batch: int, memory: np.ndarray) -> np.ndarray:
        return _normalize(np.ones(len(groups.names)))


@dataclass
class TemperatureSampling(Sampling):
    """Share ∝ steps^(1/t)."""

    t: float = option(2.0, "temperature", low=1e-3)

    def shares(self, groups: SamplingGroups, batch: int, memory: np.ndarray) -> np.ndarray:
        return _normalize((groups.steps / groups.steps.max()) ** (1 / self.t))


_PACING: dict[str, Callable[[float], float]] = {
    "linear": lambda x: x,
    "root": np.sqrt,
    "quadratic": np.square,
}


@dataclass
class CurriculumSampling(Sampling):
    """Ordered stages, or the easiest groups first: a function of the batch number alone.

    With stages: each lasts until the next one begins; groups that it does not name are left out.
    With scores: at batch n the easiest share c(n) of the groups is sampled, in proportion to steps;
    c rises from `start` at batch 0 to 1 at `batches`, in 20 levels, along `pacing`.
    """

    stages: tuple[tuple[int, dict[str, float]], ...] = option(
        (), "((first batch, {name or pattern: multiplier of steps}), ...), from batch 0"
    )
    scores: dict[str, float] = option(dict, "{name or pattern: difficulty}")
    pacing: str = option("linear", "how c rises; root: fast first", choices=tuple(_PACING))
    start: float = option(0.2, "share of the groups at batch 0, in (0, 1]")
    batches: int = option(10_000, "batches until all groups are sampled", low=1)

    def __post_init__(self) -> None:
        if bool(self.stages) == bool(self.scores):
            raise ConfigError("data.sampling (curriculum) needs either 'stages' or 'scores'")
        firsts = [first for first, _ in self.stages]
        if self.stages and (firsts[0] != 0 or sorted(set(firsts)) != firsts):
            raise ConfigError(
                f"data.sampling.stages begin at batches {firsts}; expected rising numbers from 0"
            )
        for first, weights in self.stages:
            _check_positive(weights, f"data.sampling.stages (from batch {first})")
            if not weights:
                raise ConfigError(f"data.sampling.stages: the stage from batch {first} is empty")
        if not 0 < self.start <= 1:
            raise ConfigError(f"data.sampling.start is {self.start}; it must lie in (0, 1]")

    def shares(self, groups: SamplingGroups, batch: int, memory: np.ndarray) -> np.ndarray:
        if self.stages:
            first, weights = [s for s in self.stages if s[0] <= batch][-1]
            for _, stage in self.stages:  # reject unknown names of later stages at the start
                groups.expand(stage, "data.sampling.stages", 0.0)
            path = f"data.sampling.stages (from batch {first})"
            return _normalize(groups.expand(weights, path, 0.0) * groups.steps)
        difficulty = groups.expand(self.scores, "data.sampling.scores", np.nan)
        if np.isnan(difficulty).any():
            name = groups.names[int(np.argmax(np.isnan(difficulty)))]
            raise ConfigError(f"data.sampling.scores has no difficulty for {name!r} (or use '*')")
        count = max(1, round(self._level(batch) * len(difficulty)))
        limit = np.sort(difficulty)[count - 1]  # equally difficult groups enter together
        return _normalize(np.where(difficulty <= limit, groups.steps, 0))

    def since(self, batch: int) -> int:
        if self.stages:
            return [first for first, _ in self.stages if first <= batch][-1]
        if batch >= self.batches:
            return self.batches
        level, low, high = self._level(batch), 0, batch
        while low < high:  # bisection: c never falls
            middle = (low + high) // 2
            low, high = (low, middle) if self._level(middle) == level else (middle + 1, high)
        return low

    def _level(self, batch: int) -> float:
        """Return c(batch)."""
        progress = _PACING[self.pacing](min(batch / self.batches, 1.0))
        return self.start + (1 - self.start) * int(progress * 20) / 20


@dataclass
class DifficultySampling(Sampling):
    """Larger shares for difficult groups: share ∝ base · difficulty^power.

    The difficulty comes from feedback: an error ≥ 0, or 1 − success rate. Groups without feedback
    get the mean difficulty of the others.
    """

    measure: str = option("error", "feedback that it uses", choices=("error", "success"))
    base: str = option(
        "uniform",
        "shares of equally difficult groups; proportional: to steps",
        choices=("uniform", "proportional"),
    )
    power: float = option(1.0, "exponent of the difficulty", low=0)
    floor: float = option(
        0.1, "part of the examples that ignores the difficulty, so no group starves", low=0, high=1
    )
    smoothing: float = option(0.0, "weight of the old difficulty at each feedback", low=0, high=1)

    def shares(self, groups: SamplingGroups, batch: int, memory: np.ndarray) -> np.ndarray:
        proportional = self.base == "proportional"
        base = _normalize(groups.steps if proportional else np.ones(len(groups.names)))
        has_feedback = np.isfinite(memory)
        if not has_feedback.any() or not memory[has_feedback].any():
            return base
        weight = np.where(has_feedback, memory, memory[has_feedback].mean()) ** self.power
        return self.floor * base + (1 - self.floor) * _normalize(base * weight)

    def remember(self, memory: np.ndarray, results: np.ndarray) -> np.ndarray:
        low, high = np.nanmin(results), np.nanmax(results)
        if low < 0 or (self.measure == "success" and high > 1):
            expected = "errors of at least 0" if self.measure == "error" else "rates in [0, 1]"
            raise ConfigError(
                f"feedback from {low:g} to {high:g}; data.sampling.measure {self.measure!r} "
                f"expects {expected}"
            )
        new = results if self.measure == "error" else 1 - results
        new = np.where(np.isnan(new), memory, new)
        old = np.where(np.isnan(memory), new, memory)
        return self.smoothing * old + (1 - self.smoothing) * new


@dataclass
class CotrainSampling(Sampling):
    """A target at a share of its own; the other groups by size or by the weights of data.mix.

    The target may match several groups, which keep their weights relative to each other. Its share
    moves from `share` at batch 0 to `final` at `batches`, in 20 levels.
    """

    target: str = option("", "name or pattern of the target")
    share: float = option(0.5, "share of the target at the start, between 0 and 1")
    final: float = option(-1.0, "share of the target at the end; < 0: constant")
    batches: int = option(10_000, "batches until the final share", low=1)

    def __post_init__(self) -> None:
        if not self.target:
            raise ConfigError(
                "data.sampling (cotrain) needs a 'target': a dataset, task or pattern"
            )
        for name, value in (("share", self.share), ("final", max(self.final, 0.0) or self.share)):
            if not 0 < value < 1:
                raise ConfigError(
                    f"data.sampling.{name} is {value}; it must lie between 0 and 1 (to train on "
                    "the target alone, remove the others from data.mix)"
                )

    def shares(self, groups: SamplingGroups, batch: int, memory: np.ndarray) -> np.ndarray:
        target = groups.expand({self.target: 1.0}, "data.sampling.target", 0.0)
        if target.all():
            raise ConfigError(
                f"data.sampling.target {self.target!r} matches all groups: "
                f"{', '.join(groups.names)}; add the prior datasets to data.mix"
            )
        weights = MixtureSampling(over=self.over).shares(groups, batch, memory)
        share = self._share_at(batch)
        prior = _normalize(weights * (1 - target))
        return share * _normalize(weights * target) + (1 - share) * prior

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

    They start proportional to steps.
    """

    step_size: float = option(1.0, "step size of the exponentiated gradient")
    smoothing: float = option(0.05, "part of the examples with uniform shares")

    def shares(self, groups: SamplingGroups, batch: int, memory: np.ndarray) -> np.ndarray:
        # The memory is the sum of excess losses: the log of the factor on the initial weights.
        return group_dro(
            np.nan_to_num(memory), _normalize(groups.steps), self.step_size, self.smoothing
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
    logits = np.log(np.asarray(weights, np.float64)) + step_size * excess
    updated = np.exp(logits - logits.max())
    return (1 - smoothing) * updated / updated.sum() + smoothing / len(updated)


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


class SamplingSchedule:
    """The shares of a strategy over the batches of a run, piecewise constant."""

    def __init__(
        self, strategy: Sampling, groups: SamplingGroups, updates: Iterable[tuple[int, str]] = ()
    ) -> None:
        """updates: a saved `state()`."""
        self.groups, self.over, self.names = groups, strategy.over, frozenset(groups.names)
        self._strategy = strategy
        empty = np.full(len(groups.names), np.nan)
        self._updates = [(first, _unpack(text, len(empty))) for first, text in updates]
        self._updates = self._updates or [(0, empty)]
        self.shares(0)  # raises now if the strategy does not match the groups

    def since(self, batch: int) -> int:
        """Return the first batch from which the shares have been the same as at `batch`."""
        return max(self._update(batch)[0], self._strategy.since(batch))

    def shares(self, batch: int) -> np.ndarray:
        """Return the share of each group at a batch, float64 [G]."""
        return self._strategy.shares(self.groups, batch, self._update(batch)[1])

    def feedback(self, batch: int, results: Mapping[str, float]) -> bool:
        """Apply results from `batch` on; return whether the memory changes."""
        values = np.full(len(self.groups.names), np.nan)
        for name, value in results.items():
            if not np.isfinite(value):
                raise ConfigError(f"feedback for {name!r} is {value}; expected a finite number")
            values[self.groups.index(name, "feedback")] = value
        _, memory = self._update(batch)
        new = self._strategy.remember(memory, values) if results else memory
        if new is memory:
            return False
        # Rounded as in the saved state, so that a resumed run has the same shares.
        new = _unpack(_pack(new), len(new))
        # The next saved position may lie before this batch, so the previous update stays.
        self._updates = [u for u in self._updates if u[0] != batch][-1:] + [(batch, new)]
        return True

    def state(self) -> list[list[Any]]:
        """Return [[first batch, packed memory], ...]: JSON data."""
        return [[first, _pack(memory)] for first, memory in self._updates]

    def _update(self, batch: int) -> tuple[int, np.ndarray]:
        return [u for u in self._updates if u[0] <= batch or u is self._updates[0]][-1]


def describe_shares(groups: SamplingGroups, shares: np.ndarray, title: str, most: int = 20) -> str:
    """Return a table of the `most` largest groups by share, and a line on the remaining ones."""
    order = np.argsort(-shares, kind="stable")
    rows = [
        ((groups.names[g] or "(unknown)")[:60], f"{groups.steps[g]:,}", f"{shares[g]:.2%}")
        for g in order[:most]
    ]
    table = text_table(rows, (title, "steps", "share"), "lrr")
    remaining = order[most:]
    if not len(remaining):
        return table
    low, high = shares[remaining].min(), shares[remaining].max()
    return (
        f"{table}\nand {len(remaining):,} more: {groups.steps[remaining].sum():,} steps, "
        f"{shares[remaining].sum():.2%} together, {low:.2g} to {high:.2g} each"
    )


def _normalize(weights: np.ndarray) -> np.ndarray:
    weights = np.asarray(weights, np.float64)
    return weights / weights.sum()


def _check_positive(weights: Mapping[str, Any], path: str) -> Mapping[str, float]:
    for name, weight in weights.items():
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not is_number or not 0 < weight < float("inf"):
            raise ConfigError(
                f"{path}: weight {weight!r} of {name!r} must be a positive number; to leave a "
                "group out, remove its name"
            )
    return weights


def _pack(memory: np.ndarray) -> str:
    """Return a memory as compressed text, at most two bytes per group."""
    return base64.b85encode(zlib.compress(memory.astype("<f2").tobytes(), 9)).decode()


def _unpack(text: str, count: int) -> np.ndarray:
    memory = np.frombuffer(zlib.decompress(base64.b85decode(text)), "<f2").astype(np.float64)
    if len(memory) != count:
        raise ConfigError(
            f"the saved sampling state is of {len(memory)} groups, this mix has {count}; start a "
            "new run, or restore the data's settings"
        )
    return memory
