"""Drivers with their vendors' libraries against stand-ins: from a command to the wire, age of a state, what it costs.

Each driver has a process of its own, as on a rig, commands a triangle at the device's rate on absolute deadlines, and
asks for the state after each command. The stand-ins say when a command arrived.

- to the wire: from before `command` to the arrival of the first frame of it at the stand-in (ARX: of the first motor;
  a gripper's target waits for the transaction that is under way).
- age: at the end of a cycle, how long ago the state was sent at most.
- cycle: `command` and `state` together. ARX: an exchange with seven motors, 1.05 ms of which the library sleeps.
- CPU: of one core, of the driver's process; its stand-in is another.

A stand-in has no wire: 115200 baud are slept for, the bits of a CAN bus are not. Cases are the functions in `CASES`.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from chatvla_edge.benchmarks import script
from chatvla_edge.benchmarks.report import Report
from chatvla_edge.benchmarks.samples import Samples
from chatvla_edge.drivers import registry
from chatvla_edge.drivers.standins.can import CanBus, environment
from chatvla_edge.drivers.standins.franka import ADDRESS, FrankaStandIn, interpreter
from chatvla_edge.drivers.standins.robotiq import RobotiqStandIn
from chatvla_edge.runtime.realtime import enter, now_ns, sleep_until_ns

SUMMARY = "Drivers against stand-ins: command to wire, age of the state, CPU, per device."

CHILD = "import sys; from chatvla_edge.benchmarks.drivers import drive; drive(*sys.argv[1:])"


@dataclass(frozen=True)
class Driven:
    """What a driver's process found: host times (ns) before each command, ages and costs (s), states that were new."""

    sent: list[int]
    ages: list[float]
    costs: list[float]
    new: int
    seconds: float
    cpu: float


def drive(channel: str, name: str, options: str, rate: str, count: str, amplitude: str) -> None:
    """In the driver's process: open, command a triangle, say what was found."""
    period = round(1e9 / float(rate))
    driver = registry.create("arms", name, json.loads(options))
    driver.open(float(rate))
    enter(75)
    middle = np.array(driver.state().position)
    swing = np.array(json.loads(amplitude))
    driver.command(middle)
    for _ in range(round(float(rate))):  # the first commands begin a motion, or activate
        sleep_until_ns(now_ns() + period)
        driver.command(middle)
        driver.state()
    sent, ages, costs, sequences = [], [], [], set()
    used = resource.getrusage(resource.RUSAGE_SELF)
    begin = deadline = now_ns()
    for number in range(int(count)):
        phase = number / float(rate) % 2.0
        position = middle + swing * (abs(phase - 1.0) * 2.0 - 1.0)
        sleep_until_ns(deadline)
        before = now_ns()
        driver.command(position)
        state = driver.state()
        after = now_ns()
        sent.append(before)
        costs.append(1e-9 * (after - before))
        ages.append(1e-9 * (after - state.captured_ns))
        sequences.add(state.sequence)
        deadline = max(deadline + period, after - period)
    seconds = 1e-9 * (now_ns() - begin)
    now = resource.getrusage(resource.RUSAGE_SELF)
    cpu = (now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime) / seconds
    with os.fdopen(int(channel), "w") as said:
        json.dump([sent, ages, costs, len(sequences), seconds, cpu], said)
    os._exit(0)  # without the two seconds in which an ARX arm is let down


class Driver:
    """A driver's process, started; `found` waits for what it says."""

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any],
        rate: float,
        count: int,
        amplitude: list[float],
        surroundings: Mapping[str, str] | None = None,
    ) -> None:
        self.channel, theirs = os.pipe()
        arguments = [str(theirs), name, json.dumps(options), str(rate), str(count), json.dumps(amplitude)]
        self.process = subprocess.Popen(  # noqa: S603  (this very module)
            [sys.executable, "-c", CHILD, *arguments],
            pass_fds=[theirs],
            env=os.environ | dict(surroundings or {}),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)

    def found(self) -> Driven:
        """Raises RuntimeError where the process ended without a word."""
        with os.fdopen(self.channel) as said:
            text = said.read()
        self.process.wait()
        if not text:
            raise RuntimeError(f"the driver's process ended with {self.process.returncode}: run its tests")
        return Driven(*json.loads(text))


