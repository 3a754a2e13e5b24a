import mmap

import numpy as np
from numpy.typing import NDArray

def yuyv_to_rgb(
    source: bytes | bytearray | memoryview | mmap.mmap | NDArray[np.uint8],
    line: int,
    column: int,
    target: NDArray[np.uint8],
) -> None: ...
def bgra_to_rgb(source: NDArray[np.uint8], target: NDArray[np.uint8]) -> None: ...
