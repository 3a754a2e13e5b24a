"""What the runtime asks of a device, and nothing more.

Every driver is a class whose constructor takes its options (a pydantic model, `OPTIONS`, read from the rig file) and
touches nothing; `open` does. Constructing is free, so a rig file can be checked where no device and no vendor library
is. Vendor libraries are imported in `open`, never with the module.

Host time is CLOCK_MONOTONIC in nanoseconds (`time.monotonic_ns`). Angles rad, lengths m, torques Nm, forces N, unless a
driver's docstring says that its device knows no such unit.

A driver serves one thread of one process, which may be killed at any instant. No call takes longer than its docstring
says: what a vendor library may block on for ever is the process's to be killed for, not ours to wait for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

Image = npt.NDArray[np.uint8]


class Options(BaseModel):
    """Base of every driver's options: unknown names are refused, numbers are finite, nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# -------------------------------------------------------------------------------------------------------------- cameras


@dataclass(frozen=True)
class Frame:
    """One picture.

    Attributes:
        image: `[H, W, 3]` uint8 RGB. Valid until the next `read`: copy what must last.
        captured_ns: host time of the exposure, as well as it is known; see `clock`.
        received_ns: host time at which the library handed it over.
        sequence: the device's own frame counter, or ours where it has none: a jump is a lost frame.
        clock: how `captured_ns` was found. `device`: from the device's own clock; `arrival`: it is `received_ns`.
    """

    image: Image
    captured_ns: int
    received_ns: int
    sequence: int
    clock: Literal["device", "arrival"]


@dataclass(frozen=True)
class CameraHealth:
    """Counts since `open`, and what the device says of itself."""

    frames: int = 0  # handed out
    lost: int = 0  # by the device's counter
    repeated: int = 0  # delivered again by the library, and not handed out
    clock_steps: int = 0  # the device's clock jumped against the host's
    facts: Mapping[str, str | int | float | bool] = field(default_factory=dict)  # usb, firmware, exposure, temperature


@runtime_checkable
class Camera(Protocol):
    """A source of frames, newest first: what was not read in time is gone, and counted."""

    OPTIONS: ClassVar[type[Options]]

    def open(self, height: int, width: int, rate: float) -> None:
        """Start the stream, at most 10 s.

        Raises MissingLibraryError, DeviceNotFoundError, DeviceUnsuitableError, DeviceLostError.
        """

    def read(self, timeout: float) -> Frame:
        """The newest frame that was not handed out before, waited for at most `timeout` s.

        Raises TimeoutError where none came (the stream may go on), DeviceLostError where it has ended.
        """

    def health(self) -> CameraHealth:
        """What was counted. Never asks the device, so never blocks."""

    def close(self) -> None:
        """Stop the stream. May be called twice, and after any error."""


# ---------------------------------------------------------------------------------------------------- arms and grippers


@dataclass(frozen=True, slots=True)
class ArmState:
    """What a device says of its axes, in the order of the rig file.

    Attributes:
        position: `[axes]` rad, or m for a linear axis.
        velocity, effort: `[axes]`, or None where the device does not measure them.
        captured_ns: host time at which the device sent this. Never the time of asking: a library that answers from
            memory on a dead bus would look alive.
        sequence: counts the device's own answers; the same number again is the same answer again.
        target: `[axes]` where the vendor's controller heads for, if it says so; compared with what was sent.
        fault: what is wrong now, in words; "" when well.
    """

    position: Sequence[float]
    captured_ns: int
    sequence: int
    velocity: Sequence[float] | None = None
    effort: Sequence[float] | None = None
    target: Sequence[float] | None = None
    fault: str = ""


Stop = Literal["hold", "damp", "brake", "keep_force"]


@dataclass(frozen=True)
class Manners:
    """What a device does with its motors when nobody asks it to; stands in docs/SAFETY.md, kept by a test.

    Attributes:
        stop: what `stop` does.
        on_open, on_close, on_death: what opening, closing, and killing the process do to the arm.
        pacing: `host`: every `command` is one exchange with the device, so the caller's period is the bus's; `device`:
            the library talks to the device at the device's own clock and a `command` sets its target.
    """

    stop: Stop
    on_open: str
    on_close: str
    on_death: str
    pacing: Literal["host", "device"]


@dataclass(frozen=True)
class AxisBounds:
    """The vendor's own limits of the axes, `[axes]` each; None where it publishes none. A rig may only narrow them."""

    lower: Sequence[float]
    upper: Sequence[float]
    velocity: Sequence[float]
    acceleration: Sequence[float] | None = None
    jerk: Sequence[float] | None = None


@runtime_checkable
class Arm(Protocol):
    """An arm, an arm with its gripper, or a gripper alone: axes that take positions."""

    OPTIONS: ClassVar[type[Options]]
    MANNERS: ClassVar[Manners]

    @property
    def axes(self) -> Sequence[str]:
        """Names of the axes, the gripper's (`gripper`) last. Known before `open`."""

    def bounds(self) -> AxisBounds:
        """The vendor's limits; for a device that comes in generations, those of the one that `open` found."""

    def open(self, rate: float) -> None:
        """Connect and be ready to tell the state; nothing moves. At most 10 s. ``rate``: calls of `command` per second.

        Raises MissingLibraryError, DeviceNotFoundError, DeviceUnsuitableError, DeviceLostError, DeviceFaultError.
        """

    def state(self) -> ArmState:
        """The newest state, within half a period. Raises DeviceLostError."""

    def command(self, position: npt.NDArray[np.float64]) -> None:
        """Send `[axes]` positions within a period; the array is reused, so copy what must last. Raises DeviceLostError.

        The first one after `open` or `stop` takes the motors under control where they are: it lies within the rig's
        reach of the measured position, which the caller sees to.
        """

    def stop(self) -> None:
        """The stop action (`MANNERS.stop`), within a period. Harmless when repeated, and before the first command."""

    def clear(self) -> None:
        """End a fault, on the operator's word only; nothing moves. Raises DeviceFaultError where it stays."""

    def close(self) -> None:
        """Let go, as `MANNERS.on_close` says. May be called twice, and after any error. At most 5 s."""


@runtime_checkable
class HandGuided(Protocol):
    """An arm that a person may move by hand while its motors carry its own weight."""

    def guide(self, on: bool) -> None:
        """Begin or end hand-guiding; commands are refused while it lasts. Raises DeviceLostError, DeviceFaultError."""


@runtime_checkable
class Gripper(Arm, Protocol):
    """A gripper that is a device of its own: one axis, `gripper`, in m of opening unless its driver says otherwise."""

    def holds(self) -> bool | None:
        """Whether it has met an object; None where it cannot tell."""


# ---------------------------------------------------------------------------------------------------- enabling switches


@runtime_checkable
class EnableInput(Protocol):
    """A hardware switch that must be held, or must not be pressed, for the rig to move."""

    OPTIONS: ClassVar[type[Options]]

    def open(self) -> None:
        """Connect. Raises MissingLibraryError, DeviceNotFoundError, DeviceLostError."""

    def enabled(self) -> bool:
        """Whether motion is allowed now, at once. Whatever is not known for certain is False. Never raises."""

    def close(self) -> None:
        """Let go; `enabled` is False from here on."""


def named(options: Options) -> dict[str, Any]:
    """Options as JSON values, for a child process."""
    return options.model_dump(mode="json")
