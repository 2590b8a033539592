"""Shares of the actions that a head cannot output, per dimension, with the remedy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from octolike.data.rlds.quantile_sketch import QuantileSketch
from octolike.embodiment import RARE, Embodiment

WARN = 1e-3  # share of the steps
ROUNDING = 1e-4  # of the scale: float32, and values at the ends of the range


def describe_reach(
    record: Embodiment, sketches: Sequence[QuantileSketch], low: float, high: float
) -> list[str]:
    """Return lines on actions that the normalisation clips, and on those beyond a head's outputs.

    sketches: of the actions of the record's datasets; low, high: range of the head's outputs,
    normalised.
    """
    total = QuantileSketch(sketches[0].dims)
    for sketch in sketches:
        total.merge(sketch)
    shift, scale = record.affine("action")
    is_clipped = record.is_clipped("action")

    def shares_beyond(begin: float, end: float) -> np.ndarray:
        margin = ROUNDING * scale
        return total.shares_outside(shift + begin * scale - margin, shift + end * scale + margin)

    lines, clipped = [], np.where(is_clipped, shares_beyond(-1, 1), 0)
    if (clipped > 0).any():
        lines.append(f"clipped by the normalisation of {record.name}: {_listed(record, clipped)}")
    # A clipped dimension lies within ±1, so that only a head of less reach misses more of it.
    beyond = np.where(is_clipped & (low <= -1) & (high >= 1), 0, shares_beyond(low, high))
    if (beyond > WARN).any():
        lines.append(
            f"warning: the head outputs {low:.3g} to {high:.3g} (normalised), so it cannot reach "
            f"these actions of {record.name}: {_listed(record, beyond)}. Normalise them by their "
            "extremes (Layout.normalization='minmax' in the spec), or give the head more reach "
            "(its clip, limit or bins)"
        )
    lost = np.where(is_clipped, shares_beyond(-RARE, RARE), 0)
    if (lost > WARN).any():
        lines.append(
            f"warning: rarely used actions of {record.name} lie more than {RARE:g} times beyond "
            f"the 1st to 99th percentile and are lost: {_listed(record, lost)}. Set "
            "data.range_check='strict', or Layout.normalization='minmax' in the spec"
        )
    return lines


def _listed(record: Embodiment, shares: np.ndarray) -> str:
    return ", ".join(
        f"{record.learned.names[d]} {shares[d]:.2%}" for d in np.flatnonzero(shares > 0)
    )
