"""LiberoEnv: LIBERO's language-conditioned tasks on one Panda arm; needs the package LIBERO."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np

from octolike.config import ConfigError
from octolike.envs import adapters
from octolike.envs.environment import episode_info, parse_reset_options
from octolike.envs.simulators import LiberoSettings
from octolike.envs.spaces import observation_space
from octolike.envs.task_tables import choose_tasks

CONTROL_HZ = 20
REMEDY = (
    "pip install robosuite==1.4.0 bddl future easydict, then git clone "
    "https://github.com/Lifelong-Robot-Learning/LIBERO && pip install -e LIBERO"
)
# Per suite: the step limit that results are usually reported with, and the number of tasks.
LIMITS = {"spatial": 220, "object": 280, "goal": 300, "10": 520, "90": 400}
COUNTS = {"spatial": 10, "object": 10, "goal": 10, "10": 10, "90": 90}
SKILLS = tuple(f"{suite}/{i}" for suite, n in COUNTS.items() for i in range(n))
SPLITS = ("train",)
ROBOTS: Mapping[str, Mapping[str, str]] = {"libero": {}}
_RENDER_SIZE = 256
_NO_MOTION = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)  # the gripper stays open

tasks_of = functools.partial(choose_tasks, "LIBERO", choices=SKILLS)


class LiberoEnv(gymnasium.Env):
    """One of 130 tasks per episode; a skill is "<suite>/<number>", e.g. "spatial/3".

    Observation:
        image_primary  uint8 [h, w, 3]; the camera `agentview`, rotated by 180 degrees
        image_wrist    uint8 [hw, hw, 3]; the camera in the hand, rotated by 180 degrees
        proprio        float32 [8]: x, y, z (metres), axis-angle (radians), two fingers (metres)
    Action:
        float32 [7]: dx, dy, dz, rotation as axis-angle, all in [-1, 1] and scaled by the
        controller, and the gripper in [0, 1], 1 is open, as in the specs of LIBERO's datasets.
        The simulator's gripper command is -1 to open and 1 to close.

    With n initial states in the benchmark, an episode starts from state seed mod n, after
    `settle_steps` steps in which objects come to rest. It ends with the benchmark's success or at
    the suite's step limit.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_HZ}  # noqa: RUF012

    def __init__(self, settings: LiberoSettings | None = None) -> None:
        settings = settings or LiberoSettings()
        self._benchmark = adapters.import_simulator("libero.libero.benchmark", "LIBERO", REMEDY)
        self._envs = adapters.import_simulator("libero.libero.envs", "LIBERO", REMEDY)
        self._paths = adapters.import_simulator("libero.libero", "LIBERO", REMEDY)
        self._sizes = primary_size, wrist_size = settings.primary_size, settings.wrist_size
        self._settle_steps = settings.settle_steps
        images = {"primary": (primary_size, primary_size), "wrist": (wrist_size, wrist_size)}
        self.observation_space = observation_space(images, (8, 10))
        low = np.array([-1] * 6 + [0], np.float32)
        self.action_space = gymnasium.spaces.Box(low, np.ones(7, np.float32))
        self.render_mode = "rgb_array"
        self.skill, self.instruction, self.steps = "", "", 0
        self._env: Any = None
        self._states: Any = None
        self._raw_observation: dict[str, Any] = {}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin an episode; options: any of {"split": str, "skills": list of str}."""
        super().reset(seed=seed)
        _, skills = parse_reset_options(options, tasks_of)
        number = int(self.np_random.integers(2**31)) if seed is None else seed
        self._open(skills[int(self.np_random.integers(len(skills)))])
        self._env.reset()
        self._raw_observation = self._env.set_init_state(self._states[number % len(self._states)])
        for _ in range(self._settle_steps):
            self._raw_observation, *_ = self._env.step(list(_NO_MOTION))
        self.steps = 0
        return self._observation(), self._info(False, "")

    def step(
        self, action: np.ndarray
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Act for 1/20 s; ValueError unless the action is seven finite numbers."""
        if self._env is None:
            raise RuntimeError("call reset() before step()")
        numbers = adapters.check_arm_action(action)
        gripper = -1.0 if numbers[6] > 0.5 else 1.0
        moves = np.clip(numbers[:6], -1, 1)
        self._raw_observation, reward, done, _ = self._env.step([*moves.tolist(), gripper])
        self.steps += 1
        truncated = not done and self.steps >= LIMITS[self.skill.split("/")[0]]
        info = self._info(bool(done), "time ran out" if truncated else "")
        return self._observation(), float(reward), bool(done), truncated, info

    def render(self) -> np.ndarray:
        """Return the primary image at full size for videos: uint8 [256, 256, 3]."""
        return _rotated(self._raw_observation["agentview_image"])

    def close(self) -> None:
        """Close the simulation."""
        if self._env is not None:
            self._env.close()
            self._env, self.skill = None, ""

    def _open(self, skill: str) -> None:
        """Build a task's simulation; the previous one is closed, since each needs much memory."""
        if skill == self.skill:
            return
        self.close()
        name, number = skill.split("/")
        suites = self._benchmark.get_benchmark_dict()
        if f"libero_{name}" not in suites:
            raise ConfigError(f"this LIBERO lacks suite libero_{name}; it has {sorted(suites)}")
        suite = suites[f"libero_{name}"]()
        task = suite.get_task(int(number))
        folder = self._paths.get_libero_path("bddl_files")
        path = os.path.join(folder, task.problem_folder, task.bddl_file)
        self._states = suite.get_task_init_states(int(number))
        self._env = self._envs.OffScreenRenderEnv(
            bddl_file_name=path, camera_heights=_RENDER_SIZE, camera_widths=_RENDER_SIZE
        )
        self._env.seed(0)  # removes small random offsets from the initial state
        self.skill, self.instruction = skill, task.language

    def _observation(self) -> dict[str, np.ndarray]:
        raw, (primary_size, wrist_size) = self._raw_observation, self._sizes
        rotation = axis_angle(np.asarray(raw["robot0_eef_quat"], np.float64))
        hand = (raw["robot0_eef_pos"], rotation, raw["robot0_gripper_qpos"])
        cameras = {
            "image_primary": (raw["agentview_image"], primary_size),
            "image_wrist": (raw["robot0_eye_in_hand_image"], wrist_size),
        }
        images = {
            key: adapters.resize_by_area(_rotated(image), size, key)
            for key, (image, size) in cameras.items()
        }
        return images | {"proprio": np.concatenate(hand).astype(np.float32)}

    def _info(self, success: bool, failure: str) -> dict[str, Any]:
        return episode_info(self.instruction, self.skill, success, failure)


def axis_angle(quaternion: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return axis times angle of a quaternion (x, y, z, w): float64 [3], angle in [0, 2π].

    Angles above π are kept, since the benchmark's demonstrations contain them.
    """
    x, y, z, w = np.asarray(quaternion, np.float64)
    sine = np.sqrt(max(1 - w * w, 0))
    if sine < 1e-8:
        return np.zeros(3)
    return np.array([x, y, z]) / sine * 2 * np.arccos(np.clip(w, -1, 1))


def _rotated(image: Any) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image)[::-1, ::-1])
