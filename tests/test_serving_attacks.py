"""Clients that are wrong, hostile, slow or gone: the server serves everybody else. On loopback."""

import contextlib
import os
import resource
import socket as sockets
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import msgpack
import numpy as np
import pytest
from serving_fakes import SIDE, A, H, NumpyPolicy, P, get, observation, self_signed, serving, until
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from octolike.errors import ConfigError
from octolike.policy import wire
from octolike.policy.client import RemotePolicy
from octolike.policy.serving.options import ServeOptions

KEY = "0123456789abcdef0123"


def address(server):
    return f"ws://127.0.0.1:{server.port}"


def request(**changes):
    return wire.pack({**observation(), "prompt": "lift", **changes})


def works(server, key=""):
    """Return whether a well-behaved robot is served now."""
    with RemotePolicy(address(server), key, timeout=5, connect_timeout=5) as remote:
        task = remote.create_task(instruction="lift")
        return remote.sample_actions(observation(), task).shape == (H, A)


@contextlib.contextmanager
def tcp(server):
    """Yield a plain TCP connection."""
    with sockets.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        yield connection


HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


# Keys and addresses


def test_a_wrong_key_or_none_is_refused(tmp_path):
    file = tmp_path / "key"
    file.write_text(KEY + "\n")
    file.chmod(0o600)
    with serving(NumpyPolicy(), key_file=str(file)) as server:
        for header in (None, "", f"Api-Key {KEY}x", f"Api-Key {KEY[:-1]}", "Basic !", "Api-Key é"):
            headers = {} if header is None else {"Authorization": header}
            with pytest.raises(InvalidStatus, match="401"):
                connect(address(server), additional_headers=headers).__enter__()
        with pytest.raises(PermissionError, match="refuses the key"):
            RemotePolicy(address(server), "wrong", connect_timeout=1)
        assert get(server, "/metrics")[0] == 401
        assert get(server, "/healthz")[0] == 200
        assert works(server, KEY)
        assert get(server, "/metrics", {"Authorization": f"Bearer {KEY}"})[0] == 200
        with connect(f"ws://any:{KEY}@127.0.0.1:{server.port}") as socket:  # as a harness can
            assert wire.unpack(socket.recv())["horizon"] == H


def test_another_address_than_loopback_needs_a_key(tmp_path, monkeypatch):
    monkeypatch.delenv("OCTOLIKE_KEY", raising=False)
    for host in ("0.0.0.0", "", "192.168.1.5", "::", "example.org"):
        with pytest.raises(ConfigError, match="there is no key"):
            ServeOptions(host=host).check()
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        ServeOptions(host=host).check()
    monkeypatch.setenv("OCTOLIKE_KEY", "short")
    with pytest.raises(ConfigError, match="has 5 characters"):
        ServeOptions(host="0.0.0.0").check()
    monkeypatch.setenv("OCTOLIKE_KEY", KEY)
    ServeOptions(host="0.0.0.0").check()
    file = tmp_path / "key"
    file.write_text(KEY)
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="readable by others"):
        ServeOptions(key_file=str(file)).check()
    with pytest.raises(ConfigError, match="cannot be read"):
        ServeOptions(key_file=str(tmp_path / "none")).check()


def test_a_web_page_cannot_connect():
    """A browser states the page's origin; a page may otherwise reach servers at loopback."""
    with serving(NumpyPolicy()) as server:
        with pytest.raises(InvalidStatus, match="403"):
            connect(address(server), origin="http://example.org").__enter__()
        assert works(server)


def test_tls_encrypts_and_its_certificate_is_verified(tmp_path):
    certificate, key = self_signed(tmp_path)
    files = {"certificate": str(certificate), "private_key": str(key)}
    with serving(NumpyPolicy(), **files) as server:
        url = f"wss://localhost:{server.port}"
        with RemotePolicy(url, certificate=str(certificate), connect_timeout=5) as remote:
            task = remote.create_task(instruction="lift")
            assert remote.sample_actions(observation(), task).shape == (H, A)
        with pytest.raises(ConnectionError, match="cannot be verified"):
            RemotePolicy(url, connect_timeout=5)
        with pytest.raises((ConnectionError, OSError)):
            RemotePolicy(address(server), connect_timeout=0.2)
        context = ssl.create_default_context(cafile=str(certificate))
        context.check_hostname = False
        assert get(server, "/healthz", scheme="https", context=context)[0] == 200
    with pytest.raises(ConfigError, match="cannot be loaded"):
        ServeOptions(certificate=str(key), private_key=str(key)).tls()
    with pytest.raises(ConfigError, match="TLS needs both"):
        ServeOptions(certificate="x").check()


def test_a_second_server_on_the_port_is_one_line():
    with serving(NumpyPolicy()) as server:
        with (
            pytest.raises(ConfigError, match=f"port {server.port} of 127.0.0.1 cannot be opened"),
            serving(NumpyPolicy(), port=server.port),
        ):
            pass
        assert works(server)


# Messages


