"""A world that several devices share: one process steps it in real time, device processes look at it and push it.

    world = Link(spec, "arm", "left")      # starts the world's process, or finds the one that runs
    world.send(target); world.now()        # never waits for anybody

The world's process owns one piece of memory: what the world is now (all axes, and all that a camera must know to draw
it), and one place per arm for its target. Each place carries its check sum and is written in one piece, so a reader
sees a whole record or reads again; nobody can make anybody wait, and anybody may be killed at any instant. Cameras draw
for themselves, in their own process: a slow picture delays no step.

Devices find the world at an abstract Unix socket that bears the name of the user and of the world, and get the memory
through it. The connection is held open: when it breaks for a device, the world has ended; when it breaks for the world,
the device has, and its arm holds its last target. A world that has had no device for a while ends.
"""

import contextlib
import json
import mmap
import os
import select
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol
from zlib import crc32

import numpy as np
import numpy.typing as npt
from pydantic import Field

from chatvla_edge.drivers.errors import DeviceLostError, DeviceUnsuitableError, MissingLibraryError
from chatvla_edge.drivers.protocols import Options

Array = npt.NDArray[np.float64]

# Seconds without any device until a world ends: longer than a device process takes to be started again.
LINGER = float(os.environ.get("CHATVLA_EDGE_WORLD_LINGER", "5"))
START_WITHIN = 20.0  # s, until a new world answers: MuJoCo takes a second to import on a busy machine
MESSAGE_BYTES = 1 << 16
BEHIND_NS = 100_000_000  # a world that is later than this lets the time go
HEAD = struct.Struct("=IxxxxQQ")  # check sum, sequence, host time in ns
TRIES = 1000  # to read a record that is being written; a write takes microseconds


class World(Protocol):
    """What is stepped. The rest of this module knows neither tables nor physics."""

    dt: float  # s per step

    @property
    def arms(self) -> dict[str, tuple[int, int]]:
        """Name of each arm -> first and last + 1 of its axes."""

    def step(self, targets: Array) -> None:
        """Let `dt` pass while the arms head for ``targets`` [axes of all arms]."""

    def position(self) -> Array:
        """`[axes of all arms]`."""

    def scene(self) -> Array:
        """All that a camera has to know, always as many numbers."""

    def tell(self, message: dict[str, Any]) -> dict[str, Any]:
        """A word from outside, such as a new scene; the answer. Raises ValueError."""


class WorldSpec(Options):
    """Which world: ``kind`` is ``module:class``, called with ``arguments``; ``name``: where to find it."""

    kind: str
    name: str
    arguments: dict[str, Any] = Field(default={})


@dataclass(frozen=True)
class Now:
    """The world at one instant, host time. ``sequence`` counts its steps."""

    sequence: int
    time_ns: int
    position: Array
    velocity: Array
    target: Array
    scene: Array


