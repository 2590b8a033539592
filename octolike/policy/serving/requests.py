"""From a client's message to the network's input: keys, tasks, seeds, history per client.

A request in openpi's protocol is a dict: the observation under the policy's keys (or the client's,
see `ServeOptions.keys`), and any of

    prompt        the instruction
    goal_images   {camera: uint8 [h, w, 3]}
    task_id       name of one of the run's tasks
    seed          of the noise; default: from the server's seed, the connection and the call
    history       "client": the observation holds its history. "server": it is one control step, and
                  the server links it with those before. "none": it stands for itself
    reset         True at the first step of an episode: forget the history
    prefix        {"actions": float [n, A], "delay": int}, for real-time chunking
    only_check    True: check the task alone; no observation is needed
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from octolike.config import unknown
from octolike.images import resize
from octolike.policy.execution import METHODS, ActionPrefix, FrameHistory, check_prefix
from octolike.policy.observations import IMAGE, check_image
from octolike.policy.policy import Policy
from octolike.policy.sampler import check_seeds, noise_seed
from octolike.policy.serving.batcher import Inputs
from octolike.policy.serving.options import ServeOptions
from octolike.policy.tasks import Task

TASK = ("prompt", "goal_images", "task_id")
RESERVED = (*TASK, "seed", "history", "reset", "prefix", "only_check")
HISTORIES = ("client", "server", "none")
TASKS = 64  # encoded tasks that are kept

Frame = dict[str, np.ndarray]

PREFIX = {"actions", "delay", "method"}  # keys of a request's prefix


class Session:
    """The state of one connection.

    Attributes:
        number: number of the connection, from 1.
        calls: chunks that it was answered.
        frames: its last observations, if the server keeps the history.
        active: time of its last request (`time.monotonic`); 0 before the first.
        is_waiting: whether a request of it is being answered.
    """

    def __init__(self, number: int) -> None:
        self.number, self.calls, self.active, self.is_waiting = number, 0, 0.0, False
        self.opened = time.monotonic()
        self.frames: list[Frame] = []


class Prepared(NamedTuple):
    """A checked request. frames: the history that the client has once it is answered."""

    inputs: Inputs
    seed: int
    frames: list[Frame]


class RequestEncoder:
    """Encodes requests for a policy; called on several threads."""

    def __init__(self, policy: Policy, options: ServeOptions) -> None:
        self._policy, self._options = policy, options
        unknown_keys = [k for k in options.keys if k not in policy.observation_keys]
        if unknown_keys:
            raise ValueError(
                unknown("key of the policy in keys", unknown_keys[0], policy.observation_keys)
            )
        self._tasks: OrderedDict[Any, Task] = OrderedDict()
        self._lock = threading.Lock()

    def prepare(self, message: Any, session: Session) -> Prepared | None:
        """Return a request as the network's input; None for one that only checks its task.

        Raises ValueError for any fault of the request.
        """
        if not isinstance(message, Mapping) or not all(isinstance(k, str) for k in message):
            raise ValueError(
                f"the request is a {type(message).__name__}; expected a map with text as keys"
            )
        task = self.task(*(message.get(key) for key in TASK))
        if message.get("only_check"):
            return None
        observation = self._observation(message)
        history = message.get("history") or self._options.history
        if history not in HISTORIES:
            raise ValueError(unknown("value of history", history, HISTORIES))
        if message.get("reset"):
            session.frames = []
        frames: list[Frame] = []
        if history == "server":
            observation, frames = self.with_history(observation, session.frames)
        seed = message.get("seed")
        if seed is None:
            seed = self.draw_seed(session.number, session.calls)
        check_seeds([seed])
        return Prepared(self.encode(observation, task, message.get("prefix")), seed, frames)

    def encode(self, observation: Mapping[str, Any], task: Task, prefix: Any = None) -> Inputs:
        """Return the network's input for one observation [1, ...]."""
        inputs = self._policy.inputs([observation], [task])
        states = self._policy.states([observation])
        return Inputs(*inputs, states, self._prefix(prefix))

    def draw_seed(self, *numbers: int) -> int:
        """Return a seed that depends on the server's and on numbers alone."""
        return noise_seed(self._options.seed, *numbers)

    def draw_episode_seed(self, episode: int, step: int) -> int:
        """Return the seed that octolike's evaluation uses in an episode with that seed.

        With another seed of the server than 0, it is another one.
        """
        return self.draw_seed(episode, step) if self._options.seed else noise_seed(episode, step)

    def task(self, instruction: Any, goal_images: Any, task_id: Any) -> Task:
        """Return an encoded task; the latest ones are kept."""
        for name, value in (("prompt", instruction), ("task_id", task_id)):
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{name} is a {type(value).__name__}; expected text")
        if goal_images is not None and not isinstance(goal_images, Mapping):
            raise ValueError("goal_images must be a map {camera: uint8 [h, w, 3]}")
        images = {str(k): np.asarray(v) for k, v in (goal_images or {}).items()}
        digests = {
            k: (v.shape, v.dtype.str, hashlib.sha256(v.tobytes()).digest())
            for k, v in images.items()
        }
        key = (instruction, task_id, tuple(sorted(digests.items())))
        with self._lock:
            if key not in self._tasks:
                self._tasks[key] = self._policy.create_task(instruction, images or None, task_id)
            self._tasks.move_to_end(key)
            task = self._tasks[key]
            while len(self._tasks) > TASKS:
                self._tasks.popitem(last=False)
        return task

    def with_history(
        self, observation: Mapping[str, Any], past: list[Frame]
    ) -> tuple[dict[str, Any], list[Frame]]:
        """Return an observation with the W − 1 steps before it, and the frames to keep.

        A sensor that appears or vanishes starts a new history.
        """
        frame: Frame = {}
        for key, value in observation.items():
            if value is None:
                continue
            if key.startswith(IMAGE) and key in self._policy.image_shapes:
                image = check_image(f"observation[{key!r}]", value, (3,))
                height, width, _ = self._policy.image_shapes[key]
                frame[key] = resize(image, height, width, self._policy.config.data.resize)
            else:
                frame[key] = np.asarray(value)
        shapes = {key: x.shape for key, x in frame.items()}
        if past and {key: x.shape for key, x in past[-1].items()} != shapes:
            past = []
        frames = [*past, frame][-self._policy.window :]
        history = FrameHistory(self._policy.window)
        for step in frames:
            history.append(step)
        return {**observation, **history.stacked()}, frames

    def _observation(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return the observation under the policy's keys."""
        observation = {k: v for k, v in message.items() if k not in RESERVED}
        keys = self._options.keys
        if not keys:
            return {k: _stacked(v) for k, v in observation.items()}
        named = {
            k: v
            for k, v in observation.items()
            if k in (*self._policy.observation_keys, "timestep_mask")
        }
        for key, text in keys.items():
            parts = text.split("+")
            missing = [part for part in parts if part not in message]
            if missing:
                raise ValueError(
                    unknown("key of the observation", missing[0], observation) + " (expected)"
                )
            if len(parts) == 1:
                named[key] = message[parts[0]]
            else:
                vectors = [np.atleast_1d(np.asarray(message[part], np.float32)) for part in parts]
                named[key] = np.concatenate(vectors, axis=-1)
        return {k: _stacked(v) for k, v in named.items()}

    def _prefix(self, value: Any) -> ActionPrefix | None:
        if value is None:
            return None
        if not self._policy.real_time:
            raise ValueError("the request has a prefix, but this policy's head cannot continue one")
        is_map = isinstance(value, Mapping) and value.keys() | {"method"} == PREFIX
        method = value.get("method", "") if is_map else ""
        if not is_map or type(value["delay"]) is not int or method not in ("", *METHODS):
            raise ValueError(
                "the prefix must be a map {'actions': float [n, A], 'delay': int}, with 'method': "
                f"{' or '.join(METHODS)} if wanted"
            )
        prefix = ActionPrefix(np.asarray(value["actions"], np.float32), value["delay"], method)
        check_prefix(prefix, self._policy.horizon, len(self._policy.embodiment.action))
        return prefix


def _stacked(value: Any) -> Any:
    """Return a list of compressed images as one array; other values as they are."""
    if isinstance(value, list) and value and all(isinstance(x, np.ndarray) for x in value):
        if len({x.shape for x in value}) > 1:
            raise ValueError(f"the images of a history differ: {[x.shape for x in value]}")
        return np.stack(value)
    return value
