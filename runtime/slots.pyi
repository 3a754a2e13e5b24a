from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from chatvla_edge.runtime.segments import Segment

# Anything that gives its memory away: bytes, bytearray, memoryview, numpy arrays (collections.abc.Buffer is 3.12's).
Buffer: TypeAlias = bytes | bytearray | memoryview | NDArray[Any] | np.generic
WritableBuffer: TypeAlias = bytearray | memoryview | NDArray[Any]

class SlotBusyError(RuntimeError): ...

class Reading(NamedTuple):
    sequence: int
    published_ns: int
    captured_ns: int

class PostedChunk(NamedTuple):
    sequence: int
    published_ns: int
    captured_ns: int
    epoch: int
    tau_observation: float
    first_step: int
    dt: float
    actions: NDArray[np.float64]

class Prefix(NamedTuple):
    sequence: int
    published_ns: int
    captured_ns: int
    epoch: int
    tau: float
    dt: float
    actions: NDArray[np.float64]
    mask: NDArray[np.float64]

def stride_words(record_bytes: int) -> int: ...
def body_bytes(record_bytes: int, count: int) -> int: ...
def chunk_bytes(horizon: int, action_dim: int) -> int: ...
def prefix_bytes(horizon: int, action_dim: int) -> int: ...
def create_cells(name: str, kind: str, record_bytes: int, count: int) -> int: ...

class CellSegment(Segment):
    @property
    def sequence(self) -> int: ...

class Slot(CellSegment):
    @classmethod
    def create(cls, name: str, nbytes: int, cells: int = 3) -> Slot: ...
    @classmethod
    def attach(cls, fd: int, nbytes: int, write: bool = False, cells: int = 3) -> Slot: ...
    def publish(self, record: Buffer, captured_ns: int | None = None) -> int: ...
    def read_into(self, target: WritableBuffer) -> Reading | None: ...
    def read(self) -> tuple[bytes, Reading] | None: ...

class Ring(CellSegment):
    @classmethod
    def create(cls, name: str, record_bytes: int, capacity: int) -> Ring: ...
    @classmethod
    def attach(cls, fd: int, record_bytes: int, capacity: int, write: bool = False) -> Ring: ...
    def append(self, record: Buffer, captured_ns: int | None = None) -> int: ...
    def reader(self, from_oldest: bool = False) -> RingReader: ...
    def last(self, target: WritableBuffer, stamps: NDArray[np.int64] | None = None) -> int: ...

class RingReader:
    ring: Ring
    cursor: int
    dropped: int
    def __init__(self, ring: Ring, from_oldest: bool = False) -> None: ...
    def read(self, target: WritableBuffer, stamps: NDArray[np.int64] | None = None) -> int: ...

class ChunkMailbox(CellSegment):
    @classmethod
    def create(cls, name: str, horizon: int, action_dim: int) -> ChunkMailbox: ...
    @classmethod
    def attach(cls, fd: int, horizon: int, action_dim: int, write: bool = False) -> ChunkMailbox: ...
    def publish(
        self,
        actions: NDArray[np.float64],
        *,
        epoch: int,
        tau_observation: float,
        first_step: int,
        dt: float,
        captured_ns: int,
    ) -> int: ...
    def take(self, seen: int = 0) -> PostedChunk | None: ...

class PrefixSlot(CellSegment):
    @classmethod
    def create(cls, name: str, horizon: int, action_dim: int) -> PrefixSlot: ...
    @classmethod
    def attach(cls, fd: int, horizon: int, action_dim: int, write: bool = False) -> PrefixSlot: ...
    def publish(
        self, actions: NDArray[np.float64], mask: NDArray[np.float64], *, epoch: int, tau: float, dt: float
    ) -> int: ...
    def read(self) -> Prefix | None: ...
