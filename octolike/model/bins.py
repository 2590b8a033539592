"""Discretisation of proprio and actions: numbers to bins and back.

n bins have n + 1 increasing edges; bin i holds edges[i] ≤ x < edges[i + 1]. Edges may be [n + 1],
the same for every value, or [..., n + 1] with leading axes that broadcast against the values'.

Values outside all bins go to the "nearest" bin, or, as in Octo, to the "first", which then holds
both ends. Octo clips values into the range of uniform bins beforehand: that is "nearest".
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from octolike.config import ConfigError, unknown

TAIL = 1e-6  # default probability left out at each end of normal bins
KINDS = ("uniform", "normal")
OUTSIDE = ("nearest", "first")


def edges(kind: str, n: int, low: float, high: float, tail: float = TAIL) -> np.ndarray:
    """Return the edges, float32 [n + 1], of "uniform" bins in [low, high], or of "normal" ones.

    Normal bins are equally likely under the standard normal distribution, except for `tail` at
    each end; they ignore low and high. Raises ConfigError for an unknown kind, n < 1 or low ≥ high.
    """
    if kind not in KINDS:
        raise ConfigError(unknown("kind of bins", kind, KINDS))
    if n < 1:
        raise ConfigError(f"bins is {n}; it must be at least 1")
    # Computed outside of any trace, so that the float32 rounding is the same everywhere.
    with jax.ensure_compile_time_eval():
        if kind == "normal":
            probability = jnp.linspace(tail, 1 - tail, n + 1)
            return np.asarray(jax.scipy.stats.norm.ppf(probability), np.float32)
        if not low < high:
            raise ConfigError(f"bins from {low} to {high}: low must be smaller than high")
        return np.asarray(jnp.linspace(low, high, n + 1), np.float32)


def encode(x: jax.Array, edges: Any, outside: str = "nearest") -> jax.Array:
    """Return the bins, int32 [...], of values [...]."""
    if outside not in OUTSIDE:
        raise ConfigError(unknown("outside", outside, OUTSIDE))
    n = edges.shape[-1] - 1
    index = (x[..., None] >= edges).sum(axis=-1, dtype=jnp.int32) - 1
    if outside == "nearest":
        return jnp.clip(index, 0, n - 1)
    return jnp.where((index < 0) | (index >= n), 0, index)


def decode(index: jax.Array, edges: Any) -> jax.Array:
    """Return the centres, float32 [...], of bins int [...]."""
    edges = jnp.asarray(edges, jnp.float32)
    centres = (edges[..., 1:] + edges[..., :-1]) / 2
    centres = jnp.broadcast_to(centres, (*index.shape, centres.shape[-1]))
    return jnp.take_along_axis(centres, index[..., None], axis=-1)[..., 0]
