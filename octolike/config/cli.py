"""The command line of a config: config_flags, config arguments, and errors in one line.

Two ways to change a config file's values:

    --config x:debug            an argument changes the structure (see `parse_arg`)
    --config.optim.learning_rate=1e-4      a dotted override changes one value

config_flags reads overrides of plain options. Those of dicts and components are read here, since a
component may get a field that the config file leaves at its default:

    --config.data.cameras.wrist=64  --config.data.cameras="{'primary': 64}"
    --config.model.heads.action.steps=20
"""

import ast
import dataclasses
import re
import signal
import sys
import traceback
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from octolike import terminal
from octolike.config import plugins
from octolike.config.components import Component, MissingKeyError, as_component, unknown
from octolike.config.python_files import shipped
from octolike.config.schema import Config
from octolike.errors import ConfigError

OVERRIDE = re.compile(r"--?config\.(?P<path>[^=]+)(=(?P<text>.*))?", re.DOTALL)
Overrides = list[tuple[str, str]]  # dotted path and text of the value


def parse_arg(arg: str | None, **defaults: Any) -> types.SimpleNamespace:
    """Parse a config argument such as 'debug,head=l1' into the given names, typed as defaults.

    A bare word is a flag. Unknown names raise ConfigError with the choices.
    """
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        name, equals, text = item.partition("=")
        if name not in defaults:
            raise ConfigError(unknown("config argument", name, defaults))
        place = f"config argument {name}={text!r}"
        values[name] = _parse_like(text if equals else "true", defaults[name], place)
    return types.SimpleNamespace(**values)


