"""What the numbers of a policy mean on a rig: which action component drives which axis, and the state out of the axes.

The manifest says what each component is, the rig file what each axis is. Here the two meet; whatever does not fit is
refused with both sides named, before anything is started.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chatvla_edge.drivers import registry
from chatvla_edge.drivers.protocols import AxisBounds
from chatvla_edge.drivers.rig import Arm as RigArm
from chatvla_edge.drivers.rig import GripperAxis, Rig
from chatvla_edge.runtime import rotations
from chatvla_edge.runtime.arm_model import ArmModel, load_arm, read_arm
from chatvla_edge.runtime.bundle import (
    Contents,
    Gripper,
    JointPositions,
    RigNeeds,
    TcpPosition,
    TcpRotation,
    Transform,
    components,
)
from chatvla_edge.runtime.device_plan import DevicePlan
from chatvla_edge.runtime.kinematics import Kinematics
from chatvla_edge.runtime.servo_plan import ArmPlan, AxisLimits, DirectAxis, FusionPlan, PoseAction, ServoPlan

Float = NDArray[np.float64]
Part = JointPositions | TcpPosition | TcpRotation | Gripper

GRIPPER = "gripper"

# The manifest's words for rotations -> the servo's.
CODECS = {
    "rot6d_rows": "rot6d_rows",
    "rot6d_rows_intrinsic_xyz_read_as_extrinsic": "rot6d_franka_droid",
    "euler_xyz_extrinsic": "euler_xyz_extrinsic",
    "euler_xyz_intrinsic": "euler_XYZ_intrinsic",
    "quaternion_xyzw": "quaternion_xyzw",
}
# Rotations whose numbers may be faded and interpolated one by one; angles and quaternions turn over somewhere.
FUSIBLE = ("rot6d_rows", "rot6d_franka_droid")

_METRES = {"m": 1.0, "mm": 1e-3}


class MappingError(ValueError):
    """The policy's numbers cannot drive this rig, or the rig cannot say the state that the policy needs."""


@dataclass(frozen=True)
class Line:
    """position = scale * number + offset."""

    scale: float
    offset: float

    def number(self, position: float) -> float:
        """The way back."""
        return (position - self.offset) / self.scale


@dataclass(frozen=True)
class Axes:
    """The axes of one device of the rig, as its driver names them."""

    device: str
    names: tuple[str, ...]
    bounds: AxisBounds

    def index(self, name: str) -> int:
        """Position of an axis. Raises MappingError."""
        if name not in self.names:
            raise MappingError(f"the policy speaks of {self.device}.{name}; the rig's {self.device} has {self.names}")
        return self.names.index(name)


def axes_of(rig: Rig) -> dict[str, Axes]:
    """Every device's axes, asked of its driver, which is not opened."""
    found = {}
    for name, arm in rig.arms.items():
        driver = registry.create("arms", arm.driver, arm.options)
        found[name] = Axes(name, tuple(driver.axes), driver.bounds())
    return found


def needs(rig: Rig, manifest: Contents) -> RigNeeds:
    """What the rig gives a policy. How many numbers an action has is judged by `servo_plan`, with their meaning."""
    return RigNeeds(
        cameras={name: (camera.height, camera.width) for name, camera in rig.cameras.items()},
        action_dim=len(components(manifest.semantics.action)),
        state_dim=len(components(manifest.semantics.state)),
        rate_hz=rig.policy.rate,
    )


def gripper_line(part: Gripper, axis: GripperAxis) -> Line:
    """From the policy's gripper number to the axis `gripper`. Raises MappingError for units that do not meet."""
    if part.unit == "fraction":
        opens = part.polarity == "larger_opens"
        at_0, at_1 = (axis.closed, axis.open) if opens else (axis.open, axis.closed)
        return Line(at_1 - at_0, at_0)
    scale = _METRES.get(part.unit)
    if scale is None:
        raise MappingError(f"{part.arm}.gripper: found the unit {part.unit!r}, expected fraction, m or mm")
    if (axis.open > axis.closed) == (part.polarity == "larger_opens"):
        return Line(scale, 0.0)
    # One side counts how far it is open, the other how far it is closed.
    return Line(-scale, axis.open + axis.closed)


def _gripper_of(rig: Rig, axes: Mapping[str, Axes], arm: str) -> tuple[str, GripperAxis]:
    """The device that carries an arm's gripper axis, and what its ends are."""
    for name, device in rig.arms.items():
        if device.gripper is not None and GRIPPER in axes[name].names and arm in (name, device.of):
            return name, device.gripper
    raise MappingError(
        f"the policy speaks of {arm}.gripper; expected a device of the rig that has an axis {GRIPPER!r}, an entry "
        f"`gripper`, and is {arm!r} itself or `of: {arm}`"
    )


