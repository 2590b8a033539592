"""Sharding over a mesh of devices with axes ("data", "fsdp"), in one process or several.

    batch                                  sharded by example over both axes
    parameters, their running average,     sharded over "fsdp" along the longest divisible axis, if
    optimiser state                        the array has more than SMALL elements
    everything else, including metrics     replicated on every device

`train.fsdp` is the length of the second axis: 1 is plain data parallelism; with the number of
devices, each device holds only its shard of the state. The compiler gathers the parameters of a
layer just before use and scatters their gradient. The results equal those of one device up to the
order of sums, and checkpoints are independent of the layout.

Several processes run the same program (`train.distributed`). Each feeds its share of every batch,
the examples of its own devices; only the first one writes files and prints. How the processes find
each other:

    TPU pods, SLURM, Open MPI       jax asks the cluster; nothing to set
    plain machines                  JAX_COORDINATOR_ADDRESS=host:port of the first process,
                                    JAX_NUM_PROCESSES, JAX_PROCESS_ID
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from octolike.config import ConfigError, TrainConfig
from octolike.tables import text_table
from octolike.train import processes

AXES = ("data", "fsdp")
SMALL = 1 << 12  # elements: sharding a bias would cost more in messages than it saves in memory
SIGNAL = "signal"  # of the processes, among the leaves of a batch: int32 [B]
LAUNCH = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize(config: TrainConfig) -> None:
    """Join the other processes and open the compilation cache; a second call does nothing.

    Must come before the first computation. From then on only the first process prints.

    Raises:
        ConfigError: the other processes cannot be found.
    """
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", config.compilation_cache)
    processes.check_slurm(config.distributed)
    if not config.distributed or jax.distributed.is_initialized():
        processes.warn_of_unused_gpus()
        return
    # The loop itself handles SIGTERM: the processes agree on the step at which they save and stop.
    jax.config.update("jax_enable_preemption_service", False)
    variables = {name: os.environ[name] for name in LAUNCH if os.environ.get(name)}
    try:
        if len(variables) == len(LAUNCH):
            address, count, index = variables.values()
            jax.distributed.initialize(
                address, int(count), int(index), cluster_detection_method="deactivate"
            )
        else:
            jax.distributed.initialize(local_device_ids=processes.slurm_devices())
    except (ValueError, RuntimeError) as error:
        values = ", ".join(f"{k}={v}" for k, v in variables.items())
        raise ConfigError(
            f"train.distributed is on, but the processes cannot be joined ({error}); found "
            f"{values or 'none of ' + ', '.join(LAUNCH)}. On TPU pods, SLURM and Open MPI nothing "
            "needs to be set; elsewhere set all three for each process, e.g. "
            "JAX_COORDINATOR_ADDRESS=host0:1234 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0"
        ) from error
    processes.warn_of_unused_gpus()
    if not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the end)


def process() -> tuple[int, int]:
    """Return (index of this process, number of processes)."""
    return jax.process_index(), jax.process_count()


def is_first() -> bool:
    """Return whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process has reached this barrier; errors show the name."""
    multihost_utils.sync_global_devices(name)


def with_signal(batch: Any, signum: int | None) -> Any:
    """Return this process's share of a batch with its signal, if there are several processes.

    A signal reaches the processes at different times, but a step needs all of them. So the step
    computes the largest one, and all read it with the metrics of the same step: no process waits.
    """
    if jax.process_count() == 1:
        return batch
    size = len(batch["action"])
    return {**batch, SIGNAL: np.full(size, signum or 0, np.int32)}


def agree_on_fault(fault: bool) -> bool:
    """Return whether any process has found a fault, in all of them."""
    if jax.process_count() == 1:
        return fault
    return bool(multihost_utils.process_allgather(np.bool_(fault)).any())


def make_mesh(fsdp: int = 1) -> Mesh:
    """Return the mesh of all devices of all processes, axes "data" and "fsdp"; fsdp 0: all.

    Raises:
        ConfigError: an fsdp that does not divide the number of devices.
    """
    # By process, so that its share of a batch is contiguous; devices of an fsdp row are neighbours.
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    count, rows = len(devices), fsdp or len(devices)
    check_fsdp(fsdp, count, devices[0].device_kind)
    auto = (AxisType.Auto, AxisType.Auto)
    if devices[0].platform == "tpu":  # by the topology of their links
        return jax.make_mesh((count // rows, rows), AXES, axis_types=auto)
    return Mesh(np.array(devices).reshape(count // rows, rows), AXES, axis_types=auto)


def check_fsdp(fsdp: int, count: int, device: str) -> None:
    """Raise ConfigError for an fsdp that does not divide the number of devices."""
    if fsdp and count % fsdp:
        fitting = [n for n in range(1, count + 1) if count % n == 0]
        raise ConfigError(
            f"train.fsdp {fsdp} does not fit {count} {device} devices in "
            f"{jax.process_count()} processes: it must divide {count}. Choose one of "
            f"{', '.join(map(str, fitting))}, or 0 for all devices"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of batches: the leading axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of metrics and small arrays: a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def array_sharding(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array of the training state; it depends on the shape alone."""
    rows = mesh.shape["fsdp"]
    fitting = [i for i, n in enumerate(shape) if n % rows == 0]
    if rows == 1 or math.prod(shape) <= SMALL or not fitting:
        return replicated(mesh)
    longest = max(fitting, key=lambda i: (shape[i], i))
    return NamedSharding(mesh, PartitionSpec(*[None] * longest, "fsdp"))


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Return the shardings of a training state, or of a part of it; may be abstract."""
    return jax.tree.map(lambda x: array_sharding(x.shape, mesh), state)


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Start the transfer of this process's share of a batch; return the global batch, not waiting.

    The leading axis of the result is longer by a factor of the number of processes.
    """
    by_example, processes = batch_sharding(mesh), jax.process_count()
    if processes == 1:
        return jax.device_put(batch, by_example)

    def put(x: np.ndarray) -> jax.Array:
        shape = (len(x) * processes, *x.shape[1:])
        return jax.make_array_from_process_local_data(by_example, x, shape)

    return jax.tree.map(put, batch)


