"""vla-eval's protocol: an evaluation harness sends each step of an episode, and gets one action.

A message is {"type", "payload", "seq", "timestamp"}. The types, and the server's reaction:

    hello          answers with the conventions of its actions and the observations it needs
    episode_start  forgets history and chunk
    observation    answers with one action: the chunk's next one, or the first of a new chunk
    episode_end    forgets history and chunk

`BENCHMARKS` translates between a benchmark's conventions and those of octolike's records: the names
of cameras and state, and the gripper, for which 1 means open in octolike.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from octolike.config import unknown
from octolike.policy.observations import IMAGE
from octolike.policy.policy import Policy
from octolike.policy.serving.options import ServeOptions
from octolike.policy.serving.requests import Frame

PROTOCOL = 1
FIELDS = ("type", "payload", "seq", "timestamp")
TYPES = ("hello", "observation", "episode_start", "episode_end")
FIRST_SEED = "octolike_seed"
OPEN_IS_ONE = "1 = open"  # how the text of a record's gripper begins


class Benchmark(NamedTuple):
    """The names and conventions of a benchmark.

    cameras: {camera of the policy: its name there}. state: key of proprio. gripper: 1 = open to its
    convention. params: (second camera, states), whether the policy reads them → the benchmark's
    parameters to send them. action_spec: of its actions, in vla-eval's words.
    """

    cameras: Mapping[str, str]
    state: str
    gripper: Callable[[np.ndarray], np.ndarray]
    params: Callable[[bool, bool], dict[str, Any]]
    action_spec: Mapping[str, tuple[int, str]]


def close_positive(gripper: np.ndarray) -> np.ndarray:
    """Return 1 = open, 0 = closed as -1 = open, 1 = closed."""
    return 1 - 2 * gripper


def unchanged(gripper: np.ndarray) -> np.ndarray:
    """Return the gripper as the policy gives it."""
    return gripper


def _libero_params(has_wrist: bool, has_state: bool) -> dict[str, Any]:
    return {"send_wrist_image": has_wrist, "send_state": has_state, "quat_no_antipodal": True}


ARM = {"position": (3, "delta_xyz"), "rotation": (3, "axis_angle")}
# By the second part of the benchmark's import path, vla_eval.benchmarks.<name>.
BENCHMARKS = {
    "libero": Benchmark(
        {"primary": "agentview", "wrist": "wrist"},
        "states",
        close_positive,
        _libero_params,
        {**ARM, "gripper": (1, "binary_close_positive")},
    ),
}
# octolike's own class of LIBERO (octolike.envs.libero.vla_eval_libero) has vla-eval's conventions.
OWN_LIBERO = "octolike.envs.libero."
for _name in ("libero_plus", "libero_pro", "libero_mem"):  # the same robot and observations
    BENCHMARKS[_name] = BENCHMARKS["libero"]
OTHER = Benchmark({}, "states", unchanged, lambda wrist, state: {}, {})


class Episode:
    """The state of one harness connection between two observations."""

    def __init__(self) -> None:
        self.benchmark: Benchmark | None = None
        self.frames: list[Frame] = []
        self.chunk: list[np.ndarray] = []
        self.seeds: tuple[int, ...] = (0, 0)
        self.seed: int | None = None
        self.step = 0

    def start(self, payload: Mapping[str, Any]) -> None:
        """Begin an episode; its noise depends on its task and number alone.

        A benchmark of octolike's states the seed of the task's first episode in octolike's own
        suite as FIRST_SEED; the noise is then that of the suite.
        """
        task = payload.get("task")
        task = task if isinstance(task, Mapping) else {}
        number = task.get("episode_idx", 0)
        name = str(task.get("name", ""))[:1000]
        number = abs(number) if type(number) is int else 0
        self.seeds, self.seed = (zlib.crc32(name.encode()), number), None
        first = task.get(FIRST_SEED)
        if type(first) is int and 0 <= first + number < 2**32:
            self.seed = first + number
        self.frames, self.chunk, self.step = [], [], 0


class HarnessProtocol:
    """Translates the messages of a harness for one policy."""

    def __init__(self, policy: Policy, options: ServeOptions) -> None:
        """Raises ValueError for a camera that the policy does not have."""
        self._policy = policy
        self._cameras = dict(options.cameras)
        self.execute = options.execute or policy.config.evaluate.execute
        if not 1 <= self.execute <= policy.horizon:
            raise ValueError(
                f"execute is {self.execute}; the policy predicts {policy.horizon} actions at a time"
            )
        names = [key.removeprefix(IMAGE) for key in policy.image_shapes]
        for camera in self._cameras:
            if camera not in names:
                raise ValueError(unknown("camera of the policy in cameras", camera, names))

    def benchmark(self, path: Any) -> Benchmark:
        """Return the conventions of a benchmark by its import path.

        Raises ValueError if the record's gripper has another meaning than they expect.
        """
        path = path if isinstance(path, str) else ""
        parts = path.split(".")
        name = parts[2] if parts[:2] == ["vla_eval", "benchmarks"] and len(parts) > 2 else ""
        name = "libero" if path.startswith(OWN_LIBERO) else name
        chosen = BENCHMARKS.get(name, OTHER)
        gripper = self._policy.embodiment.gripper
        if chosen.gripper is not unchanged and not gripper.startswith(OPEN_IS_ONE):
            raise ValueError(
                f"the gripper of {self._policy.embodiment.name} is {gripper!r}; {name} is "
                f"translated from {OPEN_IS_ONE!r} only"
            )
        if self._cameras:
            return chosen._replace(cameras=self._cameras)
        return chosen

    def hello(
        self, benchmark: Benchmark, payload: Mapping[str, Any], checkpoint: int
    ) -> dict[str, Any]:
        """Return the reply to a hello; checkpoint: its step, as of now."""
        has_state = "proprio" in self._policy.observation_keys
        action = {
            name: {"name": name, "dims": dims, "format": text}
            for name, (dims, text) in benchmark.action_spec.items()
        }
        formats = {self._camera(benchmark, k): "rgb_hwc_uint8" for k in self._policy.image_shapes}
        if "language" in self._policy.conditioning:
            formats["language"] = "language"
        observation = {n: {"name": n, "dims": 0, "format": text} for n, text in formats.items()}
        return {
            "harness_version": str(payload.get("harness_version", ""))[:40],
            "protocol_version": PROTOCOL,
            "model_server": "octolike",
            # vla-eval stores them with its results (octolike.evaluation.harness_agreement).
            "checkpoint": checkpoint,
            "execute": self.execute,
            "capabilities": {},
            "observation_params": benchmark.params(
                "image_wrist" in self._policy.image_shapes, has_state
            ),
            "action_spec": action,
            "observation_spec": observation,
        }

    def observation(self, benchmark: Benchmark, payload: Any) -> tuple[dict[str, Any], str]:
        """Return a payload as (observation under the policy's keys, instruction)."""
        if not isinstance(payload, Mapping) or not isinstance(payload.get("images", {}), Mapping):
            raise ValueError("the observation must be a map with a map of images")
        images, observation = payload.get("images", {}), {}
        for key in self._policy.image_shapes:
            name = self._camera(benchmark, key)
            if name not in images:
                raise ValueError(
                    unknown("camera of the observation", name, images)
                    + "; name it with --cameras POLICY=BENCHMARK"
                )
            observation[key] = images[name]
        if "proprio" in self._policy.observation_keys:
            state = payload.get(benchmark.state, payload.get("state"))
            if state is None:
                raise ValueError(
                    f"the observation lacks {benchmark.state!r}, the robot's proprio; ask the "
                    "benchmark to send it"
                )
            observation["proprio"] = np.asarray(state, np.float32)
        return observation, payload.get("task_description", "")

    def action(self, benchmark: Benchmark, action: np.ndarray) -> np.ndarray:
        """Return an action [A] in the benchmark's conventions."""
        result = np.array(action, np.float32)
        names = self._policy.embodiment.action.names
        if "gripper" in names:
            dim = names.index("gripper")
            result[dim] = benchmark.gripper(result[dim])
        return result

    def _camera(self, benchmark: Benchmark, key: str) -> str:
        name = key.removeprefix(IMAGE)
        return benchmark.cameras.get(name, name)


def parse(message: Any) -> tuple[str, Any, Any]:
    """Return (type, payload, seq) of a harness message; ValueError for any other."""
    if not isinstance(message, Mapping) or any(field not in message for field in FIELDS):
        raise ValueError(f"the message must be a map with {', '.join(FIELDS)}")
    if message["type"] not in TYPES:
        raise ValueError(f"the message's type is {message['type']!r:.40}; expected one of {TYPES}")
    if not isinstance(message["payload"], Mapping):
        raise ValueError(f"the payload is a {type(message['payload']).__name__}; expected a map")
    return message["type"], message["payload"], message["seq"]
