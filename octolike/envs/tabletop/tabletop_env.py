"""TabletopEnv: one language task per episode, controlled by end-effector deltas."""

from typing import Any

import gymnasium
import numpy as np

from octolike.config import ConfigError
from octolike.envs.environment import check_action, scene_digest
from octolike.envs.rendering import OffscreenRenderer
from octolike.envs.simulators import TabletopSettings
from octolike.envs.spaces import observation_space
from octolike.envs.tabletop import conventions
from octolike.envs.tabletop import tabletop_tasks as tasks
from octolike.envs.tabletop.scene import FINGER_OPENING, SIZE, TIMESTEP, TabletopScene
from octolike.envs.tabletop.tabletop_tasks import (
    DIRECTIONS,
    STEP_LIMITS,
    TableObject,
    TabletopTask,
    TaskState,
)
from octolike.envs.task_tables import check_choice

# At 5 Hz; at a higher rate, a step is shorter in time and in the move.
MAX_MOVE = 0.05  # metres per axis and step
MAX_TURN = 0.3  # radians per axis and step
# Limits of the fingertips (metres), and of the hand's roll, pitch and yaw (radians).
WORKSPACE_LOW = np.array([-0.20, -0.22, 0.012])
WORKSPACE_HIGH = np.array([0.20, 0.22, 0.22])
MAX_ANGLES = np.array([0.6, 0.6, 1.6])
_SPAWN = np.array([0.13, 0.15])  # objects start within ± these x, y
_REACH = np.array([0.17, 0.20])  # a pushed object ends within ± these x, y
_RAMP = 0.75  # fraction of a step in which the target moves; the remainder is for settling
_CHECK_EVERY = 5  # physics steps between two contact checks
_BELT_END = -0.2  # y in metres: the belt carries nothing beyond it
_ON_TABLE = 0.002  # metres: what lies on the belt is at most so much higher than at rest
_RENDER_SIZE = 256
_MAX_DISTRACTORS = 4  # with five, there is hardly any layout with two bowls
_LAYOUT_ATTEMPTS = 1000


