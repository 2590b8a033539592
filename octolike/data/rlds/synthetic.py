"""Synthetic episodes in the layout of this project's datasets, for tests and debugging runs.

They can be learned: the actions lead straight from the position in the state to a coloured square
in the image, and the gripper closes on arrival.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from octolike.data.rlds.writer import Writer
from octolike.data.specs.catalog import find_spec

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 80, 230)}
REACH = 0.05  # metres per step


def fake_episode(
    rng: np.random.Generator,
    *,
    steps: int,
    cameras: Mapping[str, int],
) -> dict[str, Any]:
    """Return one episode, with an image of the given side for each camera.

    `octolike.data.rlds.writer` describes the layout; the fields are those of the spec "fake".
    """
    colour = str(rng.choice(list(COLOURS)))
    target, position = rng.uniform(-0.2, 0.2, (2, 3))
    target[2] = 0.0  # on the table: the image does not show the height
    states, actions = [], []
    for _ in range(steps):
        move = np.clip(target - position, -REACH, REACH)
        arrived = float(np.abs(target - position).max() < REACH / 2)
        states.append([*position, 0, 0, 0, 1 - arrived])
        actions.append([*move, 0, 0, 0, 1 - arrived])
        position = position + move
    images = {
        f"image_{c}": np.repeat(_image(target, COLOURS[colour], side)[None], steps, 0)
        for c, side in cameras.items()
    }
    return {
        "steps": {
            "observation": images | {"state": np.array(states, np.float32)},
            "action": np.array(actions, np.float32),
            "language_instruction": f"go to the {colour} square",
        },
        "episode_metadata": {"success": True, "task": f"go/{colour}"},
    }


def fake_episodes(
    seed: int, count: int, *, steps: int = 8, cameras: Mapping[str, int]
) -> Iterator[dict[str, Any]]:
    """Yield `count` episodes of `steps` to 1.5 · `steps` steps, determined by the seed."""
    for i in range(count):
        rng = np.random.default_rng((seed, i))
        length = int(rng.integers(steps, steps + steps // 2 + 1))
        yield fake_episode(rng, steps=length, cameras=cameras)


def write_fake_dataset(
    root: str | Path,
    name: str = "fake",
    *,
    train: int = 12,
    val: int = 4,
    shards: int = 2,
    steps: int = 8,
    side: int = 32,
    seed: int = 0,
) -> Path:
    """Write a dataset of synthetic episodes under `root` and return its directory.

    name: a spec in DATASETS with the fields of "fake" or "tabletop"; side: of the images (pixels).
    """
    spec = find_spec(name)
    cameras = dict.fromkeys(spec.cameras, side)
    writer = Writer(str(root), spec.name, spec.version, {"train": shards, "val": 1})
    for i in range(shards):
        count = len(range(i, train, shards))
        episodes = fake_episodes(seed + 1 + i, count, steps=steps, cameras=cameras)
        writer.write("train", i, episodes)
    writer.write("val", 0, fake_episodes(seed, val, steps=steps, cameras=cameras))
    return writer.finish()


def _image(target: np.ndarray, colour: tuple[int, int, int], side: int) -> np.ndarray:
    image = np.full((side, side, 3), 225, np.uint8)
    row, column = ((target[:2] + 0.25) / 0.5 * side).astype(int)
    half = max(side // 12, 1)
    image[max(row - half, 0) : row + half, max(column - half, 0) : column + half] = colour
    return image
