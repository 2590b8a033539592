"""Where arrays live: one data-parallel mesh over the local devices.

A batch is cut along its examples, everything else is on every device.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from octolike.config import ConfigError


def make_mesh() -> Mesh:
    """Return the mesh of all local devices, axis 'data'."""
    devices = jax.local_devices()
    return jax.make_mesh((len(devices),), ("data",), devices=devices, axis_types=(AxisType.Auto,))


def by_example(mesh: Mesh) -> NamedSharding:
    """Return the sharding of batches: the leading axis over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of parameters, optimiser state and metrics: a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Start the transfer of a numpy batch to the devices and return it without waiting."""
    return jax.device_put(batch, by_example(mesh))


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raise ConfigError if the batch cannot be cut evenly."""
    if batch_size % mesh.size:
        near = max(batch_size // mesh.size, 1) * mesh.size
        raise ConfigError(
            f"data.batch_size {batch_size} does not divide over {mesh.size} devices; try {near}"
        )
