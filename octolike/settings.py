"""How settings are declared, checked, read from JSON and looked up: octolike.config stands on it.

Import these names from octolike.config.
"""

# No `from __future__ import annotations`: config_flags reads the fields' types, not their names.
import dataclasses
import difflib
import importlib.util
import os
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import Any


class ConfigError(ValueError):
    """A setting that is unknown, of the wrong type, or at odds with another one."""


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

    Serves the schema and the components alike (linen modules too). A callable default is a
    factory; without a default the field is required.

    Args:
        default: the value or its factory.
        meaning: one phrase for the listing of all options.
        choices: the allowed values; () for any.
        low: inclusive lower bound of a number.
        high: inclusive upper bound of a number.
        table: "module:TABLE" of the open set that a component in this field is looked up in.
    """
    metadata = {"meaning": meaning, "choices": choices, "low": low, "high": high, "table": table}
    if default is dataclasses.MISSING:
        return field(metadata=metadata)
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def parse_arg(arg: str | None, **defaults: Any) -> types.SimpleNamespace:
    """Parse a config argument such as 'debug,head=l1' into the given names, typed as defaults.

    A bare word is a flag. Unknown names raise ConfigError with the choices.
    """
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        name, given, text = item.partition("=")
        if name not in defaults:
            raise ConfigError(unknown("config argument", name, defaults))
        values[name] = _parse_like(name, text if given else "true", defaults[name])
    return types.SimpleNamespace(**values)


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


def load_module(path: str, *, beside: str = "") -> types.ModuleType:
    """Return the module of a Python file; ConfigError where there is none or it does not run.

    beside: a file whose folder the path starts from.
    """
    path = os.path.join(os.path.dirname(beside), path)
    spec = importlib.util.spec_from_file_location(f"octolike_file_{abs(hash(path))}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}") from None
    except Exception as error:
        raise ConfigError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    return module


def unknown(what: str, name: str, choices: Iterable[str]) -> str:
    """Return the sentence for a name that nobody knows: the nearest one, and the choices."""
    choices = sorted(choices)
    near = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {what}: {name!r}{hint} (choices: {listed(choices)})"


def from_dict(cls: type, data: Any, path: str) -> Any:
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is {data!r}; expected the fields of {cls.__name__}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for name in data:
        if name not in names:
            raise ConfigError(unknown(f"setting {path}.{name}", name, names))
    return cls(**{n: _convert(hints[n], data[n], f"{path}.{n}") for n in names if n in data})


def _convert(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, path)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and isinstance(value, list):
        return tuple(value)
    if hint is Component:
        return _component(value)
    if origin is dict and args[1] is Component and isinstance(value, dict):
        return {k: _component(v) for k, v in value.items()}
    return value


def _component(value: Any) -> Any:
    """Undo what JSON does to a component: its tuples and the components inside it."""
    if isinstance(value, dict):
        return Component({k: _component(v) for k, v in value.items()})
    return tuple(map(_component, value)) if isinstance(value, list) else value


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


def _parse_like(name: str, text: str, default: Any) -> Any:
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise ConfigError(f"config argument {name}={text!r}: expected true or false")
        return text.lower() == "true"
    try:
        return type(default)(text)
    except ValueError as e:
        raise ConfigError(
            f"config argument {name}={text!r}: expected {type(default).__name__}"
        ) from e


def choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(unknown(f"value of {name}", value, choices))


def require(good: bool, message: str) -> None:
    if not good:
        raise ConfigError(message)


def listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
