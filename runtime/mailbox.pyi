from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from chatvla_edge.runtime.slots import CellSegment

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

def chunk_bytes(horizon: int, action_dim: int) -> int: ...
def prefix_bytes(horizon: int, action_dim: int) -> int: ...

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
