"""MetaworldEnv: one of fifty tasks per episode, seen by one camera, moved by hand at 80 Hz."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import gymnasium
import numpy as np

from octolike.config import ConfigError
from octolike.envs import environment
from octolike.envs.metaworld.metaworld_tasks import phrasings, tasks_of
from octolike.envs.tabletop.scene import OffscreenRenderer, load_mujoco

CONTROL_HZ = 80
STEP_LIMIT = 500  # as in the benchmark
CAMERA = "corner4"
_RENDER_SIZE = 256
_KEPT = 4  # simulated tasks kept ready; one has 120 MB and takes a second to make


class MetaworldEnv(gymnasium.Env):
    """A Sawyer arm before a table; the instruction says which of fifty tasks to do.

    Observation:
        image_primary  uint8 [h, w, 3]; the benchmark's camera `corner4`, turned upright
        proprio        float32 [4]: x, y, z of the hand (metres), gripper's opening in [0, 1]
    Action:
        float32 [4]: dx, dy, dz of the hand in [-1, 1], 1 for a centimetre, and the gripper's effort
        in [-1, 1]: -1 opens, 1 closes. Larger values are clipped.

    Nothing else of the benchmark's observation is shown: it holds where the objects and the goal
    are. An episode is a pure function of the seed and the actions. It ends with the benchmark's own
    success, at the first step that has it, or after `STEP_LIMIT` steps.

    Args:
        primary_size: height and width of image_primary in pixels.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_HZ}  # noqa: RUF012

    def __init__(self, primary_size: int = 96) -> None:
        if not 8 <= primary_size <= 640:
            raise ValueError(f"primary_size is {primary_size}; images have 8 to 640 pixels a side")
        self._classes = _classes()
        self._size = primary_size
        self._stages: OrderedDict[str, _MetaworldScene] = OrderedDict()
        self.render_mode = "rgb_array"
        self.observation_space = gymnasium.spaces.Dict(
            {
                "image_primary": gymnasium.spaces.Box(
                    0, 255, (primary_size, primary_size, 3), np.uint8
                ),
                "proprio": gymnasium.spaces.Box(-2, 2, (4,), np.float32),
            }
        )
        self.action_space = gymnasium.spaces.Box(-1, 1, (4,), np.float32)
        self.skill, self.instruction, self.steps = "", "", 0
        self._state = np.zeros(0)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: decides the task among the skills, its wording and where things are.
            options: any of {"split": str, "skills": list of str}.
        """
        super().reset(seed=seed)
        split, skills = environment.skills_of(options, tasks_of)
        words_seed, place_seed = self.np_random.integers(2**31, size=2)
        self.skill = skills[self.np_random.integers(len(skills))]
        words = phrasings(self.skill, split)
        self.instruction = words[words_seed % len(words)]
        self.steps, self._state = 0, self._stage.arrange(int(place_seed))
        return self._observation(), self._info(False, "")

    def step(
        self, action: np.ndarray
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Act for 1/80 s.

        Raises:
            ValueError: the action is not four finite numbers.
            RuntimeError: there was no reset.
        """
        if not self.skill:
            raise RuntimeError("call reset() before step()")
        moves = np.clip(environment.checked_action(action, 4, "dx dy dz gripper"), -1, 1)
        self._state, success = self._stage.step(moves.astype(np.float32))
        self.steps += 1
        over = not success and self.steps >= STEP_LIMIT
        info = self._info(success, "time ran out" if over else "")
        return self._observation(), float(success), success, over, info

    def render(self) -> np.ndarray:
        """Return a larger picture for videos: uint8 [256, 256, 3]."""
        return self._stage.draw(_RENDER_SIZE)

    def close(self) -> None:
        """Free the render contexts."""
        for stage in self._stages.values():
            stage.close()
        self._stages.clear()

    def privileged_state(self) -> np.ndarray:
        """Return the benchmark's whole observation, float64 [39]: for its experts alone."""
        return self._state

    @property
    def _stage(self) -> _MetaworldScene:
        """The simulation of the present task; those used least recently are given up."""
        if self.skill not in self._stages:
            self._stages[self.skill] = _MetaworldScene(self._classes[f"{self.skill}-v3"])
            if len(self._stages) > _KEPT:
                self._stages.popitem(last=False)[1].close()
        self._stages.move_to_end(self.skill)
        return self._stages[self.skill]

    def _observation(self) -> dict[str, np.ndarray]:
        return {
            "image_primary": self._stage.draw(self._size),
            "proprio": self._state[:4].astype(np.float32),
        }

    def _info(self, success: bool, failure: str) -> dict[str, Any]:
        return environment.info(self.instruction, self.skill, success, failure)


