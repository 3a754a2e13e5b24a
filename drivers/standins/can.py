"""A CAN bus with the motors of an ARX arm, for the vendor's own library.

    python -m chatvla_edge.drivers.standins.can run --arm can0:L5 --arm can1:L5 -- COMMAND
    python -m chatvla_edge.drivers.standins.can tell can0 '{"silent": [4]}'

`run` starts one bus for each `--arm interface:model`, runs the command with a shim that gives it these interfaces, and
ends the buses with it. Where the kernel has the interface itself (`ip link add dev vcan0 type vcan`), `serve --kernel`
puts the same motors on it without a shim; that has not been run: the kernels at hand had no CAN.

Faults (`tell`; each stays until it is told otherwise, answers with the motors' state):

    dead: bool          the bus carries nothing to the motors and back
    silent: [motor]     these motors no longer answer
    stall: seconds      everything waits, then comes at once
    foreign: id         one frame of a node that is not ours
    error: {motor: n}   a motor reports it (Damiao: status 8-14) and lets go
    disabled: [motor]   as after a loss of power: back, but not enabled
    stuck: [motor]      it answers, and does not move
    load: {motor: Nm}   a torque from outside
    place: {motor: rad} put there by hand
    refuse: [errno, n]  the interface refuses the next n frames (below 0: all): 105 queue full, 100 interface down
    trace: bool         keep when the commands of motor 1 arrived; `traced` in the answer, monotonic ns and rad
"""

import contextlib
import json
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from chatvla_edge.drivers.arms.can_motors import (
    CAN_RAW_FILTER,
    CAN_RAW_LOOPBACK,
    FRAME,
    STANDARD_ID,
    Bus,
    damiao_target,
    ec_target,
)
from chatvla_edge.drivers.standins import control
from chatvla_edge.drivers.standins.control import StandIn
from chatvla_edge.drivers.standins.motors import MOTORS, Motor

FOLDER = "CHATVLA_EDGE_CAN"
SOURCE = Path(__file__).with_name("can_shim.c")
PAGE = struct.Struct("=ii")


def shim(folder: Path | None = None) -> Path:
    """The shim's library, compiled with `cc` at its first use. Raises RuntimeError where that fails."""
    source = SOURCE.read_bytes()
    folder = folder or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "chatvla-edge"
    library = folder / f"can-shim-{sha256(source).hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        compiler = shutil.which("cc")
        if compiler is None:
            raise RuntimeError(
                "found no C compiler `cc`, which the CAN stand-in's shim needs: apt-get install gcc libc6-dev"
            )
        fresh = library.with_name(f"{library.name}.{os.getpid()}")
        built = subprocess.run(  # noqa: S603  # our own source
            [compiler, "-shared", "-fPIC", "-O2", "-o", str(fresh), str(SOURCE), "-ldl"], capture_output=True, text=True
        )
        if built.returncode:
            raise RuntimeError(f"cc could not compile {SOURCE}: {built.stderr}")
        fresh.replace(library)
    return library


def environment(folder: Path) -> dict[str, str]:
    """What a process needs to see the buses whose sockets lie in ``folder``."""
    before = os.environ.get("LD_PRELOAD", "")
    ours = str(shim())
    return {FOLDER: str(folder), "LD_PRELOAD": before if ours in before else f"{ours} {before}".strip()}


class CanBus(StandIn):
    """One bus in a process of its own. ``folder``: where its sockets lie; `environment(folder)` leads others there."""

    def __init__(self, folder: Path, interface: str = "can0", model: str = "L5", **options: Any) -> None:
        self.interface = interface
        super().__init__(
            __name__,
            ["serve", "--folder", str(folder), "--interface", interface, "--model", model],
            folder / f"{interface}.control",
            **options,
        )


# ------------------------------------------------------------------------------------------------------- in its process


