"""ActionSampler: the network of a run, compiled to sample action chunks for one robot."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from octolike import types
from octolike.model import language
from octolike.model.network import build_network
from octolike.train.checkpoint import Run
from octolike.train.state import Params, init_params


class ActionSampler:
    """Samples normalised chunks; policies with different parameters share one, compiled once.

    Attributes:
        network: the linen module.
        spec: of its input, including the states of a frozen text encoder.
        tokenizer_reads: the dotted paths of its input that the tokenizers read.
        head_reads: those that the heads read, e.g. "task.task_id" for a head per task.
    """

    def __init__(self, run: Run, embodiment: str, action_width: int, batch_size: int) -> None:
        """embodiment: name of the robot; action_width: its number of action dimensions."""
        settings = dataclasses.asdict(run.config.model)
        self.batch_size = batch_size
        self.spec = language.extend_spec(settings, run.spec)
        self.network = build_network(settings, self.spec, run.names)
        self.head_reads = {key for head in self.network.heads.values() for key in head.reads()}
        tokenizers = self.network.tokenizers.values()
        self.tokenizer_reads = {key for tokenizer in tokenizers for key in tokenizer.reads()}
        dims = np.arange(run.spec["action"][0][-1]) < action_width
        index = run.names.embodiments.index(embodiment)
        self._sample = jax.jit(functools.partial(_sample, self.network, dims, index))

    @property
    def compilations(self) -> int:
        """The number of input shapes that were compiled."""
        return self._sample._cache_size()  # type: ignore[attr-defined]  # private in jax

    def init_params(self, seed: int) -> Params:
        """Return freshly initialised parameters."""
        init = jax.jit(functools.partial(init_params, self.network, self.spec))
        return init(jax.random.key(seed))

    def sample(
        self, params: Params, observation: types.Batch, task: types.Batch, seeds: Sequence[int]
    ) -> np.ndarray:
        """Return normalised chunks float32 [B, H, A] for two parts of a batch.

        The noise of an example depends on its seed alone. B may differ from `batch_size`: the
        examples are padded, or split.

        Raises:
            FloatingPointError: a sampled action is NaN or infinite.
        """
        total, chunks = len(seeds), []
        for start in range(0, total, self.batch_size):
            rows = np.minimum(np.arange(start, start + self.batch_size), total - 1)
            inputs = jax.tree.map(lambda x, rows=rows: x[rows], (observation, task))
            keys = (np.asarray(seeds, dtype=np.int64)[rows] & 0xFFFFFFFF).astype(np.uint32)
            chunks.append(np.asarray(self._sample(params, *inputs, keys)))
        actions = np.concatenate(chunks)[:total]
        if not np.isfinite(actions).all():
            bad = np.flatnonzero(~np.isfinite(actions).all(axis=(1, 2))).tolist()
            raise FloatingPointError(
                f"the network sampled actions that are not finite, for examples {bad}; do not "
                "execute them. Check the observation, or load an earlier checkpoint"
            )
        return actions


def _sample(
    network: Any,
    dims: np.ndarray,
    embodiment: int,
    params: Params,
    observation: Any,
    task: Any,
    seeds: jax.Array,
) -> jax.Array:
    """Return normalised chunks [B, H, A]; vmapped, so that each example draws its own noise.

    dims: bool [A], True for the robot's own action dimensions; seeds: uint32 [B].
    """

    def sample_one(observation: Any, task: Any, seed: jax.Array) -> jax.Array:
        inputs = jax.tree.map(lambda x: x[None], (observation, task))
        robot = {"dims": dims[None], "embodiment": np.full(1, embodiment)}
        sample = functools.partial(network.apply, {"params": params}, method="sample_actions")
        return sample(*inputs, **robot, rngs={"noise": jax.random.key(seed)})[0]

    return jax.vmap(sample_one)(observation, task, seeds)
