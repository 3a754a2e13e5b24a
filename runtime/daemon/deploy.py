"""Which bundle a robot runs: a symbolic link, switched in one step, with the one before kept for the way back.

    /var/lib/chatvla-edge/bundle           -> /srv/bundles/b
    /var/lib/chatvla-edge/bundle.previous  -> /srv/bundles/a

A link is replaced by renaming another one over it, so at any instant it leads to the old bundle or to the new one,
whoever is killed and whenever the power goes. What is checked is checked before that, by the very command that an
operator has for it, in a process of its own: an engine that crashes or hangs while it loads takes nothing with it.
"""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatvla_edge.runtime.bundle import open_bundle
from chatvla_edge.runtime.daemon import places

CHECK_SECONDS = 1800.0
VERIFY = (sys.executable, "-c", "from chatvla_edge.runtime.cli import main; main()", "verify")

Check = Callable[[Path], dict[str, Any]]


class DeployError(ValueError):
    """The link stays as it was; the message says why, and what to do."""


@dataclass(frozen=True)
class Switched:
    """What a link leads to now, and what `rollback` would bring back; ``gates``: verdict -> how many."""

    link: Path
    bundle: Path
    previous: Path | None
    seal: str
    gates: dict[str, int]


def use(bundle: Path, link: Path, *, check: Check, while_running: bool = False) -> Switched:
    """Let ``link`` lead to ``bundle`` once ``check`` has nothing against it; what it led to becomes the previous one.

    Raises DeployError, and what opening a bundle raises.
    """
    link, bundle = _absolute(link), bundle.resolve()
    _refuse_no_link(link)
    _refuse_running(link, while_running)
    found = _checked(bundle, check)
    with _alone(link):
        before = target(link)
        # The previous one first: killed in between, the link still leads to what it led to.
        if before is not None and before != bundle:
            _point(previous(link), before)
        _point(link, bundle)
        return Switched(link, bundle, target(previous(link)), *found)


def rollback(link: Path, *, check: Check, while_running: bool = False) -> Switched:
    """Let ``link`` lead to the bundle before; a second rollback undoes the first. Raises DeployError, as `use` does."""
    link = _absolute(link)
    _refuse_no_link(link)
    _refuse_running(link, while_running)
    now, before = target(link), target(previous(link))
    if before is None or before == now:
        found_there = "no such link" if before is None else f"the bundle in use, {now}"
        raise DeployError(
            f"{previous(link)}: found {found_there}, expected the bundle before it. Name one yourself: "
            f"chatvla-edge bundle use BUNDLE --link {link}"
        )
    found = _checked(before, check)
    with _alone(link):
        if (target(link), target(previous(link))) != (now, before):
            raise DeployError(f"{link}: somebody else switched it meanwhile. Look at it, and ask again")
        # The link first: killed in between, the robot has the bundle that was asked for.
        _point(link, before)
        if now is not None:
            _point(previous(link), now)
    return Switched(link, before, target(previous(link)), *found)


def verify(seconds: float = CHECK_SECONDS, threads: int = 1) -> Check:
    """The health check: digests, then the bundle's own probes through its gates, on this computer, within ``seconds``.

    Returns a check that returns verdict -> how many gates, and raises DeployError.
    """

    def check(bundle: Path) -> dict[str, Any]:
        try:
            ran = subprocess.run(  # noqa: S603  # our own interpreter, our own command
                [*VERIFY, str(bundle), "--json", "--threads", str(threads)],
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise DeployError(
                f"{bundle}: the check was not done after {seconds:g} s. Give it longer with --check-seconds; if it "
                "never ends, the engine hangs on this computer"
            ) from None
        try:
            results = json.loads(ran.stdout)["gates"]
        except (ValueError, KeyError, TypeError):
            said = ran.stderr.strip() or f"exit code {ran.returncode}, and no word"
            raise DeployError(f"{bundle}: the check did not come to a verdict: {said}") from None
        failed = [
            f"{gate['name']} {'no number' if gate['value'] is None else format(gate['value'], '.3g')} "
            f"(at most {gate['limit']:.3g})"
            for gate in results
            if gate["verdict"] == "failed"
        ]
        if failed or ran.returncode:
            raise DeployError(
                f"{bundle}: gates failed on this computer: {', '.join(failed) or f'exit code {ran.returncode}'}. "
                f"`chatvla-edge verify {bundle}` tells what each means"
            )
        verdicts = [str(gate["verdict"]) for gate in results]
        return {verdict: verdicts.count(verdict) for verdict in sorted(set(verdicts))}

    return check


def target(link: Path) -> Path | None:
    """Where a link leads; None where there is none. Not resolved: the bundle may be gone."""
    try:
        return Path(os.path.normpath(link.parent / link.readlink()))
    except OSError:
        return None


def previous(link: Path) -> Path:
    """The link beside it that keeps the way back."""
    return link.with_name(f"{link.name}.previous")


def _absolute(link: Path) -> Path:
    """The link's own path: its folder resolved, itself not."""
    return link.parent.resolve() / link.name


def _checked(bundle: Path, check: Check) -> tuple[str, dict[str, int]]:
    """The seal of a bundle that ``check`` has nothing against, and its verdicts."""
    with open_bundle(bundle, verify=False) as opened:
        seal = opened.seal
    verdicts = check(bundle)
    with open_bundle(bundle, verify=False) as opened:
        if opened.seal != seal:
            raise DeployError(
                f"{bundle}: its manifest changed while it was checked. Let nobody write it, and ask again"
            )
    return seal, verdicts


def _refuse_no_link(link: Path) -> None:
    for path in (link, previous(link)):
        if path.exists() and not path.is_symlink():
            kind = "a directory" if path.is_dir() else "a file"
            raise DeployError(f"{path}: found {kind}, expected a symbolic link or nothing. Name another --link")


def _refuse_running(link: Path, allowed: bool) -> None:
    """Raise where a daemon of this user was started from the link."""
    running = [run for run in places.runs() if run.bundle and _absolute(Path(run.bundle)) == link]
    if running and not allowed:
        rigs = ", ".join(f"{run.rig} (process {run.pid})" for run in running)
        raise DeployError(
            f"{link}: running from it: {rigs}. The check would take computing time from a robot. End the daemon first "
            "(`chatvla-edge quit`), or say --while-running: what runs keeps its bundle, the next start takes the other"
        )


@contextmanager
def _alone(link: Path) -> Iterator[None]:
    """Nobody else switches links of this folder meanwhile; what was switched is on disk afterwards."""
    folder = os.open(link.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
        os.fsync(folder)
    finally:
        os.close(folder)


def _point(link: Path, bundle: Path) -> None:
    """Let a link lead to a bundle, in one step."""
    new = link.with_name(f"{link.name}.new")
    new.unlink(missing_ok=True)  # of one that was killed here
    new.symlink_to(bundle, target_is_directory=True)
    new.replace(link)
