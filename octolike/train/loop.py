"""train(): one loop, for every script.

How training starts:

    1. the directory: empty, or it holds this very run (which is then resumed), else an error
    2. the devices, and how a batch is sharded over them
    3. the model's parameters: their table, and the matches of each pattern (frozen, LoRA)
    4. config, embodiments, batch spec, names and versions are written
    5. the state: resumed, initialised from another run, or from scratch
    6. the data, from the saved position
    7. the hooks: gradient comparison, validation, success, feedback, checkpoints, figures
    8. the step, compiled once, with its memory plan

The loop dispatches a step, reads the metrics of the previous one, and calls the hooks that are due.
The position in the data is saved with the parameters, so a resumed run equals an uninterrupted one
bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import signal
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn

from octolike import files, types
from octolike.config import Config, build_component, plugins, resolve
from octolike.model import language
from octolike.model.network import build_network
from octolike.text import TOKENIZERS
from octolike.train import (
    checkpoint,
    conflicts,
    device_flops,
    gradients,
    group_gradients,
    hooks,
    initial_state,
    optimizer,
    pcgrad,
    profile,
    retention,
    sharding,
    wandb_logger,
)
from octolike.train import state as states
from octolike.train.checkpoint_store import CheckpointStore
from octolike.train.device_feeder import DeviceBatch, DeviceFeeder
from octolike.train.gradients import GradientFn
from octolike.train.interrupt import Interrupt
from octolike.train.lease import RunLease, own_run
from octolike.train.metrics import MetricsLogger, SilentMetrics
from octolike.train.metrics_reader import MetricsReader
from octolike.train.state import TrainState
from octolike.train.step import Step, abstract_batch, compile_step, make_step, training_loss
from octolike.train.validation import Validator


def train(
    config: Config,
    data: types.DataSource,
    *,
    success: hooks.SuccessFn | None = None,
    model: nn.Module | None = None,
) -> TrainState:
    """Train until `config.train.steps` and return the last state.

    Args:
        config: the run; everything is written to `config.workdir`.
        data: the batches, and the names and embodiments they refer to.
        success: (policy parameters, step) -> {task: success rate}, measured at each validation;
            adaptive sampling weights then follow it instead of the validation errors.
        model: the network; by default the one that `config.model` describes.

    Raises:
        SystemExit: 130 after Ctrl-C, 143 after SIGTERM, once the state is saved.
        ConfigError: incompatible settings, a directory that holds another run, a pattern without a
            match.
        RunError: a directory that belongs to another running process.
        FloatingPointError: a loss or gradient that is not finite.
    """
    config.check()
    files.check_writable(config.workdir, "config.workdir")
    sharding.initialize(config.train)
    plugins.load_of(config)
    config = resolve(config)
    if config.train.wandb:
        wandb_logger.import_wandb(config.train.wandb)
    # Refused before anything is written, and checked again by the owner.
    checkpoint.check_same_run(config, data.embodiments, data.spec, data.names)
    with own_run(config.workdir) as lease:
        return _train_as_owner(config, data, lease, success, model)


def _train_as_owner(
    config: Config,
    data: types.DataSource,
    lease: RunLease | None,
    success: hooks.SuccessFn | None,
    model: nn.Module | None,
) -> TrainState:
    """Train in a directory that belongs to this process; see `train`."""
    names, validation = data.names, data.validation(sharding.process())
    retention.check_keep_best(config, bool(validation))
    # 1. The directory.
    resumable = checkpoint.check_same_run(config, data.embodiments, data.spec, names)
    if not resumable and (files.as_path(config.workdir) / "config.json").exists():
        print(f"{config.workdir} holds a start that never trained: its files are replaced")
    # 2. The devices.
    mesh = sharding.make_mesh(config.train.fsdp)
    sharding.check_batch_size(config.data.batch_size, mesh)
    # 3. The parameters.
    local_config = checkpoint.readable(config)
    settings = dataclasses.asdict(local_config.model)
    _check_vocabulary(local_config, settings)
    spec = language.extend_spec(settings, data.spec)
    model = model or build_network(settings, spec, names)
    init_key, step_key, validation_key = jax.random.split(jax.random.key(config.seed), 3)
    init, frozen = initial_state.make_init(model, spec, config.optim)
    shapes = jax.eval_shape(init, init_key)
    print(states.summarize_params(shapes, frozen))
    if config.train.init_from:
        initial_state.check_reinitialized(config.train.reinit, frozen)
    # 4. The files.
    sharding.barrier("before the run's files are written")
    if sharding.is_first():
        checkpoint.write_run_files(config, data.embodiments, data.spec, names)
        table = states.describe_params(shapes, frozen) + "\n"
        files.write_text(files.as_path(config.workdir) / "parameters.txt", table)
    sharding.barrier("after the run's files are written")
    # 5. The state.
    tx, position = optimizer.make_optimizer(config.optim, config.train.steps), None
    retained = config.train.keep, config.train.keep_every, config.train.keep_best
    checkpoints = CheckpointStore(config.workdir, *retained)
    initializer = initial_state.StateInitializer(tx, frozen, config.optim, mesh)
    abstract_state = initializer.abstract(shapes)
    batch = abstract_batch(spec, config.data.batch_size)
    print(sharding.describe(abstract_state, batch, mesh))
    if resumable and checkpoints.latest is not None:
        state, position = checkpoints.restore(abstract_state)
        print(f"resuming {config.workdir} at step {int(state.step)}")
    else:
        loaded = initial_state.load_params(config, settings, shapes, names, data.embodiments)
        state = initializer.create(init, init_key, loaded)
    if int(state.step) >= config.train.steps:
        print(f"all {config.train.steps} steps are done; raise train.steps to continue")
        return state
    # 6. The data.
    encoder = language.frozen_encoder(settings)
    if encoder and hasattr(data, "instructions"):  # else they are encoded as batches bring them
        print(encoder.prepare(*data.instructions()))
    batches = data.train(position, sharding.process())
    feeder = DeviceFeeder(batches, data.spec, mesh, encoder)
    with contextlib.closing(feeder):
        # 7. The hooks.
        before: list[hooks.BeforeHook] = []
        save = hooks.CheckpointHook(checkpoints, config.train.checkpoint_every, lease)
        after: list[hooks.Hook] = [save]
        span = profile.parse(config.train.profile)
        if span and sharding.is_first():
            before.append(profile.ProfileHook(span, config.workdir, int(state.step)))
        if config.train.conflicts_every:
            loss_fn = functools.partial(training_loss, model, config.train.augment)
            start = int(state.step)
            before.append(conflicts.GradientComparer(loss_fn, step_key, config, names, start))
        if validation:
            validator = Validator(
                model,
                validation,
                data.embodiments,
                data.spec,
                names.tasks,
                encoder=encoder,
                batches=config.train.validation_batches,
                mesh=mesh,
                key=validation_key,
            )
            after = hooks.with_validation(config, validator, names, feeder, success, save)
        # 8. The step.
        step = make_step(model, tx, config, step_key, choose_gradient_fn(config, names))
        if sharding.process()[1] > 1:
            spec = {**spec, sharding.SIGNAL: ((), "int32")}
        step, costs = compile_step(step, state, spec, config.data.batch_size, mesh)
        costs["parameters"] = sum(x.size for x in jax.tree.leaves(shapes))
        if sharding.is_first():
            files.write_json(files.as_path(config.workdir) / checkpoint.COSTS, costs, indent=None)
        flops = costs["flops_per_step"]
        loop = Loop(config, step, feeder, checkpoints, names, before, after, flops)
        return loop.run(state)


def choose_gradient_fn(config: Config, names: types.Names) -> GradientFn:
    """Return the gradient function of a config: PCGrad over groups, accumulation, or plain."""
    gradient_fn: GradientFn = gradients.whole_batch
    if config.optim.surgery:
        groups = group_gradients.group_names(config.train.groups, names)
        gradient_fn = group_gradients.per_group(config.train.groups, len(groups))
    if config.optim.accumulate > 1:
        gradient_fn = gradients.accumulated(gradient_fn, config.optim.accumulate)
    if config.optim.surgery:
        gradient_fn = pcgrad.with_pcgrad(gradient_fn)
    return gradient_fn


class Loop:
    """Step, read the metrics of the previous step, call the hooks that are due."""

    def __init__(
        self,
        config: Config,
        step: Step,
        feeder: DeviceFeeder,
        checkpoints: CheckpointStore,
        names: types.Names,
        before: Sequence[hooks.BeforeHook],
        after: Sequence[hooks.Hook],
        flops: float = math.nan,
    ) -> None:
        """Prepare.

        Args:
            config: the run's config.
            step: the compiled step.
            feeder: supplies the batches.
            checkpoints: the run's checkpoints; closed at the end.
            names: names of datasets and tasks, for the log.
            before: called before a step, with its batch.
            after: called after a step, in this order.
            flops: operations of a step on all devices, for the log.
        """
        self._config, self._step, self._feeder = config, step, feeder
        self._checkpoints, self._names = checkpoints, names
        self._before, self._after, self._flops = before, after, flops

    def run(self, state: TrainState) -> TrainState:
        """Return the last state. Dispatch is always one step ahead of the metrics that are read."""
        step, steps, signum = int(state.step), self._config.train.steps, None
        several = sharding.process()[1] > 1  # they agree through the metrics of a step
        with (
            Interrupt() as interrupt,
            self._open_log(step) as log,
            self._checkpoints,
            MetricsReader(
                self._config, self._names, self._feeder, self._checkpoints, log
            ) as reader,
        ):
            batch: DeviceBatch | None = self._feeder.next()
            while batch is not None:
                for hook in self._before:
                    if hook.due(step):
                        with log.paused():
                            hook.call(step, state, batch.arrays)
                with jax.transfer_guard("disallow"):
                    state, metrics = self._step(state, batch.arrays)
                step += 1
                reader.submit(step, batch, metrics)
                signum = reader.signal if several else interrupt.signal
                last = step == steps or signum is not None
                # while the device computes
                next_batch = None if last else self._feeder.next(interrupt.signal)
                reader.read_previous(next_ready=batch.ready)
                due = [hook for hook in self._after if hook.due(step, last)]
                if due:
                    # All metrics are read first: a checkpoint never holds a non-finite state.
                    reader.read_all(next_ready=next_batch.ready if next_batch else 0.0)
                    with log.paused():
                        hooks.call(due, hooks.StepEvent(step, state, batch.position, log))
                batch = next_batch
            for hook in self._before:
                hook.close()
            self._checkpoints.wait()  # the last line states that the run is saved
            log.write(self._farewell(step, signum))
        if signum is not None and step < steps:
            raise SystemExit(128 + signum)
        return state

    def _open_log(self, step: int) -> MetricsLogger:
        logger = MetricsLogger if sharding.is_first() else SilentMetrics
        peak = device_flops.peak_flops(jax.devices()[0].device_kind)
        return logger(
            self._config.workdir,
            step=step,
            steps=self._config.train.steps,
            batch_size=self._config.data.batch_size,
            flops=self._flops,
            peak=peak and peak * jax.device_count(),
            wandb=self._config.train.wandb,
        )

    def _farewell(self, step: int, signum: int | None) -> str:
        workdir, steps = self._config.workdir, self._config.train.steps
        if step == steps:
            return f"trained {steps} steps; the run is in {workdir}"
        assert signum is not None
        stopped = f"stopped by {signal.Signals(signum).name} and saved at step {step} of {steps}"
        return f"{stopped}; the same command resumes {workdir}"


def _check_vocabulary(config: Config, model: Mapping[str, Any]) -> None:
    """Raise ConfigError if the text tokenizer has ids beyond the text encoder's vocabulary."""
    if language.source(model):
        text = build_component(TOKENIZERS, config.data.text, "data.text")
        language.check_vocabulary(model, text.vocabulary)
