"""The same examples by Grain over array_record files: the loader that JAX users write today.

Needs `pip install grain array_record`. A record holds the encoded images of one step; the numbers
of all steps are in memory. Every example reads and decodes its steps and its goal with the decoder
of octolike's graph; nothing is shared between the examples of a batch.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from octolike.config import DataConfig
from octolike.data.pipeline.dataset_split import DatasetSplit


def grain_batches(
    source: DatasetSplit, config: DataConfig, path: Path, threads: int
) -> Iterator[dict[str, Any]]:
    """Return the endless batches of one dataset, in a random order of its steps."""
    import grain
    from array_record.python.array_record_module import ArrayRecordWriter

    episodes = [source.load(i) for i in range(len(source.index.steps))]
    cameras = tuple(config.cameras)
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for episode in episodes:
        for images in zip(*(episode.images[c] for c in cameras), strict=True):
            writer.write(_packed(images))
    writer.close()
    ends = np.repeat(np.cumsum(source.index.steps), source.index.steps)
    starts = ends - np.repeat(source.index.steps, source.index.steps)
    action = np.concatenate([e.action for e in episodes])
    proprio = np.concatenate([e.proprio for e in episodes if e.proprio is not None])
    records = grain.sources.ArrayRecordDataSource([str(path)])

    def example(t: int, rng: np.random.Generator) -> dict[str, Any]:
        window = np.arange(t + 1 - config.window, t + 1)
        valid = window >= starts[t]
        goal = int(rng.integers(t, ends[t]))
        steps = [*np.maximum(window, starts[t]).tolist(), goal]
        pixels = [_decoded(records[step], len(cameras)) for step in steps]
        chunk = window[:, None] + np.arange(config.horizon)
        result = {
            "action": action[np.clip(chunk, starts[t], ends[t] - 1)],
            "action_mask": (chunk >= starts[t]) & (chunk <= goal),
            "timestep_mask": valid,
            "proprio": proprio[np.maximum(window, starts[t])],
        }
        for i, camera in enumerate(cameras):
            result[f"image_{camera}"] = np.stack([x[i] for x in pixels[:-1]])
            result[f"goal_{camera}"] = pixels[-1][i]
        return result

    dataset = grain.MapDataset.range(len(starts)).shuffle(seed=0).repeat()
    batches = dataset.random_map(example, seed=0).batch(config.batch_size)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(batches.to_iter_dataset(options))


def _packed(images: Sequence[bytes]) -> bytes:
    return struct.pack(f"<{len(images)}I", *map(len, images)) + b"".join(images)


def _decoded(record: bytes, count: int) -> list[np.ndarray]:
    sizes = struct.unpack_from(f"<{count}I", record)
    ends = 4 * count + np.cumsum(sizes)
    encoded = [record[end - size : end] for size, end in zip(sizes, ends.tolist(), strict=True)]
    return [tf.io.decode_jpeg(x, channels=3).numpy() for x in encoded]
