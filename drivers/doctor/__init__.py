"""Whether this computer is fit to run a robot: each finding ok, a warning or a failure, each with its remedy.

Reads, never changes; opens no device; takes well under two seconds.
"""

from chatvla_edge.drivers.doctor.devices import check_devices
from chatvla_edge.drivers.doctor.machine import Line, Machine
from chatvla_edge.drivers.doctor.system import check_system
from chatvla_edge.drivers.rig import Rig

__all__ = ["Line", "Machine", "examine"]


def examine(rig: Rig | None = None, machine: Machine | None = None) -> list[Line]:
    """Everything, in the order in which it matters; without a rig, only the computer and what is plugged in."""
    machine = machine or Machine()
    return [*check_system(machine), *check_devices(rig, machine)]
