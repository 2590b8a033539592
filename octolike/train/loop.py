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
import functools
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh

from octolike import types
from octolike.config import Config, OptimConfig, build_component
from octolike.model import language, octo, pretrained
from octolike.normalize import Embodiment
from octolike.text import TOKENIZERS
from octolike.train import checkpoint, gradients, lora, optimizer, sharding
from octolike.train import state as states
from octolike.train.augment import augment
from octolike.train.metrics import Means, Metrics
from octolike.train.state import Params, TrainState
from octolike.train.validate import Loaders, Validated, Validator

MOST_NAMES = 50  # datasets or tasks whose losses are logged one by one

Step = Callable[[TrainState, types.Batch], tuple[TrainState, dict[str, jax.Array]]]


class Batches(Protocol):
    """Endless numpy batches whose position can be saved: octolike.data.batches has the real one."""

    def __next__(self) -> types.Batch:
        """Return the next batch."""

    def state(self) -> dict[str, Any]:
        """Return the position after the last batch taken, as JSON data."""

    def feedback(self, datasets: Mapping[str, float], tasks: Mapping[str, float]) -> None:
        """Take in held-out action errors by name; sampling may follow them from a later batch."""

    def memory(self) -> int:
        """Return the bytes held: encoded episodes, and batches made ahead."""

    def state_at(self, position: dict[str, Any]) -> dict[str, Any]:
        """Return an earlier `state()` with what feedback has changed since."""

    def close(self) -> None:
        """Stop making batches."""


