"""PolicyServer and RemotePolicy: answers, batches, history, seeds, limits, reload, stopping."""

import contextlib
import functools
import json
import re
import socket as sockets
import ssl
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from serving_fakes import SIDE, A, H, NumpyPolicy, P, get, observation, self_signed, serving, until
from websockets.sync.client import connect
from websockets.sync.server import serve as websocket_server
from websockets.utils import accept_key

from octolike.errors import ConfigError
from octolike.policy import client, wire
from octolike.policy.client import RemotePolicy, RemoteTask, ServerBusyError, ServerError
from octolike.policy.execution import ExecutionSettings
from octolike.policy.executor import Executor
from octolike.policy.send_guard import SendGuard
from octolike.policy.serving.options import ServeOptions


def address(server):
    return f"ws://127.0.0.1:{server.port}"


def ask(socket, **request):
    """Return the reply to one observation of a plain client of openpi's protocol."""
    socket.send(wire.pack({**observation(), "prompt": "lift", **request}))
    reply = socket.recv(timeout=10)
    return reply if isinstance(reply, str) else wire.unpack(reply)


def test_a_remote_policy_has_the_interface_of_a_local_one():
    policy = NumpyPolicy()
    with serving(policy) as server, RemotePolicy(address(server)) as remote:
        assert policy.warm
        assert (remote.window, remote.horizon, remote.step) == (2, H, 7)
        assert remote.observation_keys == policy.observation_keys
        assert remote.image_shapes == policy.image_shapes
        assert remote.conditioning == policy.conditioning
        assert remote.embodiment.name == "arm"
        assert remote.embodiment.action.names == policy.embodiment.action.names
        task = remote.create_task(instruction="lift")
        actions = remote.sample_actions(observation(30), task, seed=5)
        assert actions.shape == (H, A)
        assert actions.dtype == np.float32
        np.testing.assert_allclose(actions[0, :5], [5, 30, 1, 0, 4])
        assert actions.flags.writeable
        both = remote.sample_actions(observation(30, frames=2), task)
        assert both[0, 2] == 2
        assert {"queue_ms", "preprocess_ms", "model_ms", "total_ms"} <= remote.timing.keys()
        batch = remote.sample_batch([observation(i) for i in range(3)], [task] * 3, range(3))
        np.testing.assert_allclose(batch[:, 0, 1], [0, 1, 2])
        prefix = (np.zeros((2, A), np.float32), 1)
        assert remote.sample_actions(observation(), task, prefix=prefix).shape == (H, A)


def test_bad_requests_raise_on_the_robot_and_keep_the_connection():
    with serving(NumpyPolicy()) as server, RemotePolicy(address(server)) as remote:
        with pytest.raises(ValueError, match="lacks an instruction"):
            remote.create_task()
        task = remote.create_task(instruction="lift")
        for bad, message in (
            ({"image_primary": np.zeros((SIDE, SIDE, 3))}, "image_primary is float64"),
            ({"proprio": np.full(P, np.nan, np.float32)}, "not finite"),
            ({"image_wrist": np.zeros((SIDE, SIDE, 3), np.uint8)}, "unknown key"),
        ):
            with pytest.raises(ValueError, match=message):
                remote.sample_actions({**observation(), **bad}, task)
        prefix = (np.zeros((H + 1, A), np.float32), 1)
        with pytest.raises(ValueError, match="the prefix has actions"):
            remote.sample_actions(observation(), task, prefix=prefix)
        assert remote.sample_actions(observation(), task).shape == (H, A)
        assert 'outcome="accepted"} 1' in get(server, "/metrics")[1]


def test_requests_of_several_robots_are_one_batch_on_one_thread():
    gate = threading.Event()
    policy = NumpyPolicy(wait=gate)
    with serving(policy) as server, ThreadPoolExecutor(7) as pool:
        remotes = [RemotePolicy(address(server)) for _ in range(7)]
        task = remotes[0].create_task(instruction="lift")

        def call(i):
            return remotes[i].sample_actions(observation(i), task, seed=i)

        first = pool.submit(call, 0)
        until(policy.started.is_set)
        further = [pool.submit(call, i) for i in range(1, 7)]
        until(lambda: server._batcher.waiting == 6)  # while the first is computed
        gate.set()
        for i, future in enumerate([first, *further]):
            np.testing.assert_allclose(future.result(10)[0, :2], [i, i])
        assert policy.batches == [1, 6]
        assert len(policy.threads) == 1
        for remote in remotes:
            remote.close()


