"""Batches from episodes in memory, with numpy alone: for machines without tensorflow.

    frames = ArrayFrames.from_episodes(episodes)    or of files: data.array_shards
    data = ArraySource(config, frames, held_out, robot)
    loop.train(config, data)

All frames are concatenated in arrays, images already resized, and batches are gathered by index
with the windows, chunks and goals of `data.pipeline`: the same frames give the same batches as from
an RLDS dataset. Each epoch is a permutation of all frames. A batch is a pure function of the seed
and its number, so resuming is arithmetic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np

from octolike import ranges
from octolike.config import Config, ConfigError, DataConfig, build_component
from octolike.data.pipeline import goals, windows
from octolike.embodiment import EXTREME, Embodiment, Statistics, recorded_representation
from octolike.text import TOKENIZERS
from octolike.types import Batch, BatchSpec, Names, batch_share, batch_spec, unflatten

_ORDER, _DROPOUT = range(2)  # separate random streams
_STATE_KEYS = {"batches", "dataset", "frames"}


@dataclass(frozen=True, eq=False)
class ArrayFrames:
    """The N steps of E episodes, concatenated.

    Attributes:
        images: {camera: uint8 [N, h, w, 3]}.
        proprio: float32 [N, P]; action: float32 [N, A]; both in the robot's units.
        starts: int64 [E + 1], the first frame of each episode, then N.
        instructions, tasks: E each; "" if an episode has none.
    """

    images: Mapping[str, np.ndarray]
    proprio: np.ndarray
    action: np.ndarray
    starts: np.ndarray
    instructions: tuple[str, ...]
    tasks: tuple[str, ...]

    def __post_init__(self) -> None:
        total, episodes = len(self.action), len(self.instructions)
        if episodes == 0 or self.starts[0] != 0 or (np.diff(self.starts) < 1).any():
            raise ConfigError("the frames have no episode, or an episode without steps")
        lengths = {"proprio": len(self.proprio), "starts": int(self.starts[-1])}
        lengths |= {f"images of {camera}": len(x) for camera, x in self.images.items()}
        for name, length in lengths.items():
            if length != total:
                raise ConfigError(f"the frames have {total} actions, but {length} for {name}")
        if len(self.starts) != episodes + 1 or len(self.tasks) != episodes:
            raise ConfigError(
                f"the frames have {episodes} instructions, {len(self.tasks)} tasks and "
                f"{len(self.starts) - 1} episodes"
            )
        for name in ("action", "proprio"):
            bad = np.flatnonzero(~np.isfinite(getattr(self, name)).all(axis=1))
            if len(bad):
                raise ConfigError(
                    f"{name} is not finite in {len(bad)} frames, the first is frame {bad[0]}"
                )

    @property
    def nbytes(self) -> int:
        """Return the bytes in memory."""
        return sum(x.nbytes for x in (*self.images.values(), self.proprio, self.action))

    @classmethod
    def from_episodes(cls, episodes: Iterable[Mapping[str, Any]]) -> ArrayFrames:
        """Return the frames of episodes in the format of the simulators (octolike.envs)."""
        steps, metadata = [], []
        for episode in episodes:
            steps.append(episode["steps"])
            metadata.append(episode["episode_metadata"])
        if not steps:
            raise ConfigError("there are no episodes")

        def join(arrays: Iterable[np.ndarray], dtype: type) -> np.ndarray:
            return np.concatenate([np.asarray(x, dtype) for x in arrays])

        cameras = [k for k in steps[0]["observation"] if k.startswith("image_")]
        return cls(
            images={
                c.removeprefix("image_"): join([s["observation"][c] for s in steps], np.uint8)
                for c in cameras
            },
            proprio=join([s["observation"]["state"] for s in steps], np.float32),
            action=join([s["action"] for s in steps], np.float32),
            starts=np.cumsum([0] + [len(s["action"]) for s in steps], dtype=np.int64),
            instructions=tuple(str(s["language_instruction"]).strip() for s in steps),
            tasks=tuple(str(m["task"]) for m in metadata),
        )

    @classmethod
    def concatenate(cls, parts: Sequence[ArrayFrames]) -> ArrayFrames:
        """Return the frames of one part or more with the same cameras, in their order."""
        offsets = np.cumsum([0] + [len(p.action) for p in parts])
        starts = [p.starts[:-1] + offset for p, offset in zip(parts, offsets[:-1], strict=True)]
        return cls(
            images={c: np.concatenate([p.images[c] for p in parts]) for c in parts[0].images},
            proprio=np.concatenate([p.proprio for p in parts]),
            action=np.concatenate([p.action for p in parts]),
            starts=np.concatenate([*starts, offsets[-1:]]),
            instructions=tuple(x for p in parts for x in p.instructions),
            tasks=tuple(x for p in parts for x in p.tasks),
        )


class ArraySource:
    """A DataSource of frames in memory.

    Attributes:
        spec: the batch spec.
        embodiments: the record of the only robot.
        names: names of the batch's integers.
    """

    def __init__(
        self,
        config: Config,
        train: ArrayFrames | None,
        held_out: ArrayFrames | None,
        robot: Embodiment,
    ) -> None:
        """Compute the statistics and the batch spec.

        Args:
            config: the run's config; data.mix names one dataset.
            train: training frames; the statistics come from them. None is an error.
            held_out: validation frames, or None.
            robot: the record without statistics.

        Raises:
            ConfigError: a setting that only `RldsSource` supports, or frames that do not match.
        """
        d = config.data
        if train is None:
            raise ConfigError("there is no episode for training")
        _check_config(config, train, robot)
        self._config, self._frames, self._held_out = config, train, held_out
        self.embodiments: Sequence[Embodiment] = [_with_statistics(robot, train, d)]
        tasks = tuple(dict.fromkeys(_task_names(train, d)))
        self.names = Names((d.mix,), (robot.name,), tasks)
        text = build_component(TOKENIZERS, d.text, "data.text")
        self._builder = ArrayBatchBuilder(config, self.embodiments[0], tasks, text.encode)
        example = self._builder.batch(train, np.zeros(1, np.int64), dropout=None)
        self.spec: BatchSpec = batch_spec(example)

    def train(
        self, start: Mapping[str, Any] | None = None, process: tuple[int, int] = (0, 1)
    ) -> ArrayStream:
        """Return the endless training batches, from the beginning or from a `state()`.

        process: (index, count) of this host, which gets a contiguous part of each batch.
        """
        d = self._config.data
        beginning = {"batches": 0, "dataset": d.mix, "frames": len(self._frames.action)}
        state = dict(beginning if start is None else start)
        data_keys = ("dataset", "frames")
        if state.keys() != _STATE_KEYS or any(state[k] != beginning[k] for k in data_keys):
            raise ConfigError(
                f"the saved data state is {state}, the data here begin at {beginning}: resume with "
                "the same frames, or start a new run with train.init_from"
            )
        index, count = process
        if not 0 <= index < count or d.batch_size % count:
            raise ConfigError(
                f"data.batch_size {d.batch_size} cannot be divided for process {index} of {count}"
            )
        rows = slice(index * d.batch_size // count, (index + 1) * d.batch_size // count)
        seed = self._config.seed
        return ArrayStream(self._builder, self._frames, d.batch_size, rows, seed, state)

    def validation(
        self, process: tuple[int, int] = (0, 1)
    ) -> dict[str, Callable[[], Iterator[Batch]]]:
        """Return {dataset: function that iterates over the held-out batches}; {} for none.

        Every call gives the same batches, without dropout. process: (index, count) of this host,
        which gets its share of each batch (types.batch_share).
        """
        batches = partial(self._held_out_batches, process)
        return {self.names.datasets[0]: batches} if self._held_out else {}

    def describe(self) -> str:
        """Return a line of episodes, frames and memory of each split, and `ranges.describe`."""
        splits = {"train": self._frames, "held out": self._held_out}
        parts = [
            f"{len(f.instructions):,} episodes, {len(f.action):,} frames ({f.nbytes / 2**20:.0f} "
            f"MiB) {name}"
            for name, f in splits.items()
            if f
        ]
        tasks = len(self.names.tasks)
        line = f"{self.names.datasets[0]}, in memory: {'; '.join(parts)}; {tasks} tasks"
        return "\n".join([line, *ranges.describe(self.embodiments)])

    def _held_out_batches(self, process: tuple[int, int]) -> Iterator[Batch]:
        frames, size = self._held_out, self._config.data.batch_size
        assert frames is not None  # see `validation`
        order = np.random.default_rng([0, _ORDER, 0]).permutation(len(frames.action))
        for begin in range(0, self._config.train.validation_batches * size, size):
            indices = order[begin : begin + size]
            if len(indices):
                yield batch_share(self._builder.batch(frames, indices, dropout=None), process)


class ArrayStream(Iterator[Batch]):
    """Training batches from frames in memory; `state()` is the position after the last one."""

    def __init__(
        self,
        builder: ArrayBatchBuilder,
        frames: ArrayFrames,
        size: int,
        rows: slice,
        seed: int,
        state: Mapping[str, Any],
    ) -> None:
        """size: examples of a batch over all hosts; rows: the examples of this host."""
        self._builder, self._frames, self._size, self._rows = builder, frames, size, rows
        self._seed, self._state, self._open = seed, dict(state), True
        self._permutation = lru_cache(maxsize=3)(self._epoch_permutation)

    def __next__(self) -> Batch:
        if not self._open:
            raise StopIteration
        number, total = self._state["batches"], len(self._frames.action)
        positions = number * self._size + np.arange(self._size)[self._rows]
        epochs, offsets = np.divmod(positions, total)
        indices = [self._permutation(e)[i] for e, i in zip(epochs.tolist(), offsets.tolist())]
        dropout = np.random.default_rng([self._seed, _DROPOUT, number]).random((self._size, 2))
        self._state["batches"] += 1
        return self._builder.batch(
            self._frames, np.array(indices, np.int64), dropout=dropout[self._rows]
        )

    def state(self) -> dict[str, Any]:
        """Return the position after the last batch, for `ArraySource.train(start=...)`."""
        return dict(self._state)

    def state_at(self, position: Mapping[str, Any]) -> dict[str, Any]:
        """Return an earlier `state()`; feedback does not change it."""
        return dict(position)

    def feedback(self, datasets: Mapping[str, float], tasks: Mapping[str, float]) -> None:
        """Ignore held-out errors: all frames are sampled equally."""

    def memory(self) -> int:
        """Return the bytes in memory."""
        return self._frames.nbytes

    def close(self) -> None:
        """End the stream."""
        self._open = False

    def _epoch_permutation(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self._seed, _ORDER, epoch])
        return rng.permutation(len(self._frames.action))


class ArrayBatchBuilder:
    """Builds batches from frames: windows, chunks, masks, normalised numbers, token ids."""

    def __init__(
        self,
        config: Config,
        robot: Embodiment,
        tasks: Sequence[str],
        encode: Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]],
    ) -> None:
        self._data, self._robot, self._encode = config.data, robot, encode
        self._task_ids = {name: i for i, name in enumerate(tasks)}

    def batch(self, frames: ArrayFrames, indices: np.ndarray, dropout: np.ndarray | None) -> Batch:
        """Return the batch of the frames `indices`, int [B].

        dropout: float [B, 2] in [0, 1); an example keeps its instruction if the first draw, and its
        task id if the second draw, is below the probability in the config. None: no dropout.
        """
        d, size = self._data, len(indices)
        episode = np.searchsorted(frames.starts, indices, side="right") - 1
        first = frames.starts[episode]
        t, length = indices - first, frames.starts[episode + 1] - first
        steps, in_episode = windows.window_steps(t, d.window)
        chunk, valid = windows.chunk_steps(t, d.window, d.horizon, length, length)
        window_frames, chunk_frames = first[:, None] + steps, first[:, None, None] + chunk
        texts = [frames.instructions[e] for e in episode.tolist()]
        names = _task_names(frames, d)
        # A task that is not in training gets the id after the last one.
        unknown = len(self._task_ids)
        ids = [self._task_ids.get(names[e], unknown) for e in episode.tolist()]
        task_ids = np.array(ids, np.int32)
        task = self._conditioning(texts, task_ids < unknown, t, length, dropout)
        texts = [x if keep else "" for x, keep in zip(texts, task.language.tolist())]
        leaves = {
            "observation.timestep_mask": in_episode,
            "action": self._robot.encode(
                frames.action[chunk_frames], frames.proprio[window_frames]
            ),
            "action_mask": np.repeat(valid[..., None], len(self._robot.learned), axis=-1),
            "dataset": np.zeros(size, np.int32),
            "embodiment": np.zeros(size, np.int32),
            "task.task_id": task_ids,
            "task.present.task_id": task.task_id,
            "task.present.language": task.language,
        }
        if d.use_proprio:
            proprio = frames.proprio[window_frames]
            leaves["observation.proprio"] = self._robot.normalize_proprio(proprio)
            leaves["observation.present.proprio"] = np.ones((size, d.window), bool)
        for camera in d.cameras:
            leaves[f"observation.image_{camera}"] = frames.images[camera][window_frames]
            leaves[f"observation.present.image_{camera}"] = np.ones((size, d.window), bool)
        leaves["task.language.ids"], leaves["task.language.mask"] = self._encode(texts)
        return unflatten(leaves)

    def _conditioning(
        self,
        texts: Sequence[str],
        has_task_id: np.ndarray,
        t: np.ndarray,
        length: np.ndarray,
        dropout: np.ndarray | None,
    ) -> goals.TaskChoice:
        """Return how each example is conditioned: by language, by task id, never by a goal."""
        d = self._data
        draws = np.zeros((len(texts), goals.DRAWS))
        if dropout is not None:
            draws[:, [goals.LANGUAGE, goals.TASK_ID]] = dropout
        return goals.choose(
            draws,
            t,
            length,
            strategy="none",
            keep_language=1.0 if dropout is None else d.keep_language,
            keep_goal=1.0,
            keep_task_id=1.0 if dropout is None else d.keep_task_id,
            has_language=np.array([bool(x) for x in texts]),
            has_goal=np.zeros(len(texts), bool),
            has_task_id=has_task_id & d.task_ids,
        )


def _task_names(frames: ArrayFrames, config: DataConfig) -> Sequence[str]:
    """Return the task of each episode, as data.tasks defines it."""
    by_kind = {"instruction": frames.instructions, "label": frames.tasks}
    return by_kind.get(config.tasks, (config.mix,) * len(frames.tasks))


def _check_config(config: Config, frames: ArrayFrames, robot: Embodiment) -> None:
    """Raise ConfigError for unsupported settings and for frames that do not match the config."""
    d = config.data
    kind = d.sampling.get("kind", "mix")
    for name, value, supported in (
        ("data.goal", d.goal, "none"),
        ("data.paraphrases", d.paraphrases, ""),
        ("data.subtasks", d.subtasks, False),
        ("data.closings", d.closings, False),
        ("data.depth", d.depth, {}),
        ("data.episodes", d.episodes, 0),
        ("data.limits", d.limits, {}),
        ("data.sampling.kind", "mix" if kind == "proportional" else kind, "mix"),
    ):
        if value != supported:
            raise ConfigError(
                f"{name} is {value!r}: batches from arrays support only {supported!r}; use "
                "scripts/train.py, which needs tensorflow"
            )
    if not d.mix or "," in d.mix or "=" in d.mix:
        raise ConfigError(f"data.mix is {d.mix!r}; batches from arrays have one dataset")
    for camera, side in d.cameras.items():
        if camera not in frames.images:
            raise ConfigError(
                f"data.cameras has {camera!r}, the frames have {', '.join(frames.images)}"
            )
        if frames.images[camera].shape[1:] != (side, side, 3):
            raise ConfigError(
                f"data.cameras.{camera} is {side}, but its images are "
                f"{list(frames.images[camera].shape[1:])}: render them in that size"
            )
    for part in ("action", "proprio"):
        layout, width = getattr(robot, part), getattr(frames, part).shape[1]
        if layout is None or len(layout) != width:
            raise ConfigError(
                f"the frames' {part} has {width} dimensions, the robot {robot.name!r} has "
                f"{layout.names if layout else 'none'}"
            )


def _with_statistics(robot: Embodiment, frames: ArrayFrames, config: DataConfig) -> Embodiment:
    """Return the record with the statistics of frames; ConfigError for ranges that do not fit."""
    episodes = len(frames.instructions)
    try:
        plain = dataclasses.replace(
            robot,
            normalization=config.normalization,
            representation=recorded_representation(config.representation),
            proprio_representation=recorded_representation(config.proprio_representation),
        )
        learned = _learned_actions(plain, frames, config.horizon)
    except ValueError as error:  # a representation does not apply to this robot
        raise ConfigError(str(error)) from None
    record = dataclasses.replace(
        plain,
        action_statistics=_statistics(learned, episodes),
        proprio_statistics=_statistics(frames.proprio, episodes),
    )
    if config.range_check == "warn":
        return ranges.as_before(record)
    faults = ranges.record_misfits(record)
    if faults:
        raise ConfigError("; ".join(faults))
    return record


def _learned_actions(robot: Embodiment, frames: ArrayFrames, horizon: int) -> np.ndarray:
    """Return the learned form of the actions, [n, A']: of all valid steps of all chunks."""
    if robot.transform is None:
        return frames.action
    last = np.repeat(frames.starts[1:] - 1, np.diff(frames.starts))[:, None]
    steps = np.arange(len(frames.action))[:, None] + np.arange(horizon)
    chunk = frames.action[np.minimum(steps, last)]
    return np.asarray(robot.represent(chunk, frames.proprio)[steps <= last])


def _statistics(x: np.ndarray, episodes: int) -> Statistics:
    """Return the statistics of [N, dims] over all frames."""
    wide = x.astype(np.float64)
    p01, p99 = np.percentile(wide, (1, 99), axis=0)
    statistics = {
        "mean": wide.mean(axis=0),
        "std": wide.std(axis=0),
        "min": wide.min(axis=0),
        "max": wide.max(axis=0),
        "p01": p01,
        "p99": p99,
        "low": np.quantile(wide, EXTREME, axis=0, method="lower"),
        "high": np.quantile(wide, 1 - EXTREME, axis=0, method="higher"),
    }
    single = {k: v.astype(np.float32) for k, v in statistics.items()}
    return Statistics(**single, steps=len(x), episodes=episodes)
