"""Policy: a trained run as something that acts. Raw observation and task in, robot actions out.

    policy = Policy.load("runs/quickstart")
    task = policy.create_task(instruction="lift the red cube")
    actions = policy.sample_actions({"image_primary": picture, "proprio": state}, task, seed=0)

Everything comes from the run's directory: the network, the cameras and their sizes, the text
tokenizer, and the embodiment record that normalises proprio and un-normalises actions. Nothing here
needs tensorflow.

What a call goes through:

 1. every key, shape and dtype of the observation is checked against what the run was trained on
 2. images are resized if their size differs, proprio is normalised, short histories are padded in
 front
 3. the examples are stacked and padded to a fixed batch size, so that there is one compilation
 4. the network samples one action chunk per example, with noise that depends on that example's seed
 alone
 5. padding is cut off and the actions are un-normalised to the robot's units
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from octolike import types
from octolike.config import Config, build_component, unknown
from octolike.embodiment import Embodiment
from octolike.images import resize
from octolike.model import language
from octolike.model.network import build_network
from octolike.text import TOKENIZERS
from octolike.train.checkpoint import Run, load_run
from octolike.train.state import init_params

IMAGE = "image_"


class Task(NamedTuple):
    """What to do, ready for the network: made once by `Policy.create_task`, used at every step.

    instruction: as given, "" without one; inputs: the `task` part of the batch contract without
    batch axis (the instruction's token ids among them, and a frozen text encoder's states, so that
    both are made once).
    """

    instruction: str
    inputs: dict[str, Any]


class Policy:
    """A network with its parameters, the record of one robot, and one compiled function.

    reads: the paths of a batch that the network reads; told: the ways in which training told it
    its task, of 'language', 'goal' and 'task_id'.
    """

    def __init__(self, run: Run, embodiment: str | None = None, batch_size: int = 1) -> None:
        """Build the policy of a loaded run; see `load`."""
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        self.config, self.spec, self.step = run.config, run.spec, run.step
        self.embodiment = _choose_embodiment(run.embodiments, embodiment)
        self.batch_size = batch_size
        self.window, self.horizon, _ = run.spec["action"][0]
        self.image_shapes = _image_shapes(run.spec, "observation")
        self._params = jax.device_put(run.params)
        settings = dataclasses.asdict(run.config.model)
        self._seen = language.extend_spec(settings, run.spec)
        self._model = build_network(settings, self._seen, run.names)
        reads = {key for t in self._model.tokenizers.values() for key in t.reads()}
        chosen_by = {key for head in self._model.heads.values() for key in head.reads()}
        self.reads = frozenset(reads | chosen_by | {"observation.timestep_mask"})
        # A head per task always knows the task: data.keep_task_id hides it from tokenizers alone.
        self._needs_task_id = "task.task_id" in chosen_by
        told = _conditioning(run.config, reads) | ({"task_id"} if self._needs_task_id else set())
        self.told = frozenset(told)
        goals = _image_shapes(run.spec, "task") if "goal" in told else {}
        self.goal_shapes = {k: v for k, v in goals.items() if f"task.{k}" in reads}
        self._tasks = run.names.tasks if "task_id" in told else ()
        number = run.names.embodiments.index(self.embodiment.name)
        self._act = jax.jit(functools.partial(_act, self._model, self._own_dims(), number))
        self._text = self._encoder = None
        if "language" in told:
            self._text = build_component(TOKENIZERS, run.config.data.text, "data.text")
            language.check_vocabulary(settings, self._text.vocabulary)
            self._encoder = language.frozen_encoder(settings)

    @classmethod
    def load(
        cls,
        run_dir: str | Path,
        embodiment: str | None = None,
        step: int | None = None,
        batch_size: int = 1,
        plugins: Sequence[str] = (),
    ) -> Policy:
        """Load the policy of a run.

        Args:
            run_dir: the directory that training wrote.
            embodiment: the robot's record by name; needed when the run has several.
            step: the checkpoint; the newest by default.
            batch_size: examples per compiled call: 1 on a robot, the number of environments in a
                simulator.
            plugins: files of the run whose code may be executed, by name or path.

        Raises:
            ValueError: no record, several and none named, or an unknown name: the records are
            listed.
        """
        return cls(load_run(run_dir, step, plugins), embodiment, batch_size)

    @property
    def observation_keys(self) -> tuple[str, ...]:
        """The keys that an observation must have: image_<camera> …, proprio."""
        return (*self.image_shapes, *(["proprio"] if self._proprio_width else []))

    @property
    def gripper(self) -> tuple[bool, ...]:
        """Per action dimension: whether it is a target that is not to be averaged or scaled."""
        layout = self.embodiment.action
        return tuple(a and not n for a, n in zip(layout.absolute, layout.normalized))

    @property
    def parameter_count(self) -> int:
        """The number of parameters."""
        return sum(x.size for x in jax.tree.leaves(self._params))

    def untrained(self, seed: int = 0) -> Policy:
        """Return this policy with freshly initialised parameters; they share what is compiled."""
        init = jax.jit(functools.partial(init_params, self._model, self._seen))
        return self.with_params(init(jax.random.key(seed)), step=0)

    def with_params(self, params: Any, step: int) -> Policy:
        """Return this policy with other parameters, of a step; they share what is compiled."""
        other = object.__new__(Policy)
        other.__dict__.update(self.__dict__)
        other._params, other.step = jax.device_put(params), step
        return other

    def create_task(
        self,
        instruction: str | None = None,
        goal_images: Mapping[str, np.ndarray] | None = None,
        task_id: str | None = None,
    ) -> Task:
        """Return the task of an instruction, of goal images, of a task's number, or of several.

        Args:
            instruction: in natural language.
            goal_images: camera: uint8 [h, w, 3], how the scene shall look.
            task_id: the name of one of the run's tasks, which the network knows by number.

        Raises:
            ValueError: a conditioning that the run was not trained on, none at all where it was
                trained on some, no task id where each task has a head, an unknown task, an image of
                the wrong shape or dtype.
        """
        inputs = types.zeros({k: v for k, v in self._seen.items() if k.startswith("task.")}, 1)
        inputs = jax.tree.map(lambda x: x[0], inputs.get("task", {}))
        if instruction is not None and not (isinstance(instruction, str) and instruction.strip()):
            raise ValueError(f"the instruction is {instruction!r}; expected a sentence")
        if instruction is not None:
            self._put_language(inputs, instruction)
        for camera, image in (goal_images or {}).items():
            self._put_goal(inputs, camera, image)
        if task_id is not None:
            self._put_task_id(inputs, task_id)
        ways = self._ways()
        if ways and instruction is None and not goal_images and task_id is None:
            asked = " or ".join(ways.values())
            raise ValueError(
                f"the task lacks {next(iter(ways))}: this policy needs create_task({asked})"
            )
        if self._needs_task_id and task_id is None:
            raise ValueError(
                "the task lacks a task id, by which this policy chooses its head: give "
                f"create_task(task_id=…), one of {', '.join(self._tasks)}"
            )
        return Task(instruction or "", inputs)

    def sample_actions(
        self, observation: Mapping[str, Any], task: Task, seed: int = 0
    ) -> np.ndarray:
        """Return an action chunk float32 [H, A] in the robot's units, A being the robot's own.

        Args:
            observation: image_<camera> uint8 [h, w, 3] or [w, h, w, 3] for a history of w ≤ W
            frames, newest
                last; proprio float [P] or [w, P] in the robot's units; optional timestep_mask bool
                [w], False for frames before the episode's first. None for a sensor that this robot
                lacks.
            task: from `create_task`.
            seed: of the noise that sampling starts from; the same seed gives the same actions.

        Raises:
            ValueError: an observation that does not fit what the run was trained on.
            FloatingPointError: the network returned NaN or infinite actions.
        """
        return self.sample_batch([observation], [task], [seed])[0]

    def sample_batch(
        self,
        observations: Sequence[Mapping[str, Any]],
        tasks: Sequence[Task],
        seeds: Sequence[int],
    ) -> np.ndarray:
        """Return action chunks float32 [B, H, A] for B robots at once; see `sample_actions`.

        The noise of an example depends on its seed alone, not on the batch. Batches are padded to
        `batch_size`, and cut into pieces where they are longer.
        """
        if not len(observations) == len(tasks) == len(seeds):
            raise ValueError(
                f"{len(observations)} observations, {len(tasks)} tasks and {len(seeds)} seeds; "
                "expected as many of each"
            )
        actions = self.sample_normalized(*self.inputs(observations, tasks), seeds)
        return self.unnormalize(actions)

    def inputs(
        self, observations: Sequence[Mapping[str, Any]], tasks: Sequence[Task]
    ) -> tuple[types.Batch, types.Batch]:
        """Return what the network is shown: the `observation` and `task` parts of a batch."""
        if not observations:
            raise ValueError("no observations given")
        prepared = [self._prepare(o) for o in observations]
        stack = functools.partial(jax.tree.map, lambda *x: np.stack(x))
        return stack(*prepared), stack(*[t.inputs for t in tasks])

    def sample_normalized(
        self, observation: types.Batch, task: types.Batch, seeds: Sequence[int]
    ) -> np.ndarray:
        """Return normalised chunks float32 [B, H, A] for the parts of a batch (octolike.types)."""
        if self._encoder and "states" not in task["language"]:
            task = self._encoder({"task": task})["task"]
        total, out = len(seeds), []
        for start in range(0, total, self.batch_size):
            rows = np.minimum(np.arange(start, start + self.batch_size), total - 1)
            part = jax.tree.map(lambda x, rows=rows: x[rows], (observation, task))
            keys = (np.asarray(seeds, dtype=np.int64)[rows] & 0xFFFFFFFF).astype(np.uint32)
            out.append(np.asarray(self._act(self._params, *part, keys)))
        actions = np.concatenate(out)[:total]
        if not np.isfinite(actions).all():
            bad = np.flatnonzero(~np.isfinite(actions).all(axis=(1, 2))).tolist()
            raise FloatingPointError(
                f"the policy returned actions that are not finite, for examples {bad}"
            )
        return actions

    def unnormalize(self, actions: np.ndarray) -> np.ndarray:
        """Return actions [..., A of the run] as float32 [..., A of the robot], in its units."""
        own = actions[..., : len(self.embodiment.action.names)]
        return np.asarray(self.embodiment.unnormalize_action(own), np.float32)

    def _own_dims(self) -> np.ndarray:
        """Return bool [A]: which of the run's action dimensions this robot has."""
        return np.arange(self.spec["action"][0][-1]) < len(self.embodiment.action.names)

    # Task

    def _ways(self) -> dict[str, str]:
        """Return {what can be told: the argument of `create_task`}."""
        ways = {
            "an instruction": "instruction=…" if self._text else "",
            "a goal image": "goal_images={…}" if self.goal_shapes else "",
            "a task id": "task_id=…" if self._tasks else "",
        }
        return {what: argument for what, argument in ways.items() if argument}

    def _refuse(self, given: str, without: str) -> ValueError:
        ways = self._ways()
        choices = f"it takes {' or '.join(ways.values())}" if ways else "it takes no task at all"
        return ValueError(
            f"{given} was given, but this policy was trained without {without}; {choices}"
        )

    def _put_task_id(self, inputs: dict[str, Any], task_id: str) -> None:
        if not self._tasks:
            raise self._refuse(f"the task id {task_id!r}", "task ids")
        if task_id not in self._tasks:
            raise ValueError(unknown("task id", task_id, self._tasks))
        inputs["task_id"] = np.int32(self._tasks.index(task_id))
        _set_present(inputs, "task_id", np.True_)

    def _put_language(self, inputs: dict[str, Any], instruction: str) -> None:
        if self._text is None:
            raise self._refuse("an instruction", "language")
        ids, mask = self._text.encode([instruction])
        inputs["language"] = {
            "ids": np.asarray(ids[0], np.int32),
            "mask": np.asarray(mask[0], bool),
        }
        if self._encoder:
            inputs["language"]["states"] = self._encoder.states(ids, mask)[0]
        _set_present(inputs, "language", np.True_)

    def _put_goal(self, inputs: dict[str, Any], camera: str, image: np.ndarray) -> None:
        key = IMAGE + camera
        if not self.goal_shapes:
            raise self._refuse(f"a goal image {camera!r}", "goals")
        if key not in self.goal_shapes:
            raise ValueError(unknown("camera of a goal image", camera, _cameras(self.goal_shapes)))
        image = _check_image(f"goal image {camera!r}", image, (3,))
        inputs[key] = resize(image, *self.goal_shapes[key][:2])
        _set_present(inputs, key, np.True_)

    # Observation

    @property
    def _proprio_width(self) -> int:
        names = self.embodiment.proprio.names if self.embodiment.proprio else ()
        return len(names) if "observation.proprio" in self.spec else 0

    def _prepare(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """Return the `observation` part of the batch contract for one example, no batch axis."""
        arrays = self._check_observation(observation)
        frames = _frames(arrays, self.window)
        out = types.zeros({k: v for k, v in self.spec.items() if k.startswith("observation.")}, 1)
        out = jax.tree.map(lambda x: x[0], out)["observation"]
        lead = self.window - frames
        for key, value in arrays.items():
            if key == "timestep_mask":
                continue
            if key == "proprio":
                value = np.asarray(self.embodiment.normalize_proprio(value), np.float32)
                value = np.pad(value, ((0, 0), (0, out[key].shape[-1] - value.shape[-1])))
            else:
                value = np.stack([resize(v, *self.image_shapes[key][:2]) for v in value])
            out[key] = np.concatenate([np.repeat(value[:1], lead, axis=0), value])
            _set_present(out, key, np.ones(self.window, bool))
        mask = arrays.get("timestep_mask", np.ones(frames, bool))
        out["timestep_mask"] = np.concatenate([np.zeros(lead, bool), mask])
        return out

    def _check_observation(self, observation: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return the observation's arrays with a window axis, sensors given as None left out."""
        if not isinstance(observation, Mapping):
            raise ValueError(f"the observation is a {type(observation).__name__}; expected a dict")
        for key in observation:
            if key not in (*self.observation_keys, "timestep_mask"):
                raise ValueError(unknown("key of the observation", key, self.observation_keys))
        missing = [k for k in self.observation_keys if k not in observation]
        if missing:
            raise ValueError(
                f"the observation lacks {', '.join(missing)}: this policy was trained with "
                f"{', '.join(self.observation_keys)} (None stands for a sensor the robot lacks)"
            )
        arrays = {}
        for key, value in observation.items():
            if value is None:
                continue
            if key == "timestep_mask":
                arrays[key] = _check_mask(value)
            elif key == "proprio":
                arrays[key] = _check_proprio(value, self._proprio_width, self.embodiment)
            else:
                value = _check_image(f"observation[{key!r}]", value, (3, 4))
                arrays[key] = value if value.ndim == 4 else value[None]
        return arrays


def _act(
    model: Any,
    dims: np.ndarray,
    embodiment: int,
    params: Any,
    observation: Any,
    task: Any,
    seeds: jax.Array,
) -> jax.Array:
    """Sample normalised chunks [B, H, A]; mapped over examples so that each draws its own noise."""

    def one(observation: Any, task: Any, seed: jax.Array) -> jax.Array:
        example = jax.tree.map(lambda x: x[None], (observation, task))
        sample = functools.partial(model.apply, {"params": params}, method="sample_actions")
        whose = {"dims": dims[None], "embodiment": np.full(1, embodiment)}
        return sample(*example, **whose, rngs={"noise": jax.random.key(seed)})[0]

    return jax.vmap(one)(observation, task, seeds)


def _choose_embodiment(embodiments: Sequence[Embodiment], name: str | None) -> Embodiment:
    names = [e.name for e in embodiments]
    if not names:
        raise ValueError(
            "the run holds no embodiment record, so its actions have no units; train it again"
        )
    if name is None and len(names) > 1:
        raise ValueError(
            f"the run knows several robots; name one of them: embodiment={' | '.join(names)}"
        )
    if name is not None and name not in names:
        raise ValueError(unknown("embodiment", name, names))
    return embodiments[0 if name is None else names.index(name)]


def _conditioning(config: Config, reads: set[str]) -> set[str]:
    """Return the ways to tell the task that the network reads and that training showed it."""
    data = config.data
    told = {"language"} if any(k.startswith("task.language.") for k in reads) else set()
    told |= {"goal"} if any(k.startswith(f"task.{IMAGE}") for k in reads) else set()
    told |= {"task_id"} if "task.task_id" in reads else set()
    kept = {
        "language": data.keep_language,
        "goal": data.keep_goal,
        "task_id": data.keep_task_id,
    }
    return {way for way in told if kept[way] > 0}


def _image_shapes(spec: types.BatchSpec, part: str) -> dict[str, tuple[int, ...]]:
    """Return {image_<camera>: (height, width, 3)} of a part of the batch spec."""
    prefix = f"{part}.{IMAGE}"
    return {k[len(part) + 1 :]: s[-3:] for k, (s, _) in spec.items() if k.startswith(prefix)}


def _cameras(shapes: Mapping[str, Any]) -> list[str]:
    return [k[len(IMAGE) :] for k in shapes]


def _set_present(part: dict[str, Any], key: str, value: Any) -> None:
    if key in part.get("present", {}):
        part["present"][key] = value


def _frames(arrays: Mapping[str, np.ndarray], window: int) -> int:
    """Return the number of frames that all arrays share."""
    lengths = {k: len(v) for k, v in arrays.items()}
    if not lengths.keys() - {"timestep_mask"}:
        raise ValueError("every sensor of the observation is None; a policy cannot act blindly")
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the observation's histories differ in length: {lengths}")
    frames = next(iter(lengths.values()))
    if not 1 <= frames <= window:
        raise ValueError(
            f"the observation has {frames} frames; this policy was trained on windows of {window}: "
            "give the newest ones"
        )
    return frames


def _check_image(name: str, value: Any, ranks: tuple[int, ...]) -> np.ndarray:
    image = np.asarray(value)
    axes = {3: "[h, w, 3]", 4: "[frames, h, w, 3]"}
    expected = f"expected uint8 {' or '.join(axes[r] for r in ranks)}"
    found = f"{name} is {image.dtype} {list(image.shape)}"
    if image.dtype != np.uint8:
        hint = "; give the raw camera image, values 0 to 255" if image.dtype.kind == "f" else ""
        raise ValueError(f"{found}; {expected}{hint}")
    if image.ndim not in ranks or image.shape[-1] != 3 or 0 in image.shape:
        raise ValueError(f"{found}; {expected}")
    return image


def _check_proprio(value: Any, width: int, embodiment: Embodiment) -> np.ndarray:
    proprio = np.asarray(value)
    found = f"observation['proprio'] is {proprio.dtype} {list(proprio.shape)}"
    expected = (
        f"expected float32 [{width}] or [frames, {width}]: {', '.join(embodiment.proprio.names)}"
    )
    if proprio.dtype.kind != "f" or proprio.ndim not in (1, 2) or proprio.shape[-1] != width:
        raise ValueError(f"{found}; {expected} ({embodiment.name})")
    if not np.isfinite(proprio).all():
        raise ValueError(
            f"observation['proprio'] has values that are not finite: {proprio.tolist()}"
        )
    return proprio.reshape(-1, width).astype(np.float32)


def _check_mask(value: Any) -> np.ndarray:
    mask = np.asarray(value)
    if mask.dtype != np.bool_ or mask.ndim != 1:
        raise ValueError(
            f"observation['timestep_mask'] is {mask.dtype} {list(mask.shape)}; "
            "expected bool [frames]"
        )
    if len(mask) and not mask[-1]:
        raise ValueError(
            "observation['timestep_mask'] hides the newest frame; nothing is left to act on"
        )
    return mask