class TabletopEnv(gymnasium.Env):
    """A table, a two-finger gripper and coloured objects; the instruction states the task.

    Observation:
        image_primary  uint8 [h, w, 3]; fixed camera, near and steep
        image_wrist    uint8 [hw, hw, 3]; looks down at the fingertips
        proprio        float32 [7]: x, y, z (metres), roll, pitch, yaw (radians), opening in [0, 1]
    Action:
        float32 [7]: dx, dy, dz (metres), droll, dpitch, dyaw (radians), gripper (> 0.5 is open).
        Moves are clipped to ±MAX_MOVE and ±MAX_TURN (at 10 Hz to half of them), their targets to
        the workspace. With another `action_convention`, dx, dy, dz or gripper have another meaning
        (`tabletop.conventions`).

    With a `belt`, everything that lies on the table moves to the right (−y) at that speed.

    An episode is a pure function of the seed and the actions. It ends with success, with a failure
    (`tabletop_tasks.failure_reason`) or at the skill's step limit. In the split `counterfactual`
    it also ends, as a failure, when the scene's original task is done; info then contains the name
    of that task (`original`) and whether it was done (`instead`).
    """

    def __init__(self, settings: TabletopSettings | None = None) -> None:
        self.settings = settings = settings or TabletopSettings()
        hz = settings.control_hz
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": hz, "control_hz": hz}
        self.step_share = 5 / hz  # of the moves and of the time of a step at 5 Hz
        size = settings.primary_size
        height, width = (size, size) if isinstance(size, int) else size
        self._size = height, width
        self.render_mode = "rgb_array"
        self._scenes: dict[int, tuple[TabletopScene, OffscreenRenderer]] = {}
        self._select_scene(2 + settings.num_distractors)
        images = {"primary": self._size, "wrist": (settings.wrist_size, settings.wrist_size)}
        self.observation_space = observation_space(images, (7, np.pi))
        moves = np.array([*self._move_limits(), 0], np.float32)
        moves = np.abs(conventions.to_robot(moves, settings.action_convention)[:6])
        low, high = np.append(-moves, np.float32(0)), np.append(moves, np.float32(1))
        self.action_space = gymnasium.spaces.Box(low, high, dtype=np.float32)
        self.task: TabletopTask | None = None
        self.original: TabletopTask | None = None
        self.steps = 0
        self._objects: tuple[TableObject, ...] = ()
        self._start_positions: dict[TableObject, np.ndarray] = {}
        self._touched: TableObject | None = None
        self._grasped: TableObject | None = None
        self._milestones: set[str] = set()
        self._failure = ""

    # gymnasium's interface

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Set the table for a task.

        Args:
            seed: determines the task, the layout and the gripper's start.
            options: {"task": TabletopTask}, or any of {"split": str, "skills": list of str}
                to draw a task.
        """
        super().reset(seed=seed)
        options = dict(options or {})
        for key in options:
            check_choice("reset option", key, ("task", "split", "skills"))
        if "task" in options and len(options) > 1:
            raise ConfigError(f"a task excludes split and skills: got options {sorted(options)}")
        split = options.get("split", "train")
        extra = tasks.MORE_DISTRACTORS if split == "distractors" else 0
        self._select_scene(2 + min(self.settings.num_distractors + extra, _MAX_DISTRACTORS))
        task = options.pop("task", None) or tasks.sample_task(self.np_random, **options)
        self._set_up(task)
        if split == "counterfactual":
            self._draw_counterfactual(options)
        return self.observe(), self._info("", False) | {"scene": self._digest()}

    def step(
        self, action: np.ndarray
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Act for 1 / control_hz seconds.

        Raises:
            ValueError: the action is not seven finite numbers.
            RuntimeError: reset() was not called.
        """
        if self.task is None:
            raise RuntimeError("call reset() before step()")
        numbers = check_action(action, 7, "dx dy dz droll dpitch dyaw gripper")
        self._move(conventions.to_table(numbers, self.settings.action_convention))
        self.steps += 1
        state = self.task_state()
        self._grasped = self._grasped or state.grasped
        self._milestones |= tasks.new_milestones(self.task, state, self._milestones)
        self._failure = self._failure or tasks.failure_reason(self.task, state)
        success = not self._failure and tasks.succeeded(self.task, state)
        instead = not success and self._original_succeeded()
        # After a failure of the task, the episode continues while the original can still succeed.
        pending = self.original is not None and not tasks.failure_reason(
            self.original, self.task_state(self.original)
        )
        done = bool(success or instead or (self._failure and not pending))
        truncated = not done and self.steps * self.step_share >= STEP_LIMITS[self.task.skill]
        failure = (
            f"did {self.original.name} instead" if self.original and instead else self._failure
        )
        info = self._info(failure if done or truncated else "", success, instead)
        info["milestones"] = {
            name: name in self._milestones for name in tasks.MILESTONES[self.task.skill]
        }
        if "grasped" in info["milestones"]:
            info["grasped"] = self._grasped.words if self._grasped else ""
            info["target"] = self.task.target.words
        return self.observe(), float(success), done, truncated, info

    def render(self) -> np.ndarray:
        """Return a larger primary image for videos: uint8 [256, 256, 3]."""
        return self._renderer.render("primary", _RENDER_SIZE, _RENDER_SIZE)

    def close(self) -> None:
        """Free the render contexts."""
        for _, renderer in self._scenes.values():
            renderer.close()
        self._scenes.clear()

    # state

    @property
    def present_task(self) -> TabletopTask:
        """The episode's task; RuntimeError before the first reset()."""
        if self.task is None:
            raise RuntimeError("call reset() first: there is no task yet")
        return self.task

    def get_state(self) -> dict[str, Any]:
        """Return the complete state for `set_state`; it determines all later steps."""
        mujoco, scene = self.scene.mujoco, self.scene
        kind = mujoco.mjtState.mjSTATE_INTEGRATION.value
        physics = np.empty(mujoco.mj_stateSize(scene.model, kind))
        mujoco.mj_getState(scene.model, scene.data, physics, kind)
        return {
            "task": self.task,
            "original": self.original,
            "object_slots": scene.object_slots,
            "objects": self._objects,
            "physics": physics,
            "steps": self.steps,
            "start_positions": dict(self._start_positions),
            "touched": self._touched,
            "grasped": self._grasped,
            "milestones": set(self._milestones),
            "failure": self._failure,
            "random": self.np_random.bit_generator.state,
        }

    def set_state(self, state: dict[str, Any]) -> dict[str, np.ndarray]:
        """Restore a state from `get_state` of an equal environment; return the observation."""
        self._select_scene(state["object_slots"])
        mujoco, scene = self.scene.mujoco, self.scene
        self.task, self._objects, self.steps = state["task"], state["objects"], state["steps"]
        self.original, self._failure = state["original"], state["failure"]
        self._start_positions = dict(state["start_positions"])
        self._touched, self._grasped = state["touched"], state["grasped"]
        self._milestones = set(state["milestones"])
        self.np_random.bit_generator.state = state["random"]
        scene.arrange(self._objects)
        kind = mujoco.mjtState.mjSTATE_INTEGRATION.value
        mujoco.mj_setState(scene.model, scene.data, state["physics"], kind)
        mujoco.mj_forward(scene.model, scene.data)
        return self.observe()

    def observe(self) -> dict[str, np.ndarray]:
        """Return the present observation."""
        wrist_size = self.settings.wrist_size
        return {
            "image_primary": self._renderer.render("primary", *self._size),
            "image_wrist": self._renderer.render("wrist", wrist_size, wrist_size),
            "proprio": self.pose().astype(np.float32),
        }

    def observe_bare(self) -> dict[str, np.ndarray]:
        """Return the present observation, with images that do not show the gripper."""
        with self.scene.hidden_gripper():
            return self.observe()

    def pose(self) -> np.ndarray:
        """Return the gripper's pose like the observation's proprio, but as float64 [7]."""
        qpos = self.scene.data.qpos[self.scene.joint_qpos]
        return np.append(qpos[:6], np.clip(qpos[6:].mean() / FINGER_OPENING, 0, 1))

    def task_state(self, task: TabletopTask | None = None) -> TaskState:
        """Return the state that success and the expert depend on; default: the episode's task."""
        scene, task = self.scene, task or self.present_task
        reference = task.reference_object
        contacts = scene.contacts()
        target = scene.objects.index(task.target)
        grasped = [o for i, o in enumerate(scene.objects) if {(-3, i), (-4, i)} <= contacts]
        return TaskState(
            target=scene.position(task.target),
            start=self._start_positions[task.target],
            size=SIZE,
            speed=scene.speed(task.target),
            reference=None if reference is None else scene.position(reference),
            tip=self.pose()[:3],
            touched=self._touched,
            grasped=grasped[0] if grasped else None,
            in_contact=any((part, target) in contacts for part in (-2, -3, -4)),
        )

    # private

    def _select_scene(self, object_slots: int) -> None:
        """Use the model with that number of object slots; build it at first use.

        A larger model with empty slots would be slower and would change floating-point rounding.
        """
        if object_slots not in self._scenes:
            scene = TabletopScene(object_slots, self.settings.gripper, self.settings.look)
            self._scenes[object_slots] = scene, OffscreenRenderer(scene)
        self.scene, self._renderer = self._scenes[object_slots]

    def _set_up(self, task: TabletopTask) -> None:
        rng, scene = self.np_random, self.scene
        references = [] if task.reference_object is None else [task.reference_object]
        self.task, self.original, self.steps = task, None, 0
        self._touched, self._grasped, self._failure = None, None, ""
        self._milestones = set()
        distractors = tasks.distractors(rng, task, scene.object_slots - 2)
        self._objects = (task.target, *references, *distractors)
        scene.arrange(self._objects)
        for item, (x, y) in zip(self._objects, _layout(rng, task, self._objects), strict=True):
            scene.place(item, x, y, yaw=rng.uniform(-0.12, 0.12))
        start = rng.uniform([-0.12, -0.14, 0.14], [0.12, 0.14, 0.20])
        scene.data.qpos[scene.joint_qpos] = (*start, 0, 0, 0, FINGER_OPENING, FINGER_OPENING)
        scene.data.ctrl[scene.actuators] = scene.data.qpos[scene.joint_qpos]
        scene.mujoco.mj_forward(scene.model, scene.data)
        self._start_positions = {item: scene.position(item) for item in self._objects}

    def _digest(self) -> str:
        items = sorted(self._objects)
        places = [self.scene.position(item) for item in items]
        return scene_digest([item.key for item in items], np.concatenate([*places, self.pose()]))

    def _draw_counterfactual(self, options: dict[str, Any]) -> None:
        """Replace the task by another one for the same scene; draw a new scene if none exists."""
        rng = self.np_random
        while True:
            original = self.present_task
            spots = {item: self.scene.position(item)[:2] for item in self._objects}
            choices = [
                parts
                for parts in tasks.counterfactuals(original, self._objects)
                if original.skill != "push"
                or _has_room(_with_first(spots, parts[1]), DIRECTIONS[parts[2]])
            ]
            if choices:
                templates = tasks.phrasings(original.skill, "counterfactual")
                parts = choices[rng.integers(len(choices))]
                self.task = tasks.make_task(*parts, templates[rng.integers(len(templates))])
                self.original = original
                return
            self._set_up(tasks.sample_task(rng, **options))

    def _original_succeeded(self) -> bool:
        """Return whether the scene's original task is done, in the split `counterfactual`."""
        return self.original is not None and tasks.succeeded(
            self.original, self.task_state(self.original)
        )

    def _move(self, action: np.ndarray) -> None:
        """Move the actuator targets on a straight line, and record the first touch."""
        mujoco, scene = self.scene.mujoco, self.scene
        pose = self.pose()[:6]
        limits = self._move_limits()
        goal = pose + np.clip(action[:6], -limits, limits)
        goal[:3] = np.clip(goal[:3], WORKSPACE_LOW, WORKSPACE_HIGH)
        goal[3:] = np.clip(goal[3:], -MAX_ANGLES, MAX_ANGLES)
        finger = FINGER_OPENING if action[6] > 0.5 else 0.0
        # Start from the measured pose instead of the previous target, so that the next state
        # depends only on observable quantities.
        begin = scene.data.qpos[scene.joint_qpos]
        end = np.array([*goal, finger, finger])
        substeps = round(1 / self.settings.control_hz / TIMESTEP)
        for substep in range(0, substeps, _CHECK_EVERY):
            fraction = min(1.0, (substep + _CHECK_EVERY) / (_RAMP * substeps))
            scene.data.ctrl[scene.actuators] = begin + fraction * (end - begin)
            mujoco.mj_step(scene.model, scene.data, nstep=_CHECK_EVERY)
            self._record_touch()
            if self.settings.belt:
                self._carry(self.settings.belt * _CHECK_EVERY * TIMESTEP)
        mujoco.mj_forward(scene.model, scene.data)

    def _move_limits(self) -> np.ndarray:
        """Return the largest move of a step: float64 [6], metres and radians."""
        return np.array([MAX_MOVE] * 3 + [MAX_TURN] * 3) * self.step_share

    def _carry(self, distance: float) -> None:
        """Move what lies on the table, and is not held, to the right; its start moves along."""
        contacts = self.scene.contacts()
        for index, item in enumerate(self._objects):
            position = self.scene.position(item)
            rest = 0.0 if item.shape == "bowl" else SIZE
            held = any((part, index) in contacts for part in (-2, -3, -4))
            if position[1] > _BELT_END and position[2] < rest + _ON_TABLE and not held:
                self.scene.shift(item, -distance)
                self._start_positions[item] = self._start_positions[item] - (0, distance, 0)

    def _record_touch(self) -> None:
        if self._touched is None:
            hits = [b for a, b in sorted(self.scene.contacts()) if a <= -2 and b >= 0]
            self._touched = self.scene.objects[hits[0]] if hits else None

    def _info(self, failure: str, success: bool, instead: bool = False) -> dict[str, Any]:
        task = self.present_task
        info = {
            "instruction": task.instruction,
            "task": task.name,
            "skill": task.skill,
            "success": bool(success),
            "failure": failure,
        }
        if self.original:
            info |= {"original": self.original.name, "instead": instead}
        return info


