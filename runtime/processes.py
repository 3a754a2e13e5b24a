"""Start the servo and the devices as processes of their own, and what runs in them.

    servo = start_servo(plan, segments)
    device = start_device(device_plan, segments, 0, "my_drivers.arm:Arm", {"port": "can0"})

A child is a fresh interpreter in a session of its own (a Ctrl-C reaches only the supervisor). It inherits the segments
of its own wires and reads one JSON line from its standard input; nothing is pickled, nothing is found by name. SIGTERM
brings the arms to rest, and so does the death of the process that started it. A child also inherits the ``claim`` on
the rig's name, so that the name is free again only when the last process that can move an arm has ended.

In the child the loop has a thread, which asks for its real-time rights; the main thread waits for signals and, once a
second, publishes the histograms, so that no tick pays for them.
"""

import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import IO, Any

from chatvla_edge.runtime import device_plan, realtime, servo_plan
from chatvla_edge.runtime.device_plan import DevicePlan
from chatvla_edge.runtime.devices import DeviceLoop
from chatvla_edge.runtime.histogram import SNAPSHOT
from chatvla_edge.runtime.rig_segments import HISTOGRAMS, DeviceWires, RigSegments
from chatvla_edge.runtime.riglock import RigClaim
from chatvla_edge.runtime.servo import Servo
from chatvla_edge.runtime.servo_plan import ServoPlan, ServoWires
from chatvla_edge.runtime.slots import Slot

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # how often the main thread looks after its loop
SIGNALS = {signal.SIGTERM, signal.SIGINT}
CLEAR = signal.SIGUSR1  # to a device: the operator says that the arm's fault may be ended


# ---------------------------------------------------------------------------------------------- in whoever starts them


def start_servo(
    plan: ServoPlan,
    segments: RigSegments,
    *,
    claim: RigClaim | None = None,
    priority: int | None = 80,
    cpus: Sequence[int] | None = None,
    stderr: int | IO[Any] | None = None,
) -> "subprocess.Popen[bytes]":
    """The servo's process. ``priority``: of SCHED_FIFO, None leaves the scheduler alone; ``cpus``: None for any.

    ``claim`` is None where nothing real moves.
    """
    spec = {
        "plan": servo_plan.to_json(plan),
        "wires": asdict(segments.servo_wires),
        "priority": priority,
        "cpus": cpus,
        "parent": os.getpid(),
    }
    return _start("servo", spec, segments.servo_fds, claim, stderr)


def start_device(
    plan: DevicePlan,
    segments: RigSegments,
    arm: int,
    driver: str,
    arguments: dict[str, Any] | None = None,
    *,
    claim: RigClaim | None = None,
    priority: int | None = 75,
    cpus: Sequence[int] | None = None,
    stderr: int | IO[Any] | None = None,
) -> "subprocess.Popen[bytes]":
    """The process of one arm.

    ``driver`` is ``module:factory``, called in the child with ``arguments`` (JSON); what it gives is opened at the
    plan's rate, and closed at the end.
    """
    spec = {
        "plan": device_plan.to_json(plan),
        "wires": asdict(segments.device_wires(arm)),
        "driver": driver,
        "arguments": arguments or {},
        "priority": priority,
        "cpus": cpus,
        "parent": os.getpid(),
    }
    return _start("device", spec, segments.device_fds(arm), claim, stderr)


def _start(
    role: str, spec: dict[str, Any], fds: Sequence[int], claim: RigClaim | None, stderr: int | IO[Any] | None
) -> "subprocess.Popen[bytes]":
    held = () if claim is None else (claim.fileno(),)
    child = subprocess.Popen(  # noqa: S603  # our own interpreter, our own module
        [sys.executable, "-m", "chatvla_edge.runtime.processes", role],
        stdin=subprocess.PIPE,
        stderr=stderr,
        pass_fds=(*fds, *held),
        start_new_session=True,
    )
    assert child.stdin is not None
    child.stdin.write(json.dumps(spec).encode())
    child.stdin.close()
    return child


# --------------------------------------------------------------------------------------------------------- in the child


def servo_main(spec: dict[str, Any]) -> None:
    """Run a servo until SIGTERM, or until the process that started it has gone."""
    wires = ServoWires(**{**spec["wires"], "arms": tuple((command, state) for command, state in spec["wires"]["arms"])})
    servo = Servo(servo_plan.from_json(spec["plan"]), wires)
    slot = None
    if wires.histograms is not None:
        slot = Slot.attach(wires.histograms, len(HISTOGRAMS) * SNAPSHOT.itemsize, write=True)

    def look() -> None:
        if slot is not None:
            taken = servo.histograms()
            slot.publish(b"".join(taken[name].snapshot().tobytes() for name in HISTOGRAMS))

    _attend(spec, servo.run, servo.quit, look)


def device_main(spec: dict[str, Any]) -> None:
    """Run a device around its driver, likewise."""
    module, _, factory = spec["driver"].partition(":")
    driver = getattr(importlib.import_module(module), factory)(**spec["arguments"])
    plan = device_plan.from_json(spec["plan"])
    loop = DeviceLoop(plan, DeviceWires(**spec["wires"]), driver)
    try:
        driver.open(plan.rate)
        _attend(spec, loop.run, loop.quit, lambda: None, loop.clear)
    finally:
        driver.close()


def _attend(
    spec: dict[str, Any],
    run: Callable[[], None],
    leave: Callable[[], None],
    look: Callable[[], None],
    clear: Callable[[], None] = lambda: None,
) -> None:
    """Run the loop on a thread of its own and look after it until it ends; ``clear``: upon `CLEAR`."""
    # Blocked before the thread is made, so that no signal interrupts the loop's sleep: only sigtimedwait sees them.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS | {CLEAR})
    failure: list[BaseException] = []

    def body() -> None:
        try:
            if spec["priority"] is not None:
                cpus = None if spec["cpus"] is None else set(spec["cpus"])
                for grant in realtime.enter(spec["priority"], cpus):
                    log.info("%s: %s, %s", grant.what, "obtained" if grant.obtained else "refused", grant.detail)
            run()
        except BaseException as error:  # noqa: BLE001  # raised again by the main thread
            failure.append(error)

    thread = threading.Thread(target=body, name="loop")
    thread.start()
    while thread.is_alive():
        heard = signal.sigtimedwait(SIGNALS | {CLEAR}, LOOK_SECONDS)
        if heard is not None and heard.si_signo == CLEAR:
            clear()
        elif heard is not None or os.getppid() != spec["parent"]:
            leave()
            thread.join()
        else:
            look()
    look()
    if failure:
        raise failure[0]


def main() -> None:
    """``python -m chatvla_edge.runtime.processes servo|device`` with one JSON spec on standard input."""
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {sys.argv[1]} %(message)s")
    spec = json.load(sys.stdin)
    {"servo": servo_main, "device": device_main}[sys.argv[1]](spec)


if __name__ == "__main__":
    main()
