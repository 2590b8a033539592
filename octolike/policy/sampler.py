"""ActionSampler: the network of a run, compiled to sample action chunks for one robot.

A call has two compiled parts:

    read_out   observation and task → the input of the head          once per observation
    decode     readout, seeds and a prefix → chunks, by the head     once per chunk

Both apply the network once to a whole batch of a fixed size. Only the noise is drawn per example,
so that a chunk depends on its own observation, seed and prefix, not on the batch.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from octolike import types
from octolike.model import language
from octolike.model.denoising import Denoising
from octolike.model.head import WrappedHead
from octolike.model.network import Readout, build_network
from octolike.policy.execution import check_finite
from octolike.policy.weights import cast_once
from octolike.train.checkpoint import Run
from octolike.train.state import Params, init_params


class ActionSampler:
    """Samples normalised chunks; policies with different parameters share one, compiled once.

    Attributes:
        network: the linen module.
        spec: batch spec of its input, including the states of a frozen text encoder.
        batch_sizes: examples per compiled call, in ascending order.
        tokenizer_reads: the dotted paths of its input that the tokenizers read.
        is_denoising: whether chunks can continue a prefix; trained_prefix: the longest one that
            the head was trained with, 0 for none.
        head_reads: the paths that the heads read, e.g. "task.task_id" for a head per task.
    """

    def __init__(
        self, run: Run, embodiment: str, action_width: int, batch_sizes: Sequence[int]
    ) -> None:
        """embodiment: name of the robot; action_width: its number of action dimensions."""
        settings = dataclasses.asdict(run.config.model)
        self.batch_sizes = tuple(sorted(set(batch_sizes)))
        self.spec = language.extend_spec(settings, run.spec)
        self.network = build_network(settings, self.spec, run.names)
        self.head_reads = {key for head in self.network.heads.values() for key in head.reads()}
        tokenizers = self.network.tokenizers.values()
        self.tokenizer_reads = {key for tokenizer in tokenizers for key in tokenizer.reads()}
        _, self.horizon, width = run.spec["action"][0]
        dims = np.arange(width) < action_width
        index = run.names.embodiments.index(embodiment)
        head: Any = self.network.heads.get("action")
        while isinstance(head, WrappedHead):
            head = head.head
        self.is_denoising = isinstance(head, Denoising)
        self.trained_prefix = head.prefix if isinstance(head, Denoising) else 0
        self._dtype = settings["dtype"]
        self._read_out = jax.jit(functools.partial(_read_out, self.network, index))
        self._decode = jax.jit(functools.partial(_decode, self.network, dims))
        self._subtask = jax.jit(functools.partial(_subtask_ids, self.network))
        self._compiled: set[tuple[int, bool]] = set()
        self._compiling = threading.Lock()

    @property
    def compilations(self) -> int:
        """The number of input shapes that were compiled."""
        return self._read_out._cache_size()  # type: ignore[attr-defined]  # private in jax

    def init_params(self, seed: int) -> Params:
        """Return freshly initialised parameters."""
        init = jax.jit(functools.partial(init_params, self.network, self.spec))
        return init(jax.random.key(int(check_seeds([seed])[0])))

    def load(self, params: Params) -> Params:
        """Return parameters on the device, those in the compute type that are only used in it."""
        if np.dtype(self._dtype) != np.float32:
            batch = types.zeros(self.spec, 1)
            inputs = batch["observation"], batch.get("task", {})

            def sample(params: Any) -> jax.Array:
                readout = self._read_out(params, *inputs)
                return self._decode(params, readout, np.zeros(1, int), np.zeros(1, np.uint32), None)

            params = cast_once(sample, params)
        return jax.device_put(params)

    def warmup(self, params: Params, prefix: bool) -> None:
        """Compile for every batch size; prefix: for the head's real-time chunking too."""
        for size in self.batch_sizes:
            batch = types.zeros(self.spec, size)
            inputs = batch["observation"], batch.get("task", {})
            self.sample(params, *inputs, [0] * size)
            if prefix:
                for guided in (True, False) if self.trained_prefix else (True,):
                    self.sample(params, *inputs, [0] * size, self.no_prefix(size, guided))

    @functools.cached_property
    def reads_subtasks(self) -> bool:
        """Whether the network predicts subtasks."""
        return any(t.place == "subtask" for t in self.network.tokenizers.values())

    def subtask_ids(
        self, params: Params, observation: types.Batch, task: types.Batch
    ) -> np.ndarray:
        """Return the ids of the predicted subtask at the last step, int [B, L]; −1: no word."""
        return np.asarray(self._subtask(params, observation, task))

    def no_prefix(self, batch: int, guided: bool) -> types.Prefix:
        """Return prefixes without any action: chunks are those of no prefix."""
        shape = batch, self.horizon
        action = np.zeros((*shape, self.spec["action"][0][-1]), np.float32)
        weight = np.zeros(shape, np.float32) if guided else None
        return types.Prefix(action, np.zeros(shape, bool), weight)

    def sample(
        self,
        params: Params,
        observation: types.Batch,
        task: types.Batch,
        seeds: Sequence[int],
        prefix: types.Prefix | None = None,
        repeats: int = 1,
    ) -> np.ndarray:
        """Return normalised chunks float32 [B · repeats, H, A] for two parts of a batch [B].

        The noise of a chunk depends on its seed alone. B may differ from `batch_sizes`: the
        examples are padded, or split. prefix: of each chunk. repeats: chunks per example,
        consecutive, of one readout.

        Raises:
            FloatingPointError: a sampled action is NaN or infinite.
            ValueError: a seed that is not an integer below 2^32.
        """
        total, chunks = len(seeds), []
        keys = check_seeds(seeds)
        for examples in self._batches(total // repeats):
            inputs = jax.tree.map(lambda x, rows=examples: x[rows], (observation, task))
            with self._once(len(examples), prefix is not None):
                readout = self._read_out(params, *inputs)
                first, count = examples[0], len(np.unique(examples))
                for rows in self._batches(count * repeats):
                    chosen = rows + first * repeats
                    continued = jax.tree.map(lambda x, rows=chosen: x[rows], prefix)
                    chunk = self._decode(params, readout, rows // repeats, keys[chosen], continued)
                    chunks.append(np.asarray(chunk)[: len(np.unique(rows))])
        actions = np.concatenate(chunks)
        check_finite(
            actions,
            "the network sampled actions that are not finite, for examples {bad}; do not execute "
            "them. Check the observation, or load an earlier checkpoint",
        )
        return actions

    def _batches(self, total: int) -> Iterator[np.ndarray]:
        """Yield the rows of each compiled call; the last row is repeated as padding."""
        start, largest = 0, self.batch_sizes[-1]
        while start < total:
            size = next((s for s in self.batch_sizes if s >= total - start), largest)
            yield np.minimum(np.arange(start, start + size), total - 1)
            start += size

    def _once(self, size: int, has_prefix: bool) -> Any:
        """Return a context in which only one thread compiles a batch size."""
        return _FirstCall(self, (size, has_prefix))


class _FirstCall:
    """Holds the sampler's lock during the first call of a kind; later ones run in parallel."""

    def __init__(self, sampler: ActionSampler, kind: tuple[int, bool]) -> None:
        self._sampler, self._kind, self._is_first = sampler, kind, False

    def __enter__(self) -> None:
        if self._kind not in self._sampler._compiled:
            self._sampler._compiling.acquire()
            self._is_first = True

    def __exit__(self, *_: object) -> None:
        if self._is_first:
            self._sampler._compiled.add(self._kind)
            self._sampler._compiling.release()


def _subtask_ids(network: Any, params: Params, observation: Any, task: Any) -> jax.Array:
    _, state = network.apply(
        {"params": params},
        observation,
        task,
        train=False,
        method="encode",
        mutable=["intermediates"],
    )
    (ids,) = jax.tree.leaves(state["intermediates"])
    return ids[:, -1]


def noise_seed(*numbers: int) -> int:
    """Return a seed of a policy call that depends on the numbers alone: an episode's seed, a step.

    octolike's evaluation and its server use it, so both draw the same noise for the same episode.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def check_seeds(seeds: Sequence[int]) -> np.ndarray:
    """Return seeds as uint32; ValueError for others: they would repeat a smaller one's noise."""
    for seed in seeds:
        is_integer = isinstance(seed, (int, np.integer)) and not isinstance(seed, bool)
        if not is_integer or not 0 <= seed < 2**32:
            raise ValueError(f"a seed is {seed!r:.80}; expected an integer from 0 to 2^32 - 1")
    return np.asarray(seeds, np.uint32)


def _read_out(
    network: Any, embodiment: int, params: Params, observation: Any, task: Any
) -> Readout:
    batch = observation["timestep_mask"].shape[0]
    return network.apply(
        {"params": params},
        observation,
        task,
        embodiment=np.full(batch, embodiment),
        method="read_out",
    )


def _decode(
    network: Any,
    dims: np.ndarray,
    params: Params,
    readout: Readout,
    rows: jax.Array,
    seeds: jax.Array,
    prefix: types.Prefix | None,
) -> jax.Array:
    """Return normalised chunks [B, H, A].

    dims: bool [A], True for the robot's own action dimensions; rows: int [B], the readout of each
    chunk; seeds: uint32 [B].
    """

    def draw(seed: jax.Array) -> Any:
        return network.apply({}, rngs={"noise": jax.random.key(seed)}, method="draw")

    return network.apply(
        {"params": params},
        jax.tree.map(lambda x: x[rows], readout),
        dims=np.broadcast_to(dims, (len(seeds), len(dims))),
        noise=jax.vmap(draw)(seeds),  # only the noise: an application is never vmapped
        prefix=prefix,
        method="decode",
    )
