"""The duration of a training step, next to the time that its arithmetic alone would take.

    octolike benchmark train                          octo-small and the quickstart's model
    octolike benchmark train --only small --batches 256,512 --dtype bfloat16 --remat dots

octo-small is the model of octolike benchmark model with the states of a frozen t5-base at hand,
window 2, cameras of 256 and 128 pixels. The floor is the compiler's count of floating-point
operations over the rate of a large matrix product, measured in turn with the step in the same
process. MFU, on a GPU, is against its peak in --peak. Data are random: speed does not depend on it.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
from benchmarks import model as acting

from octolike import types
from octolike.config import Component, Config, load_module
from octolike.model.network import build_network
from octolike.train import initial_state, optimizer, sharding, step_seconds
from octolike.train import state as states
from octolike.train import step as steps

SMALL, TABLETOP = "small", "tabletop"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.add_argument("--only", choices=(SMALL, TABLETOP), help="one of the two models")
    parser.add_argument("--batches", default="4", help="batch sizes of octo-small, with commas")
    parser.add_argument("--size", choices=acting.SIZES, default="small", help="or octo-base")
    parser.add_argument("--dtype", default="float32", help="compute type")
    parser.add_argument("--remat", default="auto", help="model.remat")
    parser.add_argument("--fsdp", type=int, default=1, help="train.fsdp")
    parser.add_argument("--peak", type=float, default=0.0, help="TFLOP/s of a device, for MFU")
    parser.add_argument("--repeats", type=int, default=5, help="steps; the median counts")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row per model and batch size."""
    rows = []
    if args.only != TABLETOP:
        for size in map(int, args.batches.split(",")):
            rows.append(_measure(args, f"octo-{args.size}", _octo(args), acting._spec(2), size))
    if args.only != SMALL:
        config = load_module("configs/quickstart.py").get_config()
        rows.append(_measure(args, TABLETOP, config, _tabletop(config), config.data.batch_size))
    return rows


def _measure(
    args: argparse.Namespace, name: str, config: Config, spec: types.BatchSpec, size: int
) -> dict[str, Any]:
    config.model.dtype, config.model.remat = args.dtype, args.remat
    config.data.batch_size, names = size, types.Names(("data",), ("arm",))
    mesh = sharding.make_mesh(args.fsdp)
    sharding.check_batch_size(size, mesh)
    model = build_network(dataclasses.asdict(config.model), spec, names)
    key, tx = jax.random.key(0), optimizer.make_optimizer(config.optim, config.train.steps)
    begin = initial_state.StateInitializer(tx, (), config.optim, mesh)
    state = begin.create(lambda key: states.init_params(model, spec, key), key)
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    began = time.perf_counter()
    step = steps.make_step(model, tx, config, key)
    compiled, costs = steps.compile_step(step, state, spec, size, mesh)
    prepared = time.perf_counter() - began
    batch, box = sharding.put_batch(step_seconds.random_batch(spec, size), mesh), [state]

    def train() -> Any:
        box[0], metrics = compiled(box[0], batch)  # the old state is donated
        return metrics

    a = jnp.ones((_side(), _side()), args.dtype)
    product = jax.jit(jnp.matmul)
    seconds, matrix = acting._in_turn(args.repeats, train, lambda: product(a, a))
    flops, rate = costs["flops_per_step"] / mesh.size, 2 * _side() ** 3 / matrix
    row = {
        "model": name,
        "batch": size,
        "dtype": args.dtype,
        "remat": args.remat,
        "parameters": parameters,
        "trace and compile s": prepared,
        "GFLOP": costs["flops_per_step"] / 1e9,
        "matrix GFLOP/s": rate / 1e9,
        "step s": seconds,
        "over floor": seconds * rate / flops,
        "examples/s": size / seconds,
    }
    if args.peak:
        row["MFU"] = flops / seconds / (1e12 * args.peak)
    return row


def _side() -> int:
    """Return the side of the matrices: large enough for the device's best rate."""
    return 8192 if jax.default_backend() == "gpu" else acting.MATRIX


def _octo(args: argparse.Namespace) -> Config:
    """Return octo-small or octo-base; its instructions' states are wide as those of t5-base."""
    config = acting._config(args, Component(kind="diffusion"))
    config.optim.ema = 0.999
    return config


def _tabletop(config: Config) -> types.BatchSpec:
    """Return the batch spec of the quickstart's data, as octolike collect writes them."""
    spec = acting._spec(config.data.window, config.data.horizon)
    spec = {k: v for k, v in spec.items() if "image" not in k}
    length = config.data.text["length"]
    for camera, side in config.data.cameras.items():
        spec[f"observation.image_{camera}"] = ((config.data.window, side, side, 3), "uint8")
        spec[f"observation.present.image_{camera}"] = ((config.data.window,), "bool")
    spec["observation.proprio"] = ((config.data.window, 8), "float32")
    spec["observation.present.proprio"] = ((config.data.window,), "bool")
    for name, dtype in (("ids", "int32"), ("mask", "bool")):
        spec[f"task.language.{name}"] = ((length,), dtype)
        if config.data.subtasks:
            spec[f"task.subtask.{name}"] = ((config.data.window, length), dtype)
    return spec
