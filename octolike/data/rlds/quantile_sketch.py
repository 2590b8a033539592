"""A mergeable summary of vectors: moments exactly, quantiles within a stated bound.

Values are counted in bins of equal relative width: a bin is what float32 numbers share when only
their sign, exponent and first 8 of 23 mantissa bits are kept, so that a bin's ends differ by at
most 2⁻⁸ = 0.4 % of the value. Next to its count, a bin keeps the sum of its values, and answers
with their mean: values that stand alone in their bin, as all do in small data and as constants and
gripper commands always do, come back exactly.

    bound: each of the two values between which np.quantile interpolates is off by at most 0.4 % of
    itself (below 1e-38, by at most 1e-38)

Memory is bounded by the bins that are in use, a few thousand per dimension, whatever the number of
values. Merging adds counts: in any order and grouping it gives the same bins, and moments that
differ by float64 rounding only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from octolike.embodiment import STATISTICS, Statistics

RELATIVE_ERROR = 2.0**-8
QUANTILES = {"p01": 0.01, "p99": 0.99}
_DROPPED = 15  # mantissa bits
_SPAN = 1 << (32 - _DROPPED)  # bins of a dimension; few are ever in use
_BUFFER = 16_384  # steps that wait to be counted together: sorting them once is quicker


@dataclass(eq=False)
class QuantileSketch:
    """Of float32 vectors [dims], one per step.

    Attributes:
        dims: of each vector.
        steps, episodes: how many were added; an `update` is one episode.
        mean, deviation: float64 [dims]: the mean, and the sum of squared differences from it.
        low, high: float32 [dims], the extremes.
        keys: int64 [bins in use], sorted: dimension · _SPAN + bin.
        counts: int64 [bins in use].
        sums: float64 [bins in use], of the values in each bin.
    """

    dims: int
    steps: int = 0
    episodes: int = 0
    mean: np.ndarray = field(init=False)
    deviation: np.ndarray = field(init=False)
    low: np.ndarray = field(init=False)
    high: np.ndarray = field(init=False)
    keys: np.ndarray = field(init=False)
    counts: np.ndarray = field(init=False)
    sums: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.mean, self.deviation = np.zeros((2, self.dims))
        self.low, self.high = np.full((2, self.dims), np.inf, np.float32)
        self.high = -self.high
        self.keys = self.counts = np.zeros(0, np.int64)
        self.sums = np.zeros(0)
        self._waiting: list[np.ndarray] = []
        self._waiting_steps = 0

    def update(self, x: np.ndarray) -> None:
        """Add an episode, finite float32 [T, dims]."""
        if x.ndim != 2 or x.shape[1] != self.dims:
            raise ValueError(f"a sketch of [T, {self.dims}] cannot take {x.shape}")
        self._waiting.append(np.asarray(x, np.float32))
        self._waiting_steps += len(x)
        self.episodes += 1
        if self._waiting_steps >= _BUFFER:
            self.flush()

    def merge(self, other: QuantileSketch) -> None:
        """Add what another sketch has counted."""
        if other.dims != self.dims:
            raise ValueError(f"sketches of {self.dims} and {other.dims} dimensions cannot merge")
        self.flush()
        other.flush()
        self.episodes += other.episodes
        self._moments(other.steps, other.mean, other.deviation)
        self.low, self.high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)
        self._add(other.keys, other.counts, other.sums)

    def finish(self) -> Statistics:
        """Return the statistics of all that was added; ValueError where that is nothing."""
        self.flush()
        if not self.steps:
            raise ValueError("a sketch of no steps has no statistics")
        values = {
            "mean": self.mean,
            "std": np.sqrt(self.deviation / self.steps),
            "min": self.low,
            "max": self.high,
            **{name: self.quantile(q) for name, q in QUANTILES.items()},
        }
        arrays = {name: np.asarray(values[name], np.float32) for name in STATISTICS}
        return Statistics(**arrays, steps=self.steps, episodes=self.episodes)

    def quantile(self, q: float) -> np.ndarray:
        """Return the q-quantiles, float64 [dims], interpolated between ranks as np.quantile's."""
        self.flush()
        ends = np.searchsorted(self.keys, np.arange(1, self.dims + 1) * _SPAN)
        result, begin = np.empty(self.dims), 0
        rank = q * (self.steps - 1)
        for d, end in enumerate(ends):
            below = np.cumsum(self.counts[begin:end])
            values = self.sums[begin:end] / self.counts[begin:end]
            at = np.searchsorted(below, [np.floor(rank), np.ceil(rank)], side="right")
            lower, upper = values[at]
            result[d] = lower + (upper - lower) * (rank - np.floor(rank))
            begin = end
        return np.clip(result, self.low, self.high)

    def flush(self) -> None:
        """Count what still waits to be counted."""
        if not self._waiting:
            return
        x = np.concatenate(self._waiting)
        self._waiting, self._waiting_steps = [], 0
        mean = x.mean(0, np.float64)
        self._moments(len(x), mean, np.square(x - mean).sum(0))
        self.low, self.high = np.minimum(self.low, x.min(0)), np.maximum(self.high, x.max(0))
        keys = _bins(x) + np.arange(self.dims) * _SPAN
        self._add(keys.ravel(), np.ones(keys.size, np.int64), x.ravel().astype(np.float64))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return everything as arrays, from which `from_arrays` makes the same sketch."""
        self.flush()
        names = ("mean", "deviation", "low", "high", "keys", "counts", "sums")
        size = np.array([self.dims, self.steps, self.episodes])
        return {"size": size} | {name: getattr(self, name) for name in names}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> QuantileSketch:
        """Return the sketch that `arrays` describes."""
        sketch = cls(*arrays["size"].tolist())
        for name in arrays.keys() - {"size"}:
            setattr(sketch, name, arrays[name])
        return sketch

    def _moments(self, steps: int, mean: np.ndarray, deviation: np.ndarray) -> None:
        """Merge the moments of two sets (Chan, Golub and LeVeque 1983): stable for any means."""
        total = self.steps + steps
        if steps:
            apart = mean - self.mean
            self.mean = self.mean + apart * (steps / total)
            self.deviation = self.deviation + deviation + apart**2 * (self.steps * steps / total)
        self.steps = total

    def _add(self, keys: np.ndarray, counts: np.ndarray, sums: np.ndarray) -> None:
        keys = np.concatenate([self.keys, keys])
        self.keys, where = np.unique(keys, return_inverse=True)
        counts, sums = np.concatenate([self.counts, counts]), np.concatenate([self.sums, sums])
        size = len(self.keys)
        # Weights are float64, in which counts are exact below 2⁵³.
        self.counts = np.bincount(where, counts, size).astype(np.int64)
        self.sums = np.bincount(where, sums, size)


def _bins(x: np.ndarray) -> np.ndarray:
    """Return the bin of each float32, int64 of the same shape, ascending with the value."""
    bits = np.ascontiguousarray(x + np.float32(0)).view(np.int32).astype(np.int64)  # −0 is 0
    bits = np.where(bits < 0, -(bits & 0x7FFFFFFF) - 1, bits)
    return (bits >> _DROPPED) + _SPAN // 2