def test_an_oversized_message_ends_its_connection_alone():
    with serving(NumpyPolicy(), message_mb=1) as server:
        with connect(address(server)) as socket:
            socket.recv()
            with contextlib.suppress(ConnectionClosed):
                socket.send(bytes(2 << 20))
            with pytest.raises(ConnectionClosed, match="1009"):
                socket.recv(timeout=10)
        with tcp(server) as connection:  # a frame that only claims to be huge
            connection.sendall(HANDSHAKE)
            assert connection.recv(10_000).startswith(b"HTTP/1.1 101")
            connection.sendall(b"\x82\xff" + (2**62).to_bytes(8, "big") + b"mask")
            until(lambda: connection.recv(10_000) == b"")
        assert works(server)


FLOOD = b"\x83\xa6prompt\xa1a" + b"\xa1b\xdd\x00\x10\x00\x00" + b"\x80" * 0x100000 + b"\xa1c\xc0"
BOMB = {b"__ndarray__": True, b"data": b"", b"dtype": "<f8", b"shape": [2**30, 2**30]}
CODE = {b"__ndarray__": True, b"data": b"cos\nsystem\n(S'x'\ntR.", b"dtype": "|O", b"shape": [1]}


@pytest.mark.parametrize(
    ("message", "answer"),
    [
        ("text", "the message is text"),
        (b"", "not msgpack"),
        (b"\xc1garbage", "not msgpack"),
        (os.urandom(1000), "invalid: "),
        (FLOOD, "exceeds max_array_len"),
        (msgpack.packb({"image_primary": BOMB}), "the message holds 0"),
        (msgpack.packb({"image_primary": CODE}), "has the dtype '|O'"),
        (msgpack.packb([1]), "the request is a list"),
        (msgpack.packb({b"prompt": "lift"}), "with text as keys"),
        (request(image_primary=np.zeros((SIDE, SIDE, 3), np.float32)), "is float32"),
        (request(image_primary=np.zeros(5, np.uint8)), "is uint8 [5]"),
        (request(proprio=np.full(P, np.nan, np.float32)), "not finite"),
        (request(proprio=np.zeros(P + 1, np.float32)), "another width"),
        (request(prompt=5), "prompt is a int"),
        (request(prompt=""), "lacks an instruction"),
        (request(seed="x"), "a seed is 'x'"),
        (request(seed=2**32), "expected an integer from 0"),
        (request(seed=-1), "expected an integer from 0"),
        (request(history="mine"), "unknown value of history"),
        (request(prefix={"actions": 5}), "the prefix must be a map"),
        (request(prefix={"actions": np.zeros((2, A)), "delay": 9}), "delay"),
        (request(goal_images=5), "goal_images must be a map"),
        (request(sudo=True), "unknown key of the observation: 'sudo'"),
    ],
)
def test_a_bad_message_is_answered_without_a_traceback(shared_server, message, answer):
    with connect(address(shared_server)) as socket:
        socket.recv()
        socket.send(message)
        reply = socket.recv(timeout=10)
        assert isinstance(reply, str)
        assert answer in reply
        assert "Traceback" not in reply
        assert len(reply.splitlines()) == 1
        socket.send(request())  # the connection still works
        assert wire.unpack(socket.recv(timeout=10))["actions"].shape == (H, A)


@pytest.fixture(scope="module")
def shared_server():
    with serving(NumpyPolicy()) as server:
        yield server


def test_who_sends_only_garbage_is_disconnected(shared_server):
    with connect(address(shared_server)) as socket:
        socket.recv()
        for _ in range(20):
            socket.send(b"\xc1")
            assert socket.recv(timeout=10).startswith("invalid: ")
        with pytest.raises(ConnectionClosed, match=r"1008.*20 invalid messages in a row"):
            socket.recv(timeout=10)
    assert works(shared_server)


def test_bytes_that_are_no_handshake_hurt_nobody(shared_server):
    for data in (os.urandom(4000), b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 5000, b"\x16\x03\x01\x02"):
        with tcp(shared_server) as connection, contextlib.suppress(OSError):
            connection.sendall(data)
    with connect(address(shared_server)) as socket:
        socket.recv()
        socket.socket.sendall(b"\xff" * 100)  # no valid frame
        with pytest.raises(ConnectionClosed):
            socket.recv(timeout=10)
    assert works(shared_server)


def test_an_error_of_our_own_is_one_sentence(capfd):
    class Failing(NumpyPolicy):
        def sample_normalized(self, *arguments):
            raise RuntimeError("secret of the machine")

    with serving(Failing()) as server, connect(address(server)) as socket:
        socket.recv()
        socket.send(request())
        reply = socket.recv(timeout=10)
        assert reply == "failed: the policy failed with RuntimeError; see the server's log"
    assert "secret of the machine" in capfd.readouterr().err


# Slow, silent and vanishing clients


def test_200_idle_connections_and_a_robot():
    low, high = resource.getrlimit(resource.RLIMIT_NOFILE)
    if low < 1024:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, high), high))
    with serving(NumpyPolicy(), clients=150) as server, contextlib.ExitStack() as stack:
        idle = [stack.enter_context(tcp(server)) for _ in range(100)]  # never shake hands
        for connection in (stack.enter_context(tcp(server)) for _ in range(100)):
            connection.sendall(HANDSHAKE)
            idle.append(connection)
        until(lambda: len(server._sessions) == 100)
        assert works(server)


