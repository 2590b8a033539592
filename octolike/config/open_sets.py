"""The open sets of components, and the complete form of a config.

A component names one entry of an open set by `kind`: a table {kind: dataclass} in the module that
owns it. Tables are imported when they are first needed. A complete config holds every field of its
components; config.json stores this form.
"""

import copy
import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple

from octolike.config.components import (
    Component,
    as_component,
    check_value,
    component_fields,
    default_of,
    entry_of,
    unknown,
)
from octolike.config.schema import Config
from octolike.errors import ConfigError


class OpenSet(NamedTuple):
    """One open set.

    table: "module:TABLE". derived: fields that the rest of the run determines; a complete component
    does not hold them. from_file: the field with a path to a file that determines all other fields.
    """

    table: str
    derived: frozenset[str] = frozenset()
    from_file: str = ""

    def load(self) -> MutableMapping[str, Any]:
        """Import the table."""
        module, name = self.table.split(":")
        return getattr(importlib.import_module(module), name)


def _set(table: str, *derived: str, from_file: str = "") -> OpenSet:
    return OpenSet(table, frozenset(derived), from_file)


OPEN_SETS = {
    "text_tokenizers": _set("octolike.text:TOKENIZERS"),
    "samplings": _set("octolike.data.pipeline.sampling:SAMPLING"),
    "tokenizers": _set("octolike.model.tokenizers:TOKENIZERS", "dtype", "tasks"),
    "encoders": _set("octolike.model.encoders:ENCODERS", "dtype"),
    "text_encoders": _set("octolike.model.text_encoders:ENCODERS", "dtype", from_file="path"),
    "experts": _set("octolike.model.experts:EXPERTS", "dtype"),
    "heads": _set(
        "octolike.model.heads:HEADS",
        *("dtype", "horizon", "action_dim", "group_names", "member", "where"),
    ),
    "auxiliary": _set("octolike.model.auxiliary:AUXILIARY", "dtype"),
    "denoisers": _set("octolike.model.denoisers:NETWORKS", "dtype", "horizon"),
    # these follow from the embodiment, or are off, unless the config sets them
    "environments": _set(
        "octolike.envs.registry:ENVIRONMENTS",
        *("action_convention", "gripper", "look", "control_hz", "belt"),
        *("bare_goal", "bare_goal_frame", "zoom", "hand_size"),
    ),
}
BY_TABLE = {open_set.table: open_set for open_set in OPEN_SETS.values()}


def resolve(config: Config) -> Config:
    """Return a copy with all fields of its components, by today's defaults if unset.

    Raises ConfigError for an unknown kind or field, a missing field, and a value that is not
    allowed.
    """
    return _map_components(config, complete)


def check_complete(config: Config, unknown_kinds: bool = False) -> None:
    """Raise ConfigError for the first component of a stored config that lacks a field.

    unknown_kinds: accept kinds that are not in the tables (those of plug-ins that are not loaded).
    """

    def check(table: str, component: Component, path: str) -> Component:
        return complete(table, component, path, defaults=False, unknown_kinds=unknown_kinds)

    _map_components(config, check)


def complete(
    table: str,
    component: Mapping[str, Any],
    path: str,
    *,
    defaults: bool = True,
    unknown_kinds: bool = False,
) -> Component:
    """Return a component with all of its fields, and those of the components inside it.

    Args:
        table: "module:TABLE" of its open set.
        component: as the config file or config.json has it.
        path: its place in the config, for errors.
        defaults: fill in missing fields; False: they are an error.
        unknown_kinds: leave a component of an unknown kind as it is.
    """
    open_set = BY_TABLE[table]
    entries = open_set.load()
    if unknown_kinds and component.get("kind") not in entries:
        return as_component(component)
    cls = entry_of(entries, component, path)
    fields = {f.name: f for f in component_fields(cls)}
    for name in component:
        if name != "kind" and name not in fields:
            names = fields.keys() - open_set.derived
            raise ConfigError(unknown(f"field of {path} ({component['kind']!r})", name, names))
    derived = open_set.derived
    if component.get(open_set.from_file):
        derived = frozenset(fields)
    result = {"kind": component["kind"]}
    for name, f in fields.items():
        if name in component:
            value = component[name]
            if not f.metadata.get("table") and name not in open_set.derived:
                check_value(f, value, f"{path}.{name}")
        elif name in derived:
            continue
        else:
            value = default_of(f)
            if not defaults or value is dataclasses.MISSING:
                reason = ", which has no default" if defaults else ""
                raise ConfigError(f"{path} ({component['kind']!r}) lacks {name!r}{reason}")
        if f.metadata.get("table") and isinstance(value, Mapping):
            value = complete(
                f.metadata["table"],
                value,
                f"{path}.{name}",
                defaults=defaults,
                unknown_kinds=unknown_kinds,
            )
        result[name] = as_component(value)
    return Component(result)


def _map_components(config: Config, function: Callable[[str, Component, str], Component]) -> Config:
    result = copy.deepcopy(config)
    for node, f, path in component_options(result):
        value, table = getattr(node, f.name), f.metadata["table"]
        if f.type is not Component:
            value = {k: function(table, c, f"{path}.{k}") for k, c in value.items()}
        elif value:
            value = function(table, value, path)
        setattr(node, f.name, value)
    return result


def component_options(node: Any, prefix: str = "") -> Iterator[tuple[Any, dataclasses.Field, str]]:
    """Yield (section, option, dotted path) of the options of a config that hold components."""
    for f in dataclasses.fields(node):
        if dataclasses.is_dataclass(f.type):
            yield from component_options(getattr(node, f.name), f"{prefix}{f.name}.")
        elif f.metadata["table"]:
            yield node, f, prefix + f.name
