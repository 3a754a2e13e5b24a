"""ARX R5, L5 and X5 through `arx5-interface`, with its own thread off: every command is one exchange with the motors.

What was found out about that library (0.1.5, by its source or against a stand-in; never on an arm), and what is done:

- Its time stamps are those of asking: a dead bus looks alive. A second socket of ours listens to the motors' answers;
  positions, stamps and faults are taken from those.
- What it calls an emergency (too high a current, a gripper reading below -5 mm, a joint far outside its range) locks
  itself up and never returns, with the GIL held. So over-current is judged here; the gripper is given to it in a unit
  in which it cannot fall out of range; and it is no longer called once a joint reads outside what it bears.
- A frame with an id above 7, of whichever node, ends the process. Its socket gets a filter as soon as it exists; in the
  0.2 s before that a foreign node can still end us.
- Its constructor enables the motors. Before it is called, the bus is asked who is there: the wrong model is dangerous.
- Its destructor damps the arm for 2 s without carrying its weight: **the arm sinks**. Park it first.
"""

import contextlib
import os
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator

from chatvla_edge.drivers.arms import can_motors
from chatvla_edge.drivers.arms.can_motors import CAN_RAW_FILTER, SOL_CAN_RAW, Bus, Reply, reply_of
from chatvla_edge.drivers.errors import (
    DeviceFaultError,
    DeviceLostError,
    DeviceNotFoundError,
    DeviceUnsuitableError,
    MissingLibraryError,
)
from chatvla_edge.drivers.protocols import ArmState, AxisBounds, Manners, Options

NETWORK = Path("/sys/class/net")

JOINTS = (1, 2, 4, 5, 6, 7)  # ids of the motors, from the base
GRIPPER = 8
MOTORS = (*JOINTS, GRIPPER)
EC_JOINTS = {"L5": (), "X5": (1, 2, 4)}

LOWER = (-3.14, -0.05, -0.1, -1.6, -1.57, -2.0)  # rad; the library's own, as are those that follow
UPPER = (2.618, 3.5, 3.2, 1.55, 1.57, 2.0)
VELOCITY = (5.0, 5.0, 5.5, 5.5, 5.0, 5.0)  # rad/s
TORQUE = (30.0, 40.0, 30.0, 15.0, 10.0, 10.0)  # Nm
GRIPPER_VELOCITY, GRIPPER_TORQUE = 0.3, 1.5  # m/s, Nm
STIFFNESS, DAMPING = (80.0, 70.0, 70.0, 30.0, 30.0, 20.0), (2.0, 2.0, 2.0, 1.0, 1.0, 0.7)
# What the library makes of a motor's torque or current: Nm per unit.
SCALES = {"X5": (1.96, 1.96, 1.96, 0.424, 0.424, 0.424, 0.424), "L5": (1.0, 1.0, 1.0, 0.424, 0.424, 0.424, 0.424)}

GRIPPER_UNIT = 0.01  # the library's metre of gripper: its 5 mm of tolerance become 0.5 m
GRIPPER_SLACK = 0.005  # m outside of its range that a gripper may read
BEYOND = 3.1  # rad outside of a joint's range at which the library, at 3.14, would lock up
FASTEST = 500.0  # per second: an exchange with seven motors takes 1.05 ms in the library
OVER_CURRENT_CYCLES = 20  # in a row, the library's own count
GUIDED_DAMPING = 0.25  # of the usual, while a person moves the arm

Positive = Annotated[float, Field(gt=0)]
Joints = tuple[float, float, float, float, float, float]


