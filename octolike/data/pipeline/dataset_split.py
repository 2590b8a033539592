"""The opened datasets of a run: where each episode is, whose robot it is, and which task it shows.

Datasets whose rows name the same embodiment share one record: their statistics are pooled. A task
is an instruction, a label of the row, or a whole dataset, as config.data.tasks says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from octolike.config import ConfigError
from octolike.data.pipeline.order import EpisodeTable
from octolike.data.rlds import statistics
from octolike.data.rlds.reader import Episode, Reader
from octolike.data.rlds.statistics import EpisodeIndex
from octolike.data.specs.spec import DatasetSpec
from octolike.embodiment import Embodiment


@dataclass(frozen=True, eq=False)
class DatasetSplit:
    """One split of one dataset, ready to be sampled.

    number, record: of the dataset and of its embodiment in a batch; cameras, depth: those that are
    read; tasks: int64 [episodes], the number of each episode's task; known: bool [episodes].
    """

    number: int
    record: int
    spec: DatasetSpec
    reader: Reader
    index: EpisodeIndex
    embodiment: Embodiment
    cameras: tuple[str, ...]
    depth: tuple[str, ...]
    tasks: np.ndarray
    known: np.ndarray

    def load(self, episode: int) -> Episode:
        """Read one episode, its numbers normalised."""
        i = self.index
        where = int(i.shard[episode]), int(i.offset[episode]), int(i.length[episode])
        loaded = self.reader.read_episode(*where, self.cameras, self.depth)
        loaded.action = self.embodiment.normalize_action(loaded.action)
        if loaded.proprio is not None:
            loaded.proprio = self.embodiment.normalize_proprio(loaded.proprio)
        return loaded

    def name_of(self, episode: int) -> str:
        """Return where an episode is, for messages."""
        i = self.index
        return f"{self.reader.files[i.shard[episode]]}, byte {i.offset[episode]}"


class JoinedSplits:
    """Episodes of several sources under one count: the first source's, then the next one's."""

    def __init__(self, sources: Sequence[DatasetSplit], groups: Sequence[np.ndarray]) -> None:
        """groups: int [episodes] of each source, the groups that are sampled."""
        self.sources = list(sources)
        self._ends = np.cumsum([len(s.index.steps) for s in sources])
        steps, sizes = (
            np.concatenate([getattr(s.index, name) for s in sources])
            for name in ("steps", "length")
        )
        self.stock = EpisodeTable(steps=steps, sizes=sizes, groups=np.concatenate(groups))

    def find(self, episode: int) -> tuple[DatasetSplit, int]:
        """Return the source of an episode, and its number there."""
        i = int(np.searchsorted(self._ends, episode, side="right"))
        return self.sources[i], episode - (int(self._ends[i - 1]) if i else 0)

    def load(self, episode: int) -> Episode:
        """Read one episode."""
        source, number = self.find(episode)
        return source.load(number)


def embodiment_records(
    specs: Sequence[DatasetSpec], indices: Sequence[EpisodeIndex], normalization: str
) -> tuple[list[Embodiment], list[int]]:
    """Return the embodiment embodiment_records, and the number of each dataset's.

    ConfigError where two rows name the same embodiment but another layout.
    """
    members: dict[str, list[int]] = {}
    for i, spec in enumerate(specs):
        members.setdefault(_embodiment(spec), []).append(i)
    result, number = [], [0] * len(specs)
    for name, mine in members.items():
        first = specs[mine[0]]
        for i in mine:
            for part in ("action", "proprio"):
                if getattr(specs[i], part) != getattr(first, part):
                    raise ConfigError(
                        f"datasets {first.name} and {specs[i].name} both name the embodiment "
                        f"{name!r}, but their {part} layouts differ; give one its own name"
                    )
            number[i] = len(result)
        action, proprio = _pooled([indices[i] for i in mine])
        result.append(
            Embodiment(
                name=name,
                robot=first.robot,
                control_hz=first.control_hz,
                gripper=first.gripper,
                action=first.action,
                proprio=first.proprio,
                normalization=normalization,
                datasets=tuple(specs[i].name for i in mine),
                action_statistics=action,
                proprio_statistics=proprio,
            )
        )
    return result, number


def task_names(
    spec: DatasetSpec, index: EpisodeIndex, kind: str, uninformative: bool = False
) -> list[str]:
    """Return the task of each episode, "" where it is not known; kind: config.data.tasks."""
    if kind == "dataset":
        return [spec.name] * len(index.steps)
    if kind == "instruction" and not (spec.language_informative or uninformative):
        return [""] * len(index.steps)
    if kind == "instruction":
        return [index.tasks[i] for i in index.task]
    return [index.labels[i] for i in index.label]


def _embodiment(spec: DatasetSpec) -> str:
    return spec.embodiment or spec.name


def _pooled(indices: Sequence[EpisodeIndex]) -> tuple:
    if len(indices) == 1:
        return indices[0].action, indices[0].proprio
    return statistics.pool_statistics(indices)
