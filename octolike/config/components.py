"""Options and components: how they are declared, checked and built."""

import dataclasses
import difflib
import numbers
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from typing import Any

from octolike.errors import ConfigError

MANY, NEAREST = 40, 8  # choices in an error: at most 40, or else the nearest 8


class Component(dict):
    """One choice out of an open set: {"kind": name, field: value, ...}.

    Fields are checked when the component is built (`build_component`) and when a config is
    completed (`resolve`), by the table that lists its kinds.
    """

    def __missing__(self, key: str) -> Any:
        raise MissingKeyError(unknown("key of a component", key, self))


class MissingKeyError(ConfigError, KeyError):
    """A component was asked for a field that it does not hold."""

    __str__ = ConfigError.__str__  # KeyError's puts quotes around the sentence


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

    For the schema and for components (linen modules too).

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

    The table's values are dataclasses (linen modules too). `context` holds the fields that the rest
    of the run determines (sizes of the batch, dtype) and that a component therefore must not set.
    Raises ConfigError for an unknown kind or field, a missing field, and a value that is of the
    wrong type or not allowed.
    """
    cls, fields = entry_of(table, component, path), dict(component)
    kind = fields.pop("kind")
    by_name = {f.name: f for f in component_fields(cls)}
    for name, value in fields.items():
        if name in context:
            raise ConfigError(f"{path}.{name} follows from the rest of the config; remove it here")
        if name not in by_name:
            names = by_name.keys() - context.keys()
            raise ConfigError(unknown(f"field of {path} ({kind!r})", name, names))
        check_value(by_name[name], value, f"{path}.{name}")
    for name, f in by_name.items():
        required = default_of(f) is dataclasses.MISSING
        if required and name not in fields and name not in context:
            raise ConfigError(f"{path} ({kind!r}) lacks {name!r}, which has no default")
    names = by_name.keys() | {"name"}
    return cls(**fields, **{k: v for k, v in context.items() if k in names})


def entry_of(table: Mapping[str, Any], component: Mapping[str, Any], path: str) -> Any:
    """Return the entry of a table that a component names; ConfigError for an unknown kind."""
    kind = component.get("kind")
    if kind is None:
        raise ConfigError(f"{path} has no 'kind'; choose one of {_listed(table)}")
    if kind not in table:
        raise ConfigError(unknown(f"kind at {path}", kind, table))
    return table[kind]


def as_component(value: Any) -> Any:
    """Return the value of a component's field with tuples for lists and Components for dicts."""
    if isinstance(value, Mapping):
        return Component({k: as_component(v) for k, v in value.items()})
    return tuple(map(as_component, value)) if isinstance(value, (list, tuple)) else value


def component_fields(cls: type) -> list[dataclasses.Field]:
    """Return the fields that a component of this class may set."""
    # linen modules have two fields of their own
    return [f for f in dataclasses.fields(cls) if f.init and f.name not in ("parent", "name")]


def default_of(f: dataclasses.Field) -> Any:
    """Return the default of a field; dataclasses.MISSING if it has none."""
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def check_fields(node: Any, path: str = "") -> None:
    """Raise ConfigError for the first option of a config (or a part of it) that is not allowed."""
    for f in dataclasses.fields(node):
        value, name = getattr(node, f.name), f"{path}{f.name}"
        if isinstance(f.type, type) and dataclasses.is_dataclass(f.type):
            require(type(value) is f.type, f"{name} is {value!r}; expected {f.type.__name__}")
            check_fields(value, f"{name}.")
        else:
            check_value(f, value, name)


def check_value(f: dataclasses.Field, value: Any, path: str) -> None:
    """Raise ConfigError, naming `path`, for a value that the field does not allow.

    Choices and bounds of a field that holds a tuple or dict apply to each of its values.
    """
    hint = field_type(f)
    if not _is_instance(value, hint):
        raise ConfigError(f"{path} is {value!r}; expected {getattr(hint, '__name__', hint)}")
    items = {path: value}
    if isinstance(value, Mapping):
        items = {f"{path}.{k}": v for k, v in value.items()}
    elif isinstance(value, (tuple, list)):
        items = {f"{path}[{i}]": v for i, v in enumerate(value)}
    choices, low, high = (f.metadata.get(key) for key in ("choices", "low", "high"))
    for name, item in items.items():
        if choices and item not in choices:
            raise ConfigError(unknown(f"value of {name}", item, choices))
        if isinstance(item, numbers.Real) and not _within(typing.cast(float, item), low, high):
            meaning = f.metadata.get("meaning")
            raise ConfigError(
                f"{name} is {item}; it must {_bounds(low, high)}"
                + (f" ({meaning})" * bool(meaning))
            )


def field_type(f: dataclasses.Field) -> Any:
    """Return the type of a field; Any if it is written with names that are not built in."""
    if not isinstance(f.type, str):
        return f.type
    try:
        return eval(f.type, {"Any": Any, "Mapping": Mapping, "Sequence": Sequence})
    except NameError:  # such as nn.Module: a component that is already built
        return Any


def _is_instance(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (types.UnionType, typing.Union):
        return any(_is_instance(value, arg) for arg in args)
    if origin in (int, float):
        number = numbers.Integral if origin is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    if origin in (tuple, Sequence):
        if not isinstance(value, (tuple, list)):
            return False
        if origin is Sequence or args[1:] == (...,):
            return all(_is_instance(x, arg) for x in value for arg in args[:1])
        return not args or (len(value) == len(args) and all(map(_is_instance, value, args)))
    if origin in (dict, Mapping, Component):  # a component that a config gives as a plain dict
        return isinstance(value, Mapping) and all(
            _is_instance(x, arg) for x in value.values() for arg in args[1:]
        )
    return isinstance(value, origin)


def _within(value: float, low: float | None, high: float | None) -> bool:
    # not `value < low`: NaN lies within no bounds
    return (low is None or value >= low) and (high is None or value <= high)


def _bounds(low: float | None, high: float | None) -> str:
    # an integer in full: 2^32 - 1 must not look like 2^32
    texts = [str(x) if isinstance(x, int) else f"{x:g}" for x in (low, high) if x is not None]
    if len(texts) == 2:
        return f"lie in [{', '.join(texts)}]"
    return f"be {'at least' if high is None else 'at most'} {texts[0]}"


def unknown(noun: str, name: Any, choices: Iterable[Any]) -> str:
    """Return the sentence for an unknown name: the nearest name, and the choices.

    Of more than `MANY` choices, only the nearest.
    """
    choices = sorted(map(str, choices))
    near = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    if len(choices) > MANY:
        nearest = difflib.get_close_matches(str(name), choices, n=NEAREST, cutoff=0)
        return f"unknown {noun}: {name!r}{hint} (nearest of {len(choices)}: {', '.join(nearest)})"
    return f"unknown {noun}: {name!r}{hint} (choices: {_listed(choices)})"


def require(good: bool, message: str) -> None:
    """Raise ConfigError unless `good`."""
    if not good:
        raise ConfigError(message)


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(sorted(map(str, names)))
