"""What the doctor looks at: files under a root folder, installed packages, quick commands. Tests bring their own."""

import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

COMMAND_SECONDS = 0.5

Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Line:
    """One finding. ``remedy`` says what to do and is empty where all is well."""

    check: str
    verdict: Verdict
    found: str
    remedy: str = ""


def installed(name: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def answered(command: Sequence[str]) -> str | None:
    """What a command prints, or None where it is missing, fails or takes too long."""
    try:
        done = subprocess.run(  # noqa: S603  # commands of ours, no shell
            list(command), capture_output=True, text=True, timeout=COMMAND_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def free_bytes(path: Path) -> int:
    """Bytes that may still be written below a path."""
    facts = os.statvfs(path)
    return facts.f_bavail * facts.f_frsize


@dataclass(frozen=True)
class Machine:
    """A computer, or a folder that looks like one."""

    root: Path = Path("/")
    version: Callable[[str], str | None] = installed
    answer: Callable[[Sequence[str]], str | None] = answered
    free: Callable[[Path], int] = free_bytes
    writable: Callable[[Path], bool] = field(default=lambda path: os.access(path, os.W_OK))

    def path(self, absolute: str) -> Path:
        """Where an absolute path lies below the root."""
        return self.root / absolute.lstrip("/")

    def text(self, absolute: str) -> str | None:
        """What a file says, or None where it cannot be read."""
        try:
            return self.path(absolute).read_text(errors="replace").strip("\0 \n")
        except OSError:
            return None

    def glob(self, pattern: str) -> list[Path]:
        """Files below the root that match, in order."""
        return sorted(self.root.glob(pattern.lstrip("/")))

    def said(self, path: Path) -> str | None:
        """What a file that `glob` found says."""
        try:
            return path.read_text(errors="replace").strip("\0 \n")
        except OSError:
            return None
