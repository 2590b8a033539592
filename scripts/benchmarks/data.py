"""Measure the speed, memory and exactness of the data pipeline, next to decoding alone.

    octolike benchmark data                              all measurements, a few minutes
    octolike benchmark data --only decode,statistics     some of them
    octolike benchmark data --only memory --batches 1000,5000,20000

Rows: the measurement, a number with its unit, and the goal if there is one.

decode      CPU time per example of the pipeline, relative to decoding each distinct JPEG of a batch
            once with tf.io.decode_jpeg, in as many threads, alternating in one process; and the
            share of the thread that runs Python, the most that the GIL can be held
resize      CPU time of decoding 480×640 JPEGs and resizing them to 256, relative to decoding alone
concurrency images decoded at a time if decoding takes no CPU time, for 2, 16 and 96 threads
memory      resident memory over the batches of 25 datasets
first       seconds to open 1, 25 and 60 datasets and get the first batch
grain       CPU time per example, next to Grain over array_record files with the same transforms
            (`pip install grain array_record`; not part of all measurements)
statistics  episodes per second of the pass over the records
order       exact resume, 2 and 4 processes against one
hosts       episodes read and held by each of 1 to 64 hosts, computed from the order
mixing      distinct episodes per batch for Bridge, the soup and DROID-like episodes, expected and
            computed from the order
"""

from __future__ import annotations

import argparse
import functools
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
from octolike.data.pipeline import mixing
from octolike.data.pipeline.memory_budget import VALIDATION
from octolike.data.pipeline.order import BLOCKS, EpisodeTable, FrameOrder
from octolike.data.pipeline.source import RldsSource
from octolike.data.rlds import decode as image_decoding
from octolike.data.rlds import statistics
from octolike.data.rlds.index import IndexCache
from octolike.data.rlds.reader import Reader
from octolike.data.specs import catalog
from octolike.data.specs.mixes import MIXES

