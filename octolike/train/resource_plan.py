"""The resources that a run needs, without a device: memory, operations, step time, data rate, days.

The peak rates, bandwidths and memories are the vendors' (`device_flops`, `cluster`); the share of
the peak that a step reaches (MFU) is an assumption that the reader states, and so are the rates of
the hosts. Frozen parameters have no gradients and no optimiser state, and the operations of their
backward pass are not counted (`optimizer`, `lora`); those of a frozen text encoder, which encodes
the instructions before the steps, are not part of a step.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax

from octolike import types
from octolike.config import Config
from octolike.model import language
from octolike.tables import text_table
from octolike.train import device_flops, flops, lowering, memory_plan, sharding, step_times
from octolike.train.cluster import GIGA, MEGA, Cluster
from octolike.train.step import abstract_batch

GIB = 2**30


class ResourcePlan(NamedTuple):
    """The needs of a run; memory and bytes in bytes, times in seconds.

    Attributes:
        parameters: their number; trained: of these, LoRA included.
        memory: {part: bytes per device}; activations are those stored for the backward pass.
        operations: floating-point operations of a step, on all devices together.
        seconds: {part of a step: its least time}, see `step_times`; nan if it is not known.
        host_bytes: decoded bytes per second that each host must deliver, lest data be the limit.
        examples: the same in examples per second and host.
        faults: a sentence on each part that does not fit.
    """

    parameters: int
    trained: int
    memory: dict[str, int]
    operations: float
    seconds: dict[str, float]
    host_bytes: float
    examples: float
    faults: tuple[str, ...]

    @property
    def limit(self) -> str:
        """The part that a step waits for."""
        return step_times.limit(self.seconds)

    @property
    def step_seconds(self) -> float:
        """The time of a step."""
        return self.seconds[self.limit]


def plan(
    config: Config, spec: types.BatchSpec, names: types.Names, cluster: Cluster, mfu: float
) -> ResourcePlan:
    """Return the needs of a config on a cluster; mfu: the share of the peak that a step reaches."""
    work = lowering.workload(config, spec, names)
    chip, batch = cluster.chip, work.config.data.batch_size
    rows, parts = config.train.fsdp or cluster.devices, config.optim.accumulate
    sharding.check_fsdp(config.train.fsdp, cluster.devices, chip.device_kind)
    mesh: Any = jax.sharding.AbstractMesh((cluster.devices // rows, rows), sharding.AXES)
    memory = memory_plan.plan_memory(work.state, work.batch, mesh, None)
    encoder = language.frozen_encoder_bytes(dataclasses.asdict(work.config.model))
    if encoder:
        memory["text encoder"] = encoder
    # Residuals grow linearly with the batch: they are extrapolated from few examples.
    small = _residuals(work, cluster, 2), _residuals(work, cluster, 4)
    share = math.ceil(batch / cluster.devices / parts)
    memory["activations"] = small[0] + (small[1] - small[0]) // 2 * (share - 2)
    trained, whole = work.state.params, (work.state.params, work.state.frozen)
    operations = flops.count(work.step(), work.state, work.batch)
    peak = device_flops.peak_flops(chip.device_kind) or math.nan
    host_examples = batch / cluster.hosts
    host_bytes = _nbytes(abstract_batch(spec, batch)) / cluster.hosts
    seconds = {
        step_times.COMPUTE: operations / (mfu * peak * cluster.devices),
        step_times.MEMORY: step_times.memory_seconds(memory, _nbytes(whole), parts, cluster),
        step_times.COLLECTIVES: step_times.collective_seconds(
            _nbytes(whole), _nbytes(trained), rows, cluster
        ),
    }
    without_data = seconds[step_times.limit(seconds)]
    seconds[step_times.DATA] = step_times.data_seconds(host_examples, host_bytes, cluster)
    return ResourcePlan(
        sum(x.size for x in jax.tree.leaves(whole)),
        sum(x.size for x in jax.tree.leaves(trained)),
        memory,
        operations,
        seconds,
        host_bytes / without_data,
        host_examples / without_data,
        _faults(memory, cluster, batch),
    )


def describe(plan: ResourcePlan, config: Config, cluster: Cluster, mfu: float) -> str:
    """Return the plan as text."""
    total, steps = sum(plan.memory.values()), config.train.steps
    parameters = f"{plan.parameters / 1e6:,.1f} M"
    if plan.trained < plan.parameters:
        parameters += f", {plan.trained / 1e6:,.1f} M of them trained"
    rows = [
        ("devices", f"{cluster.devices} × {cluster.name} on {_count(cluster.hosts, 'host')}"),
        ("parameters", parameters),
        *((f"memory: {name}", f"{n / GIB:,.2f} GiB") for name, n in plan.memory.items()),
        ("memory: total per device", f"{total / GIB:,.2f} of {_capacity(cluster) / GIB:,.0f} GiB"),
        ("operations per step", f"{plan.operations / 1e12:,.1f} TFLOP"),
        *((f"step: {name}", _time(name, plan, cluster, mfu)) for name in plan.seconds),
        ("step", f"{plan.step_seconds:.3f} s"),
        ("examples per second", f"{config.data.batch_size / plan.step_seconds:,.0f}"),
        ("needed per second and host", f"{plan.examples:,.0f} examples"),
        ("needed per second and host, decoded", f"{plan.host_bytes / MEGA:,.0f} MB"),
        (f"{steps:,} steps", f"{steps * plan.step_seconds / 86400:.2f} days"),
    ]
    lines = [text_table(rows, ("plan", ""), align="lr"), _limit_line(plan, cluster)]
    return "\n".join([*lines, *(f"does not fit: {x}" for x in plan.faults)])


def _time(name: str, plan: ResourcePlan, cluster: Cluster, mfu: float) -> str:
    """Return the time of a part of the step with the rate that it is based on."""
    if math.isnan(plan.seconds[name]):
        return "not known"
    if name == step_times.COLLECTIVES and cluster.devices == 1:
        return "none"
    peak = device_flops.peak_flops(cluster.chip.device_kind) or math.nan
    links = f"{cluster.chip.link:,g} GB/s per device"
    if cluster.needs_network:
        links += f", {cluster.network:,g} GB/s per host"
    rates = {
        step_times.COMPUTE: f"MFU {mfu:.0%} of {peak / 1e12:,.0f} TFLOP/s per device",
        step_times.MEMORY: f"{cluster.chip.bandwidth:,g} GB/s per device",
        step_times.COLLECTIVES: links,
        step_times.DATA: f"{cluster.host_data} per host",
    }
    return f"{plan.seconds[name]:.3f} s at {rates[name]}"


def _limit_line(plan: ResourcePlan, cluster: Cluster) -> str:
    """Return the lines on the part that limits a step, and on those that are not known."""
    text = f"the limit: {plan.limit}"
    if plan.limit == step_times.DATA:
        others = {k: s for k, s in plan.seconds.items() if k != step_times.DATA}
        idle = 1 - others[step_times.limit(others)] / plan.step_seconds
        text += (
            f"; the devices wait for {idle:.0%} of the time. More cores or hosts, smaller images, "
            "or data.pool and data.threads (docs/pretraining.md)"
        )
    unknown = []
    if math.isnan(plan.seconds[step_times.COLLECTIVES]):
        unknown.append("collectives: state the hosts' network, --network=GB/s that a host sends")
    if cluster.host_data is None:
        unknown.append(
            f"data: state what a host delivers, --host_data='900 examples' or '350 MB' per second "
            f"(octolike benchmark data); data are the limit below {plan.examples:,.0f} examples"
        )
    return "\n".join([text, *(f"not compared: {x}" for x in unknown)])


def _nbytes(tree: Any) -> int:
    return sum(map(sharding.nbytes, jax.tree.leaves(tree)))


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'s' if n > 1 else ''}"


def _residuals(work: lowering.Workload, cluster: Cluster, batch: int) -> int:
    config, chip = lowering.with_batch_size(work.config, batch), cluster.chip
    return lowering.residual_bytes(
        work._replace(config=config), config.model.remat, chip.platform, chip.capability
    )


def _capacity(cluster: Cluster) -> float:
    return cluster.chip.memory * GIGA


def _faults(memory: dict[str, int], cluster: Cluster, batch: int) -> tuple[str, ...]:
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
