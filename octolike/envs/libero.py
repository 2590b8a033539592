"""LiberoEnv: LIBERO's suites of language tasks on one Panda arm, where the package is installed."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np

from octolike.config import ConfigError
from octolike.envs import adapters, environment

CONTROL_HZ = 20
REMEDY = (
    "pip install robosuite==1.4.0 bddl future easydict, then git clone "
    "https://github.com/Lifelong-Robot-Learning/LIBERO && pip install -e LIBERO"
)
# Tasks and the benchmark's customary limit of steps.
LIMITS = {"spatial": 220, "object": 280, "goal": 300, "10": 520, "90": 400}
COUNTS = {"spatial": 10, "object": 10, "goal": 10, "10": 10, "90": 90}
SKILLS = tuple(f"{suite}/{i}" for suite, n in COUNTS.items() for i in range(n))
SPLITS = ("train",)
ROBOTS = {"libero": {}}
_RENDER_SIZE = 256
_STILL = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)  # the gripper stays open

tasks_of = functools.partial(adapters.choose_tasks, "LIBERO", choices=SKILLS)


class LiberoEnv(gymnasium.Env):
    """One of 130 tasks per episode; a skill is "<suite>/<number>", e.g. "spatial/3".

    Observation:
        image_primary  uint8 [h, w, 3]; the camera `agentview`, turned by 180 degrees
        image_wrist    uint8 [hw, hw, 3]; the camera in the hand, turned likewise
        proprio        float32 [8]: x, y, z (metres), axis-angle (radians), two fingers (metres)
    Action:
        float32 [7]: dx, dy, dz, rotation as axis-angle, all in [-1, 1] and scaled by the
        controller, and the gripper in [0, 1], 1 is open: what the rows of LIBERO's datasets give.
        The simulator is given -1 to open and 1 to close.

    An episode starts from initial state (seed mod their number) of the benchmark, after
    `settle_steps` steps in which things come to rest. It ends with the benchmark's success or at
    the suite's customary limit.

    Args:
        primary_size, wrist_size: height and width of the images in pixels.
        settle_steps: steps without moving at the start.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_HZ}  # noqa: RUF012

    def __init__(
        self, primary_size: int = 128, wrist_size: int = 128, settle_steps: int = 10
    ) -> None:
        if not all(8 <= s <= _RENDER_SIZE for s in (primary_size, wrist_size)) or settle_steps < 0:
            raise ValueError(
                f"images have 8 to {_RENDER_SIZE} pixels a side and settle_steps is 0 or more: got "
                f"{primary_size}, {wrist_size}, {settle_steps}"
            )
        self._benchmark = adapters.load("libero.libero.benchmark", "LIBERO", REMEDY)
        self._envs = adapters.load("libero.libero.envs", "LIBERO", REMEDY)
        self._paths = adapters.load("libero.libero", "LIBERO", REMEDY)
        self._sizes, self._settle = (primary_size, wrist_size), settle_steps
        box = gymnasium.spaces.Box
        self.observation_space = gymnasium.spaces.Dict(
            {
                "image_primary": box(0, 255, (primary_size, primary_size, 3), np.uint8),
                "image_wrist": box(0, 255, (wrist_size, wrist_size, 3), np.uint8),
                "proprio": box(-10, 10, (8,), np.float32),
            }
        )
        low = np.array([-1] * 6 + [0], np.float32)
        self.action_space = box(low, np.ones(7, np.float32))
        self.render_mode = "rgb_array"
        self.skill, self.instruction, self.steps = "", "", 0
        self._env: Any = None
        self._states: Any = None
        self._seen: dict[str, Any] = {}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin an episode; options: any of {"split": str, "skills": list of str}."""
        super().reset(seed=seed)
        _, skills = environment.skills_of(options, tasks_of)
        number = int(self.np_random.integers(2**31)) if seed is None else seed
        self._open(skills[int(self.np_random.integers(len(skills)))])
        self._env.reset()
        self._seen = self._env.set_init_state(self._states[number % len(self._states)])
        for _ in range(self._settle):
            self._seen, *_ = self._env.step(list(_STILL))
        self.steps = 0
        return self._observation(), self._info(False, "")

    def step(
        self, action: np.ndarray
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Act for 1/20 s; ValueError where the action is not seven finite numbers."""
        if self._env is None:
            raise RuntimeError("call reset() before step()")
        numbers = adapters.checked(action)
        gripper = -1.0 if numbers[6] > 0.5 else 1.0
        moves = np.clip(numbers[:6], -1, 1)
        self._seen, reward, done, _ = self._env.step([*moves.tolist(), gripper])
        self.steps += 1
        over = not done and self.steps >= LIMITS[self.skill.split("/")[0]]
        info = self._info(bool(done), "time ran out" if over else "")
        return self._observation(), float(reward), bool(done), over, info

    def render(self) -> np.ndarray:
        """Return the primary picture as it was drawn: uint8 [256, 256, 3]."""
        return _turned(self._seen["agentview_image"])

    def close(self) -> None:
        """Close the simulation."""
        if self._env is not None:
            self._env.close()
            self._env, self.skill = None, ""

    def _open(self, skill: str) -> None:
        """Make a task's simulation; the last one is closed, each takes much memory."""
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
        self._env.seed(0)  # the initial states decide; without this, things would move a little
        self.skill, self.instruction = skill, task.language

    def _observation(self) -> dict[str, np.ndarray]:
        seen, (primary, wrist) = self._seen, self._sizes
        turn = axis_angle(np.asarray(seen["robot0_eef_quat"], np.float64))
        hand = (seen["robot0_eef_pos"], turn, seen["robot0_gripper_qpos"])
        pictures = {
            "image_primary": (seen["agentview_image"], primary),
            "image_wrist": (seen["robot0_eye_in_hand_image"], wrist),
        }
        images = {k: adapters.picture(_turned(p), s, k) for k, (p, s) in pictures.items()}
        return images | {"proprio": np.concatenate(hand).astype(np.float32)}

    def _info(self, success: bool, failure: str) -> dict[str, Any]:
        return environment.info(self.instruction, self.skill, success, failure)


def axis_angle(quaternion: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return the rotation of a quaternion x, y, z, w as axis times angle in [0, 2π], float64 [3].

    The angle is not halved to [0, π]: the benchmark's own demonstrations have it like this.
    """
    x, y, z, w = np.asarray(quaternion, np.float64)
    sine = np.sqrt(max(1 - w * w, 0))
    if sine < 1e-8:
        return np.zeros(3)
    return np.array([x, y, z]) / sine * 2 * np.arccos(np.clip(w, -1, 1))


def _turned(image: Any) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image)[::-1, ::-1])
