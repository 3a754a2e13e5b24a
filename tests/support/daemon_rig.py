"""A whole daemon on simulated devices, as its operator has it: started by the command line, asked over the socket."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import yaml

from chatvla_edge.drivers import rig as rigs
from chatvla_edge.drivers.sim.faults import switch
from chatvla_edge.runtime import servo_plan
from chatvla_edge.runtime.daemon import control, log_file, places
from support import limit_oracle

# Slower than the real ones where that shows nothing: the tests run beside other work on two cores.
COMMAND = str(Path(sys.executable).parent / "chatvla-edge")

RATES = {"camera": 15, "device": 200, "servo": 200}


def rig_file(folder, lag=None, **changes):
    """The simulated ARX rig with fault switches, written to ``folder``; ``changes`` of its top-level entries."""
    rig = yaml.safe_load(rigs.find("sim_arx_r5_bimanual").read_text())
    rig["name"] = f"t{os.getpid()}_{time.monotonic_ns() % 10**9}"
    rig["cameras"]["top"]["rate"] = RATES["camera"]
    rig["cameras"]["top"]["options"]["fault_switch"] = str(folder / "top.fault")
    arms = {}
    for name in ("left", "right"):
        arm = json.loads(json.dumps(rig["arms"][name]))
        arm["rate"] = RATES["device"]
        arm["options"]["fault_switch"] = str(folder / f"{name}.fault")
        arm["options"]["start"] = [0.1, 0.5, 0.5, 0.1, 0.1, 0.1, 0.04]
        arm["limits"]["lag"] = lag
        arms[name] = arm
    rig["arms"] = arms
    rig["servo"]["rate"] = RATES["servo"]
    rig["policy"]["cycle"] = 0.4
    for key, value in changes.items():
        rig[key] = {**rig[key], **value} if isinstance(rig.get(key), dict) else value
    path = folder / "rig.yaml"
    path.write_text(yaml.safe_dump(rig, sort_keys=False))
    return path


class DaemonRig:
    """Use as a context manager; on leaving, the daemon is ended and whatever is left of it killed."""

    def __init__(self, folder, bundle, *arguments, instruction="pick the card", **changes):
        self.folder = Path(folder)
        self.session = self.folder / "session"
        self.run_folder = self.folder / "run"
        self.run_folder.mkdir(exist_ok=True)
        self.file = rig_file(self.folder, **changes)
        self.name = yaml.safe_load(self.file.read_text())["name"]
        environment = {**os.environ, "CHATVLA_EDGE_RUN": str(self.run_folder)}
        command = [COMMAND, "run", str(self.file), "--bundle", str(bundle)]
        command += ["--folder", str(self.session), "--instruction", instruction, "--frame-rate", "5", *arguments]
        self.output = (self.folder / "output").open("wb")
        self.process = subprocess.Popen(command, env=environment, stdout=self.output, stderr=self.output)
        os.environ["CHATVLA_EDGE_RUN"] = str(self.run_folder)

    def __enter__(self):
        self.until(lambda: self.socket.exists(), "the control socket", 60)
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    @property
    def socket(self):
        return self.run_folder / f"{self.name}.sock"

    @property
    def said(self):
        return (self.folder / "output").read_text(errors="replace")

    def pids(self):
        """Living processes of this run: those that hold the session folder's logs or were started by its supervisor."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                stderr = (path / "fd" / "2").readlink()
                if stderr.parent == self.session / "logs":
                    found.append(int(path.name))
        return found

    def child(self, name):
        """Process id of a child by its log's name, `servo` or `device_left`."""
        log = self.session / "logs" / f"{name}.log"
        for pid in self.pids():
            with suppress(OSError):
                if Path(f"/proc/{pid}/fd/2").readlink() == log:
                    return pid
        raise AssertionError(f"no child {name}")

    # ------------------------------------------------------------------------------------------------------- operator

    def ask(self, act, **more):
        return control.ask(self.socket, {"act": act, **more}, timeout=10)

    @property
    def status(self):
        return self.ask("status")

    @property
    def mode(self):
        return self.status["mode"]

    def until(self, done, what, at_most=30.0):
        end = time.monotonic() + at_most
        while not done():
            assert self.process.poll() is None, f"the daemon has ended: {self.said[-3000:]}"
            if time.monotonic() > end:
                status = self.status if self.socket.exists() else {}
                raise AssertionError(f"{what}: {status.get('mode')}, {status.get('reasons')}, {self.said[-2000:]}")
            time.sleep(0.02)

    def until_mode(self, *modes, at_most=30.0):
        self.until(lambda: self.mode in modes, f"mode {modes}", at_most)

    def arm(self):
        """Armed, and tracking what the policy says."""
        if self.status["servo"]["doing"] == "tracking":
            return
        self.until_mode("READY")
        self.until(lambda: self.ask("arm")["ok"], "arm")
        self.until(
            lambda: self.status["servo"]["doing"] == "tracking" or self.mode not in ("ACTIVE", "HOLD"),
            "tracking",
            60,
        )
        assert self.status["servo"]["doing"] == "tracking", self.status["causes"]

    def fault(self, device, word=""):
        switch(self.folder / f"{device}.fault", word)

    def measured(self):
        return np.array([number for device in self.status["devices"] for number in device["measured"]], float)

    def standing(self, seconds=0.4):
        """Whether no axis that tells its position moves for a while."""
        before = self.measured()
        time.sleep(seconds)
        moved = np.abs(self.measured() - before)
        return bool((moved[np.isfinite(moved)] < 1e-3).all())

    def end(self):
        """SIGTERM, and its summary."""
        self.process.terminate()
        assert self.process.wait(30) == 0, self.said[-3000:]
        return json.loads((self.session / "summary.json").read_text())

    # ------------------------------------------------------------------------------------------------------------ log

    def ticks(self):
        return log_file.rows(self.session, "/ticks")

    def events(self):
        return [message.json() for message in log_file.messages(self.session, ("/events",))]

    def gaps(self):
        return [message.json() for message in log_file.messages(self.session, ("/gaps",))]

    def every_tick_is_accounted_for(self):
        """Numbers of ticks in the log and inside of gaps, none missing and none twice."""
        numbers = self.ticks()["tick"].astype(np.int64)
        inside = sum(gap["to"] - gap["from"] + 1 for gap in self.gaps() if gap["to"] >= gap["from"])
        assert len(np.unique(numbers)) == len(numbers)
        return len(numbers) + inside == int(numbers.max()) - (0 if inside else int(numbers.min()) - 1)

    def violations(self):
        """Limits broken by what was sent, judged at the ticks' own times by the oracle; {} for none.

        Up to the first gap of the log: behind one the oracle cannot know how fast the arms were.
        """
        rows = self.ticks()
        whole = np.diff(rows["tick"].astype(np.int64)) == 1
        rows = rows[: len(rows) if whole.all() else int(np.argmin(whole)) + 1]
        plan = servo_plan.from_json(log_file.metadata(self.session)["plan"])
        found = {}
        # Each stretch of commands begins at rest, from where the arms were found: they may have been moved in between.
        moving = np.concatenate([[False], rows["doing"] > 0, [False]])
        edges = np.flatnonzero(moving[1:] != moving[:-1])
        for first, last in zip(edges[::2], edges[1::2], strict=True):
            if last - first < 2:
                continue
            at = 0
            for arm in plan.arms:
                limits = arm.limits
                bounds = limit_oracle.Bounds(
                    np.array(limits.lower), np.array(limits.upper), np.array(limits.velocity),
                    np.array(limits.acceleration), np.array(limits.jerk), plan.period_ns,
                    gap_ns=round(1e9 * plan.gap),
                )  # fmt: skip
                sent = rows["limited"][first:last, at : at + arm.axes]
                ticks = rows["tick_ns"][first:last]
                at += arm.axes
                counts = limit_oracle.violations(bounds, sent[0], int(ticks[0]), ticks[1:], sent[1:])
                for kind, count in counts.items():
                    if count:
                        found[f"{arm.name} {kind}"] = found.get(f"{arm.name} {kind}", 0) + count
        return found


