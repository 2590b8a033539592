"""Check of the policy's inputs and actions on frames of a dataset, against training.

Frames that reach the policy as on a robot must give the network the inputs that training's
pipeline makes of them, bit for bit; and the error of the returned actions, in the robot's units,
must equal the validation error on the same frames.

Sampling noise differs between the two, so errors agree if they differ by less than `SIGMAS`
standard deviations of that noise; for heads without noise, by less than `ROUNDING`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from octolike import types
from octolike.embodiment import Embodiment
from octolike.evaluation import figures
from octolike.evaluation.meaning_check import MeaningCheck
from octolike.policy import Policy, Task
from octolike.tables import text_table
from octolike.train.checkpoint import Run
from octolike.train.validation import validate_run

ROUNDING = 1e-3  # normalised units; compilation for another batch size rounds differently
UNIT_TOLERANCE = 1e-5  # of an action's scale; float32 round trip
TRIGONOMETRY = 1e-6  # numpy's and TensorFlow's sines round differently
TRANSFORM_TOLERANCE = 1e-3  # the same of a representation: rotations, and sums of a chunk
SIGMAS = 4.5
SAMPLES = 4  # chunks per frame, to estimate the noise


class FrameBatch(Protocol):
    """The fields needed of frames: octolike.data.pipeline.recorded_frames.SampledFrames."""

    observations: Sequence[Mapping[str, np.ndarray | None]]
    conditionings: Sequence[Any]
    actions: np.ndarray
    places: Sequence[str]
    batch: types.Batch


@dataclass(frozen=True)
class InputDifference:
    """The first place at which an input of the network differs, and the number of such values."""

    key: str
    place: str
    policy: str
    training: str
    count: int
    of: int


@dataclass
class FrameComparison:
    """The comparison of policy and training on the frames of one dataset.

    keys: {key: number of compared values}; different: {key: its first difference}; unread: keys
    that the network does not read; names: of the A action dimensions. errors: per batch, float
    [n, SAMPLES, H, A], of the policy's chunks in normalised units; masks: bool [n, H, A]. units:
    largest difference between recorded actions and those of the batch, as a share
    of each dimension's scale; clipped: share of action values beyond the record's bounds, which no
    policy can learn; validation: the action error of validation; tolerance: of units; meaning:
    sides and ranges.
    """

    dataset: str
    keys: dict[str, int] = field(default_factory=dict)
    different: dict[str, InputDifference] = field(default_factory=dict)
    unread: set[str] = field(default_factory=set)
    names: tuple[str, ...] = ()
    errors: list[np.ndarray] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)
    units: float = 0.0
    clipped: float = 0.0
    validation: float = float("nan")
    tolerance: float = UNIT_TOLERANCE
    meaning: MeaningCheck = field(default_factory=MeaningCheck)

    @property
    def frames(self) -> int:
        """The number of compared frames."""
        return sum(map(len, self.masks))

    @property
    def error(self) -> float:
        """The mean absolute error of the policy's valid actions, in normalised units."""
        errors, mask = self._arrays()
        return float((errors.mean(axis=1) * mask).sum() / mask.sum())

    @property
    def allowed(self) -> float:
        """The largest difference between `error` and `validation` that noise explains."""
        errors, mask = self._arrays()
        per_frame = (errors * mask[:, None]).sum(axis=(2, 3))
        noise = np.sqrt(per_frame.var(axis=1, ddof=1).sum()) / mask.sum()
        return ROUNDING + SIGMAS * float(noise) * (2 / SAMPLES) ** 0.5

    @property
    def faults(self) -> list[str]:
        """A sentence for each disagreement between policy and training."""
        sentences = [
            f"{self.dataset}: {d.key}, first at {d.place}: the policy has {d.policy}, training "
            f"{d.training} ({d.count:,} of {d.of:,} values)"
            for d in self.different.values()
        ]
        if not abs(self.error - self.validation) <= self.allowed:
            sentences.append(
                f"{self.dataset}: the action error is {self.error:.4f} as on a robot, "
                f"{self.validation:.4f} in validation; noise explains {self.allowed:.4f}"
            )
        if not self.units <= self.tolerance:
            sentences.append(
                f"{self.dataset}: un-normalised actions differ from the recorded ones by "
                f"{self.units:.2g} of their scale; rounding explains {self.tolerance:.0e}"
            )
        return sentences + [f"{self.dataset}: {x}" for x in self.meaning.faults]

    def error_per(self, axis: str) -> np.ndarray:
        """Return the error per 'dimension' [A] or per 'step' of the chunk [H]."""
        errors, mask = self._arrays()
        axes = (0, 1) if axis == "dimension" else (0, 2)
        total, count = (errors.mean(axis=1) * mask).sum(axis=axes), mask.sum(axis=axes)
        return total / np.maximum(count, 1)

    def to_json(self) -> dict[str, Any]:
        """Return plain data for check_policy.json."""
        return {
            "dataset": self.dataset,
            "frames": self.frames,
            "equal": sorted(self.keys.keys() - self.different.keys()),
            "different": [vars(d) for d in self.different.values()],
            "not_read": sorted(self.unread),
            "action_error": self.error,
            "action_error_in_validation": self.validation,
            "may_differ_by": self.allowed,
            "error_per_dimension": dict(
                zip(self.names, self.error_per("dimension").tolist(), strict=True)
            ),
            "actions_there_and_back": self.units,
            "clipped": self.clipped,
            **self.meaning.to_json(),
        }

    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return np.concatenate(self.errors), np.concatenate(self.masks)