class Motors:
    """The motors of one bus, and everything that is wrong with them."""

    def __init__(self, model: str) -> None:
        now = time.monotonic()
        self.motors = {number: Motor(number, family, now) for number, family in MOTORS[model].items()}
        self.dead = False
        self.stalled_until = 0.0
        self.foreign: deque[int] = deque()
        self.trace: deque[tuple[int, float]] | None = None
        self.frames = 0
        self.page: Path | None = None

    def hear(self, can_id: int, data: bytes) -> tuple[int, bytes] | None:
        """A frame on the bus; the answer of whom it is for."""
        self.frames += 1
        motor = self.motors.get(can_id)
        if motor is None or self.dead:
            return None
        now = time.monotonic_ns()
        if self.trace is not None and can_id == 1 and len(data) == 8:
            told = damiao_target(data) if motor.family == "damiao" else ec_target(data)
            self.trace.append((now, told.position))
        return motor.hear(data, now * 1e-9)

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """Faults as the module's docstring lists them."""
        known = {"dead", "silent", "stall", "foreign", "error", "disabled", "stuck", "load", "place", "refuse", "trace"}
        if unknown := sorted(set(message) - known):
            raise ValueError(f"found {unknown}, expected some of {sorted(known)}")
        self.dead = message.get("dead", self.dead)
        for what in ("silent", "stuck"):
            if what in message:
                for number, motor in self.motors.items():
                    setattr(motor, what, number in message[what])
        for number in message.get("disabled", ()):
            self.motors[number].enabled = False
        for number, value in message.get("error", {}).items():
            self.motors[int(number)].error = value
        for number, value in message.get("load", {}).items():
            self.motors[int(number)].load = value
        for number, value in message.get("place", {}).items():
            self.motors[int(number)].position = value
            self.motors[int(number)].velocity = 0.0
        if "stall" in message:
            self.stalled_until = time.monotonic() + message["stall"]
        if "foreign" in message:
            self.foreign.append(message["foreign"])
        if "refuse" in message:
            if self.page is None:
                raise ValueError("refuse: an interface of the kernel refuses by itself, not by us")
            self.page.write_bytes(PAGE.pack(*message["refuse"]))
        traced = list(self.trace or ())
        if "trace" in message:
            self.trace = deque(maxlen=20_000) if message["trace"] else None
        now = time.monotonic()
        for motor in self.motors.values():
            motor.advance(now)
        return {
            "frames": self.frames,
            "position": {number: motor.position for number, motor in self.motors.items()},
            "enabled": {number: motor.enabled for number, motor in self.motors.items()},
            "kp": {number: motor.target.kp for number, motor in self.motors.items()},
            "target": {number: motor.target.position for number, motor in self.motors.items()},
            "traced": traced,
        }


