"""The protocol of trainer and worker: the byte layout, and the settings that both must share.

Requests are JSON. A reply is a stream of bytes in messages of at most `CHUNK` bytes, so its size is
unlimited:

    8 bytes: length of the header | header: JSON | bytes of the arrays, concatenated

The header's "arrays" is {dotted path: [dtype, shape]} in that order. Nothing is pickled or
executed. Imports numpy, but neither grpc nor tensorflow.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from octolike.config import Config

SERVICE = "octolike.Batches"
CHUNK = 1 << 20  # bytes; by default gRPC rejects messages of more than 4 MiB
# A dead machine does not close its connections; missing replies to pings reveal it.
PING_MS, PONG_MS = 10_000, 10_000
OPTIONS = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))

# Options of config.data that may differ between machines: the location of the data and the speed of
# reading. data.memory and data.prefetch may not: they bound the pools in which frames are shuffled.
LOCAL = ("service", "root", "roots", "cache", "threads")


def settings(config: Config) -> dict[str, Any]:
    """Return {dotted option: value} of the options that determine the batches, as JSON data."""
    data = dataclasses.asdict(config.data)
    options = {f"data.{k}": v for k, v in data.items() if k not in LOCAL}
    options |= {"seed": config.seed, "train.validation_batches": config.train.validation_batches}
    return json.loads(json.dumps(options))


def digest(value: Any) -> str:
    """Return a digest of JSON data that ignores the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def encode(
    header: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None
) -> Iterator[bytes]:
    """Yield the messages of a reply."""
    arrays = {k: np.ascontiguousarray(x) for k, x in (arrays or {}).items()}
    layout = {k: [x.dtype.str, list(x.shape)] for k, x in arrays.items()}
    text = json.dumps({**header, "arrays": layout}).encode()
    parts = [memoryview(len(text).to_bytes(8, "little") + text)]
    parts += [x.reshape(-1).view(np.uint8).data for x in arrays.values() if x.size]
    for part in parts:
        for begin in range(0, len(part), CHUNK):
            yield bytes(part[begin : begin + CHUNK])


def decode(
    messages: Iterable[bytes], allocate: Callable[[str, str, tuple[int, ...]], np.ndarray] | None
) -> dict[str, Any]:
    """Write the arrays of a reply and return its header.

    allocate: (dotted path, dtype, shape) -> a contiguous array of that dtype and shape to fill;
        None for a reply without arrays.
    Raises EOFError if the messages end early.
    """
    stream = _ByteStream(messages)
    length = np.empty(8, np.uint8)
    stream.read(length)
    text = np.empty(int.from_bytes(length.tobytes(), "little"), np.uint8)
    stream.read(text)
    header = json.loads(text.tobytes())
    for path, (dtype, shape) in header.pop("arrays").items():
        assert allocate is not None, f"a reply without arrays has {path}"
        stream.read(allocate(path, dtype, tuple(shape)).reshape(-1).view(np.uint8))
    return header


class _ByteStream:
    """Reads messages as one stream of bytes."""

    def __init__(self, messages: Iterable[bytes]) -> None:
        self._messages, self._buffer = iter(messages), np.empty(0, np.uint8)

    def read(self, target: np.ndarray) -> None:
        """Fill uint8 [n]; EOFError if the stream is too short."""
        count = 0
        while count < len(target):
            if not len(self._buffer):
                message = next(self._messages, None)
                if message is None:
                    raise EOFError(f"the reply ends {len(target) - count} bytes too early")
                self._buffer = np.frombuffer(message, np.uint8)
            piece = self._buffer[: len(target) - count]
            target[count : count + len(piece)] = piece
            count, self._buffer = count + len(piece), self._buffer[len(piece) :]
