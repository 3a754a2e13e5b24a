from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chatvla_edge.runtime.chunks import Chunk
from chatvla_edge.runtime.knots import ActionLayout

Mode = Literal["switch", "blend", "ensemble", "rtc", "sync"]
MODES: tuple[Mode, ...]
SCHEDULES: tuple[str, ...]

class Fused(NamedTuple):
    value: NDArray[np.float64]
    rate: NDArray[np.float64]
    seam: bool
    starved: bool
    holding: bool

class CommittedPrefix(NamedTuple):
    actions: NDArray[np.float64]
    mask: NDArray[np.float64]
    committed: int

class Fusion:
    def __init__(
        self,
        layout: ActionLayout,
        horizon: int,
        *,
        mode: str = "blend",
        cubic: bool = True,
        fade: float = 0.5,
        gripper_fade: float = 0.1,
        ensemble_decay: float = 0.01,
        capacity: int = 8,
        sync_actions: int = 0,
        prefix_schedule: str = "smooth",
        history: float = 1.0,
    ) -> None: ...
    @property
    def layout(self) -> ActionLayout: ...
    @property
    def horizon(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def sequence(self) -> int: ...
    @property
    def counts(self) -> dict[str, int]: ...
    def reset(self, position: ArrayLike, *, epoch: int = 0, tau: float = 0.0) -> None: ...
    def set_epoch(self, epoch: int) -> None: ...
    def push(self, chunk: Chunk) -> str: ...
    def path_end(self) -> float: ...
    def sample(self, tau: float) -> Fused: ...
    def committed_prefix(
        self, tau_observation: float, first_step: int, dt: float, expected_delay: float
    ) -> CommittedPrefix: ...
