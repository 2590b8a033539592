"""Measure the speed, memory and exactness of the data pipeline, next to decoding alone.

    octolike benchmark data                              all measurements, a few minutes
    octolike benchmark data --only decode,statistics     some of them
    octolike benchmark data --only memory --batches 1000,5000,20000

Rows: the measurement, a number with its unit, and the goal if there is one.

decode      CPU time per example of the pipeline, relative to decoding each JPEG once with
            tf.io.decode_jpeg, in as many threads, alternating in one process: goal ≤ 1.4
memory      resident memory over the batches of 25 datasets
first       seconds to open 1, 25 and 60 datasets and get the first batch
statistics  episodes per second of the pass over the records
order       exact resume, two processes against one, distinct episodes per batch
"""

from __future__ import annotations

import argparse
import gc
import runpy
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from benchmarks import _episodes

from octolike import types
from octolike.config import DataConfig
from octolike.data import open_data
from octolike.data.pipeline.batch_builder import BatchBuilder
from octolike.data.pipeline.order import EpisodeTable, Order
from octolike.data.pipeline.source import VALIDATION
from octolike.data.rlds import statistics
from octolike.data.rlds.index import IndexCache
from octolike.data.rlds.reader import Reader
from octolike.data.specs import catalog
from octolike.data.specs.mixes import MIXES

FAKES = Path(__file__).parents[2] / "tests" / "fake_oxe.py"
Row = dict[str, Any]
# Numbers of episodes for the computed times.
BRIDGE, SOUP = 60_096, 800_000
CORES = (2, 16, 96)
DRAIN = 1.0  # seconds to finish the batches in progress


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.add_argument("--only", default=",".join(MEASUREMENTS), help="comma-separated")
    parser.add_argument(
        "--directory", type=Path, help="folder to keep the episodes; default: temporary"
    )
    parser.add_argument("--threads", type=int, default=2, help="data.threads")
    parser.add_argument("--batch", type=int, default=32, help="examples per batch")
    parser.add_argument("--episodes", type=int, default=24, help="of the JPEG dataset")
    parser.add_argument("--steps", type=int, default=40, help="per episode")
    parser.add_argument("--pool", type=int, default=8, help="data.pool")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions of decode")
    parser.add_argument(
        "--batches", default="200,1000", help="numbers of batches at which memory is read"
    )
    parser.add_argument("--datasets", default="1,25,60", help="numbers of datasets for `first`")


def run(args: argparse.Namespace) -> list[Row]:
    """Return the rows of the chosen measurements."""
    chosen = args.only.split(",")
    for name in chosen:
        if name not in MEASUREMENTS:
            raise SystemExit(f"error: --only {name!r}; choose from {', '.join(MEASUREMENTS)}")
    tf.config.set_visible_devices([], "GPU")
    with tempfile.TemporaryDirectory() as temporary:
        root = args.directory or Path(temporary)
        _episodes.write(root, count=args.episodes, steps=args.steps)
        return [row for name in chosen for row in MEASUREMENTS[name](args, root)]


