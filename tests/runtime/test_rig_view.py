"""From records to what the arbiter sees, record by record; and an arbiter that drives a rig of real processes."""

import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from support.process_rig import TESTS
from support.virtual_rig import VirtualRig, joint_plan

from chatvla_edge.runtime.arbiter import Act, Arbiter, Order, Request
from chatvla_edge.runtime.device_plan import DevicePlan
from chatvla_edge.runtime.mailbox import ChunkMailbox
from chatvla_edge.runtime.modes import MS, Mode, S, Want
from chatvla_edge.runtime.observations import Camera, Child
from chatvla_edge.runtime.pages import Lease
from chatvla_edge.runtime.processes import start_device, start_servo
from chatvla_edge.runtime.rig_segments import RigSegments
from chatvla_edge.runtime.rig_view import Orders, RigView, device_seen, policy_seen, servo_seen
from chatvla_edge.runtime.riglock import RigClaim
from chatvla_edge.runtime.servo_plan import FusionPlan
from chatvla_edge.runtime.servo_records import DEVICE_DOING, DEVICE_FAULTS, REASONS, SERVO_DOING, STATE, STATUS, WANTED
from chatvla_edge.runtime.slots import Reading

ROWS = np.arange(50) * 0.02


def wave(tau, axes=3):
    return np.stack([0.3 * np.sin(1.5 * (tau + ROWS) + 0.3 * i) for i in range(axes)], axis=1)


# ------------------------------------------------------------------------------------------------------- servo, policy


def status(**fields):
    record = np.zeros((), STATUS)
    record["doing"] = SERVO_DOING.index("tracking")
    for name, value in fields.items():
        record[name] = value
    return record


def bits(*reasons):
    return sum(1 << REASONS.index(reason) for reason in reasons)


def servo(**fields):
    return servo_seen(status(**fields), 77, 2 * MS)


@pytest.mark.parametrize("want", Want)
def test_the_servos_want_is_the_arbiters(want):
    assert servo(wanted=WANTED.index(want.value)).want is want


def test_counters_facts_and_stamps_arrive():
    seen = servo(arming=4, standing=1, posed=6, clipped_ticks=11, overruns=12, reasons=bits("starved", "unreachable"))
    assert (seen.beat_ns, seen.period_ns, seen.arming) == (77, 2 * MS, 4)
    assert (seen.standing, seen.posed, seen.starved, seen.unreachable) == (True, True, True, True)
    assert (seen.clipped_ticks, seen.skipped_ticks) == (11, 12)
    assert not seen.nonfinite
    assert not servo().posed


def test_a_command_that_was_no_number_is_told_until_the_next_arming():
    assert servo(clipped_kinds=1 << 6).nonfinite  # limits.KINDS: nonfinite
    assert not servo(clipped_kinds=0b1_1011_1111).nonfinite


@pytest.mark.parametrize("reason", ["no_lease", "estop", "state_stale", "arm_fault", "limits", "stalled"])
def test_what_the_servo_stopped_for_by_itself_is_told_though_it_is_gone(reason):
    assert servo(latched=bits(reason, "hold", "chunk_stale")).stopped == reason


def test_what_it_was_told_is_no_reason_of_its_own():
    told = ("rest", "hold", "stop", "brake", "home", "park", "chunk_stale", "starved", "approach", "unreachable")
    assert servo(latched=bits(*told)).stopped == ""


def test_an_idle_servo_says_why_it_would_not_begin_now_and_not_what_ended_the_arming_before():
    idle = {"doing": SERVO_DOING.index("idle"), "latched": bits("estop")}
    assert servo(reasons=bits("start_refused", "unarmed"), **idle).stopped == "start_refused"
    assert servo(reasons=bits("unarmed", "rest"), **idle).stopped == ""


