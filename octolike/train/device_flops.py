"""Peak throughput of devices: dense bfloat16 operations per second, to compute MFU.

Vendors' figures for dense matrices (the larger figures "with sparsity" count zeros) with
accumulation in float32, by the name that jax gives the device:

    data centre   NVIDIA's data sheets and architecture papers of the A100, L4, L40S, H20, H100 (SXM
                  and PCIe differ), H200, B200, GB200, B300, and V100 and T4, which have no
                  bfloat16: their float16
    RTX           NVIDIA's architecture papers of Ampere GA102, Ada and Blackwell, appendix: on
                  GeForce cards accumulation in float32 runs at half the rate of the RTX ones
    TPU           cloud.google.com/tpu/docs, "system architecture", per chip; for v2, v3 and v7,
                  per core, because jax sees each of a chip's two cores as a device
"""

from __future__ import annotations

import re

TERA = 1e12

# The first entry that matches whole words of the device name counts: longer names come first.
PEAKS = {
    "GB300": 2500,
    "B300": 2250,
    "GB200": 2500,
    "B200": 2250,
    "H20": 148,
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
    "RTX 6000 Ada": 364,
    "RTX PRO 6000": 504,
    "RTX A6000": 155,
    "A6000": 155,
    "A40": 150,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71,
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
    "TPU7x": 1153.5,
    "TPU v7": 1153.5,
}


def peak_flops(device_kind: str) -> float | None:
    """Return a device's peak operations per second; None if unknown (any CPU)."""
    for name, tera in PEAKS.items():
        if re.search(rf"\b{name}\b", device_kind, re.IGNORECASE):
            return tera * TERA
    return None
