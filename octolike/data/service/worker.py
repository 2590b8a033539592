"""A worker: builds batches for training processes on other machines, over gRPC.

    server = serve(config, "0.0.0.0", 7070)     octolike serve_data
    server.stop()

    trainer 0 ── part 0 of 4 ── worker A         two training processes and two workers: each worker
            └─── part 1 of 4 ── worker B         builds two quarters of every batch
    trainer 1 ── part 2 of 4 ── worker A
            └─── part 3 of 4 ── worker B

A request names a part and the state before its batch. A batch is a pure function of both, so any
worker can build any part at any time, and a worker has no state that must survive. It does cache
the stream of each part, which builds the following batches ahead, and opens a new one if a request
does not continue it: after a restart, a resume, feedback, or the loss of another worker. Each
stream holds its own episodes, up to data.memory.

The connection is neither encrypted nor authenticated: use it in trusted networks only. Requests
are data, so a stranger can request batches and slow the worker down, but cannot execute code.
"""

from __future__ import annotations

import itertools
import json
import math
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, cast

import grpc
import numpy as np
import tensorflow as tf

import octolike
from octolike import types
from octolike.config import Config, ConfigError
from octolike.data.pipeline.source import RldsSource
from octolike.data.service import protocol
from octolike.embodiment import embodiments_to_json
from octolike.errors import DataError

IDLE = 600.0  # seconds without a request after which a stream is closed
THREADS = 64  # requests in parallel
GRACE = 2.0  # seconds to finish the requests in progress when a server stops

Reply = tuple[dict[str, Any], dict[str, np.ndarray]]


