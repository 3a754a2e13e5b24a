"""What a device's process is built from: its axes, its own rate, what it enforces, and what stopping means for it."""

from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass

from chatvla_edge.runtime.servo_plan import ArmPlan
from chatvla_edge.runtime.servo_records import AXES_AT_MOST


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class DevicePlan:
    """One device. Per-axis limits as in `servo_plan.AxisLimits` (rad, m, s); ``rate``: cycles per second.

    ``silence``: how long (s) the servo may send nothing new; ``longest_stop``: how long after the lease's end or an
    emergency stop the servo may still command, which is the longest of its own stops; ``hold``: how long the arm is
    held after a stop of the device's own before its stop action is taken, None for ever; ``reach``: how far (rad, m)
    the first command of an arming may lie from where the arm is.
    """

    name: str
    rate: float
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    velocity: tuple[float, ...]
    acceleration: tuple[float, ...]
    jerk: tuple[float, ...]
    silence: float = 0.1
    longest_stop: float = 0.6
    hold: float | None = 1.0
    reach: float = 0.1

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for what no device can run on."""
        axes = len(self.lower)
        for name in ("lower", "upper", "velocity", "acceleration", "jerk"):
            bound = getattr(self, name)
            if not 1 <= len(bound) == axes <= AXES_AT_MOST:
                raise ValueError(
                    f"device {self.name}: {name} has {len(bound)} numbers; expected one per axis, 1 to {AXES_AT_MOST}"
                )
            if name not in ("lower", "upper") and not min(bound) > 0:
                raise ValueError(f"device {self.name}: {name} is {bound}; expected numbers above 0")
        if not 10 <= self.rate <= 1000:
            raise ValueError(f"device {self.name}: rate is {self.rate}; expected 10 to 1000 per second")
        if not self.silence > 1 / self.rate:
            raise ValueError(f"device {self.name}: silence {self.silence} s is shorter than a cycle")
        if not (self.longest_stop > 0 and self.reach > 0 and (self.hold is None or self.hold >= 0)):
            raise ValueError(f"device {self.name}: expected longest_stop and reach above 0, hold not negative")

    @classmethod
    def of(cls, arm: ArmPlan, rate: float, **changes: float | None) -> "DevicePlan":
        """The device of an arm of the servo's plan: the same limits."""
        limits = arm.limits
        return cls(
            arm.name,
            rate,
            limits.lower,
            limits.upper,
            limits.velocity,
            limits.acceleration,
            limits.jerk,
            **changes,  # type: ignore[arg-type]
        )

    @property
    def axes(self) -> int:
        """How many axes the device has."""
        return len(self.lower)

    @property
    def period_ns(self) -> int:
        """Nanoseconds from cycle to cycle."""
        return round(1e9 / self.rate)


_PLAN = TypeAdapter(DevicePlan)


def to_json(plan: DevicePlan) -> str:
    """The plan as JSON; `from_json` gives an equal one."""
    return _PLAN.dump_json(plan).decode()


def from_json(text: str) -> DevicePlan:
    """The plan behind JSON text. Raises pydantic.ValidationError that names the field."""
    return _PLAN.validate_json(text)
