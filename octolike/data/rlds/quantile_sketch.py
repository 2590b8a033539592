"""A mergeable summary of vectors: exact moments, and quantiles within a stated bound.

Values are counted in bins of equal relative width. A bin holds the float32 numbers that share sign,
exponent and the first 8 of 23 mantissa bits, so that its ends differ by at most 2⁻⁸ = 0.4 % of the
value. A bin also keeps the sum of its values, and its mean stands for all of them. A value alone in
its bin is therefore exact: all values of small data, constants and gripper commands.

    bound: each of the two values between which np.quantile interpolates has an error of at most
    0.4 % of itself (below 1e-38: at most 1e-38)

Memory depends on the number of bins in use, a few thousand per dimension, not on the number of
values. Merging adds counts: any order and grouping gives the same bins, and moments that differ
only by float64 rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from octolike.embodiment import EXTREME, Statistics

RELATIVE_ERROR = 2.0**-8
QUANTILES = {"p01": 0.01, "p99": 0.99}
_DROPPED = 15  # mantissa bits
_SPAN = 1 << (32 - _DROPPED)  # bins of a dimension; few are in use
_MOMENTS, _BINS = ("mean", "deviation", "low", "high"), ("keys", "counts", "sums")
_BUFFER = 16_384  # steps that are counted together: sorting them at once is faster


@dataclass(eq=False)
class QuantileSketch:
    """The summary of float32 vectors [dims], one per step.

    Attributes:
        dims: size of each vector.
        steps, episodes: numbers added so far; each `update` is one episode.
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
        self._pending: list[np.ndarray] = []
        self._pending_steps = 0

    def update(self, x: np.ndarray) -> None:
        """Add an episode, finite float32 [T, dims]."""
        if x.ndim != 2 or x.shape[1] != self.dims:
            raise ValueError(f"expected values [T, {self.dims}], got {list(x.shape)}")
        self._pending.append(np.asarray(x, np.float32))
        self._pending_steps += len(x)
        self.episodes += 1
        if self._pending_steps >= _BUFFER:
            self.flush()

    def merge(self, other: QuantileSketch) -> None:
        """Add the contents of another sketch, which stays usable."""
        if other.dims != self.dims:
            raise ValueError(f"sketches of {self.dims} and {other.dims} dimensions cannot merge")
        self.flush()
        other.flush()
        self.episodes += other.episodes
        self._merge_moments(other.steps, other.mean, other.deviation)
        self.low, self.high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)
        self._add_bins(other.keys, other.counts, other.sums)

    def statistics(self) -> Statistics:
        """Return the statistics of all steps; ValueError if there are none."""
        self.flush()
        if not self.steps:
            raise ValueError("no steps were added: there are no statistics")
        values = {
            "mean": self.mean,
            "std": np.sqrt(self.deviation / self.steps),
            "min": self.low,
            "max": self.high,
            **{name: self.quantile(q) for name, q in QUANTILES.items()},
        }
        values |= {"low": self.extreme(EXTREME), "high": self.extreme(1 - EXTREME)}
        arrays = {name: np.asarray(x, np.float32) for name, x in values.items()}
        return Statistics(**arrays, steps=self.steps, episodes=self.episodes)

    def extreme(self, q: float) -> np.ndarray:
        """Return the q-quantiles, float64 [dims], at the rank farther from the median.

        Without interpolation, at most that share of the steps lies beyond them, also in few steps.
        """
        self.flush()
        rank = q * (self.steps - 1)
        return self._at_rank(int(np.floor(rank) if q < 0.5 else np.ceil(rank)))

    def shares_outside(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Return the share of values below `low` or above `high`, float64 [dims]; both [dims]."""
        self.flush()
        dims, values = self.keys // _SPAN, self.sums / self.counts
        is_outside = (values < low[dims]) | (values > high[dims])
        return np.bincount(dims, self.counts * is_outside, self.dims) / self.steps

    def quantile(self, q: float) -> np.ndarray:
        """Return the q-quantiles, float64 [dims], interpolated between ranks like np.quantile."""
        self.flush()
        rank = q * (self.steps - 1)
        lower, upper = self._at_rank(int(np.floor(rank))), self._at_rank(int(np.ceil(rank)))
        return lower + (upper - lower) * (rank - np.floor(rank))

    def flush(self) -> None:
        """Count the pending steps."""
        if not self._pending:
            return
        x = np.concatenate(self._pending)
        self._pending, self._pending_steps = [], 0
        mean = x.mean(0, np.float64)
        self._merge_moments(len(x), mean, np.square(x - mean).sum(0))
        self.low, self.high = np.minimum(self.low, x.min(0)), np.maximum(self.high, x.max(0))
        keys = _bins(x) + np.arange(self.dims) * _SPAN
        self._add_bins(keys.ravel(), np.ones(keys.size, np.int64), x.ravel().astype(np.float64))

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the contents as arrays, for `from_arrays`."""
        self.flush()
        size = np.array([self.dims, self.steps, self.episodes])
        return {"size": size} | {name: getattr(self, name) for name in (*_MOMENTS, *_BINS)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> QuantileSketch:
        """Return the sketch with the contents that `to_arrays` returned; else ValueError."""
        if arrays.keys() != {"size", *_MOMENTS, *_BINS}:
            raise ValueError(f"a sketch of statistics has the arrays {sorted(arrays)}")
        size = arrays["size"]
        if size.shape != (3,) or size.dtype.kind != "i" or size.min() < 0:
            raise ValueError("the size of a sketch of statistics is malformed")
        if arrays["mean"].shape != (size[0],):
            raise ValueError("the mean of a sketch of statistics has another size")
        sketch = cls(*size.tolist())
        bins = (len(arrays["keys"]),)
        for name in (*_MOMENTS, *_BINS):
            current, x = getattr(sketch, name), arrays[name]
            if x.dtype != current.dtype or x.shape != (current.shape if name in _MOMENTS else bins):
                raise ValueError(f"{name} of a sketch of statistics is {x.dtype} {list(x.shape)}")
            setattr(sketch, name, x)
        return sketch

    def _at_rank(self, rank: int) -> np.ndarray:
        """Return the value at a rank of the sorted values, 0 the smallest, float64 [dims]."""
        ends = np.searchsorted(self.keys, np.arange(1, self.dims + 1) * _SPAN)
        result, begin = np.empty(self.dims), 0
        for d, end in enumerate(ends):
            below = np.cumsum(self.counts[begin:end])
            i = begin + int(np.searchsorted(below, rank, side="right"))
            result[d] = self.sums[i] / self.counts[i]
            begin = end
        return np.clip(result, self.low, self.high)

    def _merge_moments(self, steps: int, mean: np.ndarray, deviation: np.ndarray) -> None:
        """Merge the moments of two sets (Chan, Golub and LeVeque 1983): stable for any means."""
        total = self.steps + steps
        if steps:
            gap = mean - self.mean
            self.mean = self.mean + gap * (steps / total)
            self.deviation = self.deviation + deviation + gap**2 * (self.steps * steps / total)
        self.steps = total

    def _add_bins(self, keys: np.ndarray, counts: np.ndarray, sums: np.ndarray) -> None:
        keys = np.concatenate([self.keys, keys])
        self.keys, bins = np.unique(keys, return_inverse=True)
        counts, sums = np.concatenate([self.counts, counts]), np.concatenate([self.sums, sums])
        size = len(self.keys)
        # bincount adds in float64, in which counts are exact below 2⁵³.
        self.counts = np.bincount(bins, counts, size).astype(np.int64)
        self.sums = np.bincount(bins, sums, size)


def _bins(x: np.ndarray) -> np.ndarray:
    """Return the bin of each float32, int64 of the same shape, increasing with the value."""
    bits = np.ascontiguousarray(x + np.float32(0)).view(np.int32).astype(np.int64)  # −0 is 0
    bits = np.where(bits < 0, -(bits & 0x7FFFFFFF) - 1, bits)
    return (bits >> _DROPPED) + _SPAN // 2