@pytest.mark.parametrize(("owed", "seen"), [(-1, None), (0, 0), (5 * S, 5 * S)])
def test_what_the_policy_owes(owed, seen):
    assert policy_seen(status(owed_ns=owed), 300 * MS, True).owed_ns == seen


def test_a_policy_is_credited_with_each_chunk_that_was_taken():
    rig = VirtualRig(joint_plan())
    rig.seconds(0.1)
    assert rig.status["owed_ns"] == 0  # never
    rig.post(wave(0))
    rig.tick()
    assert rig.status["owed_ns"] == rig.now  # unarmed a chunk cannot be used, but the policy lives
    rig.start_tracking(wave(0))
    rig.post(wave(rig.tau))
    rig.tick()
    then = rig.now
    assert rig.status["owed_ns"] == then
    rig.seconds(0.1)
    rig.post(np.full((50, 3), np.nan))
    rig.tick()
    assert rig.status["owed_ns"] == then  # refused, so still owed


def test_in_sync_mode_nothing_is_owed_until_the_actions_are_used_up():
    plan = joint_plan(fusion=FusionPlan(mode="sync", sync_actions=25))
    rig = VirtualRig(plan)
    rig.start_tracking(wave(0))
    assert rig.status["owed_ns"] == -1
    rig.until(lambda: rig.status["path_left"] == 0)
    then = rig.now
    rig.seconds(0.3)
    assert 0 <= then - rig.status["owed_ns"] <= rig.period
    rig.post(wave(rig.tau))
    rig.tick()
    assert rig.status["owed_ns"] == -1


# ------------------------------------------------------------------------------------------------------------- devices

PLAN = DevicePlan.of(joint_plan().arms[0], 500.0)
STAMPS = Reading(9, 300, 200)


def state(**fields):
    record = np.zeros((), STATE)
    record["doing"] = DEVICE_DOING.index("following")
    record["target"] = np.nan
    for name, value in fields.items():
        if name in ("q", "sent", "target"):
            record[name][:3] = value
        else:
            record[name] = value
    return record


def seen(lag=None, **fields):
    return device_seen(PLAN, lag, state(**fields), STAMPS)


def test_a_devices_stamps_are_its_heartbeat_and_its_age():
    device = seen(arming=3)
    assert (device.name, device.period_ns, device.arming) == ("arm0", 2 * MS, 3)
    assert (device.beat_ns, device.state_ns) == (300, 200)
    assert (device.lagging, device.deviation, device.fault, device.stopped) == (False, 0.0, "", "")


@pytest.mark.parametrize(("q", "lagging"), [((0.1, -0.2, 0.3), False), ((0.1, -0.201, 0.3), True)])
def test_an_arm_lags_when_one_axis_is_further_from_its_command_than_allowed(q, lagging):
    assert seen(lag=(0.1, 0.2, 0.3), q=q).lagging is lagging
    assert not seen(q=q).lagging  # where the rig sets no bound
    assert not seen(lag=(0.1, 0.2, 0.3), q=q, doing=DEVICE_DOING.index("idle")).lagging  # moved by hand


def test_a_position_that_is_no_number_lags():
    assert seen(lag=(1.0, 1.0, 1.0), q=(0.0, np.nan, 0.0)).lagging


def test_deviation_is_between_what_was_sent_and_what_the_vendor_heads_for():
    assert seen(q=(9.0, 9.0, 9.0), sent=(0.1, 0.2, 0.3), target=(0.1, 0.26, 0.28)).deviation == pytest.approx(0.06)
    assert seen(sent=(0.1, 0.2, 0.3), target=(np.nan, np.nan, 0.25)).deviation == pytest.approx(0.05)
    assert seen(sent=np.nan, target=(1.0, 1.0, 1.0)).deviation == 0.0


