"""One task's simulation, as the benchmark runs it, with three savings that change no result.

1. Resets do not compile the model again. The benchmark does, and draws the positions of fixtures
   (cabinet, stove) anew each time from numpy's global generator, seeded once. An episode of it
   therefore depends on the number of episodes before it. Here initial state i has the fixtures
   that the benchmark's i-th episode of a task has, in any order of episodes. LIBERO adds the place
   of a region of a fixture, read from the simulation, to the drawn place of the fixture. That is
   right only while the fixtures are where the model was compiled, so they are put back there.
   LIBERO draws a number for each drawer, door and knob of its list `object_property_initializers`
   before it places anything, and each compilation appends the task's to the list and removes none.
   The list is therefore set to the length that it has in the benchmark's episode.
2. Images are rendered when they are read (`LazyCameras`).
3. Observations of objects, which no policy gets, are not computed.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np

from octolike.envs.libero.libero_package import LiberoTask, load_libero

_T = TypeVar("_T")
CAMERAS = {"primary": "agentview", "wrist": "robot0_eye_in_hand"}
RENDER_SIZE = 256
BENCHMARK_SEED = 0  # as in OpenVLA's script
_FALL_STEPS, _AT_REST = 40, 0.05  # steps; metres or radians per second
_MOST_ATTEMPTS = 100  # to place the objects of an episode; each gives up after 5000 draws
NO_MOTION = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)  # the gripper opens


class Frame(NamedTuple):
    """The visible state at an observation: joint positions, and colours of sites."""

    qpos: np.ndarray
    site_rgba: np.ndarray


class _Before(NamedTuple):
    """What the draws of one of the benchmark's episodes depend on.

    generator: the state of numpy's global generator. compilations: of the model, until then.
    """

    generator: Any
    compilations: int


# {path of a task's description: the known beginnings of its episodes, from episode 0}. An
# environment that returns to a task continues from there: a draw costs up to 0.1 s.
_KNOWN: dict[str, list[_Before]] = {}


class LiberoSim:
    """The simulation of one task.

    Attributes:
        env: LIBERO's environment of robosuite; its `sim` has MuJoCo's model and data.
        raw: its last observation, without images.
    """

    def __init__(self, task: LiberoTask) -> None:
        load_libero()
        envs = importlib.import_module("libero.libero.envs")
        self.task = task
        with _own_generator(BENCHMARK_SEED):
            self._control = _until_placed(
                lambda: envs.OffScreenRenderEnv(bddl_file_name=task.bddl, use_camera_obs=False),
                task.bddl,
            )
        self.env = self._control.env
        self.env.hard_reset = False
        self._properties = list(self.env.object_property_initializers)
        for name, observable in self.env._observables.items():
            if observable.modality == "object":
                self.env.modify_observable(name, "enabled", False)
        self._compiled = _compiled_fixtures(self.env)
        self.raw: dict[str, Any] = {}
        self._cameras = LazyCameras(self.env)
        self._close = weakref.finalize(self, _close, self._control, self.env.sim)
        atexit.register(self._close)  # runs before the handlers that end EGL; finalize's runs after

    def start(self, index: int) -> None:
        """Begin at the benchmark's initial state `index`, with the fixtures of that episode."""
        with _own_generator(BENCHMARK_SEED):
            # The constructor compiles once, before the benchmark seeds the generator.
            first = _Before(np.random.get_state(), compilations=1)
            known = _KNOWN.setdefault(self.task.bddl, [first])
            before = known[min(index, len(known) - 1)]
            np.random.set_state(before.generator)
            count = before.compilations
            for _ in range(len(known) - 1, index):  # the draws of the episodes before it
                count = self._place(self.env._reset_internal, itertools.count(count + 1))
                known.append(_Before(np.random.get_state(), count))
            count = self._reset(itertools.count(count + 1))
            if index == len(known) - 1:
                known.append(_Before(np.random.get_state(), count))
        with self._cameras.still():
            self.raw = self._control.set_init_state(self.task.states[index])

    def sample(self, seed: int) -> None:
        """Begin with objects and fixtures drawn from the task's regions, when all is at rest.

        LIBERO draws the place of an object on another one some centimetres too high.
        """
        with _own_generator(seed):
            self._reset(itertools.repeat(1))
        for _ in range(_FALL_STEPS):
            self._control.step(list(NO_MOTION))
            if np.abs(self.env.sim.data.qvel).max() < _AT_REST:
                break
        with self._cameras.still():
            self.raw = self._control.regenerate_obs_from_state(self._control.get_sim_state())

    def step(self, command: list[float]) -> bool:
        """Act for 1/20 s; return whether the goal is reached."""
        self.raw, _, done, _ = self._control.step(command)
        return bool(done)

    def frame(self) -> Frame:
        """Return the visible state at the last observation."""
        return self._cameras.frame

    def render(self, camera: str, frame: Frame) -> np.ndarray:
        """Return an image of one of CAMERAS, upright: uint8 [256, 256, 3]."""
        return self._cameras.render(CAMERAS[camera], frame)

    def close(self) -> None:
        """Free the simulation and its render context."""
        atexit.unregister(self._close)
        self._close()

    def _restore_compiled(self) -> None:
        """Put joints and fixtures where they are after compiling."""
        sim = self.env.sim
        sim.reset()
        for body, (position, quaternion) in self._compiled.items():
            sim.model.body_pos[body], sim.model.body_quat[body] = position, quaternion

    def _place(self, reset: Callable[[], Any], lengths: Iterator[int]) -> int:
        """Reset, and again while objects find no place, as the benchmark does.

        lengths: of the list of drawers, doors and knobs, in multiples of the task's, for each
        attempt. Returns that of the last one.
        """

        def attempt() -> int:
            self._restore_compiled()
            length = next(lengths)
            self.env.object_property_initializers[:] = self._properties * length
            reset()
            return length

        return _until_placed(attempt, self.task.bddl)

    def _reset(self, lengths: Iterator[int]) -> int:
        length = self._place(self.env.reset, lengths)
        for robot in self.env.robots:  # a compiled model has a new gripper, with command 0
            robot.gripper.current_action = np.zeros(robot.gripper.dof)
        return length


