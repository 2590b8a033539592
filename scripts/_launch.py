"""Shared by train.py, finetune.py, cotrain.py and train_arrays.py: open the data, train."""

import sys
from collections.abc import Callable
from typing import Any

from octolike.config import Config, ConfigError, resolve
from octolike.types import DataSource


def launch(config: Config) -> None:
    """Train; an incompatible setting or an unreadable file ends the script with one line."""
    from octolike import files
    from octolike.errors import DataError, RunError
    from octolike.train import sharding

    try:
        files.check_writable(config.workdir, "config.workdir")
        resolve(config)  # before the data: their statistics can take hours
        sharding.initialize(config.train)  # so that only the first process describes the data
        train(config, open_source(config))
    except (ConfigError, DataError, RunError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {files.with_remedy(error)}")


def open_source(config: Config) -> DataSource:
    """Return the data of a config; text files are read from the run's directory if it has them."""
    from octolike.data import open_data
    from octolike.train import checkpoint

    return open_data(checkpoint.readable(config))


def train(config: Config, data: DataSource) -> None:
    """Describe the data, and train."""
    from octolike.train import loop

    print(data.describe())
    print(*describe_reach(config, data), sep="", end="")
    loop.train(config, data, success=closed_loop(config, data))


def describe_reach(config: Config, data: DataSource) -> list[str]:
    """Return lines on the actions that a head of the config cannot output."""
    from octolike.model import heads

    describe = getattr(data, "describe_reach", None)  # data workers hold no distributions
    lines: list[str] = []
    for name, component in config.model.heads.items() if describe else ():
        lines += describe(*heads.reach(component, f"model.heads.{name}"))
    return [f"{line}\n" for line in dict.fromkeys(lines)]


def closed_loop(config: Config, data: DataSource) -> Callable[[Any, int], dict[str, float]] | None:
    """Return the measurement of success rates, if the sampling weights follow it; else None."""
    if config.data.sampling.get("measure") != "success":
        return None  # without importing a simulator or octolike.evaluation
    from octolike.evaluation.closed_loop import ClosedLoop

    return ClosedLoop(config, data.embodiments, data.spec, data.names)
