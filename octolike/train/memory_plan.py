"""The memory that a training step needs on each device, compared with the memory it has."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh

from octolike.tables import text_table
from octolike.train import sharding
from octolike.train.state import TrainState

REMEDY = "optim.accumulate, model.remat and train.fsdp trade time for memory"


def plan_memory(state: TrainState, batch: Any, mesh: Mesh, temporary: int | None) -> dict[str, int]:
    """Return {part: bytes per device} of a training step.

    Args:
        state: may be abstract.
        batch: may be abstract.
        mesh: the devices.
        temporary: bytes of the compiled step in addition to its inputs and results, with gradients;
            None if the compiler does not report it: then the plan has no row of activations.
    """

    def size(part: Any) -> int:
        return sharding.bytes_per_device(part, mesh)

    plan = {
        "parameters": size((state.params, state.frozen)),
        "gradients": size(state.params),
        "optimiser": size(state.opt_state),
        "average": size(state.ema),
        # While a step runs, the next batch is transferred.
        "two batches": 2 * sum(map(sharding.nbytes, jax.tree.leaves(batch))) // mesh.size,
    }
    if temporary is not None:
        # The compiler may consume a gradient before it computes the next one.
        plan["activations and buffers"] = max(temporary - plan["gradients"], 0)
    return plan


def describe(plan: dict[str, int], capacity: int | None = None) -> str:
    """Return the table of a plan; capacity: bytes of a device, by default as jax reports it."""
    if capacity is None:
        capacity = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    total = sum(plan.values())
    rows = [(name, f"{n / 2**20:,.1f}") for name, n in [*plan.items(), ("total", total)]]
    lines = [text_table(rows, ("memory", "MiB per device"), align="lr")]
    if capacity:
        lines.append(f"a device has {capacity / 2**20:,.0f} MiB")
    if capacity and total > capacity:
        lines.append(f"this exceeds the memory of a device: {REMEDY}; or lower data.batch_size")
    return "\n".join(lines)
