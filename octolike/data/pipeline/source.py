"""RldsSource: training and validation batches from the RLDS datasets of a config.

The steps of a batch:

1. its frames are the next ones in the order of episodes and frames, in which each dataset or task
   has its share of the sampling strategy (sampling.SamplingSchedule, order.FrameOrder);
2. its episodes are read by offset, verified, parsed and standardised (episode_graph);
3. windows, chunks and goals are computed as indices, numbers normalised, images decoded
   (example_graph);
4. instructions become token ids (stream.Wording).

Steps 1 to 3 are one tf.data graph (graph.BatchGraph), which `RldsSource.dataset` returns.

A batch is a pure function of the config and of `state()`: the number of batches, and the memory of
the feedback. Resuming is arithmetic.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import tensorflow as tf

from octolike.config import Config, ConfigError, build_component, unknown
from octolike.cores import usable_cores
from octolike.data.pipeline import closings, mixing, reach, sampling, start_table
from octolike.data.pipeline.dataset_split import (
    DatasetSplit,
    JoinedSplits,
    embodiment_records,
    open_all,
    task_names,
)
from octolike.data.pipeline.example_graph import BAD
from octolike.data.pipeline.graph import GRAPH_LEAVES, BatchGraph, StreamSettings
from octolike.data.pipeline.memory_budget import MemoryBudget
from octolike.data.pipeline.order import repeats_of_groups
from octolike.data.pipeline.sampling import SamplingGroups, SamplingSchedule
from octolike.data.pipeline.stream import BadRows, RldsStream, Wording, segment_spans
from octolike.data.pipeline.subtasks import describe_labels
from octolike.data.rlds import statistics
from octolike.data.rlds.index import EpisodeIndex
from octolike.data.rlds.reader import Reader
from octolike.data.rlds.split_records import MissingSplitError
from octolike.data.specs import catalog, mixes
from octolike.embodiment import Embodiment
from octolike.errors import DataError
from octolike.text import TOKENIZERS, load_paraphrases
from octolike.types import Batch, BatchSpec, Names, batch_share, flatten, unflatten


class RldsSource:
    """The opened datasets of a config.

    Attributes:
        spec: the batch spec.
        datasets, tasks: names in the order of batch["dataset"] and batch["task"]["task_id"].
        embodiments: records in the order of batch["embodiment"].
        names: names of datasets, embodiments and tasks.
        shares: initial share of the examples per dataset, float64 [datasets].
    """

    embodiments: Sequence[Embodiment]

    def __init__(self, config: Config) -> None:
        """Open the datasets of config.data; compute the statistics that are not cached."""
        d = self._config = config.data
        self._seed, self._validation_batches = config.seed, config.train.validation_batches
        self._threads = d.threads or usable_cores()
        rows = catalog.load_specs(d.specs)
        self._mix = mixes.parse(d.mix, d.mix_weights, rows)
        self.datasets = list(self._mix.weights)
        for option in ("roots", "limits", "validation_splits", "channel_orders"):
            for name in getattr(d, option).keys() - self._mix.weights.keys() - {"*"}:
                raise ConfigError(unknown(f"dataset in data.{option}", name, self.datasets))
        self._sources = self._open([catalog.find_spec(name, rows) for name in self.datasets])
        self._check_cameras()
        if d.closings:
            closings.check_labels([s.spec for s in self._sources])
        self._strategy = build_component(sampling.SAMPLING, d.sampling, "data.sampling")
        self._groups, self._supply = self._group()
        self.shares = self._dataset_shares(SamplingSchedule(self._strategy, self._groups).shares(0))
        paraphrases = load_paraphrases(d.paraphrases) if d.paraphrases else {}
        self._wording = Wording(build_component(TOKENIZERS, d.text, "data.text"), paraphrases)
        self._lanes = mixing.number_of_lanes(d.batch_size, d.lanes, d.pool)
        self._graphs: dict[str, BatchGraph] = {}
        self._memory = MemoryBudget(d)
        self._memory.check_training(self._supply, self._lanes)
        self._mixing_report = self._mixing()
        self.spec = self._spec()

    def train(
        self, start: Mapping[str, Any] | None = None, process: tuple[int, int] = (0, 1)
    ) -> RldsStream:
        """Return the endless training batches, from the beginning or from a `state()`.

        process: (index, count) of this host, which gets a contiguous part of each batch and reads
        only the episodes of that part.
        """
        schedule, first = self._position(start)
        graph = self._training_graph(process)
        contents = {s.spec.name: s.contents() for s in self._sources}
        _check_contents(start or {}, contents)
        return RldsStream(
            graph,
            schedule,
            self._wording,
            BadRows(self._supply, self._config.bad_episodes == "drop", process[1]),
            contents=contents,
            start=first,
            process=process,
            memory=(int(self._mixing_report.episode_bytes) + self._memory.ahead) // process[1],
        )

    def instructions(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids int32 [n, L], mask [n, L]) of all distinct instructions and paraphrases."""
        splits = [*self._sources, *self._held_out]
        texts = {"", *(text for split in splits for text in split.index.tasks)}
        texts |= {x for text in texts for x in self._wording.paraphrases.get(text, ())}
        return self._wording.text.encode(sorted(texts))

    def dataset(
        self,
        start: Mapping[str, Any] | None = None,
        process: tuple[int, int] = (0, 1),
        *,
        decode: bool = True,
    ) -> tf.data.Dataset:
        """Return the training batches as a tf.data.Dataset, to inspect, extend or profile.

        Its elements are the batches of `train`, except that instructions are strings [B] under
        "text", next to "paraphrase_draw" [B], the "batch_number" [] and "bad" [B]: for replaced
        rows, the number of the bad one, else −1. decode: else they are those before decoding, with
        leaves [lanes, rows, ...].
        """
        schedule, first = self._position(start)
        spans = segment_spans(schedule, first)
        return self._training_graph(process).dataset(spans, first, process, decode=decode)

    def validation(
        self, process: tuple[int, int] = (0, 1)
    ) -> dict[str, Callable[[], Iterator[Batch]]]:
        """Return {dataset: function that iterates over its validation batches}.

        Every call gives the same batches, without dropout. process: (index, count) of this host,
        which gets its share of each batch (types.batch_share). Raises DataError if the only dataset
        lacks the split data.validation_split; '' means no validation.
        """
        return {s.spec.name: partial(self._held_out_batches, s, process) for s in self._held_out}

    def source(self, dataset: str) -> DatasetSplit:
        """Return the held-out split of a dataset, or its training split if it has none."""
        sources = {s.spec.name: s for s in [*self._sources, *self._held_out]}
        if dataset not in sources:
            raise ConfigError(unknown("dataset of this mix", dataset, sources))
        return sources[dataset]

    def examples(self, source: DatasetSplit, frames: np.ndarray, draws: np.ndarray) -> Batch:
        """Return the batch of the given frames, without dropout.

        frames: int [B, 2], episode of the source and step; draws: float [B, goals.DRAWS].
        Raises DataError for a bad record or image.
        """
        supply = JoinedSplits([source], [np.zeros(len(source.index.steps), np.int64)])
        key = f"examples of {source.reader.title}"
        if key not in self._graphs:
            settings = self._settings(1, 1, self._memory.training, False)
            self._graphs[key] = BatchGraph(self._config, supply, self.embodiments, settings)
        examples = self._graphs[key].examples(frames, draws)
        leaves = {k: x.numpy() for k, x in examples.items()}
        BadRows(supply, drop=False).check(leaves.pop(BAD), masked=False)
        batch = unflatten(leaves)
        self._wording.encode(batch)
        return batch

    @property
    def names(self) -> Names:
        """Return the names of datasets, embodiments and tasks, in the order of their indices."""
        records = tuple(e.name for e in self.embodiments)
        return Names(tuple(self.datasets), records, self.tasks)

    def contents(self) -> dict[str, str]:
        """Return a summary of the data, to compare two machines with the same config.

        {dataset/split: DatasetSplit.contents()}, and a digest of the paraphrases.
        """
        summary = {s.reader.title: s.contents() for s in self._sources + self._held_out}
        texts = json.dumps(
            {k: list(v) for k, v in self._wording.paraphrases.items()}, sort_keys=True
        )
        summary["paraphrases"] = hashlib.sha256(texts.encode()).hexdigest()[:16]
        return summary

    def describe(self) -> str:
        """Return a table of the datasets, the reasons of dropped episodes, and uncertain specs.

        With a table of the tasks if they are sampled, and the number of paraphrased instructions.
        """
        lines = start_table.describe(
            self._config, self._sources, self._held_out, self.embodiments, self.shares
        )
        lines.append(self._mixing_report.describe())
        if self._strategy.over == "task":
            task_shares = SamplingSchedule(self._strategy, self._groups).shares(0)
            lines.append(sampling.describe_shares(self._groups, task_shares, "task"))
        if self._config.paraphrases:
            count = sum(task in self._wording.paraphrases for task in self._instructions)
            lines.append(f"paraphrases: {count} of {len(self._instructions)} distinct instructions")
        if self._config.subtasks:
            lines += describe_labels(self._sources)
        if self._config.closings:
            lines += closings.describe_labels(self._sources)
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
        for source in self._sources:
            if not self._config.validation_split_of(source.spec.name):
                continue
            try:
                reader = source.reader.held_out()
            except MissingSplitError:
                if len(self._sources) == 1:
                    raise
                continue  # validate the other datasets of the mix; `describe` lists this one
            index = self._index(reader)
            if not len(index.steps):
                continue  # a few episodes, and the hash holds none of them out
            names = self._tasks_of(source.spec, index, self._config.tasks)
            # A task that is not in training gets the id after the last one.
            tasks = np.array([numbers.get(name, len(numbers)) for name in names])
            has_task = np.array([bool(name) and name in numbers for name in names])
            split = replace(source, reader=reader, index=index, tasks=tasks, has_task=has_task)
            result.append(replace(split, views=()))
        return result

    def _held_out_batches(self, source: DatasetSplit, process: tuple[int, int]) -> Iterator[Batch]:
        steps = source.index.steps
        size = min(self._config.batch_size, int(steps.sum()))
        supply = JoinedSplits([source], [np.full(len(steps), source.number)])
        sizes = np.bincount([source.number], [steps.sum()], minlength=len(self.datasets))
        groups = SamplingGroups(tuple(self.datasets), sizes)
        lanes = math.gcd(size, 8)
        # Hosts that a lane cannot be divided between read the same lanes.
        readers = math.gcd(lanes, process[1])
        sharing = process[1] // readers
        key = f"batches of {source.reader.title}"
        if key not in self._graphs:
            self._memory.check_validation(supply, lanes)
            settings = self._settings(size, lanes, self._memory.validation, False)
            self._graphs[key] = BatchGraph(self._config, supply, self.embodiments, settings)
        stream = RldsStream(
            self._graphs[key],
            SamplingSchedule(sampling.ProportionalSampling(), groups),
            self._wording,
            BadRows(supply, self._config.bad_episodes == "drop", readers),
            contents={source.spec.name: source.contents()},
            process=(process[0] // sharing, readers),
            batches=self._validation_batches,
        )
        try:
            for batch in stream:
                yield batch_share(batch, (process[0] % sharing, sharing))
        finally:  # also when the caller stops early
            stream.close()

    def _position(self, start: Mapping[str, Any] | None) -> tuple[SamplingSchedule, int]:
        """Return the sampling schedule and the number of the next batch of a saved position."""
        beginning: dict[str, Any] = {"sampling": ()}
        saved = _checked(start, self.datasets) if start is not None else beginning
        schedule = SamplingSchedule(self._strategy, self._groups, saved["sampling"])
        return schedule, saved.get("batches", 0)

    def _training_graph(self, process: tuple[int, int]) -> BatchGraph:
        d = self._config
        index, count = process
        if not 0 <= index < count or self._lanes % count:
            raise ConfigError(
                f"process {index} of {count} has no part of the {self._lanes} lanes of a batch of "
                f"{d.batch_size}; expected a number of processes that divides data.lanes, which "
                "divides data.batch_size"
            )
        if "training" not in self._graphs:
            settings = self._training_settings()
            self._graphs["training"] = BatchGraph(d, self._supply, self.embodiments, settings)
        return self._graphs["training"]

    def _training_settings(self) -> StreamSettings:
        size, budget = self._config.batch_size, self._memory.training
        return self._settings(size, self._lanes, budget, True)

    def _settings(self, size: int, lanes: int, budget: float, dropout: bool) -> StreamSettings:
        d = self._config
        return StreamSettings(
            batch_size=size,
            lanes=lanes,
            seed=self._seed if dropout else 0,
            dropout=dropout,
            pool=d.pool or mixing.default_pool(size),
            budget=budget,
            threads=self._threads,
            prefetch=d.prefetch,
        )

    def _spec(self) -> BatchSpec:
        """Return the batch spec, from the shapes of the graph."""
        spec = {
            path: (tuple(x.shape[1:]), x.dtype.name)
            for path, x in flatten(self.dataset().element_spec)
            if path not in GRAPH_LEAVES
        }
        for name, x in zip(("ids", "mask"), self._wording.text.encode([""]), strict=True):
            spec[f"task.language.{name}"] = (tuple(x.shape[1:]), x.dtype.name)
            if self._config.subtasks:
                shape = (self._config.window, *x.shape[1:])
                spec[f"task.subtask.{name}"] = (shape, x.dtype.name)
        return dict(sorted(spec.items()))

    def _open(self, specs: Sequence[catalog.DatasetSpec]) -> list[DatasetSplit]:
        d = self._config
        readers = open_all(d, specs)
        indices = [self._index(reader) for reader in readers]
        self.embodiments, record = embodiment_records(
            specs,
            indices,
            d.normalization,
            d.range_check,
            d.representation,
            d.proprio_representation,
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
                views=specs[i].views if d.draw_views and set(specs[i].views) & {*d.cameras} else (),
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
            if camera not in (*cameras, *self._config.absent_cameras):
                reason = unknown("camera of this mix in data.cameras", camera, cameras)
                raise ConfigError(f"{reason}; a robot without it: data.absent_cameras={camera}")
        depth = {c for s in self._sources for c in s.spec.depth}
        for camera in self._config.depth:
            if camera not in depth:
                option = "camera with depth in this mix (data.depth)"
                raise ConfigError(unknown(option, camera, depth or {"none"}))

    def _mixing(self) -> mixing.MixingReport:
        """Return the mixing of the training batches under the initial shares."""
        settings, table = self._training_settings(), self._supply.table
        shares = SamplingSchedule(self._strategy, self._groups).shares(0)
        return mixing.report(
            table,
            repeats_of_groups(table, shares)[table.groups],
            np.concatenate([s.index.length for s in self._sources]),
            batch_size=settings.batch_size,
            lanes=settings.lanes,
            pool=settings.pool,
            budget=settings.budget,
        )


def _checked(start: Mapping[str, Any], names: Sequence[str]) -> Mapping[str, Any]:
    """Return a saved state; DataError if it is of another mix or of another format."""
    # Older versions stored no contents.
    if {*start, "contents"} != {"batches", "contents", "datasets", "sampling"}:
        raise DataError(
            f"the saved data state has {sorted(start)}, expected batches, contents, datasets, "
            "sampling: it is from another version of octolike; start a new run with train.init_from"
        )
    if sorted(start["datasets"]) != sorted(names):
        raise DataError(
            f"the saved data state has the datasets {sorted(start['datasets'])}, this mix has "
            f"{sorted(names)}; start a new run, or restore data.mix"
        )
    return start


def _check_contents(start: Mapping[str, Any], contents: Mapping[str, str]) -> None:
    """Raise DataError if a saved state is of other episodes: its position has other batches now."""
    for name, saved in start.get("contents", contents).items():
        if contents.get(name) != saved:
            raise DataError(
                f"the training episodes of {name} have changed since the state was saved: they "
                f"were {saved}, now they are {contents.get(name)}; restore the files of the "
                "dataset to resume, or start a new run with train.init_from"
            )
