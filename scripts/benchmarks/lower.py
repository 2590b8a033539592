"""Attention kernels, memory and operations on accelerators, without one.

    octolike benchmark lower                       attention and memory of every shipped config
    octolike benchmark lower --tpu v6e:2x2         and a block of octo-base, compiled for a TPU
    ... --configs '' --tpu v6e:2x2 --step bridge --layers 2     a sharded training step instead

The first part only traces: the attention kernel, bytes of dense masks and logits, operations, and
the bytes stored for the backward pass under each policy of model.remat. The second compiles with
libtpu (pip install libtpu, of jax's version; minutes) and adds the compiler's cycles against those
of a large matrix product. The compiler has no estimate for splash's backward kernels: their row
holds the cycles of everything else, and the share leaves out the operations of attention. A step is
compiled with its state sharded over all chips (FSDP); its row has the collective operations and the
memory of a chip.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from octolike.config import load_module
from octolike.data.specs.planned import plan_data
from octolike.model import tokens
from octolike.model.target import compile_for
from octolike.model.transformer import TransformerBlock
from octolike.train import flops, lowering, sharding

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = ("quickstart", "tabletop", "bridge", "pretrain:size=small", "pretrain:size=base")
SHIPPED += ("metaworld:size=27m", "aloha", "cotrain")
LAYOUT = tokens.Layout((16,), (256, 64, 16), (1,), 2)  # octo's: words, two cameras, words again
BASE = {"attention_heads": 12, "mlp_width": 3072}
WIDTH, SIDE = 768, 8192


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.add_argument("--configs", default=" ".join(SHIPPED), help="separated by spaces")
    parser.add_argument("--batch", type=int, default=256, help="examples of a step")
    parser.add_argument("--tpu", default="", help="topology to compile a block for, e.g. v6e:2x2")
    parser.add_argument("--step", default="", help="config whose step to compile, not the block")
    parser.add_argument("--layers", type=int, default=0, help="of that config's transformer")
    parser.add_argument("--block-batch", type=int, default=64, help="examples of that block")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row per config, and per kernel of the block."""
    rows = [_facts(name, args.batch) for name in args.configs.split()]
    if args.step and args.tpu:
        return [*rows, _step_row(args.step, args.layers, args.block_batch, args.tpu)]
    return rows + (_block_rows(args.tpu, args.block_batch) if args.tpu else [])


def _workload(name: str, batch: int, layers: int = 0) -> lowering.Workload:
    """Return a shipped config in bfloat16; layers: 0 for its own number."""
    path, _, options = name.partition(":")
    config = load_module(CONFIGS / f"{path}.py").get_config(options)
    config.model.dtype, config.data.batch_size = "bfloat16", batch
    config.model.layers = layers or config.model.layers
    planned = plan_data(config)
    return lowering.workload(config, planned.spec, planned.names)


def _facts(name: str, batch: int) -> dict[str, Any]:
    work = _workload(name, batch)
    inputs = work.step(), work.state, work.batch
    cuda = {"platform": "cuda", "capability": lowering.HOPPER}
    on_cuda = lowering.attention_facts(*inputs, **cuda)
    on_tpu = lowering.attention_facts(*inputs, platform="tpu")
    row: dict[str, Any] = {
        "config": name,
        "batch": batch,
        "parameters M": sum(x.size for x in jax.tree.leaves(work.state.params)) / 1e6,
        "TFLOP": flops.count(*inputs) / 1e12,
        "CUDA kernels": sum(on_cuda.kernels.values()) or "xla",
        "TPU kernels": sum(on_tpu.kernels.values()) or "xla",
        "mask MiB": on_cuda.mask_bytes / 2**20,
        "CUDA logits MiB": on_cuda.logit_bytes / 2**20,
    }
    for policy in ("none", "dots", "full"):
        row[f"{policy} GiB"] = lowering.residual_bytes(work, policy, **cuda) / 2**30
    return row


