"""TabletopEnv: one language task per episode, moved by end-effector deltas at 5 Hz."""

from typing import Any

import gymnasium
import numpy as np

from octolike.envs import environment
from octolike.envs.tabletop import conventions
from octolike.envs.tabletop import tabletop_tasks as tasks
from octolike.envs.tabletop.scene import (
    FINGER_OPENING,
    SIZE,
    TIMESTEP,
    OffscreenRenderer,
    TabletopScene,
)
from octolike.envs.tabletop.tabletop_tasks import (
    DIRECTIONS,
    STEP_LIMITS,
    TableObject,
    TabletopTask,
    TaskState,
)

CONTROL_HZ = 5
MAX_MOVE = 0.05  # metres per axis and step
MAX_TURN = 0.3  # radians per axis and step
# Where the fingertips may go (metres), and how far the hand may roll, pitch and yaw (radians).
WORKSPACE_LOW = np.array([-0.20, -0.22, 0.012])
WORKSPACE_HIGH = np.array([0.20, 0.22, 0.22])
MAX_ANGLES = np.array([0.6, 0.6, 1.6])
_SPAWN = np.array([0.13, 0.15])  # things start within +- these x, y
_REACH = np.array([0.17, 0.20])  # a pushed object ends within +- these
_SUBSTEPS = round(1 / CONTROL_HZ / TIMESTEP)
_RAMP = 0.75  # the part of a step in which the target moves; the rest is for settling
_CHECK_EVERY = 5  # physics steps between two looks at the contacts
_RENDER_SIZE = 256
_MOST_DISTRACTORS = 4  # with another one hardly any layout with two bowls is found


