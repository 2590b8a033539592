"""Some episodes, decoded: what a comparison of datasets and held-out errors look at."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from octolike.config import DataConfig
from octolike.data.rlds import decode
from octolike.data.rlds.reader import Episode, ExcludedEpisodeError, MissingSplitError, Reader
from octolike.data.specs import catalog, mixes
from octolike.data.specs.spec import DatasetSpec
from octolike.errors import DataError


class DecodedEpisode(NamedTuple):
    """T steps of one episode, in robot units.

    action: float32 [T, A]; proprio: float32 [T, P] or None; images: {camera: uint8
    [T, side, side, 3]}; instruction, label: "" where there is none.
    """

    action: np.ndarray
    proprio: np.ndarray | None
    images: dict[str, np.ndarray]
    instruction: str
    label: str


def decode_mix(
    config: DataConfig, *, episodes: int, steps: int = 0, pictures: int = 0, held_out: bool = False
) -> list[tuple[DatasetSpec, list[DecodedEpisode]]]:
    """Return the decoded episodes of each dataset of data.mix.

    pictures: side, in pixels, of the only camera that is then decoded: the first of data.cameras.
    held_out: of the validation split; a dataset without one is not there.
    """
    rows = catalog.load_specs(config.specs)
    mix = mixes.parse(config.mix, config.mix_weights, rows)
    split = config.validation_split if held_out else config.train_split
    cameras = dict(list(config.cameras.items())[:1]) if pictures else dict(config.cameras)
    cameras = {c: pictures or side for c, side in cameras.items()}
    result = []
    for name in mix.weights:
        spec = catalog.find_spec(name, rows)
        try:
            found = decode_episodes(spec, config, split, cameras, episodes=episodes, steps=steps)
        except MissingSplitError:
            if not held_out:
                raise
            continue
        result.append((spec, found))
    return result


def decode_episodes(
    spec: DatasetSpec,
    config: DataConfig,
    split: str,
    cameras: dict[str, int],
    *,
    episodes: int,
    steps: int = 0,
) -> list[DecodedEpisode]:
    """Return up to so many episodes, spread over the shards.

    cameras: {name: side in pixels; 0: as stored}. steps: how many, evenly spaced, are kept of each;
    0: all. Episodes that the row leaves out are not taken, bad ones neither where data.bad_episodes
    is "drop". Raises DataError for others.
    """
    root, told = config.root_of(spec.name), config.uninformative_language
    reader = Reader(spec, root, split, uninformative=told)
    share = -(-episodes // len(reader.files))
    result: list[DecodedEpisode] = []
    for shard, path in enumerate(reader.files):
        wanted = min(share, episodes - len(result))
        for number, raw in enumerate(reader.read_records(shard)):
            if not wanted:
                break
            where = f"{path}, record {number}"
            try:
                episode = reader.parse_episode(raw, where, tuple(cameras))
            except ExcludedEpisodeError:
                continue
            except DataError:
                if config.bad_episodes != "drop":
                    raise
                continue
            result.append(
                _decode_episode(episode, reader.parse_label(raw, where), spec, cameras, steps)
            )
            wanted -= 1
    return result


def _decode_episode(
    episode: Episode, label: str, spec: DatasetSpec, cameras: dict[str, int], steps: int
) -> DecodedEpisode:
    count = min(steps or len(episode), len(episode))
    kept = ((np.arange(count) + 0.5) * len(episode) / count).astype(int) if steps else slice(None)
    pictures = {}
    for camera, frames in episode.images.items():
        pixels = _pixels(list(np.array(frames, object)[kept]), cameras[camera])
        pictures[camera] = pixels[..., :: -1 if camera in spec.bgr else 1]
    told = episode.instructions[0]
    return DecodedEpisode(
        episode.action[kept],
        None if episode.proprio is None else episode.proprio[kept],
        pictures,
        told if isinstance(told, str) else told[0],
        label,
    )


def _pixels(frames: list[bytes], side: int) -> np.ndarray:
    if side:
        return decode.decode_images(tf.constant(frames, tf.string), side).numpy()
    read = [tf.io.decode_image(f, channels=3, expand_animations=False) for f in frames]
    return np.stack([x.numpy() for x in read])
