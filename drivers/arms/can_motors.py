"""The two motor protocols of an ARX arm on its CAN bus, and what can be asked of the motors without enabling them.

A Damiao motor takes `kp, kd, position, velocity, torque` on its own id and answers on id 0. An EC-A4310 answers on its
own id. Layouts and scales are those that `arx5-interface` 0.1.5 packs and unpacks; the names of the error codes are the
motor makers', and have not been seen on a motor.
"""

import socket
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from chatvla_edge.drivers.errors import DeviceLostError, DeviceNotFoundError

Family = Literal["damiao", "ec"]

FRAME = struct.Struct("=IB3x8s")  # struct can_frame of linux/can.h
STANDARD_ID = 0x7FF
IDS_OF_REPLIES = (0, 0x7F8)  # ids 0 to 7, as id and mask: those that libhardware bears
SOL_CAN_RAW, CAN_RAW_FILTER, CAN_RAW_LOOPBACK = 101, 1, 3  # linux/can/raw.h; not in `socket` on every build

POSITION = 12.5  # rad, either family
DAMIAO_VELOCITY, DAMIAO_TORQUE = 45.0, 18.0  # rad/s, Nm
EC_VELOCITY, EC_CURRENT = 18.0, 30.0  # rad/s, A
KP, KD = 500.0, 5.0
# A DM-J4310 is told its torque divided by this constant, and so on (arx5-sdk, src/app/controller_base.cpp).

ENABLE, DISABLE, ZERO, CLEAR = (b"\xff" * 7 + bytes([last]) for last in (0xFC, 0xFD, 0xFE, 0xFB))
QUERY_POSITION = b"\xe0\x01"

DAMIAO_DISABLED, DAMIAO_ENABLED = 0, 1
DAMIAO_ERRORS = {
    0x8: "over-voltage",
    0x9: "under-voltage",
    0xA: "over-current",
    0xB: "driver too hot",
    0xC: "rotor too hot",
    0xD: "lost its commands",
    0xE: "overload",
}


@dataclass(frozen=True, slots=True)
class Target:
    """What a motor is told: stiffness (Nm/rad), damping (Nms/rad), rad, rad/s, Nm (an EC-A4310: A)."""

    kp: float
    kd: float
    position: float
    velocity: float
    torque: float


@dataclass(frozen=True, slots=True)
class Reply:
    """What a motor says. ``status``: a Damiao's state (1 is enabled) or an EC-A4310's error (0 is none)."""

    motor: int
    family: Family
    status: int
    position: float
    velocity: float
    torque: float

    @property
    def fault(self) -> str:
        """In words; "" when well. A Damiao that is not enabled is a fault once it has been enabled."""
        if self.family == "ec":
            return f"motor {self.motor}: error {self.status}" if self.status else ""
        if self.status == DAMIAO_ENABLED:
            return ""
        what = "not enabled" if self.status == DAMIAO_DISABLED else DAMIAO_ERRORS.get(self.status)
        return f"motor {self.motor}: {what or f'status {self.status}'}"


def _up(value: float, span: float, bits: int) -> int:
    top = (1 << bits) - 1
    return min(max(round((value + span) * top / (2 * span)), 0), top)


def _down(raw: int, span: float, bits: int) -> float:
    return raw * 2 * span / ((1 << bits) - 1) - span


def damiao_reply(motor: int, status: int, position: float, velocity: float, torque: float) -> tuple[int, bytes]:
    """The frame (id, data) with which a Damiao motor answers."""
    q, v, t = (
        _up(position, POSITION, 16),
        _up(velocity, DAMIAO_VELOCITY, 12),
        _up(torque, DAMIAO_TORQUE, 12),
    )
    data = bytes((status << 4 | motor & 15, q >> 8, q & 255, v >> 4, (v & 15) << 4 | t >> 8, t & 255, 30, 30))
    return 0, data


def ec_reply(motor: int, error: int, position: float, velocity: float, current: float) -> tuple[int, bytes]:
    """The frame (id, data) with which an EC-A4310 answers a command; 30 degrees Celsius."""
    q, v, i = _up(position, POSITION, 16), _up(velocity, EC_VELOCITY, 12), _up(current, EC_CURRENT, 12)
    return motor, bytes((1 << 5 | error & 31, q >> 8, q & 255, v >> 4, (v & 15) << 4 | i >> 8, i & 255, 110))


def ec_position_reply(motor: int, position: float) -> tuple[int, bytes]:
    """The answer to QUERY_POSITION: a float, high byte first, in degrees (the maker's manual; not confirmed)."""
    return motor, struct.pack(">BBf", 5 << 5, 1, position * 57.29577951308232)


def damiao_target(data: bytes) -> Target:
    """What the eight bytes of a Damiao command say."""
    return Target(
        kp=((data[3] & 15) << 8 | data[4]) * KP / 4095,
        kd=(data[5] << 4 | data[6] >> 4) * KD / 4095,
        position=_down(data[0] << 8 | data[1], POSITION, 16),
        velocity=_down(data[2] << 4 | data[3] >> 4, DAMIAO_VELOCITY, 12),
        torque=_down((data[6] & 15) << 8 | data[7], DAMIAO_TORQUE, 12),
    )