def test_a_fault_is_told_in_the_arms_words_while_it_lasts_and_why_it_stopped_after_that():
    faults = 1 << DEVICE_FAULTS.index("arm")
    device = seen(faulty=1, faults=faults, words="motor 3: überhitzt".encode())
    assert (device.fault, device.stopped) == ("motor 3: überhitzt", "arm (motor 3: überhitzt)")
    device = seen(faults=faults, words=b"motor 3")
    assert (device.fault, device.stopped) == ("", "arm (motor 3)")
    assert seen(faulty=1).fault == "it reports a fault"
    assert seen(faults=1).stopped == "silence"


# ----------------------------------------------------------------------------------------------------------- whole rigs


def test_before_the_first_record_everything_was_never_seen():
    plan = joint_plan(arms=2)
    segments = RigSegments.create(plan)
    view = RigView(plan, [DevicePlan.of(arm, 500.0) for arm in plan.arms], segments)
    children = dict.fromkeys(("policy", "servo", "arm0", "arm1"), Child())
    found = view.observe(cameras=(), cycle_ns=S, policy_ready=False, children=children)
    assert (found.servo.beat_ns, found.servo.standing, found.servo.want) == (0, False, Want.REST)
    assert [(device.beat_ns, device.state_ns) for device in found.devices] == [(0, 0)] * 2
    assert found.policy.owed_ns == 0
    assert found.recorder is None


def test_devices_are_those_of_the_arms():
    plan = joint_plan(arms=2)
    with pytest.raises(ValueError, match=r"devices \['arm0'\]; expected \['arm0', 'arm1'\]"):
        RigView(plan, [DevicePlan.of(plan.arms[0], 500.0)], RigSegments.create(plan))


def test_an_order_is_what_the_servo_acts_on():
    rig = VirtualRig(joint_plan())
    mode = rig.mode_slot
    del rig.mode_slot, mode  # the one writer is now the arbiter
    orders = Orders(rig.segments)
    orders.epoch = 2
    orders(Order(Want.TRACK, 1, 0.5))
    rig.tick()
    assert (rig.status["arming"], rig.status["speed"], rig.status["epoch"]) == (1, 0.5, 2)
    assert WANTED[int(rig.status["wanted"])] == "track"


HOME, PARK = (0.2, 0.2, 0.2), (-0.3, 0.3, 0.0)


class ArbitedRig:
    """Servo and devices as processes; the test is supervisor, policy, camera and operator."""

    def __init__(self, claim=None):
        plan = joint_plan(arms=2, rate=200.0, gap=0.25, approach_speed=0.3)
        first, second = (replace(arm, state_budget=0.3) for arm in plan.arms)
        self.plan = replace(plan, arms=(replace(first, home=HOME, park=PARK), second))
        self.devices = [DevicePlan.of(arm, 200.0, silence=0.25) for arm in self.plan.arms]
        self.segments = RigSegments.create(self.plan)
        self.view = RigView(self.plan, self.devices, self.segments)
        lease = Lease.attach(self.segments.lease.fd, write=True)
        self.arbiter = Arbiter(lease, self.segments.estop, Orders(self.segments))
        self.policy = ChunkMailbox.attach(self.segments.chunks.fd, 50, 6, write=True)
        self.children = {
            device.name: start_device(
                device, self.segments, arm, "support.lag_arm:LagArm", {"start": [0.1, 0.0, -0.1]}, claim=claim
            )
            for arm, device in enumerate(self.devices)
        }
        self.children["servo"] = start_servo(self.plan, self.segments, claim=claim)
        self.posting = True
        self.posted = 0.0
        self.replies = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for child in self.children.values():
            child.send_signal(signal.SIGCONT)
            child.kill()
            child.wait()

    @property
    def status(self):
        record = np.zeros((), STATUS)
        self.segments.status.read_into(record)
        return record

    def measured(self, arm=0):
        record = np.zeros((), STATE)
        self.segments.states[arm].read_into(record)
        return record["q"][:3]

    def turn(self, *acts):
        now = time.monotonic_ns()
        if self.posting and now - self.posted > 100 * MS:
            tau = float(self.status["tau"])
            self.policy.publish(
                wave(tau, 6), epoch=0, tau_observation=tau, first_step=0, dt=0.02, captured_ns=time.monotonic_ns()
            )
            self.posted = now
        children = {name: Child(child.poll() is None) for name, child in self.children.items()}
        seen = self.view.observe(
            cameras=(Camera("top", True, 33 * MS, time.monotonic_ns()),),
            cycle_ns=100 * MS,
            policy_ready=True,
            children=children | {"policy": Child()},
        )
        decision = self.arbiter.turn(seen, [Request(act) for act in acts])
        self.replies += decision.replies
        time.sleep(0.01)
        return decision

    def until(self, done, at_most=30.0):
        """Take turns until ``done(decision)``; the limit is for a test that hangs."""
        end = time.monotonic() + at_most
        while not done(decision := self.turn()):
            told = [reason.sentence() for reason in decision.reasons]
            assert time.monotonic() < end, (decision.state.mode, told, self.status)
        return decision

    def track(self):
        """Arm, and again where the busy machine let the lease lapse meanwhile, or a process seem lost."""

        def tracking(decision):
            if decision.state.mode is Mode.READY:
                self.turn(Act.ARM)
            elif decision.state.mode is Mode.FAULT:
                self.turn(Act.DISARM)
            return SERVO_DOING[int(self.status["doing"])] == "tracking"

        self.until(tracking)


