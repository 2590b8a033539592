"""The workers of data.service as a trainer sees them: asked, found lost, asked for in turn.

A worker that is lost is no loss: what it was asked for is asked of the next one, until it is back.
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

CONNECT = 5.0  # seconds in which a worker must answer at the start
RETRY = 5.0  # seconds between two attempts to reach one that was lost
PATIENCE = 60.0  # seconds without any worker before training gives up
DEADLINE = 600.0  # seconds in which an answer must be there; a first batch reads a pool of episodes
LAUNCH = "python scripts/serve_data.py --config ... --config.data.root=DIR --port {port}"

Place = Callable[[str, str, tuple[int, ...]], np.ndarray]
_FAULTS = {"DataError": DataError, "ConfigError": ConfigError}


class WorkerLostError(Exception):
    """A worker that gives no answer, or none that can be used; the message says why."""


class WorkerTimeoutError(WorkerLostError):
    """A worker that has not answered in time, though its machine may be there."""


class WorkerFailedError(WorkerLostError):
    """A worker that says what went wrong, which may be the fault of its machine alone."""


class CancellableCall:
    """A request that can be dropped at any time."""

    def __init__(self) -> None:
        self._lock, self._call, self.dropped = threading.Lock(), None, False

    def hold(self, call: grpc.Call) -> None:
        """Remember the call under way."""
        with self._lock:
            self._call = call
            if self.dropped:
                call.cancel()

    def drop(self) -> None:
        """Have no use for the answer."""
        with self._lock:
            self.dropped = True
            if self._call is not None:
                self._call.cancel()


class WorkerConnection:
    """The connection to one worker.

    reason: why it is not asked at present, "" while it is; losses: how often it was lost since its
    last good answer.
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
        self.address, self.reason, self.losses = address, "", 0
        self._channel = grpc.insecure_channel(address, options=options)

    def call(
        self,
        method: str,
        header: Mapping[str, Any],
        place: Place | None = None,
        ticket: CancellableCall | None = None,
        timeout: float | None = None,
    ) -> dict[str, Any]:
        """Return the answer's header; its arrays go where `place` says. timeout: DEADLINE if None.

        Raises DataError or ConfigError of the worker, CancelledError where the ticket was dropped,
        and WorkerLostError for all that another worker may do better.
        """
        ask = self._channel.unary_stream(f"/{protocol.SERVICE}/{method}")
        ticket, timeout = ticket or CancellableCall(), timeout or DEADLINE
        try:
            call = ask(json.dumps(header).encode(), timeout=timeout)
            ticket.hold(call)
            reply = protocol.decode(call, place)
            for _ in call:  # until its end: it went well
                pass
        except grpc.RpcError as error:
            if ticket.dropped:
                raise CancelledError from None
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise WorkerTimeoutError(f"no answer to {method!r} within {timeout:g} s") from None
            said = (error.details() or "").partition("\n")[0]
            raise WorkerLostError(f"{error.code().name}: {said}") from None
        except (EOFError, ValueError) as error:
            raise WorkerLostError(f"what it sends is no answer of a worker: {error}") from None
        if "error" not in reply:
            return reply
        kind = _FAULTS.get(reply["error"])
        if kind is None:
            raise WorkerFailedError(f"{reply['error']}: {reply['message']}")
        raise kind(f"{reply['message']} (says the worker at {self.address})")

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()


