"""From episodes on disk to numpy batches; the only package that imports tensorflow.

data = open_data(config)
for batch in data.train():      # numpy, per the contract in octolike.types
    ...
"""

from __future__ import annotations

import os

from octolike.config import Config
from octolike.types import DataSource

# Silence the start-up messages of tensorflow before it is imported. The message on oneDNN comes
# before the log level is read; oneDNN is not used in reading, decoding or resizing.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
# For each read at a new offset of a gs:// file, TensorFlow fills a buffer, by default of 64 MiB.
# Larger reads are single requests of their own size: with a small buffer, an episode costs its
# bytes, and a few more to get to its offset.
os.environ.setdefault("GCS_READAHEAD_BUFFER_SIZE_BYTES", str(4 << 10))


def open_data(config: Config) -> DataSource:
    """Return the DataSource of a config's datasets.

    Raises ConfigError or DataError for an unknown dataset or camera, a wrong directory, a missing
    or truncated file, a bad episode.
    """
    from octolike.data.pipeline.source import RldsSource

    return RldsSource(config)
