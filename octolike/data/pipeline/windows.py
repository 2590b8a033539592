"""History windows and action chunks of a frame, with their masks.

All functions are pure and work on step indices, for frames t of episodes of T steps; t, T and `end`
are numbers or arrays [...] of the same shape:

    window slot w is step             t − (W − 1) + w                clamped to 0 before the start
    chunk entry h of slot w is step   t − (W − 1) + w + h            clamped to T − 1 past the end

A chunk entry is valid before `end`: T, or the step of the goal image. The timestep mask is False
for slots before the start, and their chunks are invalid. Masked entries hold the clamped step's
action: finite, in range, and without a loss.
"""

from __future__ import annotations

import numpy as np


def window_steps(t: np.ndarray | int, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (steps int [..., W], timestep_mask bool [..., W]) of the history that ends at t."""
    steps = np.asarray(t)[..., None] - (window - 1) + np.arange(window)
    return np.maximum(steps, 0), steps >= 0


def chunk_steps(
    t: np.ndarray | int,
    window: int,
    horizon: int,
    length: np.ndarray | int,
    end: np.ndarray | int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (steps int [..., W, H], valid bool [..., W, H]) of the chunks of each slot's step.

    length: T, steps of the episode. end: the first invalid step, at most T.
    """
    length, end = np.asarray(length)[..., None, None], np.asarray(end)[..., None, None]
    start = (np.asarray(t)[..., None] - (window - 1) + np.arange(window))[..., None]
    steps = start + np.arange(horizon)
    valid = (start >= 0) & (steps < end)
    return np.clip(steps, 0, length - 1), valid
