"""AlohaEnv: the bimanual benchmark of gym-aloha, moved by joint targets at 50 Hz.

Scenes, start, actions and rewards are the benchmark's. Its Python side is left out: it draws three
pictures of 640 by 480 pixels at every step, where a policy wants a small one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from octolike.config import ConfigError, unknown
from octolike.envs import environment
from octolike.envs.tabletop.scene import OffscreenRenderer, load_mujoco

CONTROL_HZ = 50
STEP_LIMIT = 300  # as in the benchmark
MAX_REWARD = 4
JOINTS = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate")
NAMES = tuple(f"{arm}_{joint}" for arm in ("left", "right") for joint in (*JOINTS, "gripper"))
SPLITS = ("train",)
ROBOTS = {"aloha": {}}
INSTRUCTIONS = {
    "transfer_cube": "pick up the red cube with the right arm and hand it over to the left arm",
    "insertion": "pick up the red peg and the blue socket and insert the peg into the socket",
}
SKILLS = tuple(INSTRUCTIONS)
# Where a finger stands when its gripper is shut and open, as the benchmark scales it (metres).
FINGER_SHUT, FINGER_OPEN = 0.01844, 0.058
_ARM = (0, -0.96, 1.16, 0, -0.3, 0, 0.02239, -0.02239)
_SUBSTEPS = 10
_RENDER_SIZE = 256
# Where things start, within x and y (metres); in the order of their joints.
_SPOTS = {
    "transfer_cube": (((0.0, 0.2), (0.4, 0.6)),),
    "insertion": (((0.1, 0.2), (0.4, 0.6)), ((-0.2, -0.1), (0.4, 0.6))),
}
_DROP = 0.05  # metres: things start a little above the table and fall
_SOCKET = tuple(f"socket-{i}" for i in range(1, 5))


class AlohaEnv(gymnasium.Env):
    """Two six-jointed arms with grippers; hand a cube over, or put a peg into a socket.

    Observation:
        image_primary  uint8 [h, w, 3]; the benchmark's camera `top`, cut to a square
        proprio        float32 [14]: left arm's six joints (radians) and gripper's opening in
                       [0, 1], then the right arm's
    Action:
        float32 [14]: targets of the same, absolute. Joints are clipped to their range.

    An episode is a pure function of the seed and the actions. It ends with the benchmark's success,
    its largest reward of 4, or after `STEP_LIMIT` steps. A step's reward is the benchmark's.

    Args:
        primary_size: height and width of image_primary in pixels.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_HZ}  # noqa: RUF012

    def __init__(self, primary_size: int = 96) -> None:
        if not 8 <= primary_size <= 640:
            raise ValueError(f"primary_size is {primary_size}; images have 8 to 640 pixels a side")
        self._assets = _assets()
        self._size = primary_size
        self._stages: dict[str, AlohaScene] = {}
        self.render_mode = "rgb_array"
        pixels = (primary_size, primary_size, 3)
        self.observation_space = gymnasium.spaces.Dict(
            {
                "image_primary": gymnasium.spaces.Box(0, 255, pixels, np.uint8),
                "proprio": gymnasium.spaces.Box(-4, 4, (14,), np.float32),
            }
        )
        high = np.array(([np.pi] * 6 + [1]) * 2, np.float32)
        low = np.array(([-np.pi] * 6 + [0]) * 2, np.float32)
        self.action_space = gymnasium.spaces.Box(low, high, dtype=np.float32)
        self.skill, self.steps = "", 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: decides the task among the skills, and where things are.
            options: any of {"split": str, "skills": list of str}.
        """
        super().reset(seed=seed)
        _, skills = environment.skills_of(options, tasks_of)
        self.skill = skills[self.np_random.integers(len(skills))]
        self.steps = 0
        self.stage.arrange([self.np_random.uniform(*zip(*s)) for s in _SPOTS[self.skill]])
        return self._observation(), self._info(0, "")

    def step(
        self, action: np.ndarray
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Act for 1/50 s. An episode in which the simulation breaks down is cut off there.

        Raises:
            ValueError: the action is not fourteen finite numbers.
            RuntimeError: there was no reset.
        """
        if not self.skill:
            raise RuntimeError("call reset() before step()")
        self.stage.step(environment.checked_action(action, 14, "six joints and a gripper, twice"))
        self.steps += 1
        broken = self.stage.broken()
        reward = 0 if broken else REWARDS[self.skill](self.stage.contacts())
        success = reward == MAX_REWARD
        over = not success and (broken or self.steps >= STEP_LIMIT)
        why = "the simulation became unstable" if broken else "time ran out"
        info = self._info(reward, why if over else "")
        return self._observation(), float(reward), success, over, info

    def render(self) -> np.ndarray:
        """Return a larger picture for videos: uint8 [256, 256, 3]."""
        return self.stage.draw(_RENDER_SIZE)

    def close(self) -> None:
        """Free the render contexts."""
        for stage in self._stages.values():
            stage.close()
        self._stages.clear()

    @property
    def stage(self) -> AlohaScene:
        """The simulation of the present task."""
        if self.skill not in self._stages:
            self._stages[self.skill] = AlohaScene(
                self._assets / f"bimanual_viperx_{self.skill}.xml"
            )
        return self._stages[self.skill]

    def _observation(self) -> dict[str, np.ndarray]:
        return {
            "image_primary": self.stage.draw(self._size),
            "proprio": self.stage.joints().astype(np.float32),
        }

    def _info(self, reward: int, failure: str) -> dict[str, Any]:
        return environment.info(INSTRUCTIONS[self.skill], self.skill, reward == MAX_REWARD, failure)