STALLS = {"servo lost", "device lost", "lease lapsed", "servo late", "state stale", "frame stale"}


def on_a_machine_that_runs(test):
    """Repeat a test during which the whole machine stood still, as shared ones do for a third of a second.

    The daemon then rightly disarms, and nothing is learnt. Only a failure whose log shows such a stall is repeated.
    """

    @functools.wraps(test)
    def repeated(tmp_path, bundle):
        for attempt in range(3):
            folder = tmp_path / str(attempt)
            folder.mkdir()
            try:
                return test(folder, bundle)
            except AssertionError:
                if attempt == 2 or not _stalled(folder):
                    raise
        return None

    return repeated


def _stalled(folder):
    """Whether servo, devices and cameras were all late at once: no fault of one of them looks like that."""
    with suppress(ValueError):
        by_time = {}
        for message in log_file.messages(folder / "session", ("/events",)):
            event = message.json()
            if event["kind"] == "reason" and event["name"] in STALLS:
                by_time.setdefault(event["at_ns"], set()).add(event["name"])
        return any(len(names) >= 2 or "lease lapsed" in names for names in by_time.values())
    return False


def raise_estop(name):
    """As `chatvla-edge estop` does: past the supervisor."""
    from chatvla_edge.runtime.daemon.commands import _raise

    _raise(places.find(name))
