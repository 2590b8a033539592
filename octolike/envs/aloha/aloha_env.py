"""AlohaEnv: the bimanual benchmark of gym-aloha, controlled by joint targets at 50 Hz.

Scenes, start, actions and rewards are the benchmark's. Its Python code is not used: it renders
three images of 640 by 480 pixels at every step, while a policy needs one small image.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from octolike.config import ConfigError
from octolike.envs.environment import check_action, episode_info, parse_reset_options
from octolike.envs.rendering import OffscreenRenderer, load_mujoco, zoom_camera
from octolike.envs.simulators import AlohaSettings
from octolike.envs.spaces import observation_space
from octolike.envs.task_tables import choose_tasks

CONTROL_HZ = 50
STEP_LIMIT = 300  # as in the benchmark
MAX_REWARD = 4
JOINTS = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate")
NAMES = tuple(f"{arm}_{joint}" for arm in ("left", "right") for joint in (*JOINTS, "gripper"))
SPLITS = ("train",)
ROBOTS: Mapping[str, Mapping[str, str]] = {"aloha": {}}
INSTRUCTIONS = {
    "transfer_cube": "pick up the red cube with the right arm and hand it over to the left arm",
    "insertion": "pick up the red peg and the blue socket and insert the peg into the socket",
}
SKILLS = tuple(INSTRUCTIONS)
tasks_of = functools.partial(choose_tasks, "ALOHA", choices=SKILLS, splits=SPLITS)
# Finger positions of a closed and an open gripper, as the benchmark scales them (metres).
FINGER_CLOSED, FINGER_OPEN = 0.01844, 0.058
_ARM = (0, -0.96, 1.16, 0, -0.3, 0, 0.02239, -0.02239)
_SUBSTEPS = 10
# Of the benchmark, by the names that the specs of ALOHA's real data use.
_CAMERAS = {"primary": "top", "wrist": "right_wrist", "left_wrist": "left_wrist"}
_RENDER_SIZE = 256
# Ranges of x and y of the objects' start positions (metres), in the order of their joints.
_START_RANGES = {
    "transfer_cube": (((0.0, 0.2), (0.4, 0.6)),),
    "insertion": (((0.1, 0.2), (0.4, 0.6)), ((-0.2, -0.1), (0.4, 0.6))),
}
_DROP_HEIGHT = 0.05  # metres: objects start slightly above the table and fall
_SOCKET = tuple(f"socket-{i}" for i in range(1, 5))


class AlohaEnv(gymnasium.Env):
    """Two arms with six joints and a gripper each; hand over a cube, or insert a peg in a socket.

    Observation:
        image_primary     uint8 [h, w, 3]; the benchmark's camera `top`, square; with `zoom`
                          its middle alone
        image_wrist       uint8 [w, w, 3]; the right hand's camera, with `hand_size` alone
        image_left_wrist  the same of the left hand
        proprio           float32 [14]: six joints (radians) and the gripper's opening in [0, 1] of
                          the left arm, then of the right arm
    Action:
        float32 [14]: absolute targets for the same values. Joints are clipped to their range.

    An episode is a pure function of the seed and the actions. It ends with the benchmark's success,
    its highest reward of 4, or after `STEP_LIMIT` steps. The reward of a step is the benchmark's.
    """

    metadata = {  # noqa: RUF012
        "render_modes": ["rgb_array"],
        "render_fps": CONTROL_HZ,
        "control_hz": CONTROL_HZ,
    }

    def __init__(self, settings: AlohaSettings | None = None) -> None:
        settings = settings or AlohaSettings()
        self._assets = _find_assets()
        self._zoom = settings.zoom
        self._sizes = {"primary": settings.primary_size}
        if settings.hand_size:
            self._sizes |= dict.fromkeys(("wrist", "left_wrist"), settings.hand_size)
        self._scenes: dict[str, AlohaScene] = {}
        self.render_mode = "rgb_array"
        self.observation_space = observation_space(
            {camera: (size, size) for camera, size in self._sizes.items()}, (14, 4)
        )
        high = np.array(([np.pi] * 6 + [1]) * 2, np.float32)
        low = np.array(([-np.pi] * 6 + [0]) * 2, np.float32)
        self.action_space = gymnasium.spaces.Box(low, high, dtype=np.float32)
        self.skill, self.steps = "", 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode.

        Args:
            seed: determines the task among the skills, and the objects' positions.
            options: any of {"split": str, "skills": list of str}.
        """
        super().reset(seed=seed)
        _, skills = parse_reset_options(options, tasks_of)
        self.skill = skills[int(self.np_random.integers(len(skills)))]
        self.steps = 0
        self.scene.arrange(
            [self.np_random.uniform(*np.transpose(ranges)) for ranges in _START_RANGES[self.skill]]
        )
        return self._observation(), self._info(0, "")

    def step(
        self, action: np.ndarray
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Act for 1/50 s. If the simulation becomes unstable, the episode is truncated.

        Raises:
            ValueError: the action is not fourteen finite numbers.
            RuntimeError: reset() was not called.
        """
        if not self.skill:
            raise RuntimeError("call reset() before step()")
        self.scene.step(check_action(action, 14, "six joints and a gripper, twice"))
        self.steps += 1
        unstable = self.scene.unstable()
        reward = 0 if unstable else REWARDS[self.skill](self.scene.contacts())
        success = reward == MAX_REWARD
        truncated = not success and (unstable or self.steps >= STEP_LIMIT)
        reason = "the simulation became unstable" if unstable else "time ran out"
        info = self._info(reward, reason if truncated else "")
        return self._observation(), float(reward), success, truncated, info

    def render(self) -> np.ndarray:
        """Return a larger image for videos: uint8 [256, 256, 3]."""
        return self.scene.render("primary", _RENDER_SIZE)

    def close(self) -> None:
        """Free the render contexts."""
        for scene in self._scenes.values():
            scene.close()
        self._scenes.clear()

    @property
    def scene(self) -> AlohaScene:
        """The simulation of the present task."""
        if self.skill not in self._scenes:
            self._scenes[self.skill] = AlohaScene(
                self._assets / f"bimanual_viperx_{self.skill}.xml", self._zoom
            )
        return self._scenes[self.skill]

    def _observation(self) -> dict[str, np.ndarray]:
        scene = self.scene
        images = {f"image_{c}": scene.render(c, size) for c, size in self._sizes.items()}
        return images | {"proprio": scene.joints().astype(np.float32)}

    def _info(self, reward: int, failure: str) -> dict[str, Any]:
        return episode_info(INSTRUCTIONS[self.skill], self.skill, reward == MAX_REWARD, failure)


class AlohaScene:
    """One of the benchmark's scenes with a fast off-screen renderer."""

    def __init__(self, path: Path, zoom: float) -> None:
        self.mujoco, self.gl_context = load_mujoco()
        self.model = self.mujoco.MjModel.from_xml_path(str(path))
        quality = self.model.vis.quality
        quality.offsamples = quality.shadowsize = (
            0  # antialiasing and shadows take most of the time
        )
        zoom_camera(self.model, _CAMERAS["primary"], zoom)
        size = self.model.vis.global_
        size.offwidth = size.offheight = 640
        self.data = self.mujoco.MjData(self.model)
        warnings = self.mujoco.mjtWarning
        self._instabilities = (
            warnings.mjWARN_BADQPOS,
            warnings.mjWARN_BADQVEL,
            warnings.mjWARN_BADQACC,
        )
        self._geoms = [self.model.geom(i).name for i in range(self.model.ngeom)]
        self._renderer = OffscreenRenderer(self)

    def arrange(self, spots: Sequence[np.ndarray]) -> None:
        """Place the arms at their start, and each object at its x, y slightly above the table."""
        self.mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:16] = self.data.ctrl[:] = _ARM * 2
        for i, spot in enumerate(spots):
            self.data.qpos[16 + 7 * i : 23 + 7 * i] = *spot, _DROP_HEIGHT, 1, 0, 0, 0
        self.mujoco.mj_forward(self.model, self.data)

    def step(self, action: np.ndarray) -> None:
        """Move towards joint targets, float64 [14], for one control step."""
        for arm in (0, 1):
            target = action[7 * arm : 7 * arm + 7]
            finger = FINGER_CLOSED + target[6] * (FINGER_OPEN - FINGER_CLOSED)
            self.data.ctrl[8 * arm : 8 * arm + 8] = *target[:6], finger, -finger
        self.mujoco.mj_step(self.model, self.data, _SUBSTEPS)
        # Update contacts and rendering to the new positions, as in the benchmark.
        self.mujoco.mj_step1(self.model, self.data)

    def unstable(self) -> bool:
        """Return whether MuJoCo met non-finite or huge values, after which it resets itself."""
        return any(self.data.warning[kind].number for kind in self._instabilities)

    def joints(self) -> np.ndarray:
        """Return joints and grippers in the order of `NAMES`, float64 [14]."""
        q = self.data.qpos[:16].reshape(2, 8)
        grippers = (q[:, 6:7] - FINGER_CLOSED) / (FINGER_OPEN - FINGER_CLOSED)
        return np.concatenate([q[:, :6], grippers], 1).ravel()

    def contacts(self) -> set[frozenset[str]]:
        """Return the pairs of geom names in contact."""
        names = self._geoms
        pairs = self.data.contact.geom[: self.data.ncon]
        return {frozenset((names[a], names[b])) for a, b in pairs}

    def object_positions(self) -> np.ndarray:
        """Return the objects' positions, float64 [objects, 3]; for the experts only."""
        return self.data.qpos[16:].reshape(-1, 7)[:, :3].copy()

    def render(self, camera: str, size: int) -> np.ndarray:
        """Return the image of a camera of `_CAMERAS`: uint8 [size, size, 3]."""
        return self._renderer.render(_CAMERAS[camera], size, size)

    def close(self) -> None:
        """Free the render context."""
        self._renderer.close()


