"""Progress of a long loop: a tqdm bar on a terminal, plain lines in a log.

    with progress("demonstrations", total=1000, unit="episodes", initial=200) as bar:
        for episode in episodes:
            bar.update()

A log gets a line every 10 seconds or every 10 %, whichever comes first, and one at the end:

    demonstrations: 320/1000 episodes (32 %), 4 episodes/s, 0:02:50 left
"""

from __future__ import annotations

import datetime
import sys
import threading
import time
from typing import Any, TextIO

INTERVAL = 10.0  # seconds between two lines in a log
SHARE = 0.1  # of the total between two lines


def progress(
    name: str,
    total: int | None = None,
    unit: str = "steps",
    initial: int = 0,
    *,
    file: TextIO | None = None,
) -> TerminalBar | LogLines:
    """Return a context manager with `update`, `note`, `write` and `close`.

    `update` may be called from any thread.

    Args:
        name: shown in front of the count.
        total: the final count; None if unknown.
        unit: plural noun of the items counted.
        initial: items that an earlier run has done; they do not enter the rate.
        file: default stderr.
    """
    file = file or sys.stderr
    kind = TerminalBar if file.isatty() else LogLines
    return kind(name, total, unit, initial, file)


class _Progress:
    """Closes itself at the end of a `with` block."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Finish; a second call does nothing."""
        raise NotImplementedError


class TerminalBar(_Progress):
    """A tqdm bar; it stays hidden if nothing is left to do."""

    def __init__(self, name: str, total: int | None, unit: str, initial: int, file: TextIO) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            desc=name,
            total=total,
            unit=f" {unit}",
            initial=initial,
            file=file,
            disable=total is not None and initial >= total,
            dynamic_ncols=True,
        )
        self._lock = threading.Lock()

    def update(self, count: int = 1) -> None:
        """Count finished items."""
        with self._lock:
            self._bar.update(count)

    def note(self, text: str) -> None:
        """Show a text after the bar until the next note."""
        self._bar.set_postfix_str(text)

    def write(self, text: str) -> None:
        """Print a line to stdout above the bar."""
        self._bar.write(text)

    def close(self) -> None:
        """Leave the bar as it is; a second call does nothing."""
        self._bar.close()


class LogLines(_Progress):
    """Plain lines with count, rate and time left; none if nothing is left to do."""

    def __init__(self, name: str, total: int | None, unit: str, initial: int, file: TextIO) -> None:
        self._name, self._total, self._unit, self._file = name, total, unit, file
        self._initial = self._count = self._printed_count = initial
        self._start = self._printed_time = time.monotonic()
        self._note, self._lock = "", threading.Lock()

    def update(self, count: int = 1) -> None:
        """Count finished items; print a line if one is due."""
        with self._lock:
            self._count += count
            late = time.monotonic() - self._printed_time >= INTERVAL
            advance = self._count - self._printed_count
            if late or (self._total and advance >= SHARE * self._total):
                self._print()

    def note(self, text: str) -> None:
        """Append a text to the coming lines until the next note."""
        self._note = text

    def write(self, text: str) -> None:
        """Print a line to stdout."""
        print(text, flush=True)

    def close(self) -> None:
        """Print the final count if no line had it; a second call does nothing."""
        if self._count != self._printed_count:
            self._print()

    def _print(self) -> None:
        self._printed_count, self._printed_time = self._count, time.monotonic()
        print(f"{self._name}: {self._line()}", file=self._file, flush=True)

    def _line(self) -> str:
        rate = (self._count - self._initial) / max(time.monotonic() - self._start, 1e-9)
        parts = [f"{self._count} {self._unit}", f"{rate:.3g} {self._unit}/s"]
        if self._total:
            share = round(100 * self._count / self._total)
            parts[0] = f"{self._count}/{self._total} {self._unit} ({share} %)"
            seconds = round((self._total - self._count) / max(rate, 1e-9))
            parts.append(f"{datetime.timedelta(seconds=max(seconds, 0))} left")
        return ", ".join(parts + [self._note] * bool(self._note))
