"""PolicyServer: serves one policy to many robots over websockets, safely by default.

    server = PolicyServer(policy, ServeOptions(port=8000))
    asyncio.run(server.run())

One port speaks

    /            openpi's protocol: the server sends its metadata, then answers each observation
                 with a chunk of actions, in msgpack (octolike.policy.wire)
    /vla-eval    the protocol of the vla-eval harness: each observation is answered with one action
    /healthz     200 once the policy is compiled, 503 before, while stopping, and when inference
                 hangs; also as /health
    /metrics     counters and durations for Prometheus

The life of a request: read from the socket, decoded and checked on a thread (`RequestEncoder`),
queued and computed in a batch on the inference thread (`Batcher`), checked against the robot's
limits (`ActionLimits`), sent; `Answers` holds these together. The event loop only moves bytes, so
that a slow, silent or vanishing client delays only itself. Errors are text messages "busy: …",
"invalid: …" or "failed: …".
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import hashlib
import hmac
import http
import logging
import signal
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from octolike.errors import ConfigError
from octolike.policy import wire
from octolike.policy.policy import Policy
from octolike.policy.serving.answers import Answers, ClientGoneError, Reply
from octolike.policy.serving.batcher import Batcher
from octolike.policy.serving.harness import Episode
from octolike.policy.serving.metrics import ServerMetrics
from octolike.policy.serving.options import ServeOptions, is_loopback
from octolike.policy.serving.reload import CheckpointWatcher
from octolike.policy.serving.requests import Session

HARNESS_PATH = "/vla-eval"
HEALTH = ("/healthz", "/health")
EVICT_AFTER = 5.0  # seconds without a request after which a connection may be closed for a new one
BAD_MESSAGES = 20  # in a row, then a client is disconnected
STALL = 60.0  # seconds that a call of the policy may take before /healthz reports it
OPEN_SECONDS, PING_SECONDS, PONG_SECONDS = 10.0, 30.0, 120.0  # a simulator may block for minutes


class PolicyServer:
    """Serves a policy until it is stopped.

    Attributes:
        policy: that answers now; a newer checkpoint replaces it.
        metrics: counters and durations.
        port: that it listens at, once it does.
    """

    def __init__(
        self,
        policy: Policy,
        options: ServeOptions,
        watcher: CheckpointWatcher | None = None,
        log: Callable[[str], Any] = print,
    ) -> None:
        """Prepare; nothing is opened or compiled yet.

        Args:
            policy: loaded with `options.batch_sizes`.
            options: checked here.
            watcher: of the run's checkpoints, for `options.reload_seconds`.
            log: called with lines for the operator.

        Raises:
            ConfigError: an option is not allowed, alone, with another, or for this policy.
        """
        options.check()
        self._options, self._log, self._watcher = options, log, watcher
        self._key = _digest(options.key()) if options.key() else b""
        self.metrics = ServerMetrics()
        self._batcher = Batcher(policy, options, self.metrics)
        try:
            self._answers = Answers(policy, self._batcher, options, self.metrics)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self._sessions: dict[ServerConnection, Session] = {}
        self._opened = 0
        self._ready, self._idle, self._stop = (
            asyncio.Event(),
            asyncio.Event(),
            self._answers.stopping,
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self.port = options.port
        self._describe_gauges()

    @property
    def policy(self) -> Policy:
        """The policy that answers now."""
        return self._batcher.policy

    @property
    def is_healthy(self) -> bool:
        """Whether requests are answered: compiled, not stopping, and inference does not hang."""
        since = self._batcher.running_since
        is_stalled = since is not None and time.monotonic() - since > STALL
        return self._ready.is_set() and not self._stop.is_set() and not is_stalled

    def describe(self) -> list[str]:
        """Return lines on the settings of the server."""
        policy, options = self.policy, self._options
        images = ", ".join(f"{k} {h} x {w}" for k, (h, w, _) in policy.image_shapes.items())
        vectors = [k for k in policy.observation_keys if k not in policy.image_shapes]
        lines = [
            f"observation: {', '.join(filter(None, [images, *vectors]))}; "
            f"actions: {policy.horizon} x {', '.join(policy.embodiment.action.names)}",
            f"batches of {', '.join(map(str, options.batch_sizes))}; key: "
            f"{'required' if self._key else 'none'}; TLS: {'yes' if options.certificate else 'no'}",
            f"action limits ({options.on_limit}): {self._answers.limits.sentence() or 'none'}",
        ]
        if policy.window > 1:
            use = {
                "none": "their observations stand alone; --history server links them as steps",
                "server": "their observations are linked as consecutive control steps",
            }
            lines.append(
                f"history: the policy was trained on windows of {policy.window}; openpi clients "
                f"that send single observations: {use[options.history]}"
            )
        if self._key and not options.certificate and not is_loopback(options.host):
            lines.append("warning: without TLS the key and all images are readable on the network")
        return lines

    def stop(self) -> None:
        """Finish the running requests, then return from `run`; may be called from any thread."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended already
                self._loop.call_soon_threadsafe(self._stop.set)

    async def run(self) -> None:
        """Listen, compile, serve until SIGTERM, Ctrl-C or `stop`, and finish the running requests.

        Raises ConfigError if the address cannot be opened.
        """
        self._loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._loop.add_signal_handler(number, self._stop.set)
        listener = await self._listen()
        tasks: list[asyncio.Task[Any]]
        tasks = [asyncio.create_task(self._batcher.run()), asyncio.create_task(self._warm_up())]
        if self._watcher and self._options.reload_seconds:
            watch = self._watcher.watch(
                self._options.reload_seconds, lambda: self.policy, self._replace, self._keep
            )
            tasks.append(asyncio.create_task(watch))
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            while not self._stop.is_set():  # the warm-up has ended
                ended = [task for task in tasks if task.done()]
                for task in ended:
                    task.result()
                    tasks.remove(task)
                await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await self._drain(listener)
            for task in (stopping, *tasks):
                task.cancel()
            self._batcher.close()
            self._answers.close()

    async def _listen(self) -> Server:
        quiet = logging.getLogger("octolike.serving")  # failed handshakes are counted, not traced
        quiet.setLevel(logging.CRITICAL)
        try:
            listener = await serve(
                self._connected,
                self._options.host,
                self._options.port,
                process_request=self._answer_http,
                origins=[None],  # no web page may steer a robot through a browser on this machine
                compression=None,
                max_size=self._options.message_mb << 20,
                max_queue=1,
                open_timeout=OPEN_SECONDS,
                ping_interval=PING_SECONDS,
                ping_timeout=PONG_SECONDS,
                close_timeout=2,
                ssl=self._options.tls(),
                logger=quiet,
                server_header=None,
            )
        except OSError as error:
            place = f"port {self._options.port} of {self._options.host}"
            raise ConfigError(
                f"{place} cannot be opened ({error.strerror or error}); if another server runs "
                "there, stop it or choose another --port"
            ) from error
        self.port = next(iter(listener.sockets)).getsockname()[1]
        return listener

    async def _warm_up(self) -> None:
        start = time.perf_counter()
        await self._batcher.call(self._rehearse)
        self._ready.set()
        scheme = "wss" if self._options.certificate else "ws"
        self._log(
            f"ready after {time.perf_counter() - start:.1f} s: checkpoint {self.policy.step} of "
            f"{self.policy.embodiment.name} at {scheme}://{self._options.host}:{self.port}"
        )

    def _rehearse(self) -> None:
        """Compile every batch size, and the encoder of instructions."""
        self.policy.warmup()
        if self.policy.conditioning == {"language"}:
            self._answers.encoder.task("warm up", None, None)

    async def _drain(self, listener: Server) -> None:
        """Refuse new connections and requests, answer those that wait, close all connections."""
        self._stop.set()
        listener.server.close()
        waiting = sum(s.is_waiting for s in self._sessions.values())
        if waiting:
            self._log(f"stopping: {waiting} requests are finished first")
        deadline = time.monotonic() + self._options.drain_seconds
        while any(s.is_waiting for s in self._sessions.values()) and time.monotonic() < deadline:
            self._idle.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), 0.1)
        listener.close()
        await listener.wait_closed()
        self._log(f"stopped after {self.metrics.counts['requests_total', 'ok']} answers")

    # HTTP

    def _answer_http(self, connection: ServerConnection, request: Request) -> Response | None:
        """Return the response to a plain request, or to a refused one; None for a websocket."""
        path = request.path.partition("?")[0]
        if path in HEALTH:
            if self.is_healthy:
                return connection.respond(http.HTTPStatus.OK, "ok\n")
            reason = "stopping" if self._stop.is_set() else "warming up"
            reason = (
                "inference hangs" if self._ready.is_set() and not self._stop.is_set() else reason
            )
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, f"{reason}\n")
        if not self._is_allowed(request):
            self.metrics.add("connections_total", "refused")
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, "the key is missing or wrong\n")
        if path == "/metrics":
            return connection.respond(http.HTTPStatus.OK, self.metrics.text())
        if path not in ("/", HARNESS_PATH):
            text = f"no such path; the server has /, {HARNESS_PATH}, /healthz and /metrics\n"
            return connection.respond(http.HTTPStatus.NOT_FOUND, text)
        if self._stop.is_set():
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "stopping\n")
        return None

    def _is_allowed(self, request: Request) -> bool:
        """Return whether a request has the key, as Api-Key, Bearer or the password of Basic."""
        if not self._key:
            return True
        values = request.headers.get_all("Authorization")
        kind, _, text = (values[0] if len(values) == 1 else "").partition(" ")
        text = text.strip()
        if kind.lower() == "basic":
            try:
                text = base64.b64decode(text, validate=True).decode().partition(":")[2]
            except ValueError:
                text = ""
        # of digests: the time depends neither on the key nor on its length
        return hmac.compare_digest(_digest(text), self._key)

    # Connections

    async def _connected(self, socket: ServerConnection) -> None:
        """Serve one connection until it ends, whatever the client does."""
        if not self._make_room():
            self.metrics.add("connections_total", "full")
            await socket.close(1013, "busy: too many connections")
            return
        self._opened += 1
        session = self._sessions[socket] = Session(self._opened)
        self.metrics.add("connections_total", "accepted")
        try:
            await self._wait_ready(socket)
            path = socket.request.path.partition("?")[0] if socket.request else "/"
            serve_client = self._serve_harness if path == HARNESS_PATH else self._serve_openpi
            await serve_client(socket, session)
        except (ConnectionClosed, ClientGoneError):
            pass
        except Exception:
            traceback.print_exc(file=sys.stderr)
            await socket.close(1011, "internal error")
        finally:
            self._sessions.pop(socket, None)

    async def _wait_ready(self, socket: ServerConnection) -> None:
        """Return once the policy is compiled, so that a client waits; or the connection ends."""
        ready = asyncio.ensure_future(self._ready.wait())
        closed = asyncio.ensure_future(socket.wait_closed())
        try:
            await asyncio.wait({ready, closed}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
            closed.cancel()

    def _make_room(self) -> bool:
        """Return whether there is room for a connection; one that is idle for long makes room."""
        if len(self._sessions) < self._options.clients:
            return True
        now = time.monotonic()
        idle = [
            (session.active or session.opened, session.number, socket)
            for socket, session in self._sessions.items()
            if not session.is_waiting and now - (session.active or session.opened) > EVICT_AFTER
        ]
        # those that never asked anything go first
        never = [x for x in idle if not self._sessions[x[2]].active]
        if not idle:
            return False
        _, _, socket = min(never or idle)
        self._sessions.pop(socket)
        self.metrics.add("connections_total", "evicted")
        socket.transport.abort()
        return True

    async def _serve_openpi(self, socket: ServerConnection, session: Session) -> None:
        await self._send(socket, wire.pack(self._metadata()))
        previous = 0.0

        async def answer(data: str | bytes) -> Reply:
            nonlocal previous
            start = time.perf_counter()
            reply = await self._answers.openpi(socket, session, data, previous)
            previous = time.perf_counter() - start
            return reply

        await self._converse(socket, session, answer)

    async def _serve_harness(self, socket: ServerConnection, session: Session) -> None:
        episode = Episode()
        answer = functools.partial(self._answers.harness, socket, session, episode)
        await self._converse(socket, session, answer)

    async def _converse(
        self,
        socket: ServerConnection,
        session: Session,
        answer: Callable[[str | bytes], Awaitable[Reply]],
    ) -> None:
        """Answer message after message; disconnect a client that sends only invalid ones."""
        bad = 0
        while bad < BAD_MESSAGES:
            data = await socket.recv()
            session.is_waiting, session.active = True, time.monotonic()
            try:
                reply, outcome = await answer(data)
                if reply:
                    await self._send(socket, reply)
            finally:
                session.is_waiting, session.active = False, time.monotonic()
                self._idle.set()
            bad = bad + 1 if outcome == "invalid" else 0
        await socket.close(1008, f"{bad} invalid messages in a row")

    async def _send(self, socket: ServerConnection, data: str | bytes) -> None:
        """Send; disconnect a client that does not read."""
        try:
            await asyncio.wait_for(socket.send(data), self._options.send_seconds)
        except TimeoutError:
            self.metrics.add("connections_total", "stalled")
            socket.transport.abort()
            raise ClientGoneError from None

    def _metadata(self) -> dict[str, Any]:
        return {
            **self.policy.metadata,
            "server": "octolike",
            "history": self._options.history,
            "limits": self._answers.limits.sentence(),
        }

    def _describe_gauges(self) -> None:
        self.metrics.gauges = {
            "ready": lambda: float(self.is_healthy),
            "connections": lambda: len(self._sessions),
            "queue": lambda: self._batcher.waiting,
            "checkpoint_step": lambda: self.policy.step,
        }

    # A newer checkpoint

    def _replace(self, policy: Policy) -> None:
        self._log(f"checkpoint {policy.step} replaces {self.policy.step}")
        self._batcher.policy = policy
        self.metrics.add("reloads_total", "loaded")

    def _keep(self, error: Exception) -> None:
        self._log(f"a newer checkpoint cannot be loaded, {self.policy.step} stays: {error}")
        self.metrics.add("reloads_total", "failed")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
