"""Episodes for benchmarks, with JPEG frames of the size on disk of real cameras."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from octolike.config import Component, Config
from octolike.data.rlds.writer import EncodedImage, Writer
from octolike.data.specs import catalog

SIDES = {"primary": 256, "wrist": 128}


def frames(rng: np.random.Generator, steps: int, side: int, quality: int = 95) -> list[bytes]:
    """Return JPEGs of a sliding scene: a field with the spectrum of photographs, and shapes.

    Amplitude falls as 1/frequency^1.3, as in natural images, so a frame has about as many bytes as
    a photograph.
    """
    wide = side + steps
    frequency = np.hypot(*np.meshgrid(np.fft.rfftfreq(wide), np.fft.fftfreq(side)))
    frequency[0, 0] = np.inf
    noise = rng.normal(size=(3, side, wide // 2 + 1, 2)) @ (1, 1j)
    noise += 2 * noise.mean(0)  # correlated colours
    field = np.fft.irfft2(noise / frequency**1.3, s=(side, wide)).transpose(1, 2, 0)
    scene = 128 + 45 * field / field.std()
    for _ in range(8):
        y, x = rng.integers(0, (side, wide))
        h, w = rng.integers(side // 16, side // 4, 2)
        scene[y : y + h, x : x + w] = rng.uniform(0, 255, 3) + 0.2 * scene[y : y + h, x : x + w]
    scene = np.clip(scene, 0, 255).astype(np.uint8)
    shots = (scene[:, t : t + side] for t in range(steps))
    return [tf.io.encode_jpeg(shot, quality=quality).numpy() for shot in shots]


def episodes(seed: int, count: int, steps: int) -> Iterator[dict[str, Any]]:
    """Yield episodes of both cameras, 7 state and 7 action dimensions."""
    for i in range(count):
        rng = np.random.default_rng((seed, i))
        pictures = {
            f"image_{camera}": EncodedImage(
                tuple(frames(rng, steps, side)), shape=(side, side, 3), format="jpeg"
            )
            for camera, side in SIDES.items()
        }
        numbers = rng.normal(size=(2, steps, 7)).astype(np.float32)
        numbers[..., 6] = numbers[..., 6] > 0  # the gripper
        yield {
            "steps": {
                "observation": pictures | {"state": numbers[0]},
                "action": numbers[1],
                "language_instruction": f"put object {i % 13} on the table",
            },
            "episode_metadata": {"success": True},
        }


def write(root: Path, *, count: int, steps: int, shards: int = 2) -> int:
    """Write the dataset "fake" under root unless it exists; return its bytes."""
    writer = Writer(str(root), "fake", "1.0.0", {"train": shards})
    if not writer.finished:
        for shard in range(shards):
            writer.write("train", shard, episodes(shard, len(range(shard, count, shards)), steps))
        writer.finish()
    return sum(p.stat().st_size for p in writer.directory.glob("*.tfrecord*"))


def write_copies(root: Path, number: int) -> list[str]:
    """Write `number` small datasets and return their names.

    Their specs are copies of "fake" under other names, added to the table of this process.
    """
    names = [f"fake_{i:02d}" for i in range(number)]
    spec = catalog.find_spec("fake")
    small_episodes = list(episodes(0, 4, 10))
    for name in names:
        catalog.DATASETS[name] = dataclasses.replace(spec, name=name)
        writer = Writer(str(root), name, "1.0.0", {"train": 1})
        if not writer.finished:
            writer.write("train", 0, small_episodes)
            writer.finish()
    return names


def config(root: Path, mix: str, args: Any) -> Config:
    """Return the config of the benchmark."""
    result = Config(workdir="unused")
    d = result.data
    d.root, d.mix, d.threads, d.pool = str(root), mix, args.threads, args.pool
    d.cameras, d.window, d.horizon, d.batch_size = dict(SIDES), 2, 4, args.batch
    d.text = Component(kind="hash", length=16, vocabulary=4096)
    d.validation_split = ""
    result.check()
    return result