class _MetaworldScene:
    """One of the benchmark's environments with a fast off-screen renderer."""

    def __init__(self, environment: type) -> None:
        self.mujoco, self.gl_context = load_mujoco()
        self._env = _fitting(environment)()
        # The experts read where the goal is; the policy is shown no such thing.
        self._env._partially_observable = False
        self._env._set_task_called = True
        self._env.__dict__.pop("sawyer_observation_space", None)
        self.model, self.data = self._env.model, self._env.data
        quality = self.model.vis.quality
        quality.offsamples = 0  # smoothing takes most of the time
        quality.shadowsize = 0  # and a map for shadows most of the memory
        self._screen = OffscreenRenderer(self)

    def arrange(self, seed: int) -> np.ndarray:
        """Put hand, objects and goal where the seed says; returns the state, float64 [39]."""
        env = self._env
        # Drawn as the benchmark draws its goals (some are drawn again until they suit), then fixed
        # and reset once more, as the benchmark does before an episode.
        env._freeze_rand_vec, env.seeded_rand_vec = False, True
        env.seed(seed)
        env.reset()
        env._freeze_rand_vec = True
        state, _ = env.reset()
        return np.asarray(state, np.float64)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, bool]:
        """Return the state that follows, float64 [39], and whether the task is done."""
        state, _, _, _, info = self._env.step(action)
        return np.asarray(state, np.float64), bool(info["success"])

    def draw(self, size: int) -> np.ndarray:
        """Return the camera's picture: uint8 [size, size, 3]."""
        return self._screen.draw(CAMERA, size, size)[::-1, ::-1].copy()  # it hangs upside down

    def close(self) -> None:
        """Free the render context."""
        self._screen.close()


def _classes() -> dict[str, type]:
    """Return the benchmark's environments by name, or say how to install it."""
    try:
        load_mujoco()  # first of all: it chooses how to draw without a screen
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    except ImportError as error:
        # metaworld 3.1 asks for exactly mujoco 3.3.0, but works with the one that is locked here.
        raise ConfigError(
            f"Meta-World cannot be imported ({error}); install it beside the simulator's packages: "
            "pip install packaging imageio scipy && pip install --no-deps 'metaworld>=3.1,<4'"
        ) from error
    missing = [s for s in tasks_of("train") if f"{s}-v3" not in ALL_V3_ENVIRONMENTS]
    if missing:
        raise ConfigError(f"this release of Meta-World lacks {missing}; metaworld>=3.1,<4 has them")
    return dict(ALL_V3_ENVIRONMENTS)


def _fitting(environment: type) -> type:
    """Return an environment of the benchmark for any release of MuJoCo.

    Its weld between hand and target has 11 numbers, and releases after the one that it was written
    for keep more for each constraint, which make no difference to a weld.
    """

    def reset_mocap_welds(self: Any) -> None:
        import mujoco

        welds = self.model.eq_type == mujoco.mjtEq.mjEQ_WELD.value
        self.model.eq_data[welds, :11] = (0, 0, 0, 0, 0, 0, -1, 0, 0, 0, 5)

    return type(environment.__name__, (environment,), {"reset_mocap_welds": reset_mocap_welds})
