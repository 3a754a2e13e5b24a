"""Which ARX arm hangs on which CAN interface: the operator moves one by hand, nothing is enabled and nothing moves.

    python -m chatvla_edge.drivers.arms.swap left=can0 right=can1

Both positions are asked for before and after, by frames that enable no motor. For every start after that, the rig
file's option `adapter` keeps an arm with the serial number of its USB-CAN adapter.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence

from chatvla_edge.drivers.arms import can_motors
from chatvla_edge.drivers.arms.arx5 import JOINTS, adapter_of
from chatvla_edge.drivers.arms.can_motors import Bus
from chatvla_edge.drivers.errors import DeviceNotFoundError, DeviceUnsuitableError, DriverError

LEAST = 0.1  # rad: nobody moves an arm less by mistake, or so much without noticing

Positions = Mapping[int, float]


def positions(interface: str) -> Positions:
    """Motor -> rad, of an arm that nobody drives. Raises DeviceNotFoundError, DeviceUnsuitableError."""
    bus = Bus(interface)
    try:
        if others := can_motors.talk(bus):
            raise DeviceUnsuitableError(f"{interface}: found frames with ids {others[:8]}; end what drives this arm")
        found = can_motors.probe(bus, JOINTS)
    finally:
        bus.close()
    if missing := [motor for motor in JOINTS if motor not in found.families]:
        raise DeviceNotFoundError(f"{interface}: no answer from motors {missing}; check power and cable")
    if found.enabled:
        raise DeviceUnsuitableError(
            f"{interface}: motors {list(found.enabled)} hold the arm, so that no hand can move it; park it and"
            " switch it off and on"
        )
    return found.positions


def moved(before: Mapping[str, Positions], after: Mapping[str, Positions]) -> str:
    """The one arm that moved by at least `LEAST`. Raises ValueError where none did, or more than one."""
    most = {name: max(abs(after[name][motor] - angle) for motor, angle in before[name].items()) for name in before}
    found = [name for name, angle in most.items() if angle >= LEAST]
    if len(found) != 1:
        said = ", ".join(f"{name} by {angle:.2f} rad" for name, angle in most.items())
        raise ValueError(f"found {said}; expected one arm that moved by {LEAST} rad or more: move one, and once more")
    return found[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask for each arm in turn. 0: all as named; 1: swapped, or not found out."""
    parser = ArgumentParser(description="Find out which arm hangs on which CAN interface.")
    parser.add_argument("arm", nargs="+", help="NAME=INTERFACE, as the rig file has it")
    options = parser.parse_args(arguments)
    named = dict(text.partition("=")[::2] for text in options.arm)
    outcome = 0
    try:
        for name in named:
            before = {one: positions(interface) for one, interface in named.items()}
            input(f"Move only the {name} arm by hand, by a hand's breadth, then press Enter. ")
            found = moved(before, {one: positions(interface) for one, interface in named.items()})
            adapter = adapter_of(named[found])
            sys.stdout.write(
                f"{name}: {'as named' if found == name else f'SWAPPED, it hangs on {named[found]}'}"
                f"{f', adapter {adapter}' if adapter else ''}\n"
            )
            outcome |= found != name
    except (DriverError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return outcome


if __name__ == "__main__":
    sys.exit(main())
