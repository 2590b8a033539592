"""One parallel pass over the records of a split: its index and statistics.

Several shards are read at a time. TensorFlow's threads read, check and parse the records: the
fields and cameras that the spec reads. Images stay encoded, apart from those that may be black.
The Python part takes a few microseconds per step. The result of each shard is cached when it is
ready, so an interrupted pass resumes with the remaining shards, and memory grows with the index
alone.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from octolike.data.rlds import pass_lock
from octolike.data.rlds.episode import ExcludedEpisodeError
from octolike.data.rlds.index import (
    CAMERA_COLUMNS,
    COLUMNS,
    PARTS,
    EpisodeIndex,
    IndexCache,
)
from octolike.data.rlds.quantile_sketch import QuantileSketch
from octolike.data.rlds.reader import (
    Reader,
    take_steps,
    to_numpy,
)
from octolike.data.rlds.record_fields import ParsedEpisode
from octolike.data.rlds.record_files import (
    PARSE_ERRORS,
    RECORD_FOOTER,
    RECORD_HEADER,
    content_fingerprint,
    error_summary,
)
from octolike.data.rlds.split_records import HELD_OUT, is_held_out
from octolike.data.rlds.texts import first_text
from octolike.data.specs.standardize import StandardSteps
from octolike.embodiment import Statistics
from octolike.errors import ConfigError, DataError
from octolike.progress import LogLines, TerminalBar, progress
from octolike.representation import Representation


def index_episodes(reader: Reader, *, threads: int, cache: str, drop_bad: bool) -> EpisodeIndex:
    """Return the index of the reader's part, cached or by a pass over the records.

    The statistics are those of the training part.

    Raises DataError for the first bad episode unless `drop_bad`, and if no episode is usable.
    """
    files = IndexCache.for_reader(reader, cache)
    title = f"statistics of {reader.spec.name}/{reader.split}"

    def make() -> EpisodeIndex:
        if reason := files.outdated_reason():
            print(f"{title}: {reason}, recomputing", file=sys.stderr)
        index = scan_split(reader, threads, drop_bad, files)
        files.save(index)
        return index

    index = files.load()
    if index is None:
        lock = files.lock_path()
        index = pass_lock.make_once(lock, files.load, make, title) if lock else make()
    if index.bad and not drop_bad:
        raise DataError(f"{index.bad[0]} ({len(index.bad)} bad episodes in all)")
    if not reader.share:
        return index
    part = index.take(reader.in_part(index.content))
    if reader.part == HELD_OUT:
        return replace(part, bad=(), filtered_by={})
    if not len(part.steps):
        raise DataError(
            f"{reader.title}: all {len(index.steps)} usable episodes are held out; set "
            f"data.held_out below {reader.share:g}"
        )
    return part


def pool_statistics(indices: Sequence[EpisodeIndex]) -> tuple[Statistics, Statistics | None]:
    """Return the statistics of action and proprio over datasets that share an embodiment.

    Proprio: over the datasets that have it. Raises ValueError if their widths differ.
    """
    result: dict[str, Statistics | None] = dict.fromkeys(PARTS)
    for part in PARTS:
        sketches = [i.sketches[part] for i in indices if part in i.sketches]
        if sketches:
            total = QuantileSketch(sketches[0].dims)
            for sketch in sketches:
                total.merge(sketch)
            result[part] = total.statistics()
    action = result["action"]
    assert action is not None  # every index has the sketch of its actions
    return action, result["proprio"]


def scan_split(reader: Reader, threads: int, drop_bad: bool, cache: IndexCache) -> EpisodeIndex:
    """Return the index of a split: scan the shards that are not cached, and join all in order."""
    bar = progress(
        f"statistics of {reader.spec.name}/{reader.split}", sum(reader.counts), "episodes"
    )
    parser = _ParallelParser(reader, threads)

    def load_or_scan(shard: int) -> EpisodeIndex:
        index = cache.load_shard(shard)
        if index is None:
            index = _scan_shard(reader, parser, shard, drop_bad, bar)
            cache.save_shard(shard, index)
        else:
            bar.update(reader.counts[shard])
        return index

    pool = ThreadPoolExecutor(threads)
    try:
        with bar:
            shards = pool.map(load_or_scan, range(len(reader.files)))
            index = _join(_without_copies(reader, shards, drop_bad))
    finally:
        pool.shutdown(cancel_futures=True)  # after an error, no further shard is started
    if not len(index.steps):
        reasons = index.bad or tuple(f"{n} filtered: {k}" for k, n in index.filtered_by.items())
        first = f"; the first of {len(reasons)} reasons: {reasons[0]}" if reasons else ""
        raise DataError(f"{reader.spec.name}/{reader.split}: no usable episode{first}")
    return index


def _join(shards: Iterable[EpisodeIndex]) -> EpisodeIndex:
    """Return the index over the indices of all shards, which are taken and released one by one."""
    columns: dict[str, list[np.ndarray]] = {k: [] for k in COLUMNS + CAMERA_COLUMNS}
    bad: list[str] = []
    texts: dict[str, dict[str, int]] = {"task": {}, "label": {}}
    sketches: dict[str, QuantileSketch] = {}
    filtered: Counter[str] = Counter()
    positions: list[np.ndarray] = [np.zeros(0, np.int32)]
    idle = 0
    for shard in shards:
        filtered.update(shard.filtered_by)
        start = shard.kept_start
        columns["kept_start"].append(np.where(start < 0, -1, start + sum(map(len, positions))))
        positions.append(shard.kept)
        idle += shard.idle_steps
        for k in ("shard", "offset", "length", "content", "steps", *CAMERA_COLUMNS):
            columns[k].append(getattr(shard, k))
        for k, numbers in texts.items():
            mapping = [numbers.setdefault(x, len(numbers)) for x in getattr(shard, f"{k}s")]
            columns[k].append(np.array(mapping, np.int64)[getattr(shard, k)])
        for k, sketch in shard.sketches.items():
            sketches.setdefault(k, QuantileSketch(sketch.dims)).merge(sketch)
        bad += shard.bad
    return EpisodeIndex(
        **{k: np.concatenate(v) for k, v in columns.items()},
        tasks=tuple(texts["task"]),
        labels=tuple(texts["label"]),
        sketches=sketches,
        bad=tuple(bad),
        filtered_by=dict(filtered),
        kept=np.concatenate(positions),
        idle_steps=idle,
    )


def _without_copies(
    reader: Reader, shards: Iterable[EpisodeIndex], drop_bad: bool
) -> Iterator[EpisodeIndex]:
    """Yield the indices of the shards; DataError for a shard that is a copy of an earlier one.

    With `drop_bad`, the episodes of the copy are bad ones.
    """
    first: dict[bytes, int] = {}
    for number, index in enumerate(shards):
        original = first.setdefault(index.content.tobytes(), number)
        if original == number or not len(index.content):
            yield index
            continue
        reason = (
            f"{reader.files[number]} is a copy of {reader.files[original]}; copy the dataset again"
        )
        if not drop_bad:
            raise DataError(reason)
        copies = index.take(np.zeros(len(index.steps), bool))
        yield replace(copies, bad=index.bad + (reason,) * len(index.steps), sketches={})


@dataclass
class _ShardIndexBuilder:
    """Collects the index of one shard."""

    reader: Reader
    shard: int
    rows: list[tuple[int, ...]] = field(default_factory=list)
    cameras: dict[str, list[list[int]]] = field(
        default_factory=lambda: {k: [] for k in CAMERA_COLUMNS}
    )
    texts: dict[str, dict[str, int]] = field(default_factory=lambda: {"task": {}, "label": {}})
    sketches: dict[str, QuantileSketch] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)
    filtered: Counter[str] = field(default_factory=Counter)
    kept: list[int] = field(default_factory=list)
    idle: int = 0

    def add(self, offset: int, record: ScannedRecord, place: str) -> None:
        """Add a parsed episode; raise DataError if it is bad."""
        episode = record.episode
        if isinstance(episode, str):
            raise DataError(
                f"{self.reader.spec.name}: {place} does not match features.json: {episode}"
            )
        reader, steps = self.reader, to_numpy(episode.steps)
        standard = reader.standardize(steps, place)
        positions, available = reader.kept_steps(steps, standard, place), len(standard.action)
        standard, t = take_steps(standard, positions), len(positions)
        take = (lambda x: x) if t == available else functools.partial(tf.gather, indices=positions)
        images = {c: take(x) for c, x in episode.images.items()}
        counts = {
            "image_bytes": [_stored_bytes(x) for x in images.values()],
            "black_frames": [
                int(reader.black_frames(x, c, place).sum()) for c, x in images.items()
            ],
            "depth_bytes": [_stored_bytes(take(x)) for x in episode.depth.values()],
        }
        in_training = not is_held_out(np.array(record.content), reader.share)
        for part in PARTS:
            x = getattr(standard, part)
            if not in_training:
                continue
            if part == "action" and reader.representation != "as_stored":
                x = learned_actions(reader, standard)
            if x is not None:
                self.sketches.setdefault(part, QuantileSketch(x.shape[1])).update(x)
        paths = {"task": next(iter(reader.spec.language_paths), ""), "label": reader.spec.label}
        numbers = [
            numbers.setdefault(first_text(steps, paths[k]), len(numbers))
            for k, numbers in self.texts.items()
        ]
        start = -1
        if t < available:
            start, self.idle = len(self.kept), self.idle + available - t
            self.kept += positions.tolist()
        self.rows.append((self.shard, offset, record.length, record.content, t, start, *numbers))
        for k, column in counts.items():
            self.cameras[k].append(column)

    def build(self) -> EpisodeIndex:
        """Return the index."""
        rows = np.array(self.rows, np.int64).reshape(-1, len(COLUMNS))
        cameras, depth = len(self.reader.spec.cameras), len(self.reader.spec.depth)
        widths = dict(zip(CAMERA_COLUMNS, (cameras, cameras, depth), strict=True))
        per_camera = {
            k: np.array(self.cameras[k], np.int64).reshape(len(rows), n) for k, n in widths.items()
        }
        return EpisodeIndex(
            **dict(zip(COLUMNS, rows.T.copy(), strict=True)),
            **per_camera,
            tasks=tuple(self.texts["task"]),
            labels=tuple(self.texts["label"]),
            sketches=self.sketches,
            bad=tuple(self.bad),
            filtered_by=dict(self.filtered),
            kept=np.array(self.kept, np.int32),
            idle_steps=self.idle,
        )


def learned_actions(reader: Reader, standard: StandardSteps) -> np.ndarray:
    """Return the learned form of the valid actions of all chunks of an episode, float32 [n, A'].

    Raises ConfigError if the representation does not apply to the dataset.
    """
    spec, t = reader.spec, len(standard.action)
    a, states = spec.action, spec.proprio.names if spec.proprio else ()
    try:
        transform = Representation(reader.representation, a.names, a.absolute, a.normalized, states)
    except ValueError as error:
        raise ConfigError(f"{spec.name}: {error}") from None
    steps = np.arange(t)[:, None] + np.arange(reader.horizon)
    chunk = standard.action[np.minimum(steps, t - 1)]
    learned = transform.encode(chunk, standard.proprio)
    return np.asarray(learned[steps < t], np.float32)


def _stored_bytes(x: tf.Tensor) -> int:
    """Return the bytes of encoded images, or of an array."""
    if x.dtype == tf.string:
        return int(tf.reduce_sum(tf.strings.length(x)))
    return int(np.prod(x.shape)) * x.dtype.size


def _scan_shard(
    reader: Reader,
    parser: _ParallelParser,
    shard: int,
    drop_bad: bool,
    bar: TerminalBar | LogLines,
) -> EpisodeIndex:
    """Return the index of one shard."""
    builder, offset, count = _ShardIndexBuilder(reader, shard), 0, 0
    try:
        for record in parser.records(shard):
            place = f"{reader.files[shard]}, episode {count}"
            try:
                if reader.selected[shard][count]:
                    builder.add(offset, record, place)
            except ExcludedEpisodeError as excluded:
                builder.filtered[excluded.reason] += 1
            except DataError as error:
                builder.bad.append(str(error))
                if not drop_bad:
                    raise
            offset += RECORD_HEADER + record.length + RECORD_FOOTER
            count += 1
            bar.update()
    except DataError as error:
        if not drop_bad:
            raise
        missing = int(reader.selected[shard][count:].sum())
        builder.bad += [str(error)] * max(missing, 1)
    return builder.build()


class _ParallelParser:
    """Parses the episodes of shards: in TensorFlow's threads if there are more threads than shards.

    Otherwise the threads that scan the shards parse their own: a stream of each shard costs more.
    """

    def __init__(self, reader: Reader, threads: int) -> None:
        self._reader = reader
        self._parallel_calls = max(threads // len(reader.files), 1)
        self._parse = reader.parser(None, tuple(reader.spec.depth))

    def records(self, shard: int) -> Iterator[ScannedRecord]:
        """Yield the records of a shard in order.

        TensorFlow's threads parse until the first error; from there, records are parsed one by one
        to find the bad ones. Raises DataError for a truncated or corrupted file, and for one with
        another number of records.
        """
        if self._parallel_calls == 1:
            yield from self._parsed_one_by_one(shard, 0)
            return
        self._reader.check_shard(shard)
        stream = tf.data.TFRecordDataset(self._reader.files[shard], buffer_size=1 << 20)
        stream = stream.map(
            tf.autograph.experimental.do_not_convert(
                lambda record: (*_size_and_content(record), self._parse(record))
            ),
            num_parallel_calls=self._parallel_calls,
            deterministic=True,
        )
        count, listed = 0, self._reader.counts[shard]
        try:
            for length, content, episode in stream.take(listed + 1):
                if count == listed:
                    break  # `read_records` raises the error
                yield ScannedRecord(int(length), int(content), episode)
                count += 1
            else:
                if count == listed:
                    return
        except PARSE_ERRORS:
            pass
        yield from self._parsed_one_by_one(shard, count)

    def _parsed_one_by_one(self, shard: int, start: int) -> Iterator[ScannedRecord]:
        for raw in itertools.islice(self._reader.read_records(shard), start, None):
            record = tf.constant(raw)
            episode: ParsedEpisode | str
            try:
                episode = self._parse(record)
            except PARSE_ERRORS as error:
                episode = error_summary(error)
            length, content = map(int, _size_and_content(record))
            yield ScannedRecord(length, content, episode)


class ScannedRecord(NamedTuple):
    """A record of a shard: its bytes, its fingerprint, and its episode or the error of parsing."""

    length: int
    content: int
    episode: ParsedEpisode | str


def _size_and_content(record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    return tf.strings.length(record), content_fingerprint(record)
