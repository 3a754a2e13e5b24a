"""The children of a run: started, watched, restarted where that is allowed, and ended in bounded time.

Each child writes its log to a file of its own; its last lines there are its last words. A child is a fresh interpreter
in a session of its own, so a Ctrl-C reaches only the supervisor.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from chatvla_edge.runtime.observations import Child as Seen

S = 1_000_000_000

# Waits before the restarts; a child that needs one more within the window is given up.
BACKOFF_S = (0.5, 1.0, 2.0, 4.0, 8.0)
WINDOW_NS = 60 * S

Process = subprocess.Popen[bytes]


def spawn(module: str, spec: dict[str, Any], fds: Sequence[int], log: IO[bytes], python: Path | None = None) -> Process:
    """Start ``python -m module`` with one JSON spec on its standard input and ``fds`` inherited."""
    child = subprocess.Popen(  # noqa: S603  # an interpreter that the rig file names, our own module
        [str(python or sys.executable), "-m", module],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        pass_fds=sorted(set(fds)),
        start_new_session=True,
    )
    assert child.stdin is not None
    child.stdin.write(json.dumps(spec).encode())
    child.stdin.close()
    return child


@dataclass
class Child:
    """One process of the run. ``begin`` starts it with its standard error in the given file.

    ``restarts``: whether it may be started again without the operator. No process that holds an arm may: that enables
    motors.
    """

    name: str
    begin: Callable[[IO[bytes]], Process]
    folder: Path
    restarts: bool
    process: Process | None = None
    started_ns: int = 0
    deaths: list[int] = field(default_factory=list)  # host times, ns
    given_up: bool = False
    _log: IO[bytes] | None = None

    @property
    def log(self) -> Path:
        """Where it writes."""
        return self.folder / f"{self.name.replace(' ', '_')}.log"

    def start(self, now_ns: int) -> None:
        """Start it, after an earlier process of it has ended."""
        if self._log is None:
            self._log = self.log.open("ab")
        self.process = self.begin(self._log)
        self.started_ns = now_ns

    def look(self, now_ns: int) -> Seen:
        """What has become of it; restarts it where that is due."""
        process = self.process
        if process is None or process.poll() is None:
            return Seen(alive=process is not None, given_up=self.given_up, last_words="" if process else "not started")
        words = self.last_words()
        if not self.deaths or self.deaths[-1] < self.started_ns:
            self.deaths = [at for at in self.deaths if now_ns - at < WINDOW_NS] + [now_ns]
        if self.restarts and not self.given_up:
            if len(self.deaths) > len(BACKOFF_S):
                self.given_up = True
            elif now_ns - self.deaths[-1] >= BACKOFF_S[len(self.deaths) - 1] * S:
                self.start(now_ns)
        return Seen(alive=False, given_up=self.given_up, last_words=words)

    def last_words(self) -> str:
        """How it ended and its last line, for one line of the operator's screen."""
        assert self.process is not None
        code = self.process.returncode
        how = "" if code is None else f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - 4096))
                lines = file.read().decode(errors="replace").split("\n")
        except OSError:
            lines = []
        said = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"{how}: {said}" if said else how

    def terminate(self) -> None:
        """Ask it to end."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def reap(self, seconds: float) -> bool:
        """Wait for its end; kill it after ``seconds``. True where it ended by itself."""
        process, willing = self.process, True
        if process is not None:
            try:
                process.wait(max(0.0, seconds))
            except subprocess.TimeoutExpired:
                willing = False
                process.kill()
                process.wait()
        if self._log is not None:
            self._log.close()
            self._log = None
        return willing