def test_an_idle_connection_makes_room_for_a_robot(monkeypatch):
    from octolike.policy.serving import server as module

    with serving(NumpyPolicy(), clients=2) as server, contextlib.ExitStack() as stack:
        robot = stack.enter_context(RemotePolicy(address(server)))
        task = robot.create_task(instruction="lift")
        silent = stack.enter_context(connect(address(server)))
        silent.recv()
        late = stack.enter_context(connect(address(server)))
        with pytest.raises(ConnectionClosed, match=r"1013.*too many connections"):
            late.recv(timeout=10)  # both others are too young to be closed
        monkeypatch.setattr(module, "EVICT_AFTER", -1.0)
        with connect(address(server)) as socket:
            assert socket.recv(timeout=10)
            with pytest.raises(ConnectionClosed):  # it never asked anything
                silent.recv(timeout=10)
            assert robot.sample_actions(observation(), task).shape == (H, A)
            assert server.metrics.counts["connections_total", "evicted"] == 1


def test_who_never_reads_is_disconnected_and_holds_up_nobody():
    class Wide(NumpyPolicy):
        def unnormalize(self, actions, states=None):
            return np.zeros((len(actions), 20_000, A), np.float32)  # replies of 0.6 MB

    with serving(Wide(), send_seconds=0.3) as server, tcp(server) as connection:
        connection.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
        connection.sendall(HANDSHAKE)
        data = request()
        frame = b"\x82\xfe" + len(data).to_bytes(2, "big") + bytes(4) + data
        stop = threading.Event()

        def flood():
            with contextlib.suppress(OSError):
                for _ in range(2000):
                    if stop.is_set():
                        return
                    connection.sendall(frame)

        thread = threading.Thread(target=flood)
        thread.start()
        with connect(address(server)) as socket:
            socket.recv()
            until(lambda: server.metrics.counts["connections_total", "stalled"], 20)
            socket.send(request())
            assert wire.unpack(socket.recv(timeout=10))["actions"].shape == (20_000, A)
        stop.set()
        connection.close()
        thread.join(10)


def test_who_vanishes_during_inference_costs_nobody_anything():
    gate = threading.Event()
    policy = NumpyPolicy(wait=gate)
    with serving(policy) as server, ThreadPoolExecutor(1) as pool:
        robot = RemotePolicy(address(server))
        task = robot.create_task(instruction="lift")
        running, waiting = (connect(address(server)).__enter__() for _ in range(2))
        for socket in (running, waiting):
            socket.recv()
        running.send(request())
        until(policy.started.is_set)
        waiting.send(request())
        until(lambda: server._batcher.waiting == 1)
        call = pool.submit(robot.sample_actions, observation(), task, seed=3)
        until(lambda: server._batcher.waiting == 2)
        for socket in (running, waiting):  # without a closing handshake
            socket.socket.shutdown(sockets.SHUT_RDWR)
            socket.socket.close()
        until(lambda: server.metrics.counts["requests_total", "gone"] == 2)
        assert server._batcher.waiting == 1  # the robot's; the other's has left the queue
        gate.set()
        assert call.result(10)[0, 0] == 3
        assert policy.batches == [1, 1]
        robot.close()


def test_half_a_handshake_and_a_byte_at_a_time_hold_up_nobody(shared_server):
    with tcp(shared_server) as a, tcp(shared_server) as b:
        a.sendall(HANDSHAKE[:40])
        b.sendall(HANDSHAKE)
        data = request()
        frame = b"\x82\xfe" + len(data).to_bytes(2, "big") + bytes(4) + data
        for i in range(20):
            b.sendall(frame[i : i + 1])
        assert works(shared_server)


# Clocks, load


def test_a_jump_of_the_clock_changes_nothing(monkeypatch):
    with serving(NumpyPolicy()) as server, RemotePolicy(address(server)) as remote:
        task = remote.create_task(instruction="lift")
        now = time.time
        for jump in (1e9, -1e9):
            monkeypatch.setattr(time, "time", lambda jump=jump: now() + jump)
            assert remote.sample_actions(observation(), task).shape == (H, A)
            assert 0 <= remote.timing["queue_ms"] < 1e4
            assert get(server, "/healthz")[0] == 200


def test_many_calls_leave_nothing_behind():
    policy = NumpyPolicy()
    with serving(policy) as server:
        for i in range(20):
            with RemotePolicy(address(server)) as remote:
                task = remote.create_task(instruction=f"lift {i % 3}")
                for _ in range(5):
                    remote.sample_actions(observation(), task)
        until(lambda: not server._sessions)
        assert server._batcher.waiting == 0
        assert len(server._answers.encoder._tasks) == 4  # and the warm-up's
        for i in range(100):
            server._answers.encoder.task(f"lift {i}", None, None)
        assert len(server._answers.encoder._tasks) == 64
