"""A rig of real processes: servo, one device per arm, a keeper of the lease; the test is operator and policy."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from chatvla_edge.runtime.device_plan import DevicePlan
from chatvla_edge.runtime.mailbox import ChunkMailbox
from chatvla_edge.runtime.processes import start_device, start_servo
from chatvla_edge.runtime.rig_segments import RigSegments
from chatvla_edge.runtime.servo_records import (
    DEVICE_DOING,
    DEVICE_FAULTS,
    MODE,
    REASONS,
    SERVO_DOING,
    STATE,
    STATUS,
    WANTED,
    names,
    telemetry,
)
from chatvla_edge.runtime.slots import Slot
from support import limit_oracle

TESTS = Path(__file__).resolve().parents[1]
LEASE_MS = 200


class ProcessRig:
    """Use as a context manager; on leaving, every process is ended.

    ``drivers``: one (name in the registry, options) per arm, of real drivers; without it each arm is a `LagArm`.
    """

    def __init__(self, plan, start=None, drivers=None, **device):
        self.plan = plan
        self.segments = RigSegments.create(plan, telemetry_rows=16384, history_rows=16384)
        self.mode = np.zeros((), MODE)
        self.mode["speed"] = 1.0
        self.mode_slot = Slot.attach(self.segments.mode.fd, MODE.itemsize, write=True)
        self.policy = ChunkMailbox.attach(self.segments.chunks.fd, plan.horizon, len(plan.components), write=True)
        self.rows = self.segments.telemetry.reader()
        self.seen = []
        starts = np.zeros(plan.axes) if start is None else np.asarray(start, dtype=float)
        os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        self.devices = []
        at = 0
        for number, arm in enumerate(plan.arms):
            settings = {"silence": 0.25, "longest_stop": 0.6, "hold": 0.3} | device
            factory, arguments = "support.lag_arm:LagArm", {"start": starts[at : at + arm.axes].tolist()}
            if drivers is not None:
                name, options = drivers[number]
                factory, arguments = "support.real_driver:make", {"name": name, "options": options}
            device_plan = DevicePlan.of(arm, plan.rate, **settings)
            self.devices.append(start_device(device_plan, self.segments, number, factory, arguments))
            at += arm.axes
        self.servo = start_servo(plan, self.segments)
        lease = self.segments.lease.fd
        self.keeper = subprocess.Popen(
            [sys.executable, str(TESTS / "support" / "keeper.py"), str(lease), str(LEASE_MS)], pass_fds=[lease]
        )
        self.children = [*self.devices, self.servo, self.keeper]

    def __enter__(self):
        self.until(lambda: self.status["tick"] > 0 and not self.segments.lease.expired(), "start")
        self.until(lambda: all(self.state(arm)["axes"] for arm in range(len(self.devices))), "states")
        return self

    def __exit__(self, *_):
        for child in self.children:
            with suppress(ProcessLookupError):
                child.send_signal(signal.SIGCONT)
                child.kill()
            child.wait()

    # ------------------------------------------------------------------------------------------- operator and policy

    def want(self, wanted, *, arm=False):
        self.mode["wanted"] = WANTED.index(wanted)
        self.mode["arming"] += arm
        self.mode_slot.publish(self.mode)

    def post(self, actions, tau):
        return self.policy.publish(
            np.ascontiguousarray(actions), epoch=0, tau_observation=tau, first_step=0, dt=0.02,
            captured_ns=time.monotonic_ns(),
        )  # fmt: skip

    def run_policy(self, path, seconds):
        """Post ``path(tau)`` ten times a second."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            tau = float(self.status["tau"])
            self.post(path(tau), tau)
            time.sleep(0.1)

    def start_tracking(self, path):
        self.want("track", arm=True)
        end = time.monotonic() + 15
        while SERVO_DOING[int(self.status["doing"])] != "tracking":
            assert time.monotonic() < end, (self.doing, self.reasons)
            self.run_policy(path, 0.1)

    # -------------------------------------------------------------------------------------------------- what it is like

    @property
    def status(self):
        read = np.zeros((), STATUS)
        self.segments.status.read_into(read)
        return read

    @property
    def doing(self):
        return SERVO_DOING[int(self.status["doing"])]

    @property
    def reasons(self):
        return set(names(self.status["reasons"], REASONS))

    def state(self, arm=0):
        read = np.zeros((), STATE)
        self.segments.states[arm].read_into(read)
        return read

    def device_doing(self, arm=0):
        return DEVICE_DOING[int(self.state(arm)["doing"])]

    def device_faults(self, arm=0):
        return set(names(self.state(arm)["faults"], DEVICE_FAULTS))

    def telemetry(self):
        """Every row so far."""
        rows = np.zeros(16384, telemetry(len(self.plan.components), self.plan.axes))
        self.seen.append(rows[: self.rows.read(rows)])
        return np.concatenate(self.seen)

    def history(self, arm=0):
        """Every state that the device has published."""
        rows = np.zeros(16384, STATE)
        got = self.segments.histories[arm].last(rows)
        return rows[16384 - got :]

    def until(self, done, what, at_most=20.0):
        """Wait for ``done()``. The limit is for a test that hangs; timing is judged by ticks, not by this."""
        end = time.monotonic() + at_most
        while not done():
            dead = [child.args for child in self.children if child.poll() not in (None, 0, -9)]
            assert not dead, f"ended by itself: {dead}"
            assert time.monotonic() < end, f"{what}: {self.doing}, {self.reasons}"
            time.sleep(0.01)

    def violations(self):
        """Limits broken by what the servo let out, by kind, judged at the ticks' own deadlines; {} for none."""
        rows = self.telemetry()
        assert (np.diff(rows["tick"]) == 1).all()
        # From the last tick before the first arming on: there the arms stand where they are measured.
        rows = rows[max(0, np.nonzero(rows["doing"])[0][0] - 1) :]
        rows["limited"][0] = rows["measured"][0]
        found, at = {}, 0
        for arm in self.plan.arms:
            limits = arm.limits
            bounds = limit_oracle.Bounds(
                np.array(limits.lower), np.array(limits.upper), np.array(limits.velocity),
                np.array(limits.acceleration), np.array(limits.jerk), self.plan.period_ns,
                gap_ns=round(1e9 * self.plan.gap),
            )  # fmt: skip
            sent = rows["limited"][:, at : at + arm.axes]
            at += arm.axes
            if len(sent):
                counts = limit_oracle.violations(
                    bounds, sent[0], int(rows["tick_ns"][0]), rows["tick_ns"][1:], sent[1:]
                )
                found.update({f"{arm.name} {kind}": n for kind, n in counts.items() if n})
        return found