class LazyCameras:
    """Renders the images of observations later, from joint positions.

    robosuite takes an image in the first of the 25 substeps of a control step, and MuJoCo's places
    of bodies then are those before that substep. The joint positions from which these were computed
    are stored instead; the image of them is the same, pixel by pixel (tests/libero).
    """

    def __init__(self, env: Any) -> None:
        observables = importlib.import_module("robosuite.utils.observables")
        self._env = env
        self._mujoco = importlib.import_module("mujoco")
        self._data = self._mujoco.MjData(env.sim.model._model)
        self._camera = self._mujoco.MjvCamera()
        self._camera.type = self._mujoco.mjtCamera.mjCAMERA_FIXED
        self._before = env.sim.data.qpos.copy()
        self._is_still = True
        self.frame = self._present()
        before_action = env._pre_action

        def note_positions(action: Any, policy_step: bool = False) -> None:
            self._before = env.sim.data.qpos.copy()
            before_action(action, policy_step)

        @observables.sensor(modality="frame")
        def take(_: Any) -> np.ndarray:
            self.frame = self._present()
            return np.zeros(1)

        env._pre_action = note_positions
        env.add_observable(observables.Observable("frame", take, sampling_rate=env.control_freq))

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """Take frames of the present positions: outside steps, they are not integrated."""
        self._is_still = True
        yield
        self._is_still = False

    def render(self, camera: str, frame: Frame) -> np.ndarray:
        """Return the image of LIBERO's camera of that name: uint8 [256, 256, 3], upright."""
        mujoco, model = self._mujoco, self._env.sim.model._model
        context = self._env.sim._render_context_offscreen
        self._data.qpos[:] = frame.qpos
        mujoco.mj_kinematics(model, self._data)
        mujoco.mj_comPos(model, self._data)
        mujoco.mj_camlight(model, self._data)
        self._camera.fixedcamid = model.camera(camera).id
        present = model.site_rgba.copy()
        model.site_rgba[:] = frame.site_rgba
        context.gl_ctx.make_current()
        every = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(
            model, self._data, context.vopt, context.pert, self._camera, every, context.scn
        )
        model.site_rgba[:] = present
        viewport = mujoco.MjrRect(0, 0, RENDER_SIZE, RENDER_SIZE)
        image = np.empty((RENDER_SIZE, RENDER_SIZE, 3), np.uint8)
        mujoco.mjr_render(viewport, context.scn, context.con)
        mujoco.mjr_readPixels(image, None, viewport, context.con)
        return np.ascontiguousarray(image[::-1, ::-1])

    def _present(self) -> Frame:
        sim = self._env.sim
        qpos = sim.data.qpos.copy() if self._is_still else self._before
        return Frame(qpos, sim.model.site_rgba.copy())


def _compiled_fixtures(env: Any) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Return {body: (position [3], quaternion [4])} of the fixtures before LIBERO places them."""
    spec = importlib.import_module("mujoco").MjSpec.from_string(env.model.get_xml())
    bodies = [spec.body(fixture.root_body) for fixture in env.fixtures_dict.values()]
    present = [body for body in bodies if body is not None]  # the table is part of the arena
    return {env.sim.model.body_name2id(b.name): (b.pos.copy(), b.quat.copy()) for b in present}


def _until_placed(attempt: Callable[[], _T], bddl: str) -> _T:
    """Return what an attempt returns, the first in which LIBERO finds a place for all objects.

    Raises RuntimeError after 100 attempts; the benchmark would go on.
    """
    errors = importlib.import_module("robosuite.utils.errors")
    for _ in range(_MOST_ATTEMPTS):
        with contextlib.suppress(errors.RandomizationError):
            return attempt()
    raise RuntimeError(
        f"LIBERO placed the objects of {bddl} in none of {_MOST_ATTEMPTS} attempts: "
        "they overlap wherever its regions allow them"
    )


@contextlib.contextmanager
def _own_generator(seed: int) -> Iterator[None]:
    """Seed numpy's global generator, from which LIBERO draws, and restore it afterwards."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)


def _close(control: Any, sim: Any) -> None:
    """Free the GL context while EGL works: after that, its destructor would print a traceback."""
    context = sim._render_context_offscreen
    if context is not None:
        context.con.free()
        context.gl_ctx.free()
    control.close()
