"""The command `octolike`: `octolike train --config quickstart` runs scripts/train.py, and so on.

Every file of scripts/ is a command. `--config NAME` (or NAME:arguments) may name one of the shipped
configs instead of a file. Scripts and configs lie at the top of the repository; a wheel carries
them inside the package.
"""

from __future__ import annotations

import ast
import os
import runpy
import sys
from importlib import metadata
from pathlib import Path

from octolike import terminal
from octolike.config.components import unknown
from octolike.config.python_files import shipped, shipped_config

# {package: the extra of pyproject.toml that installs it}
EXTRAS = {
    "imageio": "train",
    "matplotlib": "train",
    "scipy": "train",
    "tensorboardX": "train",
    "tensorflow": "train",
    "tensorflow_datasets": "train",
    "gymnasium": "sim",
    "mujoco": "sim",
    "h5py": "convert",
    "pyarrow": "convert",
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command that the arguments name; without one, list the commands."""
    arguments = sys.argv[1:] if arguments is None else arguments
    scripts = {path.stem: path for path in shipped("scripts").glob("[a-z]*.py")}
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage(scripts))
        return
    if arguments[0] == "--version":
        print(f"octolike {metadata.version('octolike')}")
        return
    name = arguments[0].replace("-", "_")
    if name not in scripts:
        sys.exit(f"error: {unknown('command', arguments[0], scripts)}")
    script = scripts[name]
    # For _launch.py and benchmarks/; last, since a standard module is named statistics, too.
    sys.path.append(str(script.parent))
    sys.argv = [str(script), *_with_config_paths(arguments[1:])]
    terminal.prepare()
    try:
        runpy.run_path(str(script), run_name="__main__")
    except KeyboardInterrupt:
        print("interrupted; what is on disk stays", flush=True)
        sys.exit(130)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        sys.exit(
            f"error: octolike {name} needs {package}, which is not installed; install "
            f"'octolike[{EXTRAS[package]}]' (docs/install.md)"
        )


def _with_config_paths(arguments: list[str]) -> list[str]:
    """Replace the names of shipped configs after --config by their paths."""
    result = list(arguments)
    for i, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option not in ("--config", "-config"):
            continue
        if equals:
            result[i] = f"{option}={shipped_config(value)}"
        elif i + 1 < len(arguments):
            result[i + 1] = shipped_config(arguments[i + 1])
    return result


def _usage(scripts: dict[str, Path]) -> str:
    """Return the list of commands with the first line of each script's docstring."""
    lines = ["usage: octolike COMMAND [arguments]", ""]
    width = max(map(len, scripts))
    for name, path in sorted(scripts.items()):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines.append(f"  {name:<{width}}  {text.partition(os.linesep)[0].splitlines()[0]}")
    configs = ", ".join(sorted(path.stem for path in shipped("configs").rglob("*.py")))
    lines += ["", f"configs: {configs}", "octolike COMMAND --help shows the arguments of a command"]
    return "\n".join(lines)
