"""Everything that matters on an accelerator, in one run of at most six minutes.

    octolike benchmark --output device.json device             on one GPU or TPU
    octolike benchmark device --rehearse                       tiny, on a CPU

In this order; parts that do not fit into --seconds are left out and listed:

    1. the attention kernel against XLA's: largest difference of results and gradients
    2. octo-base's step per batch size: examples per second, MFU, memory against the plan
    3. the policy per head: latency of 50 calls, p50 and p99
    4. resume: a step repeated from the same state gives the same bits
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from octolike import types
from octolike.config import Component, Config, load_module
from octolike.data.specs.planned import plan_data
from octolike.model import attention, tokens
from octolike.train import device_flops, flops, lowering, memory_plan, optimizer, sharding
from octolike.train import state as states

PRETRAIN = Path(__file__).parents[2] / "configs/pretrain.py"
HEADS = ("diffusion", "flow", "l1")
CALLS, STEPS = 50, 10


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, for a CPU")
    parser.add_argument("--seconds", type=float, default=330, help="start nothing new after this")
    parser.add_argument("--batches", default="64,256", help="batch sizes of octo-base")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of all parts that the time allowed."""
    rows, started = [], time.perf_counter()
    parts: list[Callable[[], Iterator[dict[str, Any]]]] = [lambda: _kernels(args.rehearse)]
    batches = [4] if args.rehearse else [int(n) for n in args.batches.split(",")]
    parts += [lambda n=n: _training(args.rehearse, n) for n in batches]
    parts += [lambda head=head: _acting(args.rehearse, head) for head in HEADS]
    for i, part in enumerate(parts):
        spent = time.perf_counter() - started
        if spent > args.seconds:
            rows.append({"part": f"{len(parts) - i} parts left out after {spent:.0f} s"})
            break
        try:
            rows += list(part())
        except Exception as error:  # the other parts are still of use
            rows.append({"part": "failed", "error": f"{type(error).__name__}: {error}"[:200]})
        print(f"{time.perf_counter() - started:6.1f} s  {rows[-1]}", flush=True)
    return rows


def _kernels(rehearse: bool) -> Iterator[dict[str, Any]]:
    sizes = (8, 4) if rehearse else (256, 64)
    layout = tokens.Layout((16,), sizes, (1,), 2)
    length, rng = len(layout.pattern), np.random.default_rng(0)
    draw = lambda: jnp.asarray(rng.normal(size=(4, length, 12, 64)), jnp.bfloat16)
    q, k, v, visible = draw(), draw(), draw(), jnp.asarray(rng.random((4, length)) < 0.8)
    mask = tokens.AttentionMask(visible.at[:, :16].set(True), layout)

    def results(kernel: str | None) -> list[jax.Array]:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = attention.masked_attention(q, k, v, mask, kernel).astype(jnp.float32)
            return jnp.sin(out).sum(), out

        grads, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
        return [out, *grads]

    kernel = None if not rehearse else "xla"
    for name, a, b in zip(("out", "dq", "dk", "dv"), results(kernel), results("xla"), strict=True):
        difference = jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)).max()
        scale = jnp.abs(b.astype(jnp.float32)).max()
        yield {
            "part": f"attention {attention.implementation_for(q.dtype, 64, 8)}, {name}",
            "largest difference": float(difference),
            "of": float(scale),
        }


def _training(rehearse: bool, batch_size: int) -> Iterator[dict[str, Any]]:
    work = _workload(rehearse, "diffusion", batch_size)
    mesh = sharding.make_mesh()
    tx, ema = optimizer.make_optimizer(work.config.optim, work.config.train.steps), True
    state = states.create(_filled(work.state.params), tx, (), ema=ema)
    state = jax.device_put(state, sharding.replicated(mesh))
    step = jax.jit(work.step(), donate_argnums=0)
    with jax.set_mesh(mesh):
        compiled = step.lower(work.state, work.batch).compile()
    batch = sharding.put_batch(_random(work.spec, batch_size), mesh)
    first = jax.device_get(compiled(jax.tree.map(jnp.copy, state), batch)[0].params)
    again = jax.device_get(compiled(jax.tree.map(jnp.copy, state), batch)[0].params)
    same = jax.tree.all(jax.tree.map(np.array_equal, first, again))
    for _ in range(2):
        state, metrics = compiled(state, batch)
    jax.block_until_ready(metrics)
    started = time.perf_counter()
    for _ in range(STEPS):
        state, metrics = compiled(state, batch)
    jax.block_until_ready(metrics)
    seconds = (time.perf_counter() - started) / STEPS
    peak = device_flops.peak_flops(jax.devices()[0].device_kind)
    memory = compiled.memory_analysis()
    plan = memory_plan.plan_memory(work.state, work.batch, mesh, memory.temp_size_in_bytes)
    used = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    operations = flops.count(work.step(), work.state, work.batch)
    yield {
        "part": f"step, batch {batch_size}",
        "step s": seconds,
        "examples/s": batch_size / seconds,
        "MFU": operations / seconds / peak / mesh.size if peak else "",
        "plan GiB": sum(plan.values()) / 2**30,
        "peak GiB": used / 2**30,
        "loss finite": bool(np.isfinite(metrics["loss"])),
        "repeats bit for bit": same,
    }


def _acting(rehearse: bool, head: str) -> Iterator[dict[str, Any]]:
    work = _workload(rehearse, head, 1)
    function, (params, *_) = work.policy()
    params, batch = _filled(params), jax.device_put(_random(work.spec, 1))
    act = jax.jit(function)
    inputs = params, batch["observation"], batch["task"]
    jax.block_until_ready(act(*inputs))
    times = []
    for _ in range(CALLS):
        started = time.perf_counter()
        jax.block_until_ready(act(*inputs))
        times.append(time.perf_counter() - started)
    p50, p99 = np.percentile(times, (50, 99))
    yield {"part": f"policy, {head}", "p50 ms": 1e3 * p50, "p99 ms": 1e3 * p99}


def _workload(rehearse: bool, head: str, batch_size: int) -> lowering.Workload:
    options = "debug" if rehearse else "size=base"
    config: Config = load_module(PRETRAIN).get_config(options)
    config.data.batch_size = batch_size
    if head != "diffusion":
        config.model.heads = {"action": Component(kind=head)}
    planned = plan_data(config)
    return lowering.workload(config, planned.spec, planned.names)


def _filled(tree: Any) -> Any:
    """Return small random arrays for floating-point leaves, zeros for others."""
    rng = np.random.default_rng(0)

    def fill(x: Any) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.zeros(x.shape, x.dtype)
        return jnp.asarray(0.02 * rng.standard_normal(x.shape, np.float32), x.dtype)

    return jax.tree.map(fill, tree)


def _random(spec: types.BatchSpec, size: int) -> types.Batch:
    batch, rng = types.zeros(spec, size), np.random.default_rng(1)
    leaves = dict(types.flatten(batch))
    for path, x in leaves.items():
        if x.dtype == np.uint8:
            leaves[path] = rng.integers(0, 256, x.shape, np.uint8)
        elif x.dtype == bool:
            leaves[path] = np.ones(x.shape, bool)
        elif x.dtype == np.float32:
            leaves[path] = rng.standard_normal(x.shape, np.float32)
    return types.unflatten(leaves)
