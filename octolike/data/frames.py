"""Episode to frames: the history window, the action chunk, and which of it is real.

All functions are pure and work on indices, for one frame t of an episode of T steps:

    window slot w shows step          t − (W − 1) + w                clamped to 0 before the start
    chunk entry h of slot w is step   t − (W − 1) + w + h            clamped to T − 1 past the end

A chunk entry is valid from the slot's own step up to (not including) `end`: T, or the step whose
image is the goal. Slots before the start are masked by the timestep mask, their chunks too. Under
a False mask stands the clamped step's action: finite, in range, and never trained on.
"""

from __future__ import annotations

import numpy as np


def window_steps(t: int, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (steps int [W], timestep_mask bool [W]) of the history that ends at t."""
    steps = t - (window - 1) + np.arange(window)
    return np.maximum(steps, 0), steps >= 0


def chunk_steps(
    t: int, window: int, horizon: int, length: int, end: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (steps int [W, H], valid bool [W, H]) of the chunks of each slot's step.

    length: T, steps of the episode. end: first step that is past the goal, at most T.
    """
    start = t - (window - 1) + np.arange(window)[:, None]
    steps = start + np.arange(horizon)
    valid = (start >= 0) & (steps < end)
    return np.clip(steps, 0, length - 1), valid


def pad_last(x: np.ndarray, width: int) -> np.ndarray:
    """Return x [..., n] padded with zeros to [..., width]."""
    if x.shape[-1] == width:  # nearly always; np.pad is slow even then
        return x
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])
