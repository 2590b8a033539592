"""The ways to the first state: fresh parameters, those of another run, low-rank changes."""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh

from octolike import types
from octolike.config import Config, ConfigError, OptimConfig
from octolike.config.paths import aligned
from octolike.model import pretrained
from octolike.model.network import NamedRows, named_rows
from octolike.train import checkpoint, lora, optimizer, sharding
from octolike.train import state as states
from octolike.train.state import Params, TrainState

FEW = 8  # parameters whose paths fit on a line or two


def make_init(
    model: nn.Module, spec: types.BatchSpec, config: OptimConfig
) -> tuple[Callable[[jax.Array], Params], list[str]]:
    """Return what makes fresh parameters from a key, low-rank changes too; and the frozen paths.

    Prints what each pattern of optim.frozen and optim.lora decides on.
    """
    plain = lambda key: states.init_params(model, spec, key)
    shapes = jax.eval_shape(plain, jax.random.key(0))
    low_rank = lora.kernels(shapes, config.lora)
    changed = optimizer.chosen(low_rank)

    def init(key: jax.Array) -> Params:
        params = plain(key)
        return params | lora.init(params, changed, config.lora_rank, jax.random.fold_in(key, 1))

    matches = optimizer.frozen_paths(shapes, config.frozen, may_all=bool(changed))
    for pattern, paths in matches.items():
        verb = "trained" if pattern.startswith("!") else "frozen"
        print(f"{verb} by {pattern!r}: {_briefly(paths)}")
    for pattern, paths in low_rank.items():
        how = "not changed" if pattern.startswith("!") else f"changed at rank {config.lora_rank}"
        print(f"{how} by {pattern!r}: {_briefly(paths)}")
    return init, sorted({*optimizer.chosen(matches), *changed})


def given(
    config: Config, settings: Mapping[str, Any], shapes: Params, names: types.Names
) -> Params:
    """Return the parameters that do not start afresh: train.init_from's, and pretrained ones.

    settings: the model's, with files that are there. A file is not read where the other run's
    parameters take its place.
    """
    taken = take_over(config, shapes, names) if config.train.init_from else {}
    left = optimizer.flatten(shapes).keys() - optimizer.flatten(taken).keys()
    parts = {path.partition("/")[0] for path in left if "/encoder/" in path}
    read = pretrained.read(settings, {part: shapes[part] for part in sorted(parts)})
    return optimizer.merge(read, taken)


def take_over(config: Config, shapes: Params, names: types.Names) -> Params:
    """Return the parameters that go over from train.init_from; prints what the runs differ in.

    names: of this run; what belongs to a robot or task goes to the one of the same name.
    """
    options = config.train
    other = checkpoint.load_run(options.init_from, options.init_step or None, config.plugins)
    source = f"{options.init_from} at step {other.step}"
    print(f"starting from the parameters of {source}")
    changes = checkpoint.differences(aligned(other.config, config), config)
    print("settings that differ (there -> here):", *(changes or ["none"]), sep="\n  ")
    there = named_rows(dataclasses.asdict(other.config.model), other.names)
    here = named_rows(dataclasses.asdict(config.model), names)
    given = by_name(other.params, there, here, options.reinit, source)
    plain = {k: v for k, v in shapes.items() if k != lora.NAME}
    adapted = states.adapt(plain, given, options.reinit, source)
    print(states.describe_adapted(adapted))
    return optimizer.unflatten(adapted.taken)


def by_name(
    params: Params,
    there: Mapping[str, NamedRows],
    here: Mapping[str, NamedRows],
    fresh: Sequence[str],
    source: str,
) -> Params:
    """Return another run's parameters with the rows of robots and tasks in the order of this one.

    there, here: whose rows parameters have, by pattern (`named_rows`). Prints whose go over. Raises
    ConfigError for a robot or task that the other run has not, unless `fresh` (train.reinit) has
    the parameter.
    """
    flat = dict(optimizer.flatten(params))
    for pattern in there.keys() & here.keys():
        a, b = there[pattern], here[pattern]
        free = [path for f in fresh for path in fnmatch.filter(flat, f)]
        paths = sorted(set(fnmatch.filter(flat, pattern)) - set(free))
        if a.names == b.names or not paths:
            continue
        new = [name for name in b.names if name not in a.names]
        if new:
            raise ConfigError(
                f"{paths[0]} has a row for each of {', '.join(a.names)} in {source}, and none for "
                f"{', '.join(new)}; let it start afresh: --config.train.reinit=\"('{pattern}',)\""
            )
        print(f"{pattern}: the rows of {', '.join(b.names)}, of {', '.join(a.names)}")
        index = [a.names.index(name) for name in b.names]
        flat |= {path: np.asarray(flat[path])[index] * (a.gain / b.gain) for path in paths}
    return optimizer.unflatten(flat)


class Start:
    """The ways to the first state, on the devices. frozen: parameter paths."""

    def __init__(
        self,
        tx: optax.GradientTransformation,
        frozen: Sequence[str],
        config: OptimConfig,
        mesh: Mesh,
    ) -> None:
        self._create = functools.partial(
            states.create, tx=tx, frozen=frozen, ema=config.ema > 0, lora_scale=config.lora_scale
        )
        self._mesh = mesh

    def scratch(
        self, init: Callable[[jax.Array], Params], key: jax.Array, given: Params | None = None
    ) -> TrainState:
        """Return the state of fresh parameters, with given ones in place of some."""
        fresh = lambda key, given: self._create(optimizer.merge(init(key), given))
        where = sharding.of_state(jax.eval_shape(fresh, key, given or {}), self._mesh)
        return jax.jit(fresh, out_shardings=where)(key, given or {})

    def abstract(self, shapes: Params) -> TrainState:
        """Return shapes, dtypes and shardings of the state: where a checkpoint is read to."""
        put = lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=sharding.of_array(x.shape, self._mesh)
        )
        return jax.tree.map(put, jax.eval_shape(self._create, shapes))


def _briefly(paths: Sequence[str]) -> str:
    """Return the paths, or, of many, how many each part has; parameters.txt names every one."""
    if len(paths) <= FEW:
        return ", ".join(paths) or "nothing"
    parts = collections.Counter(path.partition("/")[0] for path in paths)
    return ", ".join(f"{part} ({n})" if n > 1 else part for part, n in parts.items())
