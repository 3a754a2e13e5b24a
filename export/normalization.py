"""Between the robot's units and the numbers the head works in."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Normalization:
    """state = (q - mean) / std; action = (a + 1) / 2 * (max - min) + min. All float32, as the public scripts have them.

    state_mean, state_std: [S]; action_min, action_max: [A].
    """

    state_mean: Vector
    state_std: Vector
    action_min: Vector
    action_max: Vector

    def __post_init__(self) -> None:
        for name in ("state_mean", "state_std", "action_min", "action_max"):
            value = getattr(self, name)
            if value.ndim != 1 or value.dtype != np.float32 or not np.isfinite(value).all():
                raise ValueError(f"{name} must be a finite float32 vector, found {value.dtype} {list(value.shape)}")
        if (self.state_std <= 0).any():
            raise ValueError(f"state_std must be positive, found {self.state_std.min()}")
        if (self.action_max <= self.action_min).any():
            index = int(np.argmax(self.action_max <= self.action_min))
            raise ValueError(f"action_max must exceed action_min, component {index} does not")

    def require(self, *, action_dim: int, state_dim: int) -> None:
        """Refuse statistics of another robot."""
        if (len(self.state_mean), len(self.state_std)) != (state_dim, state_dim):
            raise ValueError(f"the statistics describe a state of {len(self.state_mean)}, the head takes {state_dim}")
        if (len(self.action_min), len(self.action_max)) != (action_dim, action_dim):
            raise ValueError(f"the statistics describe {len(self.action_min)} actions, the head makes {action_dim}")

    def state(self, state: Vector) -> Vector:
        """[S] in the robot's units -> [S] normalised."""
        if state.shape != self.state_mean.shape or not np.isfinite(state).all():
            raise ValueError(f"the state must be {len(self.state_mean)} finite numbers, found {np.asarray(state)}")
        return ((state.astype(np.float32) - self.state_mean) / self.state_std).astype(np.float32)

    def chunk(self, normalized: Vector) -> Vector:
        """[H, A] in [-1, 1] -> [H, A] in the robot's units."""
        span = self.action_max - self.action_min
        chunk: Vector = (normalized + np.float32(1)) / np.float32(2) * span + self.action_min
        return chunk