def decode(args: argparse.Namespace, root: Path) -> list[Row]:
    """Measure one epoch of batches, and decoding of the same JPEGs, in CPU and wall time."""
    data = open_data(_episodes.config(root, "fake", args))
    epoch = args.episodes * args.steps // args.batch
    images, pixels = [], BatchBuilder._pixels

    def record_images(self, camera, episodes, frames):
        images.extend(episodes[j].episode.images[camera][s] for j, s in frames)
        return pixels(self, camera, episodes, frames)

    ratios, pipeline, floor = [], [], []
    for i in range(args.rounds + 1):
        stream = data.train()
        next(stream)  # the first batch traces and fills the pool
        time.sleep(DRAIN)  # finish prefetched batches, so that the counts match
        BatchBuilder._pixels = record_images
        total = timed(lambda s=stream: ([next(s) for _ in range(epoch)], time.sleep(DRAIN)))
        total = total[0], total[1] - DRAIN
        BatchBuilder._pixels = pixels
        stream.close()
        with ThreadPoolExecutor(args.threads) as pool:
            chunks = [tf.constant(images[i : i + 64]) for i in range(0, len(images), 64)]
            only_decode(chunks[0])
            decoding = timed(lambda s=chunks, p=pool: list(p.map(only_decode, s)))
        count, size = len(images), sum(map(len, images))
        images.clear()
        if i:  # the first round warms up
            ratios.append(total[0] / decoding[0])
            pipeline.append(total)
            floor.append(decoding)
    examples = epoch * args.batch
    cpu, wall = np.median(pipeline, axis=0)
    rows = [
        row("decode", "pipeline / decoding, CPU", float(np.median(ratios)), "ratio", "≤ 1.4"),
        row("decode", "pipeline / decoding, largest of the rounds", max(ratios), "ratio"),
        row("decode", "pipeline", cpu / examples * 1e3, "CPU ms per example"),
        row("decode", "decoding", np.median(floor, 0)[0] / examples * 1e3, "CPU ms per example"),
        row("decode", "JPEGs decoded", count / examples, "per example"),
        row("decode", "JPEG", size / count / 1e3, "kB on average"),
        row("decode", f"measured, {args.threads} threads", examples / wall, "examples/s"),
    ]
    return rows + [
        row("decode", f"computed, {n} cores", n * examples / cpu, "examples/s") for n in CORES
    ]


@tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
def only_decode(encoded: tf.Tensor) -> tf.Tensor:
    """Decode without keeping the result: the lower bound for a batch of JPEGs."""

    def height(x: tf.Tensor) -> tf.Tensor:
        return tf.shape(tf.io.decode_jpeg(x, channels=3))[0]

    return tf.map_fn(height, encoded, fn_output_signature=tf.int32, parallel_iterations=8)


def memory(args: argparse.Namespace, root: Path) -> list[Row]:
    """Measure resident memory during batches of the 25 datasets of the magic soup."""
    write_fake_oxe = runpy.run_path(str(FAKES))["write_fake_oxe"]
    for name in MIXES["magic_soup"].weights:
        write_fake_oxe(root, name, episodes=4, steps=20, side=64)
    config = _episodes.config(root, "magic_soup", args)
    config.data.memory, config.data.cameras = 0.5, {"primary": 64, "wrist": 64}
    data = open_data(config)
    stream, rows, count = data.train(), [], 0
    for goal in sorted(map(int, args.batches.split(","))):
        for _ in range(goal - count):
            next(stream)
        count = goal
        gc.collect()
        rows.append(row("memory", f"resident after {count:,} batches", resident(), "MB"))
        rows.append(row("memory", "held by the pipeline itself", stream.memory() / 1e6, "MB"))
    stream.close()
    change = rows[-2]["value"] / rows[0]["value"] - 1
    budget = config.data.memory * 2**30 / 1e6
    rows.append(row("memory", "budget (data.memory)", budget, "MB"))
    rows.append(row("memory", "resident above the budget, at the end", resident() - budget, "MB"))
    return [*rows, row("memory", "change, first to last", change * 100, "%", "within 5")]


def first(args: argparse.Namespace, root: Path) -> list[Row]:
    """Measure the time to open indexed datasets and get the first batch."""
    rows = []
    for number in map(int, args.datasets.split(",")):
        mix = ",".join(_episodes.write_copies(root, number))
        config = _episodes.config(root, mix, args)
        open_data(config)  # writes the indices
        begin = time.perf_counter()
        stream = open_data(config).train()
        next(stream)
        seconds = time.perf_counter() - begin
        stream.close()
        rows.append(row("first", f"to the first batch, {number} datasets", seconds, "s"))
    return rows