class AlohaScene:
    """One of the benchmark's scenes with a fast off-screen renderer."""

    def __init__(self, path: Path) -> None:
        self.mujoco, self.gl_context = load_mujoco()
        self.model = self.mujoco.MjModel.from_xml_path(str(path))
        quality = self.model.vis.quality
        quality.offsamples = quality.shadowsize = 0  # smoothing and shadows take most of the time
        size = self.model.vis.global_
        size.offwidth = size.offheight = 640
        self.data = self.mujoco.MjData(self.model)
        kinds = self.mujoco.mjtWarning
        self._faults = (kinds.mjWARN_BADQPOS, kinds.mjWARN_BADQVEL, kinds.mjWARN_BADQACC)
        self._geoms = [self.model.geom(i).name for i in range(self.model.ngeom)]
        self._screen = OffscreenRenderer(self)

    def arrange(self, spots: Sequence[np.ndarray]) -> None:
        """Put the arms at their start and each thing at its x, y, a little above the table."""
        self.mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:16] = self.data.ctrl[:] = _ARM * 2
        for i, spot in enumerate(spots):
            self.data.qpos[16 + 7 * i : 23 + 7 * i] = *spot, _DROP, 1, 0, 0, 0
        self.mujoco.mj_forward(self.model, self.data)

    def step(self, action: np.ndarray) -> None:
        """Move towards joint targets, float64 [14], for one control step."""
        for arm in (0, 1):
            target = action[7 * arm : 7 * arm + 7]
            finger = FINGER_SHUT + target[6] * (FINGER_OPEN - FINGER_SHUT)
            self.data.ctrl[8 * arm : 8 * arm + 8] = *target[:6], finger, -finger
        self.mujoco.mj_step(self.model, self.data, _SUBSTEPS)
        # Contacts and pictures are to be those of where the arms are now, as in the benchmark.
        self.mujoco.mj_step1(self.model, self.data)

    def broken(self) -> bool:
        """Return whether MuJoCo found no numbers any more, and began anew by itself."""
        return any(self.data.warning[kind].number for kind in self._faults)

    def joints(self) -> np.ndarray:
        """Return joints and grippers in the order of `NAMES`, float64 [14]."""
        q = self.data.qpos[:16].reshape(2, 8)
        grippers = (q[:, 6:7] - FINGER_SHUT) / (FINGER_OPEN - FINGER_SHUT)
        return np.concatenate([q[:, :6], grippers], 1).ravel()

    def contacts(self) -> set[frozenset[str]]:
        """Return the pairs of names of what touches what."""
        name = self._geoms
        pairs = self.data.contact.geom[: self.data.ncon]
        return {frozenset((name[a], name[b])) for a, b in pairs}

    def things(self) -> np.ndarray:
        """Return where the things are, float64 [things, 3]; for the experts alone."""
        return self.data.qpos[16:].reshape(-1, 7)[:, :3].copy()

    def draw(self, size: int) -> np.ndarray:
        """Return the camera's picture: uint8 [size, size, 3]."""
        return self._screen.draw("top", size, size)

    def close(self) -> None:
        """Free the render context."""
        self._screen.close()


def tasks_of(split: str, skills: Sequence[str] | None = None) -> tuple[str, ...]:
    """List the tasks of a split; ConfigError for unknown names."""
    if split not in SPLITS:
        raise ConfigError(unknown("split", split, SPLITS))
    for skill in skills or ():
        if skill not in SKILLS:
            raise ConfigError(unknown("ALOHA task", skill, SKILLS))
    return tuple(skills or SKILLS)


def transfer_reward(contacts: set[frozenset[str]]) -> int:
    """Return 1: the right gripper touches the cube, 2: lifts it, 3: the left one too, 4: alone."""
    held = frozenset(("red_box", _finger("left"))) in contacts
    free = frozenset(("red_box", "table")) not in contacts
    if held:
        return 4 if free else 3
    if frozenset(("red_box", _finger("right"))) in contacts:
        return 2 if free else 1
    return 0


def insertion_reward(contacts: set[frozenset[str]]) -> int:
    """Return 1: both things touched, 2: both lifted, 3: peg in the socket's mouth, 4: pin met."""
    met = lambda a, *others: any(frozenset((a, b)) in contacts for b in others)
    if met("red_peg", "pin"):
        return 4
    free = not met("table", "red_peg", *_SOCKET)
    if free and met("red_peg", *_SOCKET):
        return 3
    if met("red_peg", _finger("right")) and met(_finger("left"), *_SOCKET):
        return 2 if free else 1
    return 0


REWARDS = {"transfer_cube": transfer_reward, "insertion": insertion_reward}


def _finger(arm: str) -> str:
    # The benchmark looks at one finger of each gripper.
    return f"vx300s_{arm}/10_{arm}_gripper_finger"


def _assets() -> Path:
    """Return the folder of the benchmark's scenes, or say how to install it."""
    load_mujoco()  # first of all: it chooses how to draw without a screen
    spec = importlib.util.find_spec("gym_aloha")
    if spec is None or spec.origin is None:
        # gym-aloha 0.1.5 asks for mujoco before 3.9; only its scenes are used, and any will do.
        raise ConfigError(
            "the ALOHA simulator needs gym-aloha's scenes: pip install 'octolike[sim]' && "
            "pip install --no-deps 'gym-aloha>=0.1.3'"
        )
    assets = Path(spec.origin).parent / "assets"
    missing = [s for s in SKILLS if not (assets / f"bimanual_viperx_{s}.xml").is_file()]
    if missing:
        raise ConfigError(f"{assets} lacks the scenes of {missing}; gym-aloha>=0.1.3 has them")
    return assets
