"""Where arrays live: a mesh of devices with axes ("data", "fsdp"), of one process or of several.

    batch                                  cut by example over both axes
    parameters, their running average,     cut over "fsdp" along the longest axis that divides,
    optimiser state                        where an array has more than SMALL elements
    everything else, metrics too           a copy on every device

`train.fsdp` is the length of the second axis: with 1 this is plain data parallelism, with as many
as there are devices each holds but its share of the state. The compiler gathers what a layer needs
just before it is used and scatters its gradient. The results are those of one device up to the
order of sums; a checkpoint knows nothing of the layout that it was saved from.

Several processes run the same program (`train.distributed`). Each feeds its contiguous share of
every batch; the first one alone writes and speaks. How one is told of the others:

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
from octolike.train import state as states

AXES = ("data", "fsdp")
SMALL = 1 << 12  # elements: cutting a bias would cost more messages than it saves memory
AGREE = 10  # steps between two questions whether a process was told to stop
LAUNCH = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def start(config: TrainConfig) -> None:
    """Join the other processes and open the cache of compiled steps; a second call does nothing.

    Must come before the first computation. Processes other than the first print nothing from then
    on. Raises ConfigError where nobody says who the other processes are.
    """
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", config.compilation_cache)
    if not config.distributed or jax.distributed.is_initialized():
        return
    # The loop itself saves and stops at SIGTERM, and agrees with the others on when.
    jax.config.update("jax_enable_preemption_service", False)
    given = {name: os.environ[name] for name in LAUNCH if os.environ.get(name)}
    try:
        if len(given) == len(LAUNCH):
            address, count, index = given.values()
            jax.distributed.initialize(
                address, int(count), int(index), cluster_detection_method="deactivate"
            )
        else:
            jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        found = ", ".join(f"{k}={v}" for k, v in given.items()) or f"none of {', '.join(LAUNCH)}"
        raise ConfigError(
            f"train.distributed is on, but the processes cannot be joined ({error}); found {found}."
            " On TPU pods, SLURM and Open MPI nothing need be set; elsewhere give each process all "
            "three, e.g. JAX_COORDINATOR_ADDRESS=host0:1234 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0"
        ) from error
    if not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the end)


def process() -> tuple[int, int]:
    """Return (index of this process, number of processes)."""
    return jax.process_index(), jax.process_count()


def is_first() -> bool:
    """Return whether this process is the one that writes files and speaks."""
    return jax.process_index() == 0


def wait(reason: str) -> None:
    """Wait until every process is here; the reason is named where one of them is elsewhere."""
    multihost_utils.sync_global_devices(reason)


def agree(signum: int | None, step: int) -> int | None:
    """Return the signal at which all processes stop after this step, or None to go on.

    A signal reaches one process before another, and a step needs all of them: now and then they
    tell each other, and stop if any has had one.
    """
    if jax.process_count() == 1:
        return signum
    if step % AGREE:
        return None
    return int(multihost_utils.process_allgather(np.int32(signum or 0)).max()) or None


def make_mesh(fsdp: int = 1) -> Mesh:
    """Return the mesh of all devices of all processes, axes "data" and "fsdp"; fsdp 0: all.

    Raises ConfigError where the devices cannot be laid out so.
    """
    # By process, so that its share of a batch is contiguous; those of an fsdp row are neighbours.
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    count, rows = len(devices), fsdp or len(devices)
    if count % rows:
        fitting = [n for n in range(1, count + 1) if count % n == 0]
        raise ConfigError(
            f"train.fsdp {fsdp} does not fit {count} {devices[0].device_kind} devices in "
            f"{jax.process_count()} processes: it must divide {count}. Choose one of "
            f"{', '.join(map(str, fitting))}, or 0 for all"
        )
    layout = np.array(devices).reshape(count // rows, rows)
    return Mesh(layout, AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def by_example(mesh: Mesh) -> NamedSharding:
    """Return the sharding of batches: the leading axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of metrics and small things: a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def of_array(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array of the training state, by its shape alone."""
    rows = mesh.shape["fsdp"]
    fitting = [i for i, n in enumerate(shape) if n % rows == 0]
    if rows == 1 or math.prod(shape) <= SMALL or not fitting:
        return replicated(mesh)
    longest = max(fitting, key=lambda i: (shape[i], i))
    return NamedSharding(mesh, PartitionSpec(*[None] * longest, "fsdp"))


def of_state(state: Any, mesh: Mesh) -> Any:
    """Return the shardings of a training state or a part of it, which may be abstract."""
    return jax.tree.map(lambda x: of_array(x.shape, mesh), state)


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Start the transfer of this process's share of a numpy batch; return the whole, not waiting.

    The leading axis of the result is as many times longer as there are processes.
    """
    cut, processes = by_example(mesh), jax.process_count()
    if processes == 1:
        return jax.device_put(batch, cut)

    def put(x: np.ndarray) -> jax.Array:
        shape = (len(x) * processes, *x.shape[1:])
        return jax.make_array_from_process_local_data(cut, x, shape)

    return jax.tree.map(put, batch)


def put_whole(batch: Mapping[str, Any], mesh: Mesh) -> Any:
    """Do the same for a batch that every process has whole, of any size.

    Where the devices cannot share it evenly, examples without a valid action are added.
    """
    batch, cut = filled(batch, mesh.size), by_example(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, cut)
    mine = lambda x: jax.make_array_from_callback(x.shape, cut, lambda index: x[index])
    return jax.tree.map(mine, batch)


def filled(batch: Mapping[str, Any], multiple: int) -> Any:
    """Return a numpy batch with as many examples as a multiple has; the new ones do not count."""
    size = len(batch["action"])
    more = -size % multiple
    if not more:
        return batch
    longer = lambda x: np.concatenate([x, np.repeat(x[:1], more, axis=0)])
    batch = jax.tree.map(longer, batch)
    batch["action_mask"][size:] = False
    return batch


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raise ConfigError if the batch cannot be cut evenly."""
    if batch_size % mesh.size:
        near = max(batch_size // mesh.size, 1) * mesh.size
        raise ConfigError(
            f"data.batch_size {batch_size} does not divide over {mesh.size} devices; try {near}"
        )


def describe(state: Any, batch: Any, mesh: Mesh) -> str:
    """Return the table of the rules: arrays, elements and MiB per device; all may be abstract."""
    kind, (data, fsdp) = mesh.devices.flat[0].device_kind, mesh.devices.shape
    n = len({d.process_index for d in mesh.devices.flat})
    processes = f"{n} process{'es' if n > 1 else ''}"
    rules: dict[str, list[Any]] = {f"state, cut over fsdp ({fsdp})": []} if fsdp > 1 else {}
    rules["state, a copy on every device"] = []
    rules["batch, cut by example over both axes"] = jax.tree.leaves(batch)
    names = list(rules)
    for x in jax.tree.leaves(state):
        rules[names[0 if of_array(x.shape, mesh).spec else -2]].append(x)
    rows = [("rule", "arrays", "elements", "MiB per device")]
    for name, arrays in rules.items():
        elements = sum(math.prod(x.shape) for x in arrays)
        each = sum(map(nbytes, arrays)) / (1 if "copy" in name else mesh.size)
        each *= data if "fsdp (" in name else 1
        rows.append((name, str(len(arrays)), f"{elements:,}", f"{each / 2**20:.1f}"))
    head = f"mesh: {mesh.size} × {kind} in {processes} = data {data} × fsdp {fsdp}"
    return head + "\n" + states.table(rows)


def bytes_per_device(state: Any, mesh: Mesh) -> int:
    """Return the bytes of a training state, or a part of it, on each device."""
    cut = lambda x: mesh.shape["fsdp"] if of_array(x.shape, mesh).spec else 1
    return sum(nbytes(x) // cut(x) for x in jax.tree.leaves(state))


def nbytes(x: Any) -> int:
    """Return the bytes of an array, which may be abstract."""
    return math.prod(x.shape) * np.dtype(x.dtype).itemsize
