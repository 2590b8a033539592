"""LiberoEnv: LIBERO's language-conditioned tasks on one Panda arm, by the benchmark's protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np

from octolike.envs import adapters
from octolike.envs.environment import episode_info, parse_reset_options, scene_digest
from octolike.envs.libero.libero_package import load_libero, load_task
from octolike.envs.libero.libero_sim import NO_MOTION, Frame, LiberoSim
from octolike.envs.libero.libero_tasks import LIMITS, tasks_of
from octolike.envs.simulators import LiberoSettings
from octolike.envs.spaces import observation_space

CONTROL_HZ = 20
FIRST_BENCHMARK_SEED = 1_000_000  # smaller seeds are those of demonstrations


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

    An episode with seed 1,000,000 or more is one of the benchmark: with n initial states, it starts
    from state seed mod n. A smaller seed, that of a demonstration, draws objects and fixtures from
    the task's regions, so no state of the benchmark is demonstrated. In both, `settle_steps` steps
    follow in which objects come to rest. The episode ends with the benchmark's success or at the
    suite's step limit.
    """

    metadata = {  # noqa: RUF012
        "render_modes": ["rgb_array"],
        "render_fps": CONTROL_HZ,
        "control_hz": CONTROL_HZ,
    }

    def __init__(self, settings: LiberoSettings | None = None) -> None:
        settings = settings or LiberoSettings()
        load_libero()
        self._sizes = {"primary": settings.primary_size, "wrist": settings.wrist_size}
        self._settle_steps = settings.settle_steps
        images = {camera: (size, size) for camera, size in self._sizes.items()}
        self.observation_space = observation_space(images, (8, 10))
        low = np.array([-1] * 6 + [0], np.float32)
        self.action_space = gymnasium.spaces.Box(low, np.ones(7, np.float32))
        self.render_mode = "rgb_array"
        self.skill, self.split, self.instruction, self.steps = "", "", "", 0
        self._sim: LiberoSim | None = None
        self._original: list[Any] = []

    @property
    def sim(self) -> LiberoSim:
        """The present task's simulation; RuntimeError before the first reset."""
        if self._sim is None:
            raise RuntimeError("call reset() before step()")
        return self._sim

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin an episode; options: any of {"split": str, "skills": list of str}."""
        super().reset(seed=seed)
        split, skills = parse_reset_options(options, tasks_of)
        number = int(self.np_random.integers(2**31)) if seed is None else seed
        self._open(split, skills[int(self.np_random.integers(len(skills)))])
        if seed is not None and seed < FIRST_BENCHMARK_SEED:
            self.sim.sample(seed)
        else:
            self.sim.start(number % len(self.sim.task.states))
        for _ in range(self._settle_steps):
            self.sim.step(list(NO_MOTION))
        self.steps = 0
        data = self.sim.env.sim.data
        scene = scene_digest([self.skill], np.concatenate([data.qpos, data.body_xpos.ravel()]))
        return self.observe(), self._info(False, "") | {"scene": scene}

    def step(
        self, action: np.ndarray
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Act for 1/20 s; ValueError unless the action is seven finite numbers."""
        outcome = self.act(action)
        return self.observe(), *outcome

    def act(self, action: np.ndarray) -> tuple[float, bool, bool, dict[str, Any]]:
        """Act as in `step`, without rendering; return (reward, terminated, truncated, info)."""
        sim = self.sim
        numbers = adapters.check_arm_action(action)
        gripper = -1.0 if numbers[6] > 0.5 else 1.0
        done = sim.step([*np.clip(numbers[:6], -1, 1).tolist(), gripper])
        self.steps += 1
        truncated = not done and self.steps >= LIMITS[self.skill.split("/")[0]]
        info = self._info(done, "time ran out" if truncated else "")
        return float(done), done, truncated, info

    def observe(self) -> dict[str, np.ndarray]:
        """Return the present observation."""
        return self.images(self.sim.frame()) | {"proprio": proprio(self.sim.raw)}

    def images(self, frame: Frame) -> dict[str, np.ndarray]:
        """Render the cameras at a frame of this episode: {"image_<camera>": uint8 [h, w, 3]}."""
        return {
            f"image_{camera}": adapters.resize_by_area(self.sim.render(camera, frame), size, camera)
            for camera, size in self._sizes.items()
        }

    def render(self) -> np.ndarray:
        """Return the primary image at full size for videos: uint8 [256, 256, 3]."""
        return self.sim.render("primary", self.sim.frame())

    def close(self) -> None:
        """Close the simulation."""
        if self._sim is not None:
            self._sim.close()
            self._sim, self.skill, self.split = None, "", ""

    def _open(self, split: str, skill: str) -> None:
        """Build a task's simulation; the previous one is closed, since each needs much memory."""
        if (split, skill) == (self.split, self.skill):
            return
        self.close()
        task = load_task(split, skill)
        self._sim = LiberoSim(task)
        self._original = original_goal(task.original) if task.original else []
        self.split, self.skill, self.instruction = split, skill, task.instruction

    def _info(self, success: bool, failure: str) -> dict[str, Any]:
        info = episode_info(self.instruction, self.skill, success, failure)
        if self._original:  # LIBERO-PRO's other task in the scene of this one
            env = self.sim.env
            info["instead"] = not success and all(env._eval_predicate(x) for x in self._original)
        return info


def original_goal(path: str) -> list[Any]:
    """Return the predicates that must hold at the end of a task's description."""
    from libero.libero.envs.bddl_utils import robosuite_parse_problem

    return list(robosuite_parse_problem(path)["goal_state"])


def proprio(raw: dict[str, Any]) -> np.ndarray:
    """Return position, axis-angle and fingers of an observation of robosuite: float32 [8]."""
    rotation = axis_angle(np.asarray(raw["robot0_eef_quat"], np.float64))
    parts = (raw["robot0_eef_pos"], rotation, raw["robot0_gripper_qpos"])
    return np.concatenate(parts).astype(np.float32)


def axis_angle(quaternion: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return axis times angle of a quaternion (x, y, z, w): float64 [3], angle in [0, 2π].

    Angles above π are kept, since the benchmark's demonstrations contain them.
    """
    x, y, z, w = np.asarray(quaternion, np.float64)
    sine = np.sqrt(max(1 - w * w, 0))
    if sine < 1e-8:
        return np.zeros(3)
    return np.array([x, y, z]) / sine * 2 * np.arccos(np.clip(w, -1, 1))
