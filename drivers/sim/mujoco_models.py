"""The two simulated rigs as MuJoCo models: chains as the makers publish them, capsules and boxes for the rest.

Written by us, without meshes, so that a software renderer draws them at some rate. Joint frames are the makers' (URDF
of ARX's R5; Franka's Denavit-Hartenberg table), held to `runtime/arms/*.urdf` by a test. Masses, inertias and gains are
ours: an arm here follows as a position-controlled arm does, carries its own weight, and can grasp; no more is claimed.
"""

from dataclasses import dataclass
from math import pi
from typing import Literal

Scene = Literal["arx_r5_bimanual", "franka_robotiq"]

Triple = tuple[float, float, float]
Joint = tuple[Triple, Triple, Triple]  # place in the link before, its roll, pitch, yaw, axis

HALF = pi / 2
ARX_R5: tuple[Joint, ...] = (
    ((0, 0, 0.0565), (0, 0, 0), (0, 0, 1)),
    ((0.02, 0, 0.047), (0, 0, 0), (0, 1, 0)),
    ((-0.264, 0, 0), (pi, 0, 0), (0, 1, 0)),
    ((0.245, 0, -0.06), (0, 0, 0), (0, 1, 0)),
    ((0.06775, -5e-05, -0.0865), (0, 0, 0), (0, 0, 1)),
    ((0.02895, 0, 0.0865), (pi, 0, 0), (1, 0, 0)),
)
FR3: tuple[Joint, ...] = (
    ((0, 0, 0.333), (0, 0, 0), (0, 0, 1)),
    ((0, 0, 0), (-HALF, 0, 0), (0, 0, 1)),
    ((0, -0.316, 0), (HALF, 0, 0), (0, 0, 1)),
    ((0.0825, 0, 0), (HALF, 0, 0), (0, 0, 1)),
    ((-0.0825, 0.384, 0), (-HALF, 0, 0), (0, 0, 1)),
    ((0, 0, 0), (HALF, 0, 0), (0, 0, 1)),
    ((0.088, 0, 0), (HALF, 0, 0), (0, 0, 1)),
)
ARX_TOOL: Triple = (0.155, 0, 0)
FR3_FLANGE: Triple = (0, 0, 0.107)

STIFFNESS, ARMATURE = 50.0, 0.3  # 1/s of a critically damped servo: 40 ms of lag; kg m^2 at each joint
FINGER_STIFFNESS, FINGER_MASS = 60.0, 0.3  # 1/s, kg


@dataclass(frozen=True)
class Mount:
    """One arm of a scene: joints ``first`` to ``last`` of the model, then a gripper of two fingers, if any."""

    name: str
    body: Literal["arx_r5", "fr3", "robotiq_2f85"]
    joints: tuple[str, ...]
    fingers: tuple[str, ...] = ()


MOUNTS: dict[Scene, tuple[Mount, ...]] = {
    "arx_r5_bimanual": tuple(
        Mount(
            side,
            "arx_r5",
            tuple(f"{side}_joint{i}" for i in range(1, 7)),
            (f"{side}_finger1", f"{side}_finger2"),
        )
        for side in ("left", "right")
    ),
    "franka_robotiq": (
        Mount("franka", "fr3", tuple(f"franka_joint{i}" for i in range(1, 8))),
        Mount("gripper", "robotiq_2f85", (), ("franka_finger1", "franka_finger2")),
    ),
}
CAMERAS: dict[Scene, str] = {"arx_r5_bimanual": "top", "franka_robotiq": "right"}
MIDDLE: dict[Scene, float] = {"arx_r5_bimanual": 0.0, "franka_robotiq": 0.5}  # x of the middle cube
CUBES = 3


