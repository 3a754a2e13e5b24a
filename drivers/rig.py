"""A rig: one robot's cameras, arms, limits and rates, read from a YAML file and checked whole before anything opens.

Every device's options are checked by its own driver's model, and what the rig says of its axes by the driver's axes and
limits, without its vendor library. An error names the file, the line and the YAML path. Angles rad, lengths m, times s.
docs/rigs.md explains the fields to who writes a rig.
"""

import json
import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from chatvla_edge.drivers import registry, rig_checks, yaml_source
from chatvla_edge.drivers.rig_checks import Problem
from chatvla_edge.drivers.yaml_source import Source, SourceError

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
Positive = Annotated[float, Field(gt=0)]
Numbers = tuple[float, ...]

FOLDER = Path(__file__).parent / "rigs"


class RigError(ValueError):
    """A rig file that cannot be used; one line for each thing that is wrong with it."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Device(_Part):
    """What every device states."""

    driver: str = Field(description="which driver; `chatvla-edge rig drivers` lists them")
    options: dict[str, Any] = Field(default={}, description="the driver's own options")
    python: Path | None = Field(
        default=None, description="the interpreter of its process, where a vendor SDK needs another one than ours"
    )


class Native(_Part):
    """What a camera delivers where the policy wants another size; its process scales each frame before it is shared.

    Only the scale changes: a policy is shown the same view as in training, so the shapes must agree.
    """

    height: int = Field(ge=16, le=4320, description="of the frames the device delivers")
    width: int = Field(ge=16, le=8192, description="of the frames the device delivers")
    filter: Literal["bicubic", "bilinear_float", "bilinear_cv2"] = Field(
        description="how they are scaled: as the training data were, in the words of the bundle"
    )


class Camera(Device):
    """A camera."""

    height: int = Field(ge=16, le=4320, description="of the frames that the policy and the recorder get")
    width: int = Field(ge=16, le=8192, description="of the frames that the policy and the recorder get")
    rate: float = Field(
        ge=1, le=240, description="frames per second; as high as the camera can, for it is younger then"
    )
    native: Native | None = Field(default=None, description="what the device delivers, where that is another size")
    required: bool = Field(default=True, description="whether motion depends on it")
    max_age: Positive = Field(default=0.2, description="how old its newest frame may be")


class Workspace(_Part):
    """Where the tool point may be, in the arm's base frame."""

    box: tuple[float, float, float, float, float, float] | None = Field(
        default=None, description="x, y, z at least, then x, y, z at most"
    )
    keep_out: tuple[tuple[float, float, float, float], ...] = Field(default=(), description="spheres: x, y, z, radius")


class Limits(_Part):
    """What the rig never exceeds, one number per axis. A rig may only narrow the vendor's limits."""

    lower: Numbers | None = Field(default=None, description="position at least; null takes the vendor's")
    upper: Numbers | None = Field(default=None, description="position at most; null takes the vendor's")
    velocity: Numbers | None = Field(default=None, description="null takes the vendor's")
    acceleration: Numbers = Field(description="per s^2")
    jerk: Numbers = Field(description="per s^3")
    step: Numbers | None = Field(
        default=None, description="the most one command may differ from the one before; null for any"
    )
    lag: Numbers | None = Field(default=None, description="the most an axis may be behind its command; null for any")
    workspace: Workspace = Field(default=Workspace(), description="bounds of the tool point")


class GripperAxis(_Part):
    """Where the axis `gripper` stands when closed and when open: a policy's 0 and 1 of the opening lie there."""

    closed: float = Field(description="position of the axis when closed")
    open: float = Field(description="position of the axis when open")


class Arm(Device):
    """An arm with its own gripper or without, or a gripper that is a device of its own (then `of` names its arm)."""

    rate: float = Field(ge=10, le=1000, description="commands per second")
    chain: str | None = Field(
        default=None,
        description="the kinematics, an arm that the runtime knows or a URDF file; poses and a workspace need it",
    )
    limits: Limits = Field(description="what it never exceeds")
    gripper: GripperAxis | None = Field(default=None, description="required where the last axis is `gripper`")
    of: Name | None = Field(default=None, description="the arm that this gripper is mounted on")
    home: Numbers | None = Field(default=None, description="`[axes]` where `home` brings it")
    park: Numbers | None = Field(
        default=None, description="`[axes]` where `park` brings it: it can be switched off there"
    )
    hold: float | None = Field(
        default=None,
        ge=0,
        description="how long it is held after a stop of its own before its stop action; null for ever",
    )
    reach: Positive = Field(default=0.1, description="how far from where it is the first command may lie")
    max_age: Positive = Field(default=0.1, description="how old its newest state may be")


class Servo(_Part):
    """The loop that commands the arms, and how chunks are fused."""

    rate: float = Field(ge=10, le=1000, description="ticks per second")
    fusion: Literal["switch", "blend", "ensemble", "rtc", "sync"] = Field(
        default="blend", description="how chunks are joined"
    )
    sync_actions: int = Field(default=0, ge=0, description="with `sync`: how many actions of a chunk are executed")
    chunk_max_age: Positive = Field(default=1.0, description="how old the newest chunk's observation may be")
    approach_speed: float = Field(
        default=0.1, gt=0, le=1, description="share of the limits used on the way to the first target"
    )


