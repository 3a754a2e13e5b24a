"""The axes of the devices that simulations stand for: names, ranges and speeds as their makers publish them.

rad and m; rad/s and m/s; per axis. `strength` is what the simulated motors can do, rad/s^2 or m/s^2: where the maker
publishes an acceleration limit the motors can do more, or the simulated arm would lag behind a command at the limit.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from chatvla_edge.drivers.protocols import AxisBounds

BodyName = Literal["arx_r5", "fr3", "panda", "robotiq_2f85"]
Row = tuple[float, ...]


@dataclass(frozen=True)
class Body:
    """Axes of one device, `[axes]` each; acceleration and jerk None where the maker publishes none."""

    axes: tuple[str, ...]
    lower: Row
    upper: Row
    velocity: Row
    strength: Row
    start: Row
    acceleration: Row | None = None
    jerk: Row | None = None

    def bounds(self) -> AxisBounds:
        """The published limits."""
        return AxisBounds(self.lower, self.upper, self.velocity, self.acceleration, self.jerk)


_ARX_JOINTS = tuple(f"joint{i}" for i in range(1, 7))
_FRANKA_JOINTS = tuple(f"joint{i}" for i in range(1, 8))

BODIES: dict[BodyName, Body] = {
    # Ranges and speeds: the defaults of arx5-interface 0.1.5 (RobotConfig), gripper 0.088 m at 0.3 m/s.
    "arx_r5": Body(
        axes=(*_ARX_JOINTS, "gripper"),
        lower=(-3.14, -0.05, -0.1, -1.6, -1.57, -2.0, 0.0),
        upper=(2.618, 3.5, 3.2, 1.55, 1.57, 2.0, 0.088),
        velocity=(5.0, 5.0, 5.5, 5.5, 5.0, 5.0, 0.3),
        strength=(60.0,) * 6 + (6.0,),
        start=(0.0, 0.9, 0.9, 0.0, 0.0, 0.0, 0.08),
    ),
    # "Robot and interface specifications", limits for Franka Research 3; velocity is the upper cap of its curve.
    "fr3": Body(
        axes=_FRANKA_JOINTS,
        lower=(-2.7437, -1.7837, -2.9007, -3.0421, -2.8065, 0.5445, -3.0159),
        upper=(2.7437, 1.7837, 2.9007, -0.1518, 2.8065, 4.5169, 3.0159),
        velocity=(2.62, 2.62, 2.62, 2.62, 5.26, 4.18, 5.26),
        acceleration=(10.0,) * 7,
        jerk=(5000.0,) * 7,
        strength=(60.0,) * 7,
        start=(0.0, -0.7854, 0.0, -2.3562, 0.0, 1.5708, 0.7854),
    ),
    # The same page, limits for Panda.
    "panda": Body(
        axes=_FRANKA_JOINTS,
        lower=(-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973),
        upper=(2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973),
        velocity=(2.175,) * 4 + (2.61,) * 3,
        acceleration=(15.0, 7.5, 10.0, 12.5, 15.0, 20.0, 20.0),
        jerk=(7500.0, 3750.0, 5000.0, 6250.0, 7500.0, 10000.0, 10000.0),
        strength=(60.0,) * 7,
        start=(0.0, -0.7854, 0.0, -2.3562, 0.0, 1.5708, 0.7854),
    ),
    # Robotiq's manual of the 2F-85: 85 mm, 20 to 150 mm/s.
    "robotiq_2f85": Body(
        axes=("gripper",),
        lower=(0.0,),
        upper=(0.085,),
        velocity=(0.15,),
        strength=(6.0,),
        start=(0.085,),
    ),
}
assert set(BODIES) == set(get_args(BodyName))