def _chain(arm: RigArm) -> ArmModel:
    """The kinematics that the rig names: an arm of ours, or a URDF file."""
    chain = str(arm.chain)
    return read_arm(Path(chain)) if chain.endswith(".urdf") else load_arm(chain)


def _tool(arm: RigArm, transform: Transform | None, name: str) -> tuple[float, ...]:
    """The tool centre point in the last joint's frame: 12 numbers, the flange's own offset included."""
    if arm.chain is None:
        raise MappingError(f"the policy speaks of the pose of {name!r}; the rig's arms.{name}.chain is not stated")
    if transform is None:
        raise MappingError(f"the policy's flange_to_tcp of {name!r} is not stated")
    flange = _chain(arm).tool
    w, *xyz = transform.quaternion_wxyz
    turn = rotations.decode("quaternion_xyzw", [*xyz, w])
    rotation = flange[:9].reshape(3, 3)
    position = rotation @ np.array(transform.translation) + flange[9:]
    return (*(rotation @ turn).ravel().tolist(), *position.tolist())


def _codec(part: TcpRotation) -> str:
    if part.codec not in CODECS:
        raise MappingError(f"{part.arm}: found the rotation codec {part.codec}, expected one of {', '.join(CODECS)}")
    return CODECS[part.codec]


def _in_base(part: TcpPosition | TcpRotation) -> None:
    if part.frame != "arm_base":
        raise MappingError(f"{part.arm}: found a pose in the frame {part.frame!r}, expected arm_base")


def _positions(parts: Sequence[Part]) -> list[tuple[int, Part]]:
    """Each part with the place of its first component."""
    at, placed = 0, []
    for part in parts:
        placed.append((at, part))
        at += len(part.components)
    return placed


def _limits(name: str, arm: RigArm, axes: Axes) -> AxisLimits:
    limits, bounds = arm.limits, axes.bounds
    curve = None
    if arm.chain is not None:
        model = _chain(arm)
        if model.curve is not None and len(model.joints) == len(axes.names):
            curve = tuple(tuple(row) for row in model.curve.tolist())
    count = len(axes.names)
    for field in ("lower", "upper", "velocity", "acceleration", "jerk", "step", "lag"):
        values = getattr(limits, field)
        if values is not None and len(values) != count:
            raise MappingError(f"arms.{name}.limits.{field}: found {len(values)} numbers, expected {count}")
    return AxisLimits(
        lower=tuple(limits.lower if limits.lower is not None else bounds.lower),
        upper=tuple(limits.upper if limits.upper is not None else bounds.upper),
        velocity=tuple(limits.velocity if limits.velocity is not None else bounds.velocity),
        acceleration=tuple(limits.acceleration),
        jerk=tuple(limits.jerk),
        step=limits.step,
        lag=limits.lag,
        curve=curve,
        box=limits.workspace.box,
        spheres=limits.workspace.keep_out,
    )


