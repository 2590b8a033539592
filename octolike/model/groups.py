"""A head with separate parameters per group of robots or tasks, selected per example.

The parameters are those of the inner head with a leading group axis. The groups of a batch are
data, so that a change of groups compiles nothing again.

A step sorts its examples into tiles: up to S examples of one group, which pass through that
group's head together. B examples of G groups never need more than `tile_count` tiles, a number
that is static when the step is traced:

    groups of the batch   b a b b b c   S = 2, at most 4 tiles
    tiles                 [a ·] [b b] [b b] [c ·]

S = 1 copies the parameters of a head for every example, S = B computes every head for all; in
between, the work is at most about twice that of a shared head. `tile_size` takes the cheapest size.
In inference, one example is one tile and computes one head only.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import freeze

from octolike.config import ConfigError, option, unknown
from octolike.model.head import WrappedHead
from octolike.types import Context, Names, TokenGroup

BY = {"embodiment": "embodiments", "task": "tasks"}


class PerGroup(WrappedHead):
    """The inner head with separate parameters per group; a head like any other to its callers."""

    by: str = option("embodiment", "names that the groups consist of", choices=tuple(BY))
    groups: Mapping[str, tuple[str, ...]] = option(
        freeze({}), "{group: shell patterns over the names}; {}: one group per name"
    )
    # The cost is flat around the best size, so one number serves all machines.
    tile_cost: int = option(
        8, "cost of a tile (copied parameters, summed gradients) in examples", low=0
    )
    group_names: tuple[str, ...] = option((), "names of the groups, from the run's names")
    member: tuple[int, ...] = option((), "group of each embodiment or task, from the run's names")

    def reads(self) -> tuple[str, ...]:
        paths = ("task.task_id",) if self.by == "task" else ()
        return (*paths, *super().reads())

    def draw(self, batch: int) -> dict[str, jax.Array]:
        return inner_draw(self, batch)

    @nn.compact
    def _run(
        self,
        method: str,
        group: TokenGroup,
        values: jax.Array | None,
        context: Context,
        **options: Any,
    ) -> jax.Array:
        """Call the inner head's `method` with the parameters of each example's group."""
        head = self.head.clone(parent=None, name=None)  # a function of parameters, owning none
        names = [name for name in ("noise", "dropout") if self.has_rng(name)]
        count = len(self.group_names)
        stacked = self.param("stacked", stacked_init, head, count, group, context)
        ids = context.embodiment if self.by == "embodiment" else context.task_id
        ids = jnp.asarray(self.member, jnp.int32)[ids]
        tiles = tiled(ids, count, tile_size(len(ids), count, self.tile_cost))
        keys = {name: jax.random.split(self.make_rng(name), len(tiles.group)) for name in names}

        def run(group_of_tile: jax.Array, example: jax.Array, rngs: dict[str, jax.Array]):
            params = jax.tree.map(lambda x: jnp.asarray(x)[group_of_tile], stacked)
            *inputs, head_options = jax.tree.map(
                lambda x: jnp.asarray(x)[example], (group, values, context, options)
            )
            return head.apply({"params": params}, *inputs, **head_options, rngs=rngs, method=method)

        out = jax.vmap(run)(tiles.group, tiles.example, keys)
        return out.reshape(-1, *out.shape[2:])[tiles.place]


class Tiles(NamedTuple):
    """Examples sorted by group: T tiles of S places.

    group: int [T]; example: int [T, S], 0 at empty places; place: int [B], the index of each
    example among the T · S places.
    """

    group: jax.Array
    example: jax.Array
    place: jax.Array


def tile_count(batch: int, groups: int, size: int) -> int:
    """Return the number of tiles that suffices for any distribution of examples over groups."""
    return (batch + min(batch, groups) * (size - 1)) // size


def tile_size(batch: int, groups: int, tile_cost: int) -> int:
    """Return the S of least cost; a tile costs its places, empty ones included, and tile_cost."""
    sizes = sorted({min(2**i, batch) for i in range(batch.bit_length() + 1)})
    return min(sizes, key=lambda size: tile_count(batch, groups, size) * (size + tile_cost))


def tiled(ids: jax.Array, groups: int, size: int) -> Tiles:
    """Return the tiles of a batch, for the group ids int [B] of its examples."""
    batch = len(ids)
    member = ids[:, None] == jnp.arange(groups)
    rank = jnp.where(member, jnp.cumsum(member, axis=0) - 1, 0).sum(axis=1)
    ends = jnp.cumsum(-(-member.sum(axis=0) // size))
    starts = jnp.append(0, ends[:-1])
    count = tile_count(batch, groups, size)
    place = starts[ids] * size + rank
    example = jnp.zeros(count * size, jnp.int32).at[place].set(jnp.arange(batch))
    group = jnp.searchsorted(ends, jnp.arange(count), side="right")
    return Tiles(jnp.minimum(group, groups - 1), example.reshape(count, size), place)


def stacked_init(
    key: jax.Array, head: nn.Module, groups: int, group: TokenGroup, context: Context
) -> Any:
    """Return independent parameters of `groups` heads, [groups, ...] per leaf."""
    return jax.vmap(lambda k: inner_init(k, head, group, context))(jax.random.split(key, groups))


def inner_init(key: jax.Array, head: nn.Module, group: TokenGroup, context: Context) -> Any:
    """Return initial parameters of an unbound head, for inputs of these shapes."""
    group, context = jax.tree.map(lambda x: x[:1], (group, context))
    shape = (*group.tokens.shape[:2], head.horizon, head.action_dim)
    rngs = dict(zip(("params", "noise"), jax.random.split(key), strict=True))
    return head.init(rngs, group, jnp.zeros(shape), context)["params"]


def inner_draw(wrapper: Any, batch: int) -> dict[str, jax.Array]:
    """Return the noise of a wrapped head's chunks, each from a key of its own (`Head.draw`)."""
    head = wrapper.head.clone(parent=None, name=None)

    def draw_one(key: jax.Array) -> dict[str, jax.Array]:
        noise = head.apply({}, 1, rngs={"noise": key}, method="draw")
        return jax.tree.map(lambda x: x[0], noise)

    return jax.vmap(draw_one)(jax.random.split(wrapper.make_rng("noise"), batch))


