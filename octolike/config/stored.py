"""config.json: a config as text and back.

A file since format 2 holds every value that the run used, and is read without today's defaults.
`upgrade` turns older formats into it.
"""

import dataclasses
import json
import os
import typing
from collections.abc import Sequence
from typing import Any

from octolike.config import plugins
from octolike.config.components import Component, as_component, check_fields, unknown
from octolike.config.open_sets import check_complete
from octolike.config.paths import resolved
from octolike.config.schema import Config
from octolike.config.upgrade import FORMAT, upgrade
from octolike.errors import ConfigError

CONFIG = "config.json"


def to_json(config: Any) -> str:
    """Return a config (or a part of one) as JSON text; of a config, its plug-ins' digests too."""
    data = dataclasses.asdict(config)
    if isinstance(config, Config):
        data = {"format": FORMAT, **data, "plugins": plugins.digests(config.plugins)}
    return json.dumps(data, indent=2) + "\n"


def from_json(text: str, source: str = CONFIG) -> Config:
    """Return the config of a config.json; `source` names the file in errors.

    Of plug-ins it has the names alone. Raises ConfigError for a format of a newer version, a name
    that is unknown and, since format 2, a value that is missing.
    """
    data = read_options(text, source)
    try:
        config = _from_dict(Config, data, "config")
        check_fields(config)
        # Kinds of plug-ins are known once those are loaded.
        check_complete(config, unknown_kinds=bool(config.plugins))
        config.check()
    except ConfigError as error:
        text = str(error).replace("\n", "\\n")  # of an unknown name in the file
        raise ConfigError(
            f"{source}: {text}; correct it, or restore the file that training wrote"
        ) from None
    return config


def read_options(text: str, source: str = CONFIG) -> dict[str, Any]:
    """Return the options of a config.json of any format as JSON values of the present format."""
    try:
        data = json.loads(text)
    except RecursionError:
        raise ConfigError(f"{source} is nested too deeply to be a config") from None
    except ValueError as error:  # of a number with thousands of digits, too
        raise ConfigError(f"{source} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{source} is {data!r:.100}; expected the options of a config")
    return upgrade(data, source)


def stored_config(run_dir: str | os.PathLike[str], plugin_files: Sequence[str] = ()) -> Config:
    """Return the config that a run was started with, its paths as seen from here.

    Raises ConfigError if the run does not exist. The result has no plug-ins, and its dataset specs
    are not executed (plugins.StoredFiles) unless plugin_files names them: the code of another run
    needs the user's consent.
    """
    from octolike import files  # which takes a moment to import

    path = files.as_path(run_dir) / CONFIG
    try:
        config = resolved(from_json(files.read_text(path), str(path)), run_dir)
    except OSError as error:
        raise ConfigError(f"{run_dir} is not a run directory: {error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    config.plugins = ()
    config.data.specs = plugins.approved(config.data.specs, plugin_files)
    return config


def _from_dict(cls: type, data: Any, path: str) -> Any:
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is {data!r:.100}; expected the options of {cls.__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in data:
        if name not in fields:
            raise ConfigError(unknown(f"option {path}.{name}", name, fields))
    for name in fields:
        if name not in data:
            raise ConfigError(f"{path}.{name} is missing")
    return cls(**{n: _convert(f.type, data[n], f"{path}.{n}") for n, f in fields.items()})


def _convert(hint: Any, value: Any, path: str) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _from_dict(hint, value, path)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and isinstance(value, (list, dict)):  # a dict: plug-ins and their digests
        return tuple(value)
    if hint is Component:
        return as_component(value)
    if origin is dict and args[1] is Component and isinstance(value, dict):
        return {k: as_component(v) for k, v in value.items()}
    return value
