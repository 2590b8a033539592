"""The opened splits of a run's datasets: episode locations, embodiment records and tasks.

Datasets with the same embodiment in their specs share one record with pooled statistics. A task is
an instruction, a label or a dataset, as config.data.tasks defines.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from octolike import ranges
from octolike.config import ConfigError, DataConfig
from octolike.data.pipeline.order import EpisodeTable
from octolike.data.rlds import statistics
from octolike.data.rlds.dataset_directory import MissingDatasetError
from octolike.data.rlds.episode import Episode
from octolike.data.rlds.index import EpisodeIndex
from octolike.data.rlds.reader import NOTHING_HELD_OUT, Reader
from octolike.data.rlds.split_records import HeldOut
from octolike.data.specs.episode_filter import build_filter
from octolike.data.specs.spec import DatasetSpec
from octolike.embodiment import Embodiment, Layout, recorded_representation
from octolike.errors import DataError

# Numbers, instruction and pointers of one step in memory.
STEP_BYTES = 256


@dataclass(frozen=True, eq=False)
class DatasetSplit:
    """One opened split of one dataset.

    Attributes:
        number, record: indices of the dataset and of its embodiment record in a batch.
        cameras, depth: names of the cameras to read.
        views: interchangeable cameras; each is shown as any other; () for none.
        tasks: int64 [episodes], the task id of each episode.
        has_task: bool [episodes], False if the task is unknown.
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
    has_task: np.ndarray
    views: tuple[str, ...] = ()

    @property
    def has_views(self) -> np.ndarray:
        """Bool [episodes]: which of them have images of all interchangeable cameras."""
        if not self.views:
            return np.zeros(len(self.index.steps), bool)
        columns = [list(self.spec.cameras).index(c) for c in self.views]
        return np.all(self.index.has_image[:, columns], axis=1)

    def load(self, episode: int) -> Episode:
        """Read one episode; actions and proprio are normalised.

        With a representation, its actions are the chunks of all steps: [T, H, A'].
        """
        result = self.read(episode, (*self.cameras, *self.views), self.depth)
        if self.embodiment.transform is None:
            result.action = self.embodiment.normalize_action(result.action)
        else:
            steps = np.arange(len(result))[:, None] + np.arange(self.reader.horizon)
            chunk = result.action[np.minimum(steps, len(result) - 1)]
            result.action = self.embodiment.encode(chunk, result.proprio)
        if result.proprio is not None:
            result.proprio = self.embodiment.normalize_proprio(result.proprio)
        return result

    def read(self, episode: int, cameras: Sequence[str] = (), depth: Sequence[str] = ()) -> Episode:
        """Read one episode with the images of these cameras, in robot units."""
        i = self.index
        record = int(i.shard[episode]), int(i.offset[episode]), int(i.length[episode])
        content = int(i.content[episode])
        return self.reader.read_episode(*record, dict.fromkeys(cameras), depth, content)

    def bytes_in_memory(self) -> np.ndarray:
        """Return the bytes of each episode in the pipeline, int64 [episodes].

        The encoded images of the chosen cameras, and about STEP_BYTES for the rest of a step. Of
        interchangeable cameras, the larger images count.
        """
        total = STEP_BYTES * self.index.steps
        if self.views:
            places = [list(self.spec.cameras).index(c) for c in self.views]
            largest = self.index.image_bytes[:, places].max(axis=1, keepdims=True)
            sizes = self.index.image_bytes.copy()
            sizes[:, places] = largest
        else:
            sizes = self.index.image_bytes
        for chosen, names, counts in (
            (self.cameras, self.spec.cameras, sizes),
            (self.depth, self.spec.depth, self.index.depth_bytes),
        ):
            columns = [i for i, name in enumerate(names) if name in chosen]
            total = total + counts[:, columns].sum(axis=1)
        return total

    def contents(self) -> str:
        """Return the counts of the episodes, and a digest of their records, order and tasks."""
        i = self.index
        columns = (i.steps, i.length, i.content, self.tasks, self.has_task)
        digest = hashlib.sha256(b"".join(np.asarray(x, "<i8").tobytes() for x in columns))
        counts = f"{len(i.steps)} episodes, {i.steps.sum()} steps"
        return f"{counts}, {digest.hexdigest()[:16]}"

    def name_of(self, episode: int) -> str:
        """Return the location of an episode, for messages."""
        i = self.index
        return f"{self.reader.files[i.shard[episode]]}, byte {i.offset[episode]}"


class JoinedSplits:
    """The episodes of several splits, numbered through in their order."""

    def __init__(self, sources: Sequence[DatasetSplit], groups: Sequence[np.ndarray]) -> None:
        """groups: int [episodes] per split, the sampling group of each episode."""
        self.sources = list(sources)
        self._ends = np.cumsum([len(s.index.steps) for s in sources])
        self.table = EpisodeTable(
            steps=np.concatenate([s.index.steps for s in sources]),
            sizes=np.concatenate([s.bytes_in_memory() for s in sources]),
            groups=np.concatenate(groups),
        )

    def find(self, episode: int) -> tuple[DatasetSplit, int]:
        """Return the split of an episode, and its number in that split."""
        i = int(np.searchsorted(self._ends, episode, side="right"))
        return self.sources[i], episode - (int(self._ends[i - 1]) if i else 0)

    def load(self, episode: int) -> Episode:
        """Read one episode."""
        source, number = self.find(episode)
        return source.load(number)


