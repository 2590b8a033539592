"""RldsSource: the RLDS datasets of a config as training and validation batches.

The steps of a batch:

1. its frames are the next ones in the order of episodes and frames, in which each dataset or task
   has the share that the sampling strategy asks for (sampling.SamplingSchedule, order.Order);
2. the episodes that it needs are in memory, or are waited for (order.EpisodeCache);
3. window, chunk and goal are cut as indices, numbers are padded, images decoded (BatchBuilder);
4. instructions become token ids.

A batch is a pure function of the config and of `state()`: how many batches there have been, and
what feedback has changed. Resuming is arithmetic.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from octolike.config import Config, ConfigError, build_component, unknown
from octolike.data.pipeline import goals, sampling
from octolike.data.pipeline.batch_builder import BatchBuilder, EpisodeRef
from octolike.data.pipeline.dataset_split import (
    DatasetSplit,
    JoinedSplits,
    embodiment_records,
    task_names,
)
from octolike.data.pipeline.sampling import SamplingGroups, SamplingSchedule
from octolike.data.pipeline.stream import EpisodeStream, PipelineThreads, RldsStream
from octolike.data.rlds import statistics
from octolike.data.rlds.reader import MissingSplitError, Reader
from octolike.data.rlds.statistics import EpisodeIndex
from octolike.data.specs import catalog, mixes
from octolike.errors import DataError
from octolike.text import TOKENIZERS
from octolike.types import Batch, BatchSpec, Names, batch_spec, unflatten

# Of the memory budget, what validation may hold while the training episodes stay where they are.
VALIDATION = 1 / 4


class RldsSource:
    """The opened datasets of a config.

    Attributes:
        spec: of every batch.
        datasets, tasks: names, in the order of batch["dataset"] and batch["task"]["task_id"].
        embodiments: records, in the order of batch["embodiment"].
        names: of all three.
        shares: of examples per dataset at the start, float64 [datasets].
    """

    def __init__(self, config: Config) -> None:
        """Open everything that config.data names; statistics are made where they are missing."""
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
        self._maker = BatchBuilder(d, self.embodiments)
        self.spec = self._spec()
        self._work = PipelineThreads(
            maker=self._maker,
            text=self._text,
            loaders=ThreadPoolExecutor(self._threads),
            makers=ThreadPoolExecutor(max(1, min(d.prefetch, self._threads))),
            prefetch=d.prefetch,
            batch_bytes=self._batch_bytes(),
        )
        self._budgets = self._budget()

    def train(
        self, start: Mapping[str, Any] | None = None, process: tuple[int, int] = (0, 1)
    ) -> RldsStream:
        """Return the endless training batches, from the beginning or from a `state()`.

        process: (index, count) of this host: it gets its contiguous share of the examples of each
        batch, and reads no other episodes than those.
        """
        saved = _checked(start, self.datasets) if start is not None else {"sampling": ()}
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
        """Return per dataset a function that iterates over its validation batches.

        The same batches at every call, with every instruction and goal kept. A dataset without the
        split data.validation_split raises DataError; '' means no validation.
        """
        return {s.spec.name: lambda s=s: self._finite(s) for s in self._held_out}

    def source(self, dataset: str) -> DatasetSplit:
        """Return a dataset's held-out episodes, or those of training where none are held out."""
        sources = {s.spec.name: s for s in [*self._sources, *self._held_out]}
        if dataset not in sources:
            raise ConfigError(unknown("dataset of this mix", dataset, sources))
        return sources[dataset]

    def examples(self, source: DatasetSplit, frames: np.ndarray, draws: np.ndarray) -> Batch:
        """Return the batch of given frames, as validation makes it.

        frames: int [B, 2], episode of the source and step; draws: [B, goals.DRAWS], as in `goals`.
        """
        distinct, which = np.unique(frames[:, 0], return_inverse=True)
        shown = [EpisodeRef(source, e, source.load(e)) for e in distinct.tolist()]
        leaves, texts = self._maker.batch(shown, which, frames[:, 1], draws, False)
        leaves["task.language.ids"], leaves["task.language.mask"] = self._text.encode(texts)
        return unflatten(leaves)

    @property
    def names(self) -> Names:
        """Return the names of what a batch's integers count."""
        records = tuple(e.name for e in self.embodiments)
        return Names(tuple(self.datasets), records, self.tasks)

    def contents(self) -> dict[str, str]:
        """Return what the batches are of beside the config, to compare two machines by.

        {dataset/split: counts, and a digest of the episodes' lengths, bytes and tasks}.
        """
        found = {}
        for s in self._sources + self._held_out:
            columns = (s.index.steps, s.index.length, s.tasks, s.known)
            digest = hashlib.sha256(b"".join(np.asarray(x, "<i8").tobytes() for x in columns))
            found[f"{s.spec.name}/{s.reader.split}"] = (
                f"{len(s.index.steps)} episodes, {s.index.steps.sum()} steps, "
                f"{digest.hexdigest()[:16]}"
            )
        texts = json.dumps({k: list(v) for k, v in self._maker.paraphrases.items()}, sort_keys=True)
        found["paraphrases"] = hashlib.sha256(texts.encode()).hexdigest()[:16]
        return found

    def describe(self) -> str:
        """Return a table of the datasets: episodes, steps, share, left-out episodes and why.

        And of the tasks where these are sampled; what is uncertain about the datasets; and how many
        instructions have other wordings.
        """
        rows = [("dataset", "episodes", "steps", "share", "bad", "filtered", "robot")]
        sources = self._sources + self._held_out
        shares = [f"{share:.1%}" for share in self.shares] + ["held out"] * len(self._held_out)
        for source, share in zip(sources, shares, strict=True):
            i, name = source.index, f"{source.spec.name}/{source.reader.split}"
            numbers = (
                f"{len(i.steps):,}",
                f"{i.steps.sum():,}",
                share,
                str(len(i.bad)),
                str(i.filtered),
            )
            rows.append((name, *numbers, source.spec.robot))
        wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(x.ljust(w) for x, w in zip(r, wide, strict=True)).rstrip() for r in rows]
        for bad in (s.index.bad for s in sources):
            lines += [f"left out: {reason}" for reason in bad[:5]]
            lines += [f"left out: {len(bad) - 5} more"] if len(bad) > 5 else []
        held_out = {s.spec.name for s in self._held_out}
        without = [name for name in self.datasets if name not in held_out]
        if self._config.validation_split and without:
            lines.append(f"no split {self._config.validation_split!r}: {', '.join(without)}")
        lines += filter(None, [catalog.describe_uncertain([s.spec for s in self._sources])])
        if self._strategy.over == "task":
            shares = SamplingSchedule(self._strategy, self._groups).shares(0)
            lines.append(sampling.describe_shares(self._groups, shares, what="task"))
        if self._config.paraphrases:
            covered = sum(task in self._maker.paraphrases for task in self._instructions)
            lines.append(
                f"paraphrases: of {covered} of {len(self._instructions)} distinct instructions"
            )
        return "\n".join(lines)

    @cached_property
    def _held_out(self) -> list[DatasetSplit]:
        """Return the validation splits, opened when they are first asked for."""
        result, numbers = [], {name: i for i, name in enumerate(self.tasks)}
        for source in self._sources if self._config.validation_split else ():
            try:
                reader = self._reader(source.spec, self._config.validation_split)
            except MissingSplitError:
                if len(self._sources) == 1:
                    raise
                continue  # of a mix, those are validated that can be: `describe` says which
            index = self._index(reader)
            names = self._tasks_of(source.spec, index, self._config.tasks)
            # a task that training does not know has the number after the last one
            tasks = np.array([numbers.get(name, len(numbers)) for name in names])
            known = np.array([bool(name) and name in numbers for name in names])
            result.append(replace(source, reader=reader, index=index, tasks=tasks, known=known))
        return result

    def _finite(self, source: DatasetSplit) -> Iterator[Batch]:
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
        batches = RldsStream(
            self._work,
            stream,
            SamplingSchedule(sampling.ProportionalSampling(), groups),
            self.datasets,
            0,
        )
        try:
            yield from batches
        finally:  # also when the caller takes no more
            batches.close()

    def _spec(self) -> BatchSpec:
        """Return the spec of every batch, from one episode."""
        source, zero = self._sources[0], np.zeros(1, np.int64)
        shown = [EpisodeRef(source, 0, source.load(0))]
        leaves, texts = self._maker.batch(shown, zero, zero, np.zeros((1, goals.DRAWS)), False)
        leaves["task.language.ids"], leaves["task.language.mask"] = self._text.encode(texts)
        return batch_spec(unflatten(leaves))

    def _open(self, specs: Sequence[catalog.DatasetSpec]) -> list[DatasetSplit]:
        d = self._config
        readers = [self._reader(spec, d.train_split) for spec in specs]
        indices = [self._index(reader) for reader in readers]
        self.embodiments, record = embodiment_records(specs, indices, d.normalization)
        limits = [d.limit_of(spec.name) for spec in specs]
        indices = [i.first_episodes(n) for i, n in zip(indices, limits, strict=True)]
        names = [self._tasks_of(s, i, d.tasks) for s, i in zip(specs, indices, strict=True)]
        self.tasks = tuple(dict.fromkeys(name for some in names for name in some))
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
                known=np.array([bool(name) for name in names[i]]),
            )
            for i in range(len(specs))
        ]

    def _group(self) -> tuple[SamplingGroups, JoinedSplits]:
        """Return what is sampled: datasets or tasks, and the episodes of each."""
        if self._strategy.over == "dataset":
            groups = [np.full(len(s.index.steps), s.number) for s in self._sources]
            names, asked = tuple(self.datasets), np.array(list(self._mix.weights.values()))
            kind = self._mix.kind
        else:
            groups, names, asked = [s.tasks for s in self._sources], self.tasks, None
            kind = self._config.mix_weights
        supply = JoinedSplits(self._sources, groups)
        stock = supply.stock
        steps = np.bincount(stock.groups, stock.steps, minlength=len(names)).astype(np.int64)
        return SamplingGroups(names, steps, asked, kind), supply

    def _dataset_shares(self, shares: np.ndarray) -> np.ndarray:
        """Return the share of each dataset, from those of the groups."""
        per_step = (shares / self._groups.steps)[self._supply.stock.groups]
        which = np.repeat(np.arange(len(self._sources)), [len(s.tasks) for s in self._sources])
        return np.bincount(which, per_step * self._supply.stock.steps)

    def _reader(self, spec: catalog.DatasetSpec, split: str) -> Reader:
        d = self._config
        root = d.root_of(spec.name)
        return Reader(spec, root, split, uninformative=d.uninformative_language)

    def _tasks_of(self, spec: catalog.DatasetSpec, index: EpisodeIndex, kind: str) -> list[str]:
        return task_names(spec, index, kind, self._config.uninformative_language)

    def _index(self, reader: Reader) -> EpisodeIndex:
        d = self._config
        drop = d.bad_episodes == "drop"
        return statistics.index_episodes(
            reader, threads=self._threads, cache=d.cache, drop_bad=drop
        )

    def _check_cameras(self) -> None:
        there = {c for s in self._sources for c in s.spec.cameras}
        for camera in self._config.cameras:
            if camera not in there:
                raise ConfigError(unknown("camera of this mix in data.cameras", camera, there))
        deep = {c for s in self._sources for c in s.spec.depth}
        for camera in self._config.depth:
            if camera not in deep:
                what = "camera with depth in this mix (data.depth)"
                raise ConfigError(unknown(what, camera, deep or {"none"}))

    def _batch_bytes(self) -> int:
        size = sum(int(np.prod(s)) * np.dtype(t).itemsize for s, t in self.spec.values())
        return size * self._config.batch_size

    def _budget(self) -> tuple[int, int]:
        """Return the bytes of a pool in training and in validation: two are held at a time."""
        ahead = self._batch_bytes() * (self._config.prefetch + 1)
        left = int(self._config.memory * 2**30) - ahead
        budget = int(left * (1 - VALIDATION) / 2), int(left * VALIDATION / 2)
        self._check_budget(self._supply, budget[0], 1 - VALIDATION)
        return budget

    def _check_budget(self, supply: JoinedSplits, budget: int, part: float) -> None:
        """Raise ConfigError with the number needed if a pool cannot hold the largest episode."""
        largest = int(np.argmax(supply.stock.sizes))
        size = int(supply.stock.sizes[largest])
        if size <= budget:
            return
        source, number = supply.find(largest)
        ahead = self._batch_bytes() * (self._config.prefetch + 1)
        need = (ahead + 2 * (size + 1) / part) / 2**30
        raise ConfigError(
            f"data.memory is {self._config.memory:g} GiB; of that, batches made ahead take "
            f"{ahead / 2**30:.3g} GiB, and the largest episode of {source.spec.name} "
            f"({source.name_of(number)}) has {size / 2**20:.3g} MiB, two of which must fit into "
            f"what is left for {source.reader.split!r}: set data.memory to at least {need:.3g}"
        )


def _part(size: int, process: tuple[int, int]) -> slice:
    """Return a host's examples of a batch."""
    index, count = process
    if not 0 <= index < count or size % count:
        raise ConfigError(
            f"data.batch_size {size} cannot be cut for process {index} of {count}; expected a "
            "multiple of the number of processes, and an index below it"
        )
    return slice(index * size // count, (index + 1) * size // count)


def _checked(start: Mapping[str, Any], names: Sequence[str]) -> Mapping[str, Any]:
    """Return a saved state; DataError if it is of another mix, or not one of ours."""
    if start.keys() != {"batches", "datasets", "sampling"}:
        raise DataError(
            f"the saved data state has {sorted(start)}, expected batches, datasets, sampling: it "
            "is of another version of octolike; start a new run with train.init_from"
        )
    if sorted(start["datasets"]) != sorted(names):
        raise DataError(
            f"the saved data state is of {sorted(start['datasets'])}, this mix is of "
            f"{sorted(names)}; start a new run, or restore data.mix"
        )
    return start
