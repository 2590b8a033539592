"""History windows and action chunks of a frame, with their masks.

All functions are pure and work on step indices, for frames t of episodes of T steps; t, T and `end`
are numbers or arrays [...] of the same shape. `xp` is the module of the arrays: numpy, or
tensorflow.experimental.numpy for tensors in a graph.

    window slot w is step             t − (W − 1) + w                clamped to 0 before the start
    chunk entry h of slot w is step   t − (W − 1) + w + h            clamped to T − 1 past the end

A chunk entry is valid before `end`: T, or the step of the goal image. The timestep mask is False
for slots before the start, and their chunks are invalid. Masked entries hold the clamped step's
action: finite, in range, and without a loss.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def window_steps(t: Any, window: int, xp: Any = np) -> tuple[Any, Any]:
    """Return (steps int [..., W], timestep_mask bool [..., W]) of the history that ends at t."""
    steps = xp.asarray(t)[..., None] - (window - 1) + xp.arange(window)
    return xp.maximum(steps, 0), steps >= 0


def chunk_steps(
    t: Any, window: int, horizon: int, length: Any, end: Any, xp: Any = np
) -> tuple[Any, Any]:
    """Return (steps int [..., W, H], valid bool [..., W, H]) of the chunks of each slot's step.

    length: T, steps of the episode. end: the first invalid step, at most T.
    """
    length, end = (xp.asarray(x)[..., None, None] for x in (length, end))
    start = (xp.asarray(t)[..., None] - (window - 1) + xp.arange(window))[..., None]
    steps = start + xp.arange(horizon)
    valid = (start >= 0) & (steps < end)
    return xp.minimum(xp.maximum(steps, 0), length - 1), valid