class Arx5Options(Options):
    """One arm on one CAN interface.

    Attributes:
        interface: CAN interface, at 1 Mbit/s.
        model: as printed on the arm; an R5 has the motors of an L5 (users' word; the vendor's library knows no R5).
        adapter: serial number of the USB-CAN adapter that this arm hangs on, against left and right being swapped.
        stiffness, damping: of the joints, Nm/rad and Nms/rad; ``gripper_stiffness``, ``gripper_damping`` likewise.
        gripper_open: rad at the gripper's motor when open; newer grippers turn the other way, about -3.4.
        gripper_width: m when open.
        gravity: m/s2 in the base's frame, for an arm that does not stand upright; zeros: nothing carries its weight.
        lost_after: s of exchanges without an answer of some motor after which the arm counts as lost.
    """

    interface: str = Field(default="can0", pattern=r"^[a-z0-9_.-]{1,15}$")
    model: Literal["R5", "L5", "X5"]
    adapter: str | None = None
    stiffness: Joints = STIFFNESS
    damping: Joints = DAMPING
    gripper_stiffness: Positive = 5.0
    gripper_damping: Positive = 0.2
    gripper_open: float = 5.03
    gripper_width: Positive = 0.088
    gravity: tuple[float, float, float] = (0.0, 0.0, -9.807)
    lost_after: Positive = 0.1

    @field_validator("stiffness", "damping")
    @classmethod
    def _in_range(cls, values: Joints, info: Any) -> Joints:
        most = can_motors.KP if info.field_name == "stiffness" else can_motors.KD
        if not all(0 < value <= most for value in values):
            raise ValueError(f"found {values}, expected numbers above 0 and at most {most:g}")
        return values

    @field_validator("gripper_open")
    @classmethod
    def _turns(cls, value: float) -> float:
        if not 0.5 <= abs(value) <= can_motors.POSITION:
            raise ValueError(f"found {value} rad, expected 0.5 to {can_motors.POSITION}, or as much below 0")
        return value

    @property
    def motors_of(self) -> str:
        """The vendor's name of the model whose motors this arm has."""
        return "L5" if self.model == "R5" else self.model


def adapter_of(interface: str) -> str | None:
    """Serial number of the USB adapter behind a CAN interface; None where the kernel knows none."""
    with contextlib.suppress(OSError):
        # The interface belongs to a USB interface; the serial number to the USB device above it.
        for folder in (Path("device"), Path("device", "..")):
            if (said := NETWORK / interface / folder / "serial").is_file():
                return said.read_text().strip()
    return None


