"""Damaged files: flipped bits and truncations of every kind of file of a run and of a dataset."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import jax
import numpy as np
import policy_fakes
import stored
import tensorflow_datasets as tfds
from tally import EXACT, LOST, REFUSED, SILENT, Tally, is_one_line

from octolike.data.rlds import statistics
from octolike.data.rlds.reader import Reader
from octolike.errors import ConfigError, DataError, RunError
from octolike.train import checkpoint, checkpoint_store

REFUSALS = (RunError, ConfigError, DataError, FileNotFoundError)
SIDE = 8


def flip(path: Path, random: Random) -> str:
    """Flip one bit of a file; return which."""
    data = bytearray(path.read_bytes())
    position, bit = random.randrange(len(data)), random.randrange(8)
    data[position] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {position} of {path.name}"


def truncate(path: Path, random: Random) -> str:
    """Cut a file off at a random length."""
    size = random.randrange(path.stat().st_size)
    path.write_bytes(path.read_bytes()[:size])
    return f"{path.name} cut to {size} bytes"


DAMAGES = {"bit flip": flip, "truncation": truncate}


def judge(read: Callable[[], Any], expected: Any, equal: Callable[[Any, Any], bool]) -> tuple:
    """Return (outcome, note) of reading something damaged."""
    try:
        value = read()
    except REFUSALS as error:
        return (REFUSED, "") if is_one_line(error) else (LOST, f"several lines: {error}")
    except Exception as error:
        return LOST, f"{type(error).__name__}: {error}"
    return (EXACT, "") if equal(value, expected) else (SILENT, "another value")


def same_tree(a: Any, b: Any) -> bool:
    """Return whether two trees of arrays are equal, bit for bit."""
    leaves = jax.tree.leaves(a), jax.tree.leaves(b)
    same = jax.tree.structure(a) == jax.tree.structure(b)
    return same and all(np.array_equal(x, y, equal_nan=True) for x, y in zip(*leaves))


def groups_of(directory: Path) -> dict[str, list[Path]]:
    """Return {kind of file: its files}, of a run directory."""
    paths = [p for p in directory.rglob("*") if p.is_file() and p.stat().st_size]
    kinds: dict[str, list[Path]] = {}
    for path in sorted(paths):
        inside = path.relative_to(directory).parts
        kind = inside[0] if len(inside) == 1 else f"checkpoint, {inside[2]}"
        if len(inside) == 3:
            kind = "checkpoint, its own files"
        if inside[0] in ("versions.json", "scores.json"):
            continue  # for information
        kinds.setdefault(kind, []).append(path)
    return kinds


def damaged_copies(original: Path, folder: Path, times: int, random: Random) -> Any:
    """Yield (kind of file, damage, directory, note) for `times` damages of every kind."""
    for kind, paths in groups_of(original).items():
        for number in range(times):
            name = "truncation" if number % 4 == 3 else "bit flip"
            path = random.choice(paths)
            copy = shutil.copytree(original, folder / "copy")
            note = DAMAGES[name](copy / path.relative_to(original), random)
            yield kind, name, copy, note
            shutil.rmtree(copy)


def load_damaged_runs(tally: Tally, folder: Path, times: int, random: Random) -> None:
    """Damage the files of a run, load it for inference, and compare everything."""
    run = policy_fakes.run_of()
    policy_fakes.save_run(folder / "run", run)
    expected = checkpoint.load_run(folder / "run")

    def equal(a: Any, b: Any) -> bool:
        return same_tree(a.params, b.params) and repr(
            (a.config, a.embodiments, a.spec, a.names, a.step)
        ) == repr((b.config, b.embodiments, b.spec, b.names, b.step))

    def compare(value: Any, _: Any) -> bool:
        value.config.workdir = expected.config.workdir
        records = [_record(e) for e in value.embodiments]
        value = value.__class__(**{**vars(value), "embodiments": records})
        reference = expected.__class__(
            **{**vars(expected), "embodiments": [_record(e) for e in expected.embodiments]}
        )
        return equal(value, reference)

    for kind, name, copy, note in damaged_copies(folder / "run", folder, times, random):
        outcome, detail = judge(lambda copy=copy: checkpoint.load_run(copy), None, compare)
        tally.add(f"load, {name}, {kind}", outcome, f"{note}: {detail}")


def _record(embodiment: Any) -> str:
    from octolike.embodiment import embodiments_to_json

    return repr(embodiments_to_json([embodiment]))


def resume_damaged_runs(tally: Tally, folder: Path, times: int, random: Random) -> None:
    """Damage the newest of three checkpoints, resume, and compare with the saved states."""
    from test_train_checkpoint import PARAMS, initializer, make_state

    checkpoints = checkpoint_store.CheckpointStore(folder / "run", keep=3)
    states: dict[int, Any] = {}
    for step in (1, 2, 3):
        params = jax.tree.map(lambda x, s=step: x + s, PARAMS)
        states[step] = make_state(params, step)
        checkpoints.save(states[step], {"index": 10 * step})
    checkpoints.close()
    abstract = initializer().abstract(jax.eval_shape(lambda: PARAMS))
    newest = folder / "run" / "checkpoints" / "3"
    paths = sorted(p for p in newest.rglob("*") if p.is_file() and p.stat().st_size)
    for number in range(times):
        name = "truncation" if number % 4 == 3 else "bit flip"
        copy = shutil.copytree(folder / "run", folder / "copy")
        path = random.choice(paths)
        note = DAMAGES[name](copy / path.relative_to(folder / "run"), random)

        def read(copy: Path = copy) -> Any:
            store = checkpoint_store.CheckpointStore(copy, keep=3)
            try:
                return store.restore(abstract)
            finally:
                store.close()

        def equal(value: Any, _: Any) -> bool:
            state, position = value
            step = int(state.step)
            return position == {"index": 10 * step} and same_tree(state, states[step])

        outcome, detail = judge(read, None, equal)
        tally.add(f"resume, {name} of the newest checkpoint", outcome, f"{note}: {detail}")
        shutil.rmtree(copy)


def read_damaged_data(tally: Tally, folder: Path, times: int, random: Random) -> None:
    """Damage shards, metadata and the stored index of a dataset, and read every episode."""
    image = tfds.features.Image(shape=(SIDE, SIDE, 3), encoding_format="jpeg")
    observe = lambda t, rng: {"image": stored.picture(rng)}
    shards = [[stored.example(4 + i, observe, seed=10 * s + i) for i in range(3)] for s in range(2)]
    stored.write(folder / "data", "robot", {"image": image}, {"train": shards})
    (directory,) = (folder / "data" / "robot").iterdir()

    def read(root: Path) -> Any:
        reader = Reader(stored.spec("robot"), str(root), "train")
        index = statistics.index_episodes(reader, threads=1, cache="", drop_bad=False)
        episodes = []
        for row in zip(index.shard, index.offset, index.length, index.content, strict=True):
            record = reader.read_record(*map(int, row))
            episode = reader.parse_episode(record, "here")
            episodes.append((episode.action, episode.instructions, episode.images))
        return repr((index.action, episodes))

    expected = read(folder / "data")
    names = [p.relative_to(folder / "data") for p in directory.rglob("*") if p.is_file()]
    kinds = {"shards": [], "features.json": [], "dataset_info.json": [], "stored index": []}
    for name in sorted(names):
        kind = "stored index" if name.suffix == ".npz" else name.name
        kinds["shards" if "tfrecord" in name.name else kind].append(name)
    for kind, paths in kinds.items():
        for number in range(times):
            damage = "truncation" if number % 4 == 3 else "bit flip"
            copy = shutil.copytree(folder / "data", folder / "copy")
            note = DAMAGES[damage](copy / random.choice(paths), random)
            outcome, detail = judge(lambda copy=copy: read(copy), expected, lambda a, b: a == b)
            tally.add(f"data, {damage}, {kind}", outcome, f"{note}: {detail}")
            shutil.rmtree(copy)


def run(tally: Tally, folder: Path, times: int, seed: int) -> None:
    """Run all kinds of damage."""
    for number, part in enumerate((load_damaged_runs, resume_damaged_runs, read_damaged_data)):
        place = folder / part.__name__
        place.mkdir(parents=True)
        part(tally, place, times, Random(seed + number))
        print(f"{part.__name__} done", file=sys.stderr)
