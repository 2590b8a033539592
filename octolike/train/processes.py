"""Which processes and GPUs a run has: SLURM's tasks, and GPUs that JAX does not see."""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Mapping

import jax

from octolike.config import ConfigError


def check_slurm(distributed: bool, environment: Mapping[str, str] = os.environ) -> None:
    """Raise ConfigError if srun started several tasks that would train separately."""
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1") or 1)
    if tasks > 1 and not distributed:
        raise ConfigError(
            f"srun started {tasks} tasks, but train.distributed is off, so each would train a run "
            "of its own in the same directory; set --config.train.distributed=True, or srun "
            "--ntasks=1"
        )


def slurm_devices(
    environment: Mapping[str, str] = os.environ, gpus: int | None = None
) -> list[int] | None:
    """Return the indices of this task's GPUs among the visible ones; None outside of SLURM.

    By default jax gives a task one GPU, with the task's number on the node as index: the first of
    eight with one task per node, and a wrong index if SLURM shows each task its own GPU only.

    Raises:
        ConfigError: the node's tasks cannot share its GPUs equally.
    """
    gpus = visible_gpus(environment) if gpus is None else gpus
    if "SLURM_STEP_NUM_TASKS" not in environment or not gpus:
        return None
    tasks, local = _tasks_on_node(environment), int(environment.get("SLURM_LOCALID", "0"))
    # With --gpus-per-task, SLURM shows a task its own GPUs only.
    if gpus == 1 or environment.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2] == str(gpus):
        return list(range(gpus))
    if gpus % tasks:
        raise ConfigError(
            f"{tasks} tasks share the {gpus} GPUs of a node, which does not come out even; use "
            f"--ntasks-per-node={gpus} (one process per GPU) or 1"
        )
    share = gpus // tasks
    return list(range(local * share, (local + 1) * share))


def visible_gpus(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of NVIDIA GPUs that this process may use."""
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return len([x for x in listed.split(",") if x.strip() not in ("", "-1")])
    return len(_device_files())


def describe_unused_gpus(environment: Mapping[str, str] = os.environ) -> str:
    """Return a warning if the machine has NVIDIA GPUs that JAX does not use; else ""."""
    gpus = visible_gpus(environment)
    chosen = environment.get("JAX_PLATFORMS", "")
    if not gpus or not _device_files() or "cpu" in chosen or jax.default_backend() != "cpu":
        return ""
    return (
        f"WARNING: this machine has {gpus} NVIDIA GPU(s), but JAX does not see them and uses the "
        "CPU. Install JAX for CUDA: make EXTRA=cuda .venv/ready, or pip install 'jax[cuda13]' "
        "(docs/install.md); if it is installed, nvidia-smi shows whether the driver works. "
        "JAX_PLATFORMS=cpu silences this line"
    )


def warn_of_unused_gpus() -> None:
    """Print the warning, if there is one, to stderr."""
    warning = describe_unused_gpus()
    if warning:
        print(warning, file=sys.stderr, flush=True)


def _tasks_on_node(environment: Mapping[str, str]) -> int:
    # "8(x2),4": eight tasks on two nodes, four on a third.
    text = environment.get("SLURM_STEP_TASKS_PER_NODE", "1")
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match:
            counts += [int(match[1])] * int(match[2] or 1)
    node = int(environment.get("SLURM_NODEID", "0"))
    return counts[min(node, len(counts) - 1)] if counts else 1


def _device_files() -> list[str]:
    return glob.glob("/dev/nvidia[0-9]*")
