from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

VERDICT_NAMES: tuple[str, ...]
COUNTER_NAMES: tuple[str, ...]
HEADER_DTYPE: np.dtype[np.void]

@dataclass(frozen=True)
class Chunk:
    actions: NDArray[np.float64]
    tau_observation: float
    dt: float
    first_step: int
    epoch: int = 0
    sequence: int = 0

    def due(self) -> NDArray[np.float64]: ...
    def header(self) -> NDArray[np.void]: ...
