"""One set of head parameters per group of robots or tasks, chosen per example inside one step.

The parameters are those of the inner head with a group axis in front. Which group an example is of
is data, so nothing is compiled again when that changes.

A step sorts its examples into tiles: up to S examples of one group, who go through that group's
head together. B examples of G groups never need more than `tile_count` tiles, a number known when
the step is traced:

    groups of the batch   b a b b b c   S = 2, at most 4 tiles
    tiles                 [a ·] [b b] [b b] [c ·]

S = 1 copies a head's parameters for every example, S = B computes every head for all; in between,
the work stays within about twice a shared head's. `tile_size` takes the cheapest. One example
(acting) is one tile: it costs its own head and no other.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from octolike.config import ConfigError, unknown
from octolike.types import Context, Names, TokenGroup

# A tile's costs beyond its examples, in examples: its group's parameters are copied, and their
# gradients added up. The choice is flat around the best size, so one number serves all machines.
TILE_COST = 8
BY = {"embodiment": "embodiments", "task": "tasks"}


class PerGroup(nn.Module):
    """The inner head with parameters of its own for each group.

    member: the group of each embodiment or task id. Otherwise a head like any other.
    """

    head: nn.Module
    by: str
    member: tuple[int, ...]
    groups: tuple[str, ...]

    @property
    def readout(self) -> str:
        return self.head.readout

    @property
    def horizon(self) -> int:
        return self.head.horizon

    @property
    def action_dim(self) -> int:
        return self.head.action_dim

    def reads(self) -> tuple[str, ...]:
        own = ("task.task_id",) if self.by == "task" else ()
        return (*own, *self.head.reads())

    def __call__(self, group: TokenGroup, action: jax.Array, context: Context) -> jax.Array:
        return self._run("__call__", group, action, context)

    def sample(self, group: TokenGroup, dims: jax.Array | None, context: Context) -> jax.Array:
        return self._run("sample", group, dims, context)

    @nn.compact
    def _run(
        self, method: str, group: TokenGroup, values: jax.Array | None, context: Context
    ) -> jax.Array:
        """Return the inner head's `method`, each example by its own group's parameters."""
        head = self.head.clone(parent=None, name=None)  # a function of parameters, owning none
        names = [name for name in ("noise", "dropout") if self.has_rng(name)]
        stacked = self.param("stacked", stacked_init, head, len(self.groups), group, context)
        ids = context.embodiment if self.by == "embodiment" else context.task_id
        ids = jnp.asarray(self.member, jnp.int32)[ids]
        size = tile_size(len(ids), len(self.groups))
        tiles = tiled(ids, len(self.groups), size)
        keys = {name: jax.random.split(self.make_rng(name), len(tiles.group)) for name in names}

        def run(group_of_tile: jax.Array, example: jax.Array, rngs: dict[str, jax.Array]):
            params = jax.tree.map(lambda x: jnp.asarray(x)[group_of_tile], stacked)
            inputs = jax.tree.map(lambda x: jnp.asarray(x)[example], (group, values, context))
            return head.apply({"params": params}, *inputs, rngs=rngs, method=method)

        out = jax.vmap(run)(tiles.group, tiles.example, keys)
        return out.reshape(-1, *out.shape[2:])[tiles.place]


class Tiles(NamedTuple):
    """Examples sorted by group: T tiles of S places.

    group: int [T]; example: int [T, S], 0 at places that stay empty; place: int [B], where each
    example is among the T · S.
    """

    group: jax.Array
    example: jax.Array
    place: jax.Array


def tile_count(batch: int, groups: int, size: int) -> int:
    """Return how many tiles are enough, however the examples spread over the groups."""
    return (batch + min(batch, groups) * (size - 1)) // size


def tile_size(batch: int, groups: int) -> int:
    """Return the S of least cost: examples computed (empty places too) and tiles set up."""
    sizes = sorted({min(2**i, batch) for i in range(batch.bit_length() + 1)})
    return min(sizes, key=lambda size: tile_count(batch, groups, size) * (size + TILE_COST))


def tiled(ids: jax.Array, groups: int, size: int) -> Tiles:
    """Return the tiles of examples whose groups are `ids`, int [B]."""
    batch = len(ids)
    member = ids[:, None] == jnp.arange(groups)
    rank = jnp.where(member, jnp.cumsum(member, axis=0) - 1, 0).sum(axis=1)
    ends = jnp.cumsum(-(-member.sum(axis=0) // size))
    first = jnp.append(0, ends[:-1])
    count = tile_count(batch, groups, size)
    place = first[ids] * size + rank
    example = jnp.zeros(count * size, jnp.int32).at[place].set(jnp.arange(batch))
    group = jnp.searchsorted(ends, jnp.arange(count), side="right")
    return Tiles(jnp.minimum(group, groups - 1), example.reshape(count, size), place)


def stacked_init(
    key: jax.Array, head: nn.Module, groups: int, group: TokenGroup, context: Context
) -> Any:
    """Return parameters of `groups` heads that start independently: [groups, ...] per leaf."""
    return jax.vmap(lambda k: inner_init(k, head, group, context))(jax.random.split(key, groups))


def inner_init(key: jax.Array, head: nn.Module, group: TokenGroup, context: Context) -> Any:
    """Return the parameters of a head that belongs to no model, for inputs like these."""
    group, context = jax.tree.map(lambda x: x[:1], (group, context))
    shape = (*group.tokens.shape[:2], head.horizon, head.action_dim)
    rngs = dict(zip(("params", "noise"), jax.random.split(key), strict=True))
    return head.init(rngs, group, jnp.zeros(shape), context)["params"]


def membership(
    by: str, patterns: Mapping[str, Sequence[str]], names: Names, path: str
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the groups and, for each embodiment or task, its group.

    patterns: {group: shell patterns over the names}; {}: a group per name. ConfigError where a
    pattern matches nothing, or a name is in no group or in several.
    """
    if by not in BY:
        raise ConfigError(unknown(f"value of {path}.by", by, BY))
    known = getattr(names, BY[by])
    if not known:
        raise ConfigError(f"{path}.by is {by!r}, but this run has no {BY[by]}")
    if not patterns:
        return tuple(known), tuple(range(len(known)))
    owners: dict[str, list[str]] = {name: [] for name in known}
    for group, wanted in patterns.items():
        if isinstance(wanted, str):
            raise ConfigError(f"{path}.groups.{group} is {wanted!r}; expected a tuple of patterns")
        for pattern in wanted:
            found = fnmatch.filter(known, pattern)
            if not found:
                what = f"pattern of {path}.groups.{group}: it matches none of the {BY[by]}"
                raise ConfigError(unknown(what, pattern, known))
            for name in found:
                owners[name] += [group] if group not in owners[name] else []
    lost = [name for name, owner in owners.items() if not owner]
    if lost:
        raise ConfigError(
            f"{path}.groups leave out {', '.join(lost)}; each of the {BY[by]} must be in one "
            f"({', '.join(patterns)})"
        )
    twice = [f"{name} ({', '.join(owner)})" for name, owner in owners.items() if len(owner) > 1]
    if twice:
        raise ConfigError(f"{path}.groups have more than one group for {', '.join(twice)}")
    order = list(patterns)
    return tuple(order), tuple(order.index(o[0]) for o in owners.values())
