"""The servo in virtual time: every reason to stop, each from full motion, judged by the limits' independent oracle."""

import math

import numpy as np
import pytest
from support.virtual_rig import VirtualRig, joint_plan

from chatvla_edge.runtime.servo_plan import FusionPlan

STEP = 0.02
ROWS = np.arange(50)


def wave(tau, axes=3, amplitude=0.4, omega=1.5):
    """A chunk [50, axes] of a smooth motion that is a function of tau, so that all chunks agree."""
    due = tau + ROWS * STEP
    return np.stack([amplitude * np.sin(omega * due + 0.3 * i) for i in range(axes)], axis=1)


def moving(plan=None, seconds=1.0):
    """A rig in full motion along the wave, with a policy that has just posted."""
    rig = VirtualRig(plan or joint_plan())
    axes = rig.plan.axes
    rig.start_tracking(wave(0, axes))
    for _ in range(round(seconds / 0.1)):
        rig.post(wave(rig.tau, axes))
        rig.seconds(0.1)
    assert rig.doing == "tracking"
    assert rig.reasons == set()
    return rig


def speed(rig, arm=0):
    a, b = rig.commands[arm][-2:]
    return float(np.max(np.abs(b - a)) * rig.plan.rate)


def stands(rig):
    return bool(rig.status["standing"])


# ---------------------------------------------------------------------------------------------------- before and after


def test_nothing_moves_before_an_arming():
    rig = VirtualRig(joint_plan(), start=[0.1, 0.2, 0.3])
    rig.post(wave(0))
    rig.seconds(0.2)
    rig.want("track")  # wanted, but never armed
    rig.seconds(0.2)
    assert rig.doing == "idle"
    assert "unarmed" in rig.reasons
    assert rig.commands[0] == []


def test_nothing_moves_without_a_lease():
    rig = VirtualRig(joint_plan())
    rig.granting = False
    rig.want("track", arm=True)
    rig.post(wave(0))
    rig.seconds(0.2)
    assert rig.doing == "idle"
    assert {"no_lease", "unarmed"} <= rig.reasons


def test_an_arm_outside_its_limits_is_not_started():
    rig = VirtualRig(joint_plan(), start=[0.0, 2.5, 0.0])
    rig.want("track", arm=True)
    rig.seconds(0.1)
    assert rig.doing == "idle"
    assert "start_refused" in rig.reasons
    assert rig.commands[0] == []


def test_the_first_motion_is_a_slow_approach_to_the_first_target():
    rig = VirtualRig(joint_plan(approach_speed=0.1), start=[-0.5, 0.5, 0.0])
    rig.start_tracking(wave(0))
    sent = np.array(rig.commands[0])
    limits = rig.plan.arms[0].limits
    assert rig.tau < 1e-6  # tau stood all the while
    np.testing.assert_allclose(sent[-1], wave(0)[0], atol=2e-3)
    assert np.max(np.abs(np.diff(sent, axis=0))) * rig.plan.rate <= 0.1 * limits.velocity[0] * 1.001
    assert rig.violations() == {}


def test_the_first_command_is_where_the_arm_is():
    rig = VirtualRig(joint_plan(), start=[-0.5, 0.5, 0.25])
    rig.want("hold", arm=True)
    rig.tick(5)
    assert all((command == [-0.5, 0.5, 0.25]).all() for command in rig.commands[0])
    assert rig.doing == "standing"
    assert "hold" in rig.reasons


def test_tracking_follows_the_chunks_to_the_sample():
    rig = moving()
    rows = rig.telemetry()
    late = rows[(rows["doing"] == 3) & (rows["tau"] > 0.5)]
    expected = np.stack([0.4 * np.sin(1.5 * late["tau"] + 0.3 * i) for i in range(3)], axis=1)
    assert np.max(np.abs(late["fused"] - expected)) < 2e-3  # what is left of the approach's last millimetre fades
    np.testing.assert_allclose(late["limited"], late["fused"], atol=1e-9, rtol=0)
    assert int(rig.status["clipped_ticks"]) == 0
    assert rig.violations() == {}


