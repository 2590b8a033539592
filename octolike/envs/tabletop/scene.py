"""The table as a MuJoCo model built in code.

One model serves every episode: an object slot holds a cube, a cylinder and a ball, one of them
enabled, so a reset changes colours and positions without compiling a model. (A new render context
would cost 50 to 300 ms per episode.)

Axes: x points away from the primary camera, y to the left of its image, z up from the table top.
"""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np

from octolike.envs.rendering import load_mujoco
from octolike.envs.tabletop.tabletop_tasks import SHAPES, TableObject

TIMESTEP = 0.004  # seconds
SIZE = 0.032  # half the height and half the width of every object, metres
FINGER_OPENING = 0.052  # travel of each finger from the middle, metres
BOWL_RADIUS = 0.075  # outer, metres
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
_HIDDEN_GROUP = 4  # a geom group that is not rendered
_PARKED = (0.0, 0.0, -1.0)


def _object_xml(slot: int) -> str:
    geoms = {  # condim 6 adds rolling friction, so that rolling objects stop
        "cube": f'type="box" size="{SIZE} {SIZE} {SIZE}"',
        "cylinder": f'type="cylinder" size="{SIZE} {SIZE}" condim="6"',
        "ball": f'type="sphere" size="{SIZE}" condim="6"',
    }
    shapes = "".join(
        f'<geom name="object{slot}_{shape}" class="object" {geoms[shape]}/>' for shape in SHAPES
    )
    return f'<body name="object{slot}"><freejoint name="object{slot}"/>{shapes}</body>'


def _bowl_xml(slot: int, sides: int = 16) -> str:
    """Return a bowl made of a disc and a ring of slightly tilted boxes; its floor is 6 mm thick."""
    half_height, slope, thickness = BOWL_HEIGHT / 2, 0.25, 0.003
    mid_radius = BOWL_RADIUS - thickness - slope * half_height
    half_width = np.pi * BOWL_RADIUS / sides * 1.05
    ring = []
    for side in range(sides):
        angle = 2 * np.pi * side / sides
        x, y = mid_radius * np.cos(angle), mid_radius * np.sin(angle)
        # Columns of the box frame: outward and slightly down; tangent; up and slightly outward.
        tilt = np.arctan(slope)
        up = (np.sin(tilt) * np.cos(angle), np.sin(tilt) * np.sin(angle), np.cos(tilt))
        tangent = (-np.sin(angle), np.cos(angle), 0.0)
        outward = np.cross(tangent, up)
        axes = " ".join(f"{v:.5f}" for v in (*outward, *tangent))
        ring.append(
            f'<geom class="bowl" type="box" size="{thickness} {half_width:.5f} {half_height}" '
            f'pos="{x:.5f} {y:.5f} {half_height}" xyaxes="{axes}"/>'
        )
    floor = f'<geom class="bowl" type="cylinder" size="{mid_radius:.4f} 0.003" pos="0 0 0.003"/>'
    return f'<body name="bowl{slot}" mocap="true">{floor}{"".join(ring)}</body>'


def _finger_xml(name: str, side: int) -> str:
    return f"""
    <body name="{name}" gravcomp="1">
      <joint name="{name}" type="slide" axis="0 {side} 0" range="0 {FINGER_OPENING}"/>
      <geom class="finger" size="0.008 0.004 0.04" pos="0 {side * 0.007} 0.04"/>
      <geom class="pad" size="0.008 0.0015 0.018" pos="0 {side * 0.0015} 0.018"/>
    </body>"""