@dataclass(eq=False)
class _WorkerStream:
    """A stream, and the position in the request that continues it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    stream: Any = None
    position: Any = None
    used: float = math.inf

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()
        self.stream = self.position = None


class BatchWorker:
    """Serves requests from opened data; every method takes a header and returns a `Reply`."""

    def __init__(self, config: Config, data: RldsSource) -> None:
        self._data = data
        self.description = data.describe()
        self._validation = data.validation()
        robots = embodiments_to_json(data.embodiments)
        contents = data.contents() | {f"embodiment {r['name']}": protocol.digest(r) for r in robots}
        shared = {
            "version": octolike.__version__,
            "settings": protocol.settings(config),
            "contents": contents | {"tensorflow": tf.__version__, "numpy": np.__version__},
            "spec": types.spec_to_json(data.spec),
            "embodiments": robots,
            "names": {k: list(v) for k, v in data.names._asdict().items()},
            "shares": data.shares.tolist(),
            "validation": list(self._validation),
        }
        self._about = shared | {"digest": protocol.digest(shared), "description": self.description}
        self._streams: dict[tuple[Any, ...], _WorkerStream] = {}
        self._lock = threading.Lock()

    def about(self, header: Mapping[str, Any]) -> Reply:
        """Return the description of the data and the settings that all workers must share."""
        return self._about, {}

    def open(self, header: Mapping[str, Any]) -> Reply:
        """Check a saved state (None: the beginning) and a part; return the state for requests."""
        stream = self._data.train(header["state"], tuple(header["part"]))
        return {"state": stream.state()}, {}

    def feedback(self, header: Mapping[str, Any]) -> Reply:
        """Return a state updated by feedback."""
        stream = self._data.train(header["state"], tuple(header["part"]))
        stream.feedback(header["datasets"], header["tasks"])
        return {"state": stream.state()}, {}

    def batch(self, header: Mapping[str, Any]) -> Reply:
        """Return a part of the training batch after a state."""
        state, part = header["state"], tuple(header["part"])
        key = (header["stream"], *part)
        return {}, self._next(key, state, lambda: self._data.train(state, part))

    def validation(self, header: Mapping[str, Any]) -> Reply:
        """Return the validation batch `number` of a dataset; "end" is true after the last one."""
        dataset, number = header["dataset"], header["number"]

        def open_stream() -> _CountedBatches:
            batches = self._validation[dataset]()
            return _CountedBatches(cast("Generator[types.Batch, None, None]", batches), number)

        leaves = self._next((header["stream"], dataset), number, open_stream)
        return {"end": not leaves}, leaves

    def close(self, header: Mapping[str, Any]) -> Reply:
        """Close all streams of a name."""
        self._close_streams(lambda key, _: key[0] == header["stream"])
        return {}, {}

    def expire(self, idle: float = 0.0) -> None:
        """Close the streams without a request in the last `idle` seconds."""
        before = time.monotonic() - idle
        self._close_streams(lambda _, entry: entry.used <= before)

    def check(self, header: Mapping[str, Any]) -> None:
        """Raise RuntimeError if the trainer connected to a worker with other settings or data."""
        if header.get("digest", self._about["digest"]) != self._about["digest"]:
            raise RuntimeError("it was restarted with other settings or data")

    def _next(
        self, key: tuple[Any, ...], position: Any, open_stream: Callable[[], Any]
    ) -> dict[str, np.ndarray]:
        """Return the leaves of the next batch of a stream, {} after the last one."""
        with self._lock:
            entry = self._streams.setdefault(key, _WorkerStream())
        with entry.lock:
            entry.used = math.inf
            try:
                if entry.stream is None or entry.position != position:
                    entry.close()
                    entry.stream = open_stream()
                batch: types.Batch = next(entry.stream, {})
                # in the form of the next request
                entry.position = json.loads(json.dumps(entry.stream.state()))
            except BaseException:
                entry.close()
                raise
            finally:
                entry.used = time.monotonic()
        return dict(types.flatten(batch))

    def _close_streams(self, selects: Callable[[tuple[Any, ...], _WorkerStream], bool]) -> None:
        with self._lock:
            keys = [key for key, entry in self._streams.items() if selects(key, entry)]
            closed = [self._streams.pop(key) for key in keys]
        for entry in closed:
            with entry.lock:
                entry.close()


class _CountedBatches(Iterator[types.Batch]):
    """Counts the batches of a finite iterator; skips the first `start`."""

    def __init__(self, batches: Generator[types.Batch, None, None], start: int) -> None:
        self._batches, self._number = batches, start
        for _ in itertools.islice(batches, start):
            pass

    def __next__(self) -> types.Batch:
        batch = next(self._batches)
        self._number += 1
        return batch

    def state(self) -> int:
        """Return the number of batches so far, skipped ones included."""
        return self._number

    def close(self) -> None:
        """Close the iterator."""
        self._batches.close()


class BatchServer:
    """A worker that listens on `port`; description: of the data."""

    def __init__(self, config: Config, data: RldsSource, host: str, port: int) -> None:
        """Listen on a port, 0 for any free one; ConfigError if the port is not available."""
        self._worker, self._lock = BatchWorker(config, data), threading.Lock()
        self._clients: dict[str, float] = {}
        self.description = self._worker.description
        self._batches, self._bytes, self._since = 0, 0, time.monotonic()
        options = (
            *protocol.OPTIONS,
            ("grpc.so_reuseport", 0),  # otherwise a second worker would silently share the port
            ("grpc.http2.min_ping_interval_without_data_ms", protocol.PING_MS // 2),
            ("grpc.keepalive_permit_without_calls", 1),
        )
        self._server = grpc.server(ThreadPoolExecutor(THREADS), options=options)
        methods = ("about", "open", "feedback", "batch", "validation", "close")
        handlers = {name: self._handler(name) for name in methods}
        generic = grpc.method_handlers_generic_handler(protocol.SERVICE, handlers)
        self._server.add_generic_rpc_handlers((generic,))
        try:
            self.port = self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {error}; choose a free --port"
            ) from None
        self._server.start()

    def progress(self) -> str:
        """Return a line on the traffic since the last call; "" if there was none."""
        self._worker.expire(IDLE)
        now = time.monotonic()
        with self._lock:
            seconds, self._since = now - self._since, now
            batches, size, self._batches, self._bytes = self._batches, self._bytes, 0, 0
            self._clients = {k: t for k, t in self._clients.items() if now - t < max(seconds, 60)}
            clients = len(self._clients)
        if not batches:
            return ""
        return (
            f"{clients} client{'s' if clients > 1 else ''}, {batches / seconds:.1f} batches/s, "
            f"{size / seconds / 2**20:.1f} MiB/s"
        )

    def stop(self) -> None:
        """Finish the requests in progress within GRACE seconds, and close the streams."""
        self._server.stop(GRACE).wait()
        self._worker.expire()

    def _handler(self, name: str) -> grpc.RpcMethodHandler:
        method = getattr(self._worker, name)

        def reply(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
            header, arrays = self._reply(method, request)
            for message in protocol.encode(header, arrays):
                yield message
                with self._lock:
                    self._bytes += len(message)
            with self._lock:
                self._batches += bool(arrays)

        return grpc.unary_stream_rpc_method_handler(reply)

    def _reply(self, method: Callable[[Mapping[str, Any]], Reply], request: bytes) -> Reply:
        """Return the reply, or a description of the error."""
        try:
            header = json.loads(request)
            self._worker.check(header)
            if "stream" in header and "client" in header:
                with self._lock:
                    self._clients[header["client"]] = time.monotonic()
            return method(header)
        except Exception as error:  # the trainer handles it
            kinds = (DataError, ConfigError)
            kind = next((k for k in kinds if isinstance(error, k)), type(error)).__name__
            print(f"{kind}: {error}", flush=True)
            return {"error": kind, "message": str(error)}, {}


def serve(config: Config, host: str, port: int) -> BatchServer:
    """Open the data of a config and serve them; raises the errors of `RldsSource`."""
    return BatchServer(config, RldsSource(config), host, port)
