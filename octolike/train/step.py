"""The training step: augment → loss → gradients → clip → AdamW → average.

The randomness of a step is a function of the seed and the step number, so a resumed run repeats the
steps of an uninterrupted run bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from octolike import types
from octolike.config import AugmentConfig, Config
from octolike.model.target import fast_key
from octolike.train import flops, gradients, memory_plan, optimizer, sharding
from octolike.train.augment import augment
from octolike.train.gradients import GradientFn, Metrics
from octolike.train.state import Params, TrainState

Step = Callable[[TrainState, types.Batch], tuple[TrainState, Metrics]]


def make_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    config: Config,
    key: jax.Array,
    gradient_fn: GradientFn = gradients.whole_batch,
) -> Step:
    """Return the training step (state, batch) -> (state, metrics): a pure function, to be jitted.

    Metrics: those of the model and of `gradient_fn`; loss, learning_rate; grad_norm and
    grad_norm/<module>, before clipping; dataset and task, int [B].
    """
    learning_rate = optimizer.schedule(config.optim, config.train.steps)

    def step(state: TrainState, batch: types.Batch) -> tuple[TrainState, Metrics]:
        step_key = jax.random.fold_in(key, state.step)
        loss_fn = functools.partial(training_loss, model, config.train.augment, state)
        loss, metrics, grads = gradient_fn(loss_fn, state.params, batch, step_key)
        metrics |= {
            "loss": loss,
            "learning_rate": learning_rate(state.step),
            **gradients.gradient_norms(grads),
            # Of the global batch: the process that logs may hold only a part of it.
            "dataset": batch["dataset"],
            "task": batch["task"]["task_id"],
        }
        if sharding.SIGNAL in batch:
            metrics[sharding.SIGNAL] = batch[sharding.SIGNAL].max()
        return apply_gradients(state, grads, tx, config.optim.ema), metrics

    return step


def training_loss(
    model: nn.Module,
    augmentation: AugmentConfig,
    state: TrainState,
    params: Params,
    batch: types.Batch,
    key: jax.Array,
) -> tuple[jax.Array, Metrics]:
    """Return (loss, metrics) for trained parameters `params`; all other parameters are `state`'s.

    `params` is a separate argument so that the loss can be differentiated with respect to it.
    """
    augment_key, dropout_key, noise_key = jax.random.split(fast_key(key), 3)
    batch = augment(batch, augmentation, augment_key)
    variables = {"params": state.model_params(params)}
    rngs = {"dropout": dropout_key, "noise": noise_key}
    return cast(tuple[jax.Array, Metrics], model.apply(variables, batch, train=True, rngs=rngs))


def apply_gradients(
    state: TrainState, grads: Params, tx: optax.GradientTransformation, ema_decay: float
) -> TrainState:
    """Return the state after one optimiser update (`tx`: clip, then AdamW) and the new average.

    ema ← d · ema + (1 − d) · params with d = min(ema_decay, (1 + step) / (10 + step)), so that the
    average forgets its random start within a short run too.
    """
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema:
        d = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema = optax.incremental_update(params, ema, step_size=1 - d)
    return dataclasses.replace(
        state, step=state.step + 1, params=params, ema=ema, opt_state=opt_state
    )


def compile_step(
    step: Step, state: TrainState, spec: types.BatchSpec, batch_size: int, mesh: Mesh
) -> tuple[Step, dict[str, float]]:
    """Return the step compiled for these shapes, and its costs; print its memory plan.

    The compiled step cannot retrace, and it donates the state. Costs: flops_per_step over all
    devices, compile_seconds.
    """
    state_shardings = sharding.state_shardings(state, mesh)
    batch = abstract_batch(spec, batch_size)
    jitted = jax.jit(
        step,
        in_shardings=(state_shardings, sharding.batch_sharding(mesh)),
        out_shardings=(state_shardings, sharding.replicated(mesh)),
        donate_argnums=0,
    )
    started = time.perf_counter()
    with jax.set_mesh(mesh):  # kernels that the compiler cannot partition ask for it
        traced = jitted.trace(state, batch)
        compiled = traced.lower().compile()
    plain = flops.is_plain(traced.jaxpr)
    operations = flops.total(traced.jaxpr) if plain else flops.count(step, state, batch)
    seconds = time.perf_counter() - started
    print(f"step compiled in {seconds:.1f} s; {operations / 1e9:.4g} GFLOP", flush=True)
    memory = compiled.memory_analysis()
    plan = memory_plan.plan_memory(state, batch, mesh, memory and memory.temp_size_in_bytes)
    print(memory_plan.describe(plan))
    return compiled, {"flops_per_step": operations, "compile_seconds": seconds}


def abstract_batch(spec: types.BatchSpec, batch_size: int) -> types.Batch:
    """Return a batch of jax.ShapeDtypeStruct."""
    return types.unflatten(
        {k: jax.ShapeDtypeStruct((batch_size, *s), d) for k, (s, d) in spec.items()}
    )
