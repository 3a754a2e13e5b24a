"""Which class drives what. Names in rig files lead here; a class is imported when its rig is used, its vendor library
when it is opened.

A driver from elsewhere (a patched SDK, an arm of one's own) registers itself as an entry point ``role.name`` in the
group ``chatvla_edge.drivers``, for example ``cameras.l515_port = "my_package:L515Port"``.
"""

import json
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoints, entry_points
from typing import Any, Literal, get_args

from chatvla_edge.drivers.errors import DriverError
from chatvla_edge.drivers.protocols import Options

Role = Literal["cameras", "arms", "enable"]
ROLES: tuple[Role, ...] = get_args(Role)
GROUP = "chatvla_edge.drivers"

_ROOM = "chatvla_edge.drivers"

# role -> name in rig files -> module of this room : class
OURS: dict[Role, dict[str, str]] = {
    "cameras": {
        "realsense": "cameras.realsense:RealSense",
        "mujoco": "sim.mujoco_world:MujocoCamera",
        "recording": "cameras.recording:Recording",
        "sim_camera": "sim.camera:SimCamera",
        "tabletop": "sim.tabletop_world:TabletopCamera",
        "uvc": "cameras.uvc:Uvc",
        "zed": "cameras.zed:Zed",
        "zed_uvc": "cameras.zed:ZedUvc",
    },
    "arms": {
        "arx5": "arms.arx5:Arx5",
        "franka_rs": "arms.franka_rs:FrankaRs",
        "franky": "arms.franky:Franky",
        "mujoco": "sim.mujoco_world:MujocoArm",
        "robotiq_2f85": "grippers.robotiq:Robotiq",
        "sim_arm": "sim.arm:SimArm",
        "sim_gripper": "sim.arm:SimGripper",
        "tabletop": "sim.tabletop_world:TabletopArm",
    },
    "enable": {
        "gpio": "enable.gpio:Gpio",
        "hid": "enable.hid:Hid",
        "serial_loop": "enable.serial_loop:SerialLoop",
        "sim_switch": "sim.switch:SimSwitch",
    },
}


class UnknownDriverError(DriverError):
    """A rig file names a driver that is not here."""


@cache
def _registered() -> EntryPoints:
    return entry_points(group=GROUP)  # reads every installed package's metadata, so once


def known(role: Role) -> dict[str, str]:
    """Name -> ``module:class`` of every driver of a role, ours and registered ones. Ours cannot be replaced."""
    others = {
        entry.name.removeprefix(f"{role}."): entry.value for entry in _registered() if entry.name.startswith(f"{role}.")
    }
    return others | {name: f"{_ROOM}.{place}" for name, place in OURS[role].items()}


def find(role: Role, name: str) -> str:
    """``module:class`` of a driver. Raises UnknownDriverError, which lists what is known."""
    drivers = known(role)
    if name not in drivers:
        names = ", ".join(sorted(drivers)) or "none"
        raise UnknownDriverError(f"found the {role} driver {name!r}, expected one of: {names}")
    return drivers[name]


def load(role: Role, name: str) -> Any:
    """The class of a driver; no vendor library is imported. Raises UnknownDriverError."""
    module, _, attribute = find(role, name).partition(":")
    return getattr(import_module(module), attribute)


def options(role: Role, name: str, values: dict[str, Any]) -> Options:
    """The checked options of a driver, from JSON values. Raises UnknownDriverError, pydantic.ValidationError."""
    return _options(load(role, name), values)


def create(role: Role, name: str, values: dict[str, Any]) -> Any:
    """A driver with its options, not opened. Raises UnknownDriverError, pydantic.ValidationError."""
    driver = load(role, name)
    return driver(_options(driver, values))


def _options(driver: Any, values: dict[str, Any]) -> Options:
    model: type[Options] = driver.OPTIONS
    # As JSON, strictly: a list is a tuple and a text a path there, but `true` is no number and "5" none either.
    return model.model_validate_json(json.dumps(values), strict=True)
