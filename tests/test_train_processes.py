"""SLURM's tasks and the GPUs of a node: those that each process uses, and the messages."""

import os

import jax
import pytest

from octolike.config import Config, ConfigError
from octolike.cores import usable_cores
from octolike.train import processes, profile


def slurm(tasks: int, per_node: str, local: int = 0, node: int = 0, **others: str) -> dict:
    return {
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_TASKS_PER_NODE": per_node,
        "SLURM_LOCALID": str(local),
        "SLURM_NODEID": str(node),
        **others,
    }


@pytest.mark.parametrize(
    ("environment", "gpus", "expected"),
    [
        ({}, 8, None),  # not SLURM
        (slurm(2, "1(x2)"), 8, [0, 1, 2, 3, 4, 5, 6, 7]),  # a task per node: all of its GPUs
        (slurm(16, "8(x2)", local=3), 8, [3]),
        (slurm(4, "2(x2)", local=1), 8, [4, 5, 6, 7]),
        (slurm(16, "8(x2)", local=3), 1, [0]),  # bound by --gpus-per-task=1
        # bound by --gpus-per-task=2; and not, by --gpu-bind=none
        (slurm(4, "4", local=1, SLURM_GPUS_PER_TASK="2"), 2, [0, 1]),
        (slurm(2, "2", local=1, SLURM_GPUS_PER_TASK="h100:2"), 2, [0, 1]),
        (slurm(4, "4", local=1, SLURM_GPUS_PER_TASK="2"), 8, [2, 3]),
        (slurm(12, "8,4", local=1, node=1), 8, [2, 3]),
        (slurm(2, "1(x2)"), 0, None),  # no GPU
    ],
)
def test_a_task_uses_its_share_of_the_gpus_of_its_node(environment, gpus, expected):
    assert processes.slurm_devices(environment, gpus) == expected


def test_every_gpu_of_a_node_belongs_to_one_task():
    for tasks in (1, 2, 4, 8):
        shares = [
            processes.slurm_devices(slurm(tasks, str(tasks), local=i), 8) for i in range(tasks)
        ]
        assert sorted(x for share in shares for x in share) == list(range(8))


def test_tasks_that_cannot_share_the_gpus_are_an_error():
    with pytest.raises(ConfigError, match="3 tasks share the 8 GPUs"):
        processes.slurm_devices(slurm(3, "3"), 8)


def test_several_tasks_without_train_distributed_are_an_error():
    with pytest.raises(ConfigError, match=r"srun started 16 tasks, but train\.distributed is off"):
        processes.check_slurm(False, slurm(16, "8(x2)"))
    processes.check_slurm(True, slurm(16, "8(x2)"))
    processes.check_slurm(False, slurm(1, "1"))
    processes.check_slurm(False, {})


def test_a_process_uses_its_share_of_the_cores(monkeypatch):
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    cores = usable_cores()
    assert cores == len(os.sched_getaffinity(0))
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    assert usable_cores() == 1
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", str(cores + 1))
    assert usable_cores() == cores


def test_visible_gpus(monkeypatch):
    monkeypatch.setattr(processes, "_device_files", lambda: ["/dev/nvidia0", "/dev/nvidia1"])
    assert processes.visible_gpus({}) == 2
    assert processes.visible_gpus({"CUDA_VISIBLE_DEVICES": "3"}) == 1
    assert processes.visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == 0
    assert processes.visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == 0


def test_a_gpu_that_jax_does_not_see_is_said(monkeypatch):
    assert processes.describe_unused_gpus({}) == "" or processes._device_files()
    monkeypatch.setattr(processes, "_device_files", lambda: ["/dev/nvidia0"])
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert "1 NVIDIA GPU(s), but JAX does not see them" in processes.describe_unused_gpus({})
    assert processes.describe_unused_gpus({"JAX_PLATFORMS": "cpu"}) == ""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert processes.describe_unused_gpus({}) == ""


def test_steps_are_profiled(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: calls.append(("start", path)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("stop",)))
    hook = profile.ProfileHook(profile.parse("3:5"), tmp_path)
    due = [step for step in range(8) if hook.due(step) and (hook.call(step, {}, {}), True)]
    assert due == [3, 5]
    assert [name for name, *_ in calls] == ["start", "stop"]
    assert "tensorboard --logdir" in capsys.readouterr().out
    short = profile.ProfileHook((3, 50), tmp_path)
    short.call(3, {}, {})
    short.close()  # the run ended
    short.close()
    assert len(calls) == 4
    resumed = profile.ProfileHook((3, 5), tmp_path, first=7)
    assert not any(map(resumed.due, range(7, 20)))  # they are done
    config = Config(workdir="unused")
    config.train.profile = "110:100"
    with pytest.raises(ConfigError, match="is not 'start:stop'"):
        config.check()
