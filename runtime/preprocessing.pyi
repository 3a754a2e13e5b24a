from collections.abc import Iterable
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

FOLDED: Final = 588
UNFOLDED: Final = 1176
MEAN: NDArray[np.float32]
STD: NDArray[np.float32]

def normalised_grey_levels() -> NDArray[np.float32]: ...

class Pipeline:
    def __init__(
        self,
        steps: Iterable[Any],
        *,
        height: int,
        width: int,
        kernels: Literal["auto", "plain"] = "auto",
        patches: bool = True,
    ) -> None: ...
    @property
    def grid(self) -> tuple[int, int]: ...
    @property
    def n_patches(self) -> int: ...
    def run(self, frame: NDArray[np.uint8], out: NDArray[np.float32]) -> None: ...
    def picture(self, frame: NDArray[np.uint8]) -> NDArray[np.uint8]: ...

def kept(size: int, ratio: float) -> tuple[int, int]: ...
def described(thing: object) -> str: ...
