"""Batches from workers equal those of the local pipeline, also after failures."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from data_fakes import config, opened, write_numbered
from train_fakes import compiled_once

from octolike import types
from octolike.config import Component, ConfigError, load_module, to_json
from octolike.data import open_data
from octolike.data.rlds.synthetic import write_fake_dataset
from octolike.data.service import protocol, service_source, worker, worker_pool
from octolike.errors import DataError, ServiceError
from octolike.train import loop, metrics

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "mix": "fake=1,bridge_dataset=1",
    "cameras": {"primary": 8, "wrist": 4},
    "goal": "uniform",
    "keep_language": 0.5,
    "pool": 4,
    "batch_size": 8,
}
OPENED = {}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two datasets of numbered episodes."""
    path = tmp_path_factory.mktemp("data")
    write_numbered(path, "fake", [3, 1, 4, 1, 5, 2, 6, 5, 3, 5])
    write_numbered(path, "bridge_dataset", [4, 6, 8])
    return path


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    """Shorten all waiting times."""
    monkeypatch.setattr(worker_pool, "CONNECT", 2.0)
    monkeypatch.setattr(worker_pool, "RETRY", 0.1)
    monkeypatch.setattr(worker_pool, "PATIENCE", 0.5)
    monkeypatch.setattr(worker, "GRACE", 0.2)


@contextmanager
def served(root, count=1, **data):
    """Yield servers and a source that is connected to them."""
    servers = [started(root, number=i % 2, **data) for i in range(count)]
    client = service_source.ServiceSource(client_config(root, servers, **data))
    try:
        yield servers, client
    finally:
        client.close()
        for server in servers:
            server.stop()


def started(root, port=0, seed=0, number=0, **data):
    """Return a server. The data of each number are opened once, to save time."""
    config_ = config(root, **{**SETTINGS, **data})
    config_.seed = seed
    return worker.BatchServer(config_, open_once(root, number, config_), "127.0.0.1", port)


def open_once(root, number, config_):
    key = root, number, to_json(config_)
    if key not in OPENED:
        OPENED[key] = open_data(config_)
    return OPENED[key]


def local_data(root, **data):
    """Return the local data, opened once."""
    config_ = config(root, **{**SETTINGS, **data})
    return open_once(root, -1, config_)


def client_config(root, servers, **data):
    addresses = tuple(f"127.0.0.1:{server.port}" for server in servers)
    return config(root, **{**SETTINGS, **data}, service=addresses)


def assert_equal(a, b):
    for (path, x), (expected_path, y) in zip(types.flatten(a), types.flatten(b), strict=True):
        assert path == expected_path
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y, err_msg=path)


def take(stream, count):
    """Return `count` batches and the state after each, as in a checkpoint."""
    return [(next(stream), json.loads(json.dumps(stream.state()))) for _ in range(count)]


def assert_same(taken, expected):
    for (a, state_a), (b, state_b) in zip(taken, expected, strict=True):
        assert_equal(a, b)
        assert state_a == state_b


def test_a_reply_of_any_size_is_decoded_completely():
    arrays = {
        "large": np.random.default_rng(0).integers(0, 256, 3 * protocol.CHUNK + 5, np.uint8),
        "flags": np.array([[True], [False]]),
        "none": np.zeros((0, 3), np.float32),
        "transposed": np.arange(6, dtype=np.int32).reshape(2, 3).T,
    }
    messages = list(protocol.encode({"name": "ä"}, arrays))
    assert max(map(len, messages)) <= protocol.CHUNK
    decoded = {}

    def allocate(path, dtype, shape):
        return decoded.setdefault(path, np.empty(shape, dtype))

    assert protocol.decode(messages, allocate) == {"name": "ä"}
    assert_equal(decoded, arrays)
    # for any division of the bytes into messages
    data = b"".join(messages)
    cut = [data[:3], data[3:11], data[11:700], b"", data[700:]]
    decoded.clear()
    protocol.decode(cut, allocate)
    assert_equal(decoded, arrays)
    with pytest.raises(EOFError, match="1 bytes too early"):
        protocol.decode([*cut[:-1], cut[-1][:-1]], allocate)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_batches_equal_those_of_the_local_pipeline(root, count):
    local = local_data(root)
    with served(root, count) as (servers, client):
        assert client.spec == local.spec
        assert client.names == local.names
        assert client.describe().startswith(local.describe())
        assert (client.datasets, client.tasks) == (local.datasets, local.tasks)
        np.testing.assert_array_equal(client.shares, local.shares)
        for a, b in zip(client.embodiments, local.embodiments, strict=True):
            np.testing.assert_array_equal(a.action_statistics.std, b.action_statistics.std)
        stream = client.train()
        assert_same(take(stream, 15), take(local.train(), 15))
        assert stream.memory() == 2 * local._batch_bytes()
        stream.close()
        with pytest.raises(StopIteration):
            next(stream)
        assert all(not server._worker._streams for server in servers)  # all are closed


