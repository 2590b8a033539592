"""What a robot executes of predicted action chunks, as a state machine without time; numpy only.

A chunk [H, A] predicts the actions of the H steps from its observation on. Inference takes `delay`
steps, so the first `delay` actions of a chunk come too late; meanwhile the robot executes those of
the previous chunk (H = 6, execute = 3, delay = 2):

    step          0   1   2   3   4   5   6   7   8
    chunk of 0    a0  a1  a2  a3  a4  a5
    chunk of 3                ·   ·   b2  b3  b4  b5
    executed      a0  a1  a2  a3  a4  b2  b3  …

    prefix of the chunk of 3:  a3 a4 (known)  a5 (planned, but replaced by b2)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class ActionPrefix(NamedTuple):
    """The actions that a robot plans for the first steps of a new chunk, in its units.

    actions: float [n, A], n ≤ H; delay: the number of them that the robot will have executed when
    the chunk arrives, at most n.
    """

    actions: np.ndarray
    delay: int


def check_prefix(prefix: ActionPrefix, horizon: int, width: int) -> None:
    """Raise ValueError unless a prefix has at most `horizon` finite actions of `width` numbers."""
    actions = np.asarray(prefix.actions)
    if actions.ndim != 2 or actions.shape[1] != width or len(actions) > horizon:
        raise ValueError(
            f"the prefix has actions {list(actions.shape)}; expected [n, {width}] with n at most "
            f"the chunk's {horizon}"
        )
    if not 0 <= prefix.delay <= len(actions):
        raise ValueError(
            f"the prefix has a delay of {prefix.delay} and {len(actions)} actions; the delay must "
            "be 0 to their number"
        )
    if not np.isfinite(actions).all():
        raise ValueError("the prefix has actions that are not finite")


def prefix_weights(delay: int, length: int, horizon: int) -> np.ndarray:
    """Return how closely a chunk must follow its prefix, float32 [H] (Black et al. 2025, eq. 5).

    1 for the `delay` known actions, then an exponential decay over the other planned ones, up to
    `length`; 0 beyond.
    """
    i = np.arange(horizon)
    c = np.clip((length - i) / (length - delay + 1), 0, 1)
    decay = c * np.expm1(c) / np.expm1(1)
    return np.where(i < delay, 1, np.where(i < length, decay, 0)).astype(np.float32)