def compare_frames(
    policy: Policy,
    dataset: str,
    batches: Iterable[FrameBatch],
    run: Run,
    on_batch: Callable[[], Any] = lambda: None,
) -> FrameComparison:
    """Compare the policy, called as on a robot, with training's pipeline and validation.

    on_batch: called after each batch.
    """
    record = policy.embodiment
    comparison = FrameComparison(dataset, names=record.learned.names)
    if record.transform is not None:
        comparison.tolerance = TRANSFORM_TOLERANCE
    training_batches, clipped = [], []
    width = len(comparison.names)
    _, scale = record.affine("action")
    for number, frames in enumerate(batches):
        training_batches.append(frames.batch)
        observations = [{k: o[k] for k in policy.observation_keys} for o in frames.observations]
        tasks = [create_task(policy, conditioning) for conditioning in frames.conditionings]
        compare_inputs(comparison, policy, observations, tasks, frames)
        n = len(tasks)
        first = number * SAMPLES * n
        states = policy.states(observations)
        inputs = policy.inputs(observations, tasks)
        normalized = np.stack(
            [
                policy.sample_normalized(*inputs, range(k, k + n))
                for k in range(first, first + SAMPLES * n, n)
            ],
            axis=1,
        )[..., :width]
        samples = np.stack([policy.unnormalize(x, states) for x in normalized.swapaxes(0, 1)], 1)
        repeated = None if states is None else states[:, None]
        comparison.meaning.add(record, frames, samples, record.represent(samples, repeated))
        batch_actions = frames.batch["action"][:, -1, :, :width]
        mask = frames.batch["action_mask"][:, -1, :, :width]
        comparison.errors.append(np.abs(normalized - batch_actions[:, None]))
        comparison.masks.append(mask)
        learned = record.represent(frames.actions, states)
        there_and_back = record.represent(policy.unnormalize(batch_actions, states), states)
        difference = np.abs(there_and_back - learned) / scale
        is_clipped = clipped_actions(record, learned) & mask
        clipped.append(is_clipped.sum() / mask.sum())
        largest = float(np.where(mask & ~is_clipped, difference, 0).max())
        comparison.units = max(comparison.units, largest)
        on_batch()
    comparison.clipped = float(np.mean(clipped))
    # Validation draws new noise for each repetition of the batches.
    validation = validate_run(run, {dataset: training_batches * SAMPLES})
    comparison.validation = validation.datasets[dataset]["action_error"]
    return comparison


def create_task(policy: Policy, conditioning: Any) -> Task:
    """Return the policy's task of a frame, limited to the conditioning used in training."""
    goal = {c: x for c, x in conditioning.goal.items() if f"image_{c}" in policy.goal_shapes}
    has_task_id = "task_id" in policy.conditioning and conditioning.task
    instruction = (conditioning.instruction or None) if "language" in policy.conditioning else None
    return policy.create_task(
        instruction=instruction,
        goal_images=goal or None,
        task_id=conditioning.task if has_task_id else None,
    )


