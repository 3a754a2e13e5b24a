"""What a camera's process publishes: its newest frame with a header, and how it does.

    segments = CameraSegments.create("top", height=480, width=640)   # supervisor
    reader = segments.frames()                                       # policy: reader.newer(), reader.status()

Two slots: one holds header and picture, the other the status, which is published with every frame and every wait that
ended without one. Its `published_ns` is the heartbeat of the capture loop itself: no other thread keeps it beating.
"""

import json
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from chatvla_edge.runtime.slots import Slot

# One cache line, so that the picture begins on one.
HEADER = np.dtype(
    [
        ("captured_ns", "<i8"),
        ("received_ns", "<i8"),
        ("sequence", "<i8"),
        ("clock", "<i8"),
        ("unused", "<i8", 4),
    ]
)

Clock = Literal["device", "arrival"]
CLOCKS: tuple[Clock, ...] = ("device", "arrival")

# opening: not yet, or again; streaming; silent: open, and no frame came for a while; lost: closed, waiting to open.
STATES = ("opening", "streaming", "silent", "lost")

FACTS_BYTES = 1536

STATUS = np.dtype(
    [
        ("state", "<i8"),
        ("frames", "<i8"),  # published since the process began
        ("lost", "<i8"),  # by the device's counter
        ("repeated", "<i8"),  # delivered again by the library, not published
        ("identical", "<i8"),  # frames in a row whose pixels all equal those before: 0 for a camera that sees
        ("clock_steps", "<i8"),
        ("opened", "<i8"),  # times the camera was opened
        ("rate", "<f8"),  # frames per second of the last second, 0 before and while silent
        ("facts_bytes", "<i8"),
        ("facts", f"S{FACTS_BYTES}"),
    ]
)


def frame_bytes(height: int, width: int) -> int:
    """Size of a record of the frame slot: header, then `[height, width, 3]` uint8 RGB."""
    return HEADER.itemsize + height * width * 3


@dataclass(frozen=True)
class SlotFrame:
    """A frame as read from the slot. `image` `[H, W, 3]` uint8 RGB is the reader's own and lives until its next read.

    `number` counts publications from 1; `sequence` is the device's. Stamps are host time, ns.
    """

    image: NDArray[np.uint8]
    captured_ns: int
    received_ns: int
    published_ns: int
    sequence: int
    number: int
    clock: Clock


@dataclass(frozen=True)
class CameraStatus:
    """How a camera's process does; the fields of `STATUS`, and the host time of its last heartbeat."""

    state: str
    beat_ns: int
    frames: int
    lost: int
    repeated: int
    identical: int
    clock_steps: int
    opened: int
    rate: float
    facts: dict[str, Any]


@dataclass(frozen=True)
class CameraSegments:
    """The two slots of one camera, made by the supervisor."""

    name: str
    height: int
    width: int
    frame: Slot
    status: Slot

    @classmethod
    def create(cls, name: str, height: int, width: int) -> "CameraSegments":
        """Empty slots."""
        frame = Slot.create(f"camera {name}", frame_bytes(height, width))
        return cls(name, height, width, frame, Slot.create(f"camera {name} status", STATUS.itemsize))

    def frames(self) -> "FrameReader":
        """A reader in this process."""
        return FrameReader(self.frame, self.status, self.height, self.width)


class FrameReader:
    """Reads one camera; for one thread."""

    def __init__(self, frame: Slot, status: Slot, height: int, width: int) -> None:
        self._frame, self._status = frame, status
        self._record = np.zeros(frame_bytes(height, width), np.uint8)
        self._header = self._record[: HEADER.itemsize].view(HEADER)[0]
        self._image = self._record[HEADER.itemsize :].reshape(height, width, 3)
        self._seen = 0

    @classmethod
    def attach(cls, frame_fd: int, status_fd: int, height: int, width: int) -> "FrameReader":
        """A reader in a child process, on inherited descriptors."""
        frame = Slot.attach(frame_fd, frame_bytes(height, width))
        return cls(frame, Slot.attach(status_fd, STATUS.itemsize), height, width)

    def newer(self) -> SlotFrame | None:
        """The newest frame; None where it was read before, or none came yet. Raises SlotBusyError."""
        return None if self._frame.sequence == self._seen else self.newest()

    def newest(self) -> SlotFrame | None:
        """The newest frame, read before or not; None before the first. Raises SlotBusyError."""
        found = self._frame.read_into(self._record)
        if found is None:
            return None
        self._seen = found.sequence
        header = self._header
        return SlotFrame(
            image=self._image,
            captured_ns=int(header["captured_ns"]),
            received_ns=int(header["received_ns"]),
            published_ns=found.published_ns,
            sequence=int(header["sequence"]),
            number=found.sequence,
            clock=CLOCKS[int(header["clock"])],
        )

    def status(self) -> CameraStatus | None:
        """None before the process began."""
        record = np.zeros(1, STATUS)
        found = self._status.read_into(record)
        if found is None:
            return None
        row = record[0]
        facts = bytes(row["facts"])[: int(row["facts_bytes"])]
        counts = {name: int(row[name]) for name in ("frames", "lost", "repeated", "identical", "clock_steps", "opened")}
        return CameraStatus(
            state=STATES[int(row["state"])],
            beat_ns=found.published_ns,
            rate=float(row["rate"]),
            facts=json.loads(facts) if facts else {},
            **counts,
        )


class FrameWriter:
    """The camera process's end of both slots."""

    def __init__(self, frame_fd: int, status_fd: int, height: int, width: int) -> None:
        self._frame = Slot.attach(frame_fd, frame_bytes(height, width), write=True)
        self._status_slot = Slot.attach(status_fd, STATUS.itemsize, write=True)
        self._record = np.zeros(frame_bytes(height, width), np.uint8)
        self._header = self._record[: HEADER.itemsize].view(HEADER)[0]
        self._image = self._record[HEADER.itemsize :].reshape(height, width, 3)
        self._status = np.zeros(1, STATUS)
        self._published = False

    def publish(
        self, image: NDArray[np.uint8], captured_ns: int, received_ns: int, sequence: int, clock: Clock
    ) -> bool:
        """Publish a picture. Returns whether any pixel differs from the one before. Raises ValueError for its shape."""
        if image.shape != self._image.shape or image.dtype != np.uint8:
            raise ValueError(f"found a picture of {image.shape} {image.dtype}, expected {self._image.shape} uint8")
        # Every 16th row tells nearly always; only where they agree are all compared.
        differs = not (
            self._published and np.array_equal(image[::16], self._image[::16]) and np.array_equal(image, self._image)
        )
        np.copyto(self._image, image)
        self._header["captured_ns"] = captured_ns
        self._header["received_ns"] = received_ns
        self._header["sequence"] = sequence
        self._header["clock"] = CLOCKS.index(clock)
        self._frame.publish(self._record, captured_ns=captured_ns)
        self._published = True
        return differs

    def facts(self, facts: dict[str, Any]) -> None:
        """What the device says of itself; stands in every status from now on. Cut down to what the record holds."""
        facts = dict(facts)
        while len(text := json.dumps(facts).encode()) > FACTS_BYTES:
            facts.popitem()
        self._status["facts"] = text
        self._status["facts_bytes"] = len(text)

    def status(self, state: str, rate: float, **counts: int) -> None:
        """Publish the status: the heartbeat."""
        self._status["state"] = STATES.index(state)
        self._status["rate"] = rate
        for name, count in counts.items():
            self._status[name] = count
        self._status_slot.publish(self._status)
