"""The table as a MuJoCo model built in code, and its cameras.

One model serves every episode: an object slot holds a cube, a cylinder and a ball of which one is
switched on, so a reset changes colours and positions but compiles nothing. (A new render context
would cost 50 to 300 ms per episode.)

Axes: x points away from the primary camera, y to the left of its picture, z up from the table top.
"""

import functools
import importlib.util
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Sequence
from importlib import metadata
from types import ModuleType
from typing import Any

import numpy as np

from octolike.envs.tabletop.tabletop_tasks import SHAPES, TableObject

TIMESTEP = 0.004  # seconds
SIZE = 0.032  # half the height and half the width of every object, metres
FINGER_OPENING = 0.052  # how far each finger moves away from the middle, metres
BOWL_RADIUS = 0.075  # outside, metres
BOWL_HEIGHT = 0.04
BOWLS = 2
RGB = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.70, 0.18),
    "blue": (0.10, 0.30, 0.95),
    "yellow": (1.00, 0.85, 0.05),
    "purple": (0.58, 0.16, 0.78),
    "orange": (1.00, 0.48, 0.02),
}
_MASS = 0.05  # kg
_BACKENDS = ("egl", "osmesa")
_VERSIONS = (3, 3), (4, 0)  # of mujoco: from, and before; setup.py has the same
_HIDDEN_GROUP = 4  # not among the geom groups that are drawn
_PARKED = (0.0, 0.0, -1.0)


@functools.cache
def load_mujoco() -> tuple[ModuleType, type]:
    """Import mujoco; return it and the class of the off-screen GL context that works here.

    MUJOCO_GL decides where it is egl or osmesa. Otherwise each is tried, in a child process because
    a backend that fails leaves PyOpenGL unusable. The window backend is never used on Linux: it
    aborts the process where there is no display.

    Raises:
        ImportError: mujoco is not installed or of a wrong version, or no backend can render.
    """
    if importlib.util.find_spec("mujoco") is None:
        raise ImportError("the tabletop simulator needs mujoco: pip install 'octolike[sim]'")
    _check_version(metadata.version("mujoco"))
    backend = os.environ.get("MUJOCO_GL", "")
    if sys.platform.startswith("linux") and backend not in _BACKENDS:
        backend = _working_backend()
        os.environ["MUJOCO_GL"] = backend  # worker processes need not try again
    try:
        import mujoco

        # It would write a log file wherever it is run; who cares reads MjData.warning.
        mujoco.set_mju_user_warning(lambda message: None)
        if backend in _BACKENDS:  # whichever one mujoco was first imported with
            return mujoco, importlib.import_module(f"mujoco.{backend}").GLContext
        return mujoco, mujoco.GLContext
    except Exception as error:  # PyOpenGL raises AttributeError and others for a missing library
        raise ImportError(_no_backend(backend)) from error


def _check_version(found: str) -> None:
    low, high = _VERSIONS
    parts = tuple(int(n) for n in re.findall(r"\d+", found)[:2])
    if not low <= parts < high:
        wanted = ".".join(map(str, low)), ".".join(map(str, high))
        raise ImportError(
            f"the tabletop simulator needs mujoco {wanted[0]} or later, before {wanted[1]}: found "
            f"{found}; pip install 'octolike[sim]'"
        )


def _working_backend() -> str:
    trial = "import mujoco; c = mujoco.GLContext(8, 8); c.make_current(); c.free()"
    for backend in _BACKENDS:
        environment = {**os.environ, "MUJOCO_GL": backend}
        ran = subprocess.run([sys.executable, "-c", trial], env=environment, capture_output=True)
        if ran.returncode == 0:
            return backend
    raise ImportError(_no_backend(" and ".join(_BACKENDS)))


def _no_backend(tried: str) -> str:
    return (
        f"MuJoCo cannot render off screen with {tried or 'its default backend'}: "
        "apt-get install libosmesa6 (or: libegl1 libgl1 libgl1-mesa-dri)"
    )


