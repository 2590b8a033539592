"""One parallel pass over the records, images undecoded: index and statistics, cached.

The index (shard, offset, length, steps, task of each episode) lets episodes be read in any order,
and tasks be weighed. The pass goes shard by shard, several at a time: records are read, checked and
parsed in tensorflow's threads, without the images; what is left to Python takes a few microseconds
per step. A shard's result is kept as soon as it is done (in <index>.parts), so that a pass that was
killed goes on with the other shards, and memory does not grow with the number of episodes beyond
the index itself.

The cache lies beside the data, or in data.cache (else the user's cache directory) when the data are
read-only; its name is a digest of everything it depends on, so a stale one is never read. Files get
their names when they are whole.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import sys
import threading
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from tqdm import tqdm

from octolike.data.rlds.fields import STEPS
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

FORMAT = 3  # of the cache
_ROWS = ("shard", "offset", "length", "steps", "task", "label")
_TEXTS = ("tasks", "labels", "bad")
_PARTS = ("action", "proprio")
# Of parsing: tensorflow's messages quote the record, and must themselves be UTF-8.
_FAULTS = (tf.errors.OpError, UnicodeDecodeError)


@dataclass(frozen=True, eq=False)
class EpisodeIndex:
    """Where usable episodes are, what they are told to do, and the statistics of their steps.

    Attributes:
        shard, offset, length, steps: int64 [episodes]; offset and length in bytes.
        task: int64 [episodes], into `tasks`, the instructions as stored; "" where there is none.
        label: int64 [episodes], into `labels`, texts of the row's label field; "" where none.
        sketches: "action" and, where there is one, "proprio": over all their steps.
        bad: reasons of the episodes that were left out because they cannot be used.
        filtered: how many episodes the row leaves out by its `keep` flag.
    """

    shard: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    steps: np.ndarray
    task: np.ndarray
    label: np.ndarray
    tasks: tuple[str, ...]
    labels: tuple[str, ...]
    sketches: Mapping[str, QuantileSketch]
    bad: tuple[str, ...]
    filtered: int = 0

    @cached_property
    def action(self) -> Statistics:
        """The statistics of the actions."""
        return self.sketches["action"].finish()

    @cached_property
    def proprio(self) -> Statistics | None:
        """The statistics of the proprio; None where there is none."""
        return self.sketches["proprio"].finish() if "proprio" in self.sketches else None

    def first_episodes(self, episodes: int) -> EpisodeIndex:
        """Return the index of the first `episodes` episodes (0: all); statistics stay of all."""
        n = episodes or len(self.steps)
        return replace(self, **{k: getattr(self, k)[:n] for k in _ROWS})


def index_episodes(reader: Reader, *, threads: int, cache: str, drop_bad: bool) -> EpisodeIndex:
    """Return the split's index, from the cache or by a pass over the records with a progress bar.

    Raises DataError for the first bad episode unless `drop_bad`, and when none is usable.
    """
    name = f"{reader.spec.name}-{reader.split}-{index_digest(reader)}.npz"
    places = [f"{reader.directory}/.octolike", cache or _user_cache()]
    result = _find(places, name)
    if result is None:
        kept = _Kept(places, name)
        result = _scan(reader, threads, drop_bad, kept)
        kept.finish(result)
    if result.bad and not drop_bad:
        raise DataError(f"{result.bad[0]} ({len(result.bad)} bad episodes in all)")
    return result


def pool_statistics(indices: Sequence[EpisodeIndex]) -> tuple[Statistics, Statistics | None]:
    """Return the statistics of action and proprio over datasets that share an embodiment.

    Proprio is that of the datasets that have it. ValueError where their widths differ.
    """
    result: dict[str, Statistics | None] = dict.fromkeys(_PARTS)
    for part in _PARTS:
        sketches = [i.sketches[part] for i in indices if part in i.sketches]
        if sketches:
            total = QuantileSketch(sketches[0].dims)
            for sketch in sketches:
                total.merge(sketch)
            result[part] = total.finish()
    return result["action"], result["proprio"]


def index_digest(reader: Reader) -> str:
    """Return a digest of what an index depends on: files, features, the row, the code."""
    stats = [tf.io.gfile.stat(f) for f in reader.files]
    files = [[Path(f).name, s.length, s.mtime_nsec] for f, s in zip(reader.files, stats)]
    row = reader.spec.fingerprint()
    parts = [FORMAT, row, files, reader.counts, repr(reader.features)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _scan(reader: Reader, threads: int, drop_bad: bool, kept: _Kept) -> EpisodeIndex:
    """Pass over the shards that are not kept yet, and join all of them in their order."""
    bar = tqdm(
        total=sum(reader.counts),
        desc=f"statistics of {reader.spec.name}/{reader.split}",
        unit=" episodes",
        disable=None,
        file=sys.stderr,
    )
    parser = _Parser(reader, threads)

    def work(shard: int) -> EpisodeIndex:
        part = kept.part(shard)
        if part is None:
            part = _scan_shard(reader, parser, shard, drop_bad, bar)
            kept.keep(shard, part)
        else:
            bar.update(reader.counts[shard])
        return part

    pool = ThreadPoolExecutor(threads)
    try:
        with bar:
            total = _join(pool.map(work, range(len(reader.files))))
    finally:
        pool.shutdown(cancel_futures=True)  # after a fault, shards that wait are not begun
    if not len(total.steps):
        raise DataError(f"{reader.spec.name}/{reader.split}: no usable episode" + _some(total.bad))
    return total


def _join(parts: Iterator[EpisodeIndex]) -> EpisodeIndex:
    """Return the index of all parts, which are taken one by one and forgotten."""
    rows, bad = {k: [] for k in _ROWS}, []
    texts: dict[str, dict[str, int]] = {"task": {}, "label": {}}
    sketches: dict[str, QuantileSketch] = {}
    filtered = 0
    for part in parts:
        filtered += part.filtered
        for k in ("shard", "offset", "length", "steps"):
            rows[k].append(getattr(part, k))
        for k, known in texts.items():
            numbers = [known.setdefault(text, len(known)) for text in getattr(part, f"{k}s")]
            rows[k].append(np.array(numbers, np.int64)[getattr(part, k)])
        for k, sketch in part.sketches.items():
            sketches.setdefault(k, QuantileSketch(sketch.dims)).merge(sketch)
        bad += part.bad
    columns = {k: np.concatenate(v) for k, v in rows.items()}
    names = {"tasks": tuple(texts["task"]), "labels": tuple(texts["label"])}
    return EpisodeIndex(**columns, **names, sketches=sketches, bad=tuple(bad), filtered=filtered)


@dataclass
class _Shard:
    """What a pass over one shard gathers."""

    number: int
    rows: list[tuple[int, ...]] = field(default_factory=list)
    texts: dict[str, dict[str, int]] = field(default_factory=lambda: {"task": {}, "label": {}})
    sketches: dict[str, QuantileSketch] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)
    filtered: int = 0

    def add(
        self, reader: Reader, offset: int, length: int, steps: Mapping[str, Any], where: str
    ) -> None:
        """Add an episode of parsed steps; DataError where it is bad."""
        standard = reader.standardize(steps, where)
        for part in _PARTS:
            x = getattr(standard, part)
            if x is not None:
                self.sketches.setdefault(part, QuantileSketch(x.shape[1])).update(x)
        keys = {"task": next(iter(reader.spec.language_paths), ""), "label": reader.spec.label}
        numbers = [
            known.setdefault(_text(steps, keys[k]), len(known)) for k, known in self.texts.items()
        ]
        self.rows.append((self.number, offset, length, len(standard.action), *numbers))

    def index(self) -> EpisodeIndex:
        """Return what was gathered."""
        rows = np.array(self.rows, np.int64).reshape(-1, len(_ROWS))
        names = {f"{k}s": tuple(known) for k, known in self.texts.items()}
        columns = dict(zip(_ROWS, rows.T.copy(), strict=True))
        bad = tuple(self.bad)
        return EpisodeIndex(
            **columns, **names, sketches=self.sketches, bad=bad, filtered=self.filtered
        )


def _scan_shard(
    reader: Reader, parser: _Parser, shard: int, drop_bad: bool, bar: tqdm
) -> EpisodeIndex:
    """Return the index of one shard."""
    found, offset, count = _Shard(shard), 0, 0
    try:
        for length, steps in parser.episodes(shard):
            where = f"{reader.files[shard]}, episode {count}"
            try:
                if isinstance(steps, str):
                    raise DataError(
                        f"{reader.spec.name}: {where} is not what features.json says: {steps}"
                    )
                found.add(reader, offset, length, steps, where)
            except ExcludedEpisodeError:
                found.filtered += 1
            except DataError as error:
                found.bad.append(str(error))
                if not drop_bad:
                    raise
            offset += RECORD_HEADER + length + RECORD_FOOTER
            count += 1
            bar.update()
    except DataError as error:
        if not drop_bad:
            raise
        found.bad += [str(error)] * max(reader.counts[shard] - count, 1)
    return found.index()


class _Parser:
    """Reads shards without their images, which are most of the bytes."""

    def __init__(self, reader: Reader, threads: int) -> None:
        self._reader = reader
        self._calls = max(threads // len(reader.files), 1)
        features = _without_images(reader.features)
        skip = {STEPS: tfds.decode.SkipDecoding()}
        self._parse = tf.function(
            lambda raw: features.deserialize_example(raw, decoders=skip),
            input_signature=[tf.TensorSpec((), tf.string)],
        )

    def episodes(self, shard: int) -> Iterator[tuple[int, dict[str, Any] | str]]:
        """Yield (bytes, parsed steps) of each record, or the fault instead of steps.

        In tensorflow's threads; at the first fault one by one from there, to tell which it is of.
        Raises DataError for a truncated or corrupt file, or one of another number of records.
        """
        stream = tf.data.TFRecordDataset(self._reader.files[shard], buffer_size=1 << 20)
        stream = stream.map(
            lambda raw: (tf.strings.length(raw), self._parse(raw)),
            num_parallel_calls=self._calls,
            deterministic=True,
        )
        count = 0
        try:
            for length, steps in stream.as_numpy_iterator():
                yield int(length), steps_with_metadata(steps, self._reader.spec.every)
                count += 1
        except _FAULTS:
            pass
        else:
            if count == self._reader.counts[shard]:
                return
        for raw in itertools.islice(self._reader.read_records(shard), count, None):
            try:
                parsed = tf.nest.map_structure(lambda x: x.numpy(), self._parse(raw))
                steps = steps_with_metadata(parsed, self._reader.spec.every)
            except _FAULTS as error:
                steps = (
                    error_summary(error)
                    if isinstance(error, tf.errors.OpError)
                    else "no text at all"
                )
            yield len(raw), steps


class _Kept:
    """Results on disk: the index and, until it is whole, the shards' parts. First place first."""

    def __init__(self, places: list[str], name: str) -> None:
        self._places, self._name = places, name

    def part(self, shard: int) -> EpisodeIndex | None:
        """Return a shard's result, if it is kept."""
        return _find(self._places, self._part(shard))

    def keep(self, shard: int, result: EpisodeIndex) -> None:
        """Keep a shard's result; where nothing can be written, it is not kept."""
        _save(result, self._places, self._part(shard))

    def finish(self, result: EpisodeIndex) -> None:
        """Write the index, and remove the parts."""
        refusals = _save(result, self._places, self._name)
        if refusals:
            print("statistics could not be cached: " + "; ".join(refusals), file=sys.stderr)
        for place in self._places:
            parts = f"{place}/{self._name}.parts"
            if tf.io.gfile.isdir(parts) and not _closed(place):
                tf.io.gfile.rmtree(parts)

    def _part(self, shard: int) -> str:
        return f"{self._name}.parts/{shard:05d}.npz"


