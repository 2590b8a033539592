"""Batches from arrays in memory, with numpy alone: for machines without tensorflow.

    frames = ArrayFrames.of(episodes)    from a simulator's experts, or ArrayFrames.load(path)
    data = ArraySource(config, frames, held_out, robot)
    loop.train(config, data.train, spec=data.spec, …, validation=data.validation())

The frames of all episodes lie one after the other, images as they are shown, and a batch is cut out
of them by index. It keeps the contract of `octolike.types`, and its arrays are those that the
datasets' pipeline makes of the same frames. Examples come from a permutation of all frames per
epoch: a pure function of the seed and the number of the batch, so resuming is arithmetic.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from octolike import files
from octolike.config import Config, ConfigError, build_component
from octolike.embodiment import Embodiment, Statistics
from octolike.text import TOKENIZERS
from octolike.types import Batch, BatchSpec, Names, batch_spec, unflatten

_ORDER, _TASKS = range(2)  # streams of random numbers, so that no two purposes share draws
_STATE = {"batches", "dataset", "frames"}


@dataclass(frozen=True, eq=False)
class ArrayFrames:
    """The steps of episodes, one after the other.

    Attributes:
        images: {camera: uint8 [N, h, w, 3]}.
        proprio: float32 [N, P]; action: float32 [N, A]; both in the robot's units.
        starts: int64 [E + 1], the first frame of each episode, and N.
        instructions, tasks: of each of the E episodes; "" where there is none.
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
            raise ConfigError("the frames hold no episode, or one without a step")
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
                raise ConfigError(f"{name} of frame {bad[0]} is not finite, and of {len(bad)} so")

    @property
    def nbytes(self) -> int:
        """The bytes held."""
        return sum(x.nbytes for x in (*self.images.values(), self.proprio, self.action))

    @classmethod
    def of(cls, episodes: Iterable[Mapping[str, Any]]) -> ArrayFrames:
        """Return the frames of episodes as simulators record them (octolike.envs)."""
        steps, about = [], []
        for episode in episodes:
            steps.append(episode["steps"])
            about.append(episode["episode_metadata"])
        if not steps:
            raise ConfigError("there are no episodes to make frames of")
        join = lambda arrays, kind: np.concatenate([np.asarray(a, kind) for a in arrays])
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
            tasks=tuple(str(a["task"]) for a in about),
        )

    def save(self, path: str | Path, settings: Mapping[str, Any] | None = None) -> None:
        """Write everything to an .npz file, whole or not at all.

        settings: what the episodes were made with, as plain data; `load` checks it.
        """
        arrays = {f"image_{camera}": x for camera, x in self.images.items()}
        arrays |= {n: getattr(self, n) for n in ("proprio", "action", "starts")}
        arrays |= {n: np.array(getattr(self, n), np.str_) for n in ("instructions", "tasks")}
        arrays["settings"] = np.array(_plain(settings), np.str_)
        files.write_npz(path, arrays)

    @classmethod
    def load(cls, path: str | Path, settings: Mapping[str, Any] | None = None) -> ArrayFrames:
        """Return what `save` wrote.

        Raises ConfigError for a file that is missing or something else, and for episodes made with
        other settings, where some are given.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            made = str(arrays.pop("settings", ""))
            images = {k.removeprefix("image_"): arrays.pop(k) for k in [*arrays] if "image_" in k}
            texts = {n: tuple(arrays.pop(n).tolist()) for n in ("instructions", "tasks")}
            found = cls(images=images, **arrays, **texts)
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise ConfigError(
                f"{path} holds no frames (ArrayFrames.save writes them): {error}"
            ) from None
        if settings is not None and made != _plain(settings):
            raise ConfigError(
                f"the demonstrations of {path} were made with {made or 'settings unknown'}, and "
                f"now it is {_plain(settings)}; remove the file, or use another data.root"
            )
        return found


class ArraySource:
    """What a run trains on: the counterpart of the datasets' pipeline.

    Attributes:
        spec: of every batch; embodiments: the one robot; names: what a batch's integers count.
    """

    def __init__(
        self, config: Config, train: ArrayFrames, held_out: ArrayFrames | None, robot: Embodiment
    ) -> None:
        """Prepare.

        Args:
            config: window, horizon, cameras, text, and so on; its mix names one dataset.
            train: the frames to train on, of which the statistics are.
            held_out: those to validate on; None for none.
            robot: the record, whose statistics are filled in here.

        Raises:
            ConfigError: a setting that needs the datasets' pipeline, or frames that do not fit.
        """
        d = config.data
        _check(config, train, robot)
        self._config, self._frames, self._held_out = config, train, held_out
        self.embodiments = [_with_statistics(robot, train, d.normalization)]
        kind = {"instruction": train.instructions, "label": train.tasks}
        per_episode = kind.get(d.tasks, (d.mix,) * len(train.tasks))
        tasks = tuple(dict.fromkeys(per_episode))
        self.names = Names((d.mix,), (robot.name,), tasks)
        text = build_component(TOKENIZERS, d.text, "data.text")
        self._cut = ArrayBatchBuilder(config, self.embodiments[0], tasks, text.encode)
        one = self._cut(train, np.zeros(1, np.int64), np.zeros((1, 2)))
        self.spec: BatchSpec = batch_spec(one)

    def train(
        self, start: Mapping[str, Any] | None = None, process: tuple[int, int] = (0, 1)
    ) -> ArrayStream:
        """Return the endless training batches, from the beginning or from a `state()`.

        process: (index, count) of this host: it gets its contiguous share of each batch.
        """
        d = self._config.data
        here = {"batches": 0, "dataset": d.mix, "frames": len(self._frames.action)}
        state = dict(here if start is None else start)
        if state.keys() != _STATE or any(state[k] != here[k] for k in ("dataset", "frames")):
            raise ConfigError(
                f"the saved data state is {state}, but the data here are {here}: resume with the "
                "same frames, or start a new run with train.init_from"
            )
        index, count = process
        if not 0 <= index < count or d.batch_size % count:
            raise ConfigError(
                f"data.batch_size {d.batch_size} cannot be cut for process {index} of {count}"
            )
        part = slice(index * d.batch_size // count, (index + 1) * d.batch_size // count)
        return ArrayStream(self._cut, self._frames, d.batch_size, part, self._config.seed, state)

    def validation(self) -> dict[str, Callable[[], Iterator[Batch]]]:
        """Return {dataset: what iterates over the same held-out batches at every call}."""
        return {self.names.datasets[0]: self._finite} if self._held_out else {}

    def describe(self) -> str:
        """Return a line about the frames."""
        sets = {"train": self._frames, "held out": self._held_out}
        parts = [
            f"{len(f.instructions):,} episodes, {len(f.action):,} frames ({f.nbytes / 2**20:.0f} "
            f"MiB) {name}"
            for name, f in sets.items()
            if f
        ]
        tasks = len(self.names.tasks)
        return f"{self.names.datasets[0]}, in memory: {'; '.join(parts)}; {tasks} tasks"

    def _finite(self) -> Iterator[Batch]:
        frames, size = self._held_out, self._config.data.batch_size
        order = np.random.default_rng([0, _ORDER, 0]).permutation(len(frames.action))
        for begin in range(0, self._config.train.validation_batches * size, size):
            chosen = order[begin : begin + size]
            if len(chosen):
                # every instruction is kept: such a draw is below any probability
                yield self._cut(frames, chosen, np.full((len(chosen), 2), -1.0))


class ArrayStream(Iterator[Batch]):
    """Numpy batches cut from frames; `state()` follows the last one returned."""

    def __init__(
        self,
        cut: ArrayBatchBuilder,
        frames: ArrayFrames,
        size: int,
        part: slice,
        seed: int,
        state: Mapping[str, Any],
    ) -> None:
        self._cut, self._frames, self._size, self._part = cut, frames, size, part
        self._seed, self._state, self._open = seed, dict(state), True
        self._permutation = lru_cache(maxsize=3)(self._permuted)

    def __next__(self) -> Batch:
        if not self._open:
            raise StopIteration
        number, total = self._state["batches"], len(self._frames.action)
        places = number * self._size + np.arange(self._size)[self._part]
        epochs, within = np.divmod(places, total)
        chosen = [self._permutation(e)[i] for e, i in zip(epochs.tolist(), within.tolist())]
        draws = np.random.default_rng([self._seed, _TASKS, number]).random((self._size, 2))
        self._state["batches"] += 1
        return self._cut(self._frames, np.array(chosen, np.int64), draws[self._part])

    def state(self) -> dict[str, Any]:
        """Return what `ArraySource.train(start=...)` needs to go on after the last batch."""
        return dict(self._state)

    def state_at(self, position: dict[str, Any]) -> dict[str, Any]:
        """Return an earlier `state()`: feedback changes nothing here."""
        return dict(position)

    def feedback(self, datasets: Mapping[str, float], tasks: Mapping[str, float]) -> None:
        """Take in held-out errors: every frame is drawn equally often, whatever they are."""

    def memory(self) -> int:
        """Return the bytes held."""
        return self._frames.nbytes

    def close(self) -> None:
        """Make no more batches."""
        self._open = False

    def _permuted(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self._seed, _ORDER, epoch])
        return rng.permutation(len(self._frames.action))


class ArrayBatchBuilder:
    """Cuts a batch out of frames: windows, chunks, masks, normalised numbers, token ids."""

    def __init__(
        self,
        config: Config,
        robot: Embodiment,
        tasks: Sequence[str],
        encode: Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]],
    ) -> None:
        self._data, self._robot, self._encode = config.data, robot, encode
        self._numbers = {name: i for i, name in enumerate(tasks)}

    def __call__(self, frames: ArrayFrames, chosen: np.ndarray, draws: np.ndarray) -> Batch:
        """Return the batch of frames `chosen`, int [B].

        draws: float [B, 2]; an example keeps its instruction, and its task id, where the draw is
        below the probability that the config gives.
        """
        d, size = self._data, len(chosen)
        episode = np.searchsorted(frames.starts, chosen, side="right") - 1
        first, last = frames.starts[episode], frames.starts[episode + 1] - 1
        slots = chosen[:, None] - (d.window - 1) + np.arange(d.window)  # [B, W]
        real = slots >= first[:, None]
        chunk = slots[..., None] + np.arange(d.horizon)  # [B, W, H]
        valid = real[..., None] & (chunk <= last[:, None, None])
        chunk = np.clip(chunk, first[:, None, None], last[:, None, None])
        shown = np.maximum(slots, first[:, None])
        texts = [frames.instructions[e] for e in episode.tolist()]
        numbers = self._task_ids(frames, episode)
        told, numbered = self._tell(texts, numbers < len(self._numbers), draws)
        leaves = {
            "observation.timestep_mask": real,
            "action": self._robot.normalize_action(frames.action[chunk]),
            "action_mask": np.repeat(valid[..., None], frames.action.shape[1], axis=-1),
            "dataset": np.zeros(size, np.int32),
            "embodiment": np.zeros(size, np.int32),
            "task.task_id": numbers,
            "task.present.task_id": numbered,
            "task.present.language": told,
        }
        if d.use_proprio:
            leaves["observation.proprio"] = self._robot.normalize_proprio(frames.proprio[shown])
            leaves["observation.present.proprio"] = np.ones((size, d.window), bool)
        for camera in d.cameras:
            leaves[f"observation.image_{camera}"] = frames.images[camera][shown]
            leaves[f"observation.present.image_{camera}"] = np.ones((size, d.window), bool)
        texts = [x if kept else "" for x, kept in zip(texts, told.tolist())]
        leaves["task.language.ids"], leaves["task.language.mask"] = self._encode(texts)
        return unflatten(leaves)

    def _tell(
        self, texts: Sequence[str], known: np.ndarray, draws: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return who is told the instruction, and who the task's number: bool [B] twice.

        Where neither would be kept, the instruction is, or without one the number.
        """
        d, has = self._data, np.array([bool(x) for x in texts])
        known = known & d.task_ids
        told = has & (draws[:, 0] < d.keep_language)
        numbered = known & (draws[:, 1] < d.keep_task_id)
        none = ~(told | numbered)
        return told | (none & has), numbered | (none & ~has & known)

    def _task_ids(self, frames: ArrayFrames, episode: np.ndarray) -> np.ndarray:
        """Return the number of each episode's task; one that training lacks is after the last."""
        kind = {"instruction": frames.instructions, "label": frames.tasks}
        names = kind.get(self._data.tasks, (self._data.mix,) * len(frames.tasks))
        known = [self._numbers.get(names[e], len(self._numbers)) for e in episode.tolist()]
        return np.array(known, np.int32)