def servo_plan(rig: Rig, manifest: Contents) -> ServoPlan:
    """The servo of a rig that executes a policy. Raises MappingError."""
    axes = axes_of(rig)
    direct: dict[str, list[DirectAxis]] = {name: [] for name in rig.arms}
    poses: dict[str, PoseAction] = {}
    tools = {arm.name: arm.flange_to_tcp for arm in manifest.semantics.arms}
    kinds: list[str] = []
    grippers: list[tuple[float, float]] = []
    placed = _positions(manifest.semantics.action)
    rotation_of = {part.arm: (at, part) for at, part in placed if isinstance(part, TcpRotation)}
    for at, part in placed:
        if isinstance(part, Gripper):
            device, ends = _gripper_of(rig, axes, part.arm)
            line = gripper_line(part, ends)
            direct[device].append(DirectAxis(axes[device].index(GRIPPER), at, line.scale, line.offset))
            low, high = sorted((line.number(ends.closed), line.number(ends.open)))
            grippers.append((low, high))
            kinds.append("gripper")
            continue
        if part.arm not in rig.arms:
            raise MappingError(f"the policy moves an arm {part.arm!r}; the rig's arms are {', '.join(rig.arms)}")
        if isinstance(part, JointPositions):
            indices = [axes[part.arm].index(joint) for joint in part.joints]
            direct[part.arm] += [DirectAxis(axis, at + i) for i, axis in enumerate(indices)]
            kinds += ["joint"] * len(indices)
        elif isinstance(part, TcpPosition):
            _in_base(part)
            place, rotation = rotation_of[part.arm]
            if place != at + 3 or part.unit != "m":
                raise MappingError(f"{part.arm}: expected a position in m and its rotation right after it")
            codec = _codec(rotation)
            if codec not in FUSIBLE:
                raise MappingError(f"{part.arm}: actions with the codec {rotation.codec} cannot be fused; rot6d can")
            poses[part.arm] = PoseAction(at, codec, _tool(rig.arms[part.arm], tools[part.arm], part.arm))
            kinds += ["xyz"] * 3
        else:
            _in_base(part)
            kinds += ["rot6d"] * len(part.components)
    arms = []
    for name, arm in rig.arms.items():
        limits = _limits(name, arm, axes[name])
        plan = ArmPlan(
            name,
            limits,
            tuple(direct[name]),
            poses.get(name),
            arm.chain,
            arm.max_age,
            home=arm.home,
            park=arm.park,
        )
        arms.append(plan)
    head = manifest.geometry.head
    try:
        return ServoPlan(
            rate=rig.servo.rate,
            components=tuple(kinds),
            horizon=head.horizon,
            arms=tuple(arms),
            fusion=FusionPlan(mode=rig.servo.fusion, sync_actions=rig.servo.sync_actions),
            gripper_range=(min(low for low, _ in grippers), max(high for _, high in grippers))
            if grippers
            else (0.0, 1.0),
            first_step=manifest.timing.first_step,
            action_dt=1.0 / manifest.timing.rate_hz,
            chunk_budget=rig.servo.chunk_max_age,
            approach_speed=rig.servo.approach_speed,
        )
    except ValueError as error:
        raise MappingError(f"{rig.name}: {error}") from error


def device_plans(rig: Rig, plan: ServoPlan) -> tuple[DevicePlan, ...]:
    """One per arm, in the servo plan's order."""
    return tuple(
        DevicePlan.of(arm, rig.arms[arm.name].rate, hold=rig.arms[arm.name].hold, reach=rig.arms[arm.name].reach)
        for arm in plan.arms
    )


class StateReader:
    """The policy's state vector out of the axes' measured positions."""

    def __init__(self, rig: Rig, manifest: Contents) -> None:
        axes = axes_of(rig)
        tools = {arm.name: arm.flange_to_tcp for arm in manifest.semantics.arms}
        self.size = len(components(manifest.semantics.state))
        self._direct: list[tuple[int, str, int, Line]] = []
        self._poses: list[tuple[int, str, str | None, Kinematics, int, float]] = []
        chains: dict[str, tuple[Kinematics, int]] = {}
        for at, part in _positions(manifest.semantics.state):
            if isinstance(part, Gripper):
                device, ends = _gripper_of(rig, axes, part.arm)
                self._direct.append((at, device, axes[device].index(GRIPPER), gripper_line(part, ends)))
                continue
            if part.arm not in rig.arms:
                raise MappingError(f"the policy asks for an arm {part.arm!r}; the rig's arms are {', '.join(rig.arms)}")
            if isinstance(part, JointPositions):
                for i, joint in enumerate(part.joints):
                    self._direct.append((at + i, part.arm, axes[part.arm].index(joint), Line(1.0, 0.0)))
                continue
            _in_base(part)
            if part.arm not in chains:
                arm = rig.arms[part.arm]
                tool = _tool(arm, tools[part.arm], part.arm)
                model = _chain(arm)
                chains[part.arm] = (Kinematics(model, flange_to_tool=np.array(tool)), len(model.joints))
            kinematics, joints = chains[part.arm]
            codec = _codec(part) if isinstance(part, TcpRotation) else None
            scale = _METRES[part.unit] if isinstance(part, TcpPosition) else 1.0
            self._poses.append((at, part.arm, codec, kinematics, joints, scale))

    def __call__(self, measured: Mapping[str, Float]) -> NDArray[np.float32]:
        """[S] float32 in the policy's units, from each device's axes [n] (rad, m)."""
        state = np.empty(self.size)
        for at, device, axis, line in self._direct:
            state[at] = line.number(float(measured[device][axis]))
        for at, device, codec, kinematics, joints, scale in self._poses:
            rotation, position = kinematics.tool_pose(measured[device][:joints])
            numbers = position / scale if codec is None else rotations.encode(codec, rotation)
            state[at : at + len(numbers)] = numbers
        return state.astype(np.float32)
