"""The least time that the parts of a training step take, from bytes and bandwidths.

    compute            operations at an assumed share of the peak
    memory bandwidth   each byte that a step must read from or write to a device's memory, once
    collectives        gradients, and with FSDP parameters, between devices and between hosts
    data               a host's share of the batch, at the rate that its pipeline delivers

They run at the same time, so the slowest limits the step. Bandwidths are the vendors' figures,
which no program reaches completely.

Collectives of n devices in rows of r that share the state (`train.fsdp`), of P bytes of parameters
and G bytes of gradients, per device (Thakur et al. 2005, ring or recursive halving):

    gather of the parameters, forward and backward    2 (r − 1) / r · P
    scatter of the gradients                            (r − 1) / r · G
    sum of the scattered gradients over n / r rows    2 (n/r − 1) / (n/r) · G / r

The same holds for hosts, as if each were one device with the shards of all of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from octolike.train.cluster import GIGA, Cluster

COMPUTE, MEMORY, COLLECTIVES, DATA = "compute", "memory bandwidth", "collectives", "data"


def memory_seconds(
    memory: Mapping[str, int], parameters: int, parts: int, cluster: Cluster
) -> float:
    """Return the time to read and write what a step must, on one device.

    Args:
        memory: {part: bytes per device} of a plan.
        parameters: bytes of all parameters: shards are gathered, so each device reads all of them.
        parts: `optim.accumulate`; the activations are of one part.
        cluster: the devices.
    """
    # forward and backward; stored and read again
    per_part = 2 * parameters + 2 * memory["activations"] + 2 * memory["gradients"]
    # trained parameters have the size of their gradients
    update = 2 * (memory["gradients"] + memory["optimiser"] + memory["average"])
    return (parts * per_part + update) / (cluster.chip.bandwidth * GIGA)


def collective_seconds(parameters: int, gradients: int, rows: int, cluster: Cluster) -> float:
    """Return the time of a step's collectives; nan if the network between hosts is not stated.

    Args:
        parameters: bytes of all parameters.
        gradients: bytes of all gradients.
        rows: devices that share the state.
        cluster: the devices.
    """
    if not cluster.needs_network:
        sent = _sent(parameters, gradients, rows, cluster.devices)
        return sent / (cluster.chip.link * GIGA)
    inside = _sent(parameters, gradients, min(rows, cluster.per_host), cluster.per_host)
    if not cluster.network:
        return math.nan
    between = _sent(parameters, gradients, math.ceil(rows / cluster.per_host), cluster.hosts)
    return max(inside / (cluster.chip.link * GIGA), between / (cluster.network * GIGA))


def data_seconds(examples: float, nbytes: float, cluster: Cluster) -> float:
    """Return the time in which a host delivers its share of a batch; nan if it is not stated."""
    if cluster.host_data is None:
        return math.nan
    return cluster.host_data.seconds(examples, nbytes)


def limit(seconds: Mapping[str, float]) -> str:
    """Return the part that takes longest, of those that are known."""
    return max(seconds, key=lambda name: -1.0 if math.isnan(seconds[name]) else seconds[name])


def _sent(parameters: float, gradients: float, rows: int, count: int) -> float:
    """Return the bytes that each of `count` members sends."""
    groups = count / rows
    shared = (rows - 1) / rows * (2 * parameters + gradients)
    return shared + 2 * (groups - 1) / groups * gradients / rows