def names_of(reasons):
    return {reason.condition.name for reason in reasons}


@pytest.fixture(autouse=True)
def found_by_children(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS))


def test_an_arbiter_arms_a_rig_of_processes_and_parks_it_before_it_ends():
    with ArbitedRig() as rig:
        rig.until(lambda decision: decision.state.mode is Mode.READY)
        rig.track()
        rig.posting = False  # the policy dies; parking does without it

        def parked(decision):
            mode = decision.state.mode
            if mode is Mode.DISARMED and "parked" in names_of(decision.state.causes):
                return True
            if mode is Mode.FAULT:  # the busy machine again
                rig.turn(Act.DISARM)
            elif mode is not Mode.SOFT_STOP and decision.state.errand is None:
                rig.turn(Act.PARK)
            return False

        rig.until(parked)
        np.testing.assert_allclose(rig.measured(), PARK, atol=0.02)
        stood = rig.measured(1).copy()  # has no such pose
        for child in rig.children.values():
            child.terminate()
        assert [child.wait(10) for child in rig.children.values()] == [0, 0, 0]
        np.testing.assert_allclose(rig.measured(), PARK, atol=0.02)
        np.testing.assert_allclose(rig.measured(1), stood, atol=0.02)


def test_a_device_that_hangs_stops_all_and_is_a_fault():
    with ArbitedRig() as rig:
        rig.track()
        rig.children["arm1"].send_signal(signal.SIGSTOP)
        decision = rig.until(lambda decision: decision.state.mode is Mode.FAULT)
        assert names_of(decision.state.causes) & {"device lost", "state stale"}
        rig.until(lambda _: bool(rig.status["standing"]))
        rig.children["arm1"].send_signal(signal.SIGCONT)
        refusal = rig.turn(Act.ARM).replies[0]
        assert not refusal.accepted
        assert refusal.text == "FAULT: `disarm` or `clear` first"


def test_the_rigs_name_is_free_only_when_its_last_process_has_ended():
    name = f"test-{time.monotonic_ns()}"
    claim = RigClaim(name)
    with ArbitedRig(claim) as rig:
        rig.until(lambda decision: decision.state.mode is Mode.READY)
        claim.close()  # as if this daemon had been killed
        asked = [sys.executable, "-c", f"from chatvla_edge.runtime.riglock import RigClaim; RigClaim({name!r})"]
        assert "RigClaimedError" in subprocess.run(asked, capture_output=True, text=True).stderr
    with RigClaim(name):
        pass