def open_training(config: DataConfig, spec: DatasetSpec) -> Reader:
    """Return the reader of a dataset's training split; its method `held_out` opens the held-out."""
    return Reader(
        spec,
        config.root_of(spec.name),
        config.train_split,
        uninformative=config.uninformative_language,
        representation=config.representation,
        horizon=config.horizon,
        held_out=HeldOut(config.validation_split_of(spec.name), config.held_out)
        if config.validation_split_of(spec.name)
        else NOTHING_HELD_OUT,
        filters=build_filter(config.filters, title="data.filters"),
        channel_order=config.channel_order_of(spec.name),
    )


def open_all(config: DataConfig, specs: Sequence[DatasetSpec]) -> list[Reader]:
    """Return the readers of all datasets; DataError lists those that do not exist."""
    readers, missing = [], []
    for spec in specs:
        try:
            readers.append(open_training(config, spec))
        except MissingDatasetError as error:
            missing.append((spec.name, error))
    if len(missing) == 1:
        raise missing[0][1]
    if missing:
        roots = sorted({config.root_of(name) for name, _ in missing})
        raise DataError(
            f"{len(missing)} of {len(specs)} datasets of the mix do not exist in "
            f"{', '.join(roots)}: {', '.join(name for name, _ in missing)}; download them, name "
            "their directories in data.roots, or choose another data.mix. The first: "
            f"{missing[0][1]}"
        )
    return readers


def embodiment_records(
    specs: Sequence[DatasetSpec],
    indices: Sequence[EpisodeIndex],
    normalization: str,
    range_check: str = "strict",
    representation: str = "as_stored",
    proprio_representation: str = "as_stored",
) -> tuple[list[Embodiment], list[int]]:
    """Return the embodiment records, and the record index of each dataset.

    range_check, representation, proprio_representation: options of config.data.

    Raises ConfigError if two specs name the same embodiment with different layouts, grippers or
    rates, and for an unnormalised dimension that is not a share.
    """
    members: dict[str, list[int]] = {}
    for i, spec in enumerate(specs):
        members.setdefault(_embodiment(spec), []).append(i)
    result: list[Embodiment] = []
    record = [0] * len(specs)
    for name, group in members.items():
        first = specs[group[0]]
        for i in group:
            _check_conventions(name, first, specs[i], range_check == "strict")
            record[i] = len(result)
        action, proprio = _pooled([indices[i] for i in group])
        datasets = tuple(specs[i].name for i in group)
        try:
            new = Embodiment(
                name=name,
                robot=first.robot,
                control_hz=first.control_hz,
                gripper=first.gripper,
                action=first.action,
                proprio=first.proprio,
                normalization=normalization,
                datasets=datasets,
                representation=recorded_representation(representation),
                proprio_representation=recorded_representation(proprio_representation),
                inferred=tuple(dict.fromkeys(key for i in group for key in specs[i].inferred)),
                action_statistics=action,
                proprio_statistics=proprio,
            )
        except ValueError as error:  # a representation does not apply to this robot
            raise ConfigError(f"{', '.join(datasets)}: {error}") from None
        if range_check == "strict":
            _check_ranges(new, [specs[i] for i in group], [indices[i] for i in group])
        else:
            new = ranges.as_before(new)
        result.append(new)
    return result, record


def task_names(
    spec: DatasetSpec, index: EpisodeIndex, kind: str, uninformative: bool = False
) -> list[str]:
    """Return the task name of each episode, "" if it is unknown; kind: config.data.tasks."""
    if kind == "dataset":
        return [spec.name] * len(index.steps)
    if kind == "instruction" and not (spec.language_informative or uninformative):
        return [""] * len(index.steps)
    if kind == "instruction":
        return [index.tasks[i] for i in index.task]
    return [index.labels[i] for i in index.label]


def _embodiment(spec: DatasetSpec) -> str:
    return spec.embodiment or spec.name


def _check_conventions(name: str, a: DatasetSpec, b: DatasetSpec, strict: bool) -> None:
    """Raise ConfigError if two specs that share an embodiment differ in their conventions.

    strict: compare grippers and rates, too; runs before format 3 did not.
    """
    differences = []
    for part in ("action", "proprio"):
        layouts = getattr(a, part), getattr(b, part)
        if layouts[0] != layouts[1] and None not in layouts:
            differences += [
                f"{part}.{f.name} {getattr(layouts[0], f.name)} and {getattr(layouts[1], f.name)}"
                for f in fields(Layout)
                if getattr(layouts[0], f.name) != getattr(layouts[1], f.name)
            ]
        elif layouts[0] != layouts[1]:
            differences.append(f"only one has a {part}")
    if strict and a.gripper != b.gripper:
        differences.append(f"gripper {a.gripper!r} and {b.gripper!r}")
    if strict and a.control_hz and b.control_hz and a.control_hz != b.control_hz:
        differences.append(f"control_hz {a.control_hz:g} and {b.control_hz:g}")
    if differences:
        raise ConfigError(
            f"datasets {a.name} and {b.name} both name the embodiment {name!r}, but they differ: "
            f"{'; '.join(differences)}. Give one its own name in its spec (embodiment=...), or "
            "convert it to the convention of the first"
        )


def _check_ranges(
    record: Embodiment, specs: Sequence[DatasetSpec], indices: Sequence[EpisodeIndex]
) -> None:
    """Raise ConfigError for an unnormalised dimension of a dataset that is not a share."""
    faults = ranges.record_misfits(record)
    for spec, index in zip(specs, indices, strict=True):
        single = replace(
            record,
            datasets=(spec.name,),
            action_statistics=index.action,
            proprio_statistics=index.proprio if spec.proprio else None,
        )
        faults = faults or ranges.record_misfits(single)
    if faults:
        raise ConfigError("; ".join(faults))


def _pooled(indices: Sequence[EpisodeIndex]) -> tuple:
    if len(indices) == 1:
        return indices[0].action, indices[0].proprio
    return statistics.pool_statistics(indices)
