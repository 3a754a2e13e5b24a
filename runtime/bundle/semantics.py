"""What the numbers of an action and of a state mean. Data without defaults: each of them must be stated.

The components stand in groups that belong together (a gripper's rotation is six numbers with one meaning), in the order
in which the policy emits them.
"""

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, model_validator

from .values import Data, Float32, Name, repeated

Codec = Literal[
    "rot6d_rows",
    "rot6d_columns",
    "rot6d_rows_intrinsic_xyz_read_as_extrinsic",
    "euler_xyz_extrinsic",
    "euler_xyz_intrinsic",
    "quaternion_wxyz",
    "quaternion_xyzw",
    "rotation_vector",
]
"""How numbers say a rotation R.

rot6d_rows, rot6d_columns    two orthonormal vectors of three: the first two rows (columns) of R
rot6d_rows_intrinsic_xyz_read_as_extrinsic
                             the published Franka checkpoints: the two rows are of a matrix M that is *not* R. The Euler
                             angles of M, taken as intrinsic XYZ, are the three numbers that the controller reads as
                             extrinsic xyz, and those give R. Taken literally, a gripper that points down would turn by
                             twice its yaw
euler_xyz_extrinsic          R = Rz(c) Ry(b) Rx(a), turns about the fixed axes
euler_xyz_intrinsic          R = Rx(a) Ry(b) Rz(c), turns about the moving axes
quaternion_wxyz, ..._xyzw    Hamilton, unit, real part first (last)
rotation_vector              axis times angle
"""

_CODEC: dict[str, tuple[int, str]] = {
    "rot6d_rows": (6, "1"),
    "rot6d_columns": (6, "1"),
    "rot6d_rows_intrinsic_xyz_read_as_extrinsic": (6, "1"),
    "euler_xyz_extrinsic": (3, "rad"),
    "euler_xyz_intrinsic": (3, "rad"),
    "quaternion_wxyz": (4, "1"),
    "quaternion_xyzw": (4, "1"),
    "rotation_vector": (3, "rad"),
}

Motion = Literal["absolute"]
"""The one motion that the runtime executes. Stated all the same: a policy of differences is not bundled unnoticed."""

Frame = Literal["arm_base", "world"]
"""What a pose is measured in: the base of its own arm, or the one frame that the rig file defines for all arms."""


# Bounded, so that no arithmetic on them can overflow; ten metres is beyond every tool.
Metres = Annotated[float, Field(ge=-10, le=10)]
Unit = Annotated[float, Field(ge=-1, le=1)]


class Transform(Data):
    """A rigid transform: translation in metres, then the rotation as a unit quaternion, real part first."""

    translation: tuple[Metres, Metres, Metres]
    quaternion_wxyz: tuple[Unit, Unit, Unit, Unit]

    @model_validator(mode="after")
    def _consistent(self) -> "Transform":
        norm = sum(part**2 for part in self.quaternion_wxyz) ** 0.5
        if abs(norm - 1) > 1e-6:
            raise ValueError(f"the quaternion has length {norm:.7g}, expected 1")
        return self


class Arm(Data):
    """One arm. `flange_to_tcp` is null only where nothing speaks of the arm's tool centre point."""

    name: Name
    flange_to_tcp: Transform | None


class JointPositions(Data):
    """One number per joint, in the arm's own order."""

    kind: Literal["joint_positions"]
    arm: Name
    joints: tuple[Name, ...] = Field(min_length=1)
    unit: Literal["rad"]
    motion: Motion

    @property
    def components(self) -> tuple[tuple[str, str], ...]:
        """Name and unit of each component."""
        return tuple((f"{self.arm}.{joint}", self.unit) for joint in self.joints)


class TcpPosition(Data):
    """x, y, z of the tool centre point."""

    kind: Literal["tcp_position"]
    arm: Name
    unit: Literal["m", "mm"]
    frame: Frame
    motion: Motion

    @property
    def components(self) -> tuple[tuple[str, str], ...]:
        """Name and unit of each component."""
        return tuple((f"{self.arm}.{axis}", self.unit) for axis in "xyz")


