"""One process makes an index, others wait for its file: a lock file with a heartbeat.

The lock file names its owner (octolike.owner_file). A process that finds it waits until the file or
its owner is gone. Should two processes make the same index all the same, both write the same file.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import TypeVar

from octolike.owner_file import OwnerFile

INTERVAL = 3.0  # seconds between heartbeats
POLL = 0.5  # seconds between looks at a lock
PATIENCE = 6  # intervals without a beat after which an owner elsewhere is dead
_Value = TypeVar("_Value")


def make_once(
    path: str, load: Callable[[], _Value | None], make: Callable[[], _Value], title: str
) -> _Value:
    """Return load() or, in one process at a time, make().

    path: the lock file, in a directory that can be written; load: returns None until the result of
    `make` is stored; title: name of the result, for messages.
    """
    waiting = False
    while True:
        lock, owner = OwnerFile(path, INTERVAL), None
        with contextlib.suppress(Exception):  # nothing can be written: every process computes
            owner = lock.acquire()
        if owner is None:
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
        while (living := lock.watch(owner, PATIENCE * INTERVAL, POLL)) is not None:
            owner = living
        value = load()
        if value is not None:
            return value
