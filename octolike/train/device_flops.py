"""Peak throughput of devices: dense bfloat16 operations per second, to compute MFU.

Vendors' figures for dense matrices (the larger figures "with sparsity" count zeros), by the name
that jax gives the device:

    NVIDIA   the data sheets of the A100, L4, L40S, H100 (SXM and PCIe differ), H200, B200, and V100
             and T4, which have no bfloat16: their float16
    TPU      cloud.google.com/tpu/docs, "system architecture", per chip; for v2 and v3, per core,
             because jax sees each of a chip's two cores as a device
"""

from __future__ import annotations

import re

TERA = 1e12

# The first entry that matches whole words of the device name counts: longer names come first.
PEAKS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "GH200": 989,
    "A100": 312,
    "A10G": 70,
    "A10": 125,
    "L40S": 362,
    "L4": 121,
    "V100": 125,
    "T4": 65,
    "TPU v2": 22.5,
    "TPU v3": 61.5,
    "TPU v4 lite": 138,
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5e": 197,
    "TPU v5p": 459,
    "TPU v5": 459,
    "TPU v6 lite": 918,
    "TPU v6e": 918,
}


def peak_flops(device_kind: str) -> float | None:
    """Return a device's peak operations per second; None if unknown (any CPU)."""
    for name, tera in PEAKS.items():
        if re.search(rf"\b{name}\b", device_kind, re.IGNORECASE):
            return tera * TERA
    return None