def _save(result: EpisodeIndex, places: list[str], name: str) -> list[str]:
    """Write to the first place that takes it, whole or not at all; else return why none did."""
    arrays = {k: getattr(result, k) for k in _ROWS}
    # As JSON: numpy would give every text the room of the longest.
    texts = json.dumps({k: getattr(result, k) for k in (*_TEXTS, "filtered")})
    arrays["texts"] = np.frombuffer(texts.encode(), np.uint8)
    for part, sketch in result.sketches.items():
        arrays |= {f"{part}.{k}": x for k, x in sketch.arrays().items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    refusals = []
    for place in places:
        if _closed(place):
            refusals.append(f"{place}: read-only")
            continue
        directory, _, file = f"{place}/{name}".rpartition("/")
        temporary = f"{directory}/.{file}.{os.getpid()}.{threading.get_ident()}"
        try:
            tf.io.gfile.makedirs(directory)
            with tf.io.gfile.GFile(temporary, "wb") as f:
                f.write(buffer.getvalue())
            tf.io.gfile.rename(temporary, f"{directory}/{file}", overwrite=True)
        except (tf.errors.OpError, OSError) as error:
            refusals.append(f"{place}: {error}")
        else:
            return []
    return refusals


def _find(places: list[str], name: str) -> EpisodeIndex | None:
    """Return what the first place that has it holds; what cannot be read counts as not there."""
    for path in (f"{place}/{name}" for place in places):
        if tf.io.gfile.exists(path):
            try:
                return _load(path)
            except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError) as error:
                print(f"{path} is damaged ({error}); it is made again", file=sys.stderr)
    return None


