"""A list of everything that a config can hold: the options, and the kinds of each open set."""

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

from octolike.config.components import component_fields, default_of
from octolike.config.open_sets import OPEN_SETS
from octolike.config.schema import Config
from octolike.tables import markdown_table, text_table

HEADERS = ("option", "type", "default", "meaning")
FIELD_HEADERS = ("field", "type", "default", "meaning")


def describe(markdown: bool = False) -> str:
    """Return the options, then the kinds of each open set with their fields, as text or Markdown.

    Imports the modules that own the open sets.
    """
    table = markdown_table if markdown else text_table
    level = "#" * 2 if markdown else ""
    parts = []
    for section, doc, rows in _sections(Config(), ""):
        parts += [f"{level} {section}".strip(), doc, table(rows, HEADERS)]
    for name, open_set in OPEN_SETS.items():
        places = f"Components of `{open_set.table}`; plug-ins name this open set {name!r}."
        parts += [f"{level} {name}".strip(), places]
        for kind, cls in open_set.load().items():
            title = f"#{level} {kind}" if markdown else f"{name}: {kind}"
            rows = [
                _row(f, f.name) for f in component_fields(cls) if f.name not in open_set.derived
            ]
            parts += [title, _summary(cls).replace("\n", " ")]
            parts += [table(rows, FIELD_HEADERS)] if rows else []
    return "\n\n".join(parts) + "\n"


def _summary(cls: type) -> str:
    """Return the first paragraph of a class's docstring."""
    return (inspect.getdoc(cls) or "").partition("\n\n")[0]


def _sections(node: Any, prefix: str) -> Iterator[tuple[str, str, list[tuple[str, ...]]]]:
    """Yield (name, docstring, rows) of each section of the schema."""
    fields = dataclasses.fields(node)
    leaves = [f for f in fields if not dataclasses.is_dataclass(f.type)]
    yield (
        f"config.{prefix}".rstrip("."),
        _summary(type(node)),
        [_row(f, f"{prefix}{f.name}") for f in leaves],
    )
    for f in fields:
        if dataclasses.is_dataclass(f.type):
            yield from _sections(getattr(node, f.name), f"{prefix}{f.name}.")


def _row(f: dataclasses.Field, name: str) -> tuple[str, ...]:
    default, meaning = default_of(f), f.metadata.get("meaning", "")
    choices, table = f.metadata.get("choices"), f.metadata.get("table")
    notes = [
        meaning,
        "choices: " + ", ".join(repr(c) for c in choices) if choices else "",
        _bounds(f.metadata.get("low"), f.metadata.get("high")),
        *(f"a component: {s}" for s, o in OPEN_SETS.items() if o.table == table),
    ]
    kind = f.type if isinstance(f.type, str) else getattr(f.type, "__name__", str(f.type))
    if not isinstance(f.type, str) and getattr(f.type, "__args__", None):
        kind = str(f.type).replace("octolike.config.components.", "")
    text = "required" if default is dataclasses.MISSING else repr(default)
    return name, kind, text, "; ".join(n for n in notes if n)


def _bounds(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return ""
    if high is None:
        return f"at least {low:g}"
    return f"at most {high:g}" if low is None else f"{low:g} to {high:g}"
