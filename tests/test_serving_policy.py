"""A server of a real policy: the same actions as in the process, reload, SIGTERM under load."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from policy_fakes import SIDE, A, H, P, W, run_of, save_params, save_run
from serving_fakes import serving, until
from websockets.sync.client import connect

from octolike.policy import Policy, wire
from octolike.policy.client import RemotePolicy, ServerBusyError
from octolike.policy.execution import ActionPrefix
from octolike.policy.serving.reload import CheckpointWatcher

ROOT = Path(__file__).parents[1]


def observation(seed=0, frames=None):
    rng = np.random.default_rng(seed)
    lead = () if frames is None else (frames,)
    return {
        "image_primary": rng.integers(0, 256, (*lead, SIDE, SIDE, 3), dtype=np.uint8),
        "proprio": rng.normal(1.5, 0.2, (*lead, P)).astype(np.float32),
    }


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "run"
    save_run(directory, run_of())
    return directory


@pytest.fixture(scope="module")
def policy(run_dir):
    return Policy.load(run_dir, batch_size=(1, 4))


@pytest.fixture(scope="module")
def server(policy):
    with serving(policy, batch_sizes=(1, 4), history="server") as server:
        yield server


@pytest.fixture
def remote(server):
    with RemotePolicy(f"ws://127.0.0.1:{server.port}") as remote:
        yield remote


def test_remote_actions_are_the_local_ones_bit_for_bit(policy, remote):
    for arguments in ({"instruction": "lift the cube"}, {"instruction": "push it"}):
        here, there = policy.create_task(**arguments), remote.create_task(**arguments)
        for frames in (None, 1, W):
            inputs = observation(frames=frames)
            local = policy.sample_actions(inputs, here, seed=3)
            np.testing.assert_array_equal(remote.sample_actions(inputs, there, seed=3), local)
            prefix = ActionPrefix(local[1:], 1)
            local = policy.sample_actions(inputs, here, seed=4, prefix=prefix)
            far = remote.sample_actions(inputs, there, seed=4, prefix=prefix)
            np.testing.assert_array_equal(far, local)
        absent = {**observation(), "proprio": None}
        np.testing.assert_array_equal(
            remote.sample_actions(absent, there), policy.sample_actions(absent, here)
        )


def test_a_remote_policy_describes_itself_as_the_local_one(policy, remote):
    for name in (
        "window",
        "horizon",
        "observation_keys",
        "image_shapes",
        "conditioning",
        "gripper",
        "real_time",
        "step",
    ):
        assert getattr(remote, name) == getattr(policy, name), name
    for name in ("name", "robot", "control_hz", "gripper"):
        assert getattr(remote.embodiment, name) == getattr(policy.embodiment, name)
    for name in ("names", "units", "absolute"):
        assert getattr(remote.embodiment.action, name) == getattr(policy.embodiment.action, name)


def test_errors_are_those_of_the_policy(policy, remote):
    task, here = remote.create_task(instruction="lift"), policy.create_task(instruction="lift")
    for bad in (
        {"image_primary": np.zeros((SIDE, SIDE, 3))},
        {"image_wrist": np.zeros((SIDE, SIDE, 3), np.uint8)},
        {"proprio": np.full(P, np.nan, np.float32)},
        {"proprio": np.zeros((W + 1, P), np.float32)},
    ):
        with pytest.raises(ValueError, match=r".") as local:
            policy.sample_actions({**observation(), **bad}, here)
        with pytest.raises(ValueError, match=r".") as far:
            remote.sample_actions({**observation(), **bad}, task)
        assert str(far.value) == str(local.value)
    with pytest.raises(ValueError, match="trained without goals"):
        remote.create_task(goal_images={"primary": np.zeros((SIDE, SIDE, 3), np.uint8)})


def test_the_servers_history_is_that_of_training(policy, server):
    """Frames of consecutive requests, as windows that the policy gets at once."""
    frames = observation(frames=3)
    task = policy.create_task(instruction="lift")
    with connect(f"ws://127.0.0.1:{server.port}") as socket:
        socket.recv()
        for t in range(3):
            request = {k: v[t] for k, v in frames.items()}
            socket.send(wire.pack({**request, "prompt": "lift", "seed": t}))
            far = wire.unpack(socket.recv(timeout=60))["actions"]
            past = {k: v[max(0, t + 1 - W) : t + 1] for k, v in frames.items()}
            np.testing.assert_array_equal(far, policy.sample_actions(past, task, seed=t))


def test_batched_robots_get_their_own_actions(policy, server):
    tasks = [policy.create_task(instruction=f"lift {i}") for i in range(6)]
    expected = policy.sample_batch([observation(i) for i in range(6)], tasks, range(6))
    results = {}

    def robot(i):
        with RemotePolicy(f"ws://127.0.0.1:{server.port}", timeout=60) as remote:
            task = remote.create_task(instruction=f"lift {i}")
            prefix = ActionPrefix(np.zeros((1, A), np.float32), 0) if i % 2 else None
            results[i] = [remote.sample_actions(observation(i), task, seed=i) for _ in range(5)]
            remote.sample_actions(observation(i), task, seed=i, prefix=prefix)

    threads = [threading.Thread(target=robot, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for i in range(6):
        for actions in results[i]:
            np.testing.assert_allclose(actions, expected[i], atol=1e-4)


def test_a_newer_checkpoint_is_loaded_and_one_that_vanishes_is_not(tmp_path):
    directory = tmp_path / "run"
    run = save_run(directory, run_of())
    policy = Policy.load(directory)
    watcher = CheckpointWatcher(directory)
    assert watcher.newer(policy) is None
    newer = dataclasses.replace(run, params=jax.tree.map(lambda x: 0.5 * x, run.params), step=9)
    save_params(directory, newer)
    loaded = watcher.newer(policy)
    assert loaded.step == 9
    assert loaded._parts is policy._parts  # nothing is compiled again
    task = policy.create_task(instruction="lift")
    actions = loaded.sample_actions(observation(), task)
    np.testing.assert_array_equal(
        actions, Policy.load(directory).sample_actions(observation(), task)
    )
    assert np.abs(actions - policy.sample_actions(observation(), task)).max() > 1e-4
    for file in sorted((directory / "checkpoints" / "9").rglob("*")):  # cut short
        if file.is_file() and file.stat().st_size > 200:
            file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="checkpoint 9"):
        watcher.newer(policy)
    assert watcher.newer(policy) is None  # it is not tried again
    lost = jax.tree.map(lambda x: x * np.nan, run.params)
    save_params(directory, dataclasses.replace(run, params=lost, step=11))
    with pytest.raises(ValueError, match="checkpoint 11 has parameters that are not finite"):
        watcher.newer(policy)
    shutil.rmtree(directory)
    assert CheckpointWatcher(directory).newer(policy) is None


def test_a_run_that_vanishes_keeps_being_served(tmp_path):
    directory = tmp_path / "run"
    save_run(directory, run_of())
    policy, watcher = Policy.load(directory), CheckpointWatcher(directory)
    with serving(policy, watcher, batch_sizes=(1,), reload_seconds=0.05) as server:
        remote = RemotePolicy(f"ws://127.0.0.1:{server.port}")
        task = remote.create_task(instruction="lift")
        shutil.rmtree(directory)
        assert remote.sample_actions(observation(), task).shape == (H, A)
        remote.close()


def test_sigterm_under_load_answers_or_refuses_every_request(run_dir):
    command = [sys.executable, ROOT / "scripts" / "serve.py", run_dir, "--port", "0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*command, "--batch_sizes", "1,4"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("ready"):
            break
    assert lines[-1].startswith("ready"), (lines, process.stderr.read())
    port = int(lines[-1].rpartition(":")[2])
    answered, refused, errors = [0] * 6, [0] * 6, []

    def robot(i):
        try:
            with RemotePolicy(f"ws://127.0.0.1:{port}", timeout=30, connect_timeout=5) as remote:
                task = remote.create_task(instruction="lift")
                for n in range(10_000):
                    remote.sample_actions(observation(), task, seed=n)
                    answered[i] += 1
        except (ServerBusyError, ConnectionError):
            refused[i] += 1
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=robot, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    until(lambda: min(answered) > 2, 60)
    process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(60)
    assert process.wait(60) == 0
    output = process.stdout.read()
    assert f"stopped after {sum(answered) + 6} answers" in output  # and six checks of a task
    assert refused == [1] * 6
    assert errors == []
    assert process.stderr.read() == ""