def membership(
    by: str, patterns: Mapping[str, Sequence[str]], names: Names, path: str
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return (names of the groups, the group of each embodiment or task).

    Args:
        by: a key of `BY`.
        patterns: {group: shell patterns over the names}; {}: one group per name.
        names: the run's names.
        path: the component's place in the config, for errors.

    Raises:
        ConfigError: if a pattern matches nothing, or a name is in no group or in several.
    """
    if by not in BY:
        raise ConfigError(unknown(f"value of {path}.by", by, BY))
    members = getattr(names, BY[by])
    if not members:
        raise ConfigError(f"{path}.by is {by!r}, but this run has no {BY[by]}")
    if not patterns:
        return tuple(members), tuple(range(len(members)))
    groups_of: dict[str, list[str]] = {name: [] for name in members}
    for group, group_patterns in patterns.items():
        if isinstance(group_patterns, str):
            raise ConfigError(
                f"{path}.groups.{group} is {group_patterns!r}; expected a tuple of patterns"
            )
        for pattern in group_patterns:
            matches = fnmatch.filter(members, pattern)
            if not matches:
                kind = f"pattern of {path}.groups.{group}: it matches none of the {BY[by]}"
                raise ConfigError(unknown(kind, pattern, members))
            for name in matches:
                groups_of[name] += [group] if group not in groups_of[name] else []
    missing = [name for name, groups in groups_of.items() if not groups]
    if missing:
        raise ConfigError(
            f"{path}.groups leave out {', '.join(missing)}; each of the {BY[by]} must be in one "
            f"({', '.join(patterns)})"
        )
    repeated = [f"{name} ({', '.join(g)})" for name, g in groups_of.items() if len(g) > 1]
    if repeated:
        raise ConfigError(f"{path}.groups have more than one group for {', '.join(repeated)}")
    order = list(patterns)
    return tuple(order), tuple(order.index(groups[0]) for groups in groups_of.values())
