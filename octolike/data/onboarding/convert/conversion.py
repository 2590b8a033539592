"""The conversion itself: plan, processes, verification.

    directory = convert(Path("recordings"), "data", "my_robot", ConversionPlan())

1. The format is found, the episodes are listed and dealt to splits and shards: a pure function of
   the source and the plan, so that a second start goes on where the first was killed.
2. The first episode is read; what it has, every other must have.
3. Processes write shards, an episode at a time, each read back and compared before it counts.
4. The dataset gets its metadata and its name (octolike.data.rlds.writer).
"""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from tqdm import tqdm

from octolike.config import ConfigError, unknown
from octolike.data.onboarding.convert import recording as sources
from octolike.data.onboarding.convert.hdf5 import (
    SUFFIXES,
    AlohaRecording,
    RobomimicRecording,
    files,
    opened,
)
from octolike.data.onboarding.convert.lerobot import LeRobotRecording
from octolike.data.onboarding.convert.npz import NpzRecording
from octolike.data.onboarding.convert.recording import ConvertOptions, EpisodeLocation, Recording
from octolike.data.rlds.fields import STEPS
from octolike.data.rlds.writer import EncodedImage, Writer, rlds_episode
from octolike.errors import DataError

VERSION = "1.0.0"


@dataclass(frozen=True)
class ConversionPlan:
    """How a source becomes a dataset.

    Attributes:
        format: one of FORMATS; "": found out.
        options: how episodes are read.
        validation: share of the episodes that is held out where the source has no splits.
        episodes_per_shard: of each file; what a kill may cost.
        workers: processes; 0: one per core.
        drop_bad: leave out bad episodes, counted and reported, instead of stopping.
    """

    format: str = ""
    options: ConvertOptions = field(default_factory=ConvertOptions)
    validation: float = 0.05
    episodes_per_shard: int = 16
    workers: int = 0
    drop_bad: bool = False


@dataclass(frozen=True)
class ShardJob:
    """One shard, as a worker process gets it; `like`: the signature of every episode."""

    kind: str
    path: Path
    options: ConvertOptions
    writer: Writer
    split: str
    index: int
    items: tuple[EpisodeLocation, ...]
    like: Mapping[str, str]
    drop_bad: bool


def convert(path: Path, root: str, name: str, plan: ConversionPlan) -> tuple[Path, list[str]]:
    """Convert a source to <root>/<name>/1.0.0; return the directory and the reasons of drops.

    Raises DataError for a source that cannot be used, ConfigError for a setting that cannot be,
    OSError for a full disk, RuntimeError when a process was killed. What was finished stays: the
    same call goes on.
    """
    if not (0 <= plan.validation < 1) or plan.episodes_per_shard < 1:
        raise ConfigError("validation must lie in [0, 1), episodes per shard be at least 1")
    kind = plan.format or detect(path)
    if kind not in FORMATS:
        raise ConfigError(unknown("format", kind, FORMATS))
    if not path.exists():
        raise DataError(f"{path} is not there")
    source = FORMATS[kind](path, plan.options)
    items, about = source.items(), source.about()
    if not plan.options.control_hz and about.get("control_hz"):
        options = dataclasses.replace(plan.options, control_hz=about["control_hz"])
        source = FORMATS[kind](path, options)
    shards = deal(items, plan)
    settings = {
        "converted_from": kind,
        "source": digest(path, items),
        "options": dataclasses.asdict(source.options),
        "validation": plan.validation,
        "episodes_per_shard": plan.episodes_per_shard,
        "drop_bad": plan.drop_bad,
        "about": about,
    }
    writer = Writer(root, name, VERSION, {s: len(x) for s, x in shards.items()}, settings)
    if writer.finished:
        print(f"{writer.directory} is there already; remove it to convert anew", file=sys.stderr)
        return writer.directory, []
    like = _first(source, items, plan.drop_bad)
    jobs = [
        ShardJob(kind, path, source.options, writer, split, i, tuple(shard), like, plan.drop_bad)
        for split, parts in shards.items()
        for i, shard in enumerate(parts)
    ]
    _write_all(jobs, plan.workers or os.cpu_count() or 1)
    dropped = [r for j in jobs for r in writer.shard_note(j.split, j.index)["dropped"]]
    directory = writer.finish()
    whole = sum(tfds.builder_from_directory(directory).info.splits[s].num_examples for s in shards)
    if whole + len(dropped) != len(items):
        raise DataError(f"{directory} has {whole} episodes, the source {len(items)}")
    return directory, dropped


