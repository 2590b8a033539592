"""The duration of the training step of several configs, measured in one process.

Their steps run in turn, so that all meet the same machine. Batches of random values lie in memory:
data arrive while the device works, and cost every config about the same.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from octolike import types
from octolike.config import Config, resolve
from octolike.model import language
from octolike.model.network import build_network
from octolike.train import checkpoint, initial_state, optimizer, sharding
from octolike.train import step as steps
from octolike.train.loop import choose_gradient_fn

REPEATS = 15  # measured steps of each config; the median counts
WARM_UP = 2


class StepInputs(NamedTuple):
    """What a training step is compiled for: a run's config, and the spec and names of its data."""

    config: Config
    spec: types.BatchSpec
    names: types.Names


def measure(inputs: Mapping[str, StepInputs], repeats: int = REPEATS) -> dict[str, float]:
    """Return {name: seconds of a training step, the median}."""
    functions = {name: _stepper(*x) for name, x in inputs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(WARM_UP + repeats):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if i >= WARM_UP:
                seconds[name].append(time.perf_counter() - started)
    return {name: float(np.median(x)) for name, x in seconds.items()}


def random_batch(spec: types.BatchSpec, size: int) -> types.Batch:
    """Return `size` examples: random pixels and numbers, everything present, ids 0."""
    rng = np.random.default_rng(0)

    def draw(shape: tuple[int, ...], dtype: str) -> np.ndarray:
        if dtype == "uint8":
            return rng.integers(0, 256, (size, *shape), np.uint8)
        if dtype == "bool":
            return np.ones((size, *shape), bool)
        if dtype == "int32":
            return np.zeros((size, *shape), np.int32)
        return rng.normal(size=(size, *shape)).astype(dtype)

    return types.unflatten({k: draw(*v) for k, v in spec.items()})


def _stepper(config: Config, spec: types.BatchSpec, names: types.Names) -> Callable[[], None]:
    """Return a function that runs the next step of a config, compiled as in `train`."""
    config = resolve(config)
    settings = dataclasses.asdict(checkpoint.readable(config).model)
    spec = language.extend_spec(settings, spec)
    model, key = build_network(settings, spec, names), jax.random.key(config.seed)
    mesh = sharding.make_mesh(config.train.fsdp)
    init, frozen = initial_state.make_init(model, spec, config.optim)
    tx = optimizer.make_optimizer(config.optim, config.train.steps)
    state = initial_state.StateInitializer(tx, frozen, config.optim, mesh).create(init, key)
    step = steps.make_step(model, tx, config, key, choose_gradient_fn(config, names))
    size = config.data.batch_size
    compiled, _ = steps.compile_step(step, state, spec, size, mesh)
    batch, box = sharding.put_batch(random_batch(spec, size), mesh), [state]

    def run() -> None:
        box[0], metrics = compiled(box[0], batch)  # the old state is donated
        jax.block_until_ready(metrics)

    return run
