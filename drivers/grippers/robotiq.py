"""Robotiq 2F-85 over Modbus RTU, on pymodbus, in a thread of its own.

The thread asks for the gripper's status 100 times a second and sends a new target with the same transaction (function
23) when there is one: moves coalesce, and whoever commands never waits for the line. One transaction is 5 ms of wire
at 115200 baud; an FTDI adapter whose latency timer stands at its usual 16 ms makes 20 of them.

Activation closes and opens the fingers, so it waits for the first command and never comes with `open`.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from chatvla_edge.drivers.errors import (
    DeviceFaultError,
    DeviceLostError,
    DeviceNotFoundError,
    DeviceUnsuitableError,
    MissingLibraryError,
)
from chatvla_edge.drivers.protocols import ArmState, AxisBounds, Manners, Options

SERIAL_DEVICES = Path("/sys/bus/usb-serial/devices")

OUTPUTS, INPUTS = 0x03E8, 0x07D0
PERIOD = 0.01  # s
TIMEOUT = 0.1  # s for one answer
REOPEN = 0.5  # s between attempts at a lost line
OPENING = 3.0  # s for the first answer
ACTIVATE, GO = 1, 8
ACTIVATED = 3
# Of the instruction manual of the 2F-85, 4.5.
FAULTS = {
    0x5: "waits for its activation to end",
    0x7: "is not activated",
    0x8: "too hot",
    0x9: "has not been spoken to for 1 s",
    0xA: "under-voltage",
    0xB: "releases what it holds",
    0xC: "internal fault",
    0xD: "activation failed",
    0xE: "over-current",
    0xF: "has released what it held",
}
MINOR = {0x5, 0x7, 0x9}  # what a line that was silent, or an activation, explains

Byte = Annotated[int, Field(ge=0, le=255)]

log = logging.getLogger(__name__)


class RobotiqOptions(Options):
    """One gripper on one serial line.

    Attributes:
        port: the serial device; one below /dev/serial/by-id stays the same when others are plugged in.
        unit: Modbus address.
        speed, force: 0 to 255 of the gripper's range (20 to 150 mm/s, 20 to 235 N).
        width: m between the fingers when open.
        open_count, closed_count: what the position register says then; calibrate for fingers of one's own.
        latency_timer: ms, the most that the adapter's latency timer may be.
        lost_after: s without an answer after which the gripper counts as lost.
    """

    port: str
    unit: Annotated[int, Field(ge=1, le=247)] = 9
    speed: Byte = 255
    force: Byte = 100
    width: Annotated[float, Field(gt=0)] = 0.085
    open_count: Byte = 3
    closed_count: Byte = 230
    latency_timer: Annotated[int, Field(ge=1)] = 1
    lost_after: Annotated[float, Field(gt=0)] = 0.3

    @model_validator(mode="after")
    def _counts(self) -> "RobotiqOptions":
        if self.closed_count <= self.open_count:
            raise ValueError(f"closed_count is {self.closed_count}, expected more than open_count, {self.open_count}")
        return self


@dataclass(frozen=True, slots=True)
class Status:
    """The three status registers, as the gripper means them.

    ``activation``: 0 not, 1 on its way, 3 activated; ``met``: 0 moving, 1 and 2 stopped by an object while opening or
    closing, 3 arrived; ``position``, ``requested``: counts; ``asked_ns``: host time at which it was asked.
    """

    going: bool
    activation: int
    met: int
    fault: int
    requested: int
    position: int
    asked_ns: int
    number: int


def status_of(registers: Sequence[int], asked_ns: int, number: int) -> Status:
    """Three registers of 16 bits as a Status."""
    said = registers[0] >> 8
    return Status(
        bool(said & GO),
        said >> 4 & 3 if said & ACTIVATE else 0,
        said >> 6,
        registers[1] >> 8 & 15,
        registers[1] & 255,
        registers[2] >> 8,
        asked_ns,
        number,
    )


def outputs(action: int, position: int, speed: int, force: int) -> list[int]:
    """The three command registers."""
    return [action << 8, position, speed << 8 | force]


class Robotiq:
    """The gripper; one axis, `gripper`, in m of opening: 0 closed, `width` open."""

    OPTIONS: ClassVar[type[Options]] = RobotiqOptions
    MANNERS: ClassVar[Manners] = Manners(
        stop="keep_force",
        on_open="nothing: it is asked for its status",
        on_close="stays as it is, with its force",
        on_death="ends the move that it was told last, then stays as it is, with its force",
        pacing="device",
    )

    def __init__(self, options: RobotiqOptions) -> None:
        self.options = options
        self._client: Any = None
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._ending = False
        self._status: Status | None = None
        self._wanted: int | None = None  # counts, of the newest command; None where there is none to be carried out
        self._taken = False  # whether it was activated on our word
        self._reset = False  # whether the next words are those that end an activation
        self._trouble = ""

    @property
    def axes(self) -> Sequence[str]:
        """`gripper`."""
        return ("gripper",)

    def bounds(self) -> AxisBounds:
        """0 to `width`; 150 mm/s, the gripper's fastest."""
        return AxisBounds(lower=(0.0,), upper=(self.options.width,), velocity=(0.15,))

    # ---------------------------------------------------------------------------------------------------- open, close

    def open(self, rate: float) -> None:
        """Connect and ask for the status; nothing is written."""
        try:
            import serial  # noqa: F401
            from pymodbus.client import ModbusSerialClient
        except ImportError as error:
            raise MissingLibraryError(f"{error}; pip install 'chatvla-edge[robotiq]'") from error
        options = self.options
        if not Path(options.port).exists():
            raise DeviceNotFoundError(
                f"found no {options.port}; expected the gripper's serial adapter: ls /dev/serial/by-id"
            )
        _check_latency(Path(options.port).resolve().name, options.latency_timer)
        logging.getLogger("pymodbus.logging").setLevel(logging.CRITICAL)  # what it says, our errors say
        self._client = ModbusSerialClient(options.port, baudrate=115200, timeout=TIMEOUT, retries=0, reconnect_delay=0)
        self._ending = False
        self._status = None
        self._thread = threading.Thread(target=self._talk, name="robotiq", daemon=True)
        self._thread.start()
        end = time.monotonic() + OPENING
        while self._status is None:
            if time.monotonic() > end:
                self.close()
                raise DeviceNotFoundError(
                    f"{options.port}: no answer of unit {options.unit} at 115200 baud within {OPENING:g} s"
                    f" ({self._trouble or 'nothing came'}); expected a Robotiq gripper: check its power and address"
                )
            time.sleep(0.005)

    def close(self) -> None:
        """Stop talking; the gripper stays as it is."""
        self._ending = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(2.0)
            self._thread = None
        self._client = None

    # ------------------------------------------------------------------------------------------------------ while open

    def command(self, position: npt.NDArray[np.float64]) -> None:
        """Set the target and return at once. The first one activates the gripper, which closes and opens it."""
        self._lost()
        if len(position) != 1 or not np.isfinite(position[0]):
            raise ValueError(f"{self.options.port}: found the command {position}, expected one finite number")
        options = self.options
        share = min(max(float(position[0]) / options.width, 0.0), 1.0)
        wanted = round(options.closed_count - share * (options.closed_count - options.open_count))
        if wanted != self._wanted:
            self._wanted = wanted
            self._wake.set()

    def state(self) -> ArmState:
        """What it said last, with the time at which it was asked."""
        status = self._lost()
        return ArmState(
            position=(self._opening(status.position),),
            captured_ns=status.asked_ns,
            sequence=status.number,
            target=(self._opening(status.requested),) if status.going else None,
            fault=self._fault(status),
        )

    def holds(self) -> bool | None:
        """Whether an object has stopped the fingers; None before it is activated and once it is lost."""
        status = self._status
        if status is None or status.activation != ACTIVATED or self._silent(status):
            return None
        return status.met in (1, 2)

    def stop(self) -> None:
        """Keep what it holds, with its force; fingers that move freely stop where they are."""
        status = self._status
        if status is None or self._wanted is None:
            return
        if status.activation == ACTIVATED and status.met == 0 and status.going:
            self._wanted = status.position
        elif status.going:
            self._wanted = status.requested
        else:
            self._wanted = None
        self._wake.set()

    def clear(self) -> None:
        """End a fault by taking back the activation; nothing moves, and what is held is held by the gears only.

        The next command activates it again, which closes and opens the fingers.
        """
        self._wanted, self._reset = None, True
        self._wake.set()
        end = time.monotonic() + 1.0
        while self._reset or self._fault(self._lost()):
            if time.monotonic() > end:
                raise DeviceFaultError(f"{self.options.port}: {self._fault(self._lost())}, still; switch it off and on")
            time.sleep(0.005)

    # ---------------------------------------------------------------------------------------------------------- inside

    def _opening(self, count: int) -> float:
        options = self.options
        share = (options.closed_count - count) / (options.closed_count - options.open_count)
        return options.width * min(max(share, 0.0), 1.0)

    def _silent(self, status: Status) -> bool:
        return time.monotonic_ns() - status.asked_ns > 1e9 * self.options.lost_after

    def _lost(self) -> Status:
        status = self._status
        if status is None:
            raise DeviceLostError(f"{self.options.port}: is not open")
        if self._silent(status):
            self._wanted = None  # what was wanted then is not what is wanted when it comes back
            raise DeviceLostError(
                f"{self.options.port}: no answer for {self.options.lost_after:g} s ({self._trouble or 'nothing came'});"
                " check cable and power"
            )
        return status

    def _fault(self, status: Status) -> str:
        if self._taken and status.activation == 0:
            return "no longer activated: it has lost its power"
        if status.fault == 0 or status.fault in MINOR:
            return ""
        return FAULTS.get(status.fault, f"fault {status.fault}")

    def _talk(self) -> None:
        """The thread: one transaction after the other, and the line opened again when it is lost."""
        from pymodbus.exceptions import ModbusException

        number = 0
        failures = 0
        sent: int | None = None
        due = time.monotonic()
        while not self._ending:
            self._wake.clear()
            asked_ns = time.monotonic_ns()
            try:
                words, wanted = self._words(sent)
                answer = self._ask(words)
                if answer.isError():
                    raise ModbusException(str(answer))
                number += 1
                self._status = status_of(answer.registers, asked_ns, number)
                failures, self._trouble = 0, ""
                if words is not None:
                    sent = wanted
                    if not words[0]:
                        self._taken = self._reset = False
                if self._status.activation == 0:
                    sent = None
                if self._status.activation == ACTIVATED:
                    self._taken = self._taken or wanted is not None
            except (ModbusException, OSError, ValueError, TypeError) as error:
                # pyserial raises its own kinds of OSError, and a TypeError where a port vanishes while it is read.
                failures += 1
                self._trouble = str(error) or type(error).__name__
                sent = None
                with contextlib.suppress(Exception):
                    self._client.socket.reset_input_buffer()
                if failures >= 3:
                    with contextlib.suppress(Exception):
                        self._client.close()
                    self._wake.wait(REOPEN if failures > 3 else PERIOD)
            due = max(due + PERIOD, time.monotonic() - PERIOD)
            # A new target does not wait for the period to end.
            self._wake.wait(max(0.0, due - time.monotonic()))
        with contextlib.suppress(Exception):
            self._client.close()

    def _words(self, sent: int | None) -> tuple[list[int] | None, int | None]:
        """What to write with the next question, None for nothing, and the target in it."""
        options, status = self.options, self._status
        if self._reset:
            return outputs(0, 0, 0, 0), None
        wanted = self._wanted
        if wanted is None or status is None or (self._taken and status.activation == 0):
            return None, None
        if status.activation != ACTIVATED:
            # Told to go only when the activation has ended: it would do so by itself, with an older target.
            return (outputs(ACTIVATE, 0, 0, 0), None) if status.activation == 0 else (None, None)
        if wanted == sent:
            return None, wanted
        return outputs(ACTIVATE | GO, wanted, options.speed, options.force), wanted

    def _ask(self, words: list[int] | None) -> Any:
        if words is None:
            return self._client.read_input_registers(INPUTS, count=3, device_id=self.options.unit)
        return self._client.readwrite_registers(
            read_address=INPUTS, read_count=3, write_address=OUTPUTS, values=words, device_id=self.options.unit
        )


def _check_latency(name: str, most: int) -> None:
    """Set the latency timer of an FTDI adapter if it is too long. Raises DeviceUnsuitableError if that is refused."""
    timer = SERIAL_DEVICES / name / "latency_timer"
    try:
        found = int(timer.read_text())
    except (OSError, ValueError):
        return  # no FTDI adapter
    if found <= most:
        return
    try:
        timer.write_text(f"{most}\n")
    except OSError as error:
        raise DeviceUnsuitableError(
            f"{name}: found a latency timer of {found} ms, expected at most {most}: each transaction would take some"
            f" {found + 4} ms. As root: echo {most} > {timer}, for ever by a udev rule with ATTR{{latency_timer}}="
            f'"{most}"'
        ) from error
    log.info("%s: latency timer set from %d to %d ms", name, found, most)
