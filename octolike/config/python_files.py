"""Python files that a config names: config files and plug-ins."""

import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any

from octolike.errors import ConfigError


def shipped(folder: str) -> Path:
    """Return the folder "configs" or "scripts": in the package (wheel) or next to it (clone)."""
    package = Path(__file__).parents[1]
    return next((p for p in (package / folder, package.parent / folder) if p.is_dir()), package)


def shipped_config(name: str) -> str:
    """Return the path of a config: `name` if that is a file, or that of the shipped config.

    name: a path or the name of a shipped config, with its arguments: "quickstart:debug".
    """
    path, colon, arguments = name.partition(":")
    folder = shipped("configs")
    candidates = [folder / f"{path}.py", folder / "experiments" / f"{path}.py"]
    candidates = [candidate for candidate in candidates if candidate.is_file()]
    if os.path.exists(path) or os.sep in path or not candidates:
        return name
    return f"{candidates[0]}{colon}{arguments}"


def load_module(path: str, *, relative_to: str = "", name: str = "") -> types.ModuleType:
    """Return the module of a Python file; ConfigError if there is none or it does not run.

    Args:
        path: the file.
        relative_to: a file; the path starts from its folder.
        name: makes the module importable by this name, so that its classes can be pickled; "": not.
    """
    path = os.path.join(os.path.dirname(relative_to), path)
    spec = importlib.util.spec_from_file_location(name or f"octolike_file_{abs(hash(path))}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    if name:
        sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except FileNotFoundError:
        sys.modules.pop(name, None)
        raise ConfigError(f"there is no file {path}") from None
    except Exception as error:
        sys.modules.pop(name, None)
        raise ConfigError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    return module


def base_config(path: str, arg: str = "", *, relative_to: str = "") -> Any:
    """Return the config of another file; relative_to: a file in the folder that `path` starts from.

    Without relative_to, `path` may name a shipped config.
    """
    path = path if relative_to else shipped_config(path)
    return load_module(path, relative_to=relative_to).get_config(arg)
