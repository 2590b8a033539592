"""The initial state of a run: parameters from scratch, from another run, or with LoRA."""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh

from octolike import types
from octolike.config import Config, ConfigError, OptimConfig
from octolike.config.paths import aligned
from octolike.embodiment import Embodiment
from octolike.model import pretrained
from octolike.model.network import NamedRows, named_rows
from octolike.train import checkpoint, lora, optimizer, parameter_transfer, sharding
from octolike.train import state as states
from octolike.train.state import Params, TrainState

# Conventions that give a head's outputs their meaning.
MEANING = ("action.names", "action.units", "action.absolute", "representation")
FEW = 8  # paths of parameters that fit on a line or two


def make_init(
    model: nn.Module, spec: types.BatchSpec, config: OptimConfig
) -> tuple[Callable[[jax.Array], Params], list[str]]:
    """Return (init_fn, frozen_paths); init_fn(key) creates all parameters, LoRA included.

    Prints the matches of each pattern in optim.frozen and optim.lora.
    """

    def init_model(key: jax.Array) -> Params:
        return states.init_params(model, spec, key)

    shapes = jax.eval_shape(init_model, jax.random.key(0))
    lora_matches = lora.match_kernels(shapes, config.lora)
    lora_paths = optimizer.selected_paths(lora_matches)

    def init(key: jax.Array) -> Params:
        params = init_model(key)
        return params | lora.init(params, lora_paths, config.lora_rank, jax.random.fold_in(key, 1))

    matches = optimizer.frozen_paths(shapes, config.frozen, may_all=bool(lora_paths))
    for pattern, paths in matches.items():
        verb = "trained" if pattern.startswith("!") else "frozen"
        print(f"{verb} by {pattern!r}: {_summarize_paths(paths)}")
    for pattern, paths in lora_matches.items():
        effect = "no LoRA" if pattern.startswith("!") else f"LoRA of rank {config.lora_rank}"
        print(f"{effect} by {pattern!r}: {_summarize_paths(paths)}")
    return init, sorted({*optimizer.selected_paths(matches), *lora_paths})


def load_params(
    config: Config,
    settings: Mapping[str, Any],
    shapes: Params,
    names: types.Names,
    embodiments: Sequence[Embodiment] = (),
) -> Params:
    """Return the parameters that are loaded: those of train.init_from, and pretrained encoders.

    Args:
        config: this run's config.
        settings: settings of the model, with paths of existing files. A file is not read if the
            other run's parameters take its place.
        shapes: shapes of all parameters.
        names: this run's names.
        embodiments: records of this run, compared with the other run's.
    """
    transferred: Params = {}
    if config.train.init_from:
        transferred = params_from_run(config, shapes, names, embodiments)
    missing = optimizer.flatten(shapes).keys() - optimizer.flatten(transferred).keys()
    parts = {path.partition("/")[0] for path in missing if "/encoder/" in path}
    encoders = pretrained.read(settings, {part: shapes[part] for part in sorted(parts)})
    return optimizer.merge(encoders, transferred)


def check_reinitialized(reinit: Sequence[str], frozen: Iterable[str]) -> None:
    """Raise ConfigError for parameters that start at random and would never be trained."""
    frozen = list(frozen)
    stuck = [pattern for pattern in reinit if fnmatch.filter(frozen, pattern)]
    if stuck:
        named = "', '!".join(stuck)
        raise ConfigError(
            f"train.reinit {', '.join(stuck)} starts parameters afresh that optim.frozen keeps at "
            f"their random values: add '!{named}' to optim.frozen (configs/finetune.py does for "
            "head=fresh, proprio=fresh and camera=...)"
        )


def params_from_run(
    config: Config, shapes: Params, names: types.Names, embodiments: Sequence[Embodiment] = ()
) -> Params:
    """Return the parameters taken over from train.init_from; print how the two runs differ.

    names: this run's names; parameters of a robot or task go to the robot or task of the same name.
    """
    options = config.train
    run = checkpoint.load_run(options.init_from, options.init_step or None, config.plugins)
    source = f"{options.init_from} at step {run.step}"
    print(f"starting from the parameters of {source}")
    changes = checkpoint.differences(aligned(run.config, config), config)
    print("settings that differ (there -> here):", *(changes or ["none"]), sep="\n  ")
    for embodiment in embodiments:
        print("\n  ".join(describe_conventions(run.embodiments, embodiment, options.reinit)))
    source_rows = named_rows(dataclasses.asdict(run.config.model), run.names)
    rows = named_rows(dataclasses.asdict(config.model), names)
    params = reorder_named_rows(run.params, source_rows, rows, options.reinit, source)
    shapes = {k: v for k, v in shapes.items() if k != lora.NAME}
    transfer = parameter_transfer.transfer_params(shapes, params, options.reinit, source)
    print(parameter_transfer.describe_transfer(transfer))
    return optimizer.unflatten(transfer.taken)


