"""OwnerFile: a file that names the process which owns something, with a heartbeat.

The file holds host, process and a counter that its owner increases every few seconds. Another
process that finds it watches the counter: if it moves, the owner lives; if it stands still, the
owner has died (kill -9, a lost machine). No clocks are compared and no file is locked, so it works
between the machines of a shared file system. Without watching, an owner counts as dead if it was a
process of this machine that has ended, or an earlier start of the same SLURM job. The file is
created by a hard link, which fails if it exists: of simultaneous starts one wins.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import socket
import tempfile
import threading
import time
import uuid
from typing import Any

from octolike import files

Owner = dict[str, Any]
SETTLE = 0.2  # seconds after which a writer that could not create a file looks who came last


class OwnerFile:
    """A file with the owner of something; this process may become it."""

    def __init__(self, path: files.PathLike, interval: float) -> None:
        """Name the file; interval: seconds between heartbeats."""
        self.path, self.interval = files.as_path(path), interval
        self._me: Owner = {**_process(), "token": uuid.uuid4().hex, "beat": 0}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def acquire(self) -> Owner | None:
        """Become the owner unless the file names one that may live; return that one, or None.

        Raises OSError, or another error of a bucket's file system, if the file cannot be written.
        """
        for _ in range(8):  # another process may come first, and end
            owner = self.read()
            if owner is not None and not self.has_ended(owner):
                return owner
            self._remove(owner)
            if self._create():
                self._thread.start()
                return None
        return self.read() or {}

    def release(self) -> None:
        """Stop the heartbeat, and remove the file if it names this process."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        owner = self.read()
        if owner is not None and self.is_mine(owner):
            self._unlink()

    def is_mine(self, owner: Owner) -> bool:
        """Return whether this object wrote the file."""
        return owner.get("token") == self._me["token"]

    def read(self) -> Owner | None:
        """Return the owner that the file names; None without one, or if it cannot be read."""
        try:
            owner = json.loads(files.read_text(self.path))
        except Exception:  # of any file system: missing, or another process writes it right now
            return None
        is_owner = isinstance(owner, dict) and {"host", "pid", "token"} <= owner.keys()
        return owner if is_owner and type(owner["pid"]) is int else None

    def has_ended(self, owner: Owner) -> bool:
        """Return whether an owner is known to be dead: no watching is needed."""
        me = self._me
        if owner.get("job") and owner["job"] == me["job"] and owner["restart"] != me["restart"]:
            return True  # SLURM ends a job before it starts it again
        if any(owner.get(key) != me[key] for key in ("host", "machine")):
            return False
        if owner["pid"] == me["pid"]:
            return owner.get("started") != me["started"]
        return _start_of(owner["pid"]) not in (owner.get("started"), "unknown")

    def watch(self, owner: Owner, seconds: float, poll: float) -> Owner | None:
        """Watch an owner; return it as soon as its counter moves, None once it is gone or dead.

        seconds: without a beat, after which it is dead; its file is then removed.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(poll)
            self._refresh()
            current = self.read()
            if current is None or current["token"] != owner["token"]:
                return None
            if current != owner:
                return current
            if self.has_ended(owner):
                break
        self._remove(owner)
        return None

    def _refresh(self) -> None:
        """Change the directory, so that a network file system drops its cached listing."""
        if files.is_remote(self.path):
            return
        with (
            contextlib.suppress(OSError),
            tempfile.NamedTemporaryFile(prefix=files.PART, dir=self.path.parent),
        ):
            pass

    def _remove(self, owner: Owner | None) -> None:
        """Remove the file if it still names a dead owner, or none."""
        if self.read() == owner:
            self._unlink()

    def _unlink(self) -> None:
        with contextlib.suppress(Exception):  # of any file system: missing, or read-only
            self.path.unlink()

    def _create(self) -> bool:
        """Write the file unless it exists; return whether it names this process."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if files.is_remote(self.path):
            self._write()
            time.sleep(SETTLE)
        else:
            with tempfile.NamedTemporaryFile(
                "w", prefix=files.PART, dir=self.path.parent, encoding="utf-8"
            ) as part:
                part.write(json.dumps(self._me))
                part.flush()
                try:
                    os.link(part.name, self.path)
                except FileExistsError:
                    pass  # NFS: also if the first answer was lost, so look at the owner
                except OSError:  # a file system without hard links
                    self._write()
                    time.sleep(SETTLE)
        owner = self.read()
        return owner is not None and self.is_mine(owner)

    def _write(self) -> None:
        files.write_json(self.path, self._me, indent=None)

    def _beat(self) -> None:
        while not self._stop.wait(self.interval):
            owner = self.read()
            if owner is not None and not self.is_mine(owner):
                return  # taken over while this process was suspended
            self._me["beat"] += 1
            with contextlib.suppress(Exception):  # a full disk: the next beat may succeed
                self._write()


def _process() -> Owner:
    """Return the identity of this process."""
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _start_of(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


@functools.cache
def _machine() -> str:
    """Return the boot and the process namespace, within which process numbers can be compared."""
    with contextlib.suppress(OSError):
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _start_of(pid: int) -> str:
    """Return when a process started, "" if it has ended, "unknown" if this cannot be found out."""
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text()
        fields = text.rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:  # the process of another user
        pass
    return "unknown"
