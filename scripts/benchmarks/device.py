"""Everything that matters on an accelerator, in one run of at most six minutes.

    octolike benchmark --output device.json device             on one GPU or TPU
    octolike benchmark device --rehearse                       tiny, on a CPU

In this order; parts that do not fit into --seconds are left out and listed:

    1. the attention kernel against XLA's: largest difference of results and gradients
    2. octo-base's step per batch size: examples per second, MFU, memory against the plan
    3. the policy per head and denoising steps: seconds of `warmup`, then latency of
       `sample_actions` from raw images to actions, p50 and p99, and the compilations meanwhile (0)
    4. the network per head: latency of its function, p50 and p99
    5. resume: a step repeated from the same state gives the same bits

A part starts only if it would end in time, taking as long as the longest of its kind so far (the
first one: FIRST).
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
from benchmarks._random_policy import filled, random_policy

from octolike.config import Component, Config, load_module
from octolike.data.specs.planned import plan_data
from octolike.model import attention, tokens
from octolike.train import (
    device_flops,
    flops,
    lowering,
    memory_plan,
    optimizer,
    sharding,
    step_seconds,
)
from octolike.train import state as states

PRETRAIN = Path(__file__).parents[2] / "configs/pretrain.py"
HEADS: dict[str, dict[str, Any]] = {
    "diffusion": {"kind": "diffusion", "steps": 20},
    "flow": {"kind": "flow", "steps": 10},
    "l1": {"kind": "l1"},
}
DDIM = {"kind": "diffusion", "steps": 20, "sampler": "ddim", "inference_steps": 5}
POLICIES = {
    "l1": HEADS["l1"],
    "flow, 10 steps": HEADS["flow"],
    "diffusion, 20 steps": HEADS["diffusion"],
    "flow, 4 steps": {"kind": "flow", "steps": 4},
    "diffusion, 5 steps of ddim": DDIM,
}
CALLS, STEPS = 100, 10
FIRST = 40.0  # seconds


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, for a CPU")
    parser.add_argument("--seconds", type=float, default=350, help="time for all parts")
    parser.add_argument("--batches", default="64,256", help="batch sizes of octo-base")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of all parts that the time allowed."""
    rows, started = [], time.perf_counter()
    parts: list[tuple[str, Callable[[], Iterator[dict[str, Any]]]]] = []
    parts.append(("kernels", lambda: _kernels(args.rehearse)))
    batches = [4] if args.rehearse else [int(n) for n in args.batches.split(",")]
    parts += [("training", lambda n=n: _training(args.rehearse, n)) for n in batches]
    parts += [("policy", lambda h=h: _policy(args.rehearse, h)) for h in POLICIES]
    parts += [("network", lambda h=h: _acting(args.rehearse, h)) for h in HEADS]
    longest: dict[str, float] = {}
    for kind, part in parts:
        begun = time.perf_counter()
        if begun - started + longest.get(kind, FIRST) > args.seconds:
            rows.append({"part": f"a part left out after {begun - started:.0f} s: {kind}"})
            continue
        try:
            rows += list(part())
        except Exception as error:  # the other parts are still of use
            rows.append(
                {"part": f"{kind} failed", "error": f"{type(error).__name__}: {error}"[:200]}
            )
        longest[kind] = max(longest.get(kind, 0.0), time.perf_counter() - begun)
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
    work = _workload(rehearse, HEADS["diffusion"], batch_size)
    mesh = sharding.make_mesh()
    tx, ema = optimizer.make_optimizer(work.config.optim, work.config.train.steps), True
    state = states.create(filled(work.state.params), tx, (), ema=ema)
    state = jax.device_put(state, sharding.replicated(mesh))
    step = jax.jit(work.step(), donate_argnums=0)
    with jax.set_mesh(mesh):
        compiled = step.lower(work.state, work.batch).compile()
    batch = sharding.put_batch(step_seconds.random_batch(work.spec, batch_size), mesh)
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
    work = _workload(rehearse, HEADS[head], 1)
    function, (params, *_) = work.policy()
    params, batch = filled(params), jax.device_put(step_seconds.random_batch(work.spec, 1))
    act = jax.jit(function)
    inputs = params, batch["observation"], batch["task"]
    jax.block_until_ready(act(*inputs))
    times = [_seconds(lambda: jax.block_until_ready(act(*inputs))) for _ in range(CALLS)]
    yield {"part": f"network, {head}", **_percentiles(times)}


def _policy(rehearse: bool, name: str) -> Iterator[dict[str, Any]]:
    policy = random_policy(_config(rehearse, POLICIES[name], 1))
    robot = policy.embodiment
    warmup, rng = _seconds(policy.warmup), np.random.default_rng(2)
    observation: dict[str, Any] = {
        key: rng.integers(0, 256, shape, np.uint8) for key, shape in policy.image_shapes.items()
    }
    if "proprio" in policy.observation_keys and robot.proprio:
        observation["proprio"] = np.zeros(len(robot.proprio), np.float32)
    task, compiled = policy.create_task(instruction="lift the red cube"), []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    act = lambda seed: policy.sample_actions(observation, task, seed)
    times = [_seconds(lambda seed=seed: act(seed)) for seed in range(CALLS)]
    jax.monitoring.unregister_event_duration_listener(listen)
    yield {
        "part": f"policy, {name}",
        **_percentiles(times),
        "warm-up s": warmup,
        "compiled later": len(compiled),
    }


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _percentiles(times: list[float]) -> dict[str, float]:
    p50, p99 = np.percentile(np.multiply(times, 1e3), (50, 99)).tolist()
    return {"p50 ms": p50, "p99 ms": p99}


def _workload(rehearse: bool, head: dict[str, Any], batch_size: int) -> lowering.Workload:
    config = _config(rehearse, head, batch_size)
    planned = plan_data(config)
    return lowering.workload(config, planned.spec, planned.names)


def _config(rehearse: bool, head: dict[str, Any], batch_size: int) -> Config:
    options = "debug" if rehearse else "size=base"
    config: Config = load_module(PRETRAIN).get_config(options)
    config.data.batch_size = batch_size
    shared = {k: v for k, v in config.model.heads["action"].items() if k == "network"}
    config.model.heads = {"action": Component(head | (shared if head["kind"] != "l1" else {}))}
    return config
