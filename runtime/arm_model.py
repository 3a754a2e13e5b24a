"""An arm's chain and limits, read once from a URDF file into flat arrays.

Only what the servo plane needs is read: the serial chain of revolute joints from ``base`` to ``tool`` with fixed
joints folded in, the ranges, and the velocity, acceleration and jerk limits where the file states them. The files in
``arms/`` are chains without meshes; a rig may name its own URDF (a whole robot's is fine: branches are ignored).
"""

from dataclasses import dataclass
from math import cos, sin
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


class ArmModelError(ValueError):
    """A URDF that cannot be used; the message names the file, what was found and what was expected."""


@dataclass(frozen=True, eq=False)
class ArmModel:
    """A serial chain of n revolute joints; all arrays float64, angles in rad, lengths in m.

    A rigid transform is 12 numbers: the rotation row by row, then the translation.
    """

    name: str
    joints: tuple[str, ...]
    origins: FloatArray  # [n, 12] each joint in its parent at angle zero
    axes: FloatArray  # [n, 3] unit vectors in the joint's frame
    tool: FloatArray  # [12] tool in the last joint's frame
    lower: FloatArray  # [n] rad
    upper: FloatArray  # [n] rad
    velocity: FloatArray  # [n] rad/s
    acceleration: FloatArray  # [n] rad/s^2, NaN where the vendor publishes none
    jerk: FloatArray  # [n] rad/s^3, NaN where the vendor publishes none
    curve: FloatArray | None  # [4, n] velocity offset, deceleration, lower and upper reference (FR3), or None


def arm_names() -> list[str]:
    """Names of the arms whose chains come with the runtime."""
    return sorted(path.stem for path in _arms().glob("*.urdf"))


def load_arm(name: str) -> ArmModel:
    """The chain of a known arm (`arm_names`). Raises ArmModelError for an unknown one."""
    if name not in arm_names():
        raise ArmModelError(f"no arm {name!r} here; known: {', '.join(arm_names())}, or give a URDF file")
    return parse_arm((_arms() / f"{name}.urdf").read_bytes(), f"arms/{name}.urdf")


def read_arm(path: Path, base: str = "base", tool: str = "tool") -> ArmModel:
    """The chain from link ``base`` to link ``tool`` of a URDF file. Raises ArmModelError, OSError."""
    return parse_arm(path.read_bytes(), str(path), base, tool)


def parse_arm(text: bytes, source: str, base: str = "base", tool: str = "tool") -> ArmModel:
    """The chain from link ``base`` to link ``tool``; ``source`` is what messages call the text."""
    robot = _parse_xml(text, source)
    parents: dict[str, Element] = {}
    for joint in robot.findall("joint"):
        child = _link(joint, "child", source)
        if child in parents:
            raise ArmModelError(f"{source}: link {child!r} has two parents")
        parents[child] = joint

    chain: list[Element] = []
    link = tool
    while link != base:
        if link not in parents or len(chain) > len(parents):
            raise ArmModelError(f"{source}: no chain of joints leads from link {base!r} to link {tool!r}")
        chain.append(parents[link])
        link = _link(parents[link], "parent", source)
    chain.reverse()

    names: list[str] = []
    origins: list[FloatArray] = []
    axes: list[FloatArray] = []
    limits: list[list[float]] = []
    curves: list[list[float]] = []
    rotation, translation = np.eye(3), np.zeros(3)
    for joint in chain:
        turn, shift = _origin(joint, source)
        translation = translation + rotation @ shift
        rotation = rotation @ turn
        kind = joint.get("type")
        if kind == "fixed":
            continue
        if kind != "revolute":
            raise ArmModelError(f"{source}: joint {joint.get('name')!r} is {kind!r}; expected revolute or fixed")
        names.append(joint.get("name", f"joint{len(names) + 1}"))
        origins.append(np.concatenate([rotation.ravel(), translation]))
        axis = _numbers(joint.find("axis"), "xyz", "1 0 0", source)
        length = float(np.linalg.norm(axis))
        if not length > 1e-9:
            raise ArmModelError(f"{source}: joint {names[-1]!r} has axis {axis.tolist()}; expected a direction")
        axes.append(axis / length)
        limits.append(_limits(joint, names[-1], source))
        curves.append(_curve(joint, source))
        rotation, translation = np.eye(3), np.zeros(3)
    if not names:
        raise ArmModelError(f"{source}: no revolute joint between {base!r} and {tool!r}")
    lower, upper, velocity, acceleration, jerk = np.array(limits).T
    curve = np.array(curves).T
    return ArmModel(
        name=robot.get("name", source),
        joints=tuple(names),
        origins=np.array(origins),
        axes=np.array(axes),
        tool=np.concatenate([rotation.ravel(), translation]),
        lower=lower,
        upper=upper,
        velocity=velocity,
        acceleration=acceleration,
        jerk=jerk,
        curve=curve if np.any(curve[1] > 0) else None,
    )


