"""How data.memory is divided: batches made ahead, episodes of training, episodes of validation."""

from __future__ import annotations

import numpy as np

from octolike.config import ConfigError, DataConfig
from octolike.data.pipeline import mixing
from octolike.data.pipeline.dataset_split import JoinedSplits

# Share of the episodes' memory for validation, during which the training episodes stay in memory.
VALIDATION = 1 / 4


class MemoryBudget:
    """The memory of all hosts together, in bytes.

    Attributes:
        ahead: bytes of the batches made ahead and the one in use.
        training, validation: largest number of bytes of the mixed episodes.
    """

    def __init__(self, config: DataConfig) -> None:
        """Divide config.memory."""
        self._config = config
        self.ahead = _batch_bytes(config) * (config.prefetch + 1)
        episodes = (config.memory * 2**30 - self.ahead) / mixing.OVERHEAD
        self.training, self.validation = episodes * (1 - VALIDATION), episodes * VALIDATION

    def check_training(self, episodes: JoinedSplits, lanes: int) -> None:
        """Raise ConfigError with the required data.memory if a lane cannot mix one episode."""
        self._check(episodes, lanes, self.training, 1 - VALIDATION)

    def check_validation(self, episodes: JoinedSplits, lanes: int) -> None:
        """Raise ConfigError like `check_training`."""
        self._check(episodes, lanes, self.validation, VALIDATION)

    def _check(self, episodes: JoinedSplits, lanes: int, budget: float, part: float) -> None:
        sizes = episodes.table.sizes
        largest = int(np.argmax(sizes))
        size = int(sizes[largest])
        least = max(size, lanes * sizes.mean())
        if least <= budget:
            return
        source, number = episodes.find(largest)
        need = (self.ahead + mixing.OVERHEAD * least / part) / 2**30
        raise ConfigError(
            f"data.memory is {self._config.memory:g} GiB and prefetched batches take "
            f"{self.ahead / 2**30:.3g} GiB of it; the largest episode of {source.spec.name} "
            f"({source.name_of(number)}) has {size / 2**20:.3g} MiB, and one episode in each of "
            f"{lanes} lanes must fit in the memory for {source.reader.split!r}: set data.memory to "
            f"at least {need:.3g}, or data.lanes to a smaller number"
        )


def _batch_bytes(d: DataConfig) -> int:
    """Return the bytes of the images of a batch, which are nearly all of it."""
    frames = d.window + (d.goal != "none")
    example = sum(3 * side**2 * frames for side in d.cameras.values())
    example += sum(4 * side**2 * d.window for side in d.depth.values())
    return example * d.batch_size