class Policy(_Part):
    """What the rig takes from a policy."""

    rate: Positive = Field(description="actions per second, as the bundle's")
    cycle: Positive = Field(default=0.5, description="within this time an answer must follow the one before")
    sync_window: Positive = Field(default=0.05, description="how far apart the frames of several cameras may lie")
    reasoning_max_age: Positive | None = Field(
        default=None, description="how long a reasoning may be used again; null: never"
    )
    every_n_queries: int = Field(default=1, ge=1, description="reason anew in every n-th query")


class Cores(_Part):
    """Which CPUs each kind of process runs on; empty for any."""

    servo: tuple[int, ...] = Field(default=(), description="isolated, and nobody else's")
    devices: tuple[int, ...] = Field(default=(), description="arms and grippers")
    policy: tuple[int, ...] = Field(default=(), description="the engines' threads")
    cameras: tuple[int, ...] = Field(default=(), description="all cameras")


class Rig(_Part):
    """A whole rig, as its file says it."""

    schema_version: Literal[1] = Field(alias="schema", description="the version of this format")
    name: Name = Field(description="the rig's own; one daemon at a time may have it")
    description: str = Field(description="one line for people")
    simulated: bool = Field(default=False, description="nothing real moves; said in every status and report")
    cameras: dict[Name, Camera] = Field(min_length=1, description="by the names that the bundle uses")
    arms: dict[Name, Arm] = Field(
        min_length=1, max_length=4, description="arms and grippers by the names that the bundle uses, 1 to 4"
    )
    enable: Device | None = Field(default=None, description="a switch that must be held, or not be pressed, for motion")
    servo: Servo = Field(description="the loop that commands the arms")
    policy: Policy = Field(description="what the rig takes from a policy")
    cores: Cores = Field(default=Cores(), description="which CPUs each kind of process runs on")


PARTS: tuple[type[BaseModel], ...] = (
    Rig, Device, Camera, Native, Arm, Limits, Workspace, GripperAxis, Servo, Policy, Cores,
)  # fmt: skip


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
    """Read and check a rig by name or path. Raises RigError with a line for each thing that is wrong, OSError."""
    path = find(rig)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RigError(f"{path}:1: the file: no UTF-8 text: {error}") from None
    return parse(text, str(path))


def parse(text: str, where: str) -> Rig:
    """Check the text of a rig file; ``where`` is what messages call it. Raises RigError."""
    try:
        source = yaml_source.read(text)
    except SourceError as error:
        raise RigError(_sentence(where, error.line, error.path, str(error))) from error
    try:
        # As JSON, so that types are strict: no `true` for a rate, no "5" for a number, but a list for a tuple.
        rig = Rig.model_validate_json(json.dumps(source.values), strict=True)
    except ValidationError as error:
        raise RigError(_sentences(where, source, _problems(error, (), _NAMES))) from error
    problems: list[Problem] = []
    devices: list[tuple[registry.Role, tuple[str, ...], Device]] = [
        *(("cameras", ("cameras", name), camera) for name, camera in rig.cameras.items()),
        *(("arms", ("arms", name), arm) for name, arm in rig.arms.items()),
        *((("enable", ("enable",), rig.enable),) if rig.enable is not None else ()),
    ]
    drivers: dict[tuple[str, ...], Any] = {}
    for role, path, device in devices:
        try:
            drivers[path] = registry.create(role, device.driver, device.options)
        except registry.UnknownDriverError as error:
            problems.append(Problem((*path, "driver"), str(error)))
        except ValidationError as error:
            known = registry.load(role, device.driver).OPTIONS.model_fields
            problems += _problems(error, (*path, "options"), known)
        except ValueError as error:
            problems.append(Problem((*path, "options"), str(error)))
    problems += rig_checks.problems(rig, {path[1]: driver for path, driver in drivers.items() if path[0] == "arms"})
    if problems:
        raise RigError(_sentences(where, source, problems))
    return rig


_PLAIN = re.compile(r"[A-Za-z0-9_-]+")
_NAMES = {field.alias or name for part in PARTS for name, field in part.model_fields.items()}


def _problems(error: ValidationError, at: tuple[str, ...], names: Iterable[str]) -> list[Problem]:
    """What pydantic found, in our words; ``names``: what a misspelt one may have meant."""
    problems = []
    for found in error.errors(include_url=False, include_context=False):
        path, kind = (*at, *found["loc"]), found["type"]
        if kind == "missing":
            said = "found nothing, expected it to be stated"
        elif kind == "extra_forbidden":
            near = get_close_matches(str(path[-1]), names, n=1)
            said = "no such name here" + (f"; did you mean {near[0]!r}?" if near else "")
        elif kind == "value_error":  # of a validator of ours, which says what it found
            said = found["msg"].removeprefix("Value error, ")
        else:
            said = f"{found['msg']} (found {_short(found['input'])})"
        problems.append(Problem(path, said))
    return problems


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _sentences(where: str, source: Source, problems: Iterable[Problem]) -> str:
    return "\n".join(_sentence(where, source.line(one.path), one.path, one.message) for one in problems)


def _sentence(where: str, line: int, path: tuple[str | int, ...], message: str) -> str:
    return f"{where}:{line}: {'.'.join(map(_part, path)) or 'the file'}: {' '.join(message.split())}"


def _part(name: str | int) -> str:
    """A part of a path, quoted where it could not be told from what stands around it."""
    text = str(name)
    return text if _PLAIN.fullmatch(text) else ascii(text)
