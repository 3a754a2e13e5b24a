"""A Robotiq 2F-85 on a serial line: pymodbus' own server behind a pseudo-terminal, with fingers that move.

    python -m chatvla_edge.drivers.standins.robotiq --port /tmp/gripper --control /tmp/gripper.control

Bytes pass through here at the line's own 115200 baud. The fingers stop at 3 (open) and 230 (closed) of 255 counts, and
at an object that lies between them.

Faults (told on the control socket; each answers with the gripper's state):

    corrupt: n          the next n answers carry a wrong checksum (below 0: all)
    lose: n             the next n answers do not arrive
    silent: bool        nothing answers
    unplug: bool        the port disappears; false puts it back
    deactivate: true    as after a loss of power
    fault: n            what the fault register says
    object: count       an object that stops closing fingers there; null takes it away
    place: count        the fingers are put there
    frozen: bool        the fingers do not move
"""

import asyncio
import contextlib
import os
import select
import sys
import threading
import time
import tty
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chatvla_edge.drivers.standins import control
from chatvla_edge.drivers.standins.control import StandIn

UNIT = 9
OUTPUTS, INPUTS = 0x03E8, 0x07D0
FULL_SPEED = 430.0  # counts per s: 0.15 m/s
ACTIVATION = 0.3  # s; a real one closes and opens once, some 2 s
OPEN, CLOSED = 3.0, 230.0
SECONDS_PER_BYTE = 10 / 115200


class RobotiqStandIn(StandIn):
    """The stand-in's process; ``port`` is where its serial line appears."""

    def __init__(self, port: Path, **options: Any) -> None:
        self.port = port
        super().__init__(__name__, ["--port", str(port)], port.with_name(f"{port.name}.control"), **options)


class Fingers:
    """The registers' meaning, and what moves."""

    def __init__(self) -> None:
        self.position = 100.0
        self.requested = 0
        self.speed, self.force = 0, 0
        self.activated_at: float | None = None
        self.going = False
        self.fault = 0
        self.met = 0  # gOBJ: 0 moving, 1 and 2 stopped by an object while opening, closing, 3 arrived
        self.object: float | None = None
        self.frozen = False
        self.then = time.monotonic()
        self.transactions = 0
        self.writes = 0
        self.trace: list[tuple[int, int]] | None = None

    @property
    def active(self) -> bool:
        """Whether the activation has ended."""
        return self.activated_at is not None and time.monotonic() >= self.activated_at + ACTIVATION

    def write(self, values: Sequence[int]) -> None:
        """Three registers of action, position, speed and force."""
        self.move()
        self.writes += 1
        action, self.requested = values[0] >> 8, values[1] & 255
        self.speed, self.force = values[2] >> 8, values[2] & 255
        if not action & 1:
            self.activated_at, self.fault = None, 0
        elif self.activated_at is None:
            self.activated_at = time.monotonic()
        self.going = bool(action & 8)
        if self.trace is not None and self.going:
            self.trace.append((time.monotonic_ns(), self.requested))

    def move(self) -> None:
        """Move on to now."""
        now = time.monotonic()
        step, self.then = now - self.then, now
        if not (self.active and self.going) or self.frozen or self.fault >= 8:
            return
        goal = min(max(float(self.requested), OPEN), CLOSED)
        reach = step * FULL_SPEED * (0.13 + 0.87 * self.speed / 255)
        to = self.position + min(max(goal - self.position, -reach), reach)
        if self.object is not None and self.position <= self.object < to:
            to, self.met = self.object, 2
        else:
            self.met = 3 if to == goal else 0
        self.position = to

    def registers(self) -> list[int]:
        """Status, fault, echo of the request, position and current."""
        self.move()
        started = self.activated_at is not None
        status = started | self.going << 3 | (3 if self.active else 1 if started else 0) << 4 | self.met << 6
        current = 30 if self.met == 2 else 8 if self.met == 0 and self.going else 0
        return [status << 8, self.fault << 8 | self.requested, round(self.position) << 8 | current]


