"""One process makes an index, others wait for its file: a lock file with a heartbeat.

The file holds host, process and a counter that its owner increases every few seconds. A process
that finds it waits until the file or its owner is gone. The owner is dead if its process has ended
on this host, or if the counter stands still; no clocks are compared. Should two processes make the
same index all the same, both write the same file.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

from octolike import files

INTERVAL = 3.0  # seconds between heartbeats
POLL = 0.5  # seconds between looks at a lock
_Value = TypeVar("_Value")


def make_once(
    path: str, load: Callable[[], _Value | None], make: Callable[[], _Value], title: str
) -> _Value:
    """Return load() or, in one process at a time, make().

    path: of the lock file, in a directory that can be written; load: returns None until the result
    of `make` is stored; title: of the result, for messages.
    """
    waiting = False
    while True:
        lock = PassLock(path)
        if (owner := lock.acquire()) is None:
            try:
                value = load()
                return make() if value is None else value
            finally:
                lock.release()
        if not waiting:
            print(
                f"{title}: process {owner.get('pid')} on {owner.get('host')} computes them; "
                "waiting for its file",
                file=sys.stderr,
            )
            waiting = True
        lock.wait(owner)
        value = load()
        if value is not None:
            return value


class PassLock:
    """A lock file."""

    def __init__(self, path: str) -> None:
        self._path = files.as_path(path)
        self._stop = threading.Event()
        self._me: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "token": uuid.uuid4().hex,
            "beat": 0,
        }
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def acquire(self) -> dict[str, Any] | None:
        """Return None if this process owns the lock now, else the living owner."""
        owner = self._read()
        if owner is not None and not self._has_ended(owner):
            return owner
        with contextlib.suppress(OSError):  # nothing can be written: every process computes
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._write()
            time.sleep(POLL / 2)  # of simultaneous writers, the last one wins
            owner = self._read()
            if owner is not None and owner["token"] != self._me["token"]:
                return owner
            self._thread.start()
        return None

    def wait(self, owner: dict[str, Any]) -> None:
        """Return when the lock or its owner is gone, and remove the lock of a dead owner."""
        changed = time.monotonic()
        while True:
            time.sleep(POLL)
            current = self._read()
            if current is None or current["token"] != owner["token"]:
                return
            if current != owner:
                owner, changed = current, time.monotonic()
            if self._has_ended(owner) or time.monotonic() - changed > 4 * INTERVAL:
                with contextlib.suppress(OSError):
                    self._path.unlink()
                return

    def release(self) -> None:
        """Stop the heartbeat and remove the file, if it is still this process's own."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        owner = self._read()
        if owner is not None and owner["token"] == self._me["token"]:
            with contextlib.suppress(OSError):
                self._path.unlink()

    def _has_ended(self, owner: dict[str, Any]) -> bool:
        """Return whether the owner was a process of this host that has ended."""
        if owner["host"] != self._me["host"] or owner["pid"] == self._me["pid"]:
            return False
        try:
            os.kill(owner["pid"], 0)
        except ProcessLookupError:
            return True
        except OSError:  # the process of another user
            pass
        return False

    def _beat(self) -> None:
        while not self._stop.wait(INTERVAL):
            owner = self._read()
            if owner is not None and owner["token"] != self._me["token"]:
                return  # taken over while this process was suspended
            self._me["beat"] += 1
            with contextlib.suppress(OSError):
                self._write()

    def _read(self) -> dict[str, Any] | None:
        """Return the owner that the file names; None without one."""
        try:
            owner = json.loads(self._path.read_text())
            return owner if {"host", "pid", "token"} <= owner.keys() else None
        except Exception:  # of any file system: missing, or another process writes it right now
            return None

    def _write(self) -> None:
        files.write_json(self._path, self._me, indent=None)
