"""A few decoded episodes per dataset, to compare datasets and to measure held-out errors."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from octolike.config import DataConfig
from octolike.data.pipeline.dataset_split import open_training
from octolike.data.rlds import decode
from octolike.data.rlds.episode import Episode, ExcludedEpisodeError
from octolike.data.rlds.split_records import MissingSplitError
from octolike.data.specs import catalog, mixes
from octolike.data.specs.spec import DatasetSpec
from octolike.errors import DataError


class DecodedEpisode(NamedTuple):
    """T steps of one episode, in robot units.

    action: float32 [T, A]; proprio: float32 [T, P] or None; images: {camera: uint8
    [T, side, side, 3]}; instruction, label: "" if absent.
    """

    action: np.ndarray
    proprio: np.ndarray | None
    images: dict[str, np.ndarray]
    instruction: str
    label: str


def decode_mix(
    config: DataConfig, *, episodes: int, steps: int = 0, side: int = 0, held_out: bool = False
) -> list[tuple[DatasetSpec, list[DecodedEpisode]]]:
    """Return the decoded episodes of each dataset of data.mix.

    side: if not 0, decode only the first camera, at this side in pixels. held_out: from the
    validation split; datasets without one are left out.
    """
    specs = catalog.load_specs(config.specs)
    mix = mixes.parse(config.mix, config.mix_weights, specs)
    cameras = {next(iter(config.cameras)): side} if side else dict(config.cameras)
    result = []
    for name in mix.weights:
        spec = catalog.find_spec(name, specs)
        try:
            decoded = decode_episodes(
                spec, config, cameras, episodes=episodes, steps=steps, held_out=held_out
            )
        except MissingSplitError:
            if not held_out:
                raise
            continue
        result.append((spec, decoded))
    return result


def decode_episodes(
    spec: DatasetSpec,
    config: DataConfig,
    cameras: dict[str, int],
    *,
    episodes: int,
    steps: int = 0,
    held_out: bool = False,
) -> list[DecodedEpisode]:
    """Return at most `episodes` episodes, spread over the shards.

    held_out: from the held-out episodes, instead of those for training.

    cameras: {name: side in pixels; 0: as stored}. steps: number of evenly spaced steps per episode;
    0: all. Skips episodes that the spec excludes, and bad ones if data.bad_episodes is "drop";
    otherwise a bad episode raises DataError.
    """
    reader = open_training(config, spec)
    reader = reader.held_out() if held_out else reader
    share = -(-episodes // len(reader.files))
    result: list[DecodedEpisode] = []
    for shard, path in enumerate(reader.files):
        remaining = min(share, episodes - len(result))
        for number, raw in reader.selected_records(shard):
            if not remaining:
                break
            place = f"{path}, record {number}"
            try:
                episode = reader.parse_episode(raw, place, tuple(cameras))
            except ExcludedEpisodeError:
                continue
            except DataError:
                if config.bad_episodes != "drop":
                    raise
                continue
            label = reader.parse_label(raw, place)
            result.append(
                _decode_episode(
                    episode, label, reader.channels.swapped, cameras, steps, config.resize
                )
            )
            remaining -= 1
    return result


def _decode_episode(
    episode: Episode,
    label: str,
    bgr: tuple[str, ...],
    cameras: dict[str, int],
    steps: int,
    resize: str,
) -> DecodedEpisode:
    count = min(steps or len(episode), len(episode))
    indices = (
        ((np.arange(count) + 0.5) * len(episode) / count).astype(int) if steps else slice(None)
    )
    images = {}
    for camera, frames in episode.images.items():
        pixels = _pixels(list(np.array(frames, object)[indices]), cameras[camera], resize)
        images[camera] = pixels[..., :: -1 if camera in bgr else 1]
    instruction = episode.instructions[0]
    return DecodedEpisode(
        episode.action[indices],
        None if episode.proprio is None else episode.proprio[indices],
        images,
        instruction if isinstance(instruction, str) else instruction[0],
        label,
    )


def _pixels(frames: list[bytes], side: int, resize: str) -> np.ndarray:
    for frame in frames:
        decode.check_size(frame)
    if side:
        return decode.decode_images(tf.constant(frames, tf.string), side, resize).numpy()
    images = [tf.io.decode_image(f, channels=3, expand_animations=False) for f in frames]
    return np.stack([x.numpy() for x in images])
