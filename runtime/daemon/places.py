"""Where a run of a rig is found: its control socket, and the page of its emergency stop.

The folder is the first of ``$CHATVLA_EDGE_RUN``, ``$RUNTIME_DIRECTORY`` (systemd), ``$XDG_RUNTIME_DIR/chatvla-edge``
and ``/tmp/chatvla-edge-UID``. It belongs to one user and nobody else may enter it.
"""

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path


class PlaceError(ValueError):
    """The folder cannot be trusted, or no run of the rig is there."""


def folder() -> Path:
    """The folder, made where it is not there. Raises PlaceError where others may write to it."""
    for name, sub in (("CHATVLA_EDGE_RUN", ""), ("RUNTIME_DIRECTORY", ""), ("XDG_RUNTIME_DIR", "chatvla-edge")):
        if value := os.environ.get(name):
            path = Path(value) / sub
            break
    else:
        path = Path("/tmp") / f"chatvla-edge-{os.getuid()}"  # noqa: S108  # owner and mode are checked below
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PlaceError(
            f"{path}: found mode {stat.filemode(found.st_mode)} of user {found.st_uid}, expected a directory of user "
            f"{os.getuid()} that nobody else may write to"
        )
    return path


@dataclass(frozen=True)
class Run:
    """A running daemon: its supervisor, the descriptor of the emergency-stop page there, and its bundle as given."""

    rig: str
    pid: int
    estop_fd: int
    bundle: str = ""

    @property
    def socket(self) -> Path:
        """Its control socket."""
        return folder() / f"{self.rig}.sock"

    @property
    def estop(self) -> Path:
        """The emergency-stop page, through the supervisor's own table: it is there although the supervisor hangs."""
        return Path("/proc") / str(self.pid) / "fd" / str(self.estop_fd)

    def write(self) -> None:
        """Say where it is."""
        path = folder() / f"{self.rig}.json"
        path.with_suffix(".new").write_text(
            json.dumps({"pid": self.pid, "estop_fd": self.estop_fd, "bundle": self.bundle})
        )
        path.with_suffix(".new").replace(path)

    def remove(self) -> None:
        """Say that it has ended."""
        for suffix in (".json", ".sock"):
            (folder() / f"{self.rig}{suffix}").unlink(missing_ok=True)


def runs() -> list[Run]:
    """Daemons of this user whose supervisor lives."""
    found = []
    for path in sorted(folder().glob("*.json")):
        try:
            values = json.loads(path.read_text())
            run = Run(path.stem, int(values["pid"]), int(values["estop_fd"]), str(values.get("bundle", "")))
        except (OSError, ValueError, KeyError):
            continue
        if Path("/proc", str(run.pid)).exists():
            found.append(run)
    return found


def find(rig: str | None) -> Run:
    """The daemon of a rig; without a name, the only one. Raises PlaceError."""
    here = runs()
    names = ", ".join(run.rig for run in here) or "none"
    if rig is not None:
        here = [run for run in here if run.rig == rig]
    if len(here) != 1:
        wanted = f"a running daemon of the rig {rig!r}" if rig else "one running daemon (name its rig with --rig)"
        raise PlaceError(f"found {names} running in {folder()}, expected {wanted}")
    return here[0]
