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

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tensorflow as tf

from octolike.config import Config, ConfigError, DataConfig, build_component
from octolike.data import frames, goals, images, mixes, sampling, statistics
from octolike.data.datasets import DatasetSpec, find
from octolike.data.episodes import DataError, Episode, Reader
from octolike.data.statistics import Index
from octolike.normalize import Embodiment
from octolike.text import TOKENIZERS
from octolike.types import Batch, BatchSpec, batch_spec, unflatten


@dataclass(frozen=True, eq=False)
class Source:
    """One split of one dataset, ready to be sampled."""

    number: int
    spec: DatasetSpec
    reader: Reader
    index: Index
    embodiment: Embodiment

    def load(self, episode: int) -> Episode:
        """Read one episode, its numbers normalised."""
        i = self.index
        where = int(i.shard[episode]), int(i.offset[episode]), int(i.length[episode])
        loaded = self.reader.read(*where)
        loaded.action = self.embodiment.normalize_action(loaded.action)
        if loaded.proprio is not None:
            loaded.proprio = self.embodiment.normalize_proprio(loaded.proprio)
        return loaded


class Data:
    """The opened datasets of a config.

    Attributes:
        spec: of every batch.
        datasets: names, in the order of batch["dataset"].
        embodiments: records, in the order of batch["embodiment"].
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
        self.shares = mix.shares({s.spec.name: int(s.index.steps.sum()) for s in self._sources})
        self._text = build_component(TOKENIZERS, d.text, "data.text")
        self._executor = ThreadPoolExecutor(self._threads)
        self._maker = Maker(self._config, self.embodiments)
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
        result = {}
        for source in self._sources if self._config.validation_split else ():
            reader = Reader(source.spec, self._config.root, self._config.validation_split)
            held_out = replace(source, reader=reader, index=self._index(reader))
            result[source.spec.name] = lambda s=held_out: self._finite(s)
        return result

    def describe(self) -> str:
        """Return a table of the datasets: episodes, steps, share, left-out episodes."""
        rows = [("dataset", "episodes", "steps", "share", "bad", "robot")]
        for source, share in zip(self._sources, self.shares, strict=True):
            i = source.index
            numbers = f"{len(i.steps):,}", f"{i.steps.sum():,}", f"{share:.1%}", str(len(i.bad))
            rows.append((source.spec.name, *numbers, source.spec.robot))
        wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(x.ljust(w) for x, w in zip(r, wide, strict=True)).rstrip() for r in rows]
        lines += [f"left out: {b}" for s in self._sources for b in s.index.bad[:5]]
        return "\n".join(lines)

    def _finite(self, source: Source) -> Iterator[Batch]:
        size = min(self._config.batch_size, int(source.index.steps.sum()))
        stream = Batches(self, [source], np.ones(1), 0, size, None, dropout=False)
        for _ in range(self._validation_batches):
            yield next(stream)
        stream.close()

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
        return Source(number, spec, reader, index.first(self._config.episodes), embodiment)

    def _index(self, reader: Reader) -> Index:
        d = self._config
        drop = d.bad_episodes == "drop"
        return statistics.index(reader, threads=self._threads, cache=d.cache, drop_bad=drop)

    def _check_cameras(self) -> None:
        there = {c for s in self._sources for c in s.spec.cameras}
        for camera in self._config.cameras:
            if camera not in there:
                raise ConfigError(
                    f"data.cameras names {camera!r}, which no dataset of the mix has "
                    f"(cameras: {', '.join(sorted(there))})"
                )


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
        self._data, self._sources, self._shares = data, sources, shares
        self._seed, self._size, self._dropout = seed, size, dropout
        self._fault: Exception | None = None
        self._closed = False
        self._state = self._initial(start)
        self._stream = iter(self._pipeline())

    def state(self) -> dict[str, Any]:
        """Return what `Data.train(start=...)` needs to go on after the last returned batch."""
        return {"batches": self._state["batches"], "frames": dict(self._state["frames"])}

    def __next__(self) -> Batch:
        try:
            element = next(self._stream)
        except (tf.errors.OpError, StopIteration) as error:
            raise (self._fault or error) from None
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
        self._closed = True
        self._stream = iter(())

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

    def _pipeline(self) -> tf.data.Dataset:
        threads, maker = self._data._threads, self._data._maker

        def decode(element: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            result = dict(element)
            for path, leaf in element.items():
                if side := maker.side(path):
                    pixels = images.decode(tf.reshape(leaf, [-1]), side)
                    result[path] = tf.reshape(pixels, (*leaf.shape, side, side, 3))
            return result

        made = tf.data.Dataset.from_generator(self._elements, output_signature=self._signature())
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

    def _elements(self) -> Iterator[dict[str, np.ndarray]]:
        """Yield batches with encoded images, in order; a fault is kept to be raised as it is."""
        maker = self._data._maker
        pools = [self._pool(s) for s in self._sources]
        position = [self._state["frames"][s.spec.name] for s in self._sources]
        number = self._state["batches"]
        try:
            while not self._closed:
                chosen = sampling.choose_datasets(self._seed, number, self._shares, self._size)
                rng = sampling.task_rng(self._seed, number)
                examples = []
                for d in chosen:
                    pool, episode, step = pools[d].order.at(position[d])
                    loaded = pools[d].get(pool, episode)
                    source = self._sources[d]
                    examples.append(maker.example(source, loaded, step, rng, self._dropout))
                    position[d] += 1
                taken = np.bincount(chosen, minlength=len(pools)).astype(np.int64)
                number += 1
                yield {k: _stack([e[k] for e in examples]) for k in examples[0]} | {"taken": taken}
        except Exception as error:
            self._fault = error
            raise

    def _pool(self, source: Source) -> sampling.Pool:
        d = self._data._config
        steps = source.index.steps
        order = sampling.Order(steps, seed=self._seed, dataset=source.number, pool=d.pool)
        return sampling.Pool(order, source.load, self._data._executor)


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
        task = goals.choose(
            rng,
            t,
            length,
            strategy=d.goal,
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
