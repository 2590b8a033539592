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
    ("error", "lines"), [(RuntimeError("Event loop is closed"), 1), (RuntimeError("else"), 3)]
)
def test_errors_of_closed_event_loops_are_one_line(monkeypatch, error, lines):
    """The storage library prints one per file, next to the error that the save reports."""
    monkeypatch.setattr(terminal, "_has_echoed", False)
    stream = prepare(monkeypatch)
    for _ in range(3):
        sys.excepthook(type(error), error, None)
    assert stream.getvalue().count("RuntimeError") == lines
    assert len(stream.getvalue().splitlines()) == lines
