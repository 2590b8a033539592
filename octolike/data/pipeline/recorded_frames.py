"""Frames and episodes as recorded: images at their original size, numbers in the robot's units.

For checks of a policy and a simulator against a dataset (octolike check_policy). Only the batch
in `SampledFrames` goes through the training pipeline.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from octolike.config import DataConfig
from octolike.data.pipeline import goals, windows
from octolike.data.pipeline.dataset_split import DatasetSplit
from octolike.data.pipeline.source import RldsSource
from octolike.data.rlds.episode import Episode
from octolike.data.rlds.reader import Reader
from octolike.data.rlds.writer import SETTINGS
from octolike.errors import DataError
from octolike.types import Batch

BATCH = 16


class Conditioning(NamedTuple):
    """The task of a frame; absent parts are "" or {}. goal: {camera: uint8 [h, w, 3]}."""

    instruction: str
    goal: dict[str, np.ndarray]
    task: str


class SampledFrames(NamedTuple):
    """n frames of one dataset, and the batch that the training pipeline builds from them.

    Attributes:
        observations: per frame, image_<camera> uint8 [w, h, w, 3] and proprio float32 [w, P] of the
            newest w ≤ W steps; None for sensors that the episode lacks.
        conditionings: per frame.
        actions: float32 [n, H, A], in the robot's units; the last one repeats past the end.
        places: per frame, its file, record and step.
        batch: the same frames from the training pipeline.
    """

    observations: list[dict[str, np.ndarray | None]]
    conditionings: list[Conditioning]
    actions: np.ndarray
    places: list[str]
    batch: Batch


class RecordedEpisode(NamedTuple):
    """An episode that its simulator can replay.

    observation: image_<camera> uint8 [T, h, w, 3], proprio float32 [T, P]; actions: float32
    [T, A], as executed.
    """

    skill: str
    split: str
    seed: int
    actions: np.ndarray
    observation: dict[str, np.ndarray]


def sample_frames(
    data: RldsSource,
    config: DataConfig,
    dataset: str,
    count: int,
    conditioning: Collection[str] = (),
) -> Iterator[SampledFrames]:
    """Yield at least `count` frames in batches of `BATCH`, from the held-out split if there is one.

    Each batch has the first step of an episode and the last step of another one. conditioning: of
    the policy; for one on "language" alone, the episodes have an instruction, and DataError is
    raised if none has.
    """
    source, rng = data.source(dataset), np.random.default_rng(0)
    has_text, labelled = source.index.has_instruction, set(conditioning) == {"language"}
    if labelled and not has_text.any():
        raise DataError(
            f"no episode of {source.reader.title} has an instruction, without which this policy "
            "does not act: nothing to compare; octolike convert --instruction gives them one"
        )
    # A head per task has no output for tasks that are not in training.
    usable = has_text if labelled else np.ones(len(has_text), bool)
    candidates = np.flatnonzero(source.has_task & usable)
    candidates = candidates if len(candidates) else np.flatnonzero(usable)
    for _ in range(-(-count // BATCH)):
        episodes = rng.choice(candidates, BATCH)
        steps = rng.integers(source.index.steps[episodes])
        steps[0], steps[1] = 0, source.index.steps[episodes[1]] - 1
        draws = rng.random((BATCH, goals.DRAWS))
        positions = np.stack([episodes, steps], axis=1)
        batch = data.examples(source, positions, draws)
        yield _sampled_frames(data, config, source, positions, draws, batch)


def sample_episodes(source: DatasetSplit, count: int) -> tuple[int, Iterator[RecordedEpisode]]:
    """Return (number of episodes, at most `count`; the episodes), drawn at random.

    Raises DataError for episodes without the seed, split and skill that generated them.
    """
    episodes = np.random.default_rng(0).permutation(len(source.index.steps))[:count]
    return len(episodes), (_recorded_episode(source, e) for e in sorted(episodes.tolist()))


def source_environment(reader: Reader) -> Mapping[str, Any] | None:
    """Return the environment in a dataset's settings file, or None."""
    path = f"{reader.directory}/{SETTINGS}"
    if not tf.io.gfile.exists(path):
        return None
    with tf.io.gfile.GFile(path) as file:
        return json.load(file).get("environment")


