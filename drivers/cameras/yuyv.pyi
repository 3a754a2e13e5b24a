import mmap

import numpy as np
from numpy.typing import NDArray

def to_rgb(
    source: bytes | bytearray | memoryview | mmap.mmap | NDArray[np.uint8],
    line: int,
    column: int,
    target: NDArray[np.uint8],
) -> None: ...
