"""Policy: a trained run that acts. Raw observation and task in, robot actions out.

    policy = Policy.load("runs/quickstart")
    task = policy.create_task(instruction="lift the red cube")
    actions = policy.sample_actions({"image_primary": image, "proprio": state}, task, seed=0)

Everything is read from the run directory: the network, the cameras and their sizes, the text
tokenizer, and the embodiment record that normalises proprio and un-normalises actions. Nothing here
imports tensorflow.

The stages of a call:

    1. the keys, shapes and dtypes of the observation are checked against the run's batch spec
    2. images are resized, proprio is normalised, short histories are padded in front
    3. the examples are stacked and padded to a fixed batch size, so the network compiles once
    4. the network samples one action chunk per example; its noise depends on that seed alone
    5. padding is cut off, and the actions are un-normalised to the robot's units
"""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from octolike import ranges, types
from octolike.config import unknown
from octolike.embodiment import Embodiment
from octolike.policy.execution import (
    METHODS,
    ActionPrefix,
    check_finite,
    check_prefix,
    prefix_weights,
)
from octolike.policy.observations import ObservationEncoder, user_level
from octolike.policy.sampler import ActionSampler
from octolike.policy.tasks import Task, TaskEncoder
from octolike.train.checkpoint import Run, load_run
from octolike.train.state import Params


class PolicyParts(NamedTuple):
    """The parts that policies of one run and robot share; they do not depend on parameters."""

    embodiment: Embodiment
    observations: ObservationEncoder
    tasks: TaskEncoder
    sampler: ActionSampler