def transfer_reward(contacts: set[frozenset[str]]) -> int:
    """Return 0 to 4.

    1: the right gripper touches the cube; 2: and has lifted it; 3: the left gripper touches it;
    4: the left gripper touches it and it is off the table.
    """
    left_touches = frozenset(("red_box", _finger("left"))) in contacts
    lifted = frozenset(("red_box", "table")) not in contacts
    if left_touches:
        return 4 if lifted else 3
    if frozenset(("red_box", _finger("right"))) in contacts:
        return 2 if lifted else 1
    return 0


def insertion_reward(contacts: set[frozenset[str]]) -> int:
    """Return 0 to 4.

    1: both grippers touch their object; 2: and have lifted both; 3: the peg touches the socket
    above the table; 4: the peg touches the pin inside the socket.
    """

    def touches(geom: str, *others: str) -> bool:
        return any(frozenset((geom, other)) in contacts for other in others)

    if touches("red_peg", "pin"):
        return 4
    lifted = not touches("table", "red_peg", *_SOCKET)
    if lifted and touches("red_peg", *_SOCKET):
        return 3
    if touches("red_peg", _finger("right")) and touches(_finger("left"), *_SOCKET):
        return 2 if lifted else 1
    return 0


REWARDS = {"transfer_cube": transfer_reward, "insertion": insertion_reward}


def _finger(arm: str) -> str:
    # The benchmark checks one finger of each gripper.
    return f"vx300s_{arm}/10_{arm}_gripper_finger"


def _find_assets() -> Path:
    """Return the folder of the benchmark's scenes; ConfigError with the installation command."""
    load_mujoco()  # first: it selects the off-screen backend
    spec = importlib.util.find_spec("gym_aloha")
    if spec is None or spec.origin is None:
        raise ConfigError(
            "the ALOHA simulator needs gym-aloha's scenes: pip install 'octolike[sim,aloha]'"
        )
    assets = Path(spec.origin).parent / "assets"
    missing = [s for s in SKILLS if not (assets / f"bimanual_viperx_{s}.xml").is_file()]
    if missing:
        raise ConfigError(f"{assets} lacks the scenes of {missing}; gym-aloha 0.1.3 has them")
    return assets
