"""SimplerEnv: simulated WidowX (Bridge) and Google robot tasks; needs the package SimplerEnv."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from octolike.envs import adapters
from octolike.envs.environment import episode_info, parse_reset_options
from octolike.envs.simpler_tasks import WIDOWX, tasks_of
from octolike.envs.simulators import SimplerSettings
from octolike.envs.spaces import observation_space

REMEDY = (
    "git clone --recurse-submodules https://github.com/simpler-env/SimplerEnv, then pip install -e "
    "SimplerEnv/ManiSkill2_real2sim && pip install -e SimplerEnv (it needs a GPU with Vulkan)"
)
STICKY_STEPS = 15  # for which the Google robot's gripper command is repeated after a change
_RENDER_SIZE = 256


class SimplerEnv(gymnasium.Env):
    """One task of the WidowX (5 Hz) or the Google robot (3 Hz) per episode.

    Observation:
        image_primary  uint8 [h, w, 3]; same viewpoint as the camera of the real robot's data
    Action:
        float32 [7]: dx, dy, dz (metres), droll, dpitch, dyaw (radians), gripper in [0, 1], 1 is
        open, as policies trained on Bridge or the Google robot's data predict it. The simulator
        takes the rotation as axis-angle. Its WidowX gripper command is 1 to open, -1 to close. The
        Google robot's is relative to the present opening and 1 closes; after a change it is
        repeated for `STICKY_STEPS` steps, since one step moves the gripper very little.

    An episode ends with the benchmark's success or its step limit. In a task of several subtasks
    the instruction changes when the simulator advances to the next one.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}  # noqa: RUF012

    def __init__(self, settings: SimplerSettings | None = None) -> None:
        settings = settings or SimplerSettings()
        self._package = adapters.import_simulator("simpler_env", "SimplerEnv", REMEDY)
        utils = adapters.import_simulator(
            "simpler_env.utils.env.observation_utils", "SimplerEnv", REMEDY
        )
        self._image = utils.get_image_from_maniskill2_obs_dict
        self._size = settings.primary_size
        self.observation_space = observation_space({"primary": (self._size, self._size)})
        self.action_space = gymnasium.spaces.Box(
            np.array([-1] * 3 + [-np.pi] * 3 + [0], np.float32),
            np.array([1] * 3 + [np.pi] * 3 + [1], np.float32),
        )
        self.render_mode = "rgb_array"
        self.skill, self.instruction = "", ""
        self._env: Any = None
        self._raw_observation: Any = None
        self._gripper = StickyGripper()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin an episode; options: any of {"split": str, "skills": list of str}."""
        super().reset(seed=seed)
        _, skills = parse_reset_options(options, tasks_of)
        skill = skills[int(self.np_random.integers(len(skills)))]
        if skill != self.skill:
            self.close()
            self._env, self.skill = self._package.make(skill), skill
        self._raw_observation, _ = self._env.reset(seed=seed)
        self.instruction = self._env.get_language_instruction()
        self._gripper = StickyGripper()
        return self._observation(), self._info(False, "")

    def step(
        self, action: np.ndarray
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Act for one control step; ValueError unless the action is seven finite numbers."""
        if self._env is None:
            raise RuntimeError("call reset() before step()")
        numbers = adapters.check_arm_action(action)
        if self.skill in WIDOWX:
            gripper = 1.0 if numbers[6] > 0.5 else -1.0
        else:
            gripper = self._gripper.step(numbers[6])
        command = np.concatenate([numbers[:3], rpy_to_axis_angle(*numbers[3:6]), [gripper]])
        self._raw_observation, reward, done, truncated, info = self._env.step(command)
        success = bool(info.get("success", done))
        terminated = success or bool(done)
        truncated = not terminated and bool(truncated)
        if not terminated and hasattr(self._env, "is_final_subtask"):
            if not self._env.is_final_subtask() and self._advance(info):
                self._env.advance_to_next_subtask()
            self.instruction = self._env.get_language_instruction()
        failure = "time ran out" if truncated else ""
        if terminated and not success:
            failure = "the task ended"
        info = self._info(success, failure)
        return self._observation(), float(reward), terminated, truncated, info

    def render(self) -> np.ndarray:
        """Return the primary image for videos: uint8 [256, 256, 3]."""
        return self._camera_image(_RENDER_SIZE)

    def close(self) -> None:
        """Close the simulation."""
        if self._env is not None:
            self._env.close()
            self._env, self.skill = None, ""

    @staticmethod
    def _advance(info: dict[str, Any]) -> bool:
        # A drawer must be open before the apple is put into it.
        return bool(info.get("episode_stats", {}).get("is_drawer_open", False))

    def _observation(self) -> dict[str, np.ndarray]:
        return {"image_primary": self._camera_image(self._size)}

    def _camera_image(self, size: int) -> np.ndarray:
        image = self._image(self._env, self._raw_observation)
        return adapters.resize_by_area(image, size, "image_primary")

    def _info(self, success: bool, failure: str) -> dict[str, Any]:
        return episode_info(self.instruction, self.skill, success, failure)


class StickyGripper:
    """Converts absolute openings to the Google robot's relative, repeated gripper command."""

    def __init__(self) -> None:
        self._last_opening: float | None = None
        self._command, self._steps_left = 0.0, 0

    def step(self, opening: float) -> float:
        """Return the command for an opening in [0, 1]: 1 closes, -1 opens, 0 does not move."""
        change = 0.0 if self._last_opening is None else self._last_opening - opening
        self._last_opening = opening
        if abs(change) > 0.5 and not self._steps_left:
            self._command, self._steps_left = float(np.sign(change)), STICKY_STEPS
        if not self._steps_left:
            return float(np.clip(change, -1, 1))
        self._steps_left -= 1
        return self._command


def rpy_to_axis_angle(roll: float, pitch: float, yaw: float) -> np.ndarray:
    """Return axis times angle of the rotation Rz(yaw) Ry(pitch) Rx(roll): float64 [3]."""
    half = np.array([roll, pitch, yaw]) / 2
    (cr, cp, cy), (sr, sp, sy) = np.cos(half), np.sin(half)
    w = cr * cp * cy + sr * sp * sy
    axis = np.array(
        [sr * cp * cy - cr * sp * sy, cr * sp * cy + sr * cp * sy, cr * cp * sy - sr * sp * cy]
    )
    sine = np.linalg.norm(axis)
    # q and -q are the same rotation; take the smaller angle
    angle = 2 * np.arctan2(sine, abs(w)) * (1 if w >= 0 else -1)
    return axis / sine * angle if sine > 1e-12 else np.zeros(3)