class WorkerPool:
    """The workers of data.service, and who is asked in place of one that is lost.

    about: what all of them serve (`service.Worker.about`).
    """

    def __init__(self, config: Config) -> None:
        """Connect; errors as `ServiceSource`."""
        self._links = [WorkerConnection(address) for address in config.data.service]
        self._client, self._lock, self._closed = name(), threading.Lock(), threading.Event()
        try:
            self.about = self._connect(protocol.settings(config))
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._links)

    @property
    def addresses(self) -> list[str]:
        """The addresses, in the order of the parts."""
        return [link.address for link in self._links]

    def ask(
        self,
        home: int,
        method: str,
        header: Mapping[str, Any],
        place: Place | None = None,
        ticket: CancellableCall | None = None,
    ) -> dict[str, Any]:
        """Return an answer of worker `home`, or of the next one that gives one.

        Raises ServiceError once it has failed with all of them, or nobody has answered for PATIENCE
        seconds; else as `WorkerConnection.call`.
        """
        header = {**header, "digest": self.about["digest"], "client": self._client}
        until, failed = None, set()
        while True:
            for link in self._links[home:] + self._links[:home]:
                if not link.reason and link not in failed:
                    try:
                        answer = link.call(method, header, place, ticket)
                        link.losses = 0
                        return answer
                    except WorkerLostError as error:
                        self._lose(link, error)
                        failed |= {link} if isinstance(error, WorkerFailedError) else set()
            if len(failed) == len(self._links):
                raise ServiceError(self._nobody())
            until = until or time.monotonic() + PATIENCE
            ending = not threading.main_thread().is_alive()
            if ending or self._closed.is_set() or (ticket and ticket.dropped):
                raise CancelledError
            if time.monotonic() > until:
                raise ServiceError(self._nobody())
            self._closed.wait(min(RETRY, PATIENCE) / 10)

    def forget(self, stream: str) -> None:
        """Tell the workers that a stream is over; those that are lost forget it by themselves."""
        if self._closed.is_set() or not threading.main_thread().is_alive():
            return
        for link in self._links:
            if not link.reason:
                try:
                    link.call("close", {"stream": stream}, timeout=1.0)
                except WorkerLostError:
                    continue

    def close(self) -> None:
        """Close the connections."""
        self._closed.set()
        for link in self._links:
            link.close()

    def _connect(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the workers serve, once all of them answer and agree."""
        with ThreadPoolExecutor(len(self._links)) as threads:
            answers = list(threads.map(_reach, self._links))
        silent = [
            (k, a)
            for k, a in zip(self._links, answers, strict=True)
            if isinstance(a, WorkerLostError)
        ]
        if silent:
            port = silent[0][0].address.rpartition(":")[2]
            raise ServiceError(
                "no worker answers at "
                + "; ".join(f"{link.address} ({reason})" for link, reason in silent)
                + f". Start it there, with the settings of this run: {LAUNCH.format(port=port)}; "
                "or leave the address out of data.service, the batches stay the same"
            )
        here = {"octolike": octolike.__version__, **settings}
        first = answers[0]
        for link, about in zip(self._links, answers, strict=True):
            there = {"octolike": about["version"], **about["settings"]}
            _same(here, there, "here", link.address, ConfigError, "settings")
            served, own = first["contents"], about["contents"]
            _same(served, own, self._links[0].address, link.address, DataError, "data")
        for link, about in zip(self._links, answers, strict=True):
            if about["digest"] != first["digest"]:
                raise DataError(
                    f"{link.address} serves something else than {self._links[0].address}; start "
                    "both from the same copy of octolike and of the data"
                )
        return first

    def _lose(self, link: WorkerConnection, error: WorkerLostError) -> None:
        """Ask others from now on, and this one again later: the more rarely, the more it is lost.

        One that was late costs DEADLINE each time, and is left alone for longer.
        """
        with self._lock:
            if link.reason or self._closed.is_set():
                return
            link.reason, link.losses = str(error), link.losses + 1
            pause = min(link.losses, 12) * (
                DEADLINE if isinstance(error, WorkerTimeoutError) else RETRY
            )
            left = [other.address for other in self._links if not other.reason]
        then = f"its part comes from {left[0]}" if len(left) == 1 else "its part comes from others"
        if not left:
            then = f"no other is left; waiting for one, at most {PATIENCE:g} s"
        print(f"data.service: {link.address} is lost ({error}); {then}", flush=True)
        threading.Thread(target=self._await, args=(link, pause), daemon=True).start()

    def _await(self, link: WorkerConnection, pause: float) -> None:
        """Ask a worker whether it is back: after each pause, or RETRY while no other is left."""
        asked = time.monotonic()
        while not self._closed.wait(RETRY):
            others = any(not other.reason for other in self._links)
            if others and time.monotonic() < asked + pause:
                continue
            asked = time.monotonic()
            try:
                about = link.call("about", {"client": self._client}, timeout=CONNECT)
            except (WorkerLostError, ValueError):
                continue
            if about["digest"] == self.about["digest"]:
                link.reason = ""
                print(f"data.service: {link.address} is back", flush=True)
                return
            if "other settings" not in link.reason:
                link.reason = "it is back with other settings or data, and not asked"
                print(f"data.service: {link.address}: {link.reason}", flush=True)

    def _nobody(self) -> str:
        reasons = "; ".join(f"{link.address} ({link.reason})" for link in self._links)
        return (
            f"no worker of data.service is left: {reasons}. Start one of them again "
            f"({LAUNCH.format(port='PORT')}), then the same training command: it goes on from the "
            "last checkpoint. Or name others in data.service, or none, with the data here: the "
            "batches stay the same"
        )


def name() -> str:
    """Return a name that nobody else has."""
    return uuid.uuid4().hex


def _reach(link: WorkerConnection) -> dict[str, Any] | WorkerLostError:
    """Return what a worker says of itself, or why it says nothing for CONNECT seconds."""
    until = time.monotonic() + CONNECT
    while True:
        try:
            return link.call("about", {}, timeout=max(until - time.monotonic(), 0.5))
        except WorkerLostError as error:
            if time.monotonic() + 0.5 > until:
                return error
        time.sleep(0.5)


def _same(
    a: Mapping[str, Any], b: Mapping[str, Any], who: str, other: str, kind: type, what: str
) -> None:
    """Raise an error that names each entry of two dicts that differs, with both values."""
    show = lambda x, k: json.dumps(x[k]) if k in x else "absent"
    names = [k for k in sorted(a.keys() | b.keys()) if show(a, k) != show(b, k)]
    if names:
        rows = "".join(f"\n  {k}: {show(a, k)} -> {show(b, k)}" for k in names)
        raise kind(
            f"the {what} differ ({who} -> {other}), so its batches would be others:{rows}\n"
            "Start the worker with the config, the overrides and the data of this run, or bring "
            "this run's in line"
        )