def _add(report: Report, name: str, driven: list[Driven], arrived: list[list[tuple[int, float]]]) -> None:
    """The rows of a device; ``arrived``: per driver, when its stand-in heard commands."""
    rounds = []
    for one, heard in zip(driven, arrived, strict=True):
        times = np.array([at for at, _ in heard], np.int64)
        if times.size:
            sent = np.array(one.sent, np.int64)
            sent = sent[sent <= times[-1]]
            rounds.append(times[np.searchsorted(times, sent)] - sent)
    if rounds:
        report.add(Samples.of(f"{name}: command to the wire", *rounds, scale=1e-9), curve=True)
    report.add(Samples.of(f"{name}: age of the state", *(one.ages for one in driven)))
    report.add(Samples.of(f"{name}: cycle", *(one.costs for one in driven)))
    report.figure(f"{name}: CPU of a driver", float(np.mean([one.cpu for one in driven])), "cores")


def arx(report: Report, options: Namespace) -> str | None:
    """Two arms, fourteen axes, at 500 Hz."""
    if find_spec("arx5_interface") is None:
        return "arx5-interface is not installed"
    count = 1500 if options.quick else 10_000
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        buses = [stack.enter_context(CanBus(folder, interface)) for interface in ("can0", "can1")]
        for bus in buses:
            bus.tell(trace=True)
        arms = [
            Driver(
                "arx5",
                {"interface": bus.interface, "model": "R5", "gravity": [0, 0, 0]},
                500,
                count,
                [0.2] * 6 + [0.01],
                environment(folder),
            )
            for bus in buses
        ]
        driven = [arm.found() for arm in arms]
        arrived = [bus.tell()["traced"] for bus in buses]
    _add(report, "ARX", driven, arrived)
    new = min(one.new / one.seconds for one in driven)
    report.figure("ARX: states that every motor answered", new, "1/s")
    report.goal("ARX: 14-D command and state", new, ">=", 475.0, unit="1/s")
    return None


def robotiq(report: Report, options: Namespace) -> str | None:
    """The gripper, commanded at 30 Hz."""
    if find_spec("pymodbus") is None or find_spec("serial") is None:
        return "pymodbus is not installed"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        gripper = stack.enter_context(RobotiqStandIn(folder / "port"))
        gripper.tell(trace=True)
        driver = Driver("robotiq_2f85", {"port": str(gripper.port)}, 30, 120 if options.quick else 900, [0.02])
        driven = driver.found()
        told = gripper.tell()
    _add(report, "Robotiq", [driven], [told["traced"]])
    # Each transaction is a state; those that 30 commands a second did not look at count too.
    rate = told["transactions"] / (driven.seconds + 1.0)
    report.figure("Robotiq: transactions", rate, "1/s")
    report.goal("Robotiq: transactions", rate, ">=", 50.0, unit="1/s")
    return None


def franka(report: Report, options: Namespace) -> str | None:
    """One arm through franka-rs, targets at 400 Hz; the simulator says how many packets were answered in time."""
    if interpreter() is None or find_spec("franka") is None:
        return "franka-rs or franka-sim is not installed"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        box = stack.enter_context(FrankaStandIn(folder))
        settings = {"address": ADDRESS, "realtime": "ignore", "tracking": "robot"}
        driver = Driver("franka_rs", settings, 400, 800 if options.quick else 6000, [0.05, 0, 0, 0.03, 0, 0, 0])
        driven = driver.found()
        rate = box.tell()["success_rate"]
    _add(report, "Franka", [driven], [[]])
    targets = len(driven.sent) / driven.seconds
    report.figure("Franka: targets", targets, "1/s")
    report.goal("Franka: targets", targets, ">=", 200.0, unit="1/s")
    report.figure("Franka: packets answered in time at the end", rate, "")
    return None


CASES: dict[str, Callable[[Report, Namespace], str | None]] = {"ARX": arx, "Robotiq": robotiq, "Franka": franka}


def run(options: Namespace) -> Report:
    """Every case that can run here; what is missing is a goal not measured."""
    report = Report(title="Drivers against stand-ins")
    report.method.append("one process per driver, SCHED_FIFO 75 where permitted; stand-ins at 85")
    for name, case in CASES.items():
        if (missing := case(report, options)) is not None:
            report.goal(f"{name}: measured", None, ">=", 1.0, reason=missing)
    return report


if __name__ == "__main__":
    sys.exit(script.main(__file__))
