"""A worker: makes batches for training processes on other machines, over gRPC.

    server = serve(config, "0.0.0.0", 7070)     scripts/serve_data.py
    server.stop()

    trainer 0 ── part 0 of 4 ── worker A         two training processes, two workers: each makes a
            └─── part 1 of 4 ── worker B         quarter of every batch, for `remote` to join
    trainer 1 ── part 2 of 4 ── worker A
            └─── part 3 of 4 ── worker B

A request names a part and the state that its batch comes after; a batch is a pure function of them,
so any worker can make any part at any time, and keeps nothing that must not be lost. It does keep
the stream that made the last batch of a part, which goes on to make the next ones ahead, and opens
a new one where a request does not follow it: after a restart, a resume, feedback, or in place of
another worker. Each stream holds episodes of its own, up to data.memory.

The connection is neither encrypted nor authenticated: for networks that are trusted. What arrives
is data alone, so that a stranger can ask for batches and slow the worker down, but run nothing.
"""

from __future__ import annotations

import itertools
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

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

IDLE = 600.0  # seconds after which a stream that nobody asked for is given up
THREADS = 64  # requests answered at a time
GRACE = 2.0  # seconds in which batches under way may still be sent when a server stops

Answer = tuple[dict[str, Any], dict[str, np.ndarray]]


@dataclass(eq=False)
class _WorkerStream:
    """A stream, and what the request that it answers next says of where it is."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    stream: Any = None
    position: Any = None
    used: float = math.inf

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()
        self.stream = self.position = None


class BatchWorker:
    """Answers requests from opened data; every method takes a header and returns an `Answer`."""

    def __init__(self, config: Config, data: RldsSource) -> None:
        self._data = data
        self.description = data.describe()
        self._validation = data.validation()
        robots = embodiments_to_json(data.embodiments)
        contents = data.contents() | {f"embodiment {r['name']}": protocol.digest(r) for r in robots}
        same = {
            "version": octolike.__version__,
            "settings": protocol.settings(config),
            "contents": contents | {"tensorflow": tf.__version__, "numpy": np.__version__},
            "spec": types.spec_to_json(data.spec),
            "embodiments": robots,
            "names": {k: list(v) for k, v in data.names._asdict().items()},
            "shares": data.shares.tolist(),
            "validation": list(self._validation),
        }
        self._about = same | {"digest": protocol.digest(same), "description": self.description}
        self._streams: dict[tuple[Any, ...], _WorkerStream] = {}
        self._lock = threading.Lock()

    def about(self, header: Mapping[str, Any]) -> Answer:
        """Say what is served, and what must be equal for workers to be interchangeable."""
        return self._about, {}

    def open(self, header: Mapping[str, Any]) -> Answer:
        """Check a saved state (None: the beginning) and a part; return the state to ask with."""
        stream = self._data.train(header["state"], tuple(header["part"]))
        return {"state": stream.state()}, {}

    def feedback(self, header: Mapping[str, Any]) -> Answer:
        """Return a state with what feedback changes of it."""
        stream = self._data.train(header["state"], tuple(header["part"]))
        stream.feedback(header["datasets"], header["tasks"])
        return {"state": stream.state()}, {}

    def batch(self, header: Mapping[str, Any]) -> Answer:
        """Return the part of the training batch that comes after a state."""
        state, part = header["state"], tuple(header["part"])
        key = (header["stream"], *part)
        return {}, self._next(key, state, lambda: self._data.train(state, part))

    def validation(self, header: Mapping[str, Any]) -> Answer:
        """Return a dataset's validation batch of a number; "end" where there is none."""
        dataset, number = header["dataset"], header["number"]
        make = lambda: _CountedBatches(self._validation[dataset](), number)
        leaves = self._next((header["stream"], dataset), number, make)
        return {"end": not leaves}, leaves

    def close(self, header: Mapping[str, Any]) -> Answer:
        """Give up the streams of a name."""
        self._give_up(lambda key, live: key[0] == header["stream"])
        return {}, {}

    def expire(self, idle: float = 0.0) -> None:
        """Give up the streams that nobody has asked for in so many seconds."""
        before = time.monotonic() - idle
        self._give_up(lambda key, live: live.used <= before)

    def check(self, header: Mapping[str, Any]) -> None:
        """Raise RuntimeError if the trainer expects another worker than this one."""
        if header.get("digest", self._about["digest"]) != self._about["digest"]:
            raise RuntimeError("it was started again, with other settings or data")

    def _next(
        self, key: tuple[Any, ...], position: Any, make: Callable[[], Any]
    ) -> dict[str, np.ndarray]:
        """Return the leaves of a stream's next batch, {} after the last one."""
        with self._lock:
            live = self._streams.setdefault(key, _WorkerStream())
        with live.lock:
            live.used = math.inf
            try:
                if live.stream is None or live.position != position:
                    live.close()
                    live.stream = make()
                batch = next(live.stream, {})
                # as it comes back in the next request
                live.position = json.loads(json.dumps(live.stream.state()))
            except BaseException:
                live.close()
                raise
            finally:
                live.used = time.monotonic()
        return dict(types.flatten(batch))

    def _give_up(self, chosen: Callable[[tuple[Any, ...], _WorkerStream], bool]) -> None:
        with self._lock:
            keys = [key for key, live in self._streams.items() if chosen(key, live)]
            gone = [self._streams.pop(key) for key in keys]
        for live in gone:
            with live.lock:
                live.close()


