"""Plug-ins: Python files of your own that add kinds to the open sets.

    # my_head.py
    from octolike.model.heads import L1

    class MyHead(L1): ...

    PLUGINS = {"heads": {"my_head": MyHead}}

`--config.plugins=my_head.py` lets a run use them. The run directory keeps a copy of each file in
plugins/, and config.json its sha256. The code of another run's plug-ins is executed only if the
user names the files (`allow`).
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from octolike.config.components import unknown
from octolike.config.open_sets import OPEN_SETS, OpenSet
from octolike.config.python_files import load_module
from octolike.config.schema import Config
from octolike.errors import ConfigError

FOLDER = "plugins"  # in a run directory
# Dataset specs are not components, but plug-ins may add them as well.
EXTENSIBLE = {**OPEN_SETS, "datasets": OpenSet("octolike.data.specs.catalog:DATASETS")}

_loaded: dict[str, str] = {}  # {digest: path}
_owners: dict[tuple[str, str], str] = {}  # (open set, kind): the plug-in's path


def load(paths: Iterable[str]) -> None:
    """Execute plug-ins and add their kinds to the open sets; a file that is loaded is skipped.

    Raises ConfigError for a file that is missing, fails, or has no PLUGINS, for an unknown open
    set, and for a kind that is built in or that another plug-in has.
    """
    for path, digest in zip(paths, digests(paths).values(), strict=True):
        if digest not in _loaded:
            _add(path, digest)
            _loaded[digest] = path


def loaded() -> tuple[str, ...]:
    """Return the absolute paths of the plug-ins that this process has loaded.

    A process that it starts loads these before it unpickles an object of theirs.
    """
    return tuple(os.path.abspath(path) for path in _loaded.values())


class StoredFiles(tuple):
    """Python files that a stored run names; executed only once the user allows them."""


def approved(stored: Iterable[str], paths: Iterable[str]) -> tuple[str, ...]:
    """Return the Python files of a stored run; `StoredFiles` unless `paths` names all of them.

    paths: by name or path, as in `allow`: a file that exists takes the place of the stored one.
    """
    allowed = {Path(p).name: p for p in paths}
    files = [(path, allowed.get(Path(path).name)) for path in stored]
    if any(local is None for _, local in files):
        return StoredFiles(path for path, _ in files)
    return tuple(local if local and Path(local).is_file() else path for path, local in files)


def refuse_stored(paths: Iterable[str], noun: str) -> None:
    """Raise ConfigError, with the way to allow them, for files that a stored run names."""
    if isinstance(paths, StoredFiles) and paths:
        names = " ".join(f"--plugins={path}" for path in paths)
        raise ConfigError(
            f"the run names {noun}, and their code is not executed unless you allow it: {names} "
            f"(in Python: plugins={tuple(Path(path).name for path in paths)})"
        )


def load_of(config: Config) -> None:
    """Load the plug-ins of a config that the user started a command with.

    Raises ConfigError as `load` does, and if train.init_from has plug-ins that the config lacks.
    """
    if config.train.init_from:
        names = {Path(path).name for path in config.plugins}
        refuse(config.train.init_from, names, "--config.plugins")
    load(config.plugins)


def digests(paths: Iterable[str]) -> dict[str, str]:
    """Return {file name: sha256} of plug-ins; ConfigError if one is missing or a name is double."""
    result: dict[str, str] = {}
    for path in paths:
        name = Path(path).name
        if name in result:
            raise ConfigError(f"two plug-ins are named {name}; rename one of the files")
        result[name] = _digest(Path(path))
    return result


def allow(
    run_dir: str | os.PathLike[str], paths: Iterable[str], flag: str = "--plugins"
) -> tuple[str, ...]:
    """Load the plug-ins of another run that the user names; return the paths of the run's copies.

    Args:
        run_dir: the run directory.
        paths: the plug-ins that the user allows, by name or path. A file that exists is executed if
            it is the one that the run was trained with; else the run's copy is.
        flag: the option to name in the refusal.

    Raises:
        ConfigError: a plug-in of the run that `paths` does not name, that is missing, or that has
            changed since training.
    """
    allowed, expected = {Path(p).name: Path(p) for p in paths}, recorded(run_dir)
    refuse(run_dir, allowed, flag)
    if not expected:
        return ()
    folder, plugin_paths = _local_folder(run_dir), []
    for name, digest in expected.items():
        path = allowed[name] if allowed[name].is_file() else folder / name
        if not path.is_file():
            raise ConfigError(
                f"the plug-in {name} of {run_dir} is missing; put the file back into {folder}"
            )
        _check_digest(path, digest, run_dir, flag)
        plugin_paths.append(str(path))
    load(plugin_paths)
    return tuple(str(folder / name) for name in expected)


def check_unchanged(run_dir: str | os.PathLike[str], paths: Iterable[str]) -> None:
    """Raise ConfigError if a file differs from the run's plug-in of the same name."""
    expected = recorded(run_dir)
    for path in paths:
        name = Path(path).name
        if name in expected:
            _check_digest(Path(path), expected[name], run_dir, "--config.plugins")