FAKES = Path(__file__).parents[2] / "tests" / "fake_oxe.py"
Row = dict[str, Any]
# Numbers of episodes for the computed times.
BRIDGE, SOUP = 60_096, 800_000
# (episodes, mean steps, bytes of a step in memory) of the datasets in `mixing` and `hosts`.
SIZES = {
    "Bridge-like": (BRIDGE, 36, 20_000),
    "soup-like": (SOUP, 60, 15_000),
    "DROID-like": (76_000, 280, 13_000),
}
HOSTS = (1, 4, 16, 64)
CORES = (2, 16, 96)
DRAIN = 1.0  # seconds to finish the batches in progress


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    default = ",".join(name for name in MEASUREMENTS if name != "grain")
    parser.add_argument("--only", default=default, help="comma-separated")
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
    """Measure batches, and decoding of the distinct JPEGs of each, in CPU and wall time."""
    data = open_data(_episodes.config(root, "fake", args))
    count = max(args.episodes * args.steps // args.batch, 1)
    ratios, pipeline, floor, python = [], [], [], []
    stream = data.train()
    for _ in range(count):  # traces the graph, and lets the allocator grow
        batch = next(stream)
    decoded = sum(x.nbytes for _, x in types.flatten(batch)) / args.batch
    for _ in range(args.rounds):
        images = distinct_images(data, stream.state(), count)
        begin = time.thread_time()
        total = timed(lambda s=stream: ([next(s) for _ in range(count)], time.sleep(DRAIN)))
        total = total[0], total[1] - DRAIN
        python.append((time.thread_time() - begin) / total[0])
        with ThreadPoolExecutor(args.threads) as pool:
            chunks = [tf.constant(images[i : i + 64]) for i in range(0, len(images), 64)]
            only_decode(chunks[0])
            decoding = timed(lambda s=chunks, p=pool: list(p.map(only_decode, s)))
        ratios.append(total[0] / decoding[0])
        pipeline.append(total)
        floor.append(decoding)
    stream.close()
    examples = count * args.batch
    cpu, wall = np.median(pipeline, axis=0)
    rows = [
        row("decode", "pipeline / decoding, CPU", float(np.median(ratios)), "ratio", "≤ 1.2"),
        row("decode", "pipeline / decoding, largest of the rounds", max(ratios), "ratio"),
        row("decode", "pipeline", cpu / examples * 1e3, "CPU ms per example"),
        row("decode", "decoding", np.median(floor, 0)[0] / examples * 1e3, "CPU ms per example"),
        row("decode", "Python thread", float(np.median(python)) * 100, "% of CPU time", "≤ 10"),
        row("decode", "distinct JPEGs", len(images) / examples, "per example"),
        row("decode", "JPEG", sum(map(len, images)) / len(images) / 1e3, "kB on average"),
        row("decode", f"measured, {args.threads} threads", examples / wall, "examples/s"),
        row("decode", "the same, decoded", decoded * examples / wall / 1e6, "MB/s"),
    ]
    return rows + [
        row("decode", f"computed, {n} cores", n * examples / cpu, "examples/s") for n in CORES
    ]


def grain(args: argparse.Namespace, root: Path) -> list[Row]:
    """Measure the CPU time per example of octolike and of Grain, alternating in one process."""
    from benchmarks._grain_loader import grain_batches

    config = _episodes.config(root, "fake", args)
    data = open_data(config)
    source = data.source("fake")
    loaders = {
        "octolike": data.train(),
        "Grain": grain_batches(source, config.data, root / "steps.array_record", args.threads),
    }
    count = max(args.episodes * args.steps // args.batch, 1)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in loaders}
    for loader in loaders.values():  # traces the graph, and lets the allocator grow
        for _ in range(count):
            next(loader)
    for _ in range(args.rounds):
        for name, loader in loaders.items():
            times[name].append(timed(lambda x=loader: [next(x) for _ in range(count)]))
            time.sleep(DRAIN)
    loaders["octolike"].close()
    medians = {name: np.median(x, axis=0) / (count * args.batch) for name, x in times.items()}
    rows = [
        row("grain", name, cpu * 1e3, "CPU ms per example") for name, (cpu, _) in medians.items()
    ]
    rows += [row("grain", name, 1 / wall, "examples/s") for name, (_, wall) in medians.items()]
    ratio = medians["Grain"][0] / medians["octolike"][0]
    return [*rows, row("grain", "Grain / octolike, CPU", ratio, "ratio")]


def resize(args: argparse.Namespace, root: Path) -> list[Row]:
    """Measure decoding with resizing, relative to decoding alone, alternating in one process."""
    shots = _episodes.frames(np.random.default_rng(0), steps=24, side=640)
    images = (tf.io.decode_jpeg(x)[:480] for x in shots)
    encoded = tf.constant([tf.io.encode_jpeg(x, quality=95).numpy() for x in images])
    works: dict[str, Any] = {"decoding": lambda: only_decode(encoded)}
    for kernel in image_decoding.KERNELS:
        resized = tf.function(functools.partial(image_decoding.decode_images, encoded, 256, kernel))
        works[kernel] = resized.get_concrete_function()
    times: dict[str, list[float]] = {name: [] for name in works}
    for round_ in range(3 * args.rounds + 1):
        for name, work in works.items():
            cpu, _ = timed(work)
            if round_:  # the first one starts threads and lets the allocator grow
                times[name].append(cpu)
    floor = np.array(times.pop("decoding"))
    ratios = {name: float(np.median(np.array(x) / floor)) for name, x in times.items()}
    goals = {"area": "≤ 1.6"}
    return [
        row("resize", f"480×640 to 256, {name} / decoding", ratio, "ratio", goals.get(name, ""))
        for name, ratio in ratios.items()
    ]


def concurrency(args: argparse.Namespace, root: Path) -> list[Row]:
    """Measure how many images are decoded at a time if decoding is a pause."""
    pause, rows, original = 0.02, [], image_decoding.decode_image

    def wait(_: tf.Tensor, side: int, resize: str) -> tf.Tensor:
        def black() -> np.ndarray:
            time.sleep(pause)
            return np.zeros((side, side, 3), np.uint8)

        return tf.ensure_shape(tf.numpy_function(black, [], tf.uint8), (side, side, 3))

    for threads in CORES:
        config = _episodes.config(root, "fake", args)
        config.data.threads = threads
        image_decoding.decode_image = wait
        try:
            stream = open_data(config).train()
            next(stream)
            count, begin = max(4, threads // 4), time.perf_counter()
            for _ in range(count):
                next(stream)
            seconds = time.perf_counter() - begin
            stream.close()
        finally:
            image_decoding.decode_image = original
        images = len(distinct_images(open_data(config), None, count))
        value = images * pause / seconds
        rows.append(row("concurrency", f"{threads} threads", value, "images at a time"))
    return rows


def distinct_images(data: RldsSource, state: Any, count: int) -> list[bytes]:
    """Return the distinct encoded images of each of the next `count` batches."""
    encoded = data.dataset(state, decode=False).take(count)
    result = []
    for batch in encoded.as_numpy_iterator():
        frames, firsts = np.unique(batch["frames"], return_index=True)
        flat = batch["images"].reshape(-1, batch["images"].shape[-1])
        result += flat[firsts[frames >= 0]].reshape(-1).tolist()
    return result


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
    """Check that resuming and hosts are exact."""
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
    rows = [row("order", "resumed batches that are exact, of 10", exact, "batches", "10")]
    for count in (2, 4):
        streams = [data.train(process=(i, count)) for i in range(count)]
        equal = 0
        for i in range(10):
            parts = [dict(types.flatten(next(s))) for s in streams]
            joined = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
            equal += digest(types.unflatten(joined)) == digests[i]
        for s in streams:
            s.close()
        rows.append(row("order", f"{count} processes joined are one's", equal, "batches", "10"))
    return rows


def hosts(args: argparse.Namespace, root: Path) -> list[Row]:
    """Compute the episodes that each host reads in an epoch, and the bytes that it holds."""
    rows = []
    for name in ("Bridge-like", "DROID-like"):
        table, size = _table(name), 2048
        order_, settings = _order(table, size, memory=64.0)
        segment, sections = order_.segment(0, np.ones(1)), []
        for lane in range(order_.lanes):
            section = order_.lane_epoch(
                segment, tf.constant(0, tf.int64), tf.constant(lane, tf.int64)
            )
            splits = section.splits.numpy()
            episodes = section.episodes.numpy()
            # the older blocks of the first phase are loaded before it, and once more at the end
            again = episodes[splits[max(len(splits) - BLOCKS, 0)] :]
            sections.append(table.sizes[episodes].sum() + table.sizes[again].sum())
        pool_bytes = table.sizes.mean() * settings["pool"] * mixing.OVERHEAD
        for count in HOSTS:
            per_host = np.reshape(sections, (count, -1)).sum(1)
            share = table.sizes.sum() / count
            title = f"{name}, {count} hosts"
            rows += [
                row("hosts", f"{title}: read", per_host.max() / share, "of its share", "≤ 1.1"),
                row("hosts", f"{title}: held", pool_bytes / count / 2**20, "MiB per host"),
            ]
    return rows


def mix(args: argparse.Namespace, root: Path) -> list[Row]:
    """Compute distinct episodes per batch of 256 at the default memory and pool."""
    rows = []
    for name in SIZES:
        table = _table(name)
        order_, settings = _order(table, 256, memory=DataConfig().memory)
        report = mixing.report(table, np.ones(len(table.steps)), table.sizes, **settings)
        actual = _distinct_episodes(order_)
        part = "mixing"
        rows += [
            row(part, f"{name}: distinct episodes of 256, expected", report.distinct, "episodes"),
            row(part, f"{name}: computed from the order", actual, "episodes"),
            row(part, f"{name}: without a pool", report.ideal_distinct, "episodes"),
            row(part, f"{name}: share", actual / report.ideal_distinct * 100, "%", "≥ 80"),
            row(part, f"{name}: shared with the previous batch", report.overlap * 100, "%"),
        ]
    return rows


def _table(name: str) -> EpisodeTable:
    count, mean, size = SIZES[name]
    steps = np.random.default_rng(0).integers(mean * 2 // 3, mean * 4 // 3, count)
    return EpisodeTable(steps=steps, sizes=steps * size, groups=np.zeros(count, np.int64))


def _order(table: EpisodeTable, size: int, memory: float) -> tuple[FrameOrder, dict[str, Any]]:
    """Return the order with the default settings for a batch size, and these settings."""
    settings = {
        "batch_size": size,
        "lanes": mixing.number_of_lanes(size),
        "pool": mixing.default_pool(size),
        "budget": memory * 2**30 * (1 - VALIDATION) / mixing.OVERHEAD,
    }
    return FrameOrder(table, seed=0, **settings), settings


def _distinct_episodes(order_: FrameOrder, phase: int = 8) -> float:
    """Return the distinct episodes of a batch: those of the rows of each lane in a phase."""
    segment, total = order_.segment(0, np.ones(1)), 0.0
    rng = np.random.default_rng(0)
    for lane in range(order_.lanes):
        section = order_.lane_epoch(segment, tf.constant(0, tf.int64), tf.constant(lane, tf.int64))
        splits = section.splits.numpy()
        used = slice(splits[phase + 1 - BLOCKS], splits[phase + 1])
        weights = section.count.numpy()[used]
        drawn = [rng.choice(len(weights), order_.rows, p=weights / weights.sum()) for _ in range(9)]
        total += float(np.mean([len(np.unique(x)) for x in drawn]))
    return total


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
    "grain": grain,
    "resize": resize,
    "concurrency": concurrency,
    "memory": memory,
    "first": first,
    "statistics": scan,
    "order": order,
    "hosts": hosts,
    "mixing": mix,
}