def detect(path: Path) -> str:
    """Return the format of a path; DataError with what was found where it is none."""
    if (path / "meta" / "info.json").is_file():
        return "lerobot"
    if path.suffix == ".npz" or (path.is_dir() and any(path.rglob("*.npz"))):
        return "npz"
    if path.suffix in SUFFIXES or (path.is_dir() and any(_hdf5(path))):
        first = path if path.is_file() else path / files(path)[0]
        with opened(first) as file:
            if "data" in file:
                return "hdf5-robomimic"
            if "observations" in file:
                return "hdf5-aloha"
            found = ", ".join(file) or "nothing"
        raise DataError(
            f"{first} has {found}: neither ALOHA's observations nor robomimic's data; write one "
            "npz file per episode instead (octolike/data/onboarding/convert/npz.py)"
        )
    if not path.exists():
        raise DataError(f"{path} is not there")
    found = sorted(p.name for p in path.iterdir())[:10] if path.is_dir() else [path.name]
    raise DataError(
        f"{path} is of no known format ({', '.join(FORMATS)}): it has "
        f"{', '.join(found) or 'nothing in it'}"
    )


def deal(
    items: list[EpisodeLocation], plan: ConversionPlan
) -> dict[str, list[list[EpisodeLocation]]]:
    """Return split → shards → episodes: the source's splits, or a seeded share held out."""
    rng = np.random.default_rng(len(items))
    order = [items[i] for i in rng.permutation(len(items))]
    if not any(i.split for i in items):
        held = max(1, round(len(items) * plan.validation)) if plan.validation else 0
        held = min(held, len(items) - 1)
        splits = {"train": order[held:], "val": order[:held]}
    else:
        splits = {s: [i for i in order if (i.split or "train") == s] for s in ("train", "val")}
    size = plan.episodes_per_shard
    return {
        split: [mine[i : i + size] for i in range(0, len(mine), size)]
        for split, mine in splits.items()
        if mine
    }


def digest(path: Path, items: list[EpisodeLocation]) -> str:
    """Return a digest of which episodes there are, and of their files' sizes."""
    root = path if path.is_dir() else path.parent
    sizes = {i.file: (root / i.file).stat().st_size for i in items if (root / i.file).is_file()}
    parts = [[i.file, i.key, i.split, sizes.get(i.file)] for i in items]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def write_shard(job: ShardJob) -> int:
    """Write and verify one shard; return how many episodes of the source it took."""
    source = FORMATS[job.kind](job.path, job.options)
    dropped: list[str] = []
    prints: list[list[dict[str, str]]] = []
    job.writer.write(
        job.split,
        job.index,
        _episodes(source, job, dropped, prints),
        check=lambda path, features: verify(path, features, prints),
        dropped=dropped,
    )
    return len(job.items)


def verify(path: Path, features: tfds.features.FeaturesDict, prints: list[Any]) -> None:
    """Read a shard back: as many episodes, the same numbers and texts, every image decodable.

    prints: per episode `fingerprints`. Raises DataError for the first difference.
    """
    count = 0
    skip = {STEPS: tfds.decode.SkipDecoding()}
    for raw in tf.data.TFRecordDataset(str(path)):
        read = tf.nest.map_structure(
            lambda x: x.numpy(), features.deserialize_example(raw, decoders=skip)
        )
        if count >= len(prints):
            break
        differ = [k for k, v in fingerprints(read[STEPS]).items() if prints[count].get(k) != v]
        if differ or len(prints[count]) != len(_leaves(read[STEPS])):
            raise DataError(f"{path}: episode {count} reads back otherwise in {differ}")
        for key, frames in _leaves(read[STEPS]).items():
            if _encoded(frames):
                _decode(frames, f"{path}, episode {count}, {key}")
        count += 1
    if count != len(prints):
        raise DataError(f"{path}: {count} episodes read back, {len(prints)} were written")


def fingerprints(steps: Mapping[str, Any]) -> dict[str, str]:
    """Return {field: digest of its values and shape} of an episode's steps."""
    result = {}
    for key, x in _leaves(steps).items():
        if isinstance(x, EncodedImage) or np.asarray(x).dtype.kind in "USO":
            parts = [v.encode() if isinstance(v, str) else bytes(v) for v in x]
        else:
            x = np.ascontiguousarray(x)
            parts = [str((x.dtype, x.shape)).encode(), x.tobytes()]
        made = hashlib.sha256()
        for part in parts:
            made.update(len(part).to_bytes(8, "little") + part)
        result[key] = made.hexdigest()
    return result


