"""What trainer and worker say to each other: how bytes are laid out, what must be equal on both.

Requests are JSON. A reply is one stream of bytes, in messages of at most `CHUNK` bytes, so that no
batch is too large for it:

    8 bytes: length of the header | header: JSON | the arrays' bytes, one after the other

The header's "arrays" says {dotted path: [dtype, shape]} in their order. Nothing is pickled, and
nothing is executed. numpy alone; neither grpc nor tensorflow.
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
CHUNK = 1 << 20  # bytes; gRPC refuses messages of more than 4 MiB unless told otherwise
# A dead machine closes no connection: it is noticed by the pings that it does not answer.
PING_MS, PONG_MS = 10_000, 10_000
OPTIONS = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))

# Of config.data, what may differ between machines: where the data lie and how fast they are read.
# data.memory and data.prefetch may not: they bound the pools in which frames are mixed.
LOCAL = ("service", "root", "roots", "cache", "threads")


def settings(config: Config) -> dict[str, Any]:
    """Return {dotted option: value} of all that the batches depend on, as JSON data."""
    data = dataclasses.asdict(config.data)
    found = {f"data.{k}": v for k, v in data.items() if k not in LOCAL}
    found |= {"seed": config.seed, "train.validation_batches": config.train.validation_batches}
    return json.loads(json.dumps(found))


def digest(value: Any) -> str:
    """Return a digest of JSON data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def encode(
    header: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None
) -> Iterator[bytes]:
    """Yield the messages of a reply."""
    arrays = {k: np.ascontiguousarray(x) for k, x in (arrays or {}).items()}
    layout = {k: [x.dtype.str, list(x.shape)] for k, x in arrays.items()}
    text = json.dumps({**header, "arrays": layout}).encode()
    parts = [len(text).to_bytes(8, "little") + text]
    parts += [x.reshape(-1).view(np.uint8) for x in arrays.values() if x.size]
    for part in map(memoryview, parts):
        for begin in range(0, len(part), CHUNK):
            yield bytes(part[begin : begin + CHUNK])


def decode(
    messages: Iterable[bytes], place: Callable[[str, str, tuple[int, ...]], np.ndarray]
) -> dict[str, Any]:
    """Return the header of a reply, once its arrays are written where `place` says.

    place: (dotted path, dtype, shape) -> a contiguous array of just that dtype and shape.
    EOFError where the messages end too early.
    """
    stream = _ByteStream(messages)
    length = np.empty(8, np.uint8)
    stream.read(length)
    text = np.empty(int.from_bytes(length.tobytes(), "little"), np.uint8)
    stream.read(text)
    header = json.loads(text.tobytes())
    for path, (dtype, shape) in header.pop("arrays").items():
        stream.read(place(path, dtype, tuple(shape)).reshape(-1).view(np.uint8))
    return header


class _ByteStream:
    """Messages as one stream of bytes."""

    def __init__(self, messages: Iterable[bytes]) -> None:
        self._messages, self._rest = iter(messages), np.empty(0, np.uint8)

    def read(self, target: np.ndarray) -> None:
        """Fill uint8 [n]."""
        done = 0
        while done < len(target):
            if not len(self._rest):
                message = next(self._messages, None)
                if message is None:
                    raise EOFError(f"the reply ends {len(target) - done} bytes too early")
                self._rest = np.frombuffer(message, np.uint8)
            piece = self._rest[: len(target) - done]
            target[done : done + len(piece)] = piece
            done, self._rest = done + len(piece), self._rest[len(piece) :]