def test_one_robots_failure_is_not_the_others():
    gate = threading.Event()
    policy = NumpyPolicy(wait=gate)
    policy.broken_seed = 3
    with serving(policy) as server, ThreadPoolExecutor(4) as pool:
        remotes = [RemotePolicy(address(server)) for _ in range(4)]
        task = remotes[0].create_task(instruction="lift")
        ask_for = [functools.partial(r.sample_actions, observation(), task) for r in remotes]
        calls = [pool.submit(ask_for[0], seed=0)]
        until(policy.started.is_set)
        calls += [pool.submit(ask_for[i], seed=i) for i in range(1, 4)]
        until(lambda: server._batcher.waiting == 3)
        gate.set()
        for call in calls[:3]:
            assert call.result(10).shape == (H, A)
        with pytest.raises(ServerError, match="not finite"):
            calls[3].result(10)
        assert policy.batches == [1, 3, 2]  # the good ones again, at once
        for remote in remotes:
            remote.close()


def test_a_full_queue_answers_busy():
    gate = threading.Event()
    policy = NumpyPolicy(wait=gate)
    with serving(policy, queue=2) as server, ThreadPoolExecutor(4) as pool:
        remotes = [RemotePolicy(address(server)) for _ in range(4)]
        task = remotes[0].create_task(instruction="lift")
        first = pool.submit(remotes[0].sample_actions, observation(), task)
        until(policy.started.is_set)
        waiting = [pool.submit(r.sample_actions, observation(), task) for r in remotes[1:3]]
        until(lambda: server._batcher.waiting == 2)
        with pytest.raises(ServerBusyError, match="2 requests are waiting"):
            remotes[3].sample_actions(observation(), task)
        gate.set()
        for call in (first, *waiting):
            call.result(10)
        for remote in remotes:
            remote.close()


def test_the_server_keeps_a_history_per_connection_until_it_is_reset():
    policy = NumpyPolicy()
    server_of = serving(policy, history="server")
    with server_of as server, connect(address(server)) as a, connect(address(server)) as b:
        assert wire.unpack(a.recv())["history"] == "server"
        b.recv()
        frames = [ask(a)["actions"][0, 2] for _ in range(3)]
        assert frames == [1, 2, 2]
        assert ask(b)["actions"][0, 2] == 1
        assert ask(a, reset=True)["actions"][0, 2] == 1
        newest = ask(a, image_primary=np.full((SIDE, SIDE, 3), 90, np.uint8))
        assert newest["actions"][0, 1] == 45  # the mean of 0 and 90
        assert "frames" not in ask(a, **observation(frames=2))  # an error: it is text
    with serving(policy) as server, connect(address(server)) as a:
        a.recv()
        assert [ask(a)["actions"][0, 2] for _ in range(2)] == [1, 1]
        assert [ask(a, history="server")["actions"][0, 2] for _ in range(2)] == [1, 2]


def test_seeds_differ_between_calls_and_connections_and_repeat_between_servers():
    def seeds():
        running = serving(NumpyPolicy())
        with running as server, connect(address(server)) as a, connect(address(server)) as b:
            a.recv()
            b.recv()
            return [ask(s)["actions"][0, 0] for s in (a, a, b)]

    first = seeds()
    assert len(set(first)) == 3
    assert first == seeds()


def test_an_image_may_be_larger_or_a_jpeg():
    with serving(NumpyPolicy()) as server:
        for jpeg, size in ((0, SIDE), (90, SIDE)):
            with RemotePolicy(address(server), jpeg=jpeg) as remote:
                task = remote.create_task(instruction="lift")
                image = np.full((size, size, 3), 90, np.uint8)
                actions = remote.sample_actions({**observation(), "image_primary": image}, task)
                assert abs(actions[0, 1] - 90) < 2
                history = np.stack([image, image])
                both = {"image_primary": history, "proprio": np.zeros((2, P), np.float32)}
                assert remote.sample_actions(both, task)[0, 2] == 2