def refuse(run_dir: str | os.PathLike[str], allowed: Iterable[str], flag: str) -> None:
    """Raise ConfigError, with the way to allow them, for plug-ins of a run that are not allowed."""
    folder, missing = Path(run_dir) / FOLDER, recorded(run_dir).keys() - {*allowed}
    if missing:
        files = " ".join(f"{flag}={folder / name}" for name in sorted(missing))
        raise ConfigError(
            f"{run_dir} was trained with plug-ins, and their code is not executed unless you allow "
            f"it: {files} (in Python: plugins={tuple(sorted(missing))})"
        )


def recorded(run_dir: str | os.PathLike[str]) -> Mapping[str, str]:
    """Return {file name: sha256} of the plug-ins that a run was trained with."""
    try:
        from octolike import files  # which takes a moment to import

        path = files.as_path(run_dir) / "config.json"
        data = json.loads(files.read_text(path))
    except (OSError, ValueError):
        return {}  # reading the config reports that
    names = data.get("plugins", {}) if isinstance(data, dict) else {}
    return names if isinstance(names, dict) else {}


def _local_folder(run_dir: str | os.PathLike[str]) -> Path:
    """Return the folder of a run's plug-ins, downloaded if the run lies in a bucket."""
    from octolike import files

    return files.local_copy(files.as_path(run_dir) / FOLDER)


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"the plug-in {path} cannot be read: {error.strerror}") from None


def _check_digest(path: Path, digest: str, run_dir: str | os.PathLike[str], flag: str) -> None:
    if _digest(path) != digest:
        run_copy = Path(run_dir) / FOLDER / path.name
        remedy = "" if path == run_copy else f", e.g. {flag}={run_copy}"
        raise ConfigError(
            f"the plug-in {path} has changed since {run_dir} was trained (sha256 "
            f"{_digest(path)[:12]}, expected {digest[:12]}); use the file of that time{remedy}"
        )


def _add(path: str, digest: str) -> None:
    # The same name in each process: a plug-in's classes are pickled and imported by it.
    name = f"octolike_plugin_{Path(path).stem}_{digest[:12]}".replace(".", "_")
    additions = getattr(load_module(path, name=name), "PLUGINS", None)
    if not isinstance(additions, dict) or not additions:
        example = "PLUGINS = {'heads': {'my_head': MyHead}}"
        raise ConfigError(f"{path} defines no PLUGINS; expected e.g. {example}")
    for name, entries in additions.items():
        if name not in EXTENSIBLE:
            raise ConfigError(unknown(f"open set in PLUGINS of {path}", name, EXTENSIBLE))
        if not isinstance(entries, dict):
            raise ConfigError(
                f"PLUGINS[{name!r}] of {path} is {entries!r}; expected {{kind: class}}"
            )
        table = EXTENSIBLE[name].load()
        for kind in entries:
            owner = _owners.get((name, kind))
            if owner:
                raise ConfigError(
                    f"{path} and {owner} both define the kind {kind!r} of {name}; rename one"
                )
            if kind in table:
                raise ConfigError(
                    f"{path} defines the kind {kind!r} of {name}, which is built in; rename it"
                )
    for name, entries in additions.items():
        _merge(name, entries, path)


def _merge(name: str, entries: Mapping[str, Any], path: str) -> None:
    EXTENSIBLE[name].load().update(entries)
    _owners.update({(name, kind): path for kind in entries})
