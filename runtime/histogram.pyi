from typing import Any

import numpy as np
from numpy.typing import NDArray

from chatvla_edge.runtime.slots import Buffer

SNAPSHOT: np.dtype[Any]
TOPS: NDArray[np.int64]

class Histogram:
    total: int
    largest: int
    mean: float
    @staticmethod
    def of(snapshot: Buffer) -> Histogram: ...
    def record(self, value: int) -> None: ...
    def merge(self, other: Histogram) -> None: ...
    def clear(self) -> None: ...
    def percentile(self, share: float) -> int: ...
    def snapshot(self) -> NDArray[Any]: ...