def rpy_matrix(roll: float, pitch: float, yaw: float) -> FloatArray:
    """Rotation [3, 3] of URDF's roll, pitch, yaw (rad): about the fixed x, then y, then z."""
    cr, sr, cp, sp, cy, sy = cos(roll), sin(roll), cos(pitch), sin(pitch), cos(yaw), sin(yaw)
    return np.array(
        [
            [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
            [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
            [-sp, cp * sr, cp * cr],
        ]
    )


def _arms() -> Path:
    # The rooms are installed as plain folders, so their data files are plain files.
    return Path(__file__).parent / "arms"


def _parse_xml(text: bytes, source: str) -> Element:
    """The root element. A document type declaration is refused: it is where entities that explode come from."""
    builder = TreeBuilder()
    parser = expat.ParserCreate()

    def refuse(*_: object) -> None:
        raise ArmModelError(f"{source}: has a document type declaration; expected plain XML")

    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    try:
        parser.Parse(text, True)
    except expat.ExpatError as error:
        raise ArmModelError(f"{source}: not XML: {error}") from error
    root = builder.close()
    if root.tag != "robot":
        raise ArmModelError(f"{source}: root element is <{root.tag}>; expected <robot>")
    return root


def _link(joint: Element, role: str, source: str) -> str:
    element = joint.find(role)
    name = None if element is None else element.get("link")
    if name is None:
        raise ArmModelError(f"{source}: joint {joint.get('name')!r} names no {role} link")
    return name


def _numbers(element: Element | None, key: str, default: str, source: str) -> FloatArray:
    text = default if element is None else element.get(key, default)
    try:
        numbers = np.array([float(word) for word in text.split()])
    except ValueError as error:
        raise ArmModelError(f"{source}: {key}={text!r}: {error}") from error
    if numbers.shape != (3,) or not np.isfinite(numbers).all():
        raise ArmModelError(f"{source}: {key}={text!r}; expected three finite numbers")
    return numbers


def _origin(joint: Element, source: str) -> tuple[FloatArray, FloatArray]:
    origin = joint.find("origin")
    roll, pitch, yaw = _numbers(origin, "rpy", "0 0 0", source)
    return rpy_matrix(roll, pitch, yaw), _numbers(origin, "xyz", "0 0 0", source)


def _attribute(element: Element, key: str, default: float | None, where: str) -> float:
    text = element.get(key)
    if text is None:
        if default is None:
            raise ArmModelError(f"{where}: <{element.tag}> has no {key}")
        return default
    try:
        return float(text)
    except ValueError as error:
        raise ArmModelError(f"{where}: {key}={text!r} is not a number") from error


def _limits(joint: Element, name: str, source: str) -> list[float]:
    where = f"{source}: joint {name!r}"
    element = joint.find("limit")
    if element is None:
        raise ArmModelError(f"{where}: no <limit>; a revolute joint without a range cannot be driven")
    nan = float("nan")
    found = [_attribute(element, key, None, where) for key in ("lower", "upper", "velocity")]
    if not (np.isfinite(found).all() and found[0] < found[1] and found[2] > 0.0):
        raise ArmModelError(f"{where}: lower, upper, velocity are {found}; expected lower < upper and velocity > 0")
    return found + [_attribute(element, key, nan, where) for key in ("acceleration", "jerk")]


def _curve(joint: Element, source: str) -> list[float]:
    element = joint.find("position_based_velocity_limits")
    if element is None:
        return [0.0, 0.0, 0.0, 0.0]
    where = f"{source}: joint {joint.get('name')!r}"
    return [
        _attribute(element, key, None, where) for key in ("velocity_offset", "deceleration_limit", "lower", "upper")
    ]
