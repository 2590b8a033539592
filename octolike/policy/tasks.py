"""TaskEncoder: an instruction, goal images or a task id to the `task` part of a batch."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from octolike import types
from octolike.config import Config, build_component, unknown
from octolike.images import resize
from octolike.model import language
from octolike.policy.observations import (
    IMAGE,
    check_image,
    image_shapes,
    set_present,
    user_level,
)
from octolike.policy.sampler import ActionSampler
from octolike.text import TOKENIZERS, TableTokenizer
from octolike.train.checkpoint import Run


class Task(NamedTuple):
    """A task for the network: made once by `Policy.create_task`, used at every step.

    instruction: as given, "" without one; inputs: the `task` part of the batch contract without
    batch axis (token ids and, with a frozen text encoder, its states, so that both are computed
    once).
    """

    instruction: str
    inputs: dict[str, Any]


class TaskEncoder:
    """Encodes tasks for one network.

    Attributes:
        conditioning: how training conditioned the network on its task, of 'language', 'goal' and
            'task_id'.
        goal_shapes: {image_<camera>: (height, width, 3)} of the goal images that the network reads.
    """

    def __init__(self, run: Run, sampler: ActionSampler) -> None:
        self._spec = {k: v for k, v in sampler.spec.items() if k.startswith("task.")}
        # A head per task always gets the task id: data.keep_task_id hides it from tokenizers only.
        self._needs_task_id = "task.task_id" in sampler.head_reads
        reads = sampler.tokenizer_reads
        by_head = {"task_id"} if self._needs_task_id else set()
        self.conditioning = frozenset(_conditioning(run.config, reads) | by_head)
        goals = image_shapes(run.spec, "task") if "goal" in self.conditioning else {}
        self.goal_shapes = {k: v for k, v in goals.items() if f"task.{k}" in reads}
        self._task_ids = run.names.tasks if "task_id" in self.conditioning else ()
        self._resize, self._tasks = run.config.data.resize, run.names.tasks
        self._is_exclusive, self._is_both_reported = run.config.data.exclusive, False
        self._tokenizer = self._encoder = None
        if "language" in self.conditioning:
            settings = dataclasses.asdict(run.config.model)
            self._tokenizer = build_component(TOKENIZERS, run.config.data.text, "data.text")
            language.check_vocabulary(settings, self._tokenizer.vocabulary)
            self._encoder = language.frozen_encoder(settings)

    def encode(
        self,
        instruction: str | None,
        goal_images: Mapping[str, np.ndarray] | None,
        task_id: str | None,
        vector: np.ndarray | None = None,
    ) -> Task:
        """Return the task; see `Policy.create_task`."""
        inputs = jax.tree.map(lambda x: x[0], types.zeros(self._spec, 1).get("task", {}))
        if vector is not None:
            self._set_vector(inputs, vector)
        elif instruction is not None:
            self._set_language(inputs, instruction)
        elif self._encoder:  # as in training; an instruction_vector reads it
            self._set_words(inputs, "")
        for camera, image in (goal_images or {}).items():
            self._set_goal(inputs, camera, image)
        if task_id is not None:
            self._set_task_id(inputs, task_id)
        given = instruction if vector is None else vector
        self._check_complete(given, goal_images, task_id)
        if self._is_exclusive and given is not None and goal_images:
            self._report_both()
        return Task(instruction or "", inputs)

    def decode(self, ids: np.ndarray, instruction: str) -> str:
        """Return the words of ids [L] of a subtask; −1: no word."""
        if self._tokenizer is None:
            return ""
        texts = (*self._tasks, instruction)
        return self._tokenizer.decode([i for i in ids.tolist() if i >= 0], texts)

    def with_states(self, task: types.Batch) -> types.Batch:
        """Return the `task` part of a batch with the states of a frozen text encoder, if any."""
        if self._encoder and "states" not in task["language"]:
            return self._encoder({"task": task})["task"]
        return task

    def _report_both(self) -> None:
        """Warn once of an instruction together with a goal image, which training never showed."""
        if self._is_both_reported:
            return
        self._is_both_reported = True
        warnings.warn(
            "the task has an instruction and a goal image, but this policy was trained on one or "
            "the other, never on both (data.exclusive); give only one of them",
            stacklevel=user_level(),
        )

    def _check_complete(self, instruction: Any, goal_images: Any, task_id: Any) -> None:
        """Raise ValueError if the network needs a conditioning that was not given."""
        arguments = self._arguments()
        if arguments and instruction is None and not goal_images and task_id is None:
            raise ValueError(
                f"the task lacks {next(iter(arguments))}: this policy needs "
                f"create_task({' or '.join(arguments.values())})"
            )
        if self._needs_task_id and task_id is None:
            raise ValueError(
                "the task lacks a task id, by which this policy chooses its head: call "
                f"create_task(task_id=…) with one of {', '.join(self._task_ids)}"
            )

    def _arguments(self) -> dict[str, str]:
        """Return {kind of conditioning of the network: the argument of `create_task`}."""
        arguments = {
            "an instruction": "instruction=…" if self._tokenizer else "",
            "a goal image": "goal_images={…}" if self.goal_shapes else "",
            "a task id": "task_id=…" if self._task_ids else "",
        }
        return {name: argument for name, argument in arguments.items() if argument}

    def _not_trained(self, argument: str, conditioning: str) -> ValueError:
        arguments = self._arguments()
        accepted = " or ".join(arguments.values()) if arguments else "no task at all"
        return ValueError(
            f"{argument} was given, but this policy was trained without {conditioning}; it takes "
            f"{accepted}"
        )

    def _set_language(self, inputs: dict[str, Any], instruction: str) -> None:
        if not (isinstance(instruction, str) and instruction.strip()):
            raise ValueError(f"the instruction is {instruction!r}; expected a sentence")
        if self._tokenizer is None:
            raise self._not_trained("an instruction", "language")
        self._set_words(inputs, instruction)
        set_present(inputs, "language", np.True_)

    def _set_words(self, inputs: dict[str, Any], text: str) -> None:
        assert self._tokenizer is not None
        ids, mask = self._tokenizer.encode([text])
        inputs["language"] = {
            "ids": np.asarray(ids[0], np.int32),
            "mask": np.asarray(mask[0], bool),
        }
        if self._encoder:
            inputs["language"]["states"] = self._encoder.states(ids, mask)[0]

    def _set_vector(self, inputs: dict[str, Any], vector: np.ndarray) -> None:
        if not isinstance(self._tokenizer, TableTokenizer) or self._encoder is None:
            raise self._not_trained("a vector", "given vectors")
        shape, dtype = self._spec[language.STATES]
        value = np.asarray(vector)
        if value.shape != shape and (1, *value.shape) != shape:
            raise ValueError(f"the vector has shape {value.shape}; expected {shape}")
        if value.dtype.kind not in "fiu" or not np.isfinite(value).all():
            raise ValueError(f"the vector is {value.dtype}, or not finite; expected finite numbers")
        inputs["language"] = {
            "ids": np.zeros(shape[0], np.int32),
            "mask": np.ones(shape[0], bool),
            "states": value.reshape(shape).astype(np.dtype(dtype)),
        }
        set_present(inputs, "language", np.True_)

    def _set_goal(self, inputs: dict[str, Any], camera: str, image: np.ndarray) -> None:
        key = IMAGE + camera
        if not self.goal_shapes:
            raise self._not_trained(f"a goal image {camera!r}", "goals")
        if key not in self.goal_shapes:
            cameras = [name.removeprefix(IMAGE) for name in self.goal_shapes]
            raise ValueError(unknown("camera of a goal image", camera, cameras))
        image = check_image(f"goal image {camera!r}", image, (3,))
        height, width, _ = self.goal_shapes[key]
        inputs[key] = resize(image, height, width, self._resize)
        set_present(inputs, key, np.True_)

    def _set_task_id(self, inputs: dict[str, Any], task_id: str) -> None:
        if not self._task_ids:
            raise self._not_trained(f"the task id {task_id!r}", "task ids")
        if task_id not in self._task_ids:
            raise ValueError(unknown("task id", task_id, self._task_ids))
        inputs["task_id"] = np.int32(self._task_ids.index(task_id))
        set_present(inputs, "task_id", np.True_)


def _conditioning(config: Config, reads: set[str]) -> set[str]:
    """Return the conditionings that the tokenizers read and that training did not always drop."""
    probabilities = {
        "language": config.data.keep_language,
        "goal": config.data.keep_goal,
        "task_id": config.data.keep_task_id,
    }
    prefixes = {"language": "task.language.", "goal": f"task.{IMAGE}", "task_id": "task.task_id"}
    return {
        name
        for name, prefix in prefixes.items()
        if probabilities[name] > 0 and any(key.startswith(prefix) for key in reads)
    }
