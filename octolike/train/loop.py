"""train(): one step and one loop, for every script.

How training starts:

    1. the directory: empty, or holding this very run (then it is resumed), else an error
    2. the devices, and how a batch is cut over them
    3. the model's parameters: their table, and what each frozen pattern matches
    4. config, embodiments, batch spec, names and versions are written
    5. the state: resumed, initialised from another run, or from scratch
    6. the data, from where the state left it
    7. the step, compiled once, with its memory plan

What a step does: augment → loss → gradients → clip → AdamW → average. Its randomness is a function
of the seed and the step's number, and the position in the data is saved with the parameters, so
that a resumed run repeats what an uninterrupted one does, bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh

from octolike import files, types
from octolike.config import Config, build_component
from octolike.embodiment import Embodiment
from octolike.model import language
from octolike.model.network import build_network
from octolike.text import TOKENIZERS
from octolike.train import (
    checkpoint,
    chunk_figures,
    conflicts,
    device_flops,
    gradients,
    initial_state,
    memory_plan,
    optimizer,
    retention,
    sharding,
    wandb_logger,
)
from octolike.train import state as states
from octolike.train.augment import augment
from octolike.train.device_feeder import DeviceBatch, DeviceFeeder, save_bad_batch
from octolike.train.interrupt import Interrupt
from octolike.train.metrics import Means, Metrics, Silent
from octolike.train.state import Params, TrainState
from octolike.train.validation import Loaders, Validated, Validator

SURGERY = 1 << 16  # of a step's randomness, what draws the order of PCGrad
MOST_NAMES = 50  # datasets or tasks whose losses are logged one by one

Success = Callable[[Params, int], dict[str, float]]
Step = Callable[[TrainState, types.Batch], tuple[TrainState, dict[str, jax.Array]]]


def train(
    config: Config,
    batches: Callable[[dict[str, Any] | None], types.BatchStream],
    *,
    spec: types.BatchSpec,
    embodiments: Sequence[Embodiment],
    names: types.Names,
    validation: Loaders,
    success: Success | None = None,
    model: nn.Module | None = None,
) -> TrainState:
    """Train until `config.train.steps` and return the last state.

    Args:
        config: the run; all of it is written to `config.workdir`.
        batches: makes the training batches from a saved position, or from the start for None.
        spec: of every batch.
        embodiments: the robots that a batch's `embodiment` counts.
        names: what a batch's integers count.
        validation: {dataset: makes an iterator of held-out batches}; {} for none.
        success: (a policy's parameters, step) -> {task: rate}, asked at every validation; what the
            sampling follows then, in place of the held-out errors.
        model: the network; by default that of `config.model`.

    Raises:
        SystemExit: 130 after Ctrl-C, 143 after SIGTERM, once the state is saved.
        ConfigError: settings that do not fit, a directory that holds another run, a pattern that
            matches nothing.
        FloatingPointError: a loss or gradient that is not finite.
    """
    config.check()
    sharding.start(config.train)
    retention.check(config, bool(validation))
    if config.train.wandb:
        wandb_logger.load(config.train.wandb)
    # 1. The directory.
    known = checkpoint.check_same_run(config, embodiments, spec, names)
    # 2. The devices.
    mesh = sharding.make_mesh(config.train.fsdp)
    sharding.check_batch_size(config.data.batch_size, mesh)
    # 3. The parameters.
    own = checkpoint.readable(config)
    settings, given = dataclasses.asdict(own.model), spec
    _check_vocabulary(own, settings)
    spec = language.extend_spec(settings, given)
    model = model or build_network(settings, spec, names)
    keys = jax.random.split(jax.random.key(config.seed), 3)
    init, frozen = initial_state.make_init(model, spec, config.optim)
    shapes = jax.eval_shape(init, keys[0])
    print(states.summarize(shapes, frozen))
    # 4. The files.
    sharding.wait("before the run's files are written")
    if sharding.is_first():
        checkpoint.write_run_files(config, embodiments, given, names)
        table = states.describe(shapes, frozen) + "\n"
        files.write_text(Path(config.workdir) / "parameters.txt", table)
    sharding.wait("after the run's files are written")
    # 5. The state.
    tx, position = optimizer.make(config.optim, config.train.steps), None
    keeping = config.train.keep, config.train.keep_every, config.train.keep_best
    checkpoints = checkpoint.Checkpoints(config.workdir, *keeping)
    resume = known and checkpoints.latest is not None
    begin = initial_state.Start(tx, frozen, config.optim, mesh)
    like = begin.abstract(shapes)
    print(sharding.describe(like, _abstract_batch(spec, config.data.batch_size), mesh))
    if resume:
        state, position = checkpoints.restore(like)
        print(f"resuming {config.workdir} at step {int(state.step)}")
    else:
        state = begin.scratch(init, keys[0], initial_state.given(config, settings, shapes, names))
    if int(state.step) >= config.train.steps:
        print(f"all {config.train.steps} steps are done; with more train.steps it would go on")
        return state
    # 6. The data.
    encoder = language.frozen_encoder(settings)
    feed = DeviceFeeder(batches(position), given, mesh, encoder)
    # 7. The step.
    compare = None
    if config.train.conflicts_every:
        loss = make_loss(model, config)
        compare = conflicts.GradientComparer(loss, keys[1], config, names, int(state.step))
    step = make_step(model, tx, config, keys[1], names)
    step, costs = compile_step(step, state, spec, config.data.batch_size, mesh)
    costs |= {"parameters": sum(x.size for x in jax.tree.leaves(shapes))}
    if sharding.is_first():
        files.write_json(Path(config.workdir) / checkpoint.COSTS, costs, indent=None)
    validator = None
    if validation:
        n = config.train.validation_batches
        validator = Validator(
            model,
            validation,
            embodiments,
            given,
            names.tasks,
            encoder=encoder,
            batches=n,
            mesh=mesh,
            key=keys[2],
        )
    with contextlib.closing(feed):
        loop = Loop(config, step, feed, checkpoints, validator, names, compare, costs, success)
        return loop.run(state)


def make_loss(model: nn.Module, config: Config) -> Callable[[TrainState], gradients.Loss]:
    """Return the training loss of a state; its parameters are given apart, to be differentiated."""

    def of(state: TrainState) -> gradients.Loss:
        def loss(
            params: Params, batch: types.Batch, key: jax.Array
        ) -> tuple[jax.Array, dict[str, jax.Array]]:
            keys = jax.random.split(key, 3)
            batch = augment(batch, config.train.augment, keys[0])
            rngs = {"dropout": keys[1], "noise": keys[2]}
            variables = {"params": state.model_params(params)}
            return model.apply(variables, batch, train=True, rngs=rngs)

        return loss

    return of


def make_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    config: Config,
    key: jax.Array,
    names: types.Names | None = None,
) -> Step:
    """Return the training step (state, batch) -> (state, metrics): pure, to be jitted.

    Metrics: the model's, and loss, grad_norm and grad_norm/<module> (before clipping),
    learning_rate; with optim.surgery, which needs `names`, conflict_rate; dataset, task int [B].
    """
    rate = optimizer.schedule(config.optim, config.train.steps)
    by, surgery, loss_of = config.train.groups, config.optim.surgery, make_loss(model, config)
    count = len(conflicts.group_names(by, names)) if surgery else 0

    def step(before: TrainState, batch: types.Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        loss, key_step = loss_of(before), jax.random.fold_in(key, before.step)
        value, metrics, grads = gradients.of_batch(
            loss,
            before.params,
            batch,
            key_step,
            config.optim.accumulate,
            conflicts.differentiate(loss, by, count) if surgery else None,
        )
        if surgery:
            order = jax.random.fold_in(key_step, SURGERY)
            grads, metrics["conflict_rate"] = conflicts.pcgrad(grads, order)
        own = {"loss": value, "learning_rate": rate(before.step), **gradients.norms(grads)}
        # of the whole batch, of which a process may have but a part
        own |= {"dataset": batch["dataset"], "task": batch["task"]["task_id"]}
        return states.update(before, grads, tx, config.optim.ema), {**metrics, **own}

    return step


def compile_step(
    step: Step, state: TrainState, spec: types.BatchSpec, batch_size: int, mesh: Mesh
) -> tuple[Step, dict[str, float]]:
    """Return the step compiled for just these shapes, and its costs.

    It cannot retrace, and donates the state. Costs: flops_per_step of all devices, compile_seconds.
    Prints what it needs on each device.
    """
    whole, examples = sharding.replicated(mesh), sharding.by_example(mesh)
    where, batch = sharding.of_state(state, mesh), _abstract_batch(spec, batch_size)
    jitted = jax.jit(
        step, in_shardings=(where, examples), out_shardings=(where, whole), donate_argnums=0
    )
    started = time.perf_counter()
    compiled = jitted.lower(state, batch).compile()
    seconds = time.perf_counter() - started
    flops = _flops(compiled) * mesh.size  # the compiler counts those of one device
    print(f"step compiled in {seconds:.1f} s; {flops / 1e9:.4g} GFLOP", flush=True)
    memory = compiled.memory_analysis()
    print(
        memory_plan.describe(
            memory_plan.of(state, batch, mesh, memory and memory.temp_size_in_bytes)
        )
    )
    return compiled, {"flops_per_step": flops, "compile_seconds": seconds}


class Loop:
    """Step, read the previous metrics, log, validate, save."""

    def __init__(
        self,
        config: Config,
        step: Step,
        feed: DeviceFeeder,
        checkpoints: checkpoint.Checkpoints,
        validator: Validator | None,
        names: types.Names,
        compare: conflicts.GradientComparer | None = None,
        costs: Mapping[str, float] | None = None,
        success: Success | None = None,
    ) -> None:
        """Prepare; costs: of `compile_step`, for the share of the devices' peak."""
        self._config, self._step, self._feed, self._compare = config, step, feed, compare
        self._checkpoints, self._validator, self._success = checkpoints, validator, success
        # One name says nothing that the whole does not; hundreds are for the report, not the log.
        self._datasets, self._tasks = (
            n if 1 < len(n) <= MOST_NAMES else () for n in (names.datasets, names.tasks)
        )
        self._means, self._waited, self._last_loss = Means(), 0.0, math.nan
        self._flops = (costs or {}).get("flops_per_step", math.nan)

    def _log(self, step: int) -> Metrics:
        kind = Metrics if sharding.is_first() else Silent
        each = device_flops.peak(jax.devices()[0].device_kind)
        return kind(
            self._config.workdir,
            step=step,
            steps=self._config.train.steps,
            batch_size=self._config.data.batch_size,
            flops=self._flops,
            peak=each and each * jax.device_count(),
            wandb=self._config.train.wandb,
        )

    def run(self, state: TrainState) -> TrainState:
        """Return the last state. Always one step ahead of the metrics that are read."""
        options, step = self._config.train, int(state.step)
        with (
            Interrupt() as interrupt,
            self._log(step) as log,
            self._checkpoints,
            ThreadPoolExecutor(1) as reader,
        ):
            pending: tuple[int, DeviceBatch, Future] | None = None
            stop: int | None = None
            fed: DeviceBatch | None = self._feed.next()
            while fed is not None:
                if self._compare and self._compare.due(step):
                    with log.paused():
                        self._compare(step, state, fed.arrays)
                with jax.transfer_guard("disallow"):
                    state, metrics = self._step(state, fed.arrays)
                step, current = step + 1, fed
                reading = reader.submit(_read, metrics)
                stop = sharding.agree(interrupt.signal, step)
                done = step == options.steps or stop is not None
                fed = None if done else self._feed.next()  # while the device computes
                if pending:
                    self._digest(log, *pending, next_ready=current.ready)
                pending = step, current, reading
                validates = self._validates(step)
                if not (done or validates or step % options.checkpoint_every == 0):
                    continue
                # What is saved has been read: a checkpoint never holds a state gone wrong.
                self._digest(log, *pending, next_ready=fed.ready if fed else 0.0)
                pending = None
                with log.paused():
                    position, scores = current.position, None
                    if validates:
                        found = self._validate(log, step, state)
                        position = self._feed.feedback(found, position)
                        scores = retention.mean(found.datasets)
                    if done or step % options.checkpoint_every == 0:
                        self._checkpoints.save(state, position, scores)
            self._checkpoints.wait()  # a farewell before that would promise too much
            log.say(self._farewell(step, stop))
        if stop is not None and step < options.steps:
            raise SystemExit(128 + stop)
        return state

    def _validate(self, log: Metrics, step: int, state: TrainState) -> Validated:
        params = state.policy_params()
        found = self._validator(params)
        log.validation(step, {**found.datasets, **self._named(found.tasks)})
        if self._success:
            found = dataclasses.replace(found, success=self._success(params, step))
            log.validation(step, {k: {"success": v} for k, v in found.success.items()})
        if sharding.is_first():
            chunk_figures.save(found.chunks, step, self._config.workdir)
        return found

    def _named(self, tasks: Mapping[str, float]) -> dict[str, dict[str, float]]:
        return {k: {"action_error": v} for k, v in tasks.items() if k and k in self._tasks}

    def _validates(self, step: int) -> bool:
        options = self._config.train
        due = options.validate_every and step % options.validate_every == 0
        return self._validator is not None and bool(due or step == options.steps)

    def _digest(
        self, log: Metrics, step: int, fed: DeviceBatch, reading: Future, *, next_ready: float
    ) -> None:
        """Take in the metrics of a step; next_ready: when the batch after it was there."""
        self._checkpoints.check()
        metrics, finished = reading.result()
        self._waited += max(0.0, next_ready - finished)
        scalars = {k: float(v) for k, v in metrics.items() if v.ndim == 0}
        self._check_finite(step, fed, scalars)
        self._means.add(scalars)
        self._add_per_name(metrics)
        log.advance()
        if step % self._config.train.log_every == 0 or step == self._config.train.steps:
            log.train(step, self._means.take(), self._waited, self._feed.memory())
            self._waited = 0.0

    def _add_per_name(self, metrics: Mapping[str, np.ndarray]) -> None:
        """Take in the losses, and the use of experts, of each dataset and of each task."""
        for of, names in (metrics["dataset"], self._datasets), (metrics["task"], self._tasks):
            for i, name in enumerate(names):
                if not name:  # examples of no known task
                    continue
                mine = of == i
                self._means.add({f"share/{name}": mine.mean()})
                if not mine.any():
                    continue
                found = {f"loss/{name}": metrics["loss_per_example"][mine].mean()}
                used = metrics.get("experts_per_example", np.zeros((len(of), 0)))[mine].mean(axis=0)
                found |= {f"expert_{e}/{name}": share for e, share in enumerate(used)}
                self._means.add(found, weight=mine.sum())

    def _check_finite(self, step: int, fed: DeviceBatch, scalars: Mapping[str, float]) -> None:
        bad = {k: v for k, v in scalars.items() if not math.isfinite(v)}
        if bad:
            found = ", ".join(f"{k} is {v}" for k, v in bad.items())
            saved = self._checkpoints.complete()
            kept = f"Checkpoint {saved[-1]} is intact" if saved else "No checkpoint was due yet"
            options, workdir = self._config.optim, self._config.workdir
            raise FloatingPointError(
                f"{found} at step {step}; the loss was {self._last_loss:.4g} at the step before. "
                f"{kept} in {workdir}. {save_bad_batch(fed, workdir, step)} Often: a learning rate "
                f"too high, with optim.learning_rate {options.learning_rate:g} and warmup "
                f"{options.warmup}; no clipping, with optim.clip {options.clip:g}; or values like "
                "that in the data"
            )
        self._last_loss = scalars["loss"]

    def _farewell(self, step: int, signum: int | None) -> str:
        workdir, steps = self._config.workdir, self._config.train.steps
        if step == steps:
            return f"trained {steps} steps; the run is in {workdir}"
        stopped = f"stopped by {signal.Signals(signum).name} and saved at step {step} of {steps}"
        return f"{stopped}; the same command resumes {workdir}"


def _read(metrics: dict[str, jax.Array]) -> tuple[dict[str, np.ndarray], float]:
    """Return the metrics on the host, and when the device had finished them."""
    values = jax.device_get(jax.block_until_ready(metrics))
    return {k: np.asarray(v) for k, v in values.items()}, time.perf_counter()


def _flops(compiled: Any) -> float:
    """Return the floating-point operations of a compiled function, as the compiler counts them."""
    costs = compiled.cost_analysis() or {}
    return float(costs.get("flops", math.nan))


def _check_vocabulary(config: Config, model: Mapping[str, Any]) -> None:
    """Raise ConfigError where the text tokenizer has ids that a text encoder does not know."""
    if language.source(model):
        text = build_component(TOKENIZERS, config.data.text, "data.text")
        language.check_vocabulary(model, text.vocabulary)


def _abstract_batch(spec: types.BatchSpec, batch_size: int) -> types.Batch:
    return types.unflatten(
        {k: jax.ShapeDtypeStruct((batch_size, *s), d) for k, (s, d) in spec.items()}
    )