def _object_xml(slot: int) -> str:
    geoms = {  # condim 6 is friction against rolling, so that what rolls also stops
        "cube": f'type="box" size="{SIZE} {SIZE} {SIZE}"',
        "cylinder": f'type="cylinder" size="{SIZE} {SIZE}" condim="6"',
        "ball": f'type="sphere" size="{SIZE}" condim="6"',
    }
    inside = "".join(
        f'<geom name="object{slot}_{shape}" class="thing" {geoms[shape]}/>' for shape in SHAPES
    )
    return f'<body name="object{slot}"><freejoint name="object{slot}"/>{inside}</body>'


def _bowl_xml(slot: int, sides: int = 16) -> str:
    """Build a bowl from a disc and a ring of slightly tilted boxes; its floor is 6 mm thick."""
    height, slope, thick = BOWL_HEIGHT / 2, 0.25, 0.003
    middle = BOWL_RADIUS - thick - slope * height
    half_width = np.pi * BOWL_RADIUS / sides * 1.05
    ring = []
    for side in range(sides):
        angle = 2 * np.pi * side / sides
        x, y = middle * np.cos(angle), middle * np.sin(angle)
        # Columns of the box frame: outward and a little down, tangent, up and a little outward.
        tilt = np.arctan(slope)
        up = (np.sin(tilt) * np.cos(angle), np.sin(tilt) * np.sin(angle), np.cos(tilt))
        tangent = (-np.sin(angle), np.cos(angle), 0.0)
        outward = np.cross(tangent, up)
        axes = " ".join(f"{v:.5f}" for v in (*outward, *tangent))
        ring.append(
            f'<geom class="bowl" type="box" size="{thick} {half_width:.5f} {height}" '
            f'pos="{x:.5f} {y:.5f} {height}" xyaxes="{axes}"/>'
        )
    floor = f'<geom class="bowl" type="cylinder" size="{middle:.4f} 0.003" pos="0 0 0.003"/>'
    return f'<body name="bowl{slot}" mocap="true">{floor}{"".join(ring)}</body>'


def _finger_xml(name: str, side: int) -> str:
    return f"""
    <body name="{name}" gravcomp="1">
      <joint name="{name}" type="slide" axis="0 {side} 0" range="0 {FINGER_OPENING}"/>
      <geom class="finger" size="0.008 0.004 0.04" pos="0 {side * 0.007} 0.04"/>
      <geom class="pad" size="0.008 0.0015 0.018" pos="0 {side * 0.0015} 0.018"/>
    </body>"""


def _gripper_xml() -> str:
    """Build the free-flying hand; its origin is the point between the fingertips."""
    slides = "".join(
        f'<joint name="{axis}" type="slide" axis="{vector}"/>'
        for axis, vector in (("x", "1 0 0"), ("y", "0 1 0"), ("z", "0 0 1"))
    )
    hinges = "".join(  # the order makes the angles roll, pitch, yaw: R = Rz Ry Rx
        f'<joint name="{axis}" type="hinge" axis="{vector}" armature="0.01"/>'
        for axis, vector in (("yaw", "0 0 1"), ("pitch", "0 1 0"), ("roll", "1 0 0"))
    )
    return f"""
    <body name="hand" gravcomp="1">
      {slides}{hinges}
      <geom class="hand" type="box" size="0.009 0.066 0.007" pos="0 0 0.085"/>
      <geom class="hand" type="cylinder" size="0.011 0.03" pos="0 0 0.12"/>
      <camera name="wrist" pos="-0.055 0 0.105" xyaxes="0 -1 0 0.93 0 0.37" fovy="80"/>
      {_finger_xml("left_finger", 1)}{_finger_xml("right_finger", -1)}
    </body>"""


