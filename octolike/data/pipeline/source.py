"""RldsSource: training and validation batches from the RLDS datasets of a config.

The steps of a batch:

1. its frames are the next ones in the order of episodes and frames, in which each dataset or task
   has its share of the sampling strategy (sampling.SamplingSchedule, order.Order);
2. its episodes are loaded, unless the cache has them already (order.EpisodeCache);
3. windows, chunks and goals are computed as indices, numbers padded, images decoded (BatchBuilder);
4. instructions become token ids.

A batch is a pure function of the config and of `state()`: the number of batches, and the memory of
the feedback. Resuming is arithmetic.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from octolike import ranges
from octolike.config import Config, ConfigError, build_component, unknown
from octolike.data.pipeline import goals, reach, sampling
from octolike.data.pipeline.batch_builder import BatchBuilder, EpisodeRef
from octolike.data.pipeline.dataset_split import (
    DatasetSplit,
    JoinedSplits,
    describe_black_frames,
    embodiment_records,
    task_names,
)
from octolike.data.pipeline.sampling import SamplingGroups, SamplingSchedule
from octolike.data.pipeline.stream import EpisodeStream, PipelineThreads, RldsStream
from octolike.data.rlds import statistics
from octolike.data.rlds.index import EpisodeIndex
from octolike.data.rlds.reader import MissingSplitError, Reader
from octolike.data.specs import catalog, mixes
from octolike.embodiment import Embodiment
from octolike.errors import DataError
from octolike.tables import text_table
from octolike.text import TOKENIZERS
from octolike.types import Batch, BatchSpec, Names, batch_spec, unflatten

# Share of the memory budget for validation, during which the training episodes stay in memory.
VALIDATION = 1 / 4


class RldsSource:
    """The opened datasets of a config.

    Attributes:
        spec: of every batch.
        datasets, tasks: names in the order of batch["dataset"] and batch["task"]["task_id"].
        embodiments: records in the order of batch["embodiment"].
        names: of all three.
        shares: initial share of the examples per dataset, float64 [datasets].
    """

    embodiments: Sequence[Embodiment]

    def __init__(self, config: Config) -> None:
        """Open the datasets of config.data; compute the statistics that are not cached."""
        d = self._config = config.data
        self._seed, self._validation_batches = config.seed, config.train.validation_batches
        self._threads = d.threads or os.cpu_count() or 1
        rows = catalog.load_specs(d.specs)
        self._mix = mixes.parse(d.mix, d.mix_weights, rows)
        self.datasets = list(self._mix.weights)
        for option, names in (("roots", d.roots), ("limits", d.limits)):
            for name in names.keys() - self._mix.weights.keys():
                raise ConfigError(unknown(f"dataset in data.{option}", name, self.datasets))
        self._sources = self._open([catalog.find_spec(name, rows) for name in self.datasets])
        self._check_cameras()
        self._strategy = build_component(sampling.SAMPLING, d.sampling, "data.sampling")
        self._groups, self._supply = self._group()
        self.shares = self._dataset_shares(SamplingSchedule(self._strategy, self._groups).shares(0))
        self._text = build_component(TOKENIZERS, d.text, "data.text")
        self._builder = BatchBuilder(d, self.embodiments)
        self.spec = self._spec()
        self._work = PipelineThreads(
            builder=self._builder,
            text=self._text,
            loaders=ThreadPoolExecutor(self._threads),
            builders=ThreadPoolExecutor(max(1, min(d.prefetch, self._threads))),
            prefetch=d.prefetch,
            batch_bytes=self._batch_bytes(),
        )
        self._budgets = self._budget()

    def train(
        self, start: Mapping[str, Any] | None = None, process: tuple[int, int] = (0, 1)
    ) -> RldsStream:
        """Return the endless training batches, from the beginning or from a `state()`.

        process: (index, count) of this host, which gets a contiguous part of each batch and reads
        only the episodes of that part.
        """
        beginning: dict[str, Any] = {"sampling": ()}
        saved = _checked(start, self.datasets) if start is not None else beginning
        schedule = SamplingSchedule(self._strategy, self._groups, saved["sampling"])
        stream = EpisodeStream(
            supply=self._supply,
            size=self._config.batch_size,
            part=_part(self._config.batch_size, process),
            seed=self._seed,
            dropout=True,
            pool=self._config.pool,
            budget=self._budgets[0],
        )
        return RldsStream(self._work, stream, schedule, self.datasets, saved.get("batches", 0))

    def validation(self) -> dict[str, Callable[[], Iterator[Batch]]]:
        """Return {dataset: function that iterates over its validation batches}.

        Every call gives the same batches, without dropout. Raises DataError if the only dataset
        lacks the split data.validation_split; '' means no validation.
        """
        return {s.spec.name: partial(self._held_out_batches, s) for s in self._held_out}

    def source(self, dataset: str) -> DatasetSplit:
        """Return the held-out split of a dataset, or its training split if it has none."""
        sources = {s.spec.name: s for s in [*self._sources, *self._held_out]}
        if dataset not in sources:
            raise ConfigError(unknown("dataset of this mix", dataset, sources))
        return sources[dataset]

    def examples(self, source: DatasetSplit, frames: np.ndarray, draws: np.ndarray) -> Batch:
        """Return the batch of the given frames, without dropout.

        frames: int [B, 2], episode of the source and step; draws: float [B, goals.DRAWS].
        """
        distinct, which = np.unique(frames[:, 0], return_inverse=True)
        episodes = [EpisodeRef(source, e, source.load(e)) for e in distinct.tolist()]
        leaves, texts = self._builder.batch(episodes, which, frames[:, 1], draws, False)
        leaves["task.language.ids"], leaves["task.language.mask"] = self._text.encode(texts)
        return unflatten(leaves)

    @property
    def names(self) -> Names:
        """Return the names of datasets, embodiments and tasks, in the order of their indices."""
        records = tuple(e.name for e in self.embodiments)
        return Names(tuple(self.datasets), records, self.tasks)

    def contents(self) -> dict[str, str]:
        """Return a summary of the data, to compare two machines with the same config.

        {dataset/split: counts, and a digest of the episodes' lengths, bytes and tasks}.
        """
        summary = {}
        for s in self._sources + self._held_out:
            columns = (s.index.steps, s.index.length, s.tasks, s.has_task)
            digest = hashlib.sha256(b"".join(np.asarray(x, "<i8").tobytes() for x in columns))
            summary[f"{s.spec.name}/{s.reader.split}"] = (
                f"{len(s.index.steps)} episodes, {s.index.steps.sum()} steps, "
                f"{digest.hexdigest()[:16]}"
            )
        texts = json.dumps(
            {k: list(v) for k, v in self._builder.paraphrases.items()}, sort_keys=True
        )
        summary["paraphrases"] = hashlib.sha256(texts.encode()).hexdigest()[:16]
        return summary

    def describe(self) -> str:
        """Return a table of the datasets, the reasons of dropped episodes, and uncertain specs.

        With a table of the tasks if they are sampled, and the number of paraphrased instructions.
        """
        headers = ("dataset", "episodes", "steps", "share", "bad", "filtered", "robot")
        rows = []
        sources = self._sources + self._held_out
        shares = [f"{share:.1%}" for share in self.shares] + ["held out"] * len(self._held_out)
        for source, share in zip(sources, shares, strict=True):
            i, name = source.index, f"{source.spec.name}/{source.reader.split}"
            counts = f"{len(i.steps):,}", f"{i.steps.sum():,}", share, len(i.bad), i.filtered
            rows.append((name, *counts, source.spec.robot))
        lines = [text_table(rows, headers, "lrrrrrl")]
        for bad in (s.index.bad for s in sources):
            lines += [f"left out: {reason}" for reason in bad[:5]]
            lines += [f"left out: {len(bad) - 5} more"] if len(bad) > 5 else []
        lines += itertools.chain.from_iterable(map(describe_black_frames, sources))
        held_out = {s.spec.name for s in self._held_out}
        training_only = [name for name in self.datasets if name not in held_out]
        if self._config.validation_split and training_only:
            lines.append(f"no split {self._config.validation_split!r}: {', '.join(training_only)}")
        lines += filter(None, [catalog.describe_uncertain([s.spec for s in self._sources])])
        lines += [
            *catalog.describe_binarised([s.spec for s in self._sources]),
            *ranges.describe(self.embodiments),
        ]
        if self._strategy.over == "task":
            task_shares = SamplingSchedule(self._strategy, self._groups).shares(0)
            lines.append(sampling.describe_shares(self._groups, task_shares, "task"))
        if self._config.paraphrases:
            count = sum(task in self._builder.paraphrases for task in self._instructions)
            lines.append(f"paraphrases: {count} of {len(self._instructions)} distinct instructions")
        return "\n".join(lines)

    def describe_reach(self, low: float, high: float) -> list[str]:
        """Return lines on actions outside [low, high], normalised: those that a head can output."""
        sketches = [
            [s.index.sketches["action"] for s in self._sources if s.record == i]
            for i in range(len(self.embodiments))
        ]
        pairs = zip(self.embodiments, sketches, strict=True)
        return [line for e, x in pairs for line in reach.describe_reach(e, x, low, high)]

    @cached_property
    def _held_out(self) -> list[DatasetSplit]:
        """Return the validation splits, opened on first use."""
        result, numbers = [], {name: i for i, name in enumerate(self.tasks)}
        for source in self._sources if self._config.validation_split else ():
            try:
                reader = self._reader(source.spec, self._config.validation_split)
            except MissingSplitError:
                if len(self._sources) == 1:
                    raise
                continue  # validate the other datasets of the mix; `describe` lists this one
            index = self._index(reader)
            names = self._tasks_of(source.spec, index, self._config.tasks)
            # A task that is not in training gets the id after the last one.
            tasks = np.array([numbers.get(name, len(numbers)) for name in names])
            has_task = np.array([bool(name) and name in numbers for name in names])
            split = replace(source, reader=reader, index=index, tasks=tasks, has_task=has_task)
            result.append(split)
        return result

    def _held_out_batches(self, source: DatasetSplit) -> Iterator[Batch]:
        steps = source.index.steps
        size = min(self._config.batch_size, int(steps.sum()))
        supply = JoinedSplits([source], [np.zeros(len(steps), np.int64)])
        self._check_budget(supply, self._budgets[1], VALIDATION)
        groups = SamplingGroups((source.spec.name,), steps.sum(keepdims=True))
        stream = EpisodeStream(
            supply=supply,
            size=size,
            part=slice(0, size),
            seed=0,
            dropout=False,
            pool=self._config.pool,
            budget=self._budgets[1],
            batches=self._validation_batches,
        )
        schedule = SamplingSchedule(sampling.ProportionalSampling(), groups)
        batches = RldsStream(self._work, stream, schedule, self.datasets, 0)
        try:
            yield from batches
        finally:  # also when the caller stops early
            batches.close()

    def _spec(self) -> BatchSpec:
        """Return the batch spec, from one episode."""
        source, zero = self._sources[0], np.zeros(1, np.int64)
        episode = [EpisodeRef(source, 0, source.load(0))]
        leaves, texts = self._builder.batch(episode, zero, zero, np.zeros((1, goals.DRAWS)), False)
        leaves["task.language.ids"], leaves["task.language.mask"] = self._text.encode(texts)
        return batch_spec(unflatten(leaves))

    def _open(self, specs: Sequence[catalog.DatasetSpec]) -> list[DatasetSplit]:
        d = self._config
        readers = [self._reader(spec, d.train_split) for spec in specs]
        indices = [self._index(reader) for reader in readers]
        self.embodiments, record = embodiment_records(
            specs, indices, d.normalization, d.range_check, d.representation
        )
        limits = [d.limit_of(spec.name) for spec in specs]
        indices = [i.first_episodes(n) for i, n in zip(indices, limits, strict=True)]
        names = [self._tasks_of(s, i, d.tasks) for s, i in zip(specs, indices, strict=True)]
        self.tasks = tuple(dict.fromkeys(itertools.chain.from_iterable(names)))
        self._instructions = {
            x
            for s, i in zip(specs, indices, strict=True)
            for x in self._tasks_of(s, i, "instruction")
        } - {""}
        numbers = {name: i for i, name in enumerate(self.tasks)}
        return [
            DatasetSplit(
                number=i,
                record=record[i],
                spec=specs[i],
                reader=readers[i],
                index=indices[i],
                embodiment=self.embodiments[record[i]],
                cameras=tuple(d.cameras),
                depth=tuple(c for c in d.depth if c in specs[i].depth),
                tasks=np.array([numbers[name] for name in names[i]]),
                has_task=np.array([bool(name) for name in names[i]]),
            )
            for i in range(len(specs))
        ]

    def _group(self) -> tuple[SamplingGroups, JoinedSplits]:
        """Return the sampling groups, datasets or tasks, and the episodes with their groups."""
        if self._strategy.over == "dataset":
            groups = [np.full(len(s.index.steps), s.number) for s in self._sources]
            names, weights = tuple(self.datasets), np.array(list(self._mix.weights.values()))
            kind = self._mix.kind
        else:
            groups, names, weights = [s.tasks for s in self._sources], self.tasks, None
            kind = self._config.mix_weights
        supply = JoinedSplits(self._sources, groups)
        table = supply.table
        steps = np.bincount(table.groups, table.steps, minlength=len(names)).astype(np.int64)
        return SamplingGroups(names, steps, weights, kind), supply

    def _dataset_shares(self, shares: np.ndarray) -> np.ndarray:
        """Return the share of each dataset, from the shares of the groups."""
        per_step = (shares / self._groups.steps)[self._supply.table.groups]
        which = np.repeat(np.arange(len(self._sources)), [len(s.tasks) for s in self._sources])
        return np.bincount(which, per_step * self._supply.table.steps)

    def _reader(self, spec: catalog.DatasetSpec, split: str) -> Reader:
        d = self._config
        root = d.root_of(spec.name)
        return Reader(
            spec,
            root,
            split,
            uninformative=d.uninformative_language,
            representation=d.representation,
            horizon=d.horizon,
        )

    def _tasks_of(self, spec: catalog.DatasetSpec, index: EpisodeIndex, kind: str) -> list[str]:
        return task_names(spec, index, kind, self._config.uninformative_language)

    def _index(self, reader: Reader) -> EpisodeIndex:
        d = self._config
        drop = d.bad_episodes == "drop"
        return statistics.index_episodes(
            reader, threads=self._threads, cache=d.cache, drop_bad=drop
        )

    def _check_cameras(self) -> None:
        cameras = {c for s in self._sources for c in s.spec.cameras}
        for camera in self._config.cameras:
            if camera not in cameras:
                raise ConfigError(unknown("camera of this mix in data.cameras", camera, cameras))
        depth = {c for s in self._sources for c in s.spec.depth}
        for camera in self._config.depth:
            if camera not in depth:
                option = "camera with depth in this mix (data.depth)"
                raise ConfigError(unknown(option, camera, depth or {"none"}))

    def _batch_bytes(self) -> int:
        size = sum(int(np.prod(s)) * np.dtype(t).itemsize for s, t in self.spec.values())
        return size * self._config.batch_size

    def _budget(self) -> tuple[int, int]:
        """Return the maximum bytes of a pool in training and in validation.

        Two pools are in memory at a time.
        """
        ahead = self._batch_bytes() * (self._config.prefetch + 1)
        left = int(self._config.memory * 2**30) - ahead
        budget = int(left * (1 - VALIDATION) / 2), int(left * VALIDATION / 2)
        self._check_budget(self._supply, budget[0], 1 - VALIDATION)
        return budget

    def _check_budget(self, supply: JoinedSplits, budget: int, part: float) -> None:
        """Raise ConfigError with the required data.memory if the largest episode is too large."""
        largest = int(np.argmax(supply.table.sizes))
        size = int(supply.table.sizes[largest])
        if size <= budget:
            return
        source, number = supply.find(largest)
        ahead = self._batch_bytes() * (self._config.prefetch + 1)
        need = (ahead + 2 * (size + 1) / part) / 2**30
        raise ConfigError(
            f"data.memory is {self._config.memory:g} GiB and prefetched batches take "
            f"{ahead / 2**30:.3g} GiB of it; the largest episode of {source.spec.name} "
            f"({source.name_of(number)}) has {size / 2**20:.3g} MiB, and two of that size must fit "
            f"in the memory for {source.reader.split!r}: set data.memory to at least {need:.3g}"
        )


def _part(size: int, process: tuple[int, int]) -> slice:
    """Return the rows of a batch that belong to a host."""
    index, count = process
    if not 0 <= index < count or size % count:
        raise ConfigError(
            f"data.batch_size {size} cannot be divided for process {index} of {count}; expected a "
            "multiple of the number of processes, and an index below it"
        )
    return slice(index * size // count, (index + 1) * size // count)


def _checked(start: Mapping[str, Any], names: Sequence[str]) -> Mapping[str, Any]:
    """Return a saved state; DataError if it is of another mix or of another format."""
    if start.keys() != {"batches", "datasets", "sampling"}:
        raise DataError(
            f"the saved data state has {sorted(start)}, expected batches, datasets, sampling: it "
            "is from another version of octolike; start a new run with train.init_from"
        )
    if sorted(start["datasets"]) != sorted(names):
        raise DataError(
            f"the saved data state has the datasets {sorted(start['datasets'])}, this mix has "
            f"{sorted(names)}; start a new run, or restore data.mix"
        )
    return start
