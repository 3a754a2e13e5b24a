from typing import Any

import numpy as np

ARMS_AT_MOST: int
AXES_AT_MOST: int
WANTED: tuple[str, ...]
SERVO_DOING: tuple[str, ...]
REASONS: tuple[str, ...]
GIVEN: tuple[str, ...]
DEVICE_DOING: tuple[str, ...]
DEVICE_FAULTS: tuple[str, ...]
LATCHING: int
MODE: np.dtype[Any]
COMMAND: np.dtype[Any]
STATE: np.dtype[Any]
STATUS: np.dtype[Any]

def telemetry(action_dim: int, axes: int) -> np.dtype[Any]: ...
def names(bits: int, of: tuple[str, ...]) -> tuple[str, ...]: ...
