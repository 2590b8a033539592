"""The terminal of a command: Ctrl-C is never lost, and printed texts cannot control it.

A KeyboardInterrupt that is raised in a callback of the garbage collector (JAX has one) or in a
finaliser is printed as "Exception ignored in ...", and the program continues. A Ctrl-C that arrives
during a long call into C, such as an import, often lands there, since the callback is the first
Python code after the call.

Names and instructions of datasets, runs and clients may hold escape sequences, which move the
cursor, rename the window or answer with input.
"""

from __future__ import annotations

import re
import signal
import sys
import threading
import warnings
from typing import Any, TextIO

DELAY = 0.05  # seconds; the callback has ended by then, or the next attempt comes later

# Control characters but for tab, line feed and carriage return, which progress bars print; and
# those that reverse the direction of text.
_CONTROL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)
_CURSOR_UP = "\x1b[A"  # of tqdm, for a second progress bar


def prepare() -> None:
    """Prepare this process for a command; a second call does nothing."""
    global _previous, _previous_excepthook
    if sys.unraisablehook is not _raise_again:
        _previous, sys.unraisablehook = sys.unraisablehook, _raise_again
    if sys.excepthook is not _report:
        _previous_excepthook, sys.excepthook = sys.excepthook, _report
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, PlainStream):
            setattr(sys, name, PlainStream(stream))


def escape(text: str) -> str:
    """Return a text with its control characters written as Python writes them."""
    if not text.replace(_CURSOR_UP, ""):
        return text
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


class PlainStream:
    """A text stream that writes control characters as readable text; else like the original."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write an escaped text; return its length before that."""
        self._stream.write(escape(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write escaped texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_previous, _previous_excepthook = sys.unraisablehook, sys.excepthook


_has_echoed = False  # the first error of a closed event loop has been printed


def _is_echo(error: BaseException | None) -> bool:
    """Return whether an error is one of an event loop that another error has closed.

    If files can no longer be opened, each of the storage library's callbacks would print a
    traceback, next to the error that the save reports. One line stands for all of them.
    """
    global _has_echoed
    texts = ("Event loop is closed", "'_UnixSelectorEventLoop' object has no attribute '_ssock'")
    if not (isinstance(error, (RuntimeError, AttributeError)) and str(error) in texts):
        return False
    if not _has_echoed:
        name = type(error).__name__
        print(
            f"{name}: {error}; more errors of closed event loops are not printed", file=sys.stderr
        )
        # its coroutines, too, each end with a line
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    _has_echoed = True
    return True


def _report(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if not _is_echo(error):
        _previous_excepthook(kind, error, trace)


def _raise_again(unraisable: sys.UnraisableHookArgs) -> None:
    if _is_echo(unraisable.exc_value):
        return
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        _previous(unraisable)
        return
    # A real signal: `_thread.interrupt_main` would not end a wait for a file or for time.
    main = threading.main_thread().ident
    timer = threading.Timer(DELAY, signal.pthread_kill, (main, signal.SIGINT))
    timer.daemon = True
    timer.start()
