from typing import Any

from numpy.typing import NDArray

from chatvla_edge.runtime.arm_servo import ArmServo
from chatvla_edge.runtime.fusion import Fusion
from chatvla_edge.runtime.histogram import Histogram
from chatvla_edge.runtime.servo_plan import ServoPlan, ServoWires
from chatvla_edge.runtime.tau import TauClock

STEP_NAMES: tuple[str, ...]

class Servo:
    plan: ServoPlan
    arms: list[ArmServo]
    fusion: Fusion
    clock: TauClock
    def __init__(self, plan: ServoPlan, wires: ServoWires) -> None: ...
    def run(self, ticks: int | None = None) -> None: ...
    def tick(self, tick_ns: int, now_ns: int | None = None) -> None: ...
    def quit(self) -> None: ...
    def read_status(self) -> NDArray[Any]: ...
    def histograms(self) -> dict[str, Histogram]: ...
    def clear_histograms(self) -> None: ...
