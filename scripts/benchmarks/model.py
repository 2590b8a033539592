"""The duration of acting, next to the time that its arithmetic alone would take.

    octolike benchmark model                         octo-small at batch 1, every head
    octolike benchmark model --size base --heads diffusion

The floor is the compiler's count of floating-point operations over the rate of a large matrix
product, measured in turn with the policy in the same process. The instruction is encoded before, as
a policy does once per task. Parameters are random: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from octolike import types
from octolike.config import Component, Config
from octolike.model.network import build_network
from octolike.train.state import init_params

SIZES = {  # width, layers, attention heads, mlp
    "small": (384, 12, 6, 1536),
    "base": (768, 12, 12, 3072),
}
WORDS, STATE = 16, 768  # tokens of an instruction, width of t5-base
MATRIX = 2048


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--heads", default="diffusion,flow,l1,mse,bins", help="comma-separated")
    parser.add_argument("--steps", default="20,10,5,1", help="denoising steps, comma-separated")
    parser.add_argument("--window", type=int, default=2, help="frames of history")
    parser.add_argument("--dtype", default="float32", help="compute type")
    parser.add_argument("--repeats", type=int, default=15, help="calls; the median counts")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row per head and number of denoising steps."""
    rows = []
    for head in args.heads.split(","):
        for component in _variants(head, [int(s) for s in args.steps.split(",")]):
            rows.append(_measure(args, head, component))
    return rows


def _variants(head: str, steps: list[int]) -> list[Component]:
    if head == "diffusion":
        ddim = [s for s in steps if s < 20]
        return [
            Component(kind=head),
            *(Component(kind=head, sampler="ddim", inference_steps=s) for s in ddim),
        ]
    if head == "flow":
        return [Component(kind=head, steps=s) for s in steps]
    return [Component(kind=head)]


def _measure(args: argparse.Namespace, head: str, component: Component) -> dict[str, Any]:
    spec = _spec(args.window)
    names = types.Names(("data",), ("arm",))
    model = build_network(dataclasses.asdict(_config(args, component).model), spec, names)
    shapes = jax.eval_shape(lambda: init_params(model, spec, jax.random.key(0)))
    rng = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(0.02 * rng.normal(size=x.shape).astype(np.float32))
    params, batch = jax.tree.map(draw, shapes), jax.device_put(types.zeros(spec, 1))
    key = jax.random.key(0)

    def act(params: Any, observation: Any, task: Any) -> jax.Array:
        rngs = {"noise": key}
        return model.apply(
            {"params": params}, observation, task, rngs=rngs, method="sample_actions"
        )

    inputs = params, batch["observation"], batch["task"]
    compiled = jax.jit(act).lower(*inputs).compile()
    a = jnp.ones((MATRIX, MATRIX), args.dtype)
    product = jax.jit(jnp.matmul)
    seconds, matrix = _in_turn(args.repeats, lambda: compiled(*inputs), lambda: product(a, a))
    flops, rate = float(compiled.cost_analysis()["flops"]), 2 * MATRIX**3 / matrix
    return {
        "head": head,
        "denoising steps": component.get("inference_steps", component.get("steps", "")) or "",
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "GFLOP": flops / 1e9,
        "matrix GFLOP/s": rate / 1e9,
        "latency ms": 1e3 * seconds,
        "floor ms": 1e3 * flops / rate,
        "over floor": seconds * rate / flops,
    }


def _in_turn(repeats: int, *functions: Callable[[], Any]) -> list[float]:
    """Return the median seconds of each function, called in turn: all meet the same machine."""
    times: list[list[float]] = [[] for _ in functions]
    for i in range(repeats + 2):  # the first two warm up
        for function, seconds in zip(functions, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(function())
            if i >= 2:
                seconds.append(time.perf_counter() - start)
    return [float(np.median(t)) for t in times]


def _config(args: argparse.Namespace, head: Component) -> Config:
    config = Config(workdir="unused")
    model = config.model
    model.width, model.layers, model.attention_heads, model.mlp_width = SIZES[args.size]
    model.dtype, model.repeat_task_tokens = args.dtype, True
    cameras = {
        name: Component(
            kind="image", cameras=(name,), goal=True, encoder=Component(kind="small_stem")
        )
        for name in ("primary", "wrist")
    }
    # as wide as t5-base's states, which a frozen encoder hands over: the same work in the step
    words = Component(kind="language", vocabulary=2, width=STATE)
    model.tokenizers, model.heads = {"language": words, **cameras}, {"action": head}
    return config


def _spec(window: int, horizon: int = 4, dims: int = 7) -> types.BatchSpec:
    leaves: types.BatchSpec = {
        "observation.timestep_mask": ((window,), "bool"),
        "task.language.ids": ((WORDS,), "int32"),
        "task.language.mask": ((WORDS,), "bool"),
        "task.present.language": ((), "bool"),
        "task.task_id": ((), "int32"),
        "task.present.task_id": ((), "bool"),
        "action": ((window, horizon, dims), "float32"),
        "action_mask": ((window, horizon, dims), "bool"),
        "dataset": ((), "int32"),
        "embodiment": ((), "int32"),
    }
    for camera, side in (("primary", 256), ("wrist", 128)):
        leaves[f"observation.image_{camera}"] = ((window, side, side, 3), "uint8")
        leaves[f"observation.present.image_{camera}"] = ((window,), "bool")
        leaves[f"task.image_{camera}"] = ((side, side, 3), "uint8")
        leaves[f"task.present.image_{camera}"] = ((), "bool")
    return leaves