def _block_rows(topology: str, batch: int) -> list[dict[str, Any]]:
    """Return rows of octo-base's block, forward and backward, compiled for one TPU."""
    device = _tpu(topology)[0]
    square = jax.ShapeDtypeStruct((SIDE, SIDE), jnp.bfloat16)
    product, _ = _compiled_cycles(jnp.matmul, device, square, square)
    rate = 2 * SIDE**3 / product  # operations per cycle
    rows = []
    for kernel in ("xla", "splash"):
        function, inputs = _block(batch)
        with compile_for("cpu" if kernel == "xla" else "tpu"):
            cycles, memory = _compiled_cycles(function, device, *inputs)
        operations = flops.count(function, *inputs)
        in_kernel = _attention_operations(batch) if kernel == "splash" else 0.0
        rows.append(
            {
                "config": f"octo-base block, {kernel}",
                "batch": batch,
                "TFLOP": operations / 1e12,
                "TFLOP in the kernel": in_kernel / 1e12,
                "Mcycles estimated": cycles / 1e6,
                "Mcycles of the products": operations / rate / 1e6,
                "share of the matrix rate": (operations - in_kernel) / rate / cycles,
                "temporary MiB": memory / 2**20,
            }
        )
    return rows


def _step_row(name: str, layers: int, batch: int, topology: str) -> dict[str, Any]:
    """Return the collectives and the memory of a step whose state is sharded over all chips."""
    work, devices = _workload(name, batch, layers), np.array(_tpu(topology))
    mesh = Mesh(devices.reshape(1, -1), sharding.AXES, axis_types=(AxisType.Auto,) * 2)
    state, inputs = sharding.state_shardings(work.state, mesh), sharding.batch_sharding(mesh)
    step = jax.jit(
        work.step(),
        in_shardings=(state, inputs),
        out_shardings=(state, sharding.replicated(mesh)),
        donate_argnums=0,
    )
    with compile_for("tpu"), jax.set_mesh(mesh):
        compiled = step.trace(work.state, work.batch).lower().compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    kinds = ("all-gather", "all-reduce", "all-to-all", "reduce-scatter")
    counts = {kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in kinds}
    # libtpu writes a reduce-scatter as a computation of this name that holds an all-reduce.
    fused = len(set(re.findall(r"calls=%(all-reduce-scatter[.\d]*)", text)))
    counts["all-reduce"] -= fused
    counts["reduce-scatter"] += fused
    return {
        "config": f"{name}, step on {devices.size} chips of {topology}",
        "batch": batch,
        "parameters M": sum(x.size for x in jax.tree.leaves(work.state.params)) / 1e6,
        **counts,
        "arguments MiB": memory.argument_size_in_bytes / 2**20,
        "temporary MiB": memory.temp_size_in_bytes / 2**20,
    }


def _block(batch: int) -> tuple[Any, tuple[Any, ...]]:
    block = TransformerBlock(**BASE, dtype=jnp.bfloat16)
    length = len(LAYOUT.pattern)
    x = jax.ShapeDtypeStruct((batch, length, WIDTH), jnp.bfloat16)
    visible = jax.ShapeDtypeStruct((batch, length), jnp.bool_)

    def apply(params: Any, x: jax.Array, visible: jax.Array) -> Any:
        mask = tokens.AttentionMask(visible, LAYOUT)
        return block.apply(params, x, mask, None, None, False)[0]

    def init() -> Any:
        mask = tokens.AttentionMask(jnp.ones((1, length), bool), LAYOUT)
        example = jnp.zeros((1, length, WIDTH), jnp.bfloat16)
        return block.init(jax.random.key(0), example, mask, None, None, False)

    def loss(params: Any, x: jax.Array, visible: jax.Array) -> jax.Array:
        return jnp.square(apply(params, x, visible).astype(jnp.float32)).sum()

    with compile_for("cpu"):
        params = jax.eval_shape(init)
    return jax.value_and_grad(loss, argnums=(0, 1)), (params, x, visible)


def _attention_operations(batch: int) -> float:
    pairs = sum((b - a) * b for a, b in LAYOUT.spans())
    return 3 * 4 * batch * pairs * WIDTH  # forward, and twice that backward


def _tpu(topology: str) -> Any:
    """Return the devices of a topology, from libtpu's compiler."""
    import libtpu
    from jax.experimental import topologies

    kind, _, shape = topology.partition(":")
    count = int(np.prod([int(n) for n in shape.split("x")]))
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_LIBRARY_PATH": libtpu.get_library_path(),
        "TPU_ACCELERATOR_TYPE": f"{kind}-{count}",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def _compiled_cycles(function: Any, device: Any, *args: Any) -> tuple[float, int]:
    """Return (the compiler's cycles, bytes of temporary memory)."""
    here = jax.sharding.SingleDeviceSharding(device)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), args)
    compiled = jax.jit(function).lower(*placed).compile()
    cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', compiled.as_text())))
    return cycles, compiled.memory_analysis().temp_size_in_bytes
