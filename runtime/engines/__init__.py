"""Engines behind one protocol: a stage that runs on buffers which were laid out once."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Engine(Protocol):
    """One loaded stage.

    `run` binds the given arrays by name and executes. Inputs must be C-contiguous and stay alive until it returns;
    outputs are written in place. An array given under both a past and a present name is updated in place.
    """

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Execute the stage. Raises ValueError for a name or shape the stage does not have."""
        ...


class Buffers:
    """Flat memory of the largest size each tensor ever takes; a query only takes views of it."""

    def __init__(self) -> None:
        self._flat: dict[str, Array] = {}

    def reserve(self, name: str, size: int, dtype: Any) -> None:
        """Set aside `size` elements."""
        self._flat[name] = np.zeros(size, dtype)

    def view(self, name: str, *shape: int) -> Array:
        """The first elements as an array of this shape. Raises ValueError when it was not laid out that large."""
        flat = self._flat[name]
        size = int(np.prod(shape))
        if size > flat.size:
            raise ValueError(f"{name} of shape {list(shape)} needs {size} elements, the buffer holds {flat.size}")
        return flat[:size].reshape(shape)