def _episodes(
    source: Recording, job: ShardJob, dropped: list[str], prints: list[Any]
) -> Iterator[dict[str, Any]]:
    for item in job.items:
        try:
            episode = source.read(item)
            _compare(sources.signature(episode), job.like, str(item))
            episode = rlds_episode(episode, str(item))
        except DataError as error:
            if not job.drop_bad:
                raise DataError(f"{job.path}: {error}") from None
            dropped.append(str(error))
            continue
        prints.append(fingerprints(episode[STEPS]))
        yield episode


def _compare(found: Mapping[str, str], like: Mapping[str, str], where: str) -> None:
    lost, more = sorted(set(like) - set(found)), sorted(set(found) - set(like))
    if lost or more:
        words = [f"lacks {', '.join(lost)}"] * bool(lost) + [f"has {', '.join(more)}"] * bool(more)
        raise DataError(f"{where} {' and '.join(words)}, unlike the first episode")
    for key, kind in like.items():
        if found[key] != kind:
            raise DataError(f"{where}: {key} is {found[key]}, the first episode's is {kind}")


def _first(source: Recording, items: list[EpisodeLocation], drop_bad: bool) -> dict[str, str]:
    """Return the signature of the first good episode."""
    reasons = []
    for item in items:
        try:
            return sources.signature(source.read(item))
        except DataError as error:
            reasons.append(str(error))
            if not drop_bad:
                break
    raise DataError(f"{source.path}: {reasons[0]}")


def _write_all(jobs: list[ShardJob], workers: int) -> None:
    left = [j for j in jobs if not j.writer.shard_note(j.split, j.index)]
    total, todo = sum(len(j.items) for j in jobs), sum(len(j.items) for j in left)
    bar = tqdm(total=total, initial=total - todo, desc="converting", unit=" episodes", disable=None)
    with bar:
        if min(workers, len(left)) <= 1:
            for job in left:
                bar.update(write_shard(job))
        else:
            _in_processes(left, min(workers, len(left)), bar.update)


def _in_processes(jobs: list[ShardJob], workers: int, done: Callable[[int], Any]) -> None:
    # A fork would copy tensorflow's threads as locks that nobody opens.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_end_with_parent) as pool:
        futures = [pool.submit(write_shard, job) for job in jobs]
        for future in futures:
            future.add_done_callback(lambda f: f.cancelled() or f.exception() or done(f.result()))
        finished, rest = wait(futures, return_when=FIRST_EXCEPTION)
        for future in rest:
            future.cancel()
        for future in finished:
            try:
                future.result()
            except BrokenProcessPool:
                raise RuntimeError(
                    "a process of the conversion was killed, perhaps for memory; what was finished "
                    "stays: the same command goes on, and fewer --workers need less"
                ) from None


def _end_with_parent() -> None:
    """Let a worker end when its parent was killed."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.threading.set_intra_op_parallelism_threads(1)


def _encoded(x: Any) -> bool:
    first = x[0] if len(x) else b""
    return isinstance(first, bytes) and first.startswith((sources.JPEG, sources.PNG))


def _decode(frames: Any, where: str) -> None:
    for t, frame in enumerate(frames):
        try:
            tf.io.decode_image(frame, expand_animations=False)
        except tf.errors.OpError as error:
            raise DataError(f"{where}, step {t} cannot be decoded: {error.message}") from None


def _leaves(tree: Mapping[str, Any]) -> dict[str, Any]:
    result = {}
    for key, value in tree.items():
        inner = _leaves(value) if isinstance(value, Mapping) else None
        result |= {key: value} if inner is None else {f"{key}.{k}": v for k, v in inner.items()}
    return result


def _hdf5(path: Path) -> Iterator[Path]:
    return (f for suffix in SUFFIXES for f in path.rglob(f"*{suffix}"))


FORMATS: dict[str, Callable[[Path, ConvertOptions], Recording]] = {
    "hdf5-aloha": AlohaRecording,
    "hdf5-robomimic": RobomimicRecording,
    "lerobot": LeRobotRecording,
    "npz": NpzRecording,
}
