"""What a robot met, as it was recorded: pictures decoded and not resized, numbers in its units.

For checks that hold a policy and a simulator against a dataset (scripts/check_policy.py): none of
this goes through the training pipeline, but for the batch that stands beside the frames.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from octolike.config import DataConfig
from octolike.data.pipeline import goals, windows
from octolike.data.pipeline.dataset_split import DatasetSplit
from octolike.data.pipeline.source import RldsSource
from octolike.data.rlds.reader import Episode, Reader
from octolike.data.rlds.writer import SETTINGS
from octolike.errors import DataError
from octolike.types import Batch

BATCH = 16


class Conditioning(NamedTuple):
    """The task of a frame: each "" or {} where there is none. goal: {camera: uint8 [h, w, 3]}."""

    instruction: str
    goal: dict[str, np.ndarray]
    task: str


class SampledFrames(NamedTuple):
    """Frames of one dataset, and the batch that training's pipeline makes of the same ones.

    observations: per frame, image_<camera> uint8 [w, h, w, 3] and proprio float32 [w, P] of the
    newest w ≤ W steps, None for what the episode lacks; conditionings: per frame; actions: float32
    [n, H, A], the robot's own dimensions and units, the last one repeated past the end; places:
    per frame, where it is.
    """

    observations: list[dict[str, np.ndarray | None]]
    conditionings: list[Conditioning]
    actions: np.ndarray
    places: list[str]
    batch: Batch


class RecordedEpisode(NamedTuple):
    """An episode that can be played again in the simulator that made it.

    observation: image_<camera> uint8 [T, h, w, 3], proprio float32 [T, P]; actions: float32
    [T, A], what the robot executed.
    """

    skill: str
    split: str
    seed: int
    actions: np.ndarray
    observation: dict[str, np.ndarray]


def sample_frames(
    data: RldsSource, config: DataConfig, dataset: str, count: int
) -> Iterator[SampledFrames]:
    """Yield at least `count` frames in batches of `BATCH`, held-out ones where there are any.

    Each batch has the first step of an episode and the last step of another one among them.
    """
    source, rng = data.source(dataset), np.random.default_rng(0)
    among = np.flatnonzero(source.known)  # a head per task has none for tasks it never met
    among = among if len(among) else np.arange(len(source.known))
    for _ in range(-(-count // BATCH)):
        episodes = rng.choice(among, BATCH)
        steps = rng.integers(source.index.steps[episodes])
        steps[0], steps[1] = 0, source.index.steps[episodes[1]] - 1
        draws = rng.random((BATCH, goals.DRAWS))
        where = np.stack([episodes, steps], axis=1)
        batch = data.examples(source, where, draws)
        yield _frames(data, config, source, where, draws, batch)


def sample_episodes(source: DatasetSplit, count: int) -> tuple[int, Iterator[RecordedEpisode]]:
    """Return how many demonstrations there will be, at most `count`, and them; drawn at random.

    Raises DataError for episodes that do not say which seed, split and skill made them.
    """
    episodes = np.random.default_rng(0).permutation(len(source.index.steps))[:count]
    return len(episodes), (_demonstration(source, e) for e in sorted(episodes.tolist()))


def source_environment(reader: Reader) -> Mapping[str, Any] | None:
    """Return the environment that a dataset's settings name; None where it says nothing of one."""
    path = f"{reader.directory}/{SETTINGS}"
    if not tf.io.gfile.exists(path):
        return None
    with tf.io.gfile.GFile(path) as file:
        return json.load(file).get("environment")


def _frames(
    data: RldsSource,
    config: DataConfig,
    source: DatasetSplit,
    where: np.ndarray,
    draws: np.ndarray,
    batch: Batch,
) -> SampledFrames:
    loaded = {e: _load(source, e)[0] for e in set(where[:, 0].tolist())}
    shown, conditionings, actions, places = [], [], [], []
    for (number, t), draw, goal in zip(where.tolist(), draws, _goals(batch), strict=True):
        episode, first = loaded[number], max(0, t + 1 - config.window)
        seen = {f"image_{c}": _pictures(source, episode, c, first, t + 1) for c in config.cameras}
        seen["proprio"] = None if episode.proprio is None else episode.proprio[first : t + 1]
        shown.append(seen)
        step = _goal_step(config, draw, t, len(episode))
        pictures = {c: _pictures(source, episode, c, step, step + 1)[0] for c in goal}
        text = episode.instructions[t]
        text = text if isinstance(text, str) else next(filter(None, text), "")
        name = data.tasks[source.tasks[number]] if source.known[number] else ""
        conditionings.append(Conditioning(text.strip(), pictures, name))
        chunk, _ = windows.chunk_steps(t, 1, config.horizon, len(episode), len(episode))
        actions.append(episode.action[chunk[0]])
        places.append(f"{source.name_of(number)}, step {t}")
    return SampledFrames(shown, conditionings, np.stack(actions), places, batch)


def _goals(batch: Batch) -> list[list[str]]:
    """Return, per example, the cameras that show its goal."""
    present = {
        k.removeprefix("image_"): v
        for k, v in batch["task"]["present"].items()
        if k.startswith("image_")
    }
    return [[c for c, there in present.items() if there[i]] for i in range(len(batch["action"]))]


def _goal_step(config: DataConfig, draw: np.ndarray, t: int, length: int) -> int:
    yes = np.ones(1, bool)
    chosen = goals.choose(
        draw[None],
        np.array([t]),
        np.array([length]),
        strategy=config.goal,
        keep_language=1.0,
        keep_goal=1.0,
        keep_task_id=1.0,
        has_language=yes,
        has_goal=yes,
        has_task_id=yes,
    )
    return int(chosen.step[0])


def _load(source: DatasetSplit, number: int) -> tuple[Episode, dict[str, Any]]:
    """Return an episode in the robot's units, and all that its record says."""
    index, reader = source.index, source.reader
    raw = reader.read_record(
        int(index.shard[number]), int(index.offset[number]), int(index.length[number])
    )
    where = source.name_of(number)
    return reader.parse_episode(raw, where), reader.parse_steps(raw, where)


def _pictures(
    source: DatasetSplit, episode: Episode, camera: str, first: int, end: int
) -> np.ndarray | None:
    """Return uint8 [end − first, h, w, 3], the camera's own size and colours; None without one."""
    if camera not in episode.images:
        return None
    read = lambda x: tf.io.decode_image(x, channels=3, expand_animations=False).numpy()
    pictures = np.stack([read(x) for x in episode.images[camera][first:end]])
    return pictures[..., ::-1] if camera in source.spec.bgr else pictures


def _demonstration(source: DatasetSplit, number: int) -> RecordedEpisode:
    episode, fields = _load(source, number)
    conditionings = fields["episode"].get("episode_metadata", {})
    lacking = [k for k in ("seed", "split", "skill") if k not in conditionings]
    if lacking:
        raise DataError(
            f"{source.name_of(number)} does not say its {', '.join(lacking)} (episode_metadata "
            f"has {', '.join(sorted(conditionings)) or 'nothing'}), so no simulator can repeat it; "
            "demonstrations of scripts/collect.py can be replayed"
        )
    seen = {f"image_{c}": _pictures(source, episode, c, 0, len(episode)) for c in episode.images}
    if episode.proprio is not None:
        seen["proprio"] = episode.proprio
    return RecordedEpisode(
        skill=conditionings["skill"].decode(),
        split=conditionings["split"].decode(),
        seed=int(conditionings["seed"]),
        actions=np.asarray(fields.get("executed_action", episode.action))[: len(episode)],
        observation=seen,
    )
