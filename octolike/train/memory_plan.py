"""What a training step needs of each device's memory, and whether it is there."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh

from octolike.train import sharding
from octolike.train import state as states

SPARE = "optim.accumulate, model.remat and train.fsdp trade time for memory"


def of(state: states.TrainState, batch: Any, mesh: Mesh, work: int | None) -> dict[str, int]:
    """Return {what: bytes per device} of a training step; state and batch may be abstract.

    work: what the compiled step needs beside its inputs and results, gradients included; None where
    the compiler does not tell: then there is no row of activations.
    """
    each = lambda part: sharding.bytes_per_device(part, mesh)
    rows = {
        "parameters": each((state.params, state.frozen)),
        "gradients": each(state.params),
        "optimiser": each(state.opt_state),
        "average": each(state.ema),
        # the next one is put there while a step runs
        "two batches": 2 * sum(map(sharding.nbytes, jax.tree.leaves(batch))) // mesh.size,
    }
    if work is not None:
        # The compiler may use up a gradient before the next one is made.
        rows["activations and buffers"] = max(work - rows["gradients"], 0)
    return rows


def describe(rows: dict[str, int], room: int | None = None) -> str:
    """Return the table of a plan; room: bytes of a device, by default what it says it has."""
    if room is None:
        room = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    total = sum(rows.values())
    shown = [(name, f"{n / 2**20:,.1f}") for name, n in [*rows.items(), ("total", total)]]
    lines = [states.table([("memory", "MiB per device"), *shown])]
    if room:
        lines.append(f"of {room / 2**20:,.0f} MiB that a device has")
    if room and total > room:
        lines.append(f"more than there is: {SPARE}, data.batch_size examples for memory")
    return "\n".join(lines)