def train(
    config: Config,
    batches: Callable[[dict[str, Any] | None], Batches],
    *,
    spec: types.BatchSpec,
    embodiments: Sequence[Embodiment],
    names: types.Names,
    validation: Loaders,
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
        model: the network; by default that of `config.model`.

    Raises:
        SystemExit: 130 after Ctrl-C, 143 after SIGTERM, once the state is saved.
        ConfigError: settings that do not fit, a directory that holds another run, a pattern that
            matches nothing.
        FloatingPointError: a loss or gradient that is not finite.
    """
    config.check()
    # 1. The directory.
    known = checkpoint.check_same_run(config, embodiments, spec, names)
    # 2. The devices.
    mesh = sharding.make_mesh()
    sharding.check_batch_size(config.data.batch_size, mesh)
    print(f"devices: {mesh.size} × {jax.local_devices()[0].device_kind}")
    # 3. The parameters.
    own = checkpoint.with_own_files(config, config.workdir)
    settings, given = dataclasses.asdict(own.model), spec
    _check_vocabulary(own, settings)
    spec = language.extend_spec(settings, given)
    model = model or octo.build(settings, spec, names)
    keys = jax.random.split(jax.random.key(config.seed), 3)
    init, frozen = make_init(model, spec, config.optim)
    shapes = jax.eval_shape(init, keys[0])
    print(states.summarize(shapes, frozen))
    # 4. The files.
    checkpoint.write_run_files(config, embodiments, given, names)
    table = states.describe(shapes, frozen) + "\n"
    checkpoint.write_text(Path(config.workdir) / "parameters.txt", table)
    # 5. The state.
    tx, position = optimizer.make(config.optim, config.train.steps), None
    checkpoints = checkpoint.Checkpoints(config.workdir, config.train.keep)
    resume = known and checkpoints.latest is not None
    start = Start(tx, frozen, config.optim, mesh)
    if resume:
        state, position = checkpoints.restore(start.abstract(shapes))
        print(f"resuming {config.workdir} at step {int(state.step)}")
    else:
        taken = take_over(config, shapes) if config.train.init_from else {}
        taken = optimizer.merge(pretrained.read(settings, shapes) or {}, taken)
        state = start.scratch(init, keys[0], taken)
    if int(state.step) >= config.train.steps:
        print(f"all {config.train.steps} steps are done; with more train.steps it would go on")
        return state
    # 6. The data.
    encoder = language.frozen_encoder(settings)
    feed = Feed(batches(position), given, mesh, encoder)
    # 7. The step.
    step = make_step(model, tx, config, keys[1])
    step, costs = compile_step(step, state, spec, config.data.batch_size, mesh)
    costs |= {"parameters": sum(x.size for x in jax.tree.leaves(shapes))}
    checkpoint.write_text(Path(config.workdir) / checkpoint.COSTS, json.dumps(costs) + "\n")
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
        return Loop(config, step, feed, checkpoints, validator, names).run(state)


def make_step(
    model: nn.Module, tx: optax.GradientTransformation, config: Config, key: jax.Array
) -> Step:
    """Return the training step (state, batch) -> (state, metrics): pure, to be jitted.

    Metrics: the model's, and loss, grad_norm and grad_norm/<module> (before clipping),
    learning_rate.
    """
    rate = optimizer.schedule(config.optim, config.train.steps)

    def step(before: TrainState, batch: types.Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        def loss(
            params: Params, batch: types.Batch, key: jax.Array
        ) -> tuple[jax.Array, dict[str, jax.Array]]:
            keys = jax.random.split(key, 3)
            batch = augment(batch, config.train.augment, keys[0])
            rngs = {"dropout": keys[1], "noise": keys[2]}
            variables = {"params": before.model_params(params)}
            return model.apply(variables, batch, train=True, rngs=rngs)

        value, metrics, grads = gradients.of_batch(
            loss,
            before.params,
            batch,
            jax.random.fold_in(key, before.step),
            config.optim.accumulate,
        )
        own = {"loss": value, "learning_rate": rate(before.step), **gradients.norms(grads)}
        return states.update(before, grads, tx, config.optim.ema), {**metrics, **own}

    return step


def compile_step(
    step: Step, state: TrainState, spec: types.BatchSpec, batch_size: int, mesh: Mesh
) -> tuple[Step, dict[str, float]]:
    """Return the step compiled for just these shapes, and its costs.

    It cannot retrace, and donates the state. Costs: flops_per_step, compile_seconds.
    """
    whole, examples = sharding.replicated(mesh), sharding.by_example(mesh)
    jitted = jax.jit(
        step, in_shardings=(whole, examples), out_shardings=(whole, whole), donate_argnums=0
    )
    started = time.perf_counter()
    compiled = jitted.lower(state, _abstract_batch(spec, batch_size)).compile()
    seconds, memory = time.perf_counter() - started, compiled.memory_analysis()
    flops = _flops(compiled)
    plan = f"; {flops / 1e9:.4g} GFLOP"
    if memory is not None:
        held, work = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        plan += f"; per device {held / 2**20:.0f} MiB held, {work / 2**20:.0f} MiB for computing"
    print(f"step compiled in {seconds:.1f} s{plan}", flush=True)
    return compiled, {"flops_per_step": flops, "compile_seconds": seconds}


def make_init(
    model: nn.Module, spec: types.BatchSpec, config: OptimConfig
) -> tuple[Callable[[jax.Array], Params], list[str]]:
    """Return what makes fresh parameters from a key, low-rank changes too; and the frozen paths.

    Prints what each pattern of optim.frozen and optim.lora matches.
    """
    plain = lambda key: states.init_params(model, spec, key)
    shapes = jax.eval_shape(plain, jax.random.key(0))
    low_rank = lora.kernels(shapes, config.lora)
    changed = sorted({path for paths in low_rank.values() for path in paths})

    def init(key: jax.Array) -> Params:
        params = plain(key)
        return params | lora.init(params, changed, config.lora_rank, jax.random.fold_in(key, 1))

    matches = optimizer.frozen_paths(shapes, config.frozen, may_all=bool(changed))
    for pattern, paths in matches.items():
        verb = "trained" if pattern.startswith("!") else "frozen"
        print(f"{verb} by {pattern!r}: {', '.join(paths)}")
    for pattern, paths in low_rank.items():
        print(f"changed at rank {config.lora_rank} by {pattern!r}: {', '.join(paths)}")
    return init, sorted({*optimizer.frozen_of(matches), *changed})


def take_over(config: Config, shapes: Params) -> Params:
    """Return the parameters that go over from train.init_from; prints what the runs differ in."""
    options = config.train
    other = checkpoint.load_run(options.init_from, options.init_step or None)
    source = f"{options.init_from} at step {other.step}"
    print(f"starting from the parameters of {source}")
    changes = checkpoint.differences(other.config, config)
    print("settings that differ (there -> here):", *(changes or ["none"]), sep="\n  ")
    plain = {k: v for k, v in shapes.items() if k != lora.NAME}
    adapted = states.adapt(plain, other.params, options.fresh, source)
    print(states.describe_adapted(adapted))
    return optimizer.unflatten(adapted.taken)


class Start:
    """The ways to the first state, on the devices. frozen: parameter paths."""

    def __init__(
        self,
        tx: optax.GradientTransformation,
        frozen: Sequence[str],
        config: OptimConfig,
        mesh: Mesh,
    ) -> None:
        self._create = functools.partial(
            states.create, tx=tx, frozen=frozen, ema=config.ema > 0, lora_scale=config.lora_scale
        )
        self._whole = sharding.replicated(mesh)

    def scratch(
        self, init: Callable[[jax.Array], Params], key: jax.Array, given: Params | None = None
    ) -> TrainState:
        """Return the state of fresh parameters, with given ones in place of some."""
        fresh = lambda key, given: self._create(optimizer.merge(init(key), given))
        return jax.jit(fresh, out_shardings=self._whole)(key, given or {})

    def abstract(self, shapes: Params) -> TrainState:
        """Return shapes, dtypes and shardings of the state: where a checkpoint is read to."""
        put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._whole)
        return jax.tree.map(put, jax.eval_shape(self._create, shapes))


class Fed(NamedTuple):
    """A batch on the devices; dataset, task: int [B], on the host; position: in the data, after."""

    arrays: types.Batch
    dataset: np.ndarray
    task: np.ndarray
    position: dict[str, Any]
    ready: float


class Feed:
    """Takes numpy batches to the devices, with the position in the data that comes after each.

    spec: of the batches; encoder: adds a frozen text encoder's states to them, if there is one.
    """

    def __init__(
        self,
        batches: Batches,
        spec: types.BatchSpec,
        mesh: Mesh,
        encoder: language.FrozenEncoder | None = None,
    ) -> None:
        self._batches, self._spec, self._mesh, self._encoder = batches, spec, mesh, encoder

    def next(self) -> Fed:
        """Return the next batch; the transfer may still be under way."""
        batch = next(self._batches)
        types.check_batch(batch, self._spec)
        position, ready = self._batches.state(), time.perf_counter()
        whose = batch["dataset"], batch["task"]["task_id"]
        batch = self._encoder(batch) if self._encoder else batch
        return Fed(sharding.put_batch(batch, self._mesh), *whose, position, ready)

    def memory(self) -> int:
        """Return the bytes that the data hold."""
        return self._batches.memory()

    def feedback(self, found: Validated, position: dict[str, Any]) -> dict[str, Any]:
        """Tell the data how well things go, and return a position with what that changes."""
        errors = {name: row["action_error"] for name, row in found.datasets.items()}
        self._batches.feedback(errors, found.tasks)
        return self._batches.state_at(position)

    def close(self) -> None:
        """Stop making batches."""
        self._batches.close()


class Loop:
    """Step, read the previous metrics, log, validate, save."""

    def __init__(
        self,
        config: Config,
        step: Step,
        feed: Feed,
        checkpoints: checkpoint.Checkpoints,
        validator: Validator | None,
        names: types.Names,
    ) -> None:
        self._config, self._step, self._feed = config, step, feed
        self._checkpoints, self._validator = checkpoints, validator
        # One name says nothing that the whole does not; hundreds are for the report, not the log.
        self._datasets, self._tasks = (
            n if 1 < len(n) <= MOST_NAMES else () for n in (names.datasets, names.tasks)
        )
        self._means, self._waited, self._last_loss = Means(), 0.0, math.nan

    def run(self, state: TrainState) -> TrainState:
        """Return the last state. Always one step ahead of the metrics that are read."""
        options, step = self._config.train, int(state.step)
        log = Metrics(
            self._config.workdir,
            step=step,
            steps=options.steps,
            batch_size=self._config.data.batch_size,
        )
        with Interrupt() as interrupt, log, ThreadPoolExecutor(1) as reader:
            pending: tuple[int, Fed, Future] | None = None
            fed: Fed | None = self._feed.next()
            while fed is not None:
                with jax.transfer_guard("disallow"):
                    state, metrics = self._step(state, fed.arrays)
                step, current = step + 1, fed
                reading = reader.submit(_read, metrics)
                done = step == options.steps or interrupt.signal is not None
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
                    position = current.position
                    if validates:
                        found = self._validator(state.policy_params())
                        log.validation(step, {**found.datasets, **self._named(found.tasks)})
                        position = self._feed.feedback(found, position)
                    if done or step % options.checkpoint_every == 0:
                        self._checkpoints.save(state, position)
            log.say(self._farewell(step, interrupt.signal))
        self._checkpoints.close()
        if interrupt.signal is not None and step < options.steps:
            raise SystemExit(128 + interrupt.signal)
        return state

    def _named(self, tasks: Mapping[str, float]) -> dict[str, dict[str, float]]:
        return {k: {"action_error": v} for k, v in tasks.items() if k and k in self._tasks}

    def _validates(self, step: int) -> bool:
        options = self._config.train
        due = options.validate_every and step % options.validate_every == 0
        return self._validator is not None and bool(due or step == options.steps)

    def _digest(
        self, log: Metrics, step: int, fed: Fed, reading: Future, *, next_ready: float
    ) -> None:
        """Take in the metrics of a step; next_ready: when the batch after it was there."""
        metrics, finished = reading.result()
        self._waited += max(0.0, next_ready - finished)
        scalars = {k: float(v) for k, v in metrics.items() if v.ndim == 0}
        self._check_finite(step, scalars)
        self._means.add(scalars)
        self._add_per_name(metrics, fed)
        log.advance()
        if step % self._config.train.log_every == 0 or step == self._config.train.steps:
            log.train(step, self._means.take(), self._waited, self._feed.memory())
            self._waited = 0.0

    def _add_per_name(self, metrics: Mapping[str, np.ndarray], fed: Fed) -> None:
        """Take in the losses, and the use of experts, of each dataset and of each task."""
        for of, names in ((fed.dataset, self._datasets), (fed.task, self._tasks)):
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

    def _check_finite(self, step: int, scalars: Mapping[str, float]) -> None:
        bad = {k: v for k, v in scalars.items() if not math.isfinite(v)}
        if bad:
            found = ", ".join(f"{k} is {v}" for k, v in bad.items())
            saved = self._checkpoints.latest
            kept = f"Checkpoint {saved} is intact" if saved else "No checkpoint was due yet"
            options = self._config.optim
            raise FloatingPointError(
                f"{found} at step {step}; the loss was {self._last_loss:.4g} at the step before. "
                f"{kept} in {self._config.workdir}. Often: a learning rate too high, with "
                f"optim.learning_rate {options.learning_rate:g} and warmup {options.warmup}; no "
                f"clipping, with optim.clip {options.clip:g}; or values like that in the data"
            )
        self._last_loss = scalars["loss"]

    def _farewell(self, step: int, signum: int | None) -> str:
        workdir, steps = self._config.workdir, self._config.train.steps
        if step == steps:
            return f"trained {steps} steps; the run is in {workdir}"
        stopped = f"stopped by {signal.Signals(signum).name} and saved at step {step} of {steps}"
        return f"{stopped}; the same command resumes {workdir}"


class Interrupt:
    """Notes the first Ctrl-C or SIGTERM instead of dying from it; the second one is as usual."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signal = signum
        self.__exit__()


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
