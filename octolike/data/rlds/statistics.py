"""One parallel pass over the records of a split, images undecoded: its index and statistics.

Several shards are read at a time. TensorFlow's threads read, check and parse the records, without
the images; the Python part takes a few microseconds per step. The result of each shard is cached
when it is ready, so an interrupted pass resumes with the remaining shards, and memory grows with
the index alone.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from octolike.data.rlds.fields import STEPS
from octolike.data.rlds.index import COLUMNS, PARTS, EpisodeIndex, IndexCache
from octolike.data.rlds.quantile_sketch import QuantileSketch
from octolike.data.rlds.reader import (
    RECORD_FOOTER,
    RECORD_HEADER,
    ExcludedEpisodeError,
    Reader,
    decode_texts,
    error_summary,
    steps_with_metadata,
    value_at,
)
from octolike.embodiment import Statistics
from octolike.errors import DataError
from octolike.progress import LogLines, TerminalBar, progress

# TensorFlow's messages quote the record, and decoding them fails if it is not UTF-8.
_PARSE_ERRORS = (tf.errors.OpError, UnicodeDecodeError)


def index_episodes(reader: Reader, *, threads: int, cache: str, drop_bad: bool) -> EpisodeIndex:
    """Return the split's index, from the cache or by a pass over the records with a progress bar.

    Raises DataError for the first bad episode unless `drop_bad`, and if no episode is usable.
    """
    files = IndexCache.for_reader(reader, cache)
    index = files.load()
    if index is None:
        if reason := files.outdated_reason():
            title = f"statistics of {reader.spec.name}/{reader.split}"
            print(f"{title}: {reason}, recomputing", file=sys.stderr)
        index = scan_split(reader, threads, drop_bad, files)
        files.save(index)
    if index.bad and not drop_bad:
        raise DataError(f"{index.bad[0]} ({len(index.bad)} bad episodes in all)")
    return index


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
    parser = _ImagelessParser(reader, threads)

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
            index = _join(pool.map(load_or_scan, range(len(reader.files))))
    finally:
        pool.shutdown(cancel_futures=True)  # after an error, no further shard is started
    if not len(index.steps):
        reasons = index.bad
        first = f"; the first of {len(reasons)} reasons: {reasons[0]}" if reasons else ""
        raise DataError(f"{reader.spec.name}/{reader.split}: no usable episode{first}")
    return index


def _join(shards: Iterable[EpisodeIndex]) -> EpisodeIndex:
    """Return the index over the indices of all shards, which are taken and released one by one."""
    columns: dict[str, list[np.ndarray]] = {k: [] for k in COLUMNS}
    bad: list[str] = []
    texts: dict[str, dict[str, int]] = {"task": {}, "label": {}}
    sketches: dict[str, QuantileSketch] = {}
    filtered = 0
    for shard in shards:
        filtered += shard.filtered
        for k in ("shard", "offset", "length", "steps"):
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
        filtered=filtered,
    )


@dataclass
class _ShardIndexBuilder:
    """Collects the index of one shard."""

    shard: int
    rows: list[tuple[int, ...]] = field(default_factory=list)
    texts: dict[str, dict[str, int]] = field(default_factory=lambda: {"task": {}, "label": {}})
    sketches: dict[str, QuantileSketch] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)
    filtered: int = 0

    def add(
        self, reader: Reader, offset: int, length: int, steps: Mapping[str, Any], place: str
    ) -> None:
        """Add an episode of parsed steps; raise DataError if it is bad."""
        standard = reader.standardize(steps, place)
        for part in PARTS:
            x = getattr(standard, part)
            if x is not None:
                self.sketches.setdefault(part, QuantileSketch(x.shape[1])).update(x)
        paths = {"task": next(iter(reader.spec.language_paths), ""), "label": reader.spec.label}
        numbers = [
            numbers.setdefault(_first_text(steps, paths[k]), len(numbers))
            for k, numbers in self.texts.items()
        ]
        self.rows.append((self.shard, offset, length, len(standard.action), *numbers))

    def build(self) -> EpisodeIndex:
        """Return the index."""
        rows = np.array(self.rows, np.int64).reshape(-1, len(COLUMNS))
        return EpisodeIndex(
            **dict(zip(COLUMNS, rows.T.copy(), strict=True)),
            tasks=tuple(self.texts["task"]),
            labels=tuple(self.texts["label"]),
            sketches=self.sketches,
            bad=tuple(self.bad),
            filtered=self.filtered,
        )


def _scan_shard(
    reader: Reader,
    parser: _ImagelessParser,
    shard: int,
    drop_bad: bool,
    bar: TerminalBar | LogLines,
) -> EpisodeIndex:
    """Return the index of one shard."""
    builder, offset, count = _ShardIndexBuilder(shard), 0, 0
    try:
        for length, steps in parser.episodes(shard):
            place = f"{reader.files[shard]}, episode {count}"
            try:
                if isinstance(steps, str):
                    raise DataError(
                        f"{reader.spec.name}: {place} does not match features.json: {steps}"
                    )
                builder.add(reader, offset, length, steps, place)
            except ExcludedEpisodeError:
                builder.filtered += 1
            except DataError as error:
                builder.bad.append(str(error))
                if not drop_bad:
                    raise
            offset += RECORD_HEADER + length + RECORD_FOOTER
            count += 1
            bar.update()
    except DataError as error:
        if not drop_bad:
            raise
        builder.bad += [str(error)] * max(reader.counts[shard] - count, 1)
    return builder.build()


class _ImagelessParser:
    """Parses the episodes of shards without their images, which are most of the bytes."""

    def __init__(self, reader: Reader, threads: int) -> None:
        self._reader = reader
        self._parallel_calls = max(threads // len(reader.files), 1)
        features = _without_images(reader.features)
        skip = {STEPS: tfds.decode.SkipDecoding()}
        self._parse = tf.function(
            lambda record: features.deserialize_example(record, decoders=skip),
            input_signature=[tf.TensorSpec((), tf.string)],
        )

    def episodes(self, shard: int) -> Iterator[tuple[int, dict[str, Any] | str]]:
        """Yield (bytes, parsed steps) of each record; for a bad record, (bytes, error message).

        TensorFlow's threads parse until the first error; from there, records are parsed one by one
        to find the bad ones. Raises DataError for a truncated or corrupted file, and for one with
        another number of records.
        """
        stream = tf.data.TFRecordDataset(self._reader.files[shard], buffer_size=1 << 20)
        stream = stream.map(
            lambda record: (tf.strings.length(record), self._parse(record)),
            num_parallel_calls=self._parallel_calls,
            deterministic=True,
        )
        every, count = self._reader.spec.every, 0
        try:
            for length, steps in stream.as_numpy_iterator():
                yield int(length), steps_with_metadata(steps, every)
                count += 1
        except _PARSE_ERRORS:
            pass
        else:
            if count == self._reader.counts[shard]:
                return
        for record in itertools.islice(self._reader.read_records(shard), count, None):
            try:
                parsed = tf.nest.map_structure(lambda x: x.numpy(), self._parse(record))
                steps = steps_with_metadata(parsed, every)
            except _PARSE_ERRORS as error:
                steps = error_summary(error)
            yield len(record), steps


def _without_images(feature: tfds.features.FeatureConnector) -> tfds.features.FeatureConnector:
    """Return the same features, nested ones too, without images and videos."""
    if isinstance(feature, tfds.features.FeaturesDict):
        images = (tfds.features.Image, tfds.features.Video)
        remaining = {k: v for k, v in feature.items() if not isinstance(v, images)}
        return tfds.features.FeaturesDict({k: _without_images(v) for k, v in remaining.items()})
    if type(feature) is tfds.features.Dataset:
        return tfds.features.Dataset(_without_images(feature.feature))
    return feature


def _first_text(steps: Mapping[str, Any], path: str) -> str:
    """Return the first non-blank text at a path of an episode; "" without one or without a path."""
    if not path:
        return ""
    texts = value_at(steps, path)
    texts = np.reshape(texts, -1) if path.startswith("episode.") else texts
    return next(filter(None, (x.strip() for x in decode_texts(texts))), "")