def scene_xml(objects: int) -> str:
    """Write the MJCF of a table with `objects` object slots, two bowls and the gripper."""
    things = "".join(_object_xml(slot) for slot in range(objects))
    bowls = "".join(_bowl_xml(slot) for slot in range(BOWLS))
    apart = "".join(f'<exclude body1="world" body2="bowl{slot}"/>' for slot in range(BOWLS))
    lines = "".join(
        f'<position name="{joint}" joint="{joint}" kp="{kp}" dampratio="1" forcerange="-{f} {f}"/>'
        for joint, kp, f in (
            *((axis, 6000, 60) for axis in ("x", "y", "z")),
            *((axis, 100, 5) for axis in ("roll", "pitch", "yaw")),
            *((finger, 500, 8) for finger in ("left_finger", "right_finger")),
        )
    )
    return f"""
    <mujoco model="tabletop">
      <option timestep="{TIMESTEP}" integrator="implicitfast" cone="elliptic" impratio="10"/>
      <visual>
        <headlight ambient="0.55 0.55 0.55" diffuse="0.24 0.24 0.24" specular="0 0 0"/>
        <quality offsamples="0" shadowsize="0"/>
        <global offwidth="640" offheight="640"/>
        <map znear="0.02" zfar="10"/>
      </visual>
      <asset><material name="matte" specular="0" shininess="0" reflectance="0"/></asset>
      <default>
        <geom material="matte"/>
        <default class="thing">
          <geom mass="{_MASS / 3}" friction="0.7 0.01 0.01" solref="0.008 1"
                group="{_HIDDEN_GROUP}"/>
        </default>
        <default class="bowl"><geom friction="0.7 0.01 0.01"/></default>
        <default class="hand"><geom rgba="0.25 0.26 0.29 1" mass="0.2"/></default>
        <default class="finger">
          <geom type="box" rgba="0.25 0.26 0.29 1" mass="0.04" friction="0.7 0.01 0.001"/>
        </default>
        <default class="pad">
          <geom type="box" rgba="0.85 0.86 0.88 1" mass="0.01" friction="2 0.05 0.01"
                solref="0.008 1"/>
        </default>
      </default>
      <worldbody>
        <light directional="true" pos="0 0 2" dir="0.25 -0.25 -0.93" diffuse="0.40 0.40 0.40"
               ambient="0 0 0" specular="0 0 0" castshadow="false"/>
        <geom name="table" type="plane" size="2 2 0.1" rgba="0.80 0.77 0.72 1"
              friction="0.7 0.01 0.01"/>
        <camera name="primary" pos="-0.495 0 0.90" xyaxes="0 -1 0 0.85 0 0.527" fovy="30"/>
        {things}{bowls}{_gripper_xml()}
      </worldbody>
      <contact><exclude body1="left_finger" body2="right_finger"/>{apart}</contact>
      <equality>
        <joint joint1="left_finger" joint2="right_finger" solref="0.004 1"/>
      </equality>
      <actuator>{lines}</actuator>
    </mujoco>"""