def test_rest_ends_the_commands_once_the_arms_stand():
    rig = moving()
    rig.want("rest")
    rig.until(lambda: rig.doing == "idle", at_most=1.0)
    assert speed(rig) == 0.0
    count = len(rig.commands[0])
    rig.seconds(0.2)
    assert len(rig.commands[0]) == count
    assert rig.violations() == {}


# -------------------------------------------------------------------------------------- reasons that pass by themselves


def test_a_silent_policy_ends_in_rest_at_the_path_end_and_the_last_command_is_repeated():
    rig = moving(joint_plan(chunk_budget=5.0))
    rig.seconds(3.0)
    assert rig.doing == "standing"
    assert rig.reasons == {"starved"}
    held = rig.command()
    count = len(rig.commands[0])
    rig.seconds(1.0)
    assert len(rig.commands[0]) == count + rig.plan.rate  # a command every tick all the same
    assert (rig.command() == held).all()
    assert rig.violations() == {}


def test_motion_goes_on_when_the_policy_does():
    rig = moving()
    rig.seconds(1.8)
    assert stands(rig)
    rig.post(wave(rig.tau))
    rig.seconds(0.3)
    assert rig.doing == "tracking"
    assert rig.violations() == {}


def test_after_a_long_wait_motion_begins_with_an_approach():
    rig = moving()
    rig.seconds(1.0 + rig.plan.rest + 1.0)
    held = rig.command()
    rig.post(held + 0.5 * np.ones((50, 1)))
    rig.tick(2)
    assert rig.doing == "approaching"


def test_a_stale_observation_stops_the_robot_and_a_fresh_one_lets_it_go_on():
    rig = moving(joint_plan(chunk_budget=0.25))
    rig.post(wave(rig.tau), observed_ns=rig.now)
    rig.seconds(0.3)
    assert rig.reasons == {"chunk_stale"}
    assert rig.doing == "stopping"
    rig.until(lambda: stands(rig), at_most=0.6)
    rig.post(wave(rig.tau))
    rig.seconds(0.1)
    assert rig.doing == "tracking"
    assert rig.violations() == {}


def test_hold_stops_along_the_path_and_track_goes_on_by_an_approach():
    rig = moving()
    rig.want("hold")
    rig.until(lambda: stands(rig), at_most=0.6)
    tau = rig.tau
    # On the path to the last: no axis left it to stop.
    np.testing.assert_allclose(rig.command(), [0.4 * math.sin(1.5 * tau + 0.3 * i) for i in range(3)], atol=1e-3)
    rig.seconds(1.5)
    assert rig.tau == tau
    rig.want("track")
    rig.tick()
    assert "chunk_stale" in rig.reasons  # nothing fresh to go on with
    assert rig.doing == "standing"
    rig.post(wave(tau))
    rig.seconds(0.2)
    assert rig.doing == "tracking"
    assert rig.violations() == {}


@pytest.mark.parametrize("override", [1.0, 0.5, 0.1])
def test_speed_override_scales_tau(override):
    rig = moving()
    rig.want("track", speed=override)
    for _ in range(10):
        rig.post(wave(rig.tau))
        rig.seconds(0.1)
    before = rig.tau
    rig.seconds(0.1)
    assert rig.tau - before == pytest.approx(0.1 * override, rel=1e-6)
    assert rig.violations() == {}


def test_a_new_epoch_drops_the_old_path_and_refuses_its_chunks():
    rig = moving()
    rig.want("track", epoch=1)
    rig.post(wave(rig.tau), epoch=0)
    refused = int(rig.status["chunks_refused"])
    rig.until(lambda: stands(rig), at_most=0.6)
    assert int(rig.status["chunks_refused"]) == refused + 1
    assert "starved" in rig.reasons
    rig.post(wave(rig.tau), epoch=1)
    rig.seconds(0.2)
    assert rig.doing == "tracking"
    assert int(rig.status["epoch"]) == 1
    assert rig.violations() == {}


# ------------------------------------------------------------------------------------------------- reasons that latch


def revoke(rig):
    rig.granting = False
    rig.lease.revoke()


def lapse(rig):
    rig.granting = False


def press(rig):
    rig.segments.estop.raise_stop()


