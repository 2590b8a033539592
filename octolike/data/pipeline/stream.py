"""A resumable stream of numpy batches: the consumer of the tf.data graph."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf

from octolike.data.pipeline.dataset_split import JoinedSplits
from octolike.data.pipeline.example_graph import BAD, MAX_STEPS, PARAPHRASE_DRAW, SUBTASKS, TEXT
from octolike.data.pipeline.graph import NUMBER, BatchGraph, SegmentSpan
from octolike.data.pipeline.sampling import SamplingSchedule
from octolike.data.rlds import decode
from octolike.data.rlds.record_files import error_summary
from octolike.errors import DataError
from octolike.text import TextTokenizer
from octolike.types import Batch

_LAST_BATCH = 1 << 40
_REPORTED = 5  # bad episodes of a dataset that are printed one by one
# One of several hosts stops after this many consecutive batches without a usable row in its part.
_PATIENCE = 100


@dataclass(frozen=True)
class Wording:
    """How instructions become token ids; paraphrases: {instruction: other wordings}."""

    text: TextTokenizer
    paraphrases: Mapping[str, Sequence[str]]

    def encode(self, leaves: dict[str, Any]) -> None:
        """Replace the texts of a batch by `ids` and `mask` of task.language and task.subtask."""
        texts = [x.decode("utf-8", errors="replace") for x in leaves.pop(TEXT).tolist()]
        draws = leaves.pop(PARAPHRASE_DRAW).tolist()
        if self.paraphrases:
            options = [(x, *self.paraphrases.get(x, ())) for x in texts]
            texts = [x[int(draw * len(x))] for x, draw in zip(options, draws, strict=True)]
        ids, mask = self.text.encode(texts)
        leaves["task"]["language"] = {"ids": ids, "mask": mask}
        if SUBTASKS in leaves:
            subtasks = leaves.pop(SUBTASKS)
            flat = [x.decode("utf-8", errors="replace") for x in subtasks.ravel().tolist()]
            ids, mask = (x.reshape(*subtasks.shape, -1) for x in self.text.encode(flat))
            leaves["task"]["subtask"] = {"ids": ids, "mask": mask}


@dataclass
class BadRows:
    """Reports the rows that the graph replaced.

    Attributes:
        supply: the episodes.
        drop: count and print them; else the first one raises DataError.
        hosts: that share a batch.
        counts: rows replaced so far, by dataset.
    """

    supply: JoinedSplits
    drop: bool
    hosts: int = 1
    counts: Counter[str] = field(default_factory=Counter)
    _episodes: dict[str, set[int]] = field(default_factory=dict)
    _unusable: int = 0  # batches in a row

    def check(self, bad: np.ndarray, masked: bool) -> None:
        """Report the rows of a batch; bad: int64 [B], −1 for none; masked: no row has an action.

        Raises DataError for a bad row unless they are dropped, and if a batch has no good row. A
        host sees its own part only, which may have no good row although the batch has one: such
        rows have no action, as in a batch of one host, and the host stops after _PATIENCE
        batches.
        """
        for row in bad[bad >= 0].tolist():
            episode, step = divmod(row, MAX_STEPS)
            name = self.supply.find(episode)[0].spec.name
            self.counts[name] += 1
            episodes = self._episodes.setdefault(name, set())
            if episode in episodes and self.drop:
                continue
            episodes.add(episode)
            fault = self._fault(episode, step)
            if not self.drop:
                raise fault
            if len(episodes) <= _REPORTED:
                print(f"replaced in training: {fault}", file=sys.stderr)
            if len(episodes) == _REPORTED:
                print(f"{name}: further bad episodes are counted, not printed", file=sys.stderr)
        # Rows without bad ones may be last steps.
        self._unusable = self._unusable + 1 if masked and (bad >= 0).all() else 0
        if self._unusable >= (1 if self.hosts == 1 else _PATIENCE):
            batches = "a batch has" if self.hosts == 1 else f"{_PATIENCE} batches of this host have"
            raise DataError(
                f"{batches} no usable row; bad rows so far: {self.describe()}; copy the datasets "
                "again"
            )
        if self._unusable == 1:
            print("no usable row in this host's part of a batch", file=sys.stderr)

    def describe(self) -> str:
        """Return the counts in words; "" for none."""
        return ", ".join(
            f"{name}: {count} rows of {len(self._episodes[name])} episodes replaced"
            for name, count in sorted(self.counts.items())
        )

    def _fault(self, episode: int, step: int) -> DataError:
        """Return the error of a bad row, found by reading its episode once more."""
        source, number = self.supply.find(episode)
        try:
            loaded = source.load(number)
        except DataError as error:
            return error
        place = f"{source.spec.name}: {source.name_of(number)}"
        steps = [step, *range(len(loaded))]
        for camera, frames in [*loaded.images.items(), *loaded.depth.items()]:
            for t in steps:
                try:
                    if isinstance(frames[t], bytes):
                        decode.check_image(frames[t])
                except tf.errors.OpError as error:
                    return DataError(
                        f"{place}: {camera} image of step {t} cannot be decoded: "
                        f"{error_summary(error)}; set data.bad_episodes='drop' to replace it"
                    )
        return DataError(f"{place}, step {step}: could not be read a moment ago, but can be now")


class RldsStream(Iterator[Batch]):
    """Batches of the graph as numpy arrays; `state()` is the position after the last one."""

    def __init__(
        self,
        graph: BatchGraph,
        schedule: SamplingSchedule,
        wording: Wording,
        bad_rows: BadRows,
        *,
        contents: Mapping[str, str],
        start: int = 0,
        process: tuple[int, int] = (0, 1),
        batches: int = 0,
        memory: int = 0,
    ) -> None:
        """Begin at batch `start`.

        contents: {dataset: DatasetSplit.contents()}; batches: length of the stream, 0: endless;
        memory: bytes that the graph holds.
        """
        self._graph, self._schedule, self._wording = graph, schedule, wording
        self._bad_rows, self._contents, self._process = bad_rows, dict(contents), process
        self._count, self._batches, self._memory = start, batches, memory
        self._elements: Iterator[Any] | None = None
        self._group_counts = np.zeros(len(schedule.groups.names), np.int64)
        self._fault: Exception | None = None

    def __next__(self) -> Batch:
        if self._fault is not None:
            raise self._fault
        if self._batches and self._count >= self._batches:
            raise StopIteration
        try:
            return self._next()
        except Exception as error:
            self.close()
            self._fault = error
            raise

    def state(self) -> dict[str, Any]:
        """Return the position after the last returned batch, for `RldsSource.train(start=...)`."""
        return {
            "batches": self._count,
            "datasets": list(self._contents),
            "contents": self._contents,
            "sampling": self._schedule.state(),
        }

    def state_at(self, position: Mapping[str, Any]) -> dict[str, Any]:
        """Return an earlier `state()` with the feedback that has come since."""
        return {**position, "sampling": self._schedule.state()}

    def feedback(
        self, datasets: Mapping[str, float], tasks: Mapping[str, float] | None = None
    ) -> None:
        """Update the sampling with results by dataset and by task, from the next batch on.

        Uses those that data.sampling.over selects and rebuilds the batches built ahead. Tasks that
        occur only in validation are ignored.
        """
        if self._schedule.over == "dataset":
            results = dict(datasets)
        else:
            results = {k: v for k, v in (tasks or {}).items() if k in self._schedule.names}
        if self._schedule.feedback(self._count, results):
            self._elements = None

    def shares(self) -> dict[str, float]:
        """Return the planned share of each dataset or task in the next batch."""
        shares = self._schedule.shares(self._count).tolist()
        return dict(zip(self._schedule.groups.names, shares, strict=True))

    def realised(self) -> dict[str, float]:
        """Return the actual share of each dataset or task in the batches returned so far."""
        shares = (self._group_counts / max(int(self._group_counts.sum()), 1)).tolist()
        return dict(zip(self._schedule.groups.names, shares, strict=True))

    def replaced(self) -> dict[str, int]:
        """Return the number of bad rows that were replaced so far, by dataset."""
        return dict(self._bad_rows.counts)

    def memory(self) -> int:
        """Return the bytes that the graph holds: encoded episodes, and batches made ahead."""
        return self._memory if self._elements is not None else 0

    def close(self) -> None:
        """Stop the threads of the graph and release the episodes."""
        counts = self._bad_rows.describe() if self._bad_rows.drop else ""
        if self._elements is not None and counts:
            print(counts, file=sys.stderr)
        self._elements = None
        self._fault = StopIteration()

    def _next(self) -> Batch:
        if self._elements is None:
            spans = segment_spans(self._schedule, self._count)
            self._elements = iter(self._graph.dataset(spans, self._count, self._process))
        try:
            batch = tf.nest.map_structure(_as_numpy, next(self._elements))
        except tf.errors.OpError as error:
            raise DataError(
                f"batch {self._count} could not be made: {error_summary(error)}"
            ) from None
        number = int(batch.pop(NUMBER))
        assert number == self._count, (number, self._count)
        masked = not batch["action_mask"].any()
        self._bad_rows.check(batch.pop(BAD), masked)
        self._wording.encode(batch)
        by_task = self._schedule.over == "task"
        groups = batch["task"]["task_id"] if by_task else batch["dataset"]
        self._group_counts += np.bincount(groups, minlength=len(self._group_counts))
        self._count += 1
        return batch


def segment_spans(schedule: SamplingSchedule, batch: int) -> list[SegmentSpan]:
    """Return the segments of constant shares from the one of `batch` on; the last is endless."""
    spans, first = [], schedule.since(batch)
    while True:
        end = _end_of_segment(schedule, first)
        spans.append(SegmentSpan(first, -1 if end is None else end - first, schedule.shares(first)))
        if end is None:
            return spans
        first = end


def _end_of_segment(schedule: SamplingSchedule, first: int) -> int | None:
    """Return the first batch with other shares than at `first`; None if they stay."""
    low, step = first, 1
    while low + step < _LAST_BATCH and schedule.since(low + step) == first:
        low, step = low + step, 2 * step
    if low + step >= _LAST_BATCH:
        return None
    high = low + step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if schedule.since(middle) == first else (low, middle)
    return high


def _as_numpy(x: tf.Tensor) -> np.ndarray:
    """Return a tensor as an array, without a copy unless it holds strings."""
    return x.numpy() if x.dtype == tf.string else np.asarray(memoryview(x))
