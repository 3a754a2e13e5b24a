"""A rig: one robot's cameras, arms, limits and rates, read from a YAML file and checked whole before anything opens.

Every device's options are checked by its own driver's model, without its vendor library. An error names the file, the
YAML path and the line. Angles rad, lengths m, times s.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from chatvla_edge.drivers import registry
from chatvla_edge.drivers.registry import Role, UnknownDriverError

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
Positive = Annotated[float, Field(gt=0)]
Numbers = tuple[float, ...]

FOLDER = Path(__file__).parent / "rigs"


class RigError(ValueError):
    """A rig file that cannot be used; one line for each thing that is wrong with it."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Device(_Part):
    """What every device states. ``python``: the interpreter of its process where a vendor SDK needs another one."""

    driver: str
    options: dict[str, Any] = {}
    python: Path | None = None


class Camera(Device):
    """A camera. ``max_age``: how old (s) its newest frame may be; ``required``: whether motion depends on it."""

    height: int = Field(ge=16, le=4320)
    width: int = Field(ge=16, le=8192)
    rate: float = Field(ge=1, le=240)
    required: bool = True
    max_age: Positive = 0.2


class Workspace(_Part):
    """Where the tool point may be, in the arm's base frame, m."""

    box: tuple[float, float, float, float, float, float] | None = None  # x, y, z at least, then at most
    keep_out: tuple[tuple[float, float, float, float], ...] = ()  # spheres: x, y, z, radius


class Limits(_Part):
    """What the rig never exceeds, one number per axis; None takes the vendor's. A rig may only narrow those."""

    lower: Numbers | None = None
    upper: Numbers | None = None
    velocity: Numbers | None = None
    acceleration: Numbers
    jerk: Numbers
    step: Numbers | None = None
    lag: Numbers | None = None
    workspace: Workspace = Workspace()


class GripperAxis(_Part):
    """How the policy's gripper number becomes the axis `gripper`: 0 and 1 of the opening lie at these positions."""

    closed: float
    open: float

    @model_validator(mode="after")
    def _consistent(self) -> "GripperAxis":
        if self.closed == self.open:
            raise ValueError(f"closed and open are both {self.open}, expected two positions")
        return self


class Arm(Device):
    """An arm with its own gripper or without, or a gripper that is a device of its own (then `of` names its arm).

    ``rate``: commands per second; ``chain``: the kinematics (an arm of `runtime/arms` or a URDF file), needed for poses
    and a workspace; ``home`` and ``park``: one position per axis; ``hold``: how long (s) it is held after a stop of its
    own before its stop action, null for ever; ``reach``: how far the first command may lie from where it is.
    """

    rate: float = Field(ge=10, le=1000)
    chain: str | None = None
    limits: Limits
    gripper: GripperAxis | None = None
    of: Name | None = None
    home: Numbers | None = None
    park: Numbers | None = None
    hold: float | None = Field(default=None, ge=0)
    reach: Positive = 0.1
    max_age: Positive = 0.1


class Servo(_Part):
    """The servo's rate and how chunks are fused; the words are those of runtime/servo_plan.py."""

    rate: float = Field(ge=10, le=1000)
    fusion: Literal["switch", "blend", "ensemble", "rtc", "sync"] = "blend"
    sync_actions: int = Field(default=0, ge=0)
    chunk_max_age: Positive = 1.0
    approach_speed: float = Field(default=0.1, gt=0, le=1)


class Policy(_Part):
    """What the rig takes from a policy. ``cycle``: the time (s) within which an answer must follow the one before."""

    rate: Positive
    cycle: Positive = 0.5
    sync_window: Positive = 0.05
    reasoning_max_age: Positive | None = None
    every_n_queries: int = Field(default=1, ge=1)


class Cores(_Part):
    """Which CPUs each kind of process runs on; empty for any."""

    servo: tuple[int, ...] = ()
    devices: tuple[int, ...] = ()
    policy: tuple[int, ...] = ()
    cameras: tuple[int, ...] = ()


class Rig(_Part):
    """A whole rig, as its file says it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    schema_version: Literal[1] = Field(alias="schema")
    name: Name
    description: str
    simulated: bool = False  # nothing real moves; said in every status and report
    cameras: dict[Name, Camera] = Field(min_length=1)
    arms: dict[Name, Arm] = Field(min_length=1, max_length=4)
    enable: Device | None = None
    servo: Servo
    policy: Policy
    cores: Cores = Cores()

    @model_validator(mode="after")
    def _consistent(self) -> "Rig":
        for name, arm in self.arms.items():
            if arm.of is not None and (arm.of == name or arm.of not in self.arms or self.arms[arm.of].of is not None):
                raise ValueError(f"arms.{name}.of is {arm.of!r}, expected another arm of this rig that is no gripper")
        return self


def names() -> list[str]:
    """The rigs that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find(rig: str) -> Path:
    """The file of a rig that comes with the package, or of a path. Raises RigError."""
    path = Path(rig)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise RigError(f"found no rig file {rig}")
        return path
    if rig not in names():
        raise RigError(f"found no rig {rig!r}, expected a YAML file or one of: {', '.join(names()) or 'none'}")
    return FOLDER / f"{rig}.yaml"


def load(rig: str) -> Rig:
    """Read and check a rig by name or path. Raises RigError with a line for each thing that is wrong."""
    path = find(rig)
    return parse(path.read_text(), str(path))


def parse(text: str, where: str) -> Rig:
    """Check the text of a rig file. Raises RigError."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RigError(f"{where}: no YAML: {error}") from error
    try:
        rig = Rig.model_validate(values)
    except ValidationError as error:
        raise RigError(_sentences(error, where, ())) from error
    problems = [*_devices("cameras", rig.cameras, where), *_devices("arms", rig.arms, where)]
    if rig.enable is not None:
        problems += _options("enable", rig.enable, where, ("enable",))
    if problems:
        raise RigError("\n".join(problems))
    return rig


def _devices(role: Role, devices: "dict[str, Camera] | dict[str, Arm]", where: str) -> list[str]:
    return [problem for name, device in devices.items() for problem in _options(role, device, where, (role, name))]


def _options(role: Role, device: Device, where: str, at: tuple[str, ...]) -> list[str]:
    try:
        registry.options(role, device.driver, device.options)
    except UnknownDriverError as error:
        return [f"{where}: {'.'.join((*at, 'driver'))}: {error}"]
    except ValidationError as error:
        return [_sentences(error, where, (*at, "options"))]
    return []


def _sentences(error: ValidationError, where: str, at: tuple[str, ...]) -> str:
    """One line per problem, each with its YAML path."""
    return "\n".join(
        f"{where}: {'.'.join(map(str, (*at, *problem['loc']))) or 'the file'}: {problem['msg']}"
        f" (found {problem['input']!r})"
        for problem in error.errors()
    )