def _sampled_frames(
    data: RldsSource,
    config: DataConfig,
    source: DatasetSplit,
    positions: np.ndarray,
    draws: np.ndarray,
    batch: Batch,
) -> SampledFrames:
    episodes = {e: _load(source, e)[0] for e in set(positions[:, 0].tolist())}
    observations, conditionings, actions, places = [], [], [], []
    instructed = batch["task"]["present"]["language"]
    for (number, t), draw, cameras, has_text in zip(
        positions.tolist(), draws, _goal_cameras(batch), instructed, strict=True
    ):
        episode, first = episodes[number], max(0, t + 1 - config.window)
        observation = {
            f"image_{c}": _images(source, episode, c, first, t + 1) if c in episode.images else None
            for c in config.cameras
        }
        observation["proprio"] = None if episode.proprio is None else episode.proprio[first : t + 1]
        observations.append(observation)
        step = _goal_step(config, draw, t, len(episode))
        goal = {c: _images(source, episode, c, step, step + 1)[0] for c in cameras}
        text = episode.instructions[t]
        text = text if isinstance(text, str) else next(filter(None, text), "")
        task = data.tasks[source.tasks[number]] if source.has_task[number] else ""
        conditionings.append(Conditioning(text.strip() if has_text else "", goal, task))
        chunk, _ = windows.chunk_steps(t, 1, config.horizon, len(episode), len(episode))
        actions.append(episode.action[chunk[0]])
        places.append(f"{source.name_of(number)}, step {t}")
    return SampledFrames(observations, conditionings, np.stack(actions), places, batch)


def _goal_cameras(batch: Batch) -> list[list[str]]:
    """Return the cameras with a goal image, per example."""
    present = {
        k.removeprefix("image_"): v
        for k, v in batch["task"]["present"].items()
        if k.startswith("image_")
    }
    return [[c for c, mask in present.items() if mask[i]] for i in range(len(batch["action"]))]


def _goal_step(config: DataConfig, draw: np.ndarray, t: int, length: int) -> int:
    true = np.ones(1, bool)
    choice = goals.choose(
        draw[None],
        np.array([t]),
        np.array([length]),
        strategy=config.goal,
        keep_language=1.0,
        keep_goal=1.0,
        keep_task_id=1.0,
        has_language=true,
        has_goal=true,
        has_task_id=true,
    )
    return int(choice.step[0])


def _load(
    source: DatasetSplit, number: int, *, complete: bool = False
) -> tuple[Episode, dict[str, Any]]:
    """Return an episode in the robot's units, and all fields of its record.

    complete: with the steps that a filter leaves out: a replay needs every action.
    """
    index = source.index
    reader = source.reader.without_filters() if complete else source.reader
    raw = reader.read_record(
        int(index.shard[number]), int(index.offset[number]), int(index.length[number])
    )
    place = source.name_of(number)
    return reader.parse_episode(raw, place), reader.parse_steps(raw, place)


def _images(
    source: DatasetSplit, episode: Episode, camera: str, first: int, end: int
) -> np.ndarray:
    """Return uint8 [end − first, h, w, 3], RGB in the original size."""
    images = np.stack(
        [
            tf.io.decode_image(x, channels=3, expand_animations=False).numpy()
            for x in episode.images[camera][first:end]
        ]
    )
    return images[..., ::-1] if camera in source.reader.channels.swapped else images


def _recorded_episode(source: DatasetSplit, number: int) -> RecordedEpisode:
    episode, fields = _load(source, number, complete=True)
    metadata = fields["episode"].get("episode_metadata", {})
    missing = [k for k in ("seed", "split", "skill") if k not in metadata]
    if missing:
        raise DataError(
            f"{source.name_of(number)} does not record its {', '.join(missing)} (episode_metadata "
            f"has {', '.join(sorted(metadata)) or 'nothing'}), so no simulator can replay it; "
            "demonstrations of octolike collect can be replayed"
        )
    observation = {
        f"image_{c}": _images(source, episode, c, 0, len(episode)) for c in episode.images
    }
    if episode.proprio is not None:
        observation["proprio"] = episode.proprio
    return RecordedEpisode(
        skill=metadata["skill"].decode(),
        split=metadata["split"].decode(),
        seed=int(metadata["seed"]),
        actions=_executed_actions(source, number, fields, episode)[: len(episode)],
        observation=observation,
    )


def _executed_actions(
    source: DatasetSplit, number: int, fields: Mapping[str, Any], episode: Episode
) -> np.ndarray:
    """Return the executed actions, with noise if recorded with noise, in the robot's units."""
    if "executed_action" not in fields:
        return episode.action
    # They are stored as the labels are, so the spec converts them in the same way.
    executed = {**fields, "action": fields["executed_action"]}
    return source.reader.standardize(executed, source.name_of(number)).action
