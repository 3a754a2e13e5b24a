from collections.abc import Sequence

import numpy.typing as npt

from chatvla_edge.runtime.limits import Limiter

class Tracker:
    target: memoryview
    position: memoryview
    speed: memoryview
    acceleration: memoryview
    joints: int
    dt: float
    refused: int

    def __init__(
        self,
        lower: Sequence[float] | npt.ArrayLike,
        upper: Sequence[float] | npt.ArrayLike,
        velocity: Sequence[float] | npt.ArrayLike,
        acceleration: Sequence[float] | npt.ArrayLike,
        jerk: Sequence[float] | npt.ArrayLike,
        period_ns: int,
    ) -> None: ...
    def reset(self, position: npt.ArrayLike) -> None: ...
    def advance(self) -> None: ...
    def resume(self, limiter: Limiter) -> None: ...
    def set_speed(self, scale: float) -> None: ...
