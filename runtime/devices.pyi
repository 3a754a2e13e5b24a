from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from chatvla_edge.runtime.device_plan import DevicePlan
from chatvla_edge.runtime.histogram import Histogram
from chatvla_edge.runtime.rig_segments import DeviceWires

Numbers = Sequence[float] | NDArray[np.float64]

class Driver(Protocol):
    def command(self, position: NDArray[np.float64]) -> object: ...
    def state(self) -> tuple[Numbers, Numbers | None, Numbers | None, int | None, bool]: ...
    def stop(self) -> object: ...

class DeviceGate:
    plan: DevicePlan
    def __init__(self, plan: DevicePlan, wires: DeviceWires) -> None: ...

class DeviceLoop:
    gate: DeviceGate
    driver: Driver
    overruns: int
    def __init__(self, plan: DevicePlan, wires: DeviceWires, driver: Driver) -> None: ...
    def run(self, cycles: int | None = None) -> None: ...
    def cycle(self, now_ns: int) -> int: ...
    def quit(self) -> None: ...
    def histograms(self) -> dict[str, Histogram]: ...
