"""Latency and throughput of a policy server on loopback, next to the policy without a server.

    octolike benchmark serve                        a small network at 256 px, 1, 4 and 16 robots
    octolike benchmark serve --only overhead        time that the server adds to a call
    octolike benchmark serve --only memory --calls 10000
    octolike benchmark serve --only install         sizes of installations (uses the package index)

The server runs in a process of its own, the robots in threads of this one; each asks again as soon
as it has its answer. Overhead is the difference of calls that alternate between the server and the
same policy here; p5 are the calls that nothing else on the machine disturbed. Parameters are
random: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
PARTS = ("overhead", "robots", "memory", "install")
HORIZON, SIDE = 4, 256
NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.add_argument("--only", choices=PARTS, help="one of the measurements")
    parser.add_argument("--width", type=int, default=256, help="of the network")
    parser.add_argument("--layers", type=int, default=4, help="of the network")
    parser.add_argument("--robots", default="1,4,16", help="numbers of clients, comma-separated")
    parser.add_argument("--seconds", type=float, default=15.0, help="per number of clients")
    parser.add_argument("--calls", type=int, default=10_000, help="calls of the memory measurement")
    parser.add_argument("--pairs", type=int, default=300, help="alternating calls for the overhead")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row per measurement."""
    parts = [args.only] if args.only else PARTS[:3]
    measure = {"overhead": _overhead, "robots": _robots, "memory": _memory, "install": _install}
    return [row for part in parts for row in measure[part](args)]


def _overhead(args: argparse.Namespace) -> list[dict[str, Any]]:
    policy, observation = _policy(args.width, args.layers, (1,)), _observation()
    task = policy.create_task(instruction="lift the red cube")
    here, there = [], []
    with _Server(args.width, args.layers, (1,)) as server, server.connect() as remote:
        far_task = remote.create_task(instruction="lift the red cube")
        for i in range(args.pairs + 5):
            start = time.perf_counter()
            policy.sample_actions(observation, task, seed=i)
            middle = time.perf_counter()
            remote.sample_actions(observation, far_task, seed=i)
            if i >= 5:
                here.append(middle - start)
                there.append(time.perf_counter() - middle)
    row, far = _percentiles(here), _percentiles(there)
    added = {name: far[name] - row[name] for name in ("p5 ms", "p50 ms")}
    return [
        {"measurement": "policy in the process", **row},
        {"measurement": "the same policy behind the server", **far},
        {"measurement": "added by the server", **added},
    ]


