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

from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from octolike.types import TokenGroup

MUCH = 4  # the part of the sequence that is read is at most a quarter, or all of it is computed


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


def positions(groups: TokenSequence, names: Collection[str]) -> tuple[int, ...] | None:
    """Return the positions of some groups per timestep, in the order of the sequence.

    None if that saves little, or if a name is not that of one group of each timestep.
    """
    task, steps = groups.task, groups.observation | groups.readout
    if not steps.keys() >= set(names):
        return None
    sizes = {name: g.tokens.shape[-2] for name, g in steps.items()}
    prefix = sum(g.tokens.shape[-2] for g in task.values())
    window = next(iter(steps.values())).tokens.shape[1]
    in_step = np.repeat([name in names for name in sizes], list(sizes.values()))
    read = np.flatnonzero(np.concatenate([np.zeros(prefix, bool), np.tile(in_step, window)]))
    few = len(read) * MUCH <= prefix + window * len(in_step)
    return tuple(read.tolist()) if few else None


def split_read(
    x: jax.Array, groups: TokenSequence, names: Collection[str]
) -> dict[str, TokenGroup]:
    """Return {name: group} with the tokens x [B, n, D] at `positions`."""
    steps = {k: g for k, g in (groups.observation | groups.readout).items() if k in names}
    window = next(iter(steps.values())).tokens.shape[1]
    pieces = _cut(x.reshape(x.shape[0], window, -1, x.shape[-1]), list(steps.values()))
    return {name: TokenGroup(t, g.mask) for (name, g), t in zip(steps.items(), pieces, strict=True)}


def attention_mask(groups: TokenSequence) -> AttentionMask:
    """Return the mask of the sequence."""
    task, steps = _ordered(groups)
    sizes = [tuple(g.mask.shape[-1] for g in kind.values()) for kind in groups]
    step_mask = jnp.concatenate([g.mask for g in steps], axis=-1)
    step_mask = step_mask.reshape(step_mask.shape[0], -1)
    visible = jnp.concatenate([*(g.mask for g in task), step_mask], axis=-1)
    return AttentionMask(visible, Layout(sizes[0], sizes[1], sizes[2], steps[0].mask.shape[1]))


class Layout(NamedTuple):
    """The static part of a mask: the numbers of tokens of the groups, and the window."""

    task: tuple[int, ...]
    observation: tuple[int, ...]
    readout: tuple[int, ...]
    window: int

    @property
    def pattern(self) -> np.ndarray:
        """Return bool [N, N], the table above."""
        return pattern(*self)

    def spans(self) -> list[tuple[int, int]]:
        """Return (start, end) of each timestep's queries; their keys are those before `end`.

        The first span also contains the task groups. Attention works span by span, to skip the
        blocks of the mask that are always empty.
        """
        step, prefix = sum((*self.observation, *self.readout)), sum(self.task)
        ends = [prefix + step * (t + 1) for t in range(self.window)] or [prefix]
        return list(zip((0, *ends), ends, strict=False))

    def exclusions(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Return bool (query [n, C], key [N, C]) of a span: C reasons why a query skips a key.

        A query may attend to a key unless a reason applies to both: the pattern as a matrix of low
        rank. There is one reason for the task groups, and one per readout.
        """
        step = [*self.observation, *self.readout]
        numbers = [0, *([*range(1, 1 + len(step))] * self.window)]
        group = np.repeat(numbers, [sum(self.task), *(step * self.window)])[:end]
        readouts = range(1 + len(self.observation), 1 + len(step))
        query = [group == 0, *(group != r for r in readouts)]
        key = [group != 0, *(group == r for r in readouts)]
        return np.stack(query, axis=-1)[start:], np.stack(key, axis=-1)


@struct.dataclass
class AttentionMask:
    """Which query may attend to which key: the layout's pattern, and the key is visible.

    visible: bool [B, N], False for padded timesteps, missing sensors and missing instructions.
    """

    visible: jax.Array
    layout: Layout = struct.field(pytree_node=False)

    def dense(
        self, queries: slice | np.ndarray = slice(None), keys: int | None = None
    ) -> jax.Array:
        """Return bool [B, 1, n, N] of some queries and the first `keys` keys; None: all."""
        allowed = jnp.asarray(self.layout.pattern[queries, :keys])
        return allowed[None, None] & self.visible[:, None, None, :keys]


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
