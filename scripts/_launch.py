"""What train.py, finetune.py and cotrain.py have in common: open the data, train."""

import sys

from octolike.config import Config, ConfigError


def launch(config: Config) -> None:
    """Train; a setting or data that do not fit are one line, without a traceback."""
    from octolike.data import batches, episodes
    from octolike.train import loop

    try:
        data = batches.open_data(config)
        print(data.describe())
        loop.train(
            config,
            data.train,
            spec=data.spec,
            embodiments=data.embodiments,
            names=data.names,
            validation=data.validation(),
        )
    except (ConfigError, episodes.DataError, FileNotFoundError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
