"""Options and components: how they are declared, checked and built."""

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import Any

from octolike.errors import ConfigError


class Component(dict):
    """One choice out of an open set: {"kind": name, field: value, ...}.

    Fields are checked when the component is built (`build_component`), by the table that knows
    them.
    """

    def __missing__(self, key: str) -> object:
        # The command line may set a field that the config file leaves at its default: config_flags
        # asks for the present value to learn its type, and takes any literal for an `object`.
        return object()


def option(
    default: Any = dataclasses.MISSING,
    meaning: str = "",
    *,
    choices: tuple[Any, ...] = (),
    low: float | None = None,
    high: float | None = None,
    table: str = "",
) -> Any:
    """Return a dataclass field that carries its meaning and the values that it allows.

    Serves the schema and the components alike (linen modules too).

    Args:
        default: the value, or a function that makes it; without one the field is required.
        meaning: one line for `describe`.
        choices: the allowed values; () for any.
        low: the smallest number allowed.
        high: the largest number allowed.
        table: "module:TABLE" of the open set that a component in this field belongs to.
    """
    metadata = {"meaning": meaning, "choices": choices, "low": low, "high": high, "table": table}
    if default is dataclasses.MISSING:
        return field(metadata=metadata)
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def build_component(
    table: Mapping[str, Any], component: Mapping[str, Any], path: str, **context: Any
) -> Any:
    """Return table[kind](**fields, **context); `path` names the component in errors.

    The table's values are dataclasses (linen modules too). `context` holds fields that come from
    elsewhere (the batch spec, the language length) and that a component therefore must not set.
    Raises ConfigError for an unknown kind or field, with the choices.
    """
    fields = dict(component)
    kind = fields.pop("kind", None)
    if kind is None:
        raise ConfigError(f"{path} has no 'kind'; choose one of {listed(table)}")
    if kind not in table:
        raise ConfigError(unknown(f"kind at {path}", kind, table))
    known = {f.name for f in dataclasses.fields(table[kind])} - {"parent", "name"}
    for name in fields:
        if name in context:
            raise ConfigError(f"{path}.{name} is set by the rest of the config; remove it here")
        if name not in known:
            raise ConfigError(unknown(f"field of {path} ({kind!r})", name, known - context.keys()))
    for f in dataclasses.fields(table[kind]):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name in known - fields.keys() - context.keys():
            raise ConfigError(f"{path} ({kind!r}) lacks {f.name!r}, which has no default")
    return table[kind](**fields, **{k: v for k, v in context.items() if k in known | {"name"}})


def unknown(what: str, name: str, choices: Iterable[str]) -> str:
    """Return the sentence for a name that nobody knows: the nearest one, and the choices."""
    choices = sorted(choices)
    near = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {what}: {name!r}{hint} (choices: {listed(choices)})"


def check_types(node: Any, path: str) -> None:
    hints = typing.get_type_hints(type(node))
    for f in dataclasses.fields(node):
        value, hint, where = getattr(node, f.name), hints[f.name], f"{path}.{f.name}"
        if dataclasses.is_dataclass(hint):
            require(type(value) is hint, f"{where} is {value!r}; expected {hint.__name__}")
            check_types(value, where)
            continue
        expected = typing.get_origin(hint) or hint
        if expected is Component:
            expected = dict
        good = isinstance(value, expected) and not (expected is int and isinstance(value, bool))
        if expected is float:
            good = isinstance(value, (int, float)) and not isinstance(value, bool)
        require(good, f"{where} is {value!r}; expected {getattr(hint, '__name__', hint)}")


def choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(unknown(f"value of {name}", value, choices))


def require(good: bool, message: str) -> None:
    if not good:
        raise ConfigError(message)


def listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
