"""config.json: a config as text and back."""

import dataclasses
import json
import os
import typing
from typing import Any

from octolike.config.components import Component, unknown
from octolike.config.paths import resolved
from octolike.config.schema import Config
from octolike.config.upgrade import rename_options
from octolike.errors import ConfigError


def to_json(config: Any) -> str:
    """Return a config (or a part of one) as JSON text."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
    """Return the Config that `to_json` wrote; unknown names raise ConfigError.

    A name that is missing, since an older version wrote the text, takes its default.
    """
    data = json.loads(text)
    return from_dict(Config, rename_options(data) if isinstance(data, dict) else data, "config")


def stored_config(run_dir: str | os.PathLike[str]) -> Config:
    """Return the config that a run was started with, its paths as seen from here.

    Raises ConfigError if there is no run.
    """
    from octolike import files  # imports more than the schema needs

    path = files.as_path(run_dir) / "config.json"
    try:
        return resolved(from_json(path.read_text(encoding="utf-8")), run_dir)
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{run_dir} is no run directory: {error}") from None


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