class _CountedBatches(Iterator[types.Batch]):
    """Finite batches from a number on, which are counted."""

    def __init__(self, batches: Iterator[types.Batch], start: int) -> None:
        self._batches, self._number = batches, start
        for _ in itertools.islice(batches, start):
            pass

    def __next__(self) -> types.Batch:
        batch = next(self._batches)
        self._number += 1
        return batch

    def state(self) -> int:
        """Return how many batches there have been."""
        return self._number

    def close(self) -> None:
        """Make no more batches."""
        self._batches.close()


class BatchServer:
    """A worker that listens. port: where; description: of the data."""

    def __init__(self, config: Config, data: RldsSource, host: str, port: int) -> None:
        """Listen; port 0: any that is free. ConfigError where the port cannot be had."""
        self._worker, self._seen, self._lock = BatchWorker(config, data), {}, threading.Lock()
        self.description = self._worker.description
        self._batches, self._bytes, self._since = 0, 0, time.monotonic()
        options = (
            *protocol.OPTIONS,
            ("grpc.so_reuseport", 0),  # else a second worker would share the port unnoticed
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
                f"nothing can listen on {host}:{port}: {error}; choose a free --port"
            ) from None
        self._server.start()

    def progress(self) -> str:
        """Return a line on what was served since the last call; "" for nothing."""
        self._worker.expire(IDLE)
        now = time.monotonic()
        with self._lock:
            seconds, self._since = now - self._since, now
            batches, size, self._batches, self._bytes = self._batches, self._bytes, 0, 0
            self._seen = {k: t for k, t in self._seen.items() if now - t < max(seconds, 60)}
            clients = len(self._seen)
        if not batches:
            return ""
        return (
            f"{clients} client{'s' if clients > 1 else ''}, {batches / seconds:.1f} batches/s, "
            f"{size / seconds / 2**20:.1f} MiB/s"
        )

    def stop(self) -> None:
        """Take no more requests, finish those under way or give them up, close the streams."""
        self._server.stop(GRACE).wait()
        self._worker.expire()

    def _handler(self, name: str) -> grpc.RpcMethodHandler:
        method = getattr(self._worker, name)

        def reply(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
            header, arrays = self._answer(method, request)
            for message in protocol.encode(header, arrays):
                yield message
                with self._lock:
                    self._bytes += len(message)
            with self._lock:
                self._batches += bool(arrays)

        return grpc.unary_stream_rpc_method_handler(reply)

    def _answer(self, method: Callable[[Mapping[str, Any]], Answer], request: bytes) -> Answer:
        """Return the answer, or in its place what went wrong."""
        try:
            header = json.loads(request)
            self._worker.check(header)
            if "stream" in header and "client" in header:
                with self._lock:
                    self._seen[header["client"]] = time.monotonic()
            return method(header)
        except Exception as error:  # the trainer decides what to do about it
            kinds = (DataError, ConfigError)
            kind = next((k for k in kinds if isinstance(error, k)), type(error)).__name__
            print(f"{kind}: {error}", flush=True)
            return {"error": kind, "message": str(error)}, {}


def serve(config: Config, host: str, port: int) -> BatchServer:
    """Open the data of a config and serve them; ConfigError or DataError as `RldsSource`."""
    return BatchServer(config, RldsSource(config), host, port)
