"""The public door of the data: config to batches.

    data = open_data(config)
    for batch in data.train():      # numpy, per the contract in octolike.types
        ...

What a batch goes through:

1. each example's dataset is drawn by the mix's shares (sampling.choose_datasets);
2. its frame is the next one in that dataset's order (sampling.Order);
3. window, chunk and goal are cut as indices (frames, goals); numbers are normalised and padded;
4. encoded images are gathered, decoded and resized in tf.data (images);
5. instructions become token ids.

A batch is a pure function of the config and of `state()`, a few numbers: how many batches there
have been and how many frames of each dataset they took. Resuming is arithmetic.
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import tensorflow as tf

from octolike.config import Config, ConfigError, DataConfig, build_component, unknown
from octolike.data import frames, goals, images, mixes, sampling, statistics
from octolike.data.datasets import DatasetSpec, find
from octolike.data.episodes import DataError, Episode, Reader, brief
from octolike.data.statistics import Index
from octolike.normalize import Embodiment
from octolike.text import TOKENIZERS
from octolike.types import Batch, BatchSpec, Names, batch_spec, unflatten


@dataclass(frozen=True, eq=False)
class Source:
    """One split of one dataset, ready to be sampled; `cameras` are those that are read."""

    number: int
    spec: DatasetSpec
    reader: Reader
    index: Index
    embodiment: Embodiment
    cameras: tuple[str, ...]

    def load(self, episode: int) -> Episode:
        """Read one episode, its numbers normalised."""
        i = self.index
        where = int(i.shard[episode]), int(i.offset[episode]), int(i.length[episode])
        loaded = self.reader.read(*where, self.cameras)
        loaded.action = self.embodiment.normalize_action(loaded.action)
        if loaded.proprio is not None:
            loaded.proprio = self.embodiment.normalize_proprio(loaded.proprio)
        return loaded

    def name_of(self, episode: int) -> str:
        """Return where an episode is, for messages."""
        i = self.index
        return f"{self.reader.files[i.shard[episode]]}, byte {i.offset[episode]}"


class Data:
    """The opened datasets of a config.

    Attributes:
        spec: of every batch.
        datasets: names, in the order of batch["dataset"].
        embodiments: records, in the order of batch["embodiment"].
        names: what the integers of a batch count.
        shares: of examples per dataset, float64 [datasets].
    """

    def __init__(self, config: Config) -> None:
        """Open everything that config.data names; statistics are made where they are missing."""
        d = self._config = config.data
        self._seed, self._validation_batches = config.seed, config.train.validation_batches
        self._threads = d.threads or os.cpu_count() or 1
        mix = mixes.parse(d.mix, d.mix_weights)
        self.datasets = list(mix.weights)
        self._sources = [self._open(i, name) for i, name in enumerate(self.datasets)]
        self._check_cameras()
        self.embodiments = [s.embodiment for s in self._sources]
        robots = tuple(e.name for e in self.embodiments)
        self.names = Names(tuple(self.datasets), robots)
        self.shares = mix.shares({s.spec.name: int(s.index.steps.sum()) for s in self._sources})
        self._text = build_component(TOKENIZERS, d.text, "data.text")
        self._executor = ThreadPoolExecutor(self._threads)
        self._maker = Maker(self._config, self.embodiments)
        # Validation streams between two uses: every new one costs a trace, and memory that
        # tensorflow does not give back.
        self._idle: dict[str, list[Batches]] = {}
        self.spec = self._spec()

    def train(self, start: Mapping[str, Any] | None = None) -> Batches:
        """Return the endless training batches, from the beginning or from a `state()`."""
        size = self._config.batch_size
        return Batches(self, self._sources, self.shares, self._seed, size, start)

    def validation(self) -> dict[str, Callable[[], Iterator[Batch]]]:
        """Return per dataset a function that iterates over its validation batches.

        The same batches at every call, with every instruction and goal kept. A dataset without the
        split data.validation_split raises DataError; '' means no validation.
        """
        return {s.spec.name: lambda s=s: self._finite(s) for s in self._held_out}

    def describe(self) -> str:
        """Return a table of the datasets: episodes, steps, share, left-out episodes and why."""
        rows = [("dataset", "episodes", "steps", "share", "bad", "robot")]
        sources = self._sources + self._held_out
        shares = [f"{share:.1%}" for share in self.shares] + ["held out"] * len(self._held_out)
        for source, share in zip(sources, shares, strict=True):
            i, name = source.index, f"{source.spec.name}/{source.reader.split}"
            numbers = f"{len(i.steps):,}", f"{i.steps.sum():,}", share, str(len(i.bad))
            rows.append((name, *numbers, source.spec.robot))
        wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(x.ljust(w) for x, w in zip(r, wide, strict=True)).rstrip() for r in rows]
        for bad in (s.index.bad for s in sources):
            lines += [f"left out: {reason}" for reason in bad[:5]]
            lines += [f"left out: {len(bad) - 5} more"] if len(bad) > 5 else []
        return "\n".join(lines)

    @cached_property
    def _held_out(self) -> list[Source]:
        """Return the validation splits, opened when they are first asked for."""
        result = []
        for source in self._sources if self._config.validation_split else ():
            reader = Reader(source.spec, self._config.root, self._config.validation_split)
            result.append(replace(source, reader=reader, index=self._index(reader)))
        return result

    def _finite(self, source: Source) -> Iterator[Batch]:
        size = min(self._config.batch_size, int(source.index.steps.sum()))
        idle = self._idle.setdefault(source.spec.name, [])
        if idle:
            stream = idle.pop()
            stream.restart()
        else:
            stream = Batches(self, [source], np.ones(1), 0, size, None, dropout=False)
        try:
            for _ in range(self._validation_batches):
                yield next(stream)
        finally:  # also when the caller takes no more
            stream.close()
            idle.append(stream)

    def _spec(self) -> BatchSpec:
        """Return the spec of every batch, from one episode."""
        source = self._sources[0]
        leaves = self._maker.example(source, source.load(0), 0, np.random.default_rng(0), False)
        ids, mask = self._text.encode([leaves.pop("text").decode()])
        spec = {"task.language.ids": ids[0], "task.language.mask": mask[0]}
        for path, leaf in leaves.items():
            side = self._maker.side(path)
            spec[path] = np.zeros((*np.shape(leaf), side, side, 3), np.uint8) if side else leaf
        return batch_spec(unflatten({k: np.asarray(v)[None] for k, v in spec.items()}))

    def _open(self, number: int, name: str) -> Source:
        spec = find(name)
        reader = Reader(spec, self._config.root, self._config.train_split)
        index = self._index(reader)
        embodiment = Embodiment(
            name=name,
            robot=spec.robot,
            control_hz=spec.control_hz,
            gripper=spec.gripper,
            action=spec.action,
            proprio=spec.proprio,
            normalization=self._config.normalization,
            datasets=(name,),
            action_statistics=index.action,
            proprio_statistics=index.proprio,
        )
        index = index.first(self._config.episodes)
        return Source(number, spec, reader, index, embodiment, tuple(self._config.cameras))

    def _index(self, reader: Reader) -> Index:
        d = self._config
        drop = d.bad_episodes == "drop"
        return statistics.index(reader, threads=self._threads, cache=d.cache, drop_bad=drop)

    def _check_cameras(self) -> None:
        there = {c for s in self._sources for c in s.spec.cameras}
        for camera in self._config.cameras:
            if camera not in there:
                raise ConfigError(unknown("camera of this mix in data.cameras", camera, there))


class Batches(Iterator[Batch]):
    """Numpy batches, made ahead in background threads; `state()` follows the last one returned."""

    def __init__(
        self,
        data: Data,
        sources: list[Source],
        shares: np.ndarray,
        seed: int,
        size: int,
        start: Mapping[str, Any] | None,
        dropout: bool = True,
    ) -> None:
        self._data, self._sources, self._size = data, sources, size
        self._start = self._initial(start)
        self._make_plan = partial(Plan, data, sources, shares, seed, size, dropout)
        self._pipeline = self._make_pipeline()
        self._running: list[Iterator[dict[str, tf.Tensor]]] = []
        # Also at exit: tensorflow's threads complain when the interpreter ends before they do.
        weakref.finalize(self, self._running.clear)
        self.restart()

    def restart(self) -> None:
        """Go back to where this stream began."""
        self._state = {"batches": self._start["batches"], "frames": dict(self._start["frames"])}
        self._plan = self._make_plan()
        self._running[:] = [iter(self._pipeline)]

    def state(self) -> dict[str, Any]:
        """Return what `Data.train(start=...)` needs to go on after the last returned batch."""
        return {"batches": self._state["batches"], "frames": dict(self._state["frames"])}

    def __next__(self) -> Batch:
        try:
            element = next(itertools.chain(*self._running))
        except StopIteration:
            if self._plan.fault is None:
                raise
            raise self._plan.fault from None
        except tf.errors.OpError as error:
            raise DataError(self._plan.blame(*self._position(self._state), error)) from None
        leaves = {k: v.numpy() for k, v in element.items()}
        taken = leaves.pop("taken")
        self._state["batches"] += 1
        for source, count in zip(self._sources, taken.tolist(), strict=True):
            self._state["frames"][source.spec.name] += count
        texts = [t.decode() for t in leaves.pop("text")]
        leaves["task.language.ids"], leaves["task.language.mask"] = self._data._text.encode(texts)
        return unflatten(leaves)

    def close(self) -> None:
        """Stop making batches ahead."""
        self._plan.close()
        self._running.clear()

    def _initial(self, start: Mapping[str, Any] | None) -> dict[str, Any]:
        names = [s.spec.name for s in self._sources]
        if start is None:
            return {"batches": 0, "frames": dict.fromkeys(names, 0)}
        if sorted(start["frames"]) != sorted(names):
            raise DataError(
                f"the saved data state is of {sorted(start['frames'])}, this mix is of "
                f"{sorted(names)}; start a new run, or restore data.mix"
            )
        return {"batches": start["batches"], "frames": dict(start["frames"])}

    def _position(self, state: Mapping[str, Any]) -> tuple[int, list[int]]:
        """Return (number of the next batch, frames of each source in the batches before it)."""
        return state["batches"], [state["frames"][s.spec.name] for s in self._sources]

    def _make_pipeline(self) -> tf.data.Dataset:
        threads, maker = self._data._threads, self._data._maker

        def decode(element: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            result = dict(element)
            for path, leaf in element.items():
                if side := maker.side(path):
                    pixels = images.decode(tf.reshape(leaf, [-1]), side)
                    result[path] = tf.reshape(pixels, (*leaf.shape, side, side, 3))
            return result

        # tensorflow keeps every generator function for good: this one must not keep the episodes.
        this = weakref.ref(self)
        made = tf.data.Dataset.from_generator(
            lambda: this()._plan.run(*this()._position(this()._start)),
            output_signature=self._signature(),
        )
        made = made.map(decode, num_parallel_calls=threads, deterministic=True)
        options = tf.data.Options()
        options.threading.private_threadpool_size = threads
        return made.prefetch(self._data._config.prefetch).with_options(options)

    def _signature(self) -> dict[str, tf.TensorSpec]:
        signature = {
            path: tf.TensorSpec((self._size, *shape), dtype)
            for path, (shape, dtype) in self._data.spec.items()
            if not path.startswith("task.language.")
        }
        for path, spec in signature.items():
            if self._data._maker.side(path):
                signature[path] = tf.TensorSpec(spec.shape[:-3], tf.string)
        signature["text"] = tf.TensorSpec((self._size,), tf.string)
        signature["taken"] = tf.TensorSpec((len(self._sources),), tf.int64)
        return signature


class Plan:
    """Who is in each batch, and the batches with encoded images; `fault`: why they ended."""

    def __init__(
        self,
        data: Data,
        sources: list[Source],
        shares: np.ndarray,
        seed: int,
        size: int,
        dropout: bool,
    ) -> None:
        self.fault: Exception | None = None
        self._maker, self._sources, self._shares = data._maker, sources, shares
        self._seed, self._size, self._dropout = seed, size, dropout
        self._open = True
        self._pools = []
        for s in sources:
            steps, pool = s.index.steps, data._config.pool
            order = sampling.Order(steps, seed=seed, dataset=s.number, pool=pool)
            self._pools.append(sampling.Pool(order, s.load, data._executor))

    def run(self, number: int, taken: list[int]) -> Iterator[dict[str, np.ndarray]]:
        """Yield batches from `number` on; taken: frames of each source in the batches before.

        A fault ends the stream and is kept: raised in here, it would become one of tensorflow's.
        """
        try:
            while self._open:
                members, examples = self._members(number, taken), []
                rng = sampling.task_rng(self._seed, number)
                for d, pool, episode, step in members:
                    source, loaded = self._sources[d], self._pools[d].get(pool, episode)
                    examples.append(self._maker.example(source, loaded, step, rng, self._dropout))
                counts = np.bincount([m[0] for m in members], minlength=len(taken))
                batch = {k: _stack([e[k] for e in examples]) for k in examples[0]}
                yield batch | {"taken": counts.astype(np.int64)}
                number, taken = number + 1, (counts + taken).tolist()
        except Exception as error:
            self.fault = error if self._open else None  # closing cancels what is being loaded
        finally:
            self.close()

    def blame(self, number: int, taken: list[int], error: tf.errors.OpError) -> str:
        """Return the sentence on a batch whose images could not be decoded: which one, and why."""
        for d, _, episode, _ in self._members(number, taken):
            source = self._sources[d]
            for camera, shots in source.load(episode).images.items():
                for t, shot in enumerate(shots):
                    try:
                        images.check(shot)
                    except tf.errors.OpError as fault:
                        return (
                            f"{source.spec.name}: {source.name_of(episode)}: {camera} image of "
                            f"step {t} cannot be decoded: {brief(fault)}"
                        )
        return f"batch {number} could not be made: {brief(error)}"

    def close(self) -> None:
        """End the stream and forget the episodes."""
        self._open = False
        for pool in self._pools:
            pool.close()

    def _members(
        self, number: int, taken: list[int]
    ) -> list[tuple[int, tuple[int, int], int, int]]:
        """Return (source, pool, episode, step) of each example of a batch."""
        position, members = list(taken), []
        for d in sampling.choose_datasets(self._seed, number, self._shares, self._size).tolist():
            members.append((d, *self._pools[d].order.at(position[d])))
            position[d] += 1
        return members


class Maker:
    """Makes one example of a batch: everything but decoding and token ids."""

    def __init__(self, config: DataConfig, embodiments: list[Embodiment]) -> None:
        self._config = config
        self._action_dim = max(len(e.action) for e in embodiments)
        self._proprio_dim = max((len(e.proprio) for e in embodiments if e.proprio), default=0)

    def side(self, path: str) -> int:
        """Return the side in pixels of the images at a batch path; 0 where there are none."""
        place, _, key = path.rpartition(".")
        if place not in ("observation", "task"):
            return 0
        return self._config.cameras.get(key.removeprefix("image_"), 0)

    def example(
        self, source: Source, episode: Episode, t: int, rng: np.random.Generator, dropout: bool
    ) -> dict[str, Any]:
        """Return the leaves of frame t of an episode, by dotted path; images are encoded bytes."""
        d, length = self._config, len(episode)
        text = episode.instructions[t].strip()
        seen = any(c in episode.images for c in d.cameras)
        task = goals.choose(
            rng,
            t,
            length,
            strategy=d.goal if seen else "none",  # a goal that no camera shows is none
            keep_language=d.keep_language if dropout else 1.0,
            keep_goal=d.keep_goal if dropout else 1.0,
            has_language=bool(text),
        )
        end = length if task.goal is None else task.goal
        steps, in_episode = frames.window_steps(t, d.window)
        chunk, valid = frames.chunk_steps(t, d.window, d.horizon, length, end)
        dims = np.arange(self._action_dim) < episode.action.shape[-1]
        leaves = {
            "observation.timestep_mask": in_episode,
            "action": frames.pad_last(episode.action[chunk], self._action_dim),
            "action_mask": valid[..., None] & dims,
            "dataset": np.int32(source.number),
            "embodiment": np.int32(source.number),
            "text": (text if task.language else "").encode(),
            "task.present.language": np.bool_(task.language),
            "task.task_id": np.int32(0),
            "task.present.task_id": np.bool_(False),
        }
        for camera in d.cameras:
            shots, key = episode.images.get(camera), f"image_{camera}"
            there = shots is not None
            leaves[f"observation.{key}"] = [shots[s] if there else b"" for s in steps]
            leaves[f"observation.present.{key}"] = np.full(d.window, there)
            if d.goal != "none":
                told = there and task.goal is not None
                leaves[f"task.{key}"] = shots[task.goal] if told else b""
                leaves[f"task.present.{key}"] = np.bool_(told)
        if d.use_proprio and self._proprio_dim:
            there = episode.proprio is not None
            own = episode.proprio[steps] if there else np.zeros((d.window, 0), np.float32)
            leaves["observation.proprio"] = frames.pad_last(own, self._proprio_dim)
            leaves["observation.present.proprio"] = np.full(d.window, there)
        return leaves


def open_data(config: Config) -> Data:
    """Open the datasets of config.data; see `Data`.

    Raises ConfigError or DataError for an unknown dataset or camera, a wrong directory, a missing
    or truncated file, a bad episode.
    """
    return Data(config)


def _stack(values: list[Any]) -> np.ndarray:
    if isinstance(values[0], (bytes, list)):
        return np.array(values, dtype=object)
    return np.stack(values)
