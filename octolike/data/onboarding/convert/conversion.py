"""Convert recordings to an RLDS dataset, in parallel and verified.

    conversion = convert(Path("recordings"), "data", "my_robot", ConversionPlan())
    conversion.directory, conversion.dropped, conversion.left_out

1. The format is detected, the episodes are listed and assigned to splits and shards: a pure
   function of the recording and the plan, so an interrupted conversion resumes.
2. The first episode is read; all others must have the same fields.
3. Processes write shards, one episode at a time; each shard is read back and compared.
4. The dataset gets its metadata and its final name (octolike.data.rlds.writer).
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
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from octolike.config import ConfigError, unknown
from octolike.cores import usable_cores
from octolike.data.onboarding.convert import recording as sources
from octolike.data.onboarding.convert.frame_encoding import JPEG, PNG, ConvertOptions
from octolike.data.onboarding.convert.hdf5 import (
    SUFFIXES,
    Hdf5Recording,
    RobomimicRecording,
    hdf5_files,
    open_hdf5,
)
from octolike.data.onboarding.convert.lerobot import LeRobotRecording
from octolike.data.onboarding.convert.npz import NpzRecording
from octolike.data.onboarding.convert.recording import EpisodeLocation, Recording
from octolike.data.rlds.fields import STEPS
from octolike.data.rlds.writer import EncodedImage, Writer, rlds_episode
from octolike.errors import DataError
from octolike.progress import progress

VERSION = "1.0.0"
FAILURES = {"failure", "failures", "failed"}  # names of folders
PROBES = 9  # episodes that decide which fields are usual, if bad episodes are to be left out


@dataclass(frozen=True)
class ConversionPlan:
    """Options of a conversion.

    Attributes:
        format: one of FORMATS; "": detected.
        options: for reading episodes.
        validation: share of held-out episodes if the recording has no splits.
        episodes_per_shard: episodes of a file; an interruption loses at most one file per worker.
        workers: processes; 0: one per core.
        drop_bad: leave out and report bad episodes instead of stopping.
    """

    format: str = ""
    options: ConvertOptions = field(default_factory=ConvertOptions)
    validation: float = 0.05
    episodes_per_shard: int = 16
    workers: int = 0
    drop_bad: bool = False


class Conversion(NamedTuple):
    """The result of a conversion.

    Attributes:
        directory: the dataset's directory.
        dropped: reasons of the episodes that were left out.
        left_out: {column: reason} of the columns that were left out of every or of some episodes.
        changed: {column: how it is stored}, for columns that are not stored as recorded.
    """

    directory: Path
    dropped: list[str]
    left_out: dict[str, str]
    changed: dict[str, str]


@dataclass(frozen=True)
class ShardJob:
    """A shard for a worker process to write; expected: the signature of every episode."""

    kind: str
    path: Path
    options: ConvertOptions
    writer: Writer
    split: str
    index: int
    locations: tuple[EpisodeLocation, ...]
    expected: Mapping[str, str]
    drop_bad: bool


def convert(path: Path, root: str, name: str, plan: ConversionPlan) -> Conversion:
    """Convert a recording to <root>/<name>/1.0.0.

    Raises DataError for an unusable recording, ConfigError for a bad option, OSError for a full
    disk, RuntimeError if a process is killed. Finished shards stay, and the same call resumes.
    """
    if not (0 <= plan.validation < 1) or plan.episodes_per_shard < 1:
        raise ConfigError(
            "validation must lie in [0, 1), and episodes per shard must be at least 1"
        )
    kind = plan.format or detect(path)
    if kind not in FORMATS:
        raise ConfigError(unknown("format", kind, FORMATS))
    if not path.exists():
        raise DataError(f"{path} does not exist")
    source = FORMATS[kind](path, plan.options)
    with sources.checked(str(path)):
        locations, about = source.episodes(), source.metadata()
    rate = plan.options.control_hz or about.get("control_hz") or 0.0
    if not 0 <= rate < np.inf:
        raise DataError(f"{path}: the control rate is {rate:g}; expected a positive number, --hz")
    if not plan.options.control_hz and about.get("control_hz"):
        options = dataclasses.replace(plan.options, control_hz=about["control_hz"])
        source = FORMATS[kind](path, options)
    shards = assign_splits(locations, plan)
    first = _typical_episode(source, locations, plan.drop_bad)
    failures = _describe_failures(locations)
    first["changed"] |= failures
    about = {**about, "left_out": first["left_out"], "changed": first["changed"]}
    settings = {
        "converted_from": kind,
        "source": digest(path, locations),
        "options": dataclasses.asdict(source.options),
        "validation": plan.validation,
        "episodes_per_shard": plan.episodes_per_shard,
        "drop_bad": plan.drop_bad,
        "about": about,
    }
    counts = {s: len(x) for s, x in shards.items()}
    # With drop_bad, another episode may be the typical one: `about` is of that one.
    writer = Writer(root, name, VERSION, counts, settings, may_change=("drop_bad", "about"))
    if writer.finished:
        print(f"{writer.directory} exists; remove it to convert again", file=sys.stderr)
        return Conversion(writer.directory, [], first["left_out"], first["changed"])
    expected = sources.signature(first)
    jobs = [
        ShardJob(
            kind, path, source.options, writer, split, i, tuple(shard), expected, plan.drop_bad
        )
        for split, parts in shards.items()
        for i, shard in enumerate(parts)
    ]
    _write_all(jobs, plan.workers or usable_cores())
    notes = [writer.shard_note(j.split, j.index) for j in jobs]
    directory = writer.finish()  # raises if a note is missing
    finished = [note for note in notes if note is not None]
    dropped = [reason for note in finished for reason in note["dropped"]]
    splits = tfds.builder_from_directory(directory).info.splits
    count = sum(splits[s].num_examples for s in shards)
    if count + len(dropped) != len(locations):
        raise DataError(f"{directory} has {count} episodes, the recording has {len(locations)}")
    remarks = [
        {k: v for note in finished for k, v in note[part].items()} for part in sources.REMARKS
    ]
    left_out, changed = remarks
    return Conversion(directory, dropped, left_out, changed | failures)


def _describe_failures(locations: list[EpisodeLocation]) -> dict[str, str]:
    """Return {"episodes": remark} if some lie in folders of failures (DROID), or {}."""
    failed = [x for x in locations if {*Path(x.file).parts[:-1]} & FAILURES]
    if not failed:
        return {}
    return {
        "episodes": f"{len(failed)} of {len(locations)} lie in folders named "
        f"{' or '.join(sorted(FAILURES))}: converted like the others; move them away to leave "
        "them out"
    }


def detect(path: Path) -> str:
    """Return the format of a path; DataError with the files found if it is unknown."""
    if (path / "meta" / "info.json").is_file():
        return "lerobot"
    if path.suffix == ".npz" or (path.is_dir() and any(path.rglob("*.npz"))):
        return "npz"
    if path.suffix in SUFFIXES or (path.is_dir() and any(_hdf5(path))):
        first = path if path.is_file() else path / hdf5_files(path)[0]
        with sources.checked(str(first)), open_hdf5(first) as file:
            if "data" in file and any("actions" in demo for demo in file["data"].values()):
                return "hdf5-robomimic"
            return "hdf5-aloha" if "observations" in file and "action" in file else "hdf5"
    if not path.exists():
        raise DataError(f"{path} does not exist")
    names = sorted(p.name for p in path.iterdir())[:10] if path.is_dir() else [path.name]
    raise DataError(
        f"{path} has an unknown format (known: {', '.join(FORMATS)}): it contains "
        f"{', '.join(names) or 'nothing'}; for other formats, write one npz file per episode "
        "(octolike/data/onboarding/convert/npz.py lists its keys)"
    )


def assign_splits(
    locations: list[EpisodeLocation], plan: ConversionPlan
) -> dict[str, list[list[EpisodeLocation]]]:
    """Return {split: shards}: the splits of the recording, or a seeded share held out."""
    rng = np.random.default_rng(len(locations))
    order = [locations[i] for i in rng.permutation(len(locations))]
    if not any(i.split for i in locations):
        held_out = max(1, round(len(locations) * plan.validation)) if plan.validation else 0
        held_out = min(held_out, len(locations) - 1)
        splits = {"train": order[held_out:], "val": order[:held_out]}
    else:
        splits = {s: [i for i in order if (i.split or "train") == s] for s in ("train", "val")}
    size = plan.episodes_per_shard
    return {
        split: [episodes[i : i + size] for i in range(0, len(episodes), size)]
        for split, episodes in splits.items()
        if episodes
    }


def digest(path: Path, locations: list[EpisodeLocation]) -> str:
    """Return a digest of the episodes and the sizes of their files."""
    root = path if path.is_dir() else path.parent
    sizes = {i.file: (root / i.file).stat().st_size for i in locations if (root / i.file).is_file()}
    parts = [[i.file, i.key, i.split, sizes.get(i.file)] for i in locations]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def write_shard(job: ShardJob) -> int:
    """Write and verify one shard; return its number of episodes, dropped ones included."""
    source = FORMATS[job.kind](job.path, job.options)
    notes: dict[str, Any] = {"dropped": [], "left_out": {}, "changed": {}}
    prints: list[list[dict[str, str]]] = []
    job.writer.write(
        job.split,
        job.index,
        _episodes(source, job, notes, prints),
        check=lambda path, features: verify(path, features, prints),
        **notes,
    )
    return len(job.locations)


def verify(path: Path, features: tfds.features.FeaturesDict, prints: list[Any]) -> None:
    """Read a shard back and check the number of episodes, all values, and all images.

    prints: `fingerprints` per episode. Raises DataError for the first difference.
    """
    count = 0
    skip = {STEPS: tfds.decode.SkipDecoding()}
    for raw in tf.data.TFRecordDataset(str(path)):
        read = tf.nest.map_structure(
            lambda x: x.numpy(), features.deserialize_example(raw, decoders=skip)
        )
        if count >= len(prints):
            break
        changed = [k for k, v in fingerprints(read[STEPS]).items() if prints[count].get(k) != v]
        if changed or len(prints[count]) != len(_leaves(read[STEPS])):
            raise DataError(f"{path}: episode {count} differs from the recording in {changed}")
        for key, frames in _leaves(read[STEPS]).items():
            if _encoded(frames):
                _decode(frames, f"{path}, episode {count}, {key}")
        count += 1
    if count != len(prints):
        raise DataError(f"{path}: {count} episodes read back, {len(prints)} written")


def fingerprints(steps: Mapping[str, Any]) -> dict[str, str]:
    """Return {field: digest of its values and shape} of the steps of an episode."""
    result = {}
    for key, x in _leaves(steps).items():
        if isinstance(x, EncodedImage) or np.asarray(x).dtype.kind in "USO":
            parts = [v.encode() if isinstance(v, str) else bytes(v) for v in x]
        else:
            x = np.ascontiguousarray(x)
            parts = [str((x.dtype, x.shape)).encode(), x.tobytes()]
        sha = hashlib.sha256()
        for part in parts:
            sha.update(len(part).to_bytes(8, "little") + part)
        result[key] = sha.hexdigest()
    return result


def _episodes(
    source: Recording, job: ShardJob, notes: dict[str, Any], prints: list[Any]
) -> Iterator[dict[str, Any]]:
    for location in job.locations:
        try:
            episode = _read(source, location)
            signature, left_out = sources.signature(episode), episode["left_out"]
            _check_signature(signature, job.expected, str(location), left_out)
            remarks = {part: episode[part] for part in sources.REMARKS}
            episode = rlds_episode(episode, str(location))
        except DataError as error:
            if not job.drop_bad:
                raise DataError(
                    f"{job.path}: {error} (--drop-bad leaves out and lists such episodes)"
                ) from None
            notes["dropped"].append(str(error))
            continue
        for part, columns in remarks.items():
            notes[part].update(columns)
        prints.append(fingerprints(episode[STEPS]))
        yield episode


def _read(source: Recording, location: EpisodeLocation) -> dict[str, Any]:
    """Return an episode; DataError if it is malformed in any way."""
    with sources.checked(str(location)):
        return source.read(location)


def _check_signature(
    signature: Mapping[str, str],
    expected: Mapping[str, str],
    place: str,
    left_out: Mapping[str, str],
) -> None:
    """Raise DataError for an episode with other fields than the first; left_out: of the episode."""
    expected_fields, present = (
        {k for k in x if not k.endswith(sources.RANGE)} for x in (expected, signature)
    )
    missing, extra = sorted(expected_fields - present), sorted(present - expected_fields)
    if missing or extra:
        parts = [f"lacks {', '.join(missing)}"] * bool(missing)
        parts += [f"has {', '.join(extra)}"] * bool(extra)
        parts += [
            f"leaves out {k} ({v})" for k, v in left_out.items() if f"observation.{k}" in missing
        ]
        raise DataError(f"{place} {' and '.join(parts)}, unlike the first episode")
    for key, kind in expected.items():
        if signature.get(key, kind) != kind:
            raise DataError(f"{place}: {key} is {signature[key]}, in the first episode {kind}")


def _typical_episode(
    source: Recording, locations: list[EpisodeLocation], drop_bad: bool
) -> dict[str, Any]:
    """Return the first episode; with drop_bad, the first of the most common signature of several.

    The first one could be the odd one, and all others would be left out.
    """
    episodes, reasons = [], []
    count = min(len(locations), PROBES) if drop_bad else 1
    for i in np.linspace(0, len(locations) - 1, count).round().astype(int):
        try:
            episodes.append(_read(source, locations[i]))
        except DataError as error:
            reasons.append(str(error))
    if not episodes and drop_bad:
        for location in locations:
            try:
                return _read(source, location)
            except DataError as error:
                reasons.append(str(error))
    if not episodes:
        raise DataError(f"{source.path}: {reasons[0]}")
    signatures = [sources.signature(episode) for episode in episodes]
    return episodes[max(range(len(episodes)), key=lambda i: signatures.count(signatures[i]))]


def _write_all(jobs: list[ShardJob], workers: int) -> None:
    remaining = [j for j in jobs if not j.writer.shard_note(j.split, j.index)]
    total, todo = (sum(len(j.locations) for j in part) for part in (jobs, remaining))
    with progress("converting", total, "episodes", total - todo) as bar:
        if min(workers, len(remaining)) <= 1:
            for job in remaining:
                bar.update(write_shard(job))
        else:
            _in_processes(remaining, min(workers, len(remaining)), bar.update)


def _in_processes(jobs: list[ShardJob], workers: int, done: Callable[[int], Any]) -> None:
    # Not fork: it would copy the locks of tensorflow's threads, but not the threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_end_with_parent) as pool:
        futures = [pool.submit(write_shard, job) for job in jobs]
        for future in futures:
            future.add_done_callback(lambda f: f.cancelled() or f.exception() or done(f.result()))
        finished, pending = wait(futures, return_when=FIRST_EXCEPTION)
        for future in pending:
            future.cancel()
        for future in finished:
            try:
                future.result()
            except BrokenProcessPool:
                raise RuntimeError(
                    "a process of the conversion was killed, perhaps for lack of memory; the same "
                    "command resumes after the finished shards; fewer --workers need less memory"
                ) from None


def _end_with_parent() -> None:
    """End this worker process if its parent is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.threading.set_intra_op_parallelism_threads(1)


def _encoded(x: Any) -> bool:
    first = x[0] if len(x) else b""
    return isinstance(first, bytes) and first.startswith((JPEG, PNG))


def _decode(frames: Any, place: str) -> None:
    for t, frame in enumerate(frames):
        try:
            tf.io.decode_image(frame, expand_animations=False)
        except tf.errors.OpError as error:
            raise DataError(f"{place}, step {t} cannot be decoded: {error.message}") from None


def _leaves(tree: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in tree.items():
        inner = _leaves(value) if isinstance(value, Mapping) else None
        result |= {key: value} if inner is None else {f"{key}.{k}": v for k, v in inner.items()}
    return result


def _hdf5(path: Path) -> Iterator[Path]:
    return (f for suffix in SUFFIXES for f in path.rglob(f"*{suffix}"))


FORMATS: dict[str, Callable[[Path, ConvertOptions], Recording]] = {
    "hdf5": Hdf5Recording,
    "hdf5-aloha": Hdf5Recording,
    "hdf5-robomimic": RobomimicRecording,
    "lerobot": LeRobotRecording,
    "npz": NpzRecording,
}