def test_the_parts_of_processes_and_workers_form_the_batch(root):
    expected = take(local_data(root).train(), 6)
    with served(root, 2) as (_, client):
        shares = [take(client.train(None, (p, 2)), 6) for p in range(2)]
    for (a, first), (b, second), (batch, after) in zip(*shares, expected, strict=True):
        pairs = zip(types.flatten(a), types.flatten(b))
        joined = {k: np.concatenate([x, y]) for (k, x), (_, y) in pairs}
        assert_equal(types.unflatten(joined), batch)
        assert first == second == after


def test_service_and_local_data_resume_each_others_states(root):
    local = local_data(root)
    expected = take(local.train(), 13)
    with served(root, 2) as (_, client):
        for at in (8, 0, 5):
            resumed = client.train(expected[at][1])
            assert_same(take(resumed, 3), expected[at + 1 : at + 4])
            assert_same(take(local.train(resumed.state()), 1), expected[at + 4 : at + 5])
            resumed.close()


def test_a_batch_may_be_larger_than_a_message(root):
    settings = {"cameras": {"primary": 256}, "batch_size": 32, "goal": "none"}
    with served(root, 1, **settings) as (_, client):
        batch = next(client.train())
    assert sum(x.nbytes for _, x in types.flatten(batch)) > 6e6  # the limit of gRPC is 4 MiB
    assert_equal(batch, next(local_data(root, **settings).train()))


def test_a_lost_worker_is_replaced_without_a_lost_batch_and_used_again_when_it_is_back(root, capfd):
    expected = take(local_data(root).train(), 30)
    with served(root, 2) as (servers, client):
        stream = client.train()
        assert_same(take(stream, 4), expected[:4])
        servers[1].stop()
        assert_same(take(stream, 6), expected[4:10])
        port = servers[1].port
        output = capfd.readouterr().out
        assert output.count("is lost") == 1
        assert re.search(rf":{port} is lost \(\w+: .*\); its part comes from 127.0.0.1:", output)
        servers[1] = started(root, port)
        wait_for(lambda: f"127.0.0.1:{port} is back" in capfd.readouterr().out)
        assert_same(take(stream, 10), expected[10:20])
        assert len(servers[1]._worker._streams) == 1
        # then the other worker
        servers[0].stop()
        assert_same(take(stream, 10), expected[20:])
        stream.close()