def put_padded_batch(batch: Mapping[str, Any], mesh: Mesh) -> Any:
    """Start the transfer of this process's share, of any size, of a batch; see `put_batch`.

    If its size does not divide over the process's devices, examples without a valid action are
    appended. All processes need shares of the same size.
    """
    return put_batch(pad_batch(batch, mesh.size // jax.process_count()), mesh)


def pad_batch(batch: Mapping[str, Any], multiple: int) -> Any:
    """Return a numpy batch padded to a multiple; padding examples have no valid action."""
    size = len(batch["action"])
    padding = -size % multiple
    if not padding:
        return batch
    batch = jax.tree.map(lambda x: np.concatenate([x, np.repeat(x[:1], padding, axis=0)]), batch)
    batch["action_mask"][size:] = False
    return batch


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raise ConfigError if the batch size is not a multiple of the number of devices."""
    if batch_size % mesh.size:
        near = max(batch_size // mesh.size, 1) * mesh.size
        raise ConfigError(
            f"data.batch_size {batch_size} does not divide over {mesh.size} devices; try {near}"
        )


def describe(state: Any, batch: Any, mesh: Mesh) -> str:
    """Return the table of the sharding rules: arrays, elements and MiB per device.

    state and batch may be abstract.
    """
    kind, (data, fsdp) = mesh.devices.flat[0].device_kind, mesh.devices.shape
    n = len({d.process_index for d in mesh.devices.flat})
    processes = f"{n} process{'es' if n > 1 else ''}"
    sharded: list[Any] = []
    replicated: list[Any] = []
    for x in jax.tree.leaves(state):
        (sharded if array_sharding(x.shape, mesh).spec else replicated).append(x)
    rules = [(f"state, sharded over fsdp ({fsdp})", sharded, fsdp)] if fsdp > 1 else []
    rules += [
        ("state, replicated on every device", replicated, 1),
        ("batch, sharded by example over both axes", jax.tree.leaves(batch), mesh.size),
    ]
    rows = []
    for name, arrays, shards in rules:
        elements = sum(math.prod(x.shape) for x in arrays)
        per_device = sum(map(nbytes, arrays)) / shards
        rows.append((name, str(len(arrays)), f"{elements:,}", f"{per_device / 2**20:.1f}"))
    header = f"mesh: {mesh.size} × {kind} in {processes} = data {data} × fsdp {fsdp}"
    table = text_table(rows, ("rule", "arrays", "elements", "MiB per device"), align="lr")
    return f"{header}\n{table}"


def bytes_per_device(state: Any, mesh: Mesh) -> int:
    """Return the bytes of a training state, or of a part of it, on each device."""
    total = 0
    for x in jax.tree.leaves(state):
        shards = mesh.shape["fsdp"] if array_sharding(x.shape, mesh).spec else 1
        total += nbytes(x) // shards
    return total


def nbytes(x: Any) -> int:
    """Return the bytes of an array; may be abstract."""
    return math.prod(x.shape) * np.dtype(x.dtype).itemsize