class Record:
    """One place of the memory: ``size`` float64 with number, time and check sum."""

    def __init__(self, memory: mmap.mmap, offset: int, size: int) -> None:
        self._memory, self._offset = memory, offset
        self._end = offset + HEAD.size + 8 * size

    @staticmethod
    def length(size: int) -> int:
        """Bytes, whole cache lines."""
        return -(-(HEAD.size + 8 * size) // 64) * 64

    def write(self, sequence: int, time_ns: int, values: Array) -> None:
        """In one piece."""
        body = HEAD.pack(0, sequence, time_ns)[8:] + values.tobytes()
        self._memory[self._offset : self._end] = HEAD.pack(crc32(body), 0, 0)[:8] + body

    def read(self) -> tuple[int, int, Array] | None:
        """(sequence, time in ns, values); None where nothing whole was ever written."""
        for _ in range(TRIES):
            raw = self._memory[self._offset : self._end]
            check, sequence, time_ns = HEAD.unpack_from(raw)
            if check == crc32(raw[8:]):
                return sequence, time_ns, np.frombuffer(raw, np.float64, offset=HEAD.size)
        return None


def _layout(arms: dict[str, tuple[int, int]], axes: int, scene: int) -> tuple[dict[str, int], int]:
    """Offset of each record, and the bytes of all."""
    offsets, at = {"": 0}, Record.length(3 * axes + scene)
    for name, (first, last) in arms.items():
        offsets[name] = at
        at += Record.length(last - first)
    return offsets, at


def _address(name: str) -> str:
    return f"\0chatvla-edge/world/{os.getuid()}/{name}"


# ---------------------------------------------------------------------------------------------------------- the devices


class Link:
    """A device's connection to its world. Raises DeviceUnsuitableError, DeviceLostError, MissingLibraryError."""

    def __init__(self, spec: WorldSpec, role: str, name: str) -> None:
        self._socket = _connect(spec, role, name)
        answer, memory = self._hear(fds=True)
        self._memory = mmap.mmap(memory, 0)
        os.close(memory)
        self._axes, self._scene = answer["axes"], answer["scene"]
        self.arms: dict[str, tuple[int, int]] = {arm: (first, last) for arm, (first, last) in answer["arms"].items()}
        offsets, _ = _layout(self.arms, self._axes, self._scene)
        self._now = Record(self._memory, 0, 3 * self._axes + self._scene)
        self._target = None
        if role == "arm":
            first, last = self.arms[name]
            self._target = Record(self._memory, offsets[name], last - first)
        self._sent = answer["sent"]

    def now(self) -> Now:
        """The world as it is. Raises DeviceLostError where it has ended."""
        self._check()
        record = self._now.read()
        if record is None:
            raise DeviceLostError("the world ended while it was writing (simulated)")
        sequence, time_ns, values = record
        position, velocity, target = values[: 3 * self._axes].reshape(3, self._axes)
        return Now(sequence, time_ns, position, velocity, target, values[3 * self._axes :])

    def send(self, target: Array) -> None:
        """The arm's target, from the world's next step on. Raises DeviceLostError."""
        self._check()
        assert self._target is not None
        self._sent += 1
        self._target.write(self._sent, time.monotonic_ns(), target)

    def tell(self, **message: Any) -> dict[str, Any]:
        """A word to the world, and its answer. Raises ValueError where it refuses, DeviceLostError."""
        try:
            self._socket.send(json.dumps({"tell": message}).encode())
        except OSError as error:
            raise DeviceLostError(f"the world has ended (simulated): {error}") from error
        answer = self._hear()[0]
        return dict(answer["told"])

    def close(self) -> None:
        """Leave. May be called twice."""
        self._socket.close()
        self._memory.close()

    def _check(self) -> None:
        try:
            gone = self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return
        except OSError:
            gone = True
        if gone:
            raise DeviceLostError("the world has ended (simulated). Close the device and open it again.")

    def _hear(self, fds: bool = False) -> tuple[dict[str, Any], int]:
        self._socket.settimeout(START_WITHIN)
        try:
            message, handed, _, _ = socket.recv_fds(self._socket, MESSAGE_BYTES, 1 if fds else 0)
        except OSError as error:
            raise DeviceLostError(f"the world does not answer (simulated): {error}") from error
        self._socket.settimeout(None)  # or `_check` would wait, whatever its flags say
        if not message:
            raise DeviceLostError("the world has ended (simulated)")
        answer: dict[str, Any] = json.loads(message)
        if "refused" in answer:
            kind = ValueError if answer.get("told") else DeviceUnsuitableError
            raise kind(answer["refused"])
        return answer, handed[0] if handed else -1


def _connect(spec: WorldSpec, role: str, name: str) -> socket.socket:
    hello = json.dumps({"spec": spec.model_dump(mode="json"), "role": role, "name": name}).encode()
    end = time.monotonic() + START_WITHIN
    while True:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            link.connect(_address(spec.name))
            link.send(hello)
        except OSError as error:  # none there, or one that is just ending
            link.close()
            if time.monotonic() > end:
                raise DeviceLostError(f"the world {spec.name!r} does not answer: {error}") from error
        else:
            return link
        _start(spec)


def _start(spec: WorldSpec) -> None:
    """Start a world, as nobody's child. Where another one is quicker, this one leaves it alone."""
    started = subprocess.run(  # noqa: S603  # our own interpreter, our own module
        [sys.executable, "-m", __name__],
        input=spec.model_dump_json().encode(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        timeout=START_WITHIN,
        check=False,
    )
    if started.returncode:
        said = started.stderr.decode(errors="replace").strip().splitlines()
        message = said[-1] if said else f"exit code {started.returncode}"
        kind = MissingLibraryError if started.returncode == NO_LIBRARY else DeviceUnsuitableError
        raise kind(f"the world {spec.name!r} could not be started: {message}")


# -------------------------------------------------------------------------------------------------- the world's process

NO_LIBRARY = 3


class _Server:
    """Steps the world and speaks to its devices, on one thread."""

    def __init__(self, spec: WorldSpec, listener: socket.socket) -> None:
        self._spec = spec
        module, _, name = spec.kind.partition(":")
        self._world: World = getattr(import_module(module), name)(**spec.arguments)
        position, scene = self._world.position(), self._world.scene()
        self._axes, self._scene = len(position), len(scene)
        offsets, size = _layout(self._world.arms, self._axes, self._scene)
        self._memory_fd = os.memfd_create("chatvla-edge-world", os.MFD_CLOEXEC)
        os.ftruncate(self._memory_fd, size)
        memory = mmap.mmap(self._memory_fd, size)
        self._now = Record(memory, 0, 3 * self._axes + self._scene)
        self._targets = {
            name: Record(memory, offsets[name], last - first) for name, (first, last) in self._world.arms.items()
        }
        self._heard = dict.fromkeys(self._targets, 0)
        for name, (first, last) in self._world.arms.items():
            self._targets[name].write(0, 0, position[first:last])
        self._target = position.copy()
        self._position = position.copy()
        self._sequence = 0
        self._listener = listener
        self._clients: dict[socket.socket, dict[str, Any] | None] = {}
        self._publish(time.monotonic_ns(), np.zeros(self._axes))

    def run(self) -> None:
        """Until no device has been there for a while."""
        period = round(1e9 * self._world.dt)
        due = time.monotonic_ns()
        alone = due
        while True:
            now = time.monotonic_ns()
            if any(hello is not None for hello in self._clients.values()):
                alone = now
            elif now - alone > round(1e9 * LINGER):
                return
            if now - due > BEHIND_NS:
                due = now  # rather slow than fast afterwards
            if now < due:
                self._serve(1e-9 * (due - now))
                continue
            self._step(due)
            due += period

    def _step(self, due: int) -> None:
        for name, record in self._targets.items():
            heard = record.read()
            if heard is not None and heard[0] != self._heard[name]:
                first, last = self._world.arms[name]
                self._heard[name] = heard[0]
                if np.isfinite(heard[2]).all():
                    self._target[first:last] = heard[2]
        self._world.step(self._target)
        position = self._world.position()
        velocity = (position - self._position) / self._world.dt
        self._position = position.copy()
        self._sequence += 1
        self._publish(due, velocity)

    def _publish(self, time_ns: int, velocity: Array) -> None:
        values = np.concatenate([self._position, velocity, self._target, self._world.scene()])
        self._now.write(self._sequence, time_ns, values)

    def _serve(self, seconds: float) -> None:
        """Answer whoever speaks within ``seconds``."""
        ready, _, _ = select.select([self._listener, *self._clients], [], [], seconds)
        for one in ready:
            if one is self._listener:
                client, _ = self._listener.accept()
                client.settimeout(0.1)  # who does not take its answer is left
                self._clients[client] = None
                continue
            try:
                message = one.recv(MESSAGE_BYTES)
                if not message:
                    raise ConnectionResetError
                self._answer(one, json.loads(message))
            except (OSError, ValueError, KeyError, TypeError):
                self._leave(one)

    def _answer(self, client: socket.socket, message: dict[str, Any]) -> None:
        if self._clients[client] is None:
            self._greet(client, message)
            return
        try:
            answer: dict[str, Any] = {"told": {**self._world.tell(message["tell"]), "pid": os.getpid()}}
        except ValueError as error:
            answer = {"refused": str(error), "told": True}
        if "refused" not in answer and message["tell"].get("reset") is not None:
            # What was commanded before the reset is no reason to move after it.
            self._position = self._world.position().copy()
            self._target = self._position.copy()
        client.send(json.dumps(answer).encode())

    def _greet(self, client: socket.socket, hello: dict[str, Any]) -> None:
        refused = ""
        taken = {(one["role"], one["name"]) for one in self._clients.values() if one is not None}
        if hello["spec"] != self._spec.model_dump(mode="json"):
            refused = (
                f"the world {self._spec.name!r} runs already, with other options: found {json.dumps(hello['spec'])}, "
                f"expected {self._spec.model_dump_json()}. Use the same in all devices, or another name."
            )
        elif hello["role"] == "arm" and hello["name"] not in self._targets:
            refused = f"found the arm {hello['name']!r}, expected one of: {', '.join(self._targets)}"
        elif hello["role"] == "arm" and ("arm", hello["name"]) in taken:
            refused = f"the arm {hello['name']!r} of the world {self._spec.name!r} is driven by another process"
        if refused:
            client.send(json.dumps({"refused": refused}).encode())
            self._leave(client)
            return
        self._clients[client] = hello
        facts = {"axes": self._axes, "scene": self._scene, "arms": self._world.arms}
        sent = self._heard.get(hello["name"], 0) if hello["role"] == "arm" else 0
        socket.send_fds(client, [json.dumps({**facts, "sent": sent}).encode()], [self._memory_fd])

    def _leave(self, client: socket.socket) -> None:
        del self._clients[client]
        client.close()


def main() -> None:
    """``python -m chatvla_edge.drivers.sim.world`` with a WorldSpec as JSON on standard input; returns once it runs."""
    os.environ["MUJOCO_GL"] = "disable"  # nothing is drawn here, so no renderer has to be there
    spec = WorldSpec.model_validate_json(sys.stdin.read())
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(_address(spec.name))
    except OSError:
        return  # another one was quicker
    try:
        server = _Server(spec, listener)
    except ModuleNotFoundError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(NO_LIBRARY)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{' '.join(str(error).split())}\n")
        sys.exit(1)
    listener.listen(16)
    if os.fork():
        os._exit(0)  # whoever started us need not wait for us, nor we end with it
    for stream in (0, 2):
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    # It stands for hardware, which waits for no scheduler: refused without the right to it, and then it may be late.
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(70))
    server.run()


if __name__ == "__main__":
    main()