def wait_for(condition, seconds=20.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "timeout"
        time.sleep(0.05)


def test_a_worker_that_returns_with_other_settings_is_not_used(root, capfd):
    expected = take(local_data(root).train(), 12)
    with served(root, 2) as (servers, client):
        stream = client.train()
        assert_same(take(stream, 3), expected[:3])
        servers[1].stop()
        servers[1] = started(root, servers[1].port, seed=1)
        assert_same(take(stream, 9), expected[3:])
        wait_for(lambda: "other settings or data" in capfd.readouterr().out)
        assert not servers[1]._worker._streams


def test_a_request_for_an_earlier_worker_is_rejected(root):
    with served(root, 1) as (_, client):
        client._workers.about["digest"] = "earlier"
        with pytest.raises(ServiceError, match="restarted with other settings or data"):
            client.train()


def test_the_only_worker_is_retried_often_even_after_many_losses(root, monkeypatch):
    monkeypatch.setattr(worker_pool, "RETRY", 0.5)
    monkeypatch.setattr(worker_pool, "PATIENCE", 5.0)
    expected = take(local_data(root).train(), 8)
    with served(root, 1) as (servers, client):
        stream = client.train()
        assert_same(take(stream, 4), expected[:4])
        (connection,) = client._workers._connections
        for part in (part for ahead in stream._ahead for part in ahead.parts):
            part.result()  # a later reply would reset the count
        connection.failures = 11
        servers[0].stop()
        threading.Timer(1.0, lambda: servers.append(started(root, servers[0].port))).start()
        assert_same(take(stream, 4), expected[4:])
        assert connection.failures == 0
        stream.close()


def test_a_worker_that_hangs_is_replaced_and_not_retried_at_once(root, capfd, monkeypatch):
    monkeypatch.setattr(worker_pool, "DEADLINE", 3.0)
    expected, wake = take(local_data(root).train(), 4), threading.Event()
    with served(root, 2) as (servers, client):
        stream = client.train()
        monkeypatch.setattr(servers[1]._worker, "_next", lambda *_: wake.wait(60) and {})
        try:
            assert_same(take(stream, 4), expected)
            time.sleep(10 * worker_pool.RETRY)
            output = capfd.readouterr().out
            assert "is lost (no reply to 'batch' within 3 s); its part comes from" in output
            assert "is back" not in output
        finally:
            wake.set()
        stream.close()


def test_without_workers_training_stops_and_can_resume(root):
    expected = take(local_data(root).train(), 8)
    with served(root, 2) as (servers, client):
        stream = client.train()
        before = take(stream, 4)
        for server in servers:
            server.stop()
        with pytest.raises(ServiceError, match=r"no worker .* is left: 127.*:\d+ \(.*; 127.*") as e:
            take(stream, 4)
        assert all(f":{server.port} (" in str(e.value) for server in servers)
        assert "Restart one of them (octolike serve_data" in str(e.value)
        with pytest.raises(ServiceError):
            next(stream)
        stream.close()
    with served(root, 1) as (_, client):
        state = stream.state()
        done = state["batches"]
        assert 4 <= done < 8
        assert_same(before, expected[:4])
        assert_same(take(client.train(state), 8 - done), expected[done:])


def test_feedback_has_the_same_effect_as_locally(root):
    sampling = {"sampling": Component(kind="difficulty"), "prefetch": 3}
    local = local_data(root, **sampling).train()
    with served(root, 2, **sampling) as (_, client):
        stream = client.train()
        for errors in ({"fake": 0.9, "bridge_dataset": 0.1}, {"fake": 0.2}, {}):
            position = stream.state()
            assert_same(take(stream, 4), take(local, 4))
            for batches in (stream, local):
                batches.feedback(errors, {})
            assert stream.state_at(position) == json.loads(json.dumps(local.state_at(position)))
        assert_same(take(stream, 4), take(local, 4))
        saved = stream.state()
        resumed = client.train(saved)
        assert_same(take(resumed, 3), take(local, 3))
        with pytest.raises(ConfigError, match=r"feedback for 'fake' is nan.*worker at 127"):
            resumed.feedback({"fake": np.float32(np.nan)}, {})


def test_validation_equals_the_local_one_even_if_a_worker_is_lost(root, capfd):
    local = local_data(root).validation()
    with served(root, 2) as (servers, client):
        loaders = client.validation()
        assert list(loaders) == list(local)
        for name, loader in loaders.items():
            expected = list(local[name]())
            for batches in (list(loader()), list(loader())):
                for a, b in zip(batches, expected, strict=True):
                    assert_equal(a, b)
            # concurrent and unfinished iterations are independent
            next(loader())
            for a, b in zip(loader(), loader(), strict=True):
                assert_equal(a, b)
        running = loaders["bridge_dataset"]()
        batches = [next(running)]
        servers[1].stop()
        batches += running
        for a, b in zip(batches, local["bridge_dataset"](), strict=True):
            assert_equal(a, b)
        assert "is lost" in capfd.readouterr().out
        assert not servers[0]._worker._streams
    with served(root, 1, validation_split="") as (_, client):
        assert client.validation() == {}


def test_different_settings_are_listed_with_both_values(root):
    server = started(root)
    try:
        config_ = client_config(root, [server], batch_size=4, sampling=Component(kind="uniform"))
        config_.seed, config_.train.validation_batches = 7, 3
        with pytest.raises(ConfigError, match=r"the settings differ \(here -> 127.0.0.1:") as e:
            service_source.ServiceSource(config_)
        rows = [line.strip() for line in str(e.value).splitlines()[1:-1]]
        assert rows == [
            "data.batch_size: 4 -> 8",
            'data.sampling: {"kind": "uniform"} -> {"kind": "mix"}',
            "seed: 7 -> 0",
            "train.validation_batches: 3 -> 2",
        ]
        # the location of the data and the reading speed may differ
        config_ = client_config(root, [server], cache="", threads=1)
        config_.data.root = "elsewhere"
        service_source.ServiceSource(config_).close()
    finally:
        server.stop()


def test_a_different_version_is_named(root, monkeypatch):
    with served(root, 1) as (servers, _):
        monkeypatch.setattr("octolike.__version__", "9.9")
        with pytest.raises(ConfigError, match=r"octolike: \"9.9\" -> \"0.1.0\""):
            service_source.ServiceSource(client_config(root, servers))


def test_workers_with_different_data_are_rejected(root, tmp_path):
    write_numbered(tmp_path, "fake", [3, 1, 4, 1, 5, 2, 6, 5, 4, 5])
    write_numbered(tmp_path, "bridge_dataset", [4, 6, 8])
    servers = [started(root), started(tmp_path)]
    try:
        with pytest.raises(DataError, match=r"the data differ \(127.* -> 127.*\)") as e:
            service_source.ServiceSource(client_config(root, servers))
        assert re.search(
            r'fake/train: "10 episodes, 35 steps, \w+" -> "10 episodes, 36', str(e.value)
        )
        assert "bridge_dataset/train" not in str(e.value)
    finally:
        for server in servers:
            server.stop()


def test_an_address_without_a_worker_is_named(root):
    server = started(root)
    server.stop()
    begin = time.monotonic()
    with pytest.raises(ServiceError) as e:
        service_source.ServiceSource(client_config(root, [server]))
    assert time.monotonic() - begin < 10
    assert re.search(rf"no worker replies at 127.0.0.1:{server.port} \(UNAVAILABLE: ", str(e.value))
    assert f"serve_data --config ... --config.data.root=DIR --port {server.port};" in str(e.value)


@pytest.mark.parametrize("addresses", [("host",), ("host:",), ("a:1", "a:1"), ("a:1,b:2x",)])
def test_an_invalid_address_is_rejected(root, addresses):
    with pytest.raises(
        ConfigError, match=r"data.service contains '.*'; expected different 'host:po"
    ):
        config(root, service=addresses)


def test_a_batch_size_that_cannot_be_divided_is_rejected_with_suggestions(root):
    config_ = config(root, **SETTINGS, service=("a:1", "b:2", "c:3"))
    expected = (
        r"data.batch_size 8 cannot be divided into 6 equal parts: 2 processes × 3 addresses in "
        r"data.service. Set it to 6 or 12, or list 1 or 2 of the addresses"
    )
    with pytest.raises(ConfigError, match=expected):
        service_source.ServiceSource(config_, processes=2)


def test_a_port_in_use_is_reported(root):
    with served(root, 1) as (servers, _), pytest.raises(ConfigError, match="choose a free --port"):
        started(root, servers[0].port)


def test_bad_data_of_a_worker_stop_the_training_and_are_named(tmp_path):
    write_numbered(tmp_path, "fake", [3, 4, 5])
    settings = {"mix": "fake", "cameras": {"primary": 8}}
    image = local_data(tmp_path, **settings)._sources[0].load(1).images["primary"][0]
    with served(tmp_path, 2, **settings) as (_, client):
        file = tmp_path / "fake" / "1.0.0" / "fake-train.tfrecord-00000-of-00001"
        file.write_bytes(file.read_bytes().replace(image[:30], bytes(30)))
        stream = client.train()
        with pytest.raises(
            DataError, match=r"fake: .* cannot be decoded.*\(reported by the worker at 1"
        ):
            take(stream, 20)
        with pytest.raises(DataError, match="cannot be decoded"):
            next(stream)
        stream.close()


def test_a_worker_whose_machine_fails_is_replaced_unless_all_fail(root, capfd, monkeypatch):
    expected = take(local_data(root).train(), 4)
    with served(root, 2) as (servers, client):
        stream = client.train()
        workers = [server._worker for server in servers]

        def full(*_):
            raise OSError("the disk is gone")

        monkeypatch.setattr(workers[1], "_next", full)
        assert_same(take(stream, 4), expected)
        assert "is lost (OSError: the disk is gone); its part comes" in capfd.readouterr().out
        monkeypatch.setattr(worker_pool, "PATIENCE", 1e6)  # waiting cannot help
        monkeypatch.setattr(workers[0], "_next", full)
        with pytest.raises(ServiceError, match=r"the disk is gone.*the disk is gone"):
            take(stream, 4)


def test_a_state_of_another_mix_is_rejected_at_once(root):
    state = opened(root, "fake").train().state()
    expected = r"has the datasets \['fake'\], this mix has .*reported by the worker"
    with served(root, 1) as (_, client), pytest.raises(DataError, match=expected):
        client.train(state)


def test_streams_without_requests_are_closed(root):
    with served(root, 1) as (servers, client):
        stream = client.train()
        next(stream)
        worker = servers[0]._worker
        worker.expire(60)
        assert len(worker._streams) == 1
        wait_for(lambda: worker.expire(0.2) or not worker._streams)
        next(stream)  # which opens it again
        assert re.fullmatch(r"1 client, \d+\.\d batches/s, \d+\.\d MiB/s", servers[0].progress())


CONFIG = """
from octolike.config import Component, Config

def get_config(arg=""):
    config = Config(workdir="unused")
    data, model, train = config.data, config.model, config.train
    data.mix, data.batch_size, data.pool = "fake", 4, 6
    data.cameras, data.goal, data.threads = {"primary": 16}, "none", 1
    data.sampling = Component(kind="difficulty", over="task")
    data.text = Component(kind="hash", length=8, vocabulary=32)
    model.width, model.layers, model.attention_heads, model.mlp_width = 16, 1, 2, 16
    model.tokenizers = {
        "language": Component(kind="language", vocabulary=32, width=8),
        "proprio": Component(kind="proprio"),
    }
    model.heads = {"action": Component(kind="l1")}
    config.optim.warmup = 1
    train.steps, train.log_every, train.validation_batches = 6, 1, 1
    train.validate_every = train.checkpoint_every = 2
    return config
"""
WITHOUT = """
import runpy, sys
sys.modules["tensorflow"] = sys.modules["tensorflow_datasets"] = None
sys.argv, sys.path[0] = sys.argv[1:], "scripts"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_training_from_a_worker_without_tensorflow_equals_local_training(tmp_path):
    write_fake_dataset(tmp_path / "data", side=16)
    (tmp_path / "config.py").write_text(CONFIG)
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    env |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"), "JAX_PLATFORMS": "cpu"}
    pipe = {"cwd": ROOT, "env": env, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    config_flag = f"--config={tmp_path / 'config.py'}"
    command = [sys.executable, "scripts/serve_data.py", config_flag, "--port=0", "--every=1"]
    command += [f"--config.data.root={tmp_path / 'data'}", f"--config.data.cache={tmp_path}"]
    with subprocess.Popen(command, text=True, **pipe) as worker:
        try:
            output = ""
            while worker.poll() is None and "serving on" not in output:
                output += worker.stdout.readline()
            assert "fake/train" in output, output
            port = output.strip().rpartition(":")[2]
            options = [f"--config.data.service=127.0.0.1:{port}", "--config.data.root=nowhere"]
            options += [f"--config.workdir={tmp_path / 'served'}"]
            command = [sys.executable, "-c", WITHOUT, "scripts/train.py", config_flag, *options]
            done = subprocess.run(command, text=True, check=False, **pipe)
        finally:
            worker.send_signal(signal.SIGINT)
        remaining_output, _ = worker.communicate(timeout=60)
    assert done.returncode == 0, done.stdout
    assert f"batches come from 127.0.0.1:{port}" in done.stdout
    assert "fork" not in done.stdout  # no messages of gRPC
    assert worker.returncode == 0
    assert remaining_output.endswith("ended\n")
    assert re.search(
        r"^1 client, \d+\.\d batches/s, \d+\.\d MiB/s$", remaining_output, re.MULTILINE
    ), remaining_output

    local = load_module(str(tmp_path / "config.py")).get_config()
    local.workdir, local.data.root = str(tmp_path / "local"), str(tmp_path / "data")
    local.data.cache = str(tmp_path)
    data = open_data(local)
    with compiled_once(tmp_path / "compiled"):
        loop.train(local, data)
    curves = [curve(tmp_path / name) for name in ("served", "local")]
    assert len(curves[0]) == 9  # of 6 steps and 3 validations
    assert curves[0] == curves[1]


def curve(workdir):
    """Return the losses and metrics of a run, without timings."""
    prefixes = ("step", "loss", "grad_norm", "validation/", "task/", "dataset/")
    rows = metrics.read(workdir / metrics.FILE)
    return [{k: v for k, v in row.items() if k.startswith(prefixes)} for row in rows]