def lose_state(rig):
    rig.silent.add(0)


def fault_arm(rig):
    rig.states[0]["faults"] = 1 << 5


# What happens, the reason given, and the time (s) in which the arms stand. Along the path: 0.35 s at the default
# tau_acceleration and tau_jerk; each axis by itself: sooner. The lapse of a lease costs its 100 ms, a state its budget.
LATCHED = {
    "revoked": (revoke, "no_lease", 0.4),
    "lapsed": (lapse, "no_lease", 0.5),
    "estop": (press, "estop", 0.2),
    "state": (lose_state, "state_stale", 0.5),
    "fault": (fault_arm, "arm_fault", 0.4),
    "stop": (lambda rig: rig.want("stop"), "stop", 0.4),
    "brake": (lambda rig: rig.want("brake"), "brake", 0.2),
}


@pytest.mark.parametrize("name", LATCHED)
def test_a_fault_stops_within_limits_and_in_time_and_only_an_arming_ends_it(name):
    act, reason, within = LATCHED[name]
    rig = moving()
    assert speed(rig) > 0.1
    act(rig)
    rig.until(lambda: stands(rig), at_most=within)
    assert reason in rig.reasons
    held = rig.command()

    # The cause goes away, the policy goes on, and nothing moves.
    rig.granting = True
    rig.silent.clear()
    rig.states[0]["faults"] = 0
    if rig.segments.estop.raised:
        rig.segments.estop.clear(rig.segments.estop.count)
    rig.want("track")
    for _ in range(5):
        rig.post(wave(rig.tau))
        rig.seconds(0.1)
    assert reason in rig.reasons
    assert (rig.command() == held).all()

    rig.start_tracking(wave(rig.tau))
    assert rig.reasons == set()
    assert rig.violations() == {}


@pytest.mark.parametrize("act", [lose_state, fault_arm], ids=["stale state", "fault"])
def test_one_arm_stops_both(act):
    rig = moving(joint_plan(arms=2))
    act(rig)
    rig.until(lambda: stands(rig), at_most=0.6)
    for arm in (0, 1):
        assert speed(rig, arm) == 0.0
    assert rig.violations() == {}


def test_a_hung_servo_does_not_go_on_where_it_was():
    rig = moving()
    rig.now += 300_000_000
    rig.tick()
    assert "stalled" in rig.reasons
    held = rig.command()
    rig.seconds(0.3)
    assert (rig.command() == held).all()


def test_a_short_stall_costs_time_not_a_jump():
    rig = moving()
    tau = rig.tau
    rig.now += 40_000_000
    rig.tick()
    # Tau goes by the ticks that were made, so the path waits for the arm.
    assert rig.tau - tau == pytest.approx(1 / rig.plan.rate)
    rig.seconds(0.05)
    assert rig.doing == "tracking"


def test_a_damaged_mode_stops():
    rig = moving()
    rig.mode["wanted"] = 99
    rig.mode_slot.publish(rig.mode)
    rig.until(lambda: stands(rig), at_most=0.6)
    assert {"damaged_mode", "stop"} <= rig.reasons
    assert rig.violations() == {}


@pytest.mark.parametrize("bad", [float("nan"), -1.0, 0.0, 7.0])
def test_a_speed_that_is_none_stops(bad):
    rig = moving()
    rig.want("track", speed=bad)
    rig.until(lambda: stands(rig), at_most=0.6)
    assert "damaged_mode" in rig.reasons


def test_an_arming_in_motion_stops_first():
    rig = moving()
    rig.want("track", arm=True)
    rig.tick()
    assert "unarmed" in rig.reasons
    rig.until(lambda: stands(rig), at_most=0.6)
    rig.post(wave(rig.tau))
    rig.seconds(0.5)
    assert rig.doing == "tracking"
    assert int(rig.status["arming"]) == 2
    assert rig.violations() == {}


# ------------------------------------------------------------------------------------------------------------ chunks


