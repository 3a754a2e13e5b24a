"""Faults injected into a running daemon on simulated devices: what it does, how soon, and how it goes on.

Judged by the arms: whatever happens, what was sent keeps every limit, no arm moves after a fault before the next `arm`,
and every tick of the servo is in the log or inside a numbered gap. The budgets are those of docs/SAFETY.md plus what it
takes to look.
"""

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from support.daemon_rig import DaemonRig, on_a_machine_that_runs

pytestmark = pytest.mark.slow

LOOK = 1.5  # s: what a loaded machine takes to show a change on the control socket


@dataclass(frozen=True)
class Fault:
    """``inject`` and ``end`` act on the rig, which must be in one of ``modes`` ``within`` s; ``goes_on``: by itself."""

    name: str
    inject: object
    end: object
    modes: tuple
    within: float
    goes_on: bool
    says: str = ""
    slack: float = 1e-3  # rad: how far an arm may move when its fault ends


def device(name, word):
    return lambda rig: rig.fault(name, word)


def well(name):
    return lambda rig: rig.fault(name)


def signalled(child, number):
    return lambda rig: os.kill(rig.child(child), number)


def nothing(rig):
    """It ends by itself."""


STOP, CONT, KILL = signal.SIGSTOP, signal.SIGCONT, signal.SIGKILL

# What a running daemon gets over, one after the other in the same run.
FAULTS = [
    Fault("camera silent", device("top", "silent"), well("top"), ("HOLD",), 1.0, True, "frame stale (top)"),
    Fault("camera frozen", device("top", "frozen"), well("top"), ("HOLD",), 4.0, True, "frame stale (top)"),
    Fault("camera unplugged", device("top", "unplugged"), well("top"), ("HOLD",), 1.0, True, "frame stale (top)"),
    Fault("camera killed", signalled("camera_top", KILL), nothing, ("HOLD",), 1.0, True, "camera died (top)"),
    Fault("camera stopped", signalled("camera_top", STOP), signalled("camera_top", CONT), ("HOLD",), 1.0, True),
    Fault("policy killed", signalled("policy", KILL), nothing, ("HOLD",), 1.0, True, "policy died"),
    Fault("policy stopped", signalled("policy", STOP), signalled("policy", CONT), ("HOLD",), 3.0, True, "chunk stale"),
    Fault(
        "arm silent", device("left", "silent"), well("left"), ("SOFT_STOP", "FAULT"), 1.0, False, "state stale", 0.01
    ),
    Fault("arm says nan", device("right", "nan"), well("right"), ("SOFT_STOP", "DISARMED", "FAULT"), 1.0, False),
    Fault("arm reports a fault", device("left", "fault"), well("left"), ("FAULT",), 1.0, False, "device fault (left)"),
    Fault("driver raises", device("right", "error"), well("right"), ("FAULT",), 1.0, False, "(right)"),
    Fault(
        "arm stands still", device("left", "frozen"), well("left"), ("FAULT",), 20.0, False, "not following (left)", 0.1
    ),
]


@on_a_machine_that_runs
def test_one_run_survives_them_all(tmp_path, bundle):
    with DaemonRig(tmp_path, bundle, lag=[0.12] * 6 + [0.03]) as rig:
        for fault in FAULTS:
            survive(rig, fault)
        rig.end()
    assert rig.violations() == {}
    assert rig.every_tick_is_accounted_for()


def survive(rig, fault):
    """One fault, from tracking to tracking."""
    rig.arm()
    fault.inject(rig)
    rig.until(lambda: rig.mode in fault.modes, f"{fault.name}: {fault.modes}", fault.within + LOOK)
    status = rig.status
    said = [*status["reasons"], *status["causes"], *(line["text"] for line in rig.ask("log", count=30)["lines"])]
    assert any(fault.says in text for text in said), (fault.name, said)
    # A process that is quickly there again may have ended the hold before the arms have stood for long.
    rig.until(lambda: rig.standing() or (fault.goes_on and rig.mode == "ACTIVE"), f"{fault.name}: standing")
    assert not rig.ask("arm")["ok"] or rig.mode == "ACTIVE", fault.name
    fault.end(rig)
    if fault.goes_on:
        rig.until(lambda: rig.status["servo"]["doing"] == "tracking", f"{fault.name}: tracking again", 40)
        return
    still = rig.measured()
    time.sleep(0.5)
    now = rig.measured()
    both = np.isfinite(still) & np.isfinite(now)
    assert np.abs(still - now)[both].max() < fault.slack, f"{fault.name}: it moved without a new `arm`"
    if rig.mode == "FAULT":
        assert rig.ask("clear", seen=rig.status["estop_count"])["ok"]
    rig.until_mode("READY")


