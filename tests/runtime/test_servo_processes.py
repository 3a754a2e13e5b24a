"""The servo plane as processes: what is stopped, killed or silent while the arms move, and what happens then.

Times are judged in ticks and by host stamps in the records, not by this test's own clock: the machine may be busy.
"""

import signal
import time
from dataclasses import replace

import numpy as np
import pytest
from support.process_rig import LEASE_MS, ProcessRig
from support.virtual_rig import joint_plan

from chatvla_edge.runtime.histogram import SNAPSHOT, Histogram
from chatvla_edge.runtime.servo_records import REASONS

AXES = 3
ROWS = np.arange(50)


def plan_of(arms=1):
    """200 Hz, with budgets that a stall of a tenth of a second on a shared machine does not use up."""
    plan = joint_plan(arms=arms, axes=AXES, rate=200.0, gap=0.25, approach_speed=0.3)
    return replace(plan, arms=tuple(replace(arm, state_budget=0.3) for arm in plan.arms))


def wave(arms=1):
    axes = arms * AXES

    def path(tau):
        due = tau + ROWS * 0.02
        return np.stack([0.3 * np.sin(1.5 * due + 0.3 * i) for i in range(axes)], axis=1)

    return path


def moved(rows):
    """Which rows differ from the one before."""
    return np.append(False, (np.diff(rows["limited"], axis=0) != 0).any(axis=1))


def stop_ticks(rows, reason):
    """Ticks from the first that knew ``reason`` to the last that moved."""
    known = np.nonzero(rows["reasons"] >> REASONS.index(reason) & 1)[0]
    began = known[rows["doing"][known] > 0][0]
    return int(np.nonzero(moved(rows))[0][-1] - began)


def test_from_arming_to_a_silent_policy():
    with ProcessRig(plan_of(), start=[0.3, -0.2, 0.0]) as rig:
        rig.run_policy(wave(), 0.3)
        assert rig.doing == "idle"
        assert rig.device_doing() == "idle"
        rig.start_tracking(wave())
        rig.run_policy(wave(), 1.5)
        assert rig.doing == "tracking"
        assert rig.device_doing() == "following"
        rig.until(lambda: rig.doing == "standing", "rest")
        assert rig.reasons & {"starved", "chunk_stale"}
        tick = int(rig.status["tick"])
        rig.until(lambda: int(rig.status["tick"]) > tick + 100, "ticks")
        rows = rig.telemetry()
        assert not moved(rows[-50:]).any()
        assert rig.device_doing() == "following"  # commands flow, and say: stay
        assert rig.violations() == {}
        # The arm went where it was told, a lag behind.
        assert np.abs(rows["measured"][-1] - rows["limited"][-1]).max() < 1e-3


def test_a_published_chunk_is_used_by_the_first_tick_that_starts_after_it():
    with ProcessRig(plan_of()) as rig:
        rig.start_tracking(wave())
        posted = []
        for _ in range(30):
            tau = float(rig.status["tau"])
            number = rig.post(wave()(tau), tau)
            posted.append((number, rig.segments.chunks.take().published_ns))
            time.sleep(0.033)
        rig.telemetry()
        rows = rig.telemetry()
        starts = rows["tick_ns"] + rows["late_ns"]
        for number, published in posted[:-1]:
            first = np.nonzero(starts > published)[0][0]
            assert rows["chunk"][first] >= number
        assert rig.violations() == {}


@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_supervisor_that_is_gone_ends_the_motion_with_its_lease(signal_):
    with ProcessRig(plan_of()) as rig:
        rig.start_tracking(wave())
        rig.run_policy(wave(), 0.5)
        rig.keeper.send_signal(signal_)
        ended = time.monotonic_ns()
        rig.run_policy(wave(), 0.3)
        rig.until(lambda: rig.doing == "standing", "rest")
        rows = rig.telemetry()
        knew = rows[(rows["reasons"] >> REASONS.index("no_lease") & 1 > 0) & (rows["doing"] > 0)][0]
        assert int(knew["tick_ns"]) - ended < (LEASE_MS + 50) * 1_000_000
        # 0.35 s along the path at these tau limits, in ticks of 5 ms.
        assert stop_ticks(rows, "no_lease") <= 80
        # The device has seen the lease end, too, and after the longest stop stops for itself.
        rig.until(lambda: rig.device_doing() == "stopped", "stop action")
        assert rig.device_faults() == {"lease"}
        assert rig.violations() == {}


