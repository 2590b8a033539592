"""The trainer's connections to the workers of data.service, with failover.

The requests of a lost worker go to the next one until it is back.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np

import octolike
from octolike.config import Config, ConfigError
from octolike.data.service import protocol
from octolike.errors import DataError, ServiceError

CONNECT = 5.0  # seconds for the first reply of a worker
RETRY = 5.0  # seconds between attempts to reach a lost worker
PATIENCE = 60.0  # seconds without any worker before training ends
DEADLINE = 600.0  # seconds for a reply; a first batch reads a pool of episodes
LAUNCH = "octolike serve_data --config ... --config.data.root=DIR --port {port}"

Allocate = Callable[[str, str, tuple[int, ...]], np.ndarray]
_ERROR_TYPES = {"DataError": DataError, "ConfigError": ConfigError}


class WorkerLostError(Exception):
    """A worker did not reply, or its reply is invalid; the message is the reason."""


class WorkerTimeoutError(WorkerLostError):
    """A worker did not reply in time, although its machine may be running."""


class WorkerFailedError(WorkerLostError):
    """A worker replied with an error that its machine may have caused."""


class CancellableCall:
    """A request that can be cancelled at any time, also before it is sent."""

    def __init__(self) -> None:
        self._lock, self._call, self.cancelled = threading.Lock(), None, False

    def attach(self, call: grpc.Call) -> None:
        """Set the gRPC call of the request."""
        with self._lock:
            self._call = call
            if self.cancelled:
                call.cancel()

    def cancel(self) -> None:
        """Cancel the request."""
        with self._lock:
            self.cancelled = True
            if self._call is not None:
                self._call.cancel()


class WorkerConnection:
    """The connection to one worker.

    reason: why it is not used at present, "" if it is; failures: losses since its last valid reply.
    """

    def __init__(self, address: str) -> None:
        options = (
            *protocol.OPTIONS,
            ("grpc.keepalive_time_ms", protocol.PING_MS),
            ("grpc.keepalive_timeout_ms", protocol.PONG_MS),
            ("grpc.http2.ping_timeout_ms", protocol.PONG_MS),
            ("grpc.http2.max_pings_without_data", 0),  # a batch may take its time
            ("grpc.max_reconnect_backoff_ms", int(1000 * RETRY)),
        )
        self.address, self.reason, self.failures = address, "", 0
        self._channel = grpc.insecure_channel(address, options=options)

    def call(
        self,
        method: str,
        header: Mapping[str, Any],
        allocate: Allocate | None = None,
        request: CancellableCall | None = None,
        timeout: float | None = None,
    ) -> dict[str, Any]:
        """Return the header of the reply; its arrays fill those of `allocate`.

        timeout: in seconds; None for DEADLINE. Raises DataError or ConfigError of the worker,
        CancelledError for a cancelled request, WorkerLostError if another worker may succeed.
        """
        send = self._channel.unary_stream(f"/{protocol.SERVICE}/{method}")
        request, timeout = request or CancellableCall(), timeout or DEADLINE
        try:
            call = send(json.dumps(header).encode(), timeout=timeout)
            request.attach(call)
            reply = protocol.decode(call, allocate)
            for _ in call:  # to the end of the stream, which carries the status
                pass
        except grpc.RpcError as error:
            if request.cancelled:
                raise CancelledError from None
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise WorkerTimeoutError(f"no reply to {method!r} within {timeout:g} s") from None
            details = (error.details() or "").partition("\n")[0]
            raise WorkerLostError(f"{error.code().name}: {details}") from None
        except (EOFError, ValueError) as error:
            raise WorkerLostError(f"its reply is not valid: {error}") from None
        if "error" not in reply:
            return reply
        error_type = _ERROR_TYPES.get(reply["error"])
        if error_type is None:
            raise WorkerFailedError(f"{reply['error']}: {reply['message']}")
        raise error_type(f"{reply['message']} (reported by the worker at {self.address})")

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()


class WorkerPool:
    """The workers of data.service; requests of a lost worker go to the others.

    about: the description of the data that all of them serve (`BatchWorker.about`).
    """

    def __init__(self, config: Config) -> None:
        """Connect; raises the errors of `ServiceSource`."""
        self._connections = [WorkerConnection(address) for address in config.data.service]
        self._client, self._lock, self._closed = unique_name(), threading.Lock(), threading.Event()
        try:
            self.about = self._connect(protocol.settings(config))
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._connections)

    @property
    def addresses(self) -> list[str]:
        """Return the addresses, in the order of the parts."""
        return [connection.address for connection in self._connections]

    def call(
        self,
        home: int,
        method: str,
        header: Mapping[str, Any],
        allocate: Allocate | None = None,
        request: CancellableCall | None = None,
    ) -> dict[str, Any]:
        """Return the reply of worker `home`, or of the next one that replies.

        Raises ServiceError if the request fails on all workers or no worker replies for PATIENCE
        seconds, and the errors of `WorkerConnection.call`.
        """
        header = {**header, "digest": self.about["digest"], "client": self._client}
        deadline, failed = None, set()
        while True:
            for connection in self._connections[home:] + self._connections[:home]:
                if not connection.reason and connection not in failed:
                    try:
                        reply = connection.call(method, header, allocate, request)
                        connection.failures = 0
                        return reply
                    except WorkerLostError as error:
                        self._lose(connection, error)
                        failed |= {connection} if isinstance(error, WorkerFailedError) else set()
            if len(failed) == len(self._connections):
                raise ServiceError(self._no_worker_left())
            deadline = deadline or time.monotonic() + PATIENCE
            exiting = not threading.main_thread().is_alive()
            if exiting or self._closed.is_set() or (request and request.cancelled):
                raise CancelledError
            if time.monotonic() > deadline:
                raise ServiceError(self._no_worker_left())
            self._closed.wait(min(RETRY, PATIENCE) / 10)

    def close_stream(self, stream: str) -> None:
        """Close a stream on all workers; lost workers close it themselves."""
        if self._closed.is_set() or not threading.main_thread().is_alive():
            return
        for connection in self._connections:
            if not connection.reason:
                try:
                    connection.call("close", {"stream": stream}, timeout=1.0)
                except WorkerLostError:
                    continue

    def close(self) -> None:
        """Close the connections."""
        self._closed.set()
        for connection in self._connections:
            connection.close()

    def _connect(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the description of the served data, once all workers reply and agree."""
        with ThreadPoolExecutor(len(self._connections)) as threads:
            replies = list(threads.map(_first_reply, self._connections))
        silent = [
            (connection, reply)
            for connection, reply in zip(self._connections, replies, strict=True)
            if isinstance(reply, WorkerLostError)
        ]
        if silent:
            port = silent[0][0].address.rpartition(":")[2]
            raise ServiceError(
                "no worker replies at "
                + "; ".join(f"{connection.address} ({reason})" for connection, reason in silent)
                + f". Start one there with the settings of this run: {LAUNCH.format(port=port)}; "
                "or remove the address from data.service; the batches stay the same"
            )
        here = {"octolike": octolike.__version__, **settings}
        abouts = [reply for reply in replies if not isinstance(reply, WorkerLostError)]
        first = abouts[0]
        for connection, about in zip(self._connections, abouts, strict=True):
            there = {"octolike": about["version"], **about["settings"]}
            _check_same(here, there, "here", connection.address, ConfigError, "settings")
            a, b = first["contents"], about["contents"]
            _check_same(a, b, self._connections[0].address, connection.address, DataError, "data")
        for connection, about in zip(self._connections, abouts, strict=True):
            if about["digest"] != first["digest"]:
                raise DataError(
                    f"{connection.address} and {self._connections[0].address} serve different "
                    "batches; start both from the same copy of octolike and of the data"
                )
        return first

    def _lose(self, connection: WorkerConnection, error: WorkerLostError) -> None:
        """Send requests to the other workers, and retry this one after a growing pause.

        After a timeout, which costs DEADLINE each time, the pause is longer.
        """
        with self._lock:
            if connection.reason or self._closed.is_set():
                return
            connection.reason, connection.failures = str(error), connection.failures + 1
            unit = DEADLINE if isinstance(error, WorkerTimeoutError) else RETRY
            pause = min(connection.failures, 12) * unit
            available = [c.address for c in self._connections if not c.reason]
        outcome = f"its part comes from {available[0] if len(available) == 1 else 'the others'}"
        if not available:
            outcome = f"no other worker is left; waiting at most {PATIENCE:g} s for one"
        print(f"data.service: {connection.address} is lost ({error}); {outcome}", flush=True)
        threading.Thread(target=self._await, args=(connection, pause), daemon=True).start()

    def _await(self, connection: WorkerConnection, pause: float) -> None:
        """Wait for a worker; try after each pause, or every RETRY s if no other is left."""
        last_attempt = time.monotonic()
        while not self._closed.wait(RETRY):
            others = any(not c.reason for c in self._connections)
            if others and time.monotonic() < last_attempt + pause:
                continue
            last_attempt = time.monotonic()
            try:
                about = connection.call("about", {"client": self._client}, timeout=CONNECT)
            except (WorkerLostError, ValueError):
                continue
            if about["digest"] == self.about["digest"]:
                connection.reason = ""
                print(f"data.service: {connection.address} is back", flush=True)
                return
            if "other settings" not in connection.reason:
                connection.reason = "it is back with other settings or data, so it is not used"
                print(f"data.service: {connection.address}: {connection.reason}", flush=True)

    def _no_worker_left(self) -> str:
        reasons = "; ".join(
            f"{connection.address} ({connection.reason})" for connection in self._connections
        )
        return (
            f"no worker of data.service is left: {reasons}. Restart one of them "
            f"({LAUNCH.format(port='PORT')}), then repeat the training command, which resumes from "
            "the last checkpoint. Or list other workers in data.service, or none to read the data "
            "on this machine: the batches stay the same"
        )


def unique_name() -> str:
    """Return a random name."""
    return uuid.uuid4().hex


def _first_reply(connection: WorkerConnection) -> dict[str, Any] | WorkerLostError:
    """Return the description of a worker, or the error after CONNECT seconds without one."""
    until = time.monotonic() + CONNECT
    while True:
        try:
            return connection.call("about", {}, timeout=max(until - time.monotonic(), 0.5))
        except WorkerLostError as error:
            if time.monotonic() + 0.5 > until:
                return error
        time.sleep(0.5)


def _check_same(
    a: Mapping[str, Any], b: Mapping[str, Any], name_a: str, name_b: str, kind: type, noun: str
) -> None:
    """Raise an error of type `kind` that lists the entries that differ, with both values."""
    values = {
        key: [json.dumps(x[key]) if key in x else "absent" for x in (a, b)]
        for key in sorted(a.keys() | b.keys())
    }
    lines = [f"  {key}: {x} -> {y}" for key, (x, y) in values.items() if x != y]
    if lines:
        raise kind(
            f"the {noun} differ ({name_a} -> {name_b}), so the batches would differ:\n"
            + "\n".join(lines)
            + "\nStart the worker with the config, the overrides and the data of this run, or "
            "change this run to match"
        )