class Client:
    """A socket on the hub."""

    def __init__(self, wire: socket.socket) -> None:
        self.wire = wire
        self.filters: list[tuple[int, int]] = [(0, 0)]
        self.loopback = True

    def option(self, message: bytes) -> None:
        """What the shim passed on of setsockopt."""
        (name,) = struct.unpack_from("=i", message)
        if name == CAN_RAW_LOOPBACK:
            self.loopback = bool(message[4])
        elif name == CAN_RAW_FILTER:
            whole = (len(message) - 4) // 8
            self.filters = [struct.unpack_from("=II", message, 4 + 8 * i) for i in range(whole)]

    def give(self, can_id: int, frame: bytes) -> None:
        """Hand it a frame that its filters let pass; one that it has no room for is lost, as on a real socket."""
        if any(can_id & mask == wanted & mask for wanted, mask in self.filters):
            with contextlib.suppress(OSError):
                self.wire.send(frame, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def hub(folder: Path, interface: str, motors: Motors) -> Iterator[None]:
    """A bus that is a Unix socket; yields once when it is open and then carries frames for ever."""
    path = folder / interface
    path.unlink(missing_ok=True)
    motors.page = folder / f"{interface}.page"
    motors.page.write_bytes(PAGE.pack(0, 0))
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.bind(str(path))
    server.listen(16)
    server.setblocking(False)
    clients: dict[int, Client] = {}
    poll = select.epoll()
    poll.register(server, select.EPOLLIN)
    yield

    def carry(can_id: int, frame: bytes, sender: Client | None) -> None:
        for other in clients.values():
            if other is not sender:
                other.give(can_id, frame)

    while True:
        # Woken now and then, to send what the control thread has put down.
        for number, _ in poll.poll(0.02):
            while (left := motors.stalled_until - time.monotonic()) > 0:
                time.sleep(left)
            if number == server.fileno():
                wire, _ = server.accept()
                wire.setblocking(False)
                clients[wire.fileno()] = Client(wire)
                poll.register(wire, select.EPOLLIN)
                continue
            client = clients[number]
            try:
                message = client.wire.recv(600)
            except OSError:
                message = b""
            if not message:
                poll.unregister(number)
                client.wire.close()
                del clients[number]
            elif len(message) != FRAME.size:
                client.option(message)
            else:
                can_id, length, data = FRAME.unpack(message)
                if client.loopback:
                    carry(can_id, message, client)
                said = motors.hear(can_id & STANDARD_ID, data[:length])
                if said is not None:
                    carry(said[0], FRAME.pack(said[0], len(said[1]), said[1]), None)
        while motors.foreign:
            strange = motors.foreign.popleft()
            carry(strange, FRAME.pack(strange, 8, bytes(8)), None)


def kernel(interface: str, motors: Motors) -> Iterator[None]:
    """The same on a CAN interface of the kernel. Not run."""
    bus = Bus(interface)
    bus.socket.setblocking(True)
    bus.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("=qq", 0, 20_000))
    bus.socket.setsockopt(101, CAN_RAW_LOOPBACK, struct.pack("=i", 1))  # the others on this machine are to hear it
    yield
    while True:
        for can_id, data in bus.frames():
            while (left := motors.stalled_until - time.monotonic()) > 0:
                time.sleep(left)
            said = motors.hear(can_id & STANDARD_ID, data)
            if said is not None:
                bus.send(*said)
        while motors.foreign:
            bus.send(motors.foreign.popleft(), bytes(8))


def _serve(arguments: Sequence[str]) -> int:
    parser = control.arguments("A CAN bus with the motors of an ARX arm.")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--interface", default="can0")
    parser.add_argument("--model", choices=sorted(MOTORS), default="L5")
    parser.add_argument("--kernel", action="store_true", help="on the kernel's interface of that name, without a shim")
    options = parser.parse_args(arguments)
    motors = Motors(options.model)
    carrying = kernel(options.interface, motors) if options.kernel else hub(options.folder, options.interface, motors)
    next(carrying)
    control.begin(options, motors.answer)
    next(carrying)
    return 0


def _run(arguments: Sequence[str]) -> int:
    parser = ArgumentParser(description="Run a command that finds CAN buses with ARX arms.")
    parser.add_argument("--arm", action="append", metavar="INTERFACE:MODEL", help="default: can0:L5 and can1:L5")
    parser.add_argument("--folder", type=Path, help="where the sockets lie; default: a new one")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="can-")))
        for arm in options.arm or ("can0:L5", "can1:L5"):
            interface, _, model = arm.partition(":")
            stack.enter_context(CanBus(folder, interface, model or "L5"))
        surroundings: Mapping[str, str] = os.environ | environment(folder)
        try:
            return subprocess.run(options.command, env=surroundings, check=False).returncode  # noqa: S603  # asked for
        except KeyboardInterrupt:
            return 130


def _tell(arguments: Sequence[str]) -> int:
    parser = ArgumentParser(description="Tell a bus what to get wrong.")
    parser.add_argument("interface")
    parser.add_argument("message", help="JSON, for example '{\"silent\": [4]}'")
    parser.add_argument("--folder", type=Path, default=os.environ.get(FOLDER), help=f"default: ${FOLDER}")
    options = parser.parse_args(arguments)
    if options.folder is None:
        parser.error(f"expected --folder, or {FOLDER} as `run` sets it")

    said = control.tell(Path(options.folder) / f"{options.interface}.control", **json.loads(options.message))
    sys.stdout.write(f"{json.dumps(said)}\n")
    return 0


def main() -> int:
    """``serve | run | tell``; `--help` after each says more."""
    known = {"serve": _serve, "run": _run, "tell": _tell}
    if len(sys.argv) < 2 or sys.argv[1] not in known:
        sys.stderr.write(f"{__doc__}\n")
        return 2
    return known[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