class Line:
    """Two pseudo-terminals and the thread that carries bytes between them, or does not."""

    def __init__(self, port: Path) -> None:
        self.port = port
        self.corrupt = self.lose = 0
        self.silent = False
        self.server, self.server_side = os.openpty()
        tty.setraw(self.server_side)
        self.client, self.client_side = -1, -1
        self.lock = threading.Lock()
        self.plug()
        threading.Thread(target=self._carry, daemon=True).start()

    @property
    def server_name(self) -> str:
        """Where the server opens its end."""
        return os.ttyname(self.server_side)

    def plug(self) -> None:
        """The port appears."""
        with self.lock:
            if self.client >= 0:
                return
            self.client, self.client_side = os.openpty()
            tty.setraw(self.client_side)
            self.port.unlink(missing_ok=True)
            self.port.symlink_to(os.ttyname(self.client_side))

    def unplug(self) -> None:
        """The port disappears, and whoever has it open reads an error."""
        with self.lock:
            if self.client < 0:
                return
            self.port.unlink(missing_ok=True)
            os.close(self.client)
            os.close(self.client_side)
            self.client = self.client_side = -1

    def _carry(self) -> None:
        while True:
            client = self.client
            readable, _, _ = select.select([self.server, *([client] if client >= 0 else [])], [], [], 0.02)
            with self.lock:
                for source in readable:
                    with contextlib.suppress(OSError):
                        if source == self.server:
                            self._answer(os.read(source, 256))
                        elif source == self.client:
                            asked = os.read(source, 256)
                            time.sleep(len(asked) * SECONDS_PER_BYTE)
                            os.write(self.server, asked)

    def _answer(self, said: bytes) -> None:
        time.sleep(len(said) * SECONDS_PER_BYTE)
        if self.silent or self.client < 0:
            return
        if self.lose:
            self.lose -= self.lose > 0
            return
        if self.corrupt:
            self.corrupt -= self.corrupt > 0
            said = said[:-1] + bytes([said[-1] ^ 0x5A])
        os.write(self.client, said)


def _answer(fingers: Fingers, line: Line, message: dict[str, Any]) -> dict[str, Any]:
    known = {
        "corrupt", "lose", "silent", "unplug", "deactivate", "fault", "object", "place", "frozen", "trace",
    }  # fmt: skip
    if unknown := sorted(set(message) - known):
        raise ValueError(f"found {unknown}, expected some of {sorted(known)}")
    fingers.move()
    line.corrupt = message.get("corrupt", line.corrupt)
    line.lose = message.get("lose", line.lose)
    line.silent = message.get("silent", line.silent)
    if "unplug" in message:
        (line.unplug if message["unplug"] else line.plug)()
    if message.get("deactivate"):
        fingers.activated_at, fingers.going = None, False
    fingers.fault = message.get("fault", fingers.fault)
    fingers.object = message.get("object", fingers.object)
    fingers.position = float(message.get("place", fingers.position))
    fingers.frozen = message.get("frozen", fingers.frozen)
    traced = fingers.trace or []
    if "trace" in message:
        fingers.trace = [] if message["trace"] else None
    return {
        "position": fingers.position,
        "requested": fingers.requested,
        "active": fingers.active,
        "going": fingers.going,
        "met": fingers.met,
        "transactions": fingers.transactions,
        "writes": fingers.writes,
        "traced": traced,
    }


async def _serve(fingers: Fingers, line: Line, options: Any) -> None:
    # With the module, a robot without this gripper would need pymodbus to list its drivers.
    from pymodbus.server import ModbusSerialServer
    from pymodbus.simulator import DataType, SimData, SimDevice

    async def act(code: int, start: int, address: int, count: int, registers: list[int], values: Any) -> None:
        if values is not None:
            if address == OUTPUTS and count == 3:
                fingers.write(values)
            fingers.transactions += code != 23  # whose answer is read in a second call
            return
        fingers.transactions += 1
        registers[INPUTS - start : INPUTS - start + 3] = fingers.registers()

    block = [SimData(address, count=16, values=0, datatype=DataType.REGISTERS) for address in (OUTPUTS, INPUTS)]
    device = SimDevice(id=UNIT, simdata=block, action=act)
    server = ModbusSerialServer(device, port=line.server_name, baudrate=115200, ignore_missing_devices=True)
    serving = asyncio.ensure_future(server.serve_forever())
    await asyncio.sleep(0.1)
    control.begin(options, lambda message: _answer(fingers, line, message))
    await serving


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until killed."""
    parser = control.arguments("A Robotiq 2F-85 on a pseudo-terminal.")
    parser.add_argument("--port", type=Path, required=True, help="where its serial line appears")
    options = parser.parse_args(arguments)
    asyncio.run(_serve(Fingers(), Line(options.port), options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