def run(main: Callable[[Config], Any]) -> None:
    """Run `main(config)` with the config of the command line: the one line under `__main__`.

    Loads the config's plug-ins. Exits with one line, without a traceback, for an option that is
    unknown or not allowed.
    """
    from absl import app, flags, logging
    from ml_collections import config_flags

    terminal.prepare()
    argv, overrides = split_overrides(sys.argv)
    flag = config_flags.DEFINE_config_file(
        "config", help_string="path of a config file", sys_argv=argv
    )

    def parse(argv: list[str]) -> list[str]:
        try:
            remaining = flags.FLAGS(argv)
            if flag.value is None:
                raise ConfigError("no config given; try --config quickstart")
            if len(remaining) > 1:
                raise ConfigError(f"unknown arguments: {' '.join(remaining[1:])}")
            for path, text in overrides:
                set_in_dict(flag.value, path, text)
            flag.value.check()
            plugins.load_of(flag.value)
        except (KeyError, AttributeError, OSError, ValueError, TypeError, flags.Error) as error:
            sys.exit(f"error: {_explain(error, argv)}")
        except Exception as error:  # of the code in a config file
            sys.exit(f"error: {_raised(error)}")
        return remaining

    def start(_: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # the libraries' notes would hide octolike's
        try:
            main(flag.value)
        except KeyboardInterrupt:  # a second one, while the first is being handled
            print("interrupted; what is on disk stays, and the same command resumes", flush=True)
            sys.exit(128 + signal.SIGINT)

    app.run(start, argv=argv, flags_parser=parse)


TRACEBACK = "Traceback"

# {config_flags' message for a value of the wrong type: a clearer sentence}
EXPECTED = {
    "invalid literal for int()": "expected a whole number",
    "could not convert string to float": "expected a number",
    "Non-boolean argument": "expected true or false",
}


def split_overrides(argv: list[str]) -> tuple[list[str], Overrides]:
    """Return the arguments for config_flags, and the overrides of dicts and components."""
    plain, overrides, items = argv[:1], [], iter(argv[1:])
    for item in items:
        match = OVERRIDE.fullmatch(item)
        if match and _container_of(match["path"].split(".")):
            text = match["text"] if match["text"] is not None else next(items, "")
            overrides.append((match["path"], text))
        else:
            plain.append(item)
    return plain, overrides


def set_in_dict(config: Config, path: str, text: str) -> None:
    """Set one value of a dict or component, or the whole of it, to a literal or plain text."""
    names, place = path.split("."), f"--config.{path}={text}"
    f, depth = typing.cast(tuple[dataclasses.Field, int], _container_of(names))
    section: Any = config
    for name in names[: depth - 1]:
        section = getattr(section, name)
    keys, node = names[depth:], getattr(section, f.name)
    if not keys:
        value = _parse_like(text, {}, place)
        if f.type is not Component and typing.get_args(f.type)[1] is Component:
            value = {k: as_component(v) for k, v in value.items()}
        setattr(section, f.name, as_component(value) if f.type is Component else value)
        return
    for key in keys[:-1]:
        if not isinstance(node, Mapping) or key not in node:
            raise ConfigError(f"unknown option --config.{path}: this config has no {key!r} there")
        node = node[key]
    if not isinstance(node, dict):
        raise ConfigError(f"unknown option --config.{path}: {keys[-2]!r} has no options there")
    if keys[-1] in node:
        node[keys[-1]] = as_component(_parse_like(text, node[keys[-1]], place))
    else:  # the type is checked with the rest of the config, or when the component is built
        node[keys[-1]] = as_component(_literal(text))


def _container_of(names: list[str]) -> tuple[dataclasses.Field, int] | None:
    """Return the dict option that a dotted path leads to or into, and its depth; else None."""
    cls: Any = Config
    for depth, name in enumerate(names, start=1):
        f = {f.name: f for f in dataclasses.fields(cls)}.get(name)
        if f is None:
            return None
        if f.type is Component or typing.get_origin(f.type) is dict:
            return f, depth
        if not dataclasses.is_dataclass(f.type):
            return None
        cls = f.type
    return None


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(text.lower(), text)


def _parse_like(text: str, example: Any, place: str) -> Any:
    """Return the value of a text, of the type of an example; `place` names it in errors."""
    if isinstance(example, str):
        return text
    value = _literal(text)
    kind = next(t for t in (bool, int, float, tuple, dict, object) if isinstance(example, t))
    if kind is tuple and isinstance(value, (str, list)):
        return tuple(value) if isinstance(value, list) else (value,)
    if kind is float and type(value) is int:
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        expected = {bool: "true or false", dict: "a dict such as {'name': value}"}
        raise ConfigError(f"{place}: expected {expected.get(kind, kind.__name__)}")
    return value


def _raised(error: Exception) -> str:
    """Return an error of somebody's code in one line, with its place."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg}: {error.filename}, line {error.lineno}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}: {frame.filename}, line {frame.lineno}"


def _explain(error: Exception, argv: list[str]) -> str:
    """Return one line: the option that config_flags could not find, or the error itself."""
    for item in argv:
        match = OVERRIDE.fullmatch(item)
        if not match:
            continue
        node: Any = Config()
        for name in match["path"].split("."):
            if not dataclasses.is_dataclass(node):
                return f"unknown option --config.{match['path']}: a value has no options"
            names = [f.name for f in dataclasses.fields(node)]
            if name not in names:
                return unknown(f"option --config.{match['path']}", name, names)
            node = getattr(node, name)
    text = str(error)
    if match := re.search(r"No such file or directory: '(.*)'\Z", text.strip()):
        shipped_names = [path.stem for path in sorted(shipped("configs").glob("*.py"))]
        if match[1] in shipped_names:  # a script was started, not the command
            return f"there is no file {match[1]}; a script needs the path configs/{match[1]}.py"
        return f"there is no file {match[1]}; shipped configs: {', '.join(shipped_names)}"
    match = re.search(r"flag --([\w.]+)=(.*?): (.*)", text, re.DOTALL)
    if match and TRACEBACK not in match[3]:
        expected = next((v for k, v in EXPECTED.items() if k in match[3]), match[3])
        return f"--{match[1]}={match[2]}: {expected}"
    lines = text.strip().splitlines()
    if not lines:
        return repr(error)
    # config_flags puts the traceback of a config file into its error
    match = re.match(r"([\w.]+): ?(.*)", lines[-1])
    places = re.findall(r'File "(.*)", line (\d+)', text)
    if not match or TRACEBACK not in text or not places:
        return lines[-1]
    kind, place = match[1].rpartition(".")[2], f"{places[-1][0]}, line {places[-1][1]}"
    if kind in (ConfigError.__name__, MissingKeyError.__name__):  # they name the option
        return match[2]
    return f"{match[2]} is missing: {place}" if kind == "KeyError" else f"{lines[-1]}: {place}"
