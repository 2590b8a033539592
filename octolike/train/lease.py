"""One owner per run directory: a second start is refused while the first one lives.

workdir/owner.json holds host, pid and a counter that the owner increases every few seconds. A start
that finds the file watches the counter: if it moves, the owner is alive and the start is refused;
if it stands still, the owner has died (kill -9, a lost machine) and the start takes over. No clocks
are compared, so it also works between the machines of a shared file system and when a job is
requeued. Several processes of one run share the lease of the first.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from octolike import files
from octolike.errors import RunError
from octolike.train import sharding

FILE = "owner.json"
INTERVAL = 5.0  # seconds between heartbeats


class RunLease:
    """The right to write to a run directory; a context manager.

    Entering raises RunError if another process owns the directory. Leaving removes the file.
    """

    def __init__(self, workdir: files.PathLike, interval: float = INTERVAL) -> None:
        """Name the directory; interval: seconds between heartbeats."""
        self._path = files.as_path(workdir) / FILE
        self._interval, self._stop = interval, threading.Event()
        self._owner: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "token": uuid.uuid4().hex,
            "beat": 0,
        }
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> RunLease:
        owner = self._read()
        if owner and not self._is_dead(owner):
            self._watch(owner)
        self._write()
        time.sleep(min(self._interval / 10, 0.2))  # of two simultaneous starts the last one wins
        self.check()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        owner = self._read()
        if owner and owner.get("token") == self._owner["token"]:
            with contextlib.suppress(OSError):
                self._path.unlink()

    def check(self) -> None:
        """Raise RunError if another process has taken over, before something is written."""
        owner = self._read()
        if owner and owner.get("token") != self._owner["token"]:
            raise self._refusal(owner)

    def _is_dead(self, owner: dict[str, Any]) -> bool:
        """Return whether the owner was a process of this host that has ended."""
        if owner.get("host") != self._owner["host"] or owner.get("pid") == self._owner["pid"]:
            return False
        try:
            os.kill(int(owner["pid"]), 0)
        except (ProcessLookupError, KeyError, ValueError, TypeError):
            return True
        except OSError:  # the process of another user
            pass
        return False

    def _watch(self, owner: dict[str, Any]) -> None:
        """Return if the owner's counter stands still; raise RunError if it moves."""
        seconds = 3 * self._interval
        print(
            f"{self._path.parent} has an owner, process {owner.get('pid')} on "
            f"{owner.get('host')}; watching for up to {seconds:.0f} s whether it is alive",
            flush=True,
        )
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(self._interval / 5)
            current = self._read()
            if current is None:  # it has ended in the meantime
                return
            if current != owner:
                raise self._refusal(current)
        print(f"its process does not respond; taking over {self._path.parent}", flush=True)

    def _refusal(self, owner: dict[str, Any]) -> RunError:
        return RunError(
            f"{self._path.parent} belongs to a running process, {owner.get('pid')} on "
            f"{owner.get('host')}; stop it, or name another directory (--config.workdir=...)"
        )

    def _beat(self) -> None:
        while not self._stop.wait(self._interval):
            owner = self._read()
            if owner and owner.get("token") != self._owner["token"]:
                return  # taken over while this process was suspended: `check` reports it
            self._owner["beat"] += 1
            with contextlib.suppress(OSError):  # a full disk: the next beat may succeed
                self._write()

    def _read(self) -> dict[str, Any] | None:
        """Return the owner that the file names; None without one, or if it cannot be read."""
        try:
            owner = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return None
        return owner if isinstance(owner, dict) else None

    def _write(self) -> None:
        files.write_json(self._path, self._owner)


@contextlib.contextmanager
def own_run(workdir: files.PathLike) -> Iterator[RunLease | None]:
    """Own a run directory: yield the lease in the first process of a run, None in the others."""
    if not sharding.is_first():
        yield None
        return
    with RunLease(workdir) as lease:
        yield lease
