"""Printed texts cannot control the terminal; errors that repeat another are not printed."""

import io
import sys

import pytest

from octolike import terminal


def prepare(monkeypatch):
    """Return the stream that stdout and stderr write to after `terminal.prepare`."""
    stream = io.StringIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream)
    for name in ("excepthook", "unraisablehook"):
        monkeypatch.setattr(sys, name, getattr(sys, f"__{name}__"))
    terminal.prepare()
    terminal.prepare()  # does nothing
    return stream


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x9b2J\x7f\x00", "\\x9b2J\\x7f\\x00"),
        ("red \u202eeulb", "red \\u202eeulb"),
        ("a\tb\r\nc é 杯 🤖", "a\tb\r\nc é 杯 🤖"),
        ("\x1b[A\x1b[A", "\x1b[A\x1b[A"),  # a progress bar goes back to its line
        ("\x1b[A\x1b[2J", "\\x1b[A\\x1b[2J"),
    ],
)
def test_control_characters_are_written_as_text(monkeypatch, text, shown):
    stream = prepare(monkeypatch)
    print(text, end="")
    sys.stderr.writelines([text])
    assert stream.getvalue() == 2 * shown


def test_the_stream_keeps_its_other_attributes(monkeypatch):
    prepare(monkeypatch)
    assert not sys.stdout.isatty()
    assert sys.stdout.write("\x1b[2J") == 4
    sys.stdout.flush()


@pytest.mark.parametrize(
    ("error", "count"), [(RuntimeError("Event loop is closed"), 0), (RuntimeError("else"), 1)]
)
def test_an_error_of_a_closed_event_loop_is_not_printed(monkeypatch, error, count):
    """The storage library prints one per file, next to the error that the save reports."""
    stream = prepare(monkeypatch)
    sys.excepthook(type(error), error, None)
    assert stream.getvalue().count("RuntimeError") == count