def test_a_clients_keys_are_mapped_to_the_policys():
    keys = {"image_primary": "observation/image", "proprio": "observation/joints+observation/hand"}
    with serving(NumpyPolicy(), keys=keys) as server, connect(address(server)) as socket:
        socket.recv()
        image = np.full((SIDE, SIDE, 3), 30, np.uint8)
        request = {"observation/image": image, "observation/joints": np.ones(6), "prompt": "lift"}
        socket.send(wire.pack({**request, "observation/hand": np.float32(0.5), "else": 1}))
        assert wire.unpack(socket.recv())["actions"][0, 1] == 30
        socket.send(wire.pack(request))
        assert "invalid: " in socket.recv()
    with (
        pytest.raises(ConfigError, match="image_side"),
        serving(NumpyPolicy(), keys={"image_side": "x"}),
    ):
        pass


# Limits


def test_actions_beyond_a_limit_are_refused_or_clipped(tmp_path):
    file = tmp_path / "limits.json"
    file.write_text(json.dumps({"y": {"low": -1, "high": 50, "step": 0.002}}))
    with serving(NumpyPolicy(), limits=str(file)) as server:
        remote = RemotePolicy(address(server))
        task = remote.create_task(instruction="lift")
        with pytest.raises(ServerError, match=r"y from 30 to 30\.03 .*limits -1 to 50"):
            remote.sample_actions(observation(30), task)
        remote.close()
    clipping = serving(NumpyPolicy(), limits=str(file), on_limit="clip")
    with clipping as server, connect(address(server)) as socket:
        socket.recv()
        reply = ask(socket, **observation(60))
        np.testing.assert_allclose(reply["actions"][:, 1], 50)
        assert reply["clipped"] == {"y": H}
        reply = ask(socket, **observation(30))
        np.testing.assert_allclose(np.diff(reply["actions"][:, 1]), 0.002, atol=1e-5)
        assert 'limited_actions_total{dimension="y"} 7' in get(server, "/metrics")[1]


def test_limits_come_from_the_record(monkeypatch):
    from octolike.policy.serving.limits import action_limits

    record = NumpyPolicy().embodiment
    limits = action_limits(ServeOptions(limit_range=0.1), record)
    s = record.action_statistics
    np.testing.assert_allclose(limits.low, s.min - 0.1 * (s.max - s.min))
    with pytest.raises(ConfigError, match="are changes or grippers"):
        action_limits(ServeOptions(limit_step=0.2), record)
    for option in ("limit_range", "limit_step"):
        with pytest.raises(ConfigError, match=f"{option} is -0.5; expected 0 or more, or -1"):
            action_limits(ServeOptions(**{option: -0.5}), record)
    assert limits.apply(np.stack([s.min, s.max]))[1] == {}
    assert not action_limits(ServeOptions(), record).sentence()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"x": {"high": 1e39}}', "expected a finite number"),  # infinite as a float32
        (f'{{"x": {{"high": {"9" * 400}}}}}', "expected a finite number"),
        ("[]", "is a list"),
        ('{"elbow": {"low": 0}}', "unknown action dimension"),
        ('{"x": {"lowest": 0}}', "unknown field"),
        ('{"x": {"low": "a"}}', "expected a finite number"),
        ('{"x": {"low": 2, "high": 1}}', "low is above high"),
    ],
)
def test_a_bad_file_of_limits_is_one_line(tmp_path, text, message):
    file = tmp_path / "limits.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message), serving(NumpyPolicy(), limits=str(file)):
        pass


def test_actions_that_are_not_finite_never_leave():
    class Broken(NumpyPolicy):
        def unnormalize(self, actions, states=None):
            return np.full(actions.shape, np.nan, np.float32)

    with serving(Broken()) as server, RemotePolicy(address(server)) as remote:
        task = remote.create_task(instruction="lift")
        with pytest.raises(ServerError, match="not finite"):
            remote.sample_actions(observation(), task)


# Reload, health, stopping


class Checkpoints:
    """A watcher without files: `found` has the results of the next looks."""

    def __init__(self, *found):
        self.found = list(found)

    async def watch(self, seconds, current, replace, fail):
        for item in self.found:
            (fail if isinstance(item, Exception) else replace)(item)


def test_a_newer_checkpoint_replaces_the_policy_and_a_bad_one_does_not():
    watcher = Checkpoints(OSError("checkpoint 8 has vanished"), NumpyPolicy(step=9))
    with serving(NumpyPolicy(), watcher, reload_seconds=0.1) as server:
        with RemotePolicy(address(server)) as remote:
            task = remote.create_task(instruction="lift")
            remote.sample_actions(observation(), task)
            assert remote.step == 9
        assert "a newer checkpoint cannot be loaded, 7 stays: checkpoint 8 has vanished" in (
            server.lines
        )
        assert 'reloads_total{outcome="failed"} 1' in get(server, "/metrics")[1]