def _load(path: str) -> EpisodeIndex:
    with tf.io.gfile.GFile(path, "rb") as f, np.load(io.BytesIO(f.read())) as data:
        arrays = {k: data[k] for k in data.files}
    sketches = {}
    for part in _PARTS:
        own = {k.removeprefix(f"{part}."): x for k, x in arrays.items() if k.startswith(f"{part}.")}
        if own:
            sketches[part] = QuantileSketch.from_arrays(own)
    texts = json.loads(arrays["texts"].tobytes())
    texts |= {k: tuple(texts[k]) for k in _TEXTS}
    return EpisodeIndex(**{k: arrays[k] for k in _ROWS}, **texts, sketches=sketches)


def _without_images(feature: tfds.features.FeatureConnector) -> tfds.features.FeatureConnector:
    """Return the same features, nested ones too, without images and videos."""
    if isinstance(feature, tfds.features.FeaturesDict):
        images = (tfds.features.Image, tfds.features.Video)
        kept = {k: v for k, v in feature.items() if not isinstance(v, images)}
        return tfds.features.FeaturesDict({k: _without_images(v) for k, v in kept.items()})
    if type(feature) is tfds.features.Dataset:
        return tfds.features.Dataset(_without_images(feature.feature))
    return feature


def _text(steps: Mapping[str, Any], key: str) -> str:
    """Return the first text of an episode that says something; "" for none, and without a key."""
    if not key:
        return ""
    value = (
        np.reshape(value_at(steps, key), -1) if key.startswith("episode.") else value_at(steps, key)
    )
    return next(filter(None, (x.strip() for x in decode_texts(value))), "")


def _closed(directory: str) -> bool:
    """Tell whether a local directory's parent is marked read-only, which root's rights ignore."""
    parent = Path(directory).parent
    return parent.is_dir() and not parent.stat().st_mode & 0o222


def _user_cache() -> str:
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return f"{home}/octolike"


def _some(reasons: tuple[str, ...]) -> str:
    return f"; the first of {len(reasons)} reasons: {reasons[0]}" if reasons else ""
