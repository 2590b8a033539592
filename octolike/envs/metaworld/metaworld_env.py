"""MetaworldEnv: one of fifty tasks per episode, with one camera, hand control at 80 Hz."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import gymnasium
import numpy as np

from octolike.config import ConfigError
from octolike.envs.environment import (
    check_action,
    episode_info,
    parse_reset_options,
    scene_digest,
)
from octolike.envs.metaworld.metaworld_tasks import phrasings, tasks_of
from octolike.envs.rendering import OffscreenRenderer, load_mujoco, zoom_camera
from octolike.envs.simulators import MetaworldSettings
from octolike.envs.spaces import observation_space

CONTROL_HZ = 80
STEP_LIMIT = 500  # as in the benchmark
CAMERA, WRIST_CAMERA = "corner4", "gripperPOV"
_RENDER_SIZE = 256
# Releases from 3.1 require exactly MuJoCo 3.3.0, but work with later ones; 3.0.0 lacks the camera.
INSTALL = "pip install --no-deps packaging 'metaworld>=3.1,<4'"
_CACHED_SCENES = 4  # one needs 120 MB, and a second to build


class MetaworldEnv(gymnasium.Env):
    """A Sawyer arm at a table; the instruction names one of fifty tasks.

    Observation:
        image_primary  uint8 [h, w, 3]; the benchmark's camera `corner4`, rotated upright, with
                       `zoom` its middle alone
        image_wrist    uint8 [hw, hw, 3], with `hand_size`; the benchmark's camera `gripperPOV`,
                       on the hand, which looks down between the fingers
        proprio        float32 [4]: x, y, z of the hand (metres), gripper's opening in [0, 1]
    Action:
        float32 [4]: dx, dy, dz of the hand in [-1, 1], 1 for a centimetre, and the gripper's effort
        in [-1, 1]: -1 opens, 1 closes. Larger values are clipped.

    The remainder of the benchmark's observation is hidden, since it contains the positions of the
    objects and the goal. An episode is a pure function of the seed and the actions. It ends at the
    first step with the benchmark's own success, or after `STEP_LIMIT` steps.
    """

    metadata = {  # noqa: RUF012
        "render_modes": ["rgb_array"],
        "render_fps": CONTROL_HZ,
        "control_hz": CONTROL_HZ,
    }

    def __init__(self, settings: MetaworldSettings | None = None) -> None:
        settings = settings or MetaworldSettings()
        self._classes = _environment_classes()
        self._settings, self._size = settings, settings.primary_size
        self._scenes: OrderedDict[str, _MetaworldScene] = OrderedDict()
        self.render_mode = "rgb_array"
        sizes = {"primary": settings.primary_size, "wrist": settings.hand_size}
        images = {camera: (size, size) for camera, size in sizes.items() if size}
        self.observation_space = observation_space(images, (4, 2))
        self.action_space = gymnasium.spaces.Box(-1, 1, (4,), np.float32)
        self.skill, self.instruction, self.steps = "", "", 0
        self._state = np.zeros(0)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode.

        Args:
            seed: determines the task among the skills, its wording and the positions.
            options: any of {"split": str, "skills": list of str}.
        """
        super().reset(seed=seed)
        split, skills = parse_reset_options(options, tasks_of)
        wording_seed, position_seed = self.np_random.integers(2**31, size=2)
        self.skill = skills[int(self.np_random.integers(len(skills)))]
        wordings = phrasings(self.skill, split)
        self.instruction = wordings[wording_seed % len(wordings)]
        self.steps, self._state = 0, self._scene.arrange(int(position_seed))
        scene = scene_digest([self.skill], self._state)
        return self._observation(), self._info(False, "") | {"scene": scene}

    def step(
        self, action: np.ndarray
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Act for 1/80 s.

        Raises:
            ValueError: the action is not four finite numbers.
            RuntimeError: reset() was not called.
        """
        if not self.skill:
            raise RuntimeError("call reset() before step()")
        command = np.clip(check_action(action, 4, "dx dy dz gripper"), -1, 1)
        self._state, success = self._scene.step(command.astype(np.float32))
        self.steps += 1
        truncated = not success and self.steps >= STEP_LIMIT
        info = self._info(success, "time ran out" if truncated else "")
        return self._observation(), float(success), success, truncated, info

    def render(self) -> np.ndarray:
        """Return a larger image for videos: uint8 [256, 256, 3]."""
        return self._scene.render(_RENDER_SIZE)

    def close(self) -> None:
        """Free the render contexts."""
        for scene in self._scenes.values():
            scene.close()
        self._scenes.clear()

    def privileged_state(self) -> np.ndarray:
        """Return the benchmark's complete observation for its experts: float64 [39]."""
        return self._state

    @property
    def _scene(self) -> _MetaworldScene:
        """The simulation of the present task; the least recently used ones are closed."""
        if self.skill not in self._scenes:
            environment_class = self._classes[f"{self.skill}-v3"]
            self._scenes[self.skill] = _MetaworldScene(environment_class, self._settings.zoom)
            if len(self._scenes) > _CACHED_SCENES:
                self._scenes.popitem(last=False)[1].close()
        self._scenes.move_to_end(self.skill)
        return self._scenes[self.skill]

    def _observation(self) -> dict[str, np.ndarray]:
        observation = {
            "image_primary": self._scene.render(self._size),
            "proprio": self._state[:4].astype(np.float32),
        }
        if self._settings.hand_size:
            observation["image_wrist"] = self._scene.render_wrist(self._settings.hand_size)
        return observation

    def _info(self, success: bool, failure: str) -> dict[str, Any]:
        return episode_info(self.instruction, self.skill, success, failure)


class _MetaworldScene:
    """One of the benchmark's environments with a fast off-screen renderer."""

    def __init__(self, environment_class: type, zoom: float = 1.0) -> None:
        self.mujoco, self.gl_context = load_mujoco()
        self._env = _with_version_independent_welds(environment_class)()
        # The experts need the goal's position in the state; the policy does not get this state.
        self._env._partially_observable = False
        self._env._set_task_called = True
        self._env.__dict__.pop("sawyer_observation_space", None)
        self.model, self.data = self._env.model, self._env.data
        quality = self.model.vis.quality
        quality.offsamples = 0  # antialiasing takes most of the time
        quality.shadowsize = 0  # the shadow map takes most of the memory
        zoom_camera(self.model, CAMERA, zoom)
        self._renderer = OffscreenRenderer(self)

    def arrange(self, seed: int) -> np.ndarray:
        """Place hand, objects and goal as the seed determines; return the state, float64 [39]."""
        env = self._env
        # As in the benchmark: draw the goals (some repeatedly, until they fit), freeze them, and
        # reset again before the episode.
        env._freeze_rand_vec, env.seeded_rand_vec = False, True
        env.seed(seed)
        env.reset()
        env._freeze_rand_vec = True
        state, _ = env.reset()
        return np.asarray(state, np.float64)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, bool]:
        """Return (next state float64 [39], whether the task is done)."""
        state, _, _, _, info = self._env.step(action)
        return np.asarray(state, np.float64), bool(info["success"])

    def render(self, size: int) -> np.ndarray:
        """Return the camera's image: uint8 [size, size, 3]."""
        # the camera is mounted upside down
        return self._renderer.render(CAMERA, size, size)[::-1, ::-1].copy()

    def render_wrist(self, size: int) -> np.ndarray:
        """Return the image of the camera on the hand: uint8 [size, size, 3]."""
        return self._renderer.render(WRIST_CAMERA, size, size)

    def close(self) -> None:
        """Free the render context."""
        self._renderer.close()