def test_clients_wait_while_the_policy_compiles():
    gate = threading.Event()

    class Compiling(NumpyPolicy):
        def warmup(self):
            gate.wait(10)
            super().warmup()

    import asyncio

    from octolike.policy.serving.server import PolicyServer

    server = PolicyServer(Compiling(), ServeOptions(port=0), None, lambda line: None)
    thread = threading.Thread(target=lambda: asyncio.run(server.run()))
    thread.start()
    with ThreadPoolExecutor(1) as pool:
        until(lambda: server.port)
        assert get(server, "/healthz") == (503, "warming up\n")
        call = pool.submit(RemotePolicy, address(server))
        until(lambda: server._sessions)
        assert not call.done()
        gate.set()
        call.result(10).close()
    assert get(server, "/healthz") == (200, "ok\n")
    assert get(server, "/health")[0] == 200
    assert get(server, "/else")[0] == 404
    server.stop()
    thread.join(10)
    assert not thread.is_alive()


def test_stopping_finishes_what_waits_and_refuses_what_comes():
    gate = threading.Event()
    policy = NumpyPolicy(wait=gate)
    with serving(policy) as server, ThreadPoolExecutor(3) as pool:
        remotes = [RemotePolicy(address(server)) for _ in range(3)]
        task = remotes[0].create_task(instruction="lift")
        calls = [pool.submit(remotes[0].sample_actions, observation(), task)]
        until(policy.started.is_set)
        calls.append(pool.submit(remotes[1].sample_actions, observation(), task))
        until(lambda: server._batcher.waiting == 1)
        server.stop()
        until(lambda: not server.is_healthy)
        with pytest.raises(ServerBusyError, match="stopping"):
            remotes[2].sample_actions(observation(), task)
        gate.set()
        for call in calls:
            assert call.result(10).shape == (H, A)
        server.thread.join(10)
        assert not server.thread.is_alive()
        assert server.lines[-1] == "stopped after 3 answers"  # one of them checked a task


def test_a_client_reconnects_to_a_server_that_was_started_again(monkeypatch, capsys):
    with serving(NumpyPolicy()) as server:
        port = server.port
        remote = RemotePolicy(address(server), connect_timeout=10)
        task = remote.create_task(instruction="lift")
    with serving(NumpyPolicy(step=8), port=port):
        assert remote.sample_actions(observation(), task).shape == (H, A)
        assert remote.step == 8
        remote.close()
    monkeypatch.setattr(client, "QUIET", 0.1)
    with pytest.raises(ConnectionError, match="no policy server at"):
        RemotePolicy(f"127.0.0.1:{port}", connect_timeout=0.5)
    said = capsys.readouterr().err
    assert said.count("no policy server answers at") == 1
    assert "waiting up to 0.5 s" in said


@pytest.mark.parametrize("seed", [1.5, -1, 2**32, 2**63, 2**70])
def test_a_seed_that_is_no_integer_of_32_bits_is_refused(seed):
    with serving(NumpyPolicy()) as server, RemotePolicy(address(server)) as remote:
        task = remote.create_task(instruction="lift")
        with pytest.raises(ValueError, match=r"expected an integer from 0|more than 64 bits"):
            remote.sample_actions(observation(), task, seed=seed)
    with pytest.raises(ConfigError, match=r"seed is .*; (it must lie in|expected int)"):
        ServeOptions(seed=seed).check()


def test_a_late_reply_is_never_taken_for_the_next_one():
    gate = threading.Event()
    policy = NumpyPolicy(wait=gate)
    with serving(policy) as server:
        remote = RemotePolicy(address(server), timeout=0.2)
        task = remote.create_task(instruction="lift")
        with pytest.raises(TimeoutError, match=r"within 0\.2 s"):
            remote.sample_actions(observation(), task, seed=1)
        gate.set()
        assert remote.sample_actions(observation(), task, seed=2)[0, 0] == 2
        remote.close()