def _plain(settings: Mapping[str, Any] | None) -> str:
    return json.dumps(settings, sort_keys=True) if settings else ""


def _check(config: Config, frames: ArrayFrames, robot: Embodiment) -> None:
    """Raise ConfigError for settings that arrays do not serve, or frames that do not fit them."""
    d = config.data
    kind = d.sampling.get("kind", "mix")
    for name, found, expected in (
        ("data.goal", d.goal, "none"),
        ("data.paraphrases", d.paraphrases, ""),
        ("data.depth", d.depth, {}),
        ("data.service", d.service, ()),
        ("data.episodes", d.episodes, 0),
        ("data.limits", d.limits, {}),
        ("data.sampling.kind", "mix" if kind == "proportional" else kind, "mix"),
    ):
        if found != expected:
            raise ConfigError(
                f"{name} is {found!r}: batches from arrays know {expected!r} alone; for the rest "
                "use scripts/train.py, which needs tensorflow"
            )
    if not d.mix or "," in d.mix or "=" in d.mix:
        raise ConfigError(f"data.mix is {d.mix!r}; batches from arrays are of one dataset")
    for camera, side in d.cameras.items():
        if camera not in frames.images:
            raise ConfigError(f"data.cameras asks for {camera!r}; there are {list(frames.images)}")
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


def _with_statistics(robot: Embodiment, frames: ArrayFrames, normalization: str) -> Embodiment:
    return dataclasses.replace(
        robot,
        normalization=normalization,
        action_statistics=_statistics(frames.action, len(frames.instructions)),
        proprio_statistics=_statistics(frames.proprio, len(frames.instructions)),
    )


def _statistics(x: np.ndarray, episodes: int) -> Statistics:
    """Return the statistics of [N, dims] over all frames."""
    wide = x.astype(np.float64)
    p01, p99 = np.percentile(wide, (1, 99), axis=0)
    found = {
        "mean": wide.mean(axis=0),
        "std": wide.std(axis=0),
        "min": wide.min(axis=0),
        "max": wide.max(axis=0),
        "p01": p01,
        "p99": p99,
    }
    single = {k: v.astype(np.float32) for k, v in found.items()}
    return Statistics(**single, steps=len(x), episodes=episodes)