def compare_inputs(
    comparison: FrameComparison,
    policy: Policy,
    observations: Sequence[Mapping[str, Any]],
    tasks: Sequence[Task],
    frames: FrameBatch,
) -> None:
    """Add the differences of the network's inputs to the comparison."""
    observation, task = policy.inputs(observations, tasks)
    policy_inputs = dict(types.flatten({"observation": observation, "task": task}))
    training_inputs = dict(types.flatten(frames.batch))
    # Subtasks are labels of training: the policy predicts its own.
    read_keys = {key for key in policy.reads if not key.startswith("task.subtask.")}
    if "task.language.states" in read_keys:  # computed from the ids by the same frozen encoder
        read_keys.add("task.language.ids")
    for key in sorted(k for k in training_inputs if k.startswith(("observation.", "task."))):
        if key not in read_keys:
            comparison.unread.add(key)
            continue
        values = training_inputs[key]
        total = comparison.keys[key] = comparison.keys.get(key, 0) + values.size
        is_turned = key == "observation.proprio" and policy.embodiment.state_transform is not None
        tolerance = TRIGONOMETRY if is_turned else 0.0
        new = first_difference(key, policy_inputs.get(key), values, frames.places, tolerance)
        if new is None:
            continue
        first = comparison.different.get(key, new)
        count = new.count + (first.count if first is not new else 0)
        merged = vars(first) | {"count": count, "of": total}
        comparison.different[key] = InputDifference(**merged)


def first_difference(
    key: str,
    policy: np.ndarray | None,
    training: np.ndarray,
    places: Sequence[str],
    tolerance: float = 0.0,
) -> InputDifference | None:
    """Return the first difference of two arrays [n, ...] in value, shape or dtype, if any.

    tolerance: largest difference of values that counts as equal.
    """
    if policy is None or policy.shape != training.shape or policy.dtype != training.dtype:
        kind = "nothing" if policy is None else f"{policy.dtype} {list(policy.shape)}"
        expected = f"{training.dtype} {list(training.shape)}"
        size = training.size
        return InputDifference(key, "the whole array", kind, expected, size, size)
    differs = policy != training
    if tolerance:
        differs = ~(np.abs(policy - training) <= tolerance)
    indices = np.argwhere(differs)
    if not len(indices):
        return None
    index = tuple(indices[0].tolist())
    place = f"{places[index[0]]}: {key.rpartition('.')[2]}{list(index[1:])}"
    values = str(policy[index]), str(training[index])
    return InputDifference(key, place, *values, len(indices), training.size)


def clipped_actions(embodiment: Embodiment, actions: np.ndarray) -> np.ndarray:
    """Return a bool array like actions: True for values that the record's bounds clip."""
    is_clipped = embodiment.is_clipped("action")
    return is_clipped & (np.abs(embodiment.normalize_action(actions)) >= 1)


def frame_table(c: FrameComparison) -> str:
    """Return the comparison as a text table with its heading."""
    rows = []
    for key, size in c.keys.items():
        d = c.different.get(key)
        rows.append((key, f"DIFFERENT: {d.count:,} of {d.of:,}" if d else f"{size:,} values equal"))
    lines = [
        f"(b) {c.frames} frames of {c.dataset}, seen by the policy as on a robot",
        text_table(rows, indent=2),
        f"  not read by the network: {', '.join(sorted(c.unread)) or 'nothing'}",
        f"  action error: {c.error:.4f} as on a robot, {c.validation:.4f} in validation; noise "
        f"explains a difference of {c.allowed:.4f}",
        f"  error of normalised and un-normalised actions: {c.units:.1e} of their scale",
    ]
    lines += [f"  {line}" for line in c.meaning.lines()]
    if c.clipped:
        lines.append(f"  clipped by the record's bounds: {c.clipped:.1%} of the action values")
    return "\n".join(lines)


def draw_errors(axis_dimensions: Any, axis_steps: Any, c: FrameComparison) -> None:
    """Draw the action error per dimension and per step of the chunk, next to validation's."""
    axis_dimensions.barh(c.names, c.error_per("dimension"), color=figures.PREDICTED)
    axis_dimensions.invert_yaxis()
    axis_dimensions.axvline(c.validation, color=figures.INK, ls="--", lw=1)
    axis_dimensions.set_title(f"{c.dataset}: error per dimension", fontsize=10)
    axis_dimensions.set_xlabel("normalised units; dashed: validation, all dimensions")
    errors = c.error_per("step")
    axis_steps.plot(range(1, len(errors) + 1), errors, "o-", color=figures.PREDICTED)
    axis_steps.axhline(c.validation, color=figures.INK, ls="--", lw=1)
    axis_steps.set_ylim(0)
    axis_steps.set_title(f"{c.dataset}: error per step of the chunk", fontsize=10)
    axis_steps.set_xlabel("step of the chunk")
