"""The paths in config.json: a run works from any current directory and after it was moved.

A path that can be reached from the run directory with at most two "..", such as data/ next to
runs/, is stored as "{run}/../../data"; other paths are stored as absolute ones. So a run and its
data can be moved or copied together. `workdir` is stored as an absolute path: if nothing exists at
"{run}/…", the place as seen from the first run directory is used.

Runs of format 1 stored paths as they were typed, relative to the directory from which training was
started. They are looked up in the current directory, then in the directory that the stored workdir
("runs/x") suggests.
"""

import copy
import os
import posixpath
import re
from collections.abc import Callable, Iterable
from typing import Any

from octolike.config.components import Component
from octolike.config.schema import Config

RUN = "{run}"  # stands for the run directory
UP = 2  # the most ".." of a path that is stored relative to the run directory
OPTIONS: tuple[str, ...] = (
    "data.root",
    "data.roots",
    "data.cache",
    "data.specs",
    "data.paraphrases",
)
OPTIONS += ("train.init_from", "train.compilation_cache")
COMPONENTS = ("data.text", "model.tokenizers", "model.heads", "model.auxiliary", "environment")
FIELDS = ("path", "weights")  # of components: a path, or the name of something on a hub

Place = Callable[[str, bool], str]  # (path, whether it may be a hub's name) -> path


def portable(config: Config) -> Config:
    """Return the config as it is stored in `config.workdir`."""
    workdir = _absolute(config.workdir)

    def store(path: str, named: bool) -> str:
        if path.startswith(RUN) or (named and not _exists(path)):
            return path
        relative = _relative(_absolute(path), workdir)
        return _absolute(path) if relative is None else posixpath.join(RUN, relative)

    stored = _map(config, store)
    stored.workdir = workdir
    return stored


def resolved(config: Config, run_dir: str | os.PathLike[str]) -> Config:
    """Return the stored config of a run directory with paths that can be opened from here."""
    run = os.fspath(run_dir)
    origins = [run, config.workdir] if _is_absolute(config.workdir) else [run]
    bases = ["", *_start_directories(run, config.workdir)]

    def find(path: str, _: bool) -> str:
        if path.startswith(RUN):
            places = [_join(origin, path[len(RUN) + 1 :]) for origin in origins]
        elif _is_absolute(path):
            return path
        else:
            places = [os.path.join(base, path) for base in bases]
        places = list(dict.fromkeys(places))
        if len(places) == 1:
            return places[0]
        return next(filter(_exists, places), places[0])

    present = _map(config, find)
    present.workdir = run
    return present


def aligned(stored: Config, config: Config) -> Config:
    """Return a stored, resolved config that spells paths as `config` does if they are the same.

    For comparing the two.
    """
    spelled: dict[str, str] = {}
    _map(config, lambda path, _: spelled.setdefault(_absolute(path), path))
    return _map(stored, lambda path, _: spelled.get(_absolute(path), path))


def _map(config: Config, place: Place) -> Config:
    """Return a copy of the config with every path that is set replaced by place(path, named)."""
    config = copy.deepcopy(config)
    for option in OPTIONS:
        node, name = _owner(config, option)
        if hasattr(node, name):
            setattr(node, name, _replace(getattr(node, name), lambda path: place(path, False)))
    for option in COMPONENTS:
        node, name = _owner(config, option)
        _replace_fields(getattr(node, name), lambda path: place(path, True))
    return config


def _owner(config: Config, option: str) -> tuple[Any, str]:
    """Return the dataclass that has an option, and the option's last name."""
    section, _, name = option.rpartition(".")
    return (getattr(config, section) if section else config), name


def _replace(value: Any, place: Callable[[str], str]) -> Any:
    """Return a path, or the paths of a dict or tuple, replaced; "" stays."""
    if isinstance(value, dict):
        return Component({name: _replace(path, place) for name, path in value.items()})
    if isinstance(value, (tuple, list)):
        return tuple(_replace(path, place) for path in value)
    return place(value) if value else value


def _replace_fields(value: Any, place: Callable[[str], str]) -> None:
    """Replace the path fields of a component and of the components in it."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, (tuple, list)):
        items = enumerate(value)
    for key, item in items:
        if key in FIELDS and isinstance(item, str) and item:
            value[key] = place(item)
        else:
            _replace_fields(item, place)


def _start_directories(run: str, workdir: str) -> list[str]:
    """Return directories in which training may have been started; workdir is as stored."""
    if not workdir or _is_absolute(workdir) or _is_absolute_uri(run):
        return []
    parts = posixpath.normpath(workdir).split("/")
    return [] if ".." in parts else [_join(run, "/".join([".."] * len(parts)))]


def _is_absolute_uri(path: str) -> bool:
    return re.match(r"[a-z0-9]+://", path) is not None


def _is_absolute(path: str) -> bool:
    return os.path.isabs(path) or _is_absolute_uri(path)


def _absolute(path: str) -> str:
    return path.rstrip("/") if _is_absolute_uri(path) else os.path.abspath(path)


def _join(base: str, relative: str) -> str:
    """Return base/relative without "..", in a bucket too."""
    scheme, mark, path = base.partition("://") if _is_absolute_uri(base) else ("", "", base)
    return scheme + mark + os.path.normpath(os.path.join(path, relative))


def _relative(path: str, start: str) -> str | None:
    """Return an absolute path relative to another one; None if it has too many ".."."""
    if _is_absolute_uri(path) != _is_absolute_uri(start):
        return None
    if _is_absolute_uri(path):
        if path.split("/")[:3] != start.split("/")[:3]:  # another bucket
            return None
        path, start = path.partition("://")[2], start.partition("://")[2]
        path, start = f"/{path}", f"/{start}"
    relative = os.path.relpath(path, start)
    return None if relative.split("/").count("..") > UP else relative


def _exists(path: str) -> bool:
    if not _is_absolute_uri(path):
        return os.path.exists(path)
    from octolike import files

    return files.as_path(path).exists()