def mjcf(scene: Scene) -> str:
    """The model as MJCF."""
    if scene == "arx_r5_bimanual":
        arms = "".join(
            f'<body name="{side}" pos="{x} -0.38 0" euler="0 0 {HALF}">'
            f"{_chain(side, ARX_R5, ARX_TOOL, 0.022, _fingers(side, 'x', 0.088))}</body>"
            for side, x in (("left", -0.25), ("right", 0.25))
        )
        camera = '<camera name="top" pos="0 -0.02 1.05" euler="0 0 0" fovy="48"/>'
    else:
        arms = f'<body name="franka">{_chain("franka", FR3, FR3_FLANGE, 0.045, _fingers("franka", "z", 0.085))}</body>'
        camera = '<camera name="right" pos="0.55 -1.05 0.75" mode="targetbody" target="aim" fovy="52"/>'
    cubes = "".join(
        f'<body name="cube{i}" pos="{MIDDLE[scene] + (i - 1) * 0.12} 0.05 0.02"><freejoint/>'
        f'<geom type="box" size="0.02 0.02 0.02" mass="0.05" rgba="{colour}" friction="1.5 0.02 0.001" condim="4" '
        f'contype="1" conaffinity="3"/></body>'
        for i, colour in enumerate(("0.85 0.2 0.2 1", "0.2 0.7 0.3 1", "0.2 0.4 0.85 1"))
    )
    servos = "".join(_servo(joint, STIFFNESS, ARMATURE) for mount in MOUNTS[scene] for joint in mount.joints) + "".join(
        _servo(finger, FINGER_STIFFNESS, FINGER_MASS, 25.0) for mount in MOUNTS[scene] for finger in mount.fingers
    )
    return f"""<mujoco model="{scene}">
  <compiler angle="radian" autolimits="true" eulerseq="XYZ"/>
  <option timestep="0.002" integrator="implicitfast"/>
  <visual>
    <quality offsamples="0" shadowsize="0" numslices="8" numstacks="4"/>
    <global offwidth="1280" offheight="960"/>
    <headlight ambient="0.45 0.45 0.45" diffuse="0.5 0.5 0.5" specular="0 0 0"/>
  </visual>
  <default>
    <joint armature="{ARMATURE}"/>
    <geom contype="0" conaffinity="0" rgba="0.25 0.26 0.28 1" solref="0.004 1"/>
  </default>
  <worldbody>
    <geom name="table" type="box" size="1.2 0.9 0.02" pos="0 0 -0.02" rgba="0.55 0.45 0.35 1" contype="1"
      conaffinity="3"/>
    <body name="aim" pos="0.45 0 0.2"/>
    {camera}
    {arms}
    {cubes}
  </worldbody>
  <actuator>{servos}</actuator>
</mujoco>"""


def _numbers(values: Triple) -> str:
    return " ".join(f"{value:.17g}" for value in values)


def _chain(arm: str, joints: tuple[Joint, ...], tool: Triple, radius: float, hand: str) -> str:
    """Links as capsules from joint to joint, one within the other; the tool's place as a site."""
    ends = [place for place, _, _ in joints[1:]] + [tool]
    opened = _link((0.0, 0.0, 0.0), joints[0][0], radius)
    for i, ((place, turn, axis), end) in enumerate(zip(joints, ends, strict=True), 1):
        # URDF's roll, pitch, yaw about fixed axes is yaw, pitch, roll about moving ones; only roll is in use here.
        assert turn[1] == turn[2] == 0
        opened += (
            f'<body name="{arm}_link{i}" pos="{_numbers(place)}" euler="{_numbers(turn)}" gravcomp="1">'
            f'<inertial pos="0 0 0" mass="0.5" diaginertia="0.002 0.002 0.002"/>'
            f'<joint name="{arm}_joint{i}" axis="{_numbers(axis)}"/>{_link((0.0, 0.0, 0.0), end, radius)}'
        )
    return f'{opened}<site name="{arm}_tool" pos="{_numbers(tool)}"/>{hand}' + "</body>" * len(joints)


def _link(start: Triple, end: Triple, radius: float) -> str:
    if sum((a - b) ** 2 for a, b in zip(start, end, strict=True)) < 1e-6:
        return f'<geom type="sphere" size="{radius * 1.3:.3g}"/>'
    return f'<geom type="capsule" size="{radius}" fromto="{_numbers(start)} {_numbers(end)}"/>'


def _fingers(arm: str, along: Literal["x", "z"], width: float) -> str:
    """Two fingers that part along y, in front of the last link; each makes half of the opening."""
    reach = 0.155 if along == "x" else 0.107
    size, at = ("0.025 0.006 0.01", "{r} {y} 0") if along == "x" else ("0.01 0.006 0.025", "0 {y} {r}")
    palm_at = at.format(r=reach - 0.045 if along == "x" else reach + 0.07, y=0)
    palm = "0.012 0.05 0.015" if along == "x" else "0.015 0.05 0.012"
    tip = reach if along == "x" else reach + 0.12
    bodies = f'<geom type="box" size="{palm}" pos="{palm_at}"/>'
    for i, sign in ((1, 1), (2, -1)):
        bodies += (
            f'<body name="{arm}_finger{i}" pos="{at.format(r=tip, y=0.006 * sign)}" gravcomp="1">'
            f'<joint name="{arm}_finger{i}" type="slide" axis="0 {sign} 0" range="0 {width / 2}" armature="0"/>'
            f'<geom type="box" size="{size}" mass="{FINGER_MASS}" rgba="0.7 0.7 0.72 1" friction="1.5 0.02 0.001" '
            f'condim="4" contype="2" conaffinity="1"/></body>'
        )
    return bodies


def _servo(joint: str, stiffness: float, inertia: float, force: float = 200.0) -> str:
    return (
        f'<position name="{joint}" joint="{joint}" kp="{inertia * stiffness**2}" kv="{2 * inertia * stiffness}" '
        f'forcerange="-{force} {force}"/>'
    )
