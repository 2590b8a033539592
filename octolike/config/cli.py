"""The command line of a config: config_flags, config arguments, and errors in one line.

--config configs/x.py:debug            an argument changes the structure (see `parse_arg`)
--config.optim.learning_rate=1e-4      a dotted override changes one value
"""

import dataclasses
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

from octolike.config.components import Component, unknown
from octolike.config.schema import Config
from octolike.errors import ConfigError


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


def run(main: Callable[[Config], Any]) -> None:
    """Run `main(config)` with the config of the command line: the one line under `__main__`.

    Exits with one line (no traceback) for a setting that nobody knows.
    """
    from absl import app, flags, logging
    from ml_collections import config_flags

    flag = config_flags.DEFINE_config_file(
        "config",
        help_string="path of a config file",
        lock_config=False,  # a component may get a field that it left at its default
        accept_new_attributes=True,
    )

    def parse(argv: list[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)
            if flag.value is None:
                raise ConfigError("no config given; try --config configs/quickstart.py")
            if len(rest) > 1:
                raise ConfigError(f"arguments that nobody reads: {' '.join(rest[1:])}")
            flag.value.check()
        except (KeyError, AttributeError, OSError, ValueError, TypeError, flags.Error) as error:
            sys.exit(f"error: {_explain(error, argv)}")
        return rest

    def start(_: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # libraries' notes would drown our own
        main(flag.value)

    app.run(start, flags_parser=parse)


def describe() -> str:
    """Return a table of every option: dotted path, default, meaning."""
    rows = [(p, repr(v), meaning) for p, v, meaning in _walk(Config(), "")]
    wide = max(len(r[0]) for r in rows), max(len(r[1]) for r in rows)
    return "\n".join(f"{p:<{wide[0]}}  {v:<{wide[1]}}  {m}" for p, v, m in rows)


def _explain(error: Exception, argv: list[str]) -> str:
    """Name the override that config_flags could not place, and its nearest neighbour."""
    for arg in argv:
        if not arg.lstrip("-").startswith("config."):
            continue
        path = arg.lstrip("-").partition("=")[0].partition(".")[2]
        node: Any = Config()
        for part in path.split("."):
            if isinstance(node, Component):
                break
            if dataclasses.is_dataclass(node):
                names = [f.name for f in dataclasses.fields(node)]
                if part not in names:
                    return unknown(f"setting --config.{path}", part, names)
                node = getattr(node, part)
            else:
                return f"unknown setting --config.{path}: this config has no {part!r} there"
    text = str(error).strip().splitlines()
    return text[-1] if text else repr(error)


def _walk(node: Any, prefix: str) -> Iterable[tuple[str, Any, str]]:
    for f in dataclasses.fields(node):
        value, path = getattr(node, f.name), f"{prefix}{f.name}"
        if dataclasses.is_dataclass(value):
            yield from _walk(value, path + ".")
        else:
            yield path, value, f.metadata["meaning"]


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
