"""The daemon as its operator has it: every word tested by what the arms do, not by what is answered."""

import json
import os
import signal
import subprocess
import time

import numpy as np
import pytest
from support.daemon_rig import COMMAND, DaemonRig, on_a_machine_that_runs, raise_estop

pytestmark = pytest.mark.slow


@on_a_machine_that_runs
def test_a_run_from_arm_to_end(tmp_path, bundle):
    with DaemonRig(tmp_path, bundle) as rig:
        rig.until_mode("READY", at_most=60)
        assert rig.standing()
        before = rig.measured()

        rig.arm()
        rig.until(lambda: np.abs(rig.measured() - before).max() > 0.05, "motion")

        assert rig.ask("hold")["ok"]
        rig.until_mode("HOLD")
        rig.until(rig.standing, "standing in HOLD")
        assert rig.ask("resume")["ok"]
        rig.until(lambda: rig.status["servo"]["doing"] == "tracking", "tracking again", 60)

        assert rig.ask("speed", speed=0.5)["ok"]
        rig.until(lambda: abs(rig.status["servo"]["tau_rate"] - 0.5) < 0.01, "half speed")
        assert not rig.ask("speed", speed=2)["ok"]

        assert rig.ask("instruct", text="something else")["ok"]
        queries = rig.status["policy"]["queries"]
        rig.until(lambda: rig.status["policy"]["queries"] > queries + 1, "answers to it")
        assert rig.status["instruction"] == "something else"

        assert rig.ask("stop")["ok"]
        rig.until_mode("DISARMED", "READY")
        rig.until(rig.standing, "standing after stop")

        rig.until_mode("READY")
        assert rig.ask("home")["ok"]
        rig.until(lambda: "home" in rig.status["servo"]["reasons"] and rig.standing(), "home", 60)
        home = [0.0, 0.9, 0.9, 0.0, 0.0, 0.0, 0.08]
        assert np.abs(rig.measured() - np.array(home * 2)).max() < 0.01

        assert rig.ask("park")["ok"]
        rig.until_mode("READY", "DISARMED", at_most=60)
        assert np.abs(rig.measured()).max() < 0.01

        words = rig.ask("log", count=200)["lines"]
        assert {line["kind"] for line in words} >= {"start", "mode", "request", "instruct"}
        summary = rig.end()
    assert rig.pids() == []
    assert summary["simulated"]
    assert rig.violations() == {}
    assert rig.every_tick_is_accounted_for()
    assert not any(event["name"] == "FAULT" for event in rig.events())
    texts = [message for message in rig.events() if message["kind"] == "instruct"]
    assert texts[-1]["text"] == "something else"


@on_a_machine_that_runs
def test_the_emergency_stop_acts_past_a_supervisor_that_hangs(tmp_path, bundle):
    with DaemonRig(tmp_path, bundle) as rig:
        rig.until_mode("READY", at_most=60)
        rig.arm()
        os.kill(rig.process.pid, signal.SIGSTOP)
        raise_estop(rig.name)
        time.sleep(2)
        os.kill(rig.process.pid, signal.SIGCONT)
        rig.until_mode("FAULT")
        assert rig.standing()
        assert any("e-stop" in reason for reason in rig.status["reasons"])
        assert not rig.ask("arm")["ok"]
        assert not rig.ask("clear", seen=0)["ok"]
        assert rig.ask("clear", seen=rig.status["estop_count"])["ok"]
        rig.until_mode("READY")
        assert rig.standing()
    assert rig.violations() == {}


@on_a_machine_that_runs
def test_a_dry_run_moves_nothing_and_says_so(tmp_path, bundle):
    with DaemonRig(tmp_path, bundle, "--dry-run") as rig:
        rig.until_mode("READY", at_most=60)
        before = rig.measured()
        rig.arm()
        time.sleep(1)
        assert rig.status["servo"]["tau"] > 0.2
        assert np.abs(rig.measured() - before).max() < 1e-6
        assert rig.status["kind"] == "dry"


@on_a_machine_that_runs
def test_a_second_daemon_is_refused_and_the_first_goes_on(tmp_path, bundle):
    with DaemonRig(tmp_path, bundle) as rig:
        rig.until_mode("READY", at_most=60)
        command = [COMMAND, "run", str(rig.file), "--bundle", str(bundle), "--folder", str(tmp_path / "other")]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert ran.returncode != 0
        assert f"driven by process {rig.process.pid}" in ran.stderr
        assert rig.mode == "READY"


@on_a_machine_that_runs
def test_a_rig_whose_device_is_not_there_says_which_and_why(tmp_path, bundle):
    rig = DaemonRig(tmp_path, bundle)
    rig.fault("left", "unplugged")
    try:
        assert rig.process.wait(60) != 0
        assert "device left did not start" in rig.said
        assert "unplugged on purpose" in rig.said
        assert rig.pids() == []
    finally:
        rig.__exit__()


@on_a_machine_that_runs
def test_the_summary_is_one_file_of_json(tmp_path, bundle):
    with DaemonRig(tmp_path, bundle, "--duration", "2", "--json") as rig:
        assert rig.process.wait(40) == 0
    summary = json.loads((rig.session / "summary.json").read_text())
    assert {stream["name"] for stream in summary["streams"]} == {
        "camera top",
        "device left",
        "device right",
        "servo",
        "policy",
    }
