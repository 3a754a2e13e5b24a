"""What a servo is built from: rates, arms, limits, fusion and budgets, all checked before anything runs.

Plain frozen data, so that it travels to the servo's process as JSON (`to_json`, `from_json`) and reads the same in a
log. Angles rad, lengths m, times s; a gripper's axis counts in m or in the unit of its driver.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass as checked_dataclass

from chatvla_edge.runtime.arm_model import ArmModel, load_arm, read_arm

FusionMode = Literal["switch", "blend", "ensemble", "rtc", "sync"]
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


@checked_dataclass(frozen=True, config=STRICT)
class AxisLimits:
    """What may never be exceeded, one number per axis; `limits.Limiter` holds to it and says what each means.

    ``step`` bounds the change of one command, ``lag`` the distance between command and measured position; None where
    the rig sets no bound. ``curve`` is the FR3's position-dependent velocity bound; ``box`` and ``spheres`` the
    workspace of the tool point and need the arm's chain.
    """

    lower: tuple[float, ...]
    upper: tuple[float, ...]
    velocity: tuple[float, ...]
    acceleration: tuple[float, ...]
    jerk: tuple[float, ...]
    step: tuple[float, ...] | None = None
    lag: tuple[float, ...] | None = None
    curve: tuple[tuple[float, ...], ...] | None = None
    box: tuple[float, ...] | None = None
    spheres: tuple[tuple[float, float, float, float], ...] = ()


@checked_dataclass(frozen=True, config=STRICT)
class DirectAxis:
    """An axis that an action component commands directly: position = scale * action + offset."""

    axis: int
    component: int
    scale: float = 1.0
    offset: float = 0.0


@checked_dataclass(frozen=True, config=STRICT)
class PoseAction:
    """A tool pose in the action: xyz (m) from ``component`` on, then the numbers of a rotation ``codec``.

    It drives the first axes of the arm, as many as its chain has joints. ``flange_to_tool`` is 12 numbers (rotation
    row by row, translation); None takes the tool frame of the arm's file.
    """

    component: int
    codec: str
    flange_to_tool: tuple[float, ...] | None = None


@checked_dataclass(frozen=True, config=STRICT)
class ArmPlan:
    """One command slot's worth of axes: an arm with or without its gripper, or a gripper alone.

    Every axis is driven by exactly one of ``direct`` and ``pose``. ``chain`` names a known arm or a URDF file; it is
    needed for poses and for a workspace. ``home`` and ``park`` are positions, one per axis, that the operator may send
    the arm to; None: there is no such place, and the arm stays where it is.
    """

    name: str
    limits: AxisLimits
    direct: tuple[DirectAxis, ...] = ()
    pose: PoseAction | None = None
    chain: str | None = None
    state_budget: float = 0.1
    home: tuple[float, ...] | None = None
    park: tuple[float, ...] | None = None

    @property
    def axes(self) -> int:
        """How many axes the arm has."""
        return len(self.limits.lower)

    def model(self) -> ArmModel | None:
        """The chain, read from where ``chain`` says; None without one."""
        if self.chain is None:
            return None
        return read_arm(Path(self.chain)) if self.chain.endswith(".urdf") else load_arm(self.chain)


@checked_dataclass(frozen=True, config=STRICT)
class FusionPlan:
    """How chunks become one trajectory; the words are those of `fusion.Fusion`."""

    mode: FusionMode = "blend"
    cubic: bool = True
    fade: float = 0.5
    gripper_fade: float = 0.1
    ensemble_decay: float = 0.01
    capacity: int = 8
    sync_actions: int = 0
    prefix_schedule: str = "smooth"


@checked_dataclass(frozen=True, config=STRICT)
class ServoPlan:
    """A rig's servo.

    ``rate``: ticks per second. ``components``: the kind of each action component (`knots.KINDS`); ``gripper_range``:
    what a gripper component is clamped to. ``horizon``: the most actions a chunk has. ``first_step`` and ``action_dt``
    are the manifest's, used for the committed prefix only: a chunk brings its own.

    ``chunk_budget``: the newest chunk's observation may be this old (s) before the robot stops for it.
    ``approach_speed``: share of the limits used to the first target after an arming, a hold, or ``rest`` seconds of
    standing. ``tau_acceleration`` (1/s) and ``tau_jerk`` (1/s^2, None for no bound): how hard tau brakes; a stop from
    full speed takes 1 / tau_acceleration s of host time without the jerk bound. ``margin``: the tracker uses this share
    of the limits, so that a clip there says that something is wrong. ``gap``: standing still longer than this, the
    servo takes it that the devices have stopped without it.
    """

    rate: float
    components: tuple[str, ...]
    horizon: int
    arms: tuple[ArmPlan, ...]
    fusion: FusionPlan = field(default_factory=FusionPlan)
    gripper_range: tuple[float, float] = (0.0, 1.0)
    first_step: int = 0
    action_dt: float = 0.02
    chunk_budget: float = 1.0
    approach_speed: float = 0.1
    rest: float = 2.0
    tau_acceleration: float = 4.0
    tau_jerk: float | None = 40.0
    margin: float = 0.95
    gap: float = 0.1

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for what no servo can run on."""
        if not 10 <= self.rate <= 1000:
            raise ValueError(f"rate is {self.rate}; expected 10 to 1000 ticks per second")
        if not 1 <= len(self.arms) <= 4:
            raise ValueError(f"{len(self.arms)} arms; expected 1 to 4")
        shares = {"approach_speed": self.approach_speed, "margin": self.margin}
        for name, share in shares.items():
            if not 0 < share <= 1:
                raise ValueError(f"{name} is {share}; expected a share of the limits, above 0 and at most 1")
        times = {"chunk_budget": self.chunk_budget, "rest": self.rest, "action_dt": self.action_dt}
        for name, seconds in times.items():
            if not seconds > 0:
                raise ValueError(f"{name} is {seconds} s; expected more than 0")
        if not 2 / self.rate < self.gap <= 1:
            raise ValueError(
                f"gap is {self.gap} s; expected more than two periods of {1 / self.rate} s and at most 1 s"
            )
        for arm in self.arms:
            self._check_arm(arm)

    def _check_arm(self, arm: ArmPlan) -> None:
        if not arm.state_budget > 1 / self.rate:
            raise ValueError(f"arm {arm.name}: state_budget {arm.state_budget} s is shorter than a tick")
        model = arm.model()
        if model is None and (arm.pose is not None or arm.limits.box is not None or arm.limits.spheres):
            raise ValueError(f"arm {arm.name}: a pose or a workspace needs the arm's chain")
        driven = [axis.axis for axis in arm.direct]
        if arm.pose is not None and model is not None:
            driven += range(len(model.joints))
        if sorted(driven) != list(range(arm.axes)):
            raise ValueError(
                f"arm {arm.name}: axes {sorted(driven)} are driven; expected each of 0..{arm.axes - 1} once"
            )
        for name, pose in (("home", arm.home), ("park", arm.park)):
            if pose is None:
                continue
            if len(pose) != arm.axes:
                raise ValueError(f"arm {arm.name}: {name} has {len(pose)} numbers; expected {arm.axes}, one per axis")
            for number, (at, low, high) in enumerate(zip(pose, arm.limits.lower, arm.limits.upper, strict=True)):
                if not low <= at <= high:
                    raise ValueError(f"arm {arm.name}: {name} of axis {number} is {at}; expected {low} to {high}")
        for axis in arm.direct:
            if not 0 <= axis.component < len(self.components):
                raise ValueError(f"arm {arm.name}: component {axis.component} of {len(self.components)}")
            if axis.scale == 0:
                raise ValueError(
                    f"arm {arm.name}: axis {axis.axis} has scale 0, which no position can be turned back by"
                )

    @property
    def period_ns(self) -> int:
        """Nanoseconds from tick to tick."""
        return round(1e9 / self.rate)

    @property
    def axes(self) -> int:
        """Axes of all arms together."""
        return sum(arm.axes for arm in self.arms)


@dataclass(frozen=True)
class ServoWires:
    """Descriptors of the segments that a servo's process inherits; ``arms`` is (command, state) for each arm in order.

    What is None is not there: prefix and telemetry cost nothing where nobody reads them.
    """

    lease: int
    estop: int
    mode: int
    status: int
    chunks: int
    arms: tuple[tuple[int, int], ...]
    prefix: int | None = None
    telemetry: int | None = None
    telemetry_rows: int = 4096
    histograms: int | None = None


_PLAN = TypeAdapter(ServoPlan)


def to_json(plan: ServoPlan) -> str:
    """The plan as JSON; `from_json` gives an equal one."""
    return _PLAN.dump_json(plan).decode()


def from_json(text: str) -> ServoPlan:
    """The plan behind JSON text. Raises pydantic.ValidationError that names the field."""
    return _PLAN.validate_json(text)