def _gripper_xml(turned: bool) -> str:
    """Return the free-flying hand; its origin is the point between the fingertips.

    turned: mounted a quarter turn about z, without a trace in the pose.
    """
    slides = "".join(
        f'<joint name="{axis}" type="slide" axis="{vector}"/>'
        for axis, vector in (("x", "1 0 0"), ("y", "0 1 0"), ("z", "0 0 1"))
    )
    hinges = "".join(  # this order gives R = Rz(yaw) Ry(pitch) Rx(roll)
        f'<joint name="{axis}" type="hinge" axis="{vector}" armature="0.01"/>'
        for axis, vector in (("yaw", "0 0 1"), ("pitch", "0 1 0"), ("roll", "1 0 0"))
    )
    mount = '<body name="hand" gravcomp="1" euler="0 0 90">' if turned else ""
    return f"""
    <body name="{"flange" if turned else "hand"}" gravcomp="1">
      {slides}{hinges}{mount}
      <geom class="hand" type="box" size="0.009 0.066 0.007" pos="0 0 0.085"/>
      <geom class="hand" type="cylinder" size="0.011 0.03" pos="0 0 0.12"/>
      <camera name="wrist" pos="-0.055 0 0.105" xyaxes="0 -1 0 0.93 0 0.37" fovy="80"/>
      {_finger_xml("left_finger", 1)}{_finger_xml("right_finger", -1)}
    </body>{"</body>" if turned else ""}"""


