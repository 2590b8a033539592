"""Actions between training steps: validation, success, figures, feedback, checkpoints.

A hook is an object with `due(step, last)` and `call(event)`. The loop calls the hooks that are due
in this order, after it has read the metrics of the step:

    1. ValidationHook    held-out loss and action error
    2. SuccessHook       success rates in the simulator
    3. FeedbackHook      validation errors or success rates, for adaptive sampling weights
    4. CheckpointHook    the state and the position in the data, which includes the feedback
    5. ChunkFigureHook   a figure of predicted action chunks; last, since drawing may fail

Hooks 2, 3 and 5 are due with the validation and use its result.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from octolike import files, types
from octolike.config import Config, TrainConfig
from octolike.pictures import PictureAttempts
from octolike.train import chunk_figures, retention, sharding
from octolike.train.checkpoint_store import CheckpointStore
from octolike.train.device_feeder import DeviceFeeder
from octolike.train.lease import RunLease
from octolike.train.metrics import MetricsLogger
from octolike.train.metrics_reader import logged_names
from octolike.train.state import Params, TrainState
from octolike.train.validation import ValidationResult, Validator

# (parameters of the policy, step) -> {task: success rate}
SuccessFn = Callable[[Params, int], dict[str, float]]


@dataclasses.dataclass
class StepEvent:
    """The input of hooks; later hooks use the results that earlier ones set.

    Attributes:
        step: number of steps done.
        state: the state after them.
        position: the position in the data after them.
        log: the run's log.
        validation: the result of a validation at this step.
        measured: False if the success rates could not be measured.
    """

    step: int
    state: TrainState
    position: dict[str, Any]
    log: MetricsLogger
    validation: ValidationResult | None = None
    measured: bool = True

    @functools.cached_property
    def policy_params(self) -> Params:
        """The parameters of the policy: averaged if the run averages, with LoRA merged."""
        return self.state.policy_params()


class Hook(Protocol):
    """An action between two steps."""

    def due(self, step: int, last: bool) -> bool:
        """Return whether to call after `step` steps; last: no step of this process follows."""

    def call(self, event: StepEvent) -> None:
        """Act."""


class BeforeHook(Protocol):
    """An action before a step."""

    def due(self, step: int) -> bool:
        """Return whether to call after `step` steps, before the next one."""

    def call(self, step: int, state: TrainState, batch: types.Batch) -> None:
        """Act, with the batch of the next step, on the devices."""

    def close(self) -> None:
        """End an unfinished action, such as a trace."""


def call(hooks: Sequence[Hook], event: StepEvent) -> None:
    """Call hooks in order. The event, which may hold a merged copy of the model, ends with it."""
    for hook in hooks:
        hook.call(event)


class ValidationHook:
    """Validates every train.validate_every steps and after the final step, and logs the result."""

    def __init__(self, validator: Validator, options: TrainConfig, tasks: tuple[str, ...]) -> None:
        """tasks: those with a log entry of their own."""
        self._validator, self._options, self._tasks = validator, options, tasks

    def due(self, step: int, last: bool) -> bool:
        """Return whether validation is due; an interruption alone does not make it due."""
        every, steps = self._options.validate_every, self._options.steps
        return step == steps or bool(every and step % every == 0)

    def call(self, event: StepEvent) -> None:
        """Validate and log."""
        result = event.validation = self._validator(event.policy_params)
        tasks = {k: {"action_error": v} for k, v in result.tasks.items() if k and k in self._tasks}
        event.log.validation(event.step, {**result.datasets, **tasks})


class SuccessHook:
    """Measures success rates at each validation, and logs them.

    A simulator that fails does not end the run: the sampling weights stay, and a line is printed.
    """

    def __init__(self, measure: SuccessFn, validation: ValidationHook) -> None:
        self._measure, self.due = measure, validation.due
        self._failures = 0

    def call(self, event: StepEvent) -> None:
        """Measure, log, and add the rates to the validation result."""
        assert event.validation is not None
        try:
            success = self._measure(event.policy_params, event.step)
        except Exception as error:  # of a simulator: anything
            self._failures += 1
            event.measured = False
            print(
                f"success at step {event.step} was not measured ({files.cause(error)}); the "
                f"sampling weights stay, and training continues (failure {self._failures})",
                file=sys.stderr,
            )
            return
        event.validation = dataclasses.replace(event.validation, success=success)
        event.log.validation(event.step, {k: {"success": v} for k, v in success.items()})


class ChunkFigureHook:
    """Draws predicted and demonstrated action chunks at each validation."""

    def __init__(self, workdir: str, validation: ValidationHook) -> None:
        self._workdir, self.due = workdir, validation.due
        self._attempts = PictureAttempts()

    def call(self, event: StepEvent) -> None:
        """Draw."""
        if sharding.is_first():
            assert event.validation is not None
            self._attempts.draw(
                f"the figure of step {event.step}",
                chunk_figures.save_figure,
                event.validation.chunks,
                event.step,
                self._workdir,
            )


class FeedbackHook:
    """Gives the validation result to the data, for adaptive sampling weights."""

    def __init__(self, feeder: DeviceFeeder, validation: ValidationHook) -> None:
        self._feeder, self.due = feeder, validation.due

    def call(self, event: StepEvent) -> None:
        """Give the result, and add it to the position; nothing if success was not measured."""
        assert event.validation is not None
        if not event.measured:
            return
        event.position = self._feeder.feedback(event.validation, event.position)


class CheckpointHook:
    """Saves every train.checkpoint_every steps and after the last step of this process."""

    def __init__(self, checkpoints: CheckpointStore, every: int, lease: RunLease | None) -> None:
        self._checkpoints, self._every, self._lease = checkpoints, every, lease

    def due(self, step: int, last: bool) -> bool:
        """Return whether a checkpoint is due."""
        return last or step % self._every == 0

    def call(self, event: StepEvent) -> None:
        """Start to save, with the scores of a validation at this step, if the run is still ours."""
        scores: Mapping[str, float] | None = None
        if event.validation is not None:
            scores = retention.mean_scores(event.validation.datasets)
        if self._lease:
            self._lease.check()
        self._checkpoints.save(event.state, event.position, scores)


def with_validation(
    config: Config,
    validator: Validator,
    names: types.Names,
    feeder: DeviceFeeder,
    success: SuccessFn | None,
    checkpoint: CheckpointHook,
) -> list[Hook]:
    """Return hooks 1 to 5; success: None for no closed-loop episodes."""
    validation = ValidationHook(validator, config.train, logged_names(names.tasks))
    closed_loop = [SuccessHook(success, validation)] if success else []
    figure = ChunkFigureHook(config.workdir, validation)
    return [validation, *closed_loop, FeedbackHook(feeder, validation), checkpoint, figure]
