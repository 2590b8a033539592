"""Sharding: the layout of devices does not change results; the rules of the mesh.

Runs on one device use this process; eight devices, or two processes of four, use subprocesses.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import sharding_runs
from jax.sharding import AbstractMesh, PartitionSpec
from train_fakes import make_batch

from octolike.config import ConfigError, TrainConfig
from octolike.train import memory_plan, metrics, sharding, state

TESTS = Path(__file__).parent
TOLERANCE = 1e-5  # for a loss near 1: sums are in another order


def environment(devices: int, **more: str) -> dict[str, str]:
    return os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
        "JAX_PLATFORMS": "cpu",
        **more,
    }


def start(jobs: list[dict], env: dict[str, str]) -> subprocess.Popen:
    command = [sys.executable, str(TESTS / "sharding_runs.py"), json.dumps(jobs)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def results(process: subprocess.Popen) -> tuple[list[dict], str]:
    """Return (results of the runs, all other output)."""
    try:
        out, _ = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 0, out[-4000:]
    lines = out.splitlines()
    rows = [json.loads(x.removeprefix("RUN ")) for x in lines if x.startswith("RUN ")]
    # lines of gloo's threads may be interleaved
    return rows, "\n".join(
        x for x in lines if not re.search(r"^RUN |Gloo|peer ranks|^\s*\d*\s*$", x)
    )


def curve(workdir: Path) -> list[dict[str, float]]:
    """Return loss and gradient norms of each step, then the action error of the validation."""
    rows = metrics.read(workdir / metrics.FILE)
    names = ("loss", "grad_norm", "validation/one/action_error")
    return [{k: v for k, v in row.items() if k.startswith(names)} for row in rows]


def largest_difference(workdir: str, expected: list[dict[str, float]]) -> float:
    rows = curve(Path(workdir))
    assert [row.keys() for row in rows] == [row.keys() for row in expected]
    pairs = zip(rows, expected, strict=True)
    return max(abs(a[k] - b[k]) for a, b in pairs for k in a)


@pytest.fixture(scope="module")
def single_device(tmp_path_factory):
    """Return (directory, curve) of a run on one device, in this process."""
    directory = tmp_path_factory.mktemp("one")
    assert sharding_runs.train(str(directory))["code"] == 0
    rows = curve(directory)
    assert len(rows) == sharding_runs.STEPS + 1
    assert rows[-2]["loss"] < 0.8 * rows[0]["loss"]
    return directory, rows


def halfway(directory: Path, copy: Path) -> str:
    """Return a copy of a run after half of its steps."""
    shutil.copytree(directory, copy)
    shutil.rmtree(copy / "checkpoints" / "20")
    return str(copy)


def test_layouts_of_eight_devices_reproduce_the_curve_of_one_device(single_device, tmp_path):
    cache = str(tmp_path / "cache")
    jobs = [
        {"workdir": str(tmp_path / "data"), "cache": cache},
        {"workdir": str(tmp_path / "fsdp"), "fsdp": 0, "cache": cache},
        {"workdir": halfway(single_device[0], tmp_path / "resumed"), "fsdp": 4, "cache": cache},
    ]
    env = environment(8, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    runs, output = results(start(jobs, env))
    assert [run["code"] for run in runs] == [0, 0, 0]
    # 1 × 8, 8 × 1 and 2 × 4 devices: parameters and their optimiser moments
    pieces = [[108, 64]], [[108, 8]], [[27, 64]]
    assert [run["pieces"] for run in runs] == [8 * x for x in pieces]
    assert [run["moments"] for run in runs] == [x[0] for x in pieces]
    assert "data 1 × fsdp 8" in output
    assert f"resuming {tmp_path / 'resumed'} at step 10" in output
    assert list((tmp_path / "cache").glob("jit_step-*"))
    differences = {
        Path(job["workdir"]).name: largest_difference(job["workdir"], single_device[1])
        for job in jobs
    }
    print("largest differences:", differences)
    assert max(differences.values()) < TOLERANCE


def test_two_processes_reproduce_the_curve_of_one_process(single_device, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    jobs = [
        {"workdir": str(tmp_path / "stopped"), "fsdp": 4, "stop": 1},
        {"workdir": halfway(single_device[0], tmp_path / "resumed"), "fsdp": 0},
        {"workdir": str(tmp_path / "data")},
        {"workdir": str(tmp_path / "back"), "hidden": ["1", 20]},
    ]
    shutil.copytree(single_device[0], tmp_path / "back")
    names = dict(zip(sharding.LAUNCH, (address, "2", ""), strict=True))
    names["JAX_CPU_COLLECTIVES_IMPLEMENTATION"] = "gloo"
    both = [start(jobs, environment(4, **names | {"JAX_PROCESS_ID": str(i)})) for i in (1, 0)]
    (second, quiet), (first, output) = (results(process) for process in both)
    # Only the second process got the signal, at batch 4. It is in its batch 5, so in step 6, whose
    # metrics both have read when they dispatch step 8.
    assert first[0] == second[0] == {"code": 143}
    assert "saved at step 8 of 20" in output
    assert "2 processes = data 2 × fsdp 4" in output
    assert "checkpoint 20 cannot be read (another process cannot read it): going back" in output
    hidden = tmp_path / "back" / "checkpoints" / "20"
    assert quiet == f"cannot read {hidden}: OSError: input/output error"
    assert first[1]["pieces"] == 4 * [[108, 8]]
    # One device resumes the checkpoint of two processes.
    assert sharding_runs.train(str(tmp_path / "stopped"))["code"] == 0
    differences = {
        Path(job["workdir"]).name: largest_difference(job["workdir"], single_device[1])
        for job in jobs
    }
    print("largest differences:", differences)
    assert max(differences.values()) < TOLERANCE


class Mesh:
    """The attributes of a mesh that the rules read."""

    def __init__(self, **shape: int):
        self.shape, self.size = shape, int(np.prod(list(shape.values())))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((128, 512), (None, "fsdp")),
        ((512, 128), ("fsdp",)),
        ((64, 64), ()),  # at most SMALL elements
        ((4099, 6), ()),  # no axis is divisible
        ((4099, 8), (None, "fsdp")),
        ((3, 3, 64, 64), (None, None, None, "fsdp")),
        ((), ()),
    ],
)
def test_the_longest_divisible_axis_is_sharded(monkeypatch, shape, expected):
    monkeypatch.setattr(sharding, "NamedSharding", lambda mesh, spec: spec)
    assert sharding.array_sharding(shape, Mesh(data=2, fsdp=4)) == PartitionSpec(*expected)
    assert sharding.array_sharding(shape, Mesh(data=8, fsdp=1)) == PartitionSpec()


def test_an_fsdp_that_does_not_divide_the_devices_is_an_error(monkeypatch):
    device = type("Device", (), {"process_index": 0, "id": 0, "device_kind": "H200"})
    monkeypatch.setattr(jax, "devices", lambda: 6 * [device])
    with pytest.raises(
        ConfigError, match=r"fsdp 4 does not fit 6 H200 .* one of 1, 2, 3, 6, or 0 for all devices"
    ):
        sharding.make_mesh(4)


def test_distributed_processes_that_cannot_be_found_are_an_error(monkeypatch):
    for name in sharding.LAUNCH:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    tried = []

    def initialize(*args, **kwargs):
        tried.append(args)
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ConfigError, match=r"found JAX_PROCESS_ID=0.*JAX_NUM_PROCESSES=2"):
        sharding.initialize(TrainConfig(distributed=True))
    assert tried == [()]


def test_a_batch_that_does_not_divide_is_padded():
    batch = make_batch(0, 3)
    mesh = sharding.make_mesh()
    assert jax.tree.all(
        jax.tree.map(lambda a, b: (a == b).all(), sharding.put_padded_batch(batch, mesh), batch)
    )
    filled = sharding.pad_batch(batch, 4)
    assert {len(x) for x in jax.tree.leaves(filled)} == {4}
    assert filled["action_mask"][:3].all()
    assert not filled["action_mask"][3].any()
    assert batch["action_mask"].shape[0] == 3


def test_the_memory_plan_counts_the_bytes_per_device():
    array = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)
    params = {"kernel": array(1024, 256), "bias": array(256)}
    train_state = state.TrainState(
        array(), params, {"frozen": array(512, 8)}, params, (params, params)
    )
    mib = 2**20
    abstract = AbstractMesh((2, 4), sharding.AXES)
    cut = sharding.bytes_per_device(params, abstract)
    assert cut == mib // 4 + 1024
    rows = memory_plan.plan_memory(train_state, {"x": array(8, 100)}, sharding.make_mesh(), 3 * mib)
    assert rows["parameters"] == mib + 1024 + 512 * 8 * 4
    assert rows["gradients"] == rows["average"] == mib + 1024
    assert rows["two batches"] == 2 * 8 * 100 * 4 // sharding.make_mesh().size
    assert rows["optimiser"] == 2 * (mib + 1024)
    assert rows["activations and buffers"] == 2 * mib - 1024
    output = memory_plan.describe(rows, capacity=4 * mib)
    assert "a device has 4 MiB" in output
    assert "exceeds the memory of a device: optim.accumulate" in output
    assert "exceeds" not in memory_plan.describe(rows, capacity=400 * mib)
