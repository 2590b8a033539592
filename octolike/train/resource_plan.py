"""The resources that a run needs, without a device: memory, operations, step time, data rate, days.

The peak rates and memories are the vendors' (`device_flops`, CHIPS); the share of the peak that a
step reaches (MFU) is an assumption that the reader states.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax

from octolike import types
from octolike.config import Config, ConfigError, unknown
from octolike.tables import text_table
from octolike.train import device_flops, flops, lowering, memory_plan, sharding

GIB = 2**30


class Chip(NamedTuple):
    """A device: its name as jax reports it, memory in GB, platform and compute capability."""

    device_kind: str
    memory: float
    platform: str
    capability: float = 0.0


# Memory of a device as jax counts it, by the vendors' data sheets, in GB of 10^9 bytes; cards that
# are sold by GiB have 7 % more. A v7 chip is two devices, with half of its 192 GB each.
CHIPS = {
    "a100": Chip("A100", 80, "cuda", 8.0),
    "a6000": Chip("RTX A6000", 48, "cuda", 8.6),
    "4090": Chip("RTX 4090", 24, "cuda", 8.9),
    "6000ada": Chip("RTX 6000 Ada", 48, "cuda", 8.9),
    "l40s": Chip("L40S", 48, "cuda", 8.9),
    "h20": Chip("H20", 96, "cuda", 9.0),
    "h100": Chip("H100", 80, "cuda", 9.0),
    "h200": Chip("H200", 141, "cuda", 9.0),
    "b200": Chip("B200", 180, "cuda", 10.0),
    "gb200": Chip("GB200", 186, "cuda", 10.0),
    "5090": Chip("RTX 5090", 32, "cuda", 12.0),
    "v4": Chip("TPU v4", 32, "tpu"),
    "v5e": Chip("TPU v5e", 16, "tpu"),
    "v5p": Chip("TPU v5p", 95, "tpu"),
    "v6e": Chip("TPU v6e", 32, "tpu"),
    "v7": Chip("TPU v7", 96, "tpu"),
}


class Cluster(NamedTuple):
    """Equal devices on hosts."""

    name: str
    chip: Chip
    devices: int
    per_host: int

    @property
    def hosts(self) -> int:
        """The number of hosts."""
        return math.ceil(self.devices / self.per_host)


class ResourcePlan(NamedTuple):
    """The needs of a run; memory and bytes in bytes, times in seconds.

    Attributes:
        parameters: their number.
        memory: {part: bytes per device}; activations are those stored for the backward pass.
        operations: floating-point operations of a step, on all devices together.
        step_seconds: at the assumed MFU.
        host_bytes: decoded bytes per second that each host must deliver.
        examples: per second and host.
        limits: a sentence on each part that does not fit.
    """

    parameters: int
    memory: dict[str, int]
    operations: float
    step_seconds: float
    host_bytes: float
    examples: float
    limits: tuple[str, ...]


def parse_chips(text: str, per_host: int = 8) -> Cluster:
    """Return the devices of 'h100:32'; ConfigError for an unknown chip or number."""
    name, _, number = text.lower().partition(":")
    if name not in CHIPS:
        raise ConfigError(unknown("chip", name, CHIPS))
    if (not number.isdigit() and number) or number == "0":
        raise ConfigError(f"chips {text!r}: expected name:number, such as h100:32")
    count = int(number or 1)
    return Cluster(name, CHIPS[name], count, min(per_host, count))


def plan(
    config: Config, spec: types.BatchSpec, names: types.Names, cluster: Cluster, mfu: float
) -> ResourcePlan:
    """Return the needs of a config on a cluster; mfu: the share of the peak that a step reaches."""
    work = lowering.workload(config, spec, names)
    chip, batch = cluster.chip, work.config.data.batch_size
    mesh = _mesh(config.train.fsdp, cluster.devices)
    sharding.check_fsdp(config.train.fsdp, cluster.devices, chip.device_kind)
    memory = memory_plan.plan_memory(work.state, work.batch, mesh, None)
    share = math.ceil(batch / cluster.devices / config.optim.accumulate)
    # Residuals grow linearly with the batch: they are extrapolated from few examples.
    small = _residuals(work, chip, 2), _residuals(work, chip, 4)
    per_example = (small[1] - small[0]) // 2
    memory["activations"] = small[0] + per_example * (share - 2)
    operations = flops.count(work.step(), work.state, work.batch)
    peak = device_flops.peak_flops(chip.device_kind) or math.nan
    seconds = operations / (mfu * peak * cluster.devices)
    bytes_per_step = sum(map(sharding.nbytes, jax.tree.leaves(work.batch)))
    host_share = 1 / cluster.hosts / seconds
    parameters = sum(x.size for x in jax.tree.leaves(work.state.params))
    return ResourcePlan(
        parameters,
        memory,
        operations,
        seconds,
        bytes_per_step * host_share,
        batch * host_share,
        _limits(memory, cluster, batch),
    )


def describe(plan: ResourcePlan, config: Config, cluster: Cluster, mfu: float) -> str:
    """Return the plan as text."""
    total, steps = sum(plan.memory.values()), config.train.steps
    peak = device_flops.peak_flops(cluster.chip.device_kind) or math.nan
    rows = [(f"memory: {name}", f"{n / GIB:,.2f} GiB") for name, n in plan.memory.items()]
    rows = [
        ("devices", f"{cluster.devices} × {cluster.name} on {cluster.hosts} hosts"),
        ("parameters", f"{plan.parameters / 1e6:,.1f} M"),
        *rows,
        ("memory: total per device", f"{total / GIB:,.2f} of {_capacity(cluster) / GIB:,.0f} GiB"),
        ("operations per step", f"{plan.operations / 1e12:,.1f} TFLOP"),
        (f"step at MFU {mfu:.0%}", f"{plan.step_seconds:.3f} s of {peak / 1e12:,.0f} TFLOP/s each"),
        ("examples per second", f"{config.data.batch_size / plan.step_seconds:,.0f}"),
        ("examples per second and host", f"{plan.examples:,.0f}"),
        ("decoded data per host", f"{plan.host_bytes / 1e6:,.0f} MB/s"),
        (f"{steps:,} steps", f"{steps * plan.step_seconds / 86400:.2f} days"),
    ]
    lines = [text_table(rows, ("plan", ""), align="lr"), *(f"limit: {x}" for x in plan.limits)]
    return "\n".join(lines)


def _residuals(work: lowering.Workload, chip: Chip, batch: int) -> int:
    config = lowering.with_batch_size(work.config, batch)
    return lowering.residual_bytes(
        work._replace(config=config), config.model.remat, chip.platform, chip.capability
    )


def _mesh(fsdp: int, count: int) -> Any:
    rows = fsdp or count
    return jax.sharding.AbstractMesh((count // rows, rows), sharding.AXES)


def _capacity(cluster: Cluster) -> float:
    return cluster.chip.memory * 1e9


def _limits(memory: dict[str, int], cluster: Cluster, batch: int) -> tuple[str, ...]:
    sentences = []
    total = sum(memory.values())
    if total > _capacity(cluster):
        sentences.append(
            f"{total / GIB:.0f} GiB exceed the {_capacity(cluster) / GIB:.0f} GiB of a "
            f"{cluster.name}: {memory_plan.REMEDY}; or more devices"
        )
    if batch % cluster.devices:
        sentences.append(f"data.batch_size {batch} does not divide over {cluster.devices} devices")
    return tuple(sentences)