def scan(args: argparse.Namespace, root: Path) -> list[Row]:
    """Measure the statistics pass, and compute its time for the large datasets."""
    reader = Reader(catalog.find_spec("fake"), str(root), "train")
    reader.files, reader.counts = reader.files * 20, reader.counts * 20
    episodes = sum(reader.counts)
    cache = IndexCache([], "")  # does not write

    def work() -> None:
        statistics.scan_split(reader, args.threads, False, cache)

    cpu, wall = np.median([timed(work) for _ in range(args.rounds)], axis=0)
    rows = [
        row("statistics", f"pass, {args.threads} threads", episodes / wall, "episodes/s"),
        row("statistics", "pass", cpu / episodes * 1e3, "CPU ms per episode"),
    ]
    for name, count in (("Bridge V2", BRIDGE), ("the soup", SOUP)):
        for cores in (2, 96):
            seconds = count * cpu / episodes / cores
            rows.append(row("statistics", f"computed, {name}, {cores} cores", seconds / 60, "min"))
    return rows


def order(args: argparse.Namespace, root: Path) -> list[Row]:
    """Check that resuming and hosts are exact; measure how mixed a batch is."""
    data = open_data(_episodes.config(root, "fake", args))
    stream, digests, states = data.train(), [], []
    for _ in range(40):
        states.append(stream.state())
        digests.append(digest(next(stream)))
    stream.close()
    exact = 0
    for at in np.random.default_rng(0).choice(40, size=10, replace=False).tolist():
        resumed = data.train(states[at])
        exact += [digest(next(resumed)) for _ in digests[at : at + 3]] == digests[at : at + 3]
        resumed.close()
    streams = [data.train(), *(data.train(process=(i, 2)) for i in range(2))]
    equal = 0
    for _ in range(10):
        batch, *halves = (dict(types.flatten(next(s))) for s in streams)
        joined = {k: np.concatenate([h[k] for h in halves]) for k in batch}
        equal += all(np.array_equal(joined[k], batch[k]) for k in batch)
    for s in streams:
        s.close()
    return [
        row("order", "resumed batches that are exact, of 10", exact, "batches", "10"),
        row("order", "two processes joined are one's, of 10", equal, "batches", "10"),
        *_mixing(args.batch),
    ]


def _mixing(size: int) -> list[Row]:
    """Measure distinct episodes per batch at the size of Bridge V2 with default settings."""
    rng, config = np.random.default_rng(0), DataConfig()
    steps = rng.integers(25, 50, BRIDGE)
    budget = int(config.memory * 2**30 * (1 - VALIDATION) / 2)
    order_ = Order(
        EpisodeTable(steps=steps, sizes=steps * 35_000, groups=np.zeros(BRIDGE, np.int64)),
        np.ones(1),
        seed=0,
        pool=config.pool,
        budget=budget,
    )
    batches = (order_.take(i * size, size)[1][:, 0] for i in range(0, 10_000, 50))
    distinct = float(np.mean([len(np.unique(episodes)) for episodes in batches]))
    ideal = float((1 - (1 - steps / steps.sum()) ** size).sum())
    return [
        row("order", f"distinct episodes per batch of {size}", distinct, "episodes"),
        row("order", "drawn from all frames at random", ideal, "episodes"),
    ]


def digest(batch: types.Batch) -> bytes:
    """Return the bytes of a batch, to compare."""
    return b"".join(np.ascontiguousarray(x).tobytes() for _, x in types.flatten(batch))


def timed(work: Any) -> tuple[float, float]:
    """Return (CPU, wall) seconds of work(), over all threads of this process."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def resident() -> float:
    """Return the resident memory of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("VmRSS")) * 1024 / 1e6


def row(part: str, what: str, value: float, unit: str, goal: str = "") -> Row:
    """Return one measurement."""
    return {"part": part, "what": what, "value": float(value), "unit": unit, "goal": goal}


MEASUREMENTS = {
    "decode": decode,
    "memory": memory,
    "first": first,
    "statistics": scan,
    "order": order,
}
