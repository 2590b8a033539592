"""Token groups as one sequence, and its attention mask.

The sequence of a window of W timesteps, task groups first:

    [task groups] [t=0: observation groups, readouts] [t=1: observation groups, readouts] ...

Rows may attend to columns as follows:

                   task     observation, same     own readout, same    other
                   groups   or earlier timestep   or earlier timestep  readouts
    task           yes      no                    no                   no
    observation    yes      yes                   no                   no
    readout        yes      yes                   yes                  no

So no other group attends to a readout, and different readouts are independent of one another. No
token attends to a masked one (padded timestep, missing sensor, missing instruction).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from octolike.types import TokenGroup


class TokenSequence(NamedTuple):
    """All token groups of a batch by name, projected to one width D.

    task: tokens [B, N, D]; observation and readout: tokens [B, W, N, D].
    """

    task: dict[str, TokenGroup]
    observation: dict[str, TokenGroup]
    readout: dict[str, TokenGroup]


def join(groups: TokenSequence) -> jax.Array:
    """Return the sequence's tokens, [B, N, D]."""
    task, steps = _ordered(groups)
    blocks = [g.tokens for g in task]
    x = jnp.concatenate([g.tokens for g in steps], axis=-2)
    blocks.append(x.reshape(x.shape[0], -1, x.shape[-1]))
    return jnp.concatenate(blocks, axis=-2)


def split(x: jax.Array, groups: TokenSequence) -> TokenSequence:
    """Return the groups with tokens from the sequence x [B, N, D]: the inverse of `join`."""
    task, steps = _ordered(groups)
    prefix = sum(g.tokens.shape[-2] for g in task)
    window = steps[0].tokens.shape[1]
    pieces = iter(
        [
            *_cut(x[:, :prefix], task),
            *_cut(x[:, prefix:].reshape(x.shape[0], window, -1, x.shape[-1]), steps),
        ]
    )
    return TokenSequence(
        *({name: TokenGroup(next(pieces), g.mask) for name, g in kind.items()} for kind in groups)
    )


def attention_mask(groups: TokenSequence) -> jax.Array:
    """Return bool [B, 1, N, N], True if a query (third axis) may attend to a key (last axis)."""
    task, steps = _ordered(groups)
    window = steps[0].mask.shape[1]
    task_sizes, observation_sizes, readout_sizes = (
        [g.mask.shape[-1] for g in kind.values()] for kind in groups
    )
    step_mask = jnp.concatenate([g.mask for g in steps], axis=-1)
    step_mask = step_mask.reshape(step_mask.shape[0], -1)
    visible = jnp.concatenate([*(g.mask for g in task), step_mask], axis=-1)
    allowed = pattern(task_sizes, observation_sizes, readout_sizes, window)
    return jnp.asarray(allowed)[None, None] & visible[:, None, None, :]


def ends(groups: TokenSequence) -> tuple[int, ...]:
    """Return the end of each timestep in the sequence; no token attends beyond its timestep's end.

    The first span also contains the task groups. Attention works span by span, to skip the blocks
    of the mask that are always empty.
    """
    task, steps = _ordered(groups)
    prefix = sum(g.tokens.shape[-2] for g in task)
    step_length = sum(g.tokens.shape[-2] for g in steps)
    return tuple(prefix + step_length * (t + 1) for t in range(steps[0].tokens.shape[1]))


def pattern(
    task: Sequence[int], observation: Sequence[int], readout: Sequence[int], window: int
) -> np.ndarray:
    """Return bool [N, N], the table above, for groups of the given numbers of tokens.

    Computed per pair of groups, then expanded to tokens: 690 tokens take well under 1 ms.
    """
    step = [*observation, *readout]
    sizes = [*task, *(step * window)]
    # Task groups have the time -1, so that `earlier` covers the task column too.
    time = np.concatenate([np.full(len(task), -1), np.repeat(np.arange(window), len(step))])
    group = np.concatenate(
        [np.arange(len(task)), np.tile(len(task) + np.arange(len(step)), window)]
    )
    is_readout = group >= len(task) + len(observation)
    earlier = time[None, :] <= time[:, None]
    same_group = group[None, :] == group[:, None]
    table = earlier & (~is_readout[None, :] | same_group)
    return table.repeat(sizes, axis=0).repeat(sizes, axis=1)


def _ordered(groups: TokenSequence) -> tuple[list[TokenGroup], list[TokenGroup]]:
    return list(groups.task.values()), [*groups.observation.values(), *groups.readout.values()]


def _cut(x: jax.Array, groups: list[TokenGroup]) -> list[jax.Array]:
    ends = np.cumsum([g.tokens.shape[-2] for g in groups])[:-1]
    return jnp.split(x, ends, axis=-2) if groups else []