def scene_xml(object_slots: int, turned: bool = False) -> str:
    """Return the MJCF of a table with object slots, two bowls and the gripper, perhaps turned."""
    objects = "".join(_object_xml(slot) for slot in range(object_slots))
    bowls = "".join(_bowl_xml(slot) for slot in range(BOWLS))
    bowl_excludes = "".join(f'<exclude body1="world" body2="bowl{slot}"/>' for slot in range(BOWLS))
    actuators = "".join(
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
        <default class="object">
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
        {objects}{bowls}{_gripper_xml(turned)}
      </worldbody>
      <contact><exclude body1="left_finger" body2="right_finger"/>{bowl_excludes}</contact>
      <equality>
        <joint joint1="left_finger" joint2="right_finger" solref="0.004 1"/>
      </equality>
      <actuator>{actuators}</actuator>
    </mujoco>"""


class TabletopScene:
    """The model and its state, addressed by `TableObject` instead of MuJoCo's ids.

    Attributes:
        model, data: MuJoCo's MjModel and MjData.
        object_slots: capacity for objects, bowls not counted.
        objects: the objects and bowls on the table, in the order of `arrange`.
        owner: int [ngeom]; per geom the index in `objects`; -1 for the table and disabled geoms,
            -2 for the hand, -3 and -4 for the left and right finger.
    """

    def __init__(
        self, object_slots: int, gripper: str = "standard", look: str = "standard"
    ) -> None:
        """gripper, look: as in TabletopSettings."""
        self.mujoco, self.gl_context = load_mujoco()
        xml = scene_xml(object_slots, gripper == "turned")
        self.model = self.mujoco.MjModel.from_xml_string(xml)
        if look == "repainted":
            self._repaint()
        self.data = self.mujoco.MjData(self.model)
        self.object_slots = object_slots
        self.objects: tuple[TableObject, ...] = ()
        self.owner = np.full(self.model.ngeom, -1)
        self._slot: dict[TableObject, str] = {}
        joints = ("x", "y", "z", "roll", "pitch", "yaw", "left_finger", "right_finger")
        self.joint_qpos = np.array([self.model.joint(j).qposadr[0] for j in joints])
        self.actuators = np.array([self.model.actuator(j).id for j in joints])
        moment = 0.4 * _MASS * SIZE**2  # exact for the ball, close for the cube and the cylinder
        for slot in range(object_slots):
            body = self.model.body(f"object{slot}")
            body.mass, body.inertia[:], body.ipos[:] = _MASS, moment, 0
        self.mujoco.mj_setConst(self.model, self.data)

    def _repaint(self) -> None:
        """Give table, gripper and light other colours; objects keep theirs, which words name."""
        model = self.model
        model.geom("table").rgba[:3] = (0.10, 0.22, 0.24)
        for body in ("hand", "left_finger", "right_finger"):
            model.geom_rgba[model.geom_bodyid == model.body(body).id, :3] = (0.95, 0.92, 0.85)
        model.vis.headlight.ambient[:] = (0.50, 0.45, 0.38)
        model.light_diffuse[:] = (0.30, 0.25, 0.18)

    def arrange(self, objects: Sequence[TableObject]) -> None:
        """Enable and paint one slot per object; move the unused slots out of view."""
        model, mujoco = self.model, self.mujoco
        mujoco.mj_resetData(model, self.data)
        self.objects, self._slot = tuple(objects), {}
        self.owner[:] = -1
        for body, code in (("hand", -2), ("left_finger", -3), ("right_finger", -4)):
            self.owner[model.geom_bodyid == model.body(body).id] = code
        free_bowls = [f"bowl{i}" for i in range(BOWLS)]
        free_slots = [f"object{i}" for i in range(self.object_slots)]
        for index, item in enumerate(self.objects):
            slot = (free_bowls if item.shape == "bowl" else free_slots).pop(0)
            self._slot[item] = slot
            enabled = model.geom_bodyid == model.body(slot).id
            if item.shape != "bowl":
                for shape in SHAPES:
                    self._enable(f"{slot}_{shape}", shape == item.shape)
                enabled = np.arange(model.ngeom) == model.geom(f"{slot}_{item.shape}").id
                model.body_gravcomp[model.body(slot).id] = 0
            self.owner[enabled] = index
            model.geom_rgba[enabled, :3] = RGB[item.colour]
        for slot in free_bowls:
            self.data.mocap_pos[model.body(slot).mocapid[0]] = _PARKED
        for slot in free_slots:
            for shape in SHAPES:
                self._enable(f"{slot}_{shape}", False)
            model.body_gravcomp[model.body(slot).id] = 1
            self.data.joint(slot).qpos[:] = (*_PARKED, 1, 0, 0, 0)

    def _enable(self, geom: str, enabled: bool) -> None:
        view = self.model.geom(geom)
        view.contype[:] = view.conaffinity[:] = int(enabled)
        view.group[:] = 0 if enabled else _HIDDEN_GROUP

    @contextlib.contextmanager
    def hidden_gripper(self) -> Iterator[None]:
        """Leave the hand and its fingers out of the images that are rendered meanwhile."""
        groups = self.model.geom_group.copy()
        self.model.geom_group[self.owner <= -2] = _HIDDEN_GROUP
        try:
            yield
        finally:
            self.model.geom_group[:] = groups

    def place(self, item: TableObject, x: float, y: float, yaw: float) -> None:
        """Place an object upright at x, y (metres), turned by yaw (radians)."""
        slot = self._slot[item]
        if item.shape == "bowl":
            self.data.mocap_pos[self.model.body(slot).mocapid[0]] = (x, y, 0)
        else:
            quaternion = (np.cos(yaw / 2), 0, 0, np.sin(yaw / 2))
            self.data.joint(slot).qpos[:] = (x, y, SIZE, *quaternion)

    def shift(self, item: TableObject, distance: float) -> None:
        """Move an object along y by a distance in metres; its velocity stays."""
        slot = self._slot[item]
        if item.shape == "bowl":
            self.data.mocap_pos[self.model.body(slot).mocapid[0], 1] += distance
        else:
            self.data.joint(slot).qpos[1] += distance

    def position(self, item: TableObject) -> np.ndarray:
        """Return the centre of an object, or of a bowl's floor: float64 [3] in metres."""
        return self.data.body(self._slot[item]).xpos.copy()

    def speed(self, item: TableObject) -> float:
        """Return an object's linear speed in m/s."""
        return float(np.linalg.norm(self.data.joint(self._slot[item]).qvel[:3]))

    def contacts(self) -> set[tuple[int, int]]:
        """Return the touching pairs of owners, the smaller first."""
        pairs = np.sort(self.owner[self.data.contact.geom], axis=1)
        return {(int(a), int(b)) for a, b in pairs}
