"""One parallel pass over the records, images undecoded: index and statistics, cached.

The index (shard, offset, length and steps of each episode) lets episodes be read in any order. The
cache lies beside the data, or in data.cache (else the user's cache directory) when the data are
read-only; its name is a digest of everything it depends on, so a stale one is never read.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from octolike.data import standardize
from octolike.data.episodes import RECORD_FOOTER, RECORD_HEADER, DataError, Reader
from octolike.normalize import STATISTICS, Statistics

FORMAT = 1  # of the cache


@dataclass(frozen=True, eq=False)
class Index:
    """Where a split's usable episodes are, and the statistics of their steps.

    Attributes:
        shard, offset, length, steps: int64 [episodes].
        action, proprio: statistics over all their steps; proprio None where there is none.
        bad: reasons of the episodes that were left out.
    """

    shard: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    steps: np.ndarray
    action: Statistics
    proprio: Statistics | None
    bad: tuple[str, ...]

    def first(self, episodes: int) -> Index:
        """Return the index of the first `episodes` episodes (0: all); statistics stay of all."""
        n = episodes or len(self.steps)
        arrays = (x[:n] for x in (self.shard, self.offset, self.length, self.steps))
        return Index(*arrays, self.action, self.proprio, self.bad)


def index(reader: Reader, *, threads: int, cache: str, drop_bad: bool) -> Index:
    """Return the split's index, from the cache or by a pass over the records with a progress bar.

    Raises DataError for the first bad episode unless `drop_bad`, and when none is usable.
    """
    name = f"{reader.spec.name}-{reader.split}-{digest(reader)}.npz"
    places = [f"{reader.directory}/.octolike", cache or _user_cache()]
    found = next((p for d in places if tf.io.gfile.exists(p := f"{d}/{name}")), None)
    if found:
        result = _load(found)
    else:
        result = _scan(reader, threads, drop_bad)
        _save(result, places, name)
    if result.bad and not drop_bad:
        raise DataError(f"{result.bad[0]} ({len(result.bad)} bad episodes in all)")
    return result


def digest(reader: Reader) -> str:
    """Return a digest of what an index depends on: files, features, the row, the code."""
    code = inspect.getsource(reader.spec.standardize) + inspect.getsource(standardize)
    stats = [tf.io.gfile.stat(f) for f in reader.files]
    files = [[Path(f).name, s.length, s.mtime_nsec] for f, s in zip(reader.files, stats)]
    layout = [repr(reader.spec.action), repr(reader.spec.proprio), reader.spec.version]
    parts = [FORMAT, code, files, layout, reader.counts, repr(reader.features)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def summarize(x: np.ndarray, episodes: int) -> Statistics:
    """Return the statistics of x, float32 [steps, dims]."""
    p01, p99 = np.quantile(x, (0.01, 0.99), axis=0)
    arrays = (x.mean(0, np.float64), x.std(0, np.float64), x.min(0), x.max(0), p01, p99)
    arrays = dict(zip(STATISTICS, (np.asarray(a, np.float32) for a in arrays), strict=True))
    return Statistics(**arrays, steps=len(x), episodes=episodes)


def _scan(reader: Reader, threads: int, drop_bad: bool) -> Index:
    bar = tqdm(
        total=sum(reader.counts),
        desc=f"statistics of {reader.spec.name}/{reader.split}",
        unit=" episodes",
        disable=None,
        file=sys.stderr,
    )
    with bar, ThreadPoolExecutor(threads) as pool:
        shards = range(len(reader.files))
        parts = list(pool.map(lambda s: _scan_shard(reader, s, drop_bad, bar), shards))
    rows = np.array([r for p in parts for r in p[0]], np.int64).reshape(-1, 4)
    action = [a for p in parts for a in p[1]]
    proprio = [a for p in parts for a in p[2]]
    bad = tuple(b for p in parts for b in p[3])
    if not len(rows):
        raise DataError(f"{reader.spec.name}/{reader.split}: no usable episode" + _some(bad))
    return Index(
        *rows.T,
        action=summarize(np.concatenate(action), len(rows)),
        proprio=summarize(np.concatenate(proprio), len(rows)) if proprio else None,
        bad=bad,
    )


def _scan_shard(reader: Reader, shard: int, drop_bad: bool, bar: tqdm) -> tuple[list, ...]:
    """Return (rows, actions, proprios, reasons) of a shard's episodes."""
    rows, actions, proprios, bad, offset, count = [], [], [], [], 0, 0
    try:
        for raw in reader.records(shard):
            where = f"{reader.files[shard]}, episode {count}"
            try:
                action, proprio = reader.standard(raw, where)
                rows.append((shard, offset, len(raw), len(action)))
                actions.append(action)
                proprios += [] if proprio is None else [proprio]
            except DataError as error:
                bad.append(str(error))
                if not drop_bad:
                    raise
            offset += RECORD_HEADER + len(raw) + RECORD_FOOTER
            count += 1
            bar.update()
    except DataError as error:
        if not drop_bad:
            raise
        bad += [str(error)] * max(reader.counts[shard] - count, 1)
    return rows, actions, proprios, bad


def _save(result: Index, places: list[str], name: str) -> None:
    """Write to the first place that takes it, whole or not at all."""
    arrays = {k: getattr(result, k) for k in ("shard", "offset", "length", "steps")}
    for part in ("action", "proprio"):
        statistics = getattr(result, part)
        if statistics is not None:
            arrays |= {f"{part}.{k}": getattr(statistics, k) for k in STATISTICS}
            arrays[f"{part}.count"] = np.array([statistics.steps, statistics.episodes])
    arrays["bad"] = np.array(result.bad, dtype=np.str_)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    refusals = []
    for directory in places:
        if _closed(directory):
            refusals.append(f"{directory}: read-only")
            continue
        temporary = f"{directory}/.{name}.{os.getpid()}"
        try:
            tf.io.gfile.makedirs(directory)
            with tf.io.gfile.GFile(temporary, "wb") as f:
                f.write(buffer.getvalue())
            tf.io.gfile.rename(temporary, f"{directory}/{name}", overwrite=True)
        except (tf.errors.OpError, OSError) as error:
            refusals.append(f"{directory}: {error}")
        else:
            return
    print("statistics could not be cached: " + "; ".join(refusals), file=sys.stderr)


def _load(path: str) -> Index:
    with tf.io.gfile.GFile(path, "rb") as f, np.load(io.BytesIO(f.read())) as data:
        statistics = {"action": None, "proprio": None}
        for part in statistics:
            if f"{part}.mean" in data:
                steps, episodes = data[f"{part}.count"].tolist()
                arrays = {k: data[f"{part}.{k}"] for k in STATISTICS}
                statistics[part] = Statistics(**arrays, steps=steps, episodes=episodes)
        arrays = (data[k] for k in ("shard", "offset", "length", "steps"))
        return Index(*arrays, **statistics, bad=tuple(data["bad"].tolist()))


def _closed(directory: str) -> bool:
    """Tell whether a local directory's parent is marked read-only, which root's rights ignore."""
    parent = Path(directory).parent
    return parent.is_dir() and not parent.stat().st_mode & 0o222


def _user_cache() -> str:
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return f"{home}/octolike"


def _some(reasons: tuple[str, ...]) -> str:
    return f"; the first of {len(reasons)} reasons: {reasons[0]}" if reasons else ""
