"""What train.py, finetune.py, cotrain.py and train_arrays.py share: open the data, train."""

import sys
from typing import Any

from octolike.config import Config, ConfigError


def launch(config: Config) -> None:
    """Train; what does not fit, or cannot be read or written, is one line, without a traceback."""
    from octolike import files
    from octolike.errors import DataError, RunError
    from octolike.train import sharding

    try:
        files.check_writable(config.workdir, "config.workdir")
        sharding.start(config.train)  # that the first process alone speaks of the data
        train(config, opened(config))
    except (ConfigError, DataError, RunError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


def opened(config: Config) -> Any:
    """Return the data of a config, its own files taken from the run's directory."""
    from octolike.data import open_data
    from octolike.train import checkpoint, sharding

    here = config if config.data.service else checkpoint.readable(config)
    return open_data(here, sharding.process()[1])


def train(config: Config, data: Any) -> None:
    """Train on opened data: octolike.data's, or octolike.data.arrays.ArraySource."""
    from octolike.train import loop

    print(data.describe())
    loop.train(config, data, success=closed_loop(config, data))


def closed_loop(config: Config, data: Any) -> Any:
    """Return what measures success while training, where the sampling follows it; else None."""
    if config.data.sampling.get("measure") != "success":
        return None  # and neither a simulator nor what evaluates is imported
    from octolike.evaluation.closed_loop import ClosedLoop

    return ClosedLoop(config, data.embodiments, data.spec, data.names)