class TcpRotation(Data):
    """Orientation of the tool centre point."""

    kind: Literal["tcp_rotation"]
    arm: Name
    codec: Codec
    unit: Literal["1", "rad"]
    frame: Frame
    motion: Motion

    @model_validator(mode="after")
    def _consistent(self) -> "TcpRotation":
        if self.unit != (expected := _CODEC[self.codec][1]):
            raise ValueError(f"the codec {self.codec} has the unit {expected!r}, found {self.unit!r}")
        return self

    @property
    def components(self) -> tuple[tuple[str, str], ...]:
        """Name and unit of each component."""
        return tuple((f"{self.arm}.rotation_{i}", self.unit) for i in range(_CODEC[self.codec][0]))


class Gripper(Data):
    """The opening of one gripper. As a fraction it runs from 0 to 1."""

    kind: Literal["gripper"]
    arm: Name
    unit: Literal["fraction", "m", "mm", "rad"]
    polarity: Literal["larger_opens", "larger_closes"]
    motion: Motion

    @property
    def components(self) -> tuple[tuple[str, str], ...]:
        """Name and unit of the one component."""
        return ((f"{self.arm}.gripper", self.unit),)


Part = Annotated[JointPositions | TcpPosition | TcpRotation | Gripper, Field(discriminator="kind")]


def components(parts: Iterable[Part]) -> list[tuple[str, str]]:
    """Name and unit of every component, in the policy's order."""
    return [component for part in parts for component in part.components]


class Semantics(Data):
    """All of it: the arms, and what action and state say about them."""

    arms: tuple[Arm, ...] = Field(min_length=1)
    action: tuple[Part, ...] = Field(min_length=1)
    state: tuple[Part, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> "Semantics":
        arms = {arm.name: arm for arm in self.arms}
        if len(arms) != len(self.arms):
            raise ValueError(f"two arms have one name: {[arm.name for arm in self.arms]}")
        for side, parts in (("action", self.action), ("state", self.state)):
            for part in parts:
                if part.arm not in arms:
                    raise ValueError(f"{side} speaks of the arm {part.arm!r}, expected one of {sorted(arms)}")
                if part.kind.startswith("tcp") and arms[part.arm].flange_to_tcp is None:
                    raise ValueError(f"{side} speaks of the TCP of {part.arm!r}, whose flange_to_tcp is not stated")
            if twice := repeated(name for name, _ in components(parts)):
                raise ValueError(f"{side} names {', '.join(twice)} twice")
            kinds = {(part.arm, part.kind) for part in parts}
            for arm in arms:
                if ((arm, "tcp_position") in kinds) != ((arm, "tcp_rotation") in kinds):
                    raise ValueError(
                        f"{side} states half a pose of {arm!r}: a position needs a rotation and vice versa"
                    )
                if side == "action" and {(arm, "tcp_position"), (arm, "joint_positions")} <= kinds:
                    raise ValueError(f"action commands both joints and pose of {arm!r}: one of them must win")
        return self


class Timing(Data):
    """When an action is due and which observation it answers.

    `actions[i]` is due at `tau_observation + (i + first_step) / rate_hz`. The public training code predicts the
    *previous* command first: -1. `as_recorded` pairs the newest frame with the state of that instant, as the public
    data do; `capture_time` pairs it with the state at which the frame was taken.
    """

    rate_hz: float = Field(gt=0, le=10000)
    first_step: int = Field(ge=-10000, le=10000)
    pairing: Literal["as_recorded", "capture_time"]


class Normalization(Data):
    """state = (q - mean) / std; action = (a + 1) / 2 * (max - min) + min. Float32 all, one number per component."""

    state_mean: tuple[Float32, ...]
    state_std: tuple[Float32, ...]
    action_min: tuple[Float32, ...]
    action_max: tuple[Float32, ...]

    @model_validator(mode="after")
    def _consistent(self) -> "Normalization":
        if len(self.state_mean) != len(self.state_std):
            raise ValueError(f"state_mean has {len(self.state_mean)} numbers, state_std {len(self.state_std)}")
        if len(self.action_min) != len(self.action_max):
            raise ValueError(f"action_min has {len(self.action_min)} numbers, action_max {len(self.action_max)}")
        if still := [i for i, std in enumerate(self.state_std) if std <= 0]:
            raise ValueError(f"state_std must be positive, components {still} are not")
        pairs = zip(self.action_min, self.action_max, strict=True)
        if turned := [i for i, (low, high) in enumerate(pairs) if high <= low]:
            raise ValueError(f"action_max must exceed action_min, in components {turned} it does not")
        return self