def test_an_executor_runs_a_remote_policy_as_a_local_one():
    settings = ExecutionSettings(execute=2, real_time="guided")

    def executed(policy):
        task = policy.create_task(instruction="lift")
        with Executor(policy, task, settings, asynchronous=False) as executor:
            return np.stack([executor.step(observation(t)) for t in range(5)])

    with serving(NumpyPolicy()) as server, RemotePolicy(address(server)) as remote:
        actions = executed(remote)
    # seed, newest image and number of frames of each inference, and the index in its chunk
    np.testing.assert_allclose(actions[:, 2], [1.0, 1.01, 2.0, 2.01, 2.0])
    np.testing.assert_allclose(actions[::2, 1], [0, 1.5, 3.5])
    assert actions[0, 0] != actions[2, 0]


@contextlib.contextmanager
def bad_reader(context=None, pause=None):
    """Yield the address of a server that sends metadata and does not read what a client sends.

    context: of TLS. pause: seconds between its small reads, if it reads slowly.
    """
    metadata = {**NumpyPolicy().metadata, "server": "octolike"}
    listener, kept = sockets.create_server(("127.0.0.1", 0)), []

    def accept():
        connection, _ = listener.accept()
        connection = context.wrap_socket(connection, server_side=True) if context else connection
        kept.append(connection)
        request = b""
        while b"\r\n\r\n" not in request:
            request += connection.recv(4096)
        name = b"sec-websocket-key: "
        key = next(x[len(name) :] for x in request.split(b"\r\n") if x.lower().startswith(name))
        handshake = {"Upgrade": "websocket", "Connection": "Upgrade"}
        handshake["Sec-WebSocket-Accept"] = accept_key(key.decode())
        lines = "".join(f"{k}: {v}\r\n" for k, v in handshake.items())
        connection.sendall(f"HTTP/1.1 101 Switching Protocols\r\n{lines}\r\n".encode())
        message = wire.pack(metadata)
        connection.sendall(b"\x82\x7e" + struct.pack(">H", len(message)) + message)
        with contextlib.suppress(OSError):
            while pause and connection.recv(1000):
                time.sleep(pause)

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"{'wss' if context else 'ws'}://localhost:{listener.getsockname()[1]}"
    finally:
        for connection in kept:
            with contextlib.suppress(OSError):
                connection.shutdown(sockets.SHUT_RDWR)
        thread.join(5)
        for connection in (*kept, listener):
            connection.close()


@pytest.mark.parametrize("kind", ["deaf", "slow", "deaf, TLS"])
def test_a_server_that_does_not_read_ends_a_call_in_time(kind, tmp_path):
    context = certificate = None
    if "TLS" in kind:
        certificate, key = self_signed(tmp_path)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
    errors = []

    def call(address):
        remote = RemotePolicy(
            address, timeout=0.3, connect_timeout=5, certificate=str(certificate or "")
        )
        image = np.zeros((2000, 2000, 3), np.uint8)
        try:
            remote.sample_actions({"image_primary": image}, RemoteTask("x", {"prompt": "x"}))
        except Exception as error:
            errors.append(error)

    with bad_reader(context, 0.02 if kind == "slow" else None) as address:
        # in a thread, because without the guard it would wait until the server is closed
        thread = threading.Thread(target=call, args=[address], daemon=True)
        thread.start()
        thread.join(4)
        assert not thread.is_alive(), "the call does not end"
    (error,) = errors
    assert isinstance(error, TimeoutError)
    assert re.fullmatch(r"no reply of .* within 0\.3 s", str(error))


def test_one_thread_guards_all_messages():
    guard, (one, other) = SendGuard(), sockets.socketpair()
    for _ in range(20):
        with guard.limit(one, 5):
            one.send(b"x")
    with guard.limit(one, 5):
        time.sleep(0.05)  # so that its thread waits for this deadline
    assert [t.name for t in threading.enumerate()].count("SendGuard") <= 2  # and the clients'
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match="does not read"), guard.limit(one, 0.05):
        one.sendall(bytes(10_000_000))
    assert time.monotonic() - begin < 3  # not at the deadlines that the thread waited for
    with pytest.raises(ValueError, match="another error"), guard.limit(other, 5):
        raise ValueError("another error")
    one.close()
    other.close()


def test_another_websocket_server_is_one_line():
    def hello(socket):
        socket.send(wire.pack({"step": 3}))

    with websocket_server(hello, "127.0.0.1", 0) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        place = f"ws://127.0.0.1:{other.socket.getsockname()[1]}"
        with pytest.raises(RuntimeError, match="is no server of octolike"):
            RemotePolicy(place, connect_timeout=5)
        other.shutdown()
        thread.join(5)
