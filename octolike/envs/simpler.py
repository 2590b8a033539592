"""SimplerEnv: simulated twins of the WidowX Bridge and Google robot tasks, where installed."""

from __future__ import annotations

import functools
from typing import Any

import gymnasium
import numpy as np

from octolike.envs import adapters, environment

REMEDY = (
    "git clone --recurse-submodules https://github.com/simpler-env/SimplerEnv, then pip install -e "
    "SimplerEnv/ManiSkill2_real2sim && pip install -e SimplerEnv (it needs a GPU with Vulkan)"
)
WIDOWX = (
    "widowx_spoon_on_towel",
    "widowx_carrot_on_plate",
    "widowx_stack_cube",
    "widowx_put_eggplant_in_basket",
)
GOOGLE = (
    "google_robot_pick_coke_can",
    "google_robot_pick_object",
    "google_robot_move_near",
    "google_robot_open_drawer",
    "google_robot_close_drawer",
    "google_robot_place_apple_in_closed_top_drawer",
)
SKILLS = WIDOWX + GOOGLE
SPLITS = ("train",)
ROBOTS = {"bridge_dataset": {}, "bridge_orig": {}, "bridge_oxe": {}, "fractal20220817_data": {}}
STICK = 15  # steps for which the Google robot's gripper goes on after a change
_RENDER_SIZE = 256

tasks_of = functools.partial(adapters.choose_tasks, "SimplerEnv", choices=SKILLS)


class SimplerEnv(gymnasium.Env):
    """One task of the WidowX (5 Hz) or the Google robot (3 Hz) per episode.

    Observation:
        image_primary  uint8 [h, w, 3]; the camera that the real robot's data has
    Action:
        float32 [7]: dx, dy, dz (metres), droll, dpitch, dyaw (radians), gripper in [0, 1], 1 is
        open: what policies trained on Bridge or the Google robot's data predict. The simulator is
        given the rotation as axis-angle. Its WidowX gripper: 1 opens, -1 closes. The Google robot's
        moves relative to where it is, 1 closes: a change is held for `STICK` steps, since one
        step's would hardly be seen.

    It ends with the benchmark's success or its own limit of steps; in tasks of several parts the
    simulator goes on to the next, with its instruction, where it says so.

    Args:
        primary_size: height and width of image_primary in pixels.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}  # noqa: RUF012

    def __init__(self, primary_size: int = 128) -> None:
        if not 8 <= primary_size <= 640:
            raise ValueError(f"primary_size is {primary_size}; images have 8 to 640 pixels a side")
        self._package = adapters.load("simpler_env", "SimplerEnv", REMEDY)
        module = "simpler_env.utils.env.observation_utils"
        self._image = adapters.load(module, "SimplerEnv", REMEDY).get_image_from_maniskill2_obs_dict
        self._size = primary_size
        box = gymnasium.spaces.Box
        pixels = (primary_size, primary_size, 3)
        self.observation_space = gymnasium.spaces.Dict(
            {"image_primary": box(0, 255, pixels, np.uint8)}
        )
        self.action_space = box(
            np.array([-1] * 3 + [-np.pi] * 3 + [0], np.float32),
            np.array([1] * 3 + [np.pi] * 3 + [1], np.float32),
        )
        self.render_mode = "rgb_array"
        self.skill, self.instruction = "", ""
        self._env: Any = None
        self._seen: Any = None
        self._gripper = StickyGripper()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin an episode; options: any of {"split": str, "skills": list of str}."""
        super().reset(seed=seed)
        _, skills = environment.skills_of(options, tasks_of)
        skill = skills[int(self.np_random.integers(len(skills)))]
        if skill != self.skill:
            self.close()
            self._env, self.skill = self._package.make(skill), skill
        self._seen, _ = self._env.reset(seed=seed)
        self.instruction = self._env.get_language_instruction()
        self._gripper = StickyGripper()
        return self._observation(), self._info(False, "")

    def step(
        self, action: np.ndarray
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Act for one control step; ValueError where the action is not seven finite numbers."""
        if self._env is None:
            raise RuntimeError("call reset() before step()")
        numbers = adapters.checked(action)
        if self.skill in WIDOWX:
            gripper = 1.0 if numbers[6] > 0.5 else -1.0
        else:
            gripper = self._gripper.step(numbers[6])
        command = np.concatenate([numbers[:3], axis_angle(*numbers[3:6]), [gripper]])
        self._seen, reward, done, truncated, info = self._env.step(command)
        success = bool(info.get("success", done))
        ended = success or bool(done)
        over = not ended and bool(truncated)
        if not ended and hasattr(self._env, "is_final_subtask"):
            if not self._env.is_final_subtask() and self._advance(info):
                self._env.advance_to_next_subtask()
            self.instruction = self._env.get_language_instruction()
        failure = "time ran out" if over else "" if success or not ended else "the task ended"
        return self._observation(), float(reward), ended, over, self._info(success, failure)

    def render(self) -> np.ndarray:
        """Return the primary picture for videos: uint8 [256, 256, 3]."""
        return adapters.picture(self._image(self._env, self._seen), _RENDER_SIZE, "image_primary")

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
        image = self._image(self._env, self._seen)
        return {"image_primary": adapters.picture(image, self._size, "image_primary")}

    def _info(self, success: bool, failure: str) -> dict[str, Any]:
        return environment.info(self.instruction, self.skill, success, failure)


class StickyGripper:
    """Turns absolute openings into the Google robot's relative command, held for `STICK` steps."""

    def __init__(self) -> None:
        self._last: float | None = None
        self._command, self._left = 0.0, 0

    def step(self, opening: float) -> float:
        """Return the command for an opening in [0, 1]: 1 closes, -1 opens, 0 rests."""
        change = 0.0 if self._last is None else self._last - opening
        self._last = opening
        if abs(change) > 0.5 and not self._left:
            self._command, self._left = float(np.sign(change)), STICK
        if not self._left:
            return float(np.clip(change, -1, 1))
        self._left -= 1
        return self._command


def axis_angle(roll: float, pitch: float, yaw: float) -> np.ndarray:
    """Return the rotation yaw · pitch · roll about fixed axes as axis times angle, float64 [3]."""
    half = np.array([roll, pitch, yaw]) / 2
    (cr, cp, cy), (sr, sp, sy) = np.cos(half), np.sin(half)
    w = cr * cp * cy + sr * sp * sy
    axis = np.array(
        [sr * cp * cy - cr * sp * sy, cr * sp * cy + sr * cp * sy, cr * cp * sy - sr * sp * cy]
    )
    sine = np.linalg.norm(axis)
    # -q turns as q does; the smaller angle is meant
    angle = 2 * np.arctan2(sine, abs(w)) * (1 if w >= 0 else -1)
    return axis / sine * angle if sine > 1e-12 else np.zeros(3)
