"""SendGuard: ends a connection whose other side does not take a message in time.

One thread guards all messages of a process: a timer per message would start a thread per message.
Timeouts of the socket do not suffice: `SO_SNDTIMEO` limits a system call, of which a message that
is read slowly needs many, and under TLS Python repeats a call that ended by it forever;
`settimeout` would also limit the thread that waits for replies.
"""

from __future__ import annotations

import contextlib
import math
import socket as sockets
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple


class Message(NamedTuple):
    """A message that is sent; deadline: of `time.monotonic`; is_late: set when it has passed."""

    socket: sockets.socket
    deadline: float
    is_late: threading.Event


class SendGuard:
    """Shuts sockets down whose message is late. Its thread starts with the first message."""

    def __init__(self) -> None:
        self._messages: set[Message] = set()
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None
        self._wakes = math.inf  # when the thread looks at the messages again

    @contextlib.contextmanager
    def limit(self, socket: sockets.socket, seconds: float) -> Iterator[None]:
        """Send within the block; TimeoutError if it takes longer.

        Any OSError, or what a library makes of it, within the block counts as late after that time.
        """
        message = Message(socket, time.monotonic() + seconds, threading.Event())
        with self._condition:
            if self._thread is None or not self._thread.is_alive():  # none, or lost by a fork
                self._messages, self._wakes = {message}, message.deadline
                self._thread = threading.Thread(target=self._watch, daemon=True, name="SendGuard")
                self._thread.start()
            self._messages.add(message)
            if message.deadline < self._wakes:
                self._wakes = message.deadline
                self._condition.notify()
        try:
            yield
        except Exception as error:
            if message.is_late.is_set():
                raise TimeoutError("the other side does not read") from error
            raise
        finally:
            with self._condition:
                self._messages.discard(message)

    def _watch(self) -> None:
        with self._condition:
            while True:
                now = time.monotonic()
                for message in [m for m in self._messages if m.deadline <= now]:
                    self._messages.discard(message)
                    message.is_late.set()
                    with contextlib.suppress(OSError):
                        message.socket.shutdown(sockets.SHUT_RDWR)
                self._wakes = min((m.deadline for m in self._messages), default=math.inf)
                self._condition.wait(None if self._wakes == math.inf else self._wakes - now)