def _separation(a: TableObject, b: TableObject) -> float:
    """Return the smallest start distance in metres: the fingers have to fit in between."""
    bowls = (a.shape == "bowl") + (b.shape == "bowl")
    return (0.12, 0.145, 0.165)[bowls]


def _layout(
    rng: np.random.Generator, task: TabletopTask, objects: tuple[TableObject, ...]
) -> np.ndarray:
    """Draw x, y for each object, far enough apart: float64 [len(objects), 2] in metres.

    A pushed object gets space to move and space for the gripper behind it.
    """
    for _ in range(_LAYOUT_ATTEMPTS):
        spots = np.empty((0, 2))
        for index, item in enumerate(objects):
            candidates = rng.uniform(-_SPAWN, _SPAWN, (30, 2))
            gaps = np.linalg.norm(candidates[:, None] - spots, axis=-1)
            fits = (gaps >= [_separation(item, placed) for placed in objects[:index]]).all(axis=1)
            spots = np.concatenate([spots, candidates[fits][:1]])
            if len(spots) == index:
                break
        else:
            if task.skill != "push" or _has_room(spots, DIRECTIONS[task.reference]):
                return spots
    raise RuntimeError(f"no layout found for {[o.words for o in objects]}")


def _with_first(spots: dict[TableObject, np.ndarray], first: TableObject) -> np.ndarray:
    """Return the positions, starting with one object's: float64 [len(spots), 2]."""
    return np.stack([spots[first], *(xy for item, xy in spots.items() if item != first)])


def _has_room(spots: np.ndarray, direction: tuple[float, float]) -> bool:
    """Return whether the first object can be pushed without reaching an edge or another one."""
    path = spots[0] + np.outer([-0.06, 0.05, 0.09], direction)
    gaps = np.linalg.norm(path[:, None] - spots[None, 1:], axis=-1)
    return bool((np.abs(path) <= _REACH).all() and (gaps >= 0.085).all())
