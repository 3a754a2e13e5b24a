"""A driver in a process of its own, as the runtime has it, and a test that says what it does there.

The vendor libraries print, abort and lock up; a stand-in's shim must be there before a process starts.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from chatvla_edge.drivers import registry
from chatvla_edge.drivers.errors import DriverError
from chatvla_edge.drivers.standins import control as standin

TESTS = Path(__file__).resolve().parents[1]


class ArmProcess:
    """``driver``: name in the registry. A driver's error is raised here by its class's name: `ArmError`."""

    def __init__(self, driver, options, environment=None, python=sys.executable):
        paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        self.channel, theirs = os.pipe()
        self.process = subprocess.Popen(
            [python, "-m", "support.arm_child", driver, json.dumps(options), str(theirs)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, pass_fds=[theirs],
            env=os.environ | {"PYTHONPATH": paths} | (environment or {}),
        )  # fmt: skip
        os.close(theirs)
        self.answers = os.fdopen(self.channel)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.answers.close()
        self.process.stdin.close()
        self.process.stderr.close()

    def ask(self, what, **arguments):
        self.process.stdin.write((json.dumps({"what": what} | arguments) + "\n").encode())
        self.process.stdin.flush()
        line = self.answers.readline()
        if not line:
            self.process.wait()
            raise EOFError(f"ended with {self.process.returncode}: {self.process.stderr.read().decode()[-2000:]}")
        said = json.loads(line)
        if "error" in said:
            raise ArmError(said["error"], said["text"])
        return said["answer"]

    def open(self, rate):
        return self.ask("open", rate=rate)

    def state(self):
        return SimpleNamespace(**self.ask("state"))

    def call(self, name, *arguments):
        return self.ask("call", name=name, arguments=arguments)

    def cycles(self, count, rate, *, by=None, tell=None, at=0, control=None):
        """Command and ask for the state ``count`` times; ``by``: how far each axis goes meanwhile. In cycle ``at`` the
        stand-in behind ``control`` is told of a fault. Once the driver has raised, only its state is asked for.
        """
        rows = self.ask("cycles", count=count, rate=rate, by=by, tell=tell, at=at, control=str(control))
        return [SimpleNamespace(**row) for row in rows]


class ArmError(Exception):
    def __init__(self, kind, text):
        super().__init__(f"{kind}: {text}")
        self.kind = kind


class Child:
    def __init__(self, driver):
        self.driver = driver
        self.wanted = None

    def open(self, rate):
        self.driver.open(rate)

    def call(self, name, arguments):
        return getattr(self.driver, name)(*arguments)

    def state(self):
        state = self.driver.state()
        return {
            "position": [float(value) for value in state.position],
            "captured_ns": state.captured_ns,
            "sequence": state.sequence,
            "velocity": None if state.velocity is None else [float(value) for value in state.velocity],
            "effort": None if state.effort is None else [float(value) for value in state.effort],
            "target": None if state.target is None else [float(value) for value in state.target],
            "fault": state.fault,
        }

    def cycles(self, count, rate, by, tell, at, control):
        import numpy as np

        begin = np.array(self.state()["position"]) if self.wanted is None else self.wanted
        by = np.zeros(len(begin)) if by is None else np.array(by)
        rows, raised, end = [], False, time.monotonic_ns()
        for number in range(count):
            if tell is not None and number == at:
                standin.tell(Path(control), **tell)
            row = {"began_ns": time.monotonic_ns(), "error": "", "text": ""}
            try:
                if not raised:
                    self.wanted = begin + by * ((number + 1) / count)
                    self.driver.command(self.wanted)
                row |= self.state()
            except DriverError as error:
                row |= {"error": type(error).__name__, "text": str(error)}
                if not raised:
                    raised, self.wanted = True, None
                    with contextlib.suppress(DriverError):
                        self.driver.stop()
            row["ended_ns"] = time.monotonic_ns()
            rows.append(row)
            end = max(end + round(1e9 / rate), time.monotonic_ns() - 20_000_000)
            time.sleep(max(0, end - time.monotonic_ns()) / 1e9)
        return rows


def main():
    driver = registry.create("arms", sys.argv[1], json.loads(sys.argv[2]))
    child = Child(driver)
    with os.fdopen(int(sys.argv[3]), "w") as channel:
        for line in sys.stdin:
            asked = json.loads(line)
            try:
                said = {"answer": getattr(child, asked.pop("what"))(**asked)}
            except Exception as error:  # noqa: BLE001  # raised again by the test
                said = {"error": type(error).__name__, "text": str(error)}
            channel.write(json.dumps(said) + "\n")
            channel.flush()


if __name__ == "__main__":
    main()