class TabletopEnv(gymnasium.Env):
    """A table, a two-finger gripper and coloured things; the instruction says what to do.

    Observation:
        image_primary  uint8 [h, w, 3]; fixed, near and steep
        image_wrist    uint8 [hw, hw, 3]; looks down at the fingertips
        proprio        float32 [7]: x, y, z (metres), roll, pitch, yaw (radians), opening in [0, 1]
    Action:
        float32 [7]: dx, dy, dz (metres), droll, dpitch, dyaw (radians), gripper (> 0.5 is open).
        Moves are clipped to +-MAX_MOVE and +-MAX_TURN, their targets to the workspace. Of another
        `action_convention` the numbers mean something else (`tabletop.conventions`).

    An episode is a pure function of the seed and the actions. It ends with success, with a failure
    (`tasks.failed`) or at the skill's step limit. In the split `counterfactual` it also ends when
    the task that the table was laid for is done, which is a failure of its own: info has that task
    as `original`, and whether it was done as `instead`.

    Args:
        primary_size: height and width of image_primary, or one int for both.
        wrist_size: height and width of image_wrist.
        num_distractors: how many things lie on the table beyond those in the instruction; in the
            split `distractors` there are two more (or as many as fit).
        action_convention: a key of `conventions.CONVENTIONS`: what the actions' numbers mean.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_HZ}  # noqa: RUF012

    def __init__(
        self,
        primary_size: int | tuple[int, int] = 96,
        wrist_size: int = 64,
        num_distractors: int = 2,
        action_convention: str = "standard",
    ) -> None:
        size = (
            (primary_size, primary_size) if isinstance(primary_size, int) else tuple(primary_size)
        )
        if len(size) != 2 or not all(8 <= s <= 640 for s in (*size, wrist_size)):
            raise ValueError(
                f"image sizes are 8 to 640 pixels: got primary_size={primary_size!r}, "
                f"wrist_size={wrist_size!r}"
            )
        if not 0 <= num_distractors <= 3:
            raise ValueError(f"num_distractors is 0 to 3, more do not fit: got {num_distractors}")
        tasks.choose("action_convention", action_convention, tuple(conventions.CONVENTIONS))
        self.render_mode = "rgb_array"
        self.num_distractors, self.action_convention = num_distractors, action_convention
        self._size, self._wrist_size = size, wrist_size
        self._stages: dict[int, tuple[TabletopScene, OffscreenRenderer]] = {}
        self._set_stage(2 + num_distractors)
        pixels = lambda h, w: gymnasium.spaces.Box(0, 255, (h, w, 3), np.uint8)
        self.observation_space = gymnasium.spaces.Dict(
            {
                "image_primary": pixels(*size),
                "image_wrist": pixels(wrist_size, wrist_size),
                "proprio": gymnasium.spaces.Box(-np.pi, np.pi, (7,), np.float32),
            }
        )
        high = np.array([MAX_MOVE] * 3 + [MAX_TURN] * 3 + [1], np.float32)
        high = np.abs(conventions.to_robot(high, action_convention))
        low = np.append(-high[:6], np.float32(0))
        self.action_space = gymnasium.spaces.Box(low, high, dtype=np.float32)
        self.task: TabletopTask | None = None
        self.original: TabletopTask | None = None
        self.steps = 0
        self._things: tuple[TableObject, ...] = ()
        self._starts: dict[TableObject, np.ndarray] = {}
        self._touched: TableObject | None = None
        self._lost = ""

    # gymnasium's interface

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Lay the table for a task.

        Args:
            seed: decides task, layout and where the gripper starts.
            options: {"task": TabletopTask}, or any of {"split": str, "skills": list of str}
                to draw a task.
        """
        super().reset(seed=seed)
        options = dict(options or {})
        for key in options:
            tasks.choose("reset option", key, ("task", "split", "skills"))
        if "task" in options and len(options) > 1:
            raise ValueError(f"a task excludes split and skills: got options {sorted(options)}")
        split = options.get("split", "train")
        more = tasks.MORE_DISTRACTORS if split == "distractors" else 0
        self._set_stage(2 + min(self.num_distractors + more, _MOST_DISTRACTORS))
        task = options.pop("task", None) or tasks.sample_task(self.np_random, **options)
        self._lay(task)
        if split == "counterfactual":
            self._ask_for_another(options)
        return self.observe(), self._info("", False)

    def step(
        self, action: np.ndarray
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Act for 0.2 s.

        Raises:
            ValueError: the action is not seven finite numbers.
            RuntimeError: there was no reset.
        """
        if self.task is None:
            raise RuntimeError("call reset() before step()")
        numbers = environment.checked_action(action, 7, "dx dy dz droll dpitch dyaw gripper")
        self._move(conventions.to_table(numbers, self.action_convention))
        self.steps += 1
        now = self.task_state()
        self._lost = self._lost or tasks.failed(self.task, now)
        success = not self._lost and tasks.succeeded(self.task, now)
        instead = not success and self._done_instead()
        # What was asked for may be lost and the other task still under way: it is waited for.
        waiting = self.original is not None and not tasks.failed(
            self.original, self.task_state(self.original)
        )
        done = bool(success or instead or (self._lost and not waiting))
        truncated = not done and self.steps >= STEP_LIMITS[self.task.skill]
        failure = f"did {self.original.name} instead" if instead else self._lost
        info = self._info(failure if done or truncated else "", success, instead)
        return self.observe(), float(success), done, truncated, info

    def render(self) -> np.ndarray:
        """Return a larger primary picture for videos: uint8 [256, 256, 3]."""
        return self._screen.draw("primary", _RENDER_SIZE, _RENDER_SIZE)

    def close(self) -> None:
        """Free the render context."""
        for _, screen in self._stages.values():
            screen.close()
        self._stages.clear()

    # state

    def get_state(self) -> dict[str, Any]:
        """Return everything that the coming steps depend on; `set_state` takes it back."""
        mujoco, scene = self.scene.mujoco, self.scene
        kind = mujoco.mjtState.mjSTATE_INTEGRATION.value
        physics = np.empty(mujoco.mj_stateSize(scene.model, kind))
        mujoco.mj_getState(scene.model, scene.data, physics, kind)
        return {
            "task": self.task,
            "original": self.original,
            "objects": scene.objects,
            "things": self._things,
            "physics": physics,
            "steps": self.steps,
            "starts": dict(self._starts),
            "touched": self._touched,
            "lost": self._lost,
            "random": self.np_random.bit_generator.state,
        }

    def set_state(self, state: dict[str, Any]) -> dict[str, np.ndarray]:
        """Go back to a state of `get_state` (from any env alike) and return the observation."""
        self._set_stage(state["objects"])
        mujoco, scene = self.scene.mujoco, self.scene
        self.task, self._things, self.steps = state["task"], state["things"], state["steps"]
        self.original, self._lost = state["original"], state["lost"]
        self._starts, self._touched = dict(state["starts"]), state["touched"]
        self.np_random.bit_generator.state = state["random"]
        scene.arrange(self._things)
        kind = mujoco.mjtState.mjSTATE_INTEGRATION.value
        mujoco.mj_setState(scene.model, scene.data, state["physics"], kind)
        mujoco.mj_forward(scene.model, scene.data)
        return self.observe()

    def observe(self) -> dict[str, np.ndarray]:
        """Return the observation of the present moment."""
        return {
            "image_primary": self._screen.draw("primary", *self._size),
            "image_wrist": self._screen.draw("wrist", self._wrist_size, self._wrist_size),
            "proprio": self.pose().astype(np.float32),
        }

    def pose(self) -> np.ndarray:
        """Return the gripper's pose as in the observation's proprio, but float64 [7]."""
        qpos = self.scene.data.qpos[self.scene.joint_qpos]
        return np.append(qpos[:6], np.clip(qpos[6:].mean() / FINGER_OPENING, 0, 1))

    def task_state(self, task: TabletopTask | None = None) -> TaskState:
        """Return what success and the expert judge a task by; default: the one asked for."""
        scene, task = self.scene, task or self.task
        below = task.reference_object
        pairs = scene.contacts()
        index = scene.things.index(task.target)
        held = [t for i, t in enumerate(scene.things) if {(-3, i), (-4, i)} <= pairs]
        return TaskState(
            target=scene.position(task.target),
            start=self._starts[task.target],
            size=SIZE,
            speed=scene.speed(task.target),
            reference=None if below is None else scene.position(below),
            tip=self.pose()[:3],
            touched=self._touched,
            grasped=held[0] if held else None,
            in_contact=any((part, index) in pairs for part in (-2, -3, -4)),
        )

    # private

    def _set_stage(self, objects: int) -> None:
        """Take the model with so many object slots; a larger one is made when first needed.

        Slots that stay empty would cost time in every episode, and change how results are rounded.
        """
        if objects not in self._stages:
            scene = TabletopScene(objects=objects)
            self._stages[objects] = scene, OffscreenRenderer(scene)
        self.scene, self._screen = self._stages[objects]

    def _ask_for_another(self, options: dict[str, Any]) -> None:
        """Ask for another task on the table as it lies; a table without one is laid anew."""
        rng = self.np_random
        while True:
            original = self.task
            spots = {t: self.scene.position(t)[:2] for t in self._things}
            choices = [
                parts
                for parts in tasks.counterfactuals(original, self._things)
                if original.skill != "push" or _room(_first(spots, parts[1]), DIRECTIONS[parts[2]])
            ]
            if choices:
                wording = tasks.phrasings(original.skill, "counterfactual")
                parts = choices[rng.integers(len(choices))]
                self.task = tasks.make_task(*parts, wording[rng.integers(len(wording))])
                self.original = original
                return
            self._lay(tasks.sample_task(rng, **options))

    def _done_instead(self) -> bool:
        """Say whether the task that the table was laid for is done, where another was asked for."""
        return self.original is not None and tasks.succeeded(
            self.original, self.task_state(self.original)
        )

    def _lay(self, task: TabletopTask) -> None:
        rng, scene = self.np_random, self.scene
        named = [task.target] + [t for t in [task.reference_object] if t is not None]
        self.task, self.original, self.steps = task, None, 0
        self._touched, self._lost = None, ""
        self._things = (*named, *tasks.distractors(rng, task, scene.objects - 2))
        scene.arrange(self._things)
        for thing, (x, y) in zip(self._things, _layout(rng, task, self._things), strict=True):
            scene.place(thing, x, y, yaw=rng.uniform(-0.12, 0.12))
        start = rng.uniform([-0.12, -0.14, 0.14], [0.12, 0.14, 0.20])
        scene.data.qpos[scene.joint_qpos] = (*start, 0, 0, 0, FINGER_OPENING, FINGER_OPENING)
        scene.data.ctrl[scene.actuators] = scene.data.qpos[scene.joint_qpos]
        scene.mujoco.mj_forward(scene.model, scene.data)
        self._starts = {thing: scene.position(thing) for thing in self._things}

    def _move(self, action: np.ndarray) -> None:
        """Lead the actuators to the target on a straight line, and note the first touch."""
        mujoco, scene = self.scene.mujoco, self.scene
        pose = self.pose()[:6]
        limits = np.array([MAX_MOVE] * 3 + [MAX_TURN] * 3)
        goal = pose + np.clip(action[:6], -limits, limits)
        goal[:3] = np.clip(goal[:3], WORKSPACE_LOW, WORKSPACE_HIGH)
        goal[3:] = np.clip(goal[3:], -MAX_ANGLES, MAX_ANGLES)
        finger = FINGER_OPENING if action[6] > 0.5 else 0.0
        # From the measured pose, not from the last target: what happens next then depends on what
        # can be seen.
        begin = scene.data.qpos[scene.joint_qpos]
        end = np.array([*goal, finger, finger])
        for substep in range(0, _SUBSTEPS, _CHECK_EVERY):
            part = min(1.0, (substep + _CHECK_EVERY) / (_RAMP * _SUBSTEPS))
            scene.data.ctrl[scene.actuators] = begin + part * (end - begin)
            mujoco.mj_step(scene.model, scene.data, nstep=_CHECK_EVERY)
            self._note_touch()
        mujoco.mj_forward(scene.model, scene.data)

    def _note_touch(self) -> None:
        if self._touched is None:
            hits = [b for a, b in sorted(self.scene.contacts()) if a <= -2 and b >= 0]
            self._touched = self.scene.things[hits[0]] if hits else None

    def _info(self, failure: str, success: bool, instead: bool = False) -> dict[str, Any]:
        other = {"original": self.original.name, "instead": instead} if self.original else {}
        return {
            "instruction": self.task.instruction,
            "task": self.task.name,
            "skill": self.task.skill,
            "success": bool(success),
            "failure": failure,
            **other,
        }


def _separation(a: TableObject, b: TableObject) -> float:
    """Return how far apart two things start, metres: fingers have to fit between them."""
    bowls = (a.shape == "bowl") + (b.shape == "bowl")
    return (0.12, 0.145, 0.165)[bowls]


def _layout(
    rng: np.random.Generator, task: TabletopTask, things: tuple[TableObject, ...]
) -> np.ndarray:
    """Draw x, y for each thing, far enough apart: float64 [len(things), 2] in metres.

    A pushed object gets room to move and room for the gripper behind it.
    """
    for _ in range(1000):
        spots = np.empty((0, 2))
        for index, thing in enumerate(things):
            tries = rng.uniform(-_SPAWN, _SPAWN, (30, 2))
            gaps = np.linalg.norm(tries[:, None] - spots, axis=-1)
            fits = (gaps >= [_separation(thing, other) for other in things[:index]]).all(axis=1)
            spots = np.concatenate([spots, tries[fits][:1]])
            if len(spots) == index:
                break
        else:
            if task.skill != "push" or _room(spots, DIRECTIONS[task.reference]):
                return spots
    raise RuntimeError(f"no layout found for {[t.words for t in things]}")


def _first(spots: dict[TableObject, np.ndarray], thing: TableObject) -> np.ndarray:
    """Return the spots with that of `thing` first: float64 [len(spots), 2]."""
    return np.stack([spots[thing], *(xy for other, xy in spots.items() if other != thing)])


def _room(spots: np.ndarray, direction: tuple[float, float]) -> bool:
    """Say whether the first spot can be pushed along without meeting an edge or another thing."""
    path = spots[0] + np.outer([-0.06, 0.05, 0.09], direction)
    gaps = np.linalg.norm(path[:, None] - spots[None, 1:], axis=-1)
    return bool((np.abs(path) <= _REACH).all() and (gaps >= 0.085).all())
