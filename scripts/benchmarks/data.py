"""How fast, how large and how exact the data engine is, beside what decoding alone costs.

    python scripts/benchmark.py data                              everything, some minutes
    python scripts/benchmark.py data --only decode,statistics     some of it
    python scripts/benchmark.py data --only memory --batches 1000,5000,20000

Rows: what was measured, a number and its unit, and beside it the goal where there is one.

decode      CPU seconds per example of the pipeline over those of decoding the same JPEGs once each
            with tf.io.decode_jpeg in as many threads, in turn in one process: goal ≤ 1.4
memory      resident memory as batches go by, over 25 datasets
first       seconds from nothing to the first batch with 1, 25 and 60 datasets
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
from octolike.data.rlds.reader import Reader
from octolike.data.specs import catalog
from octolike.data.specs.mixes import MIXES

FAKES = Path(__file__).parents[2] / "tests" / "fake_oxe.py"
Row = dict[str, Any]
# Episodes of the datasets that times are computed for.
BRIDGE, SOUP = 60_096, 800_000
CORES = (2, 16, 96)
DRAIN = 1.0  # seconds in which batches that are under way are finished


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.add_argument("--only", default=",".join(MEASUREMENTS), help="comma-separated")
    parser.add_argument("--directory", type=Path, help="where episodes are kept; default: nowhere")
    parser.add_argument("--threads", type=int, default=2, help="data.threads")
    parser.add_argument("--batch", type=int, default=32, help="examples per batch")
    parser.add_argument("--episodes", type=int, default=24, help="of the JPEG dataset")
    parser.add_argument("--steps", type=int, default=40, help="per episode")
    parser.add_argument("--pool", type=int, default=8, help="data.pool")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions of decode")
    parser.add_argument("--batches", default="200,1000", help="at which memory is read")
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
    """CPU and wall time of one epoch of batches, and of decoding the JPEGs that it shows."""
    data = open_data(_episodes.config(root, "fake", args))
    epoch = args.episodes * args.steps // args.batch
    shown, pixels = [], BatchBuilder._pixels

    def noted(self, camera, episodes, wanted):
        shown.extend(episodes[j].episode.images[camera][s] for j, s in wanted)
        return pixels(self, camera, episodes, wanted)

    ratios, pipeline, floor = [], [], []
    for i in range(args.rounds + 1):
        stream = data.train()
        next(stream)  # the first one traces and fills the pool
        time.sleep(DRAIN)  # what was being made ahead is whole before and after: as many batches
        BatchBuilder._pixels = noted
        ours = timed(lambda s=stream: ([next(s) for _ in range(epoch)], time.sleep(DRAIN)))
        ours = ours[0], ours[1] - DRAIN
        BatchBuilder._pixels = pixels
        stream.close()
        with ThreadPoolExecutor(args.threads) as pool:
            some = [tf.constant(shown[i : i + 64]) for i in range(0, len(shown), 64)]
            only_decode(some[0])
            alone = timed(lambda s=some, p=pool: list(p.map(only_decode, s)))
        count, size = len(shown), sum(map(len, shown))
        shown.clear()
        if i:  # the first round warms up
            ratios.append(ours[0] / alone[0])
            pipeline.append(ours)
            floor.append(alone)
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
    """Decode and keep nothing: the least that a batch of JPEGs can cost."""
    height = lambda x: tf.shape(tf.io.decode_jpeg(x, channels=3))[0]
    return tf.map_fn(height, encoded, fn_output_signature=tf.int32, parallel_iterations=8)


def memory(args: argparse.Namespace, root: Path) -> list[Row]:
    """Resident memory after so many batches of the 25 datasets of the magic soup."""
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
    """Seconds to open datasets, their indices made, and to the first batch."""
    rows = []
    for number in map(int, args.datasets.split(",")):
        mix = ",".join(_episodes.write_copies(root, number))
        config = _episodes.config(root, mix, args)
        open_data(config)  # makes the indices
        begin = time.perf_counter()
        stream = open_data(config).train()
        next(stream)
        taken = time.perf_counter() - begin
        stream.close()
        rows.append(row("first", f"to the first batch, {number} datasets", taken, "s"))
    return rows


def scan(args: argparse.Namespace, root: Path) -> list[Row]:
    """Episodes per second of the pass, and what that makes of the large datasets."""
    reader = Reader(catalog.find_spec("fake"), str(root), "train")
    reader.files, reader.counts = reader.files * 20, reader.counts * 20
    episodes = sum(reader.counts)
    kept = statistics._Kept([], "")  # nowhere
    work = lambda: statistics._scan(reader, args.threads, False, kept)
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
    """Whether resuming and sharing are exact, and how mixed a batch is."""
    data = open_data(_episodes.config(root, "fake", args))
    stream, whole, states = data.train(), [], []
    for _ in range(40):
        states.append(stream.state())
        whole.append(digest(next(stream)))
    stream.close()
    exact = 0
    for at in np.random.default_rng(0).choice(40, size=10, replace=False).tolist():
        resumed = data.train(states[at])
        exact += [digest(next(resumed)) for _ in whole[at : at + 3]] == whole[at : at + 3]
        resumed.close()
    streams = [data.train(), *(data.train(process=(i, 2)) for i in range(2))]
    same = 0
    for _ in range(10):
        one, *halves = (dict(types.flatten(next(s))) for s in streams)
        joined = {k: np.concatenate([h[k] for h in halves]) for k in one}
        same += all(np.array_equal(joined[k], one[k]) for k in one)
    for s in streams:
        s.close()
    return [
        row("order", "resumed batches that are exact, of 10", exact, "batches", "10"),
        row("order", "two processes joined are one's, of 10", same, "batches", "10"),
        *_mixing(args.batch),
    ]


def _mixing(size: int) -> list[Row]:
    """Distinct episodes per batch at Bridge V2's size under the default pool and memory."""
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
    found = float(np.mean([len(np.unique(episodes)) for episodes in batches]))
    ideal = float((1 - (1 - steps / steps.sum()) ** size).sum())
    return [
        row("order", f"distinct episodes per batch of {size}", found, "episodes"),
        row("order", "drawn from all frames at random", ideal, "episodes"),
    ]


def digest(batch: types.Batch) -> bytes:
    """Return a batch as bytes, to compare."""
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
    """Return one measured number."""
    return {"part": part, "what": what, "value": float(value), "unit": unit, "goal": goal}


MEASUREMENTS = {
    "decode": decode,
    "memory": memory,
    "first": first,
    "statistics": scan,
    "order": order,
}