class Policy:
    """A network with its parameters and the embodiment record of one robot.

    Attributes:
        config: the run's config.
        spec: the run's batch spec.
        step: the checkpoint's step.
        embodiment: the robot's action and proprio layout with their statistics.
        batch_sizes: examples per compiled call, in ascending order; batch_size: the largest.
        window: W, frames of history.
        horizon: H, actions per chunk.
        image_shapes: {image_<camera>: (height, width, 3)} of the network's input.
        goal_shapes: the same of the goal images that the network reads.
        conditioning: how the network is conditioned on a task: 'language', 'goal', 'task_id'.
        reads: the dotted paths of a batch that the network reads.
    """

    def __init__(
        self,
        run: Run,
        embodiment: str | None = None,
        batch_size: int | Sequence[int] = 1,
        *,
        parts: PolicyParts | None = None,
    ) -> None:
        """Build the policy of a loaded run; see `load`. parts: of a policy of the same run."""
        parts = parts or _build_parts(run, embodiment, batch_size)
        self._parts, self._params = parts, parts.sampler.load(run.params)
        self._run = dataclasses.replace(run, params={})  # keeps no second copy of the parameters
        self.config, self.spec, self.step = run.config, run.spec, run.step
        self.embodiment, self.batch_sizes = parts.embodiment, parts.sampler.batch_sizes
        self.batch_size = self.batch_sizes[-1]
        self._is_delay_reported = False
        self.window, self.horizon, _ = run.spec["action"][0]
        self.image_shapes = parts.observations.image_shapes
        self.goal_shapes, self.conditioning = parts.tasks.goal_shapes, parts.tasks.conditioning
        reads = parts.sampler.tokenizer_reads | parts.sampler.head_reads
        self.reads = frozenset(reads | {"observation.timestep_mask"})
        for sentence in ranges.record_misfits(self.embodiment):
            warnings.warn(f"{sentence}, and train again", stacklevel=user_level())

    @classmethod
    def load(
        cls,
        run_dir: str | os.PathLike[str],
        embodiment: str | None = None,
        step: int | None = None,
        batch_size: int | Sequence[int] = 1,
        plugins: Sequence[str] = (),
    ) -> Policy:
        """Load the policy of a run.

        Args:
            run_dir: the directory that training wrote.
            embodiment: name of the robot; required if the run has several.
            step: the checkpoint's step; default: the newest.
            batch_size: examples per compiled call: 1 on a robot, the number of environments in a
                simulator; or several sizes; a call takes the smallest that suffices.
            plugins: files of the run that may be executed, by name or path.

        Raises:
            FileNotFoundError: the run or the checkpoint does not exist.
            ValueError: the robot is unknown, or the run has several and none was named.
            RunError: a file of the run is corrupted.
        """
        return cls(load_run(run_dir, step, plugins), embodiment, batch_size)

    @property
    def observation_keys(self) -> tuple[str, ...]:
        """The keys that an observation must have: image_<camera>, …, proprio."""
        return self._parts.observations.keys

    @property
    def gripper(self) -> tuple[bool, ...]:
        """Per action dimension: True for a target that must not be averaged or scaled.

        These are unnormalised and two-valued targets; the latter only in records since format 3.
        """
        layout, s = self.embodiment.action, self.embodiment.action_statistics
        two_valued: set[str] = set()
        if s is not None and s.low is not None:
            names = self.embodiment.learned.names
            two_valued = {names[d] for d in np.flatnonzero(ranges.is_binary(s))}
        return tuple(
            a and (not n or name in two_valued)
            for name, a, n in zip(layout.names, layout.absolute, layout.normalized, strict=True)
        )

    @property
    def real_time(self) -> str:
        """How chunks continue a prefix: 'guided', 'trained', or '' if the head cannot."""
        sampler = self._parts.sampler
        return "trained" if sampler.trained_prefix else "guided" if sampler.is_denoising else ""

    @property
    def metadata(self) -> dict[str, Any]:
        """The description of the policy for a robot or client, as JSON data."""
        action, proprio = self.embodiment.action, self.embodiment.proprio
        shapes: dict[str, Any] = {k: list(s) for k, s in self.image_shapes.items()}
        if proprio is not None and "proprio" in self.observation_keys:
            shapes["proprio"] = [len(proprio)]
        return {
            "run": str(self.config.workdir),
            "step": self.step,
            "embodiment": self.embodiment.name,
            "robot": self.embodiment.robot,
            "control_hz": self.embodiment.control_hz,
            "gripper": self.embodiment.gripper,
            "action": {
                "names": list(action.names),
                "units": list(action.units),
                "absolute": list(action.absolute),
                "not_averaged": list(self.gripper),
            },
            "proprio": {"names": list(proprio.names), "units": list(proprio.units)}
            if "proprio" in shapes and proprio
            else None,
            "observation": shapes,
            "goal_images": {k: list(s) for k, s in self.goal_shapes.items()},
            "conditioning": sorted(self.conditioning),
            "task_ids": list(self._run.names.tasks) if "task_id" in self.conditioning else [],
            "window": self.window,
            "horizon": self.horizon,
            "real_time": self.real_time,
        }

    @property
    def parameter_count(self) -> int:
        """The number of parameters."""
        return sum(x.size for x in jax.tree.leaves(self._params))

    def untrained(self, seed: int = 0) -> Policy:
        """Return this policy with freshly initialised parameters; see `with_params`."""
        return self.with_params(self._parts.sampler.init_params(seed), step=0)

    def with_params(self, params: Params, step: int) -> Policy:
        """Return this policy with the parameters of another step, without compiling again."""
        run = dataclasses.replace(self._run, params=params, step=step)
        return type(self)(run, parts=self._parts)

    def __reduce__(self) -> Any:
        """Pickle the run with its parameters: the copy compiles for itself."""
        run = dataclasses.replace(self._run, params=jax.tree.map(np.asarray, self._params))
        return type(self), (run, self.embodiment.name, self.batch_sizes)

    def create_task(
        self,
        instruction: str | None = None,
        goal_images: Mapping[str, np.ndarray] | None = None,
        task_id: str | None = None,
        *,
        vector: np.ndarray | None = None,
    ) -> Task:
        """Return a task given by an instruction, goal images, a task id, or several of them.

        Args:
            instruction: in natural language.
            goal_images: {camera: uint8 [h, w, 3]} of the desired final scene.
            task_id: name of one of the run's tasks.
            vector: the instruction's embedding, [E] or [L, E], for a run whose instructions are
                looked up in a table of vectors (data.text is a 'table'): used instead of it.

        Raises:
            ValueError: a conditioning that the run was not trained on, or a missing one; an unknown
                task id or camera; an image of the wrong shape or dtype.
        """
        return self._parts.tasks.encode(instruction, goal_images, task_id, vector)

    def warmup(self) -> None:
        """Compile every batch size, for real-time chunking too if the head supports it.

        Otherwise the first calls compile, for seconds each.
        """
        self._parts.sampler.warmup(self._params, prefix=bool(self.real_time))

    def sample_actions(
        self,
        observation: Mapping[str, Any],
        task: Task,
        seed: int = 0,
        prefix: ActionPrefix | None = None,
    ) -> np.ndarray:
        """Return an action chunk float32 [H, A] in the robot's units; A: of this robot.

        Args:
            observation: a dict, with None for a sensor that this robot lacks.
                image_<camera>: uint8 [h, w, 3], or [w, h, w, 3] for a history of w ≤ W frames,
                    the newest last.
                proprio: float [P] or [w, P] in the robot's units.
                timestep_mask: optional bool [w], False for frames before the episode's first step.
            task: from `create_task`.
            seed: seed of the sampling noise; the same seed gives the same actions.
            prefix: actions that the chunk must continue, for real-time chunking (`real_time`).

        Raises:
            ValueError: the observation or the prefix does not fit the run's batch spec.
            ConfigError: a prefix, and a head that cannot continue it.
            FloatingPointError: the network sampled NaN or infinite actions.
        """
        return self.sample_batch([observation], [task], [seed], [prefix])[0]

    def sample_chunks(
        self, observation: Mapping[str, Any], task: Task, seeds: Sequence[int]
    ) -> np.ndarray:
        """Return a chunk per seed for one observation, float32 [K, H, A]; see `sample_actions`.

        The observation passes through the network once, only the head samples K times.
        """
        sampler, states = self._parts.sampler, self.states([observation])
        inputs, task_inputs = self.inputs([observation], [task])
        task_inputs = self._parts.tasks.with_states(task_inputs)
        arguments = self._params, inputs, task_inputs, seeds
        actions = sampler.sample(*arguments, repeats=len(seeds))
        states = None if states is None else np.repeat(states, len(seeds), axis=0)
        return self.unnormalize(actions, states)

    def subtask(self, observation: Mapping[str, Any], task: Task) -> str:
        """Return the subtask that the network predicts, "" for one that predicts none.

        For inspection: `sample_actions` needs no subtask. Arguments: as there. With hashed words,
        those that no instruction of the run contains are shown as "?".
        """
        if not self._parts.sampler.reads_subtasks:
            return ""
        inputs, task_inputs = self.inputs([observation], [task])
        ids = self._parts.sampler.subtask_ids(self._params, inputs, task_inputs)
        return self._parts.tasks.decode(ids[0], task.instruction)

    def sample_batch(
        self,
        observations: Sequence[Mapping[str, Any]],
        tasks: Sequence[Task],
        seeds: Sequence[int],
        prefixes: Sequence[ActionPrefix | None] | None = None,
    ) -> np.ndarray:
        """Return action chunks float32 [B, H, A] for B robots at once; see `sample_actions`.

        A chunk depends on its own observation, task, seed and prefix, not on the batch. B may
        differ from `batch_sizes`: the examples are padded, or split.
        """
        if not len(observations) == len(tasks) == len(seeds):
            raise ValueError(
                f"{len(observations)} observations, {len(tasks)} tasks and {len(seeds)} seeds; "
                "expected equal numbers"
            )
        inputs, states = self.inputs(observations, tasks), self.states(observations)
        prefix = self.encode_prefixes(prefixes or [], states)
        return self.unnormalize(self.sample_normalized(*inputs, seeds, prefix), states)

    def encode_prefixes(
        self, prefixes: Sequence[ActionPrefix | None], states: np.ndarray | None
    ) -> types.Prefix | None:
        """Return prefixes in robot units as the network's; None if there are none.

        states: proprio [B, P] at the chunks' first actions (`states`).
        """
        if not any(prefixes):
            return None
        present = [(b, p) for b, p in enumerate(prefixes) if p is not None and len(p.actions)]
        methods = [self._method_of(prefix) for _, prefix in present]
        sampler, guided = self._parts.sampler, "guided" in methods or self.real_time != "trained"
        encoded = sampler.no_prefix(len(prefixes), guided)
        for (b, prefix), method in zip(present, methods, strict=True):
            check_prefix(prefix, self.horizon, len(self.embodiment.action))
            state = None if states is None else states[b : b + 1]
            actions = self.embodiment.encode(np.asarray(prefix.actions)[None], state)[0]
            encoded.action[b, : len(actions), : actions.shape[-1]] = actions
            if method == "trained":
                encoded.known[b, : self._longest_known(prefix.delay)] = True
            else:
                encoded.weight[b] = prefix_weights(prefix.delay, len(actions), self.horizon)
        return encoded

    def _method_of(self, prefix: ActionPrefix) -> str:
        if prefix.method not in ("", *METHODS):
            raise ValueError(unknown("method of a prefix", prefix.method, METHODS))
        if prefix.method == "trained" and self.real_time != "trained":
            raise ValueError(
                "the prefix asks for the method 'trained', but this policy's head was trained "
                "without prefixes (heads.action.prefix is 0); use 'guided'"
            )
        return prefix.method or self.real_time

    def _longest_known(self, delay: int) -> int:
        longest = self._parts.sampler.trained_prefix
        if delay > longest and not self._is_delay_reported:
            self._is_delay_reported = True
            warnings.warn(
                f"the chunk arrives {delay} actions late, but the head was trained with a prefix "
                f"of at most {longest} actions; only {longest} are given to it. Train with a "
                "longer heads.action.prefix, or make inference faster",
                stacklevel=user_level(),
            )
        return min(delay, longest)

    def inputs(
        self, observations: Sequence[Mapping[str, Any]], tasks: Sequence[Task]
    ) -> tuple[types.Batch, types.Batch]:
        """Return the network's input: the `observation` and `task` parts of a batch."""
        if not observations:
            raise ValueError("no observations given; expected at least one")
        encoded = [self._parts.observations.encode(o) for o in observations]
        stack = functools.partial(jax.tree.map, lambda *x: np.stack(x))
        return stack(*encoded), stack(*[t.inputs for t in tasks])

    def sample_normalized(
        self,
        observation: types.Batch,
        task: types.Batch,
        seeds: Sequence[int],
        prefix: types.Prefix | None = None,
    ) -> np.ndarray:
        """Return normalised chunks float32 [B, H, A] for two parts of a batch (octolike.types)."""
        task = self._parts.tasks.with_states(task)
        return self._parts.sampler.sample(self._params, observation, task, seeds, prefix)

    def states(self, observations: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
        """Return the newest proprio [B, P] of observations; None if the actions do not need it."""
        transform = self.embodiment.transform
        if transform is None or not transform.needs_state:
            return None
        values: list[Any] = [o.get("proprio") for o in observations]
        if any(value is None for value in values):
            raise ValueError(
                f"the actions of {self.embodiment.name} are learned as {transform.text!r}, so "
                "observation['proprio'] must not be None"
            )
        width = len(self.embodiment.proprio or ())
        return np.stack([np.reshape(value, (-1, width))[-1] for value in values])

    def unnormalize(self, actions: np.ndarray, states: np.ndarray | None = None) -> np.ndarray:
        """Return normalised chunks [B, H, A of the run] as float32 [B, H, A] in robot units.

        states: proprio [B, P] at the first actions, in robot units (`states`).

        Raises FloatingPointError if they are not finite.
        """
        robot_actions = actions[..., : len(self.embodiment.learned)]
        decoded = np.asarray(self.embodiment.decode(robot_actions, states), np.float32)
        check_finite(
            decoded,
            "un-normalised actions are not finite, for examples {bad}; do not execute them. Check "
            "the observed proprio and the statistics in embodiments.json",
        )
        return decoded


def _build_parts(run: Run, embodiment: str | None, batch_size: int | Sequence[int]) -> PolicyParts:
    sizes = [batch_size] if isinstance(batch_size, int) else list(batch_size)
    if not sizes or min(sizes) < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    record = _choose_embodiment(run.embodiments, embodiment)
    sampler = ActionSampler(run, record.name, len(record.learned), sizes)
    observations = ObservationEncoder(run.spec, record, run.config.data.resize)
    return PolicyParts(record, observations, TaskEncoder(run, sampler), sampler)


def _choose_embodiment(embodiments: Sequence[Embodiment], name: str | None) -> Embodiment:
    names = [e.name for e in embodiments]
    if not names:
        raise ValueError(
            "the run holds no embodiment record, so the units of its actions are unknown; train it "
            "again"
        )
    if name is None and len(names) > 1:
        raise ValueError(
            f"the run has several robots; name one of them: embodiment={' | '.join(names)}"
        )
    if name is not None and name not in names:
        raise ValueError(unknown("embodiment", name, names))
    return embodiments[0 if name is None else names.index(name)]
