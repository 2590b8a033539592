"""The processor cores that this process may use."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Return their number: those that the process is bound to, or its share of a SLURM node."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:  # macOS
        cores = os.cpu_count() or 1
    share = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(cores, int(share)) if share.isdecimal() and int(share) else cores