def describe_conventions(
    records: Sequence[Embodiment], embodiment: Embodiment, reinit: Sequence[str]
) -> list[str]:
    """Return lines: how a robot's conventions differ from those of another run's robot.

    That robot is the one of the same name, or else the first. A head that is taken over acts in the
    other robot's conventions until it has learned the new ones, which a last line states.
    """
    if not records:
        return [f"robot {embodiment.name}: the other run holds no embodiment record to compare"]
    previous = next((e for e in records if e.name == embodiment.name), records[0])
    changes = checkpoint.record_differences(previous, embodiment)
    lines = [f"conventions of the robot that differ ({previous.name} -> {embodiment.name}):"]
    lines += changes or ["none"]
    is_reinitialized = any(fnmatch.fnmatch("heads_action/out/kernel", p) for p in reinit)
    meaning = [c.partition(":")[0] for c in changes if c.startswith(MEANING)]
    if meaning and not is_reinitialized:
        lines.append(
            f"warning: the head is taken over although {', '.join(meaning)} differ: its outputs "
            "mean other motions at first. For a new head: --config.train.reinit=\"('heads_*',)\""
        )
    return lines


def reorder_named_rows(
    params: Params,
    source_rows: Mapping[str, NamedRows],
    rows: Mapping[str, NamedRows],
    reinit: Sequence[str],
    source: str,
) -> Params:
    """Return another run's parameters with the rows of robots and tasks in this run's order.

    Args:
        params: parameters of the other run.
        source_rows: {parameter pattern: names of its rows} in the other run (`named_rows`).
        rows: the same for this run.
        reinit: patterns (train.reinit); parameters they match keep their rows.
        source: name of the other run, for messages.

    Raises:
        ConfigError: a robot or task that the other run does not have.
    """
    flat = dict(optimizer.flatten(params))
    for pattern in source_rows.keys() & rows.keys():
        old, new = source_rows[pattern], rows[pattern]
        reinitialized = [path for p in reinit for path in fnmatch.filter(flat, p)]
        paths = sorted(set(fnmatch.filter(flat, pattern)) - set(reinitialized))
        if old.names == new.names or not paths:
            continue
        missing = [name for name in new.names if name not in old.names]
        if missing:
            raise ConfigError(
                f"{paths[0]} has a row for each of {', '.join(old.names)} in {source}, but none "
                f"for {', '.join(missing)}; reinitialise it: "
                f"--config.train.reinit=\"('{pattern}',)\""
            )
        print(f"{pattern}: the rows of {', '.join(new.names)}, of {', '.join(old.names)}")
        index = [old.names.index(name) for name in new.names]
        flat |= {path: np.asarray(flat[path])[index] * (old.gain / new.gain) for path in paths}
    return optimizer.unflatten(flat)


def make_create(
    tx: optax.GradientTransformation, frozen: Sequence[str], config: OptimConfig
) -> Callable[[Params], TrainState]:
    """Return parameters -> the state before the first step; frozen: parameter paths."""
    return functools.partial(
        states.create, tx=tx, frozen=frozen, ema=config.ema > 0, lora_scale=config.lora_scale
    )


class StateInitializer:
    """Creates the initial state of a run on the devices."""

    def __init__(
        self,
        tx: optax.GradientTransformation,
        frozen: Sequence[str],
        config: OptimConfig,
        mesh: Mesh,
    ) -> None:
        """frozen: parameter paths."""
        self._create, self._mesh = make_create(tx, frozen, config), mesh

    def create(
        self, init_fn: Callable[[jax.Array], Params], key: jax.Array, loaded: Params | None = None
    ) -> TrainState:
        """Return the state of init_fn(key); `loaded` parameters replace the initial ones."""

        def init_state(key: jax.Array, loaded: Params) -> TrainState:
            return self._create(optimizer.merge(init_fn(key), loaded))

        loaded = loaded or {}
        shardings = sharding.state_shardings(jax.eval_shape(init_state, key, loaded), self._mesh)
        return jax.jit(init_state, out_shardings=shardings)(key, loaded)

    def abstract(self, shapes: Params) -> TrainState:
        """Return shapes, dtypes and shardings of the state, to restore a checkpoint into."""

        def with_sharding(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            array_sharding = sharding.array_sharding(x.shape, self._mesh)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=array_sharding)

        return jax.tree.map(with_sharding, jax.eval_shape(self._create, shapes))


def _summarize_paths(paths: Sequence[str]) -> str:
    """Return a few paths, or the counts per part of many; parameters.txt lists every path."""
    if len(paths) <= FEW:
        return ", ".join(paths) or "nothing"
    parts = collections.Counter(path.partition("/")[0] for path in paths)
    return ", ".join(f"{part} ({n})" if n > 1 else part for part, n in parts.items())
