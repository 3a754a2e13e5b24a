from collections.abc import Iterable
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Kind = Literal["joint", "gripper", "xyz", "rot6d"]
KINDS: tuple[Kind, ...]

class ActionLayout:
    def __init__(self, kinds: Iterable[str], gripper_range: tuple[float, float] = (0.0, 1.0)) -> None: ...
    @property
    def size(self) -> int: ...
    @property
    def kinds(self) -> tuple[Kind, ...]: ...

def sample(
    layout: ActionLayout, actions: ArrayLike, dt: float, taus: ArrayLike, *, cubic: bool = True
) -> tuple[NDArray[np.float64], NDArray[np.float64]]: ...