def _robots(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for sizes in ((1,), (1, 4, 16)):
        with _Server(args.width, args.layers, sizes) as server:
            for count in map(int, args.robots.split(",")):
                durations, batches = _load(server, count, args.seconds)
                rows.append(
                    {
                        "measurement": f"{count} robots, batches of {', '.join(map(str, sizes))}",
                        **_percentiles(durations),
                        "calls/s": len(durations) / args.seconds,
                        "mean batch": float(np.mean(batches)),
                    }
                )
    return rows


def _load(server: _Server, count: int, seconds: float) -> tuple[list[float], list[float]]:
    """Return the durations and batch sizes of calls by `count` robots at once."""
    durations: list[float] = []
    batches: list[float] = []
    ready, go = threading.Barrier(count), threading.Event()

    def robot(number: int) -> None:
        observation = _observation(number)
        with server.connect() as remote:
            task = remote.create_task(instruction="lift the red cube")
            remote.sample_actions(observation, task)
            ready.wait()
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                start = time.perf_counter()
                remote.sample_actions(observation, task, seed=number)
                durations.append(time.perf_counter() - start)
                batches.append(remote.timing["batch"])

    threads = [threading.Thread(target=robot, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    go.set()
    for thread in threads:
        thread.join()
    return durations, batches


def _memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    with _Server(32, 1, (1,)) as server, server.connect() as remote:
        task, observation = remote.create_task(instruction="lift the red cube"), _observation()
        marks = {args.calls // 10, args.calls // 2, args.calls}
        for i in range(1, args.calls + 1):
            remote.sample_actions(observation, task, seed=i)
            if i in marks:
                rows.append({"measurement": f"memory after {i:,} calls", "MiB": server.memory()})
    return rows


def _install(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the sizes of a robot's installations, each in an environment of its own."""
    uv = [str(Path(sys.executable).with_name("uv"))]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        targets = {
            "client (client/)": str(ROOT / "client"),
            "robot's package (octolike)": str(ROOT),
            "server with compressed images (octolike[serve])": f"octolike[serve] @ {ROOT.as_uri()}",
        }
        for i, (name, target) in enumerate(targets.items()):
            place = Path(folder) / str(i)
            subprocess.run([*uv, "venv", "--quiet", place, "--python", sys.executable], check=True)
            install = [*uv, "pip", "install", "--quiet", "--python", place / "bin" / "python"]
            subprocess.run([*install, target], check=True)
            files = [p for p in place.rglob("*") if p.is_file() and not p.is_symlink()]
            size = sum(p.stat().st_size for p in files if "__pycache__" not in p.parts)
            rows.append({"measurement": f"installation: {name}", "MiB": size / 2**20})
    return rows


def _percentiles(seconds: list[float]) -> dict[str, float]:
    values = np.percentile(1e3 * np.array(seconds), [5, 50, 95, 99])
    names = ("p5 ms", "p50 ms", "p95 ms", "p99 ms")
    return dict(zip(names, map(float, values), strict=True))


class _Server:
    """A server in a process of its own."""

    def __init__(self, width: int, layers: int, sizes: tuple[int, ...]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, width, layers, sizes))

    def __enter__(self) -> _Server:
        self._process.start()
        self.port = self._pipe.recv()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.join()

    def connect(self) -> Any:
        """Return a new client."""
        from octolike.policy.client import RemotePolicy

        return RemotePolicy(f"ws://127.0.0.1:{self.port}", timeout=120)

    def memory(self) -> float:
        """Return the resident memory of the process in MiB."""
        status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="utf-8")
        line = next(x for x in status.splitlines() if x.startswith("VmRSS"))
        return int(line.split()[1]) / 1024


def _serve(pipe: Any, width: int, layers: int, sizes: tuple[int, ...]) -> None:
    import asyncio

    from octolike.policy.serving.options import ServeOptions
    from octolike.policy.serving.server import PolicyServer

    options = ServeOptions(port=0, batch_sizes=sizes)
    server = PolicyServer(
        _policy(width, layers, sizes),
        options,
        log=lambda line: pipe.send(server.port) if line.startswith("ready") else None,
    )
    asyncio.run(server.run())


def _observation(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    return {"image_primary": image, "proprio": np.ones(len(NAMES), np.float32)}


def _policy(width: int, layers: int, sizes: tuple[int, ...]) -> Any:
    """Return a policy with random parameters: one camera, proprio, language, a diffusion head."""
    import jax

    from octolike import types
    from octolike.config import Component, Config
    from octolike.embodiment import Embodiment, Layout, Statistics
    from octolike.model.network import build_network
    from octolike.policy import Policy
    from octolike.train.checkpoint import Run
    from octolike.train.state import init_params

    n, names = len(NAMES), types.Names(("data",), ("arm",))
    config = Config(workdir="benchmark")
    config.data.cameras, config.data.window, config.data.horizon = {"primary": SIDE}, 1, HORIZON
    config.data.text = Component(kind="hash", length=16, vocabulary=256)
    model = config.model
    model.width, model.layers = width, layers
    model.attention_heads, model.mlp_width = max(width // 64, 1), 4 * width
    model.tokenizers = {
        "primary": Component(
            kind="image", cameras=("primary",), encoder={"kind": "patch", "patch": 16}
        ),
        "proprio": Component(kind="proprio"),
        "language": Component(kind="language", vocabulary=256, width=64),
    }
    model.heads = {"action": Component(kind="diffusion", sampler="ddim", inference_steps=10)}
    spec: types.BatchSpec = {
        "observation.image_primary": ((1, SIDE, SIDE, 3), "uint8"),
        "observation.proprio": ((1, n), "float32"),
        "observation.timestep_mask": ((1,), "bool"),
        "observation.present.image_primary": ((1,), "bool"),
        "observation.present.proprio": ((1,), "bool"),
        "task.language.ids": ((16,), "int32"),
        "task.language.mask": ((16,), "bool"),
        "task.present.language": ((), "bool"),
        "task.task_id": ((), "int32"),
        "task.present.task_id": ((), "bool"),
        "action": ((1, HORIZON, n), "float32"),
        "action_mask": ((1, HORIZON, n), "bool"),
        "dataset": ((), "int32"),
        "embodiment": ((), "int32"),
    }
    network = build_network(dataclasses.asdict(model), spec, names)
    shapes = jax.eval_shape(lambda: init_params(network, spec, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: (0.02 * rng.normal(size=x.shape)).astype(np.float32), shapes)
    ones = np.ones(n, np.float32)
    statistics = Statistics(
        mean=0 * ones, std=ones, min=-ones, max=ones, p01=-ones, p99=ones, steps=9, episodes=3
    )
    layout = Layout(
        names=NAMES, units=("",) * n, absolute=(True,) * n, normalized=(True,) * 6 + (False,)
    )
    record = Embodiment(
        name="arm",
        robot="simulated",
        control_hz=10.0,
        gripper="1 = open",
        action=layout,
        proprio=layout,
        action_statistics=statistics,
        proprio_statistics=statistics,
    )
    return Policy(Run(config, [record], spec, names, params, 0), batch_size=sizes)
