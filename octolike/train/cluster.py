"""The devices of a planned run: memory, bandwidths and hosts, and the rates of the hosts."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass

from octolike.config import ConfigError, unknown

GIGA, MEGA = 1e9, 1e6


@dataclass(frozen=True)
class Chip:
    """A device.

    Attributes:
        device_kind: its name as jax reports it.
        memory: GB of 10^9 bytes.
        bandwidth: of that memory, GB/s.
        link: to the other devices, GB/s that a device sends.
        platform: "cuda" or "tpu".
        capability: NVIDIA's compute capability.
    """

    device_kind: str
    memory: float
    bandwidth: float
    link: float
    platform: str
    capability: float = 0.0


# By the vendors' data sheets and cloud.google.com/tpu/docs. Memory as jax counts it; cards that are
# sold by GiB have 7 % more. Links: half of NVLink's figure, which counts both directions; PCIe for
# cards without; all links of a TPU's ICI. A v7 chip is two devices, with half of its 192 GB each.
CHIPS = {
    "a100": Chip("A100", 80, 2039, 300, "cuda", 8.0),
    "a6000": Chip("RTX A6000", 48, 768, 32, "cuda", 8.6),
    "4090": Chip("RTX 4090", 24, 1008, 32, "cuda", 8.9),
    "6000ada": Chip("RTX 6000 Ada", 48, 960, 32, "cuda", 8.9),
    "l40s": Chip("L40S", 48, 864, 32, "cuda", 8.9),
    "h20": Chip("H20", 96, 4000, 450, "cuda", 9.0),
    "h100": Chip("H100", 80, 3350, 450, "cuda", 9.0),
    "h200": Chip("H200", 141, 4800, 450, "cuda", 9.0),
    "b200": Chip("B200", 180, 8000, 900, "cuda", 10.0),
    "gb200": Chip("GB200", 186, 8000, 900, "cuda", 10.0),
    "5090": Chip("RTX 5090", 32, 1792, 64, "cuda", 12.0),
    "v4": Chip("TPU v4", 32, 1200, 300, "tpu"),
    "v5e": Chip("TPU v5e", 16, 800, 200, "tpu"),
    "v5p": Chip("TPU v5p", 95, 2765, 600, "tpu"),
    "v6e": Chip("TPU v6e", 32, 1600, 400, "tpu"),
    "v7": Chip("TPU v7", 96, 3690, 300, "tpu"),
}


@dataclass(frozen=True)
class HostData:
    """The rate at which a host's data pipeline delivers: examples/s, or decoded bytes/s."""

    value: float
    unit: str  # "examples" or "MB"

    def seconds(self, examples: float, nbytes: float) -> float:
        """Return the time to deliver a host's share of a batch."""
        return examples / self.value if self.unit == "examples" else nbytes / (self.value * MEGA)

    def __str__(self) -> str:
        return f"{self.value:,g} {self.unit}/s"


@dataclass(frozen=True)
class Cluster:
    """Equal devices on hosts.

    Attributes:
        name: of the chip.
        chip: the device.
        devices: their number.
        per_host: devices of a host.
        network: GB/s that a host sends to the others; 0: not stated. The chips of a TPU slice are
            linked across hosts.
        host_data: None: not stated.
    """

    name: str
    chip: Chip
    devices: int
    per_host: int
    network: float = 0.0
    host_data: HostData | None = None

    @property
    def hosts(self) -> int:
        """The number of hosts."""
        return math.ceil(self.devices / self.per_host)

    @property
    def needs_network(self) -> bool:
        """Whether devices reach some others through the hosts' network only."""
        return self.hosts > 1 and self.chip.platform != "tpu"

    def with_rates(self, network: float, host_data: str) -> Cluster:
        """Return the cluster with stated rates; ConfigError for others than numbers above 0."""
        if not 0 <= network < math.inf:
            raise ConfigError(f"network {network:g}: expected GB/s, 0 or more")
        return dataclasses.replace(self, network=network, host_data=parse_host_data(host_data))


def parse_chips(text: str, per_host: int = 8) -> Cluster:
    """Return the devices of 'h100:32'; ConfigError for an unknown chip or number."""
    name, _, number = text.lower().partition(":")
    if name not in CHIPS:
        raise ConfigError(unknown("chip", name, CHIPS))
    if (not number.isdigit() and number) or number == "0":
        raise ConfigError(f"chips {text!r}: expected name:number, such as h100:32")
    if per_host < 1:
        raise ConfigError(f"per_host is {per_host}; expected at least one device per host")
    count = int(number or 1)
    return Cluster(name, CHIPS[name], count, min(per_host, count))


def parse_host_data(text: str) -> HostData | None:
    """Return the rate of '900 examples' or '350 MB', per second; None for ''.

    Raises ConfigError for another text, or a rate of 0.
    """
    if not text:
        return None
    match = re.fullmatch(r"\s*([\d.,_]*\d)\s*(examples|MB)(?:/s)?\s*", text)
    try:
        value = float(match[1].replace(",", "")) if match else 0.0
    except ValueError:
        value = 0.0
    if not match or value <= 0:
        raise ConfigError(
            f"host_data {text!r}: expected examples or decoded MB per second and host, such as "
            "'900 examples' or '350 MB'; octolike benchmark data measures both"
        )
    return HostData(value, match[2])