class TabletopScene:
    """The model and its state, addressed by things instead of ids.

    Attributes:
        model, data: MuJoCo's own.
        things: what lies on the table, in the order of `arrange`.
        owner: int [ngeom], the index in `things` that a geom belongs to, -1 for the table and
            what is switched off, -2 for the hand, -3 and -4 for the left and right finger.
    """

    def __init__(self, objects: int) -> None:
        self.mujoco, self.gl_context = load_mujoco()
        self.model = self.mujoco.MjModel.from_xml_string(scene_xml(objects))
        self.data = self.mujoco.MjData(self.model)
        self.objects = objects
        self.things: tuple[TableObject, ...] = ()
        self.owner = np.full(self.model.ngeom, -1)
        self._slot: dict[TableObject, str] = {}
        joints = ("x", "y", "z", "roll", "pitch", "yaw", "left_finger", "right_finger")
        self.joint_qpos = np.array([self.model.joint(j).qposadr[0] for j in joints])
        self.actuators = np.array([self.model.actuator(j).id for j in joints])
        moment = 0.4 * _MASS * SIZE**2  # a ball's; close enough for the other two
        for slot in range(objects):
            body = self.model.body(f"object{slot}")
            body.mass, body.inertia[:], body.ipos[:] = _MASS, moment, 0
        self.mujoco.mj_setConst(self.model, self.data)

    def arrange(self, things: Sequence[TableObject]) -> None:
        """Switch on one slot per thing and paint it; all others are parked out of sight."""
        model, mujoco = self.model, self.mujoco
        mujoco.mj_resetData(model, self.data)
        self.things, self._slot = tuple(things), {}
        self.owner[:] = -1
        for body, code in (("hand", -2), ("left_finger", -3), ("right_finger", -4)):
            self.owner[model.geom_bodyid == model.body(body).id] = code
        free = {True: [f"bowl{i}" for i in range(BOWLS)]}
        free[False] = [f"object{i}" for i in range(self.objects)]
        for index, thing in enumerate(self.things):
            slot = self._slot[thing] = free[thing.shape == "bowl"].pop(0)
            on = model.geom_bodyid == model.body(slot).id
            if thing.shape != "bowl":
                for shape in SHAPES:
                    self._switch(f"{slot}_{shape}", shape == thing.shape)
                on = np.arange(model.ngeom) == model.geom(f"{slot}_{thing.shape}").id
                model.body_gravcomp[model.body(slot).id] = 0
            self.owner[on] = index
            model.geom_rgba[on, :3] = RGB[thing.colour]
        for slot in free[True]:
            self.data.mocap_pos[model.body(slot).mocapid[0]] = _PARKED
        for slot in free[False]:
            for shape in SHAPES:
                self._switch(f"{slot}_{shape}", False)
            model.body_gravcomp[model.body(slot).id] = 1
            self.data.joint(slot).qpos[:] = (*_PARKED, 1, 0, 0, 0)

    def _switch(self, geom: str, on: bool) -> None:
        view = self.model.geom(geom)
        view.contype[:] = view.conaffinity[:] = int(on)
        view.group[:] = 0 if on else _HIDDEN_GROUP

    def place(self, thing: TableObject, x: float, y: float, yaw: float) -> None:
        """Set a thing down upright at x, y (metres), turned by yaw (radians)."""
        slot = self._slot[thing]
        if thing.shape == "bowl":
            self.data.mocap_pos[self.model.body(slot).mocapid[0]] = (x, y, 0)
        else:
            turn = (np.cos(yaw / 2), 0, 0, np.sin(yaw / 2))
            self.data.joint(slot).qpos[:] = (x, y, SIZE, *turn)

    def position(self, thing: TableObject) -> np.ndarray:
        """Return the centre of an object, or of a bowl's floor: float64 [3] in metres."""
        return self.data.body(self._slot[thing]).xpos.copy()

    def speed(self, thing: TableObject) -> float:
        """Return an object's linear speed in m/s."""
        return float(np.linalg.norm(self.data.joint(self._slot[thing]).qvel[:3]))

    def contacts(self) -> set[tuple[int, int]]:
        """Return the touching pairs of owners, the smaller first."""
        pairs = np.sort(self.owner[self.data.contact.geom], axis=1)
        return {(int(a), int(b)) for a, b in pairs}


class OffscreenRenderer:
    """Draws a scene off screen with flat light: no shadows, no reflections, no smoothing."""

    def __init__(self, scene: Any) -> None:
        self._scene, self._mujoco = scene, scene.mujoco
        model, mujoco = scene.model, scene.mujoco
        try:
            self._gl = scene.gl_context(640, 640)
            self._gl.make_current()
            self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
        except Exception as error:  # every backend raises its own kind
            backend = os.environ.get("MUJOCO_GL", "")
            raise RuntimeError(_no_backend(backend)) from error
        # Left to the interpreter's end, freeing would come after PyOpenGL is gone, and complain.
        self._free = weakref.finalize(self, _free, self._context, self._gl)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        self._view = mujoco.MjvScene(model, maxgeom=500)
        for flag in ("SHADOW", "REFLECTION", "SKYBOX", "HAZE", "FOG"):
            self._view.flags[getattr(mujoco.mjtRndFlag, f"mjRND_{flag}")] = False
        self._options = mujoco.MjvOption()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED

    def draw(self, camera: str, height: int, width: int) -> np.ndarray:
        """Return what `camera` ("primary" or "wrist") sees: uint8 [height, width, 3]."""
        mujoco, scene = self._mujoco, self._scene
        self._gl.make_current()
        self._camera.fixedcamid = scene.model.camera(camera).id
        mujoco.mjv_updateScene(
            scene.model,
            scene.data,
            self._options,
            None,
            self._camera,
            mujoco.mjtCatBit.mjCAT_ALL.value,
            self._view,
        )
        picture = np.empty((height, width, 3), np.uint8)
        viewport = mujoco.MjrRect(0, 0, width, height)
        mujoco.mjr_render(viewport, self._view, self._context)
        mujoco.mjr_readPixels(picture, None, viewport, self._context)
        return picture[::-1].copy()  # OpenGL's first row is the lowest

    def close(self) -> None:
        """Free the render context; it happens by itself when the screen or the process ends."""
        self._free()


def _free(context: Any, gl: Any) -> None:
    gl.make_current()
    context.free()
    gl.free()