class Arx5:
    """One ARX arm with its gripper; axes `joint1` to `joint6` (rad) and `gripper` (m of opening).

    Before the first command the motors are enabled, with damping and without stiffness, and carry the arm's weight.
    `state` makes an exchange of its own where no `command` went before it, which takes 1.1 ms.
    """

    OPTIONS: ClassVar[type[Options]] = Arx5Options
    MANNERS: ClassVar[Manners] = Manners(
        stop="hold",
        on_open="clears errors and enables the motors: weight carried, damped, no stiffness",
        on_close="damps for 2 s without carrying the weight: the arm sinks",
        on_death="not known: the motors keep their last command for as long as their own settings say",
        pacing="host",
    )

    def __init__(self, options: Arx5Options) -> None:
        self.options = options
        self._motors_of = options.motors_of
        self._bus: Bus | None = None
        self._library: Any = None
        self._controller: Any = None
        self._command: Any = None  # the library's own record of a command, filled anew each time
        self._stiff = False
        self._guided = False
        self._fresh = False  # whether an exchange was made that `state` has not told yet
        self._replies: dict[int, Reply] = {}
        self._heard: dict[int, int] = {}  # motor -> host time at which the exchange of its last answer began
        self._unheard: dict[int, int] = {}  # motor -> exchanges since its last answer
        self._patience = 1  # exchanges
        self._began = 0
        self._sequence = 0
        self._captured = 0
        self._over = 0
        self._over_current = ""

    @property
    def axes(self) -> Sequence[str]:
        """`joint1` to `joint6`, `gripper`."""
        return (*(f"joint{i}" for i in range(1, 7)), "gripper")

    def bounds(self) -> AxisBounds:
        """The library's; it publishes no acceleration and no jerk."""
        return AxisBounds(
            lower=(*LOWER, 0.0),
            upper=(*UPPER, self.options.gripper_width),
            velocity=(*VELOCITY, GRIPPER_VELOCITY),
        )

    # ---------------------------------------------------------------------------------------------------- open, close

    def open(self, rate: float) -> None:
        """Ask who is on the bus, then enable the motors: damped, weight carried, no stiffness. About 0.5 s."""
        if rate > FASTEST:
            raise DeviceUnsuitableError(
                f"{self.options.interface}: found a rate of {rate:g} per second, expected at most {FASTEST:g}:"
                " an exchange with seven motors takes 1.05 ms"
            )
        try:
            import arx5_interface
        except ImportError as error:
            raise MissingLibraryError(
                f"arx5-interface cannot be imported ({error}); pip install 'chatvla-edge[arx]' (x86-64: 0.1.5;"
                " aarch64: 0.1.4 for Python 3.10 and 3.12, else build it from its repository)"
            ) from error
        self._library = arx5_interface
        self._is_the_adapter()
        self._bus = Bus(self.options.interface)
        try:
            self._is_the_arm(self._bus)
            self._listen(self._bus)
            self._take(rate)
        except BaseException:
            self.close()
            raise

    def _is_the_adapter(self) -> None:
        wanted, found = self.options.adapter, adapter_of(self.options.interface)
        if wanted is not None and found != wanted:
            raise DeviceUnsuitableError(
                f"{self.options.interface}: found the adapter {found or 'without a serial number'}, expected {wanted}:"
                " the arms may be swapped; name the adapters by a udev rule, or correct `adapter`"
            )

    def _is_the_arm(self, bus: Bus) -> None:
        """Refuse a bus that somebody talks on, and an arm that is another model or lacks motors."""
        if others := can_motors.talk(bus):
            raise DeviceUnsuitableError(
                f"{bus.interface}: found frames with ids {others[:8]} before any of ours, expected silence:"
                " another program drives this arm, or another device is on the bus"
            )
        found = can_motors.probe(bus, MOTORS)
        missing = [motor for motor in MOTORS if motor not in found.families]
        if missing:
            raise DeviceNotFoundError(
                f"{bus.interface}: found {len(found.families)} motors, no answer from {missing}; expected"
                f" {list(MOTORS)}: check the arm's power, the bit rate (1 Mbit/s) and the cable"
            )
        ec = EC_JOINTS[self._motors_of]
        wrong = [motor for motor in MOTORS if (found.families[motor] == "ec") != (motor in ec)]
        if wrong:
            other = "X5" if self._motors_of == "L5" else "L5 or R5"
            raise DeviceUnsuitableError(
                f"{bus.interface}: found other motors than an {self.options.model} has at {wrong}; this looks like an"
                f" {other}. Nothing was enabled. The wrong model makes dangerous motions: correct `model`"
            )
        if all(found.positions[motor] == 0 for motor in JOINTS):
            raise DeviceUnsuitableError(
                f"{bus.interface}: found every joint at exactly zero, which the library takes for an arm that is not"
                " there: move one joint by hand a little"
            )
        opening = self._opening(found.positions[GRIPPER])
        if not -GRIPPER_SLACK <= opening <= self.options.gripper_width + GRIPPER_SLACK:
            raise DeviceUnsuitableError(
                f"{bus.interface}: found the gripper at {1000 * opening:.0f} mm, expected 0 to"
                f" {1000 * self.options.gripper_width:.0f}: close it before switching the arm on, or correct"
                " `gripper_open` (newer grippers: about -3.4)"
            )

    def _listen(self, bus: Bus) -> None:
        """From here on only the motors' answers."""
        bus.socket.setsockopt(SOL_CAN_RAW, CAN_RAW_FILTER, self._answers_only())

    def _answers_only(self) -> bytes:
        exactly = can_motors.STANDARD_ID | socket.CAN_EFF_FLAG | socket.CAN_RTR_FLAG
        return b"".join(struct.pack("=II", can_id, exactly) for can_id in (0, *EC_JOINTS[self._motors_of]))

    def _take(self, rate: float) -> None:
        library, options = self._library, self.options
        robot = library.RobotConfigFactory.get_instance().get_config(self._motors_of)
        robot.gripper_width = options.gripper_width * GRIPPER_UNIT
        robot.gripper_vel_max = GRIPPER_VELOCITY * GRIPPER_UNIT
        robot.gripper_open_readout = options.gripper_open
        robot.gravity_vector = np.array(options.gravity)
        own = library.ControllerConfigFactory.get_instance().get_config("joint_controller", len(JOINTS))
        own.background_send_recv = False
        own.controller_dt = 1 / rate
        own.over_current_cnt_max = 2**31 - 1
        own.gravity_compensation = any(options.gravity)
        own.shutdown_to_passive = True
        before = _sockets()
        try:
            self._controller = library.Arx5JointController(robot, own, options.interface)
        except RuntimeError as error:
            raise DeviceLostError(f"{options.interface}: arx5-interface could not start the arm: {error}") from error
        finally:
            shielded = _shield(_sockets() - before, self._answers_only())
        if not shielded:
            raise DeviceUnsuitableError(
                f"{options.interface}: found no CAN socket of arx5-interface to shield from foreign frames,"
                " expected one: this release of the library is not known here"
            )
        self._controller.set_log_level(library.LogLevel.ERROR)
        self._command = library.JointState(len(JOINTS))
        self._set_gain(stiff=False)
        self._heard = dict.fromkeys(MOTORS, 0)
        self._unheard = dict.fromkeys(MOTORS, 0)
        self._patience = max(3, round(options.lost_after * rate))
        # Two exchanges: an answer that came late in the first one has come by the second.
        for _ in range(2):
            self._exchange()
        if silent := [motor for motor, heard in self._heard.items() if not heard]:
            raise DeviceLostError(f"{options.interface}: motors {silent} do not answer any more")
        if fault := self._fault():
            raise DeviceFaultError(f"{options.interface}: {fault}")
        self._fresh = False  # whenever the first state is asked for, it is a new one

    def close(self) -> None:
        """Damp for 2 s without carrying the weight, then let go: the arm sinks."""
        self._controller = None  # its destructor does it
        self._stiff = self._guided = self._fresh = False
        if self._bus is not None:
            self._bus.close()
            self._bus = None

    # ------------------------------------------------------------------------------------------------------ while open

    def command(self, position: npt.NDArray[np.float64]) -> None:
        """One exchange with the motors: 1.1 ms."""
        if self._guided:
            raise DeviceFaultError(f"{self.options.interface}: is guided by hand; end that before commanding it")
        if len(position) != len(MOTORS) or not np.isfinite(position).all():
            raise ValueError(f"{self.options.interface}: found the command {position}, expected seven finite numbers")
        if not self._over_current:
            self._tell(position)
            if not self._stiff:
                self._set_gain(stiff=True)
        self._exchange()

    def state(self) -> ArmState:
        """What the motors have answered, with the time before which none of the answers was sent."""
        if not self._fresh:
            self._exchange()
        self._fresh = False
        # Counted in exchanges: a process that was kept from running has heard nobody either.
        if silent := [motor for motor, exchanges in self._unheard.items() if exchanges >= self._patience]:
            raise DeviceLostError(
                f"{self.options.interface}: motors {silent} have not answered for {self.options.lost_after:g} s;"
                " check power and cable"
            )
        replies = [self._replies[motor] for motor in MOTORS]
        opening = self.options.gripper_width / self.options.gripper_open
        position = [reply.position for reply in replies]
        velocity = [reply.velocity for reply in replies]
        position[-1] *= opening
        velocity[-1] *= opening
        return ArmState(
            position=position,
            captured_ns=self._captured,
            sequence=self._sequence,
            velocity=velocity,
            effort=self._efforts(),
            target=self._target(),
            fault=self._fault(),
        )

    def stop(self) -> None:
        """Hold: the last position is sent again, by this and by every `state` that follows."""
        self._exchange()

    def clear(self) -> None:
        """Clear and enable the motors that report an error; then the arm is as after `open`: damped, not stiff."""
        controller, bus = self._opened()
        self._over, self._over_current = 0, ""
        self._set_gain(stiff=False)
        self._exchange()
        for motor, reply in self._replies.items():
            if reply.family == "damiao" and reply.fault:
                bus.send(motor, can_motors.CLEAR)
                time.sleep(0.001)
        controller.recv_once()  # enables every Damiao
        for _ in range(3):
            self._exchange()
        if fault := self._fault():
            raise DeviceFaultError(f"{self.options.interface}: {fault}, still; switch the arm off and on")

    def guide(self, on: bool) -> None:
        """Begin: no stiffness, a quarter of the damping, weight carried. End: stiff where it is then."""
        if on:
            self._set_gain(stiff=False, damping=GUIDED_DAMPING)
        elif self._guided:
            for _ in range(2):  # the library starts from where it saw the arm in the exchange before
                self._exchange()
            here = np.array([self._replies[motor].position for motor in MOTORS])
            here[-1] = self._opening(here[-1])
            self._tell(np.clip(here, self.bounds().lower, self.bounds().upper))
            self._set_gain(stiff=True)
        self._guided = on
        self._exchange()

    # ---------------------------------------------------------------------------------------------------------- inside

    def _opened(self) -> tuple[Any, Bus]:
        if self._controller is None or self._bus is None:
            raise DeviceLostError(f"{self.options.interface}: is not open")
        return self._controller, self._bus

    def _opening(self, angle: float) -> float:
        return angle * self.options.gripper_width / self.options.gripper_open

    def _set_gain(self, *, stiff: bool, damping: float = 1.0) -> None:
        controller, _ = self._opened()
        options = self.options
        zeros = np.zeros(len(JOINTS))
        controller.set_gain(
            self._library.Gain(
                np.array(options.stiffness) if stiff else zeros,
                damping * np.array(options.damping),
                options.gripper_stiffness if stiff else 0.0,
                options.gripper_damping * damping,
            )
        )
        self._stiff = stiff

    def _tell(self, position: npt.NDArray[np.float64]) -> None:
        controller, _ = self._opened()
        self._command.pos()[:] = position[:-1]
        self._command.gripper_pos = position[-1] * GRIPPER_UNIT
        self._command.timestamp = 0.0  # now: any other would begin an interpolation
        controller.set_joint_cmd(self._command)

    def _exchange(self) -> None:
        """Send every motor its command once and hear what they answer."""
        controller, bus = self._opened()
        self._hear(bus)  # what came after the exchange before
        for reply, upper in zip((self._replies.get(motor) for motor in JOINTS), UPPER, strict=True):
            if reply is not None and abs(reply.position) > upper + BEYOND:
                raise DeviceFaultError(
                    f"{bus.interface}: motor {reply.motor} reads {reply.position:.2f} rad, which arx5-interface would"
                    " lock up on; the arm is no longer commanded. Switch it off and calibrate the joint's zero"
                )
        self._began = time.monotonic_ns()
        controller.send_recv_once()
        for motor in self._unheard:
            self._unheard[motor] += 1
        self._hear(bus)
        self._fresh = True
        self._watch_current()

    def _hear(self, bus: Bus) -> None:
        for can_id, data in bus.frames():
            reply = reply_of(can_id, data)
            if reply is not None and reply.motor in self._heard:
                self._replies[reply.motor] = reply
                self._heard[reply.motor] = self._began
                self._unheard[reply.motor] = 0
        oldest = min(self._heard.values())
        if oldest > self._captured:
            self._captured = oldest
            self._sequence += 1

    def _efforts(self) -> list[float]:
        scales = SCALES[self._motors_of]
        return [self._replies[motor].torque * scale for motor, scale in zip(MOTORS, scales, strict=True)]

    def _target(self) -> list[float] | None:
        if not self._stiff:
            return None
        told = self._controller.get_joint_cmd()
        return [*told.pos(), told.gripper_pos / GRIPPER_UNIT]

    def _watch_current(self) -> None:
        """Relieve an arm that has pushed too hard for too long: it is then held where it is."""
        if len(self._replies) < len(MOTORS) or self._over_current:
            return
        efforts = self._efforts()
        over = [i for i, most in enumerate((*TORQUE, GRIPPER_TORQUE)) if abs(efforts[i]) > most]
        self._over = self._over + 1 if over else 0
        if self._over > OVER_CURRENT_CYCLES:
            self._over_current = ", ".join(f"{self.axes[i]} pushes with {efforts[i]:.1f} Nm" for i in over)
            here = np.array([self._replies[motor].position for motor in MOTORS])
            here[-1] = self._opening(here[-1])
            self._tell(np.clip(here, self.bounds().lower, self.bounds().upper))

    def _fault(self) -> str:
        faults = [reply.fault for reply in self._replies.values() if reply.fault]
        if self._over_current:
            faults.append(f"over-current: {self._over_current}")
        opening = self._opening(self._replies[GRIPPER].position)
        if not -GRIPPER_SLACK <= opening <= self.options.gripper_width + GRIPPER_SLACK:
            faults.append(f"the gripper reads {1000 * opening:.0f} mm, its zero is lost")
        return "; ".join(faults)


def _sockets() -> set[int]:
    """Descriptors of this process that are sockets."""
    found = set()
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208  (names, not paths)
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):  # noqa: PTH115
                found.add(int(name))
    return found


def _shield(descriptors: set[int], filters: bytes) -> int:
    """Put a CAN filter on those of the sockets that know CAN filters; how many did."""
    shielded = 0
    for descriptor in descriptors:
        other = socket.socket(socket.AF_CAN, socket.SOCK_RAW, socket.CAN_RAW, fileno=descriptor)
        try:
            other.setsockopt(SOL_CAN_RAW, CAN_RAW_FILTER, filters)
            shielded += 1
        except OSError:
            pass
        finally:
            other.detach()
    return shielded
