"""Datasets with the episode and step encoded in their pixels, and configs that read them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from octolike.config import Component, Config
from octolike.data import open_data
from octolike.data.pipeline.source import RldsSource
from octolike.data.rlds.writer import Writer
from octolike.data.specs.catalog import find_spec

SIDE = 8


def numbered(episode: int, steps: int, cameras: Sequence[str], text: str = "go") -> dict:
    """Return an episode with (episode, step) in each pixel, state and action.

    cameras: keys of the images. Both numbers must be below 256.
    """
    t = np.arange(steps, dtype=np.float32)
    numbers = np.zeros((steps, 7), np.float32)
    numbers[:, 0], numbers[:, 1], numbers[:, 6] = episode, t, t % 2
    image = np.full((steps, SIDE, SIDE, 3), 200, np.uint8)
    image[..., 0], image[..., 1] = episode, t.astype(np.uint8)[:, None, None]
    return {
        "steps": {
            "observation": {"state": numbers} | dict.fromkeys(cameras, image),
            "action": numbers.copy(),
            "language_instruction": text,
        },
        "episode_metadata": {"success": True, "task": "numbered"},
    }


def write(root: Path, name: str, splits: dict[str, list[dict]]) -> Path:
    """Write a dataset of one shard per split and return its directory."""
    writer = Writer(str(root), name, "1.0.0", dict.fromkeys(splits, 1))
    for split, episodes in splits.items():
        writer.write(split, 0, episodes)
    return writer.finish()


def write_numbered(root: Path, name: str, lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Write numbered episodes of the given lengths, two of them also held out; return the frames.

    The standardise function of Bridge drops the last step of each.
    """
    keys = list(find_spec(name).cameras.values())
    episodes = [numbered(i, n, keys, f"do {i}") for i, n in enumerate(lengths)]
    write(root, name, {"train": episodes, "val": episodes[:2]})
    dropped = name == "bridge_dataset"
    return [(e, t) for e, n in enumerate(lengths) for t in range(n - dropped)]


def config(root: Path, mix: str = "fake", **data) -> Config:
    """Return a config for a small dataset; keywords are fields of config.data."""
    result = Config(workdir="unused")
    result.data.root, result.data.mix, result.data.threads = str(root), mix, 2
    result.data.cameras, result.data.goal = {"primary": SIDE}, "none"
    result.data.text = Component(kind="hash", length=8, vocabulary=64)
    result.data.batch_size, result.data.cache = 4, str(root / "cache")
    result.train.validation_batches, result.data.held_out = 2, 0.0
    for name, value in data.items():
        setattr(result.data, name, value)
    result.check()
    return result


def opened(root: Path, mix: str = "fake", **data) -> RldsSource:
    """Return the opened data of `config(...)`."""
    return open_data(config(root, mix, **data))


def shown(images: np.ndarray) -> list:
    """Return the (episode, step) of numbered images [..., h, w, 3] as nested lists."""
    return images[..., 0, 0, :2].tolist()