def _environment_classes() -> dict[str, type]:
    """Return the benchmark's environments by name; ConfigError with the installation command."""
    try:
        load_mujoco()  # before metaworld imports mujoco: it selects the off-screen backend
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    except ImportError as error:
        raise ConfigError(
            f"Meta-World cannot be imported ({error}); install it next to octolike[sim]: {INSTALL}"
        ) from error
    missing = [s for s in tasks_of("train") if f"{s}-v3" not in ALL_V3_ENVIRONMENTS]
    if missing:
        raise ConfigError(f"this release of Meta-World lacks {missing}; {INSTALL}")
    return dict(ALL_V3_ENVIRONMENTS)


def _with_version_independent_welds(environment_class: type) -> type:
    """Return a subclass of a benchmark environment that works with any release of MuJoCo.

    The benchmark writes 11 numbers for its weld between hand and target. Later releases of MuJoCo
    store more numbers per constraint; a weld does not use the additional ones.
    """

    def reset_mocap_welds(self: Any) -> None:
        import mujoco

        welds = self.model.eq_type == mujoco.mjtEq.mjEQ_WELD.value
        self.model.eq_data[welds, :11] = (0, 0, 0, 0, 0, 0, -1, 0, 0, 0, 5)

    methods = {"reset_mocap_welds": reset_mocap_welds}
    return type(environment_class.__name__, (environment_class,), methods)