@on_a_machine_that_runs
def test_a_recorder_that_dies_or_hangs_stops_no_motion_and_loses_no_tick_unsaid(tmp_path, bundle):
    with DaemonRig(tmp_path, bundle) as rig:
        rig.arm()
        os.kill(rig.child("recorder"), STOP)
        time.sleep(2)
        assert rig.mode == "ACTIVE"
        os.kill(rig.child("recorder"), CONT)
        time.sleep(1)
        os.kill(rig.child("recorder"), KILL)
        rig.until(lambda: any("recorder died" in line["text"] for line in rig.ask("log")["lines"]), "noticed")
        assert rig.mode == "ACTIVE"
        rig.until(lambda: "recorder died" not in str(rig.status["reasons"]), "started anew")
        time.sleep(1)
        assert rig.mode == "ACTIVE"
        rig.end()
    assert rig.violations() == {}
    gaps = rig.gaps()
    assert [gap["number"] for gap in gaps][:1] == [1]
    # The one that was killed flushed within half a second; the one after it begins where it began.
    assert all(gap["why"] for gap in gaps)


@on_a_machine_that_runs
def test_a_full_disk_stops_no_motion_and_the_log_goes_on(tmp_path, bundle):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=320m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small disk")
    try:
        with DaemonRig(tmp_path, bundle, "--folder", str(disk / "session")) as rig:
            rig.session = disk / "session"
            rig.arm()
            (disk / "filler").write_bytes(bytes(100 * 2**20))
            rig.until(lambda: rig.status["recorder"]["disk_full"], "disk full", 20)
            assert rig.mode == "ACTIVE"
            time.sleep(1)
            (disk / "filler").unlink()
            rig.until(lambda: not rig.status["recorder"]["disk_full"], "room again", 20)
            time.sleep(1)
            assert rig.mode == "ACTIVE"
            rig.end()
        assert any("disk" in gap["why"] for gap in rig.gaps())
        assert rig.every_tick_is_accounted_for()
    finally:
        subprocess.run(["umount", "-l", disk], check=False)


# ---------------------------------------------------------------------------------- faults that end a run, one run each


@pytest.mark.parametrize("number", [KILL, STOP], ids=["killed", "stopped"])
def test_without_its_servo_the_arms_come_to_rest_by_themselves(tmp_path, bundle, number):
    @on_a_machine_that_runs
    def drill(tmp_path, bundle):
        with DaemonRig(tmp_path, bundle) as rig:
            rig.arm()
            os.kill(rig.child("servo"), number)
            rig.until_mode("FAULT", at_most=1 + LOOK)
            rig.until(rig.standing, "standing")
            assert not rig.ask("arm")["ok"]
            assert any("servo" in reason for reason in rig.status["reasons"])

    drill(tmp_path, bundle)


@on_a_machine_that_runs
def test_one_device_killed_stops_the_other_arm(tmp_path, bundle):
    with DaemonRig(tmp_path, bundle) as rig:
        rig.arm()
        os.kill(rig.child("device_left"), KILL)
        rig.until_mode("FAULT", at_most=1 + LOOK)
        rig.until(rig.standing, "the other stands")
        reasons = rig.status["reasons"]
        assert any(reason.startswith("device died (left)") and "signal SIGKILL" in reason for reason in reasons)
        time.sleep(1)
        with pytest.raises(AssertionError, match="no child"):
            rig.child("device_left")  # an arm is started anew by the operator only
    assert rig.violations() == {}


@on_a_machine_that_runs
def test_a_supervisor_that_stands_still_loses_the_lease(tmp_path, bundle):
    with DaemonRig(tmp_path, bundle) as rig:
        rig.arm()
        os.kill(rig.process.pid, STOP)
        time.sleep(1.5)
        os.kill(rig.process.pid, CONT)
        rig.until_mode("SOFT_STOP", "DISARMED", "READY", "FAULT")
        assert any("lease lapsed" in line["text"] for line in rig.ask("log", count=200)["lines"])
        rig.until(rig.standing, "standing")
        rig.ask("disarm")
        rig.until_mode("READY")
        rig.end()
    assert rig.violations() == {}


@on_a_machine_that_runs
def test_a_killed_supervisor_leaves_nothing_running_and_nothing_moving(tmp_path, bundle):
    with DaemonRig(tmp_path, bundle) as rig:
        rig.arm()
        rig.process.kill()
        rig.process.wait()
        end = time.monotonic() + 15
        while rig.pids() and time.monotonic() < end:
            time.sleep(0.1)
        assert rig.pids() == []
    assert rig.violations() == {}
    ticks = rig.ticks()
    assert ticks["doing"][-1] == 0 or np.abs(np.diff(ticks["limited"][-20:], axis=0)).max() < 1e-6


@on_a_machine_that_runs
def test_terminated_in_motion_it_stops_within_limits_first(tmp_path, bundle):
    with DaemonRig(tmp_path, bundle) as rig:
        rig.arm()
        begun = time.monotonic()
        rig.end()
        assert time.monotonic() - begun < 15
        assert rig.pids() == []
    assert rig.violations() == {}
    assert any(event["name"] == "SOFT_STOP" for event in rig.events())
    assert not Path(rig.socket).exists()
