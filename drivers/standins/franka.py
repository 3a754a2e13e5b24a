"""A Franka arm's control box: `franka-sim` 1.1.7, which speaks FCI 10 (FR3) and enforces the motion limits.

It wants a NumPy and a MuJoCo of its own, so it has an environment of its own; the environment variable
CHATVLA_EDGE_FRANKA_SIM names its interpreter:

    python3 -m venv ~/franka-sim && ~/franka-sim/bin/pip install franka-sim==1.1.7
    export CHATVLA_EDGE_FRANKA_SIM=~/franka-sim/bin/python
    python -m chatvla_edge.drivers.standins.franka

The arm is then at 127.0.0.1, with `realtime: ignore` in the rig's options where the kernel is no real-time one. The
model is franka-sim's own FR3 without its meshes, which it would download. No simulator at hand speaks FCI 5 (Panda).

Faults (`tell`): ``reflex: n`` (an FCI error number; 6 is the joint reflex) ends a motion; ``lose: seconds`` of commands
that do not arrive; ``limits: bool``, whether what breaks the arm's motion limits ends a motion (a loop that the machine
does not keep up with breaks them by itself). `pause` and `resume` stand for a robot that falls silent, `close` for one
that is gone.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from chatvla_edge.drivers.standins.control import StandIn

VARIABLE = "CHATVLA_EDGE_FRANKA_SIM"
SERVER = Path(__file__).with_name("franka_server.py")
ADDRESS = "127.0.0.1"


def interpreter() -> str | None:
    """The interpreter that has franka-sim; None where the variable names none."""
    named = os.environ.get(VARIABLE)
    return shutil.which(named) if named else None


class FrankaStandIn(StandIn):
    """The server's process; one at a time, since FCI has one port. ``folder``: for its model and its control socket."""

    def __init__(self, folder: Path, *, strict: bool = False, **options: Any) -> None:
        python = interpreter()
        if python is None:
            raise RuntimeError(f"{VARIABLE} names no interpreter with franka-sim; see {__name__}")
        super().__init__("", [], folder / "franka.control", python=python, **options)
        extra = ["--strict"] if strict else []
        control = ["--control", str(self.control), "--with-parent"]
        self.command = [python, str(SERVER), *extra, *control]

    def pause(self) -> None:
        """Fall silent."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Speak again."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)


def main() -> int:
    """Serve until Ctrl-C."""
    with tempfile.TemporaryDirectory(prefix="franka-") as folder:
        try:
            standin = FrankaStandIn(Path(folder), log=None)
            command = [part for part in standin.command if part != "--with-parent"]
            return subprocess.run([*command, *sys.argv[1:]], check=False).returncode  # noqa: S603  # our own server
        except RuntimeError as error:
            sys.stderr.write(f"{error}\n")
            return 1
        except KeyboardInterrupt:
            return 130


if __name__ == "__main__":
    sys.exit(main())