def test_a_nan_chunk_is_refused_and_the_path_goes_on():
    rig = moving()
    bad = wave(rig.tau)
    bad[7, 1] = np.nan
    rig.post(bad)
    rig.tick()
    assert int(rig.status["chunks_refused"]) == 1
    rig.seconds(0.1)
    assert rig.doing == "tracking"
    assert np.isfinite(np.array(rig.commands[0])).all()
    assert rig.violations() == {}


@pytest.mark.parametrize("mode", ["switch", "blend", "ensemble", "rtc", "sync"])
def test_a_late_and_far_first_chunk_never_makes_it_lunge(mode):
    plan = joint_plan(fusion=FusionPlan(mode=mode, sync_actions=25 if mode == "sync" else 0))
    rig = VirtualRig(plan)
    rig.want("track", arm=True)
    rig.seconds(3.0)  # the policy thinks
    tau = rig.tau

    def tracking():
        if len(rig.statuses) % 50 == 1:
            rig.post(wave(tau) + 1.0, tau=tau)
        return rig.doing == "tracking"

    rig.until(tracking)
    sent = np.array(rig.commands[0])
    limit = plan.approach_speed * plan.arms[0].limits.velocity[0]
    assert np.max(np.abs(np.diff(sent, axis=0))) * plan.rate <= limit * 1.001
    assert rig.violations() == {}


@pytest.mark.parametrize("mode", ["switch", "blend", "ensemble", "rtc"])
def test_a_teleporting_policy_breaks_no_limit(mode):
    rig = moving(joint_plan(mode=mode))
    rng = np.random.default_rng(4)
    for _ in range(30):
        rig.post(rng.uniform(-6.0, 6.0, (50, 3)))  # far beyond the joints' range, too
        rig.seconds(0.1)
    assert rig.violations() == {}


def test_a_chunk_is_used_by_the_first_tick_that_starts_after_it():
    rig = moving(joint_plan(mode="switch"))
    for _ in range(20):
        number = rig.post(wave(rig.tau))
        status = rig.tick()
        assert int(status["chunk"]) == number
        rig.tick(7)


def test_an_approach_that_is_interrupted_stays_where_it_is():
    rig = VirtualRig(joint_plan())
    rig.want("track", arm=True)
    rig.tick()
    rig.post(wave(0) + 1.0)
    rig.seconds(0.5)
    assert rig.doing == "approaching"
    rig.want("hold")
    rig.until(lambda: stands(rig), at_most=0.3)
    held = rig.command()
    rig.seconds(0.5)
    assert (rig.command() == held).all()
    assert held.max() < 0.3
    assert rig.violations() == {}


def test_a_target_out_of_reach_ends_the_approach_as_near_as_it_can_be():
    rig = VirtualRig(joint_plan(approach_speed=0.5))
    rig.start_tracking(np.full((50, 3), 5.0))
    np.testing.assert_allclose(rig.command(), 2.0, atol=2e-3)
    assert rig.violations() == {}


# ------------------------------------------------------------------------------------------------------- what it says


def test_telemetry_holds_every_tick_and_every_name_of_a_command():
    rig = moving()
    rows = rig.telemetry()
    assert (np.diff(rows["tick"]) == 1).all()
    last = rows[-1]
    for name in ("raw", "fused", "tracked", "limited", "sent", "measured"):
        assert np.isfinite(last[name]).all()
    # What the device was told last is what left in the tick before.
    np.testing.assert_array_equal(last["sent"], rows[-2]["limited"])


def test_the_committed_prefix_is_what_will_be_sent():
    rig = moving(joint_plan(mode="rtc"))
    prefix = rig.segments.prefix.read()
    assert prefix is not None
    assert 0 < prefix.mask.max() <= 1
    due = prefix.tau + ROWS * prefix.dt
    near = due < rig.tau + 0.3
    expected = np.stack([0.4 * np.sin(1.5 * due + 0.3 * i) for i in range(3)], axis=1)
    np.testing.assert_allclose(prefix.actions[near], expected[near], atol=5e-3)


def test_costs_are_split_by_step():
    rig = moving()
    found = rig.servo.histograms()
    ticks = int(rig.status["tick"])
    assert found["cost"].total == ticks
    assert found["limit"].total <= ticks
    assert found["report"].total == ticks
    assert found["chunk_age"].percentile(0.5) > 0