def ec_target(data: bytes) -> Target:
    """What the eight bytes of an EC-A4310 command of mode 0 say."""
    bits = int.from_bytes(data, "big")  # mode 3, kp 12, kd 9, position 16, velocity 12, current 12
    return Target(
        kp=(bits >> 49 & 4095) * KP / 4095,
        kd=(bits >> 40 & 511) * KD / 511,
        position=_down(bits >> 24 & 65535, POSITION, 16),
        velocity=_down(bits >> 12 & 4095, EC_VELOCITY, 12),
        torque=_down(bits & 4095, EC_CURRENT, 12),
    )


def reply_of(can_id: int, data: bytes) -> Reply | None:
    """The motor's answer in a frame; None where it is a request, somebody else's, or not understood."""
    if can_id == 0 and len(data) == 8:
        return Reply(
            data[0] & 15,
            "damiao",
            data[0] >> 4,
            _down(data[1] << 8 | data[2], POSITION, 16),
            _down(data[3] << 4 | data[4] >> 4, DAMIAO_VELOCITY, 12),
            _down((data[4] & 15) << 8 | data[5], DAMIAO_TORQUE, 12),
        )
    if not 1 <= can_id <= 7:
        return None
    if data[0] >> 5 == 1 and len(data) >= 6:
        return Reply(
            can_id,
            "ec",
            data[0] & 31,
            _down(data[1] << 8 | data[2], POSITION, 16),
            _down(data[3] << 4 | data[4] >> 4, EC_VELOCITY, 12),
            _down((data[4] & 15) << 8 | data[5], EC_CURRENT, 12),
        )
    if data[0] >> 5 == 5 and len(data) >= 6 and data[1] == 1:
        return Reply(can_id, "ec", data[0] & 31, struct.unpack(">f", data[2:6])[0] / 57.29577951308232, 0.0, 0.0)
    return None


class Bus:
    """One raw socket of ours on a CAN interface; it never blocks, and its own frames reach the bus only."""

    def __init__(self, interface: str) -> None:
        self.interface = interface
        try:
            self.socket = socket.socket(socket.AF_CAN, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.CAN_RAW)
        except OSError as error:
            raise DeviceNotFoundError(
                f"{interface}: this kernel has no SocketCAN ({error.strerror}); load can_raw, or without hardware start"
                " `python -m chatvla_edge.drivers.standins.can run -- COMMAND`"
            ) from error
        try:
            self.socket.bind((interface,))
            self.socket.setblocking(False)
            # What we send must not come back to the vendor's socket in this process: it takes requests for answers.
            self.socket.setsockopt(SOL_CAN_RAW, CAN_RAW_LOOPBACK, struct.pack("=i", 0))
        except OSError as error:
            self.socket.close()
            raise DeviceNotFoundError(
                f"{interface}: found no such CAN interface ({error.strerror}); expected one that is up:"
                f" ip link set {interface} up type can bitrate 1000000"
            ) from error

    def send(self, can_id: int, data: bytes) -> None:
        """One frame. Raises DeviceLostError where the interface is down or its queue is full."""
        try:
            self.socket.send(FRAME.pack(can_id, len(data), data))
        except OSError as error:
            raise DeviceLostError(f"{self.interface}: cannot send: {error.strerror}") from error

    def frames(self) -> Iterator[tuple[int, bytes]]:
        """Every frame that has arrived, (id, data). Raises DeviceLostError where the interface has gone."""
        receive = self.socket.recv
        while True:
            try:
                frame = receive(16)
            except BlockingIOError:
                return
            except OSError as error:
                raise DeviceLostError(f"{self.interface}: cannot receive: {error.strerror}") from error
            if len(frame) < 16:
                raise DeviceLostError(f"{self.interface}: the bus has gone")
            can_id, length, data = FRAME.unpack(frame)
            yield can_id, data[:length]

    def close(self) -> None:
        """Leave the bus."""
        self.socket.close()


@dataclass(frozen=True)
class Found:
    """The motors that answered: their families, positions (rad, of the motor's shaft), and which hold the arm now.

    An EC-A4310 has no disabled state to tell of.
    """

    families: dict[int, Family]
    positions: dict[int, float]
    enabled: tuple[int, ...]


def probe(bus: Bus, motors: Sequence[int], patience: float = 0.05) -> Found:
    """Who is on the bus, without enabling anybody.

    Each motor is sent the Damiao frame that clears errors, with which `arx5-interface` begins too; an EC-A4310 takes it
    for a query that it does not know. Those that stay silent, which are then no Damiao, are asked for their position in
    the EC-A4310's way. ``patience``: s per step. At most three steps.
    """
    for _ in bus.frames():
        pass
    found: dict[int, Reply] = {}
    for ask in (CLEAR, CLEAR, QUERY_POSITION):
        missing = [motor for motor in motors if motor not in found]
        for motor in missing:
            bus.send(motor, ask)
            time.sleep(0.0003)
        end = time.monotonic() + patience
        while missing and time.monotonic() < end:
            for can_id, data in bus.frames():
                reply = reply_of(can_id, data)
                if reply is not None and reply.motor in missing:
                    found[reply.motor] = reply
                    missing.remove(reply.motor)
            time.sleep(0.001)
    return Found(
        {motor: reply.family for motor, reply in found.items()},
        {motor: reply.position for motor, reply in found.items()},
        tuple(m for m, reply in found.items() if reply.family == "damiao" and reply.status == DAMIAO_ENABLED),
    )


def talk(bus: Bus, seconds: float = 0.03) -> list[int]:
    """Ids of the frames that others send meanwhile; empty where nobody does."""
    for _ in bus.frames():
        pass
    time.sleep(seconds)
    return sorted({can_id for can_id, _ in bus.frames()})