def test_the_emergency_stop_needs_no_supervisor():
    with ProcessRig(plan_of()) as rig:
        rig.start_tracking(wave())
        rig.run_policy(wave(), 0.5)
        rig.keeper.send_signal(signal.SIGSTOP)
        rig.segments.estop.raise_stop()
        rig.until(lambda: "estop" in rig.reasons and rig.doing == "standing", "rest")
        rows = rig.telemetry()
        assert stop_ticks(rows, "estop") <= 40  # each axis by itself: well under 0.2 s
        rig.until(lambda: rig.device_doing() == "stopped", "stop action")
        assert rig.device_faults() == {"estop"}
        assert rig.violations() == {}


def test_a_killed_servo_is_stopped_by_the_device():
    with ProcessRig(plan_of()) as rig:
        rig.start_tracking(wave())
        rig.run_policy(wave(), 0.5)
        rig.servo.kill()
        rig.servo.wait()
        rig.until(lambda: rig.device_doing() == "holding", "hold")
        assert rig.device_faults() == {"silence"}
        rows = rig.history()
        braking = rows[rows["doing"] == 2]
        v = np.diff(braking["sent"][:, :AXES], axis=0) * rig.plan.rate
        a = np.diff(v, axis=0) * rig.plan.rate
        limits = rig.plan.arms[0].limits
        assert np.abs(a).max(initial=0) <= limits.acceleration[0] * 1.001
        held = rows[rows["doing"] == 3]
        assert (held["sent"][:, :AXES] == held["sent"][0, :AXES]).all()
        rig.until(lambda: rig.device_doing() == "stopped", "stop action")


def test_a_dead_arm_stops_the_other():
    with ProcessRig(plan_of(arms=2)) as rig:
        rig.start_tracking(wave(2))
        rig.run_policy(wave(2), 0.5)
        rig.devices[1].kill()
        rig.devices[1].wait()
        rig.run_policy(wave(2), 0.4)
        rig.until(lambda: rig.doing == "standing", "rest")
        assert "state_stale" in rig.reasons
        assert stop_ticks(rig.telemetry(), "state_stale") <= 80
        assert rig.violations() == {}
        held = rig.telemetry()["limited"][-1]
        rig.run_policy(wave(2), 0.5)
        assert (rig.telemetry()["limited"][-1] == held).all()


def test_sigterm_brings_the_arms_to_rest_first():
    with ProcessRig(plan_of()) as rig:
        rig.start_tracking(wave())
        rig.run_policy(wave(), 0.5)
        rig.servo.terminate()
        assert rig.servo.wait(timeout=10) == 0
        assert not moved(rig.telemetry()[-2:]).any()
        assert rig.violations() == {}
        rig.until(lambda: rig.device_doing() == "idle", "let go")
        rig.devices[0].terminate()
        assert rig.devices[0].wait(timeout=10) == 0


def test_every_deadline_is_met_or_counted():
    with ProcessRig(plan_of()) as rig:
        time.sleep(0.5)
        rig.servo.send_signal(signal.SIGSTOP)
        time.sleep(0.1)
        rig.servo.send_signal(signal.SIGCONT)
        tick = int(rig.status["tick"])
        rig.until(lambda: int(rig.status["tick"]) > tick + 50, "ticks")
        status, rows = rig.status, rig.telemetry()
        assert int(status["overruns"]) >= 15
        # Deadlines lie whole periods apart, and what is missing between them has been counted.
        steps = np.diff(rows["tick_ns"])
        assert (steps % rig.plan.period_ns == 0).all()
        assert steps.min() == rig.plan.period_ns  # never bunched
        skipped = int((steps // rig.plan.period_ns - 1).sum())
        assert skipped <= int(status["overruns"]) <= skipped + 5  # those before the first tick, and after the last row
        # Once a second the histograms are published for whoever shows them.
        rig.until(lambda: rig.segments.histograms.sequence > 0, "histograms")
        data, _ = rig.segments.histograms.read()
        lateness = Histogram.of(data[: SNAPSHOT.itemsize])
        assert lateness.total > 0
