"""Simulated arms and grippers, in virtual time."""

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from pydantic import ValidationError

from chatvla_edge.drivers.errors import DeviceFaultError, DeviceLostError, DeviceNotFoundError
from chatvla_edge.drivers.protocols import Arm, Gripper
from chatvla_edge.drivers.sim.arm import SimArm, SimArmOptions, SimGripper
from chatvla_edge.drivers.sim.bodies import BODIES
from chatvla_edge.drivers.sim.faults import switch

PERIOD_NS = 2_000_000


class Clock:
    """Host time that goes on only when told to."""

    def __init__(self):
        self.ns = 10**12

    def __call__(self):
        return self.ns

    def wait(self, seconds):
        self.ns += round(1e9 * seconds)


@pytest.fixture
def clock():
    return Clock()


def opened(clock, kind=SimArm, **options):
    arm = kind(SimArmOptions(**{"body": "arx_r5", **options}), clock)
    arm.open(500)
    return arm


def drive(arm, clock, target, seconds):
    """Command ``target`` at 500 Hz; the states."""
    states = []
    for _ in range(round(seconds * 500)):
        arm.command(np.array(target))
        clock.ns += PERIOD_NS
        states.append(arm.state())
    return states


def away(arm, by=0.2):
    """A target for every joint of the body, the gripper's left alone."""
    target = np.array(arm.body.start)
    target[:6] += by
    return target


def test_they_are_what_the_runtime_asks_for(clock):
    assert isinstance(SimArm(SimArmOptions(body="fr3")), Arm)
    assert isinstance(SimGripper(SimArmOptions(body="robotiq_2f85")), Gripper)


@pytest.mark.parametrize("body", BODIES)
def test_every_body_starts_inside_its_published_range(body):
    axes = BODIES[body]
    rows = (axes.lower, axes.start, axes.upper, axes.velocity, axes.strength)
    assert {len(row) for row in rows} == {len(axes.axes)}
    assert all(low <= at <= high for low, at, high in zip(axes.lower, axes.start, axes.upper, strict=True))


@pytest.mark.parametrize("order", [1, 2])
def test_it_arrives_without_overshoot(clock, order):
    arm = opened(clock, order=order)
    states = drive(arm, clock, away(arm, 0.02), 0.5)
    first = np.array([state.position[0] for state in states])
    assert first[-1] == pytest.approx(arm.body.start[0] + 0.02, abs=1e-4)
    assert first.max() <= arm.body.start[0] + 0.02 + 1e-9


@pytest.mark.parametrize("order", [1, 2])
def test_a_moving_axis_lags_by_what_the_options_say(clock, order):
    arm = opened(clock, order=order, lag=0.05)
    start = np.array(arm.body.start)
    for i in range(500):
        target = start.copy()
        target[0] += 0.5 * i / 500  # 0.5 rad/s
        arm.command(target)
        clock.ns += PERIOD_NS
    state = arm.state()
    assert state.target[0] - state.position[0] == pytest.approx(0.5 * 0.05, rel=0.05)
    assert state.velocity[0] == pytest.approx(0.5, rel=0.03)  # commands come in steps


def test_speed_and_acceleration_end_where_the_body_does(clock):
    arm = opened(clock, start=(-3.0, 0.9, 0.9, 0.0, 0.0, 0.0, 0.08))
    states = drive(arm, clock, [2.6, 0.9, 0.9, 0.0, 0.0, 0.0, 0.08], 1.0)
    speeds = [state.velocity[0] for state in states]
    assert max(speeds) == pytest.approx(5.0)
    assert max(abs(b - a) for a, b in pairwise(speeds)) <= 60 * 2e-3 + 1e-9


def test_an_axis_stops_at_the_end_of_its_range(clock):
    arm = opened(clock)
    beyond = away(arm)
    beyond[1] = 9.0
    state = drive(arm, clock, beyond, 2.0)[-1]
    assert state.position[1] == 3.5
    assert state.velocity[1] == 0.0


def test_a_command_is_on_its_way_for_as_long_as_the_options_say(clock):
    arm = opened(clock, delay=0.05)
    start = arm.state().position[0]
    states = drive(arm, clock, away(arm), 0.048)
    assert states[-1].position[0] == start
    assert drive(arm, clock, away(arm), 0.01)[-1].position[0] > start


def test_noise_is_on_the_measurement_only(clock):
    arm = opened(clock, noise=0.001)
    rest = arm.body.start
    seen = np.array([state.position for state in drive(arm, clock, rest, 1.0)]) - np.array(rest)
    assert 0.0008 < seen.std() < 0.0012
    assert abs(seen.mean()) < 0.0002


def test_a_state_is_stamped_by_the_device_not_by_the_asking(clock):
    arm = opened(clock)
    first = arm.state()
    assert arm.state().sequence == first.sequence
    clock.ns += 10_500_000
    second = arm.state()
    assert second.sequence - first.sequence in (10, 11)
    assert 0 <= clock.ns - second.captured_ns < 1_000_000


def test_it_goes_on_moving_while_the_host_does_not_ask(clock):
    arm = opened(clock)
    arm.command(away(arm))
    clock.wait(0.5)
    assert arm.state().position[0] == pytest.approx(arm.body.start[0] + 0.2, abs=1e-3)


def test_stop_brakes_and_holds(clock):
    arm = opened(clock)
    state = drive(arm, clock, away(arm, 1.0), 0.2)[-1]
    speed, at = state.velocity[0], state.position[0]
    assert speed > 1
    arm.stop()
    arm.stop()
    clock.wait(0.5)
    rest = arm.state()
    assert rest.velocity[0] == pytest.approx(0.0, abs=1e-3)
    assert at <= rest.position[0] <= at + 2 * speed**2 / (2 * 60) + speed * 0.02


@pytest.mark.parametrize("wrong", [[0.0] * 6, [float("nan")] + [0.0] * 6, [float("inf")] + [0.0] * 6])
def test_a_command_that_is_none_is_refused(clock, wrong):
    with pytest.raises(ValueError, match="expected 7 finite numbers"):
        opened(clock).command(np.array(wrong))


@pytest.mark.parametrize("start", [[0.0] * 6, [0.0, 9.0, 0.9, 0.0, 0.0, 0.0, 0.08]])
def test_a_start_that_no_arm_has_is_refused(start):
    with pytest.raises(ValidationError, match="start has"):
        SimArmOptions(body="arx_r5", start=start)


# -------------------------------------------------------------------------------------------------------------- faults


def test_a_planned_fault_comes_and_goes(clock):
    arm = opened(clock, faults=[{"kind": "nan", "after": 1.0, "lasts": 0.5}])
    seen = []
    for _ in range(20):
        seen.append(bool(np.isnan(arm.state().position).all()))
        clock.wait(0.1)
    assert seen == [False] * 10 + [True] * 5 + [False] * 5


def test_a_silent_bus_repeats_the_last_answer_with_its_age(clock, tmp_path):
    file = tmp_path / "fault"
    arm = opened(clock, fault_switch=file)
    last = drive(arm, clock, away(arm), 0.05)[-1]
    switch(file, "silent")
    assert {state.sequence for state in drive(arm, clock, away(arm, 0.5), 0.5)} == {last.sequence}
    assert arm.state().captured_ns == last.captured_ns
    switch(file, "")
    back = arm.state()
    assert back.sequence == last.sequence + 500
    # What was commanded meanwhile never reached the arm.
    assert back.position[0] == pytest.approx(arm.body.start[0] + 0.2, abs=1e-3)


def test_a_frozen_arm_answers_and_does_not_move(clock, tmp_path):
    arm = opened(clock, fault_switch=tmp_path / "fault")
    before = arm.state()
    switch(tmp_path / "fault", "frozen")
    state = drive(arm, clock, away(arm), 0.2)[-1]
    assert state.sequence == before.sequence + 200
    assert state.position == before.position
    assert state.target[0] == away(arm)[0]


def test_an_exception_of_the_library_is_none_of_ours(clock, tmp_path):
    arm = opened(clock, fault_switch=tmp_path / "fault")
    switch(tmp_path / "fault", "error")
    for call in (arm.state, lambda: arm.command(away(arm)), arm.stop):
        with pytest.raises(RuntimeError, match="on purpose"):
            call()
    switch(tmp_path / "fault", "")
    arm.state()


def test_an_unplugged_arm_is_lost_until_it_is_opened_again(clock, tmp_path):
    arm = opened(clock, fault_switch=tmp_path / "fault")
    switch(tmp_path / "fault", "unplugged")
    with pytest.raises(DeviceLostError):
        arm.state()
    switch(tmp_path / "fault", "")
    with pytest.raises(DeviceLostError):
        arm.command(away(arm))
    arm.close()
    arm.close()
    arm.open(500)
    arm.state()


def test_an_unplugged_arm_is_not_found(clock, tmp_path):
    switch(tmp_path / "fault", "unplugged")
    arm = SimArm(SimArmOptions(body="fr3", fault_switch=tmp_path / "fault"), clock)
    with pytest.raises(DeviceNotFoundError):
        arm.open(500)


def test_a_fault_stays_until_it_is_cleared(clock, tmp_path):
    arm = opened(clock, fault_switch=tmp_path / "fault")
    switch(tmp_path / "fault", "fault")
    state = drive(arm, clock, away(arm), 0.1)[-1]
    assert state.fault
    assert state.position[0] == arm.body.start[0]
    with pytest.raises(DeviceFaultError):
        arm.clear()
    switch(tmp_path / "fault", "")
    assert arm.state().fault
    arm.clear()
    assert drive(arm, clock, away(arm), 0.5)[-1].position[0] == pytest.approx(away(arm)[0], abs=1e-3)


def test_a_switch_with_an_unknown_word_says_so(clock, tmp_path):
    arm = opened(clock, fault_switch=tmp_path / "fault")
    switch(tmp_path / "fault", "sillent")
    with pytest.raises(ValueError, match="found 'sillent', expected one of"):
        arm.state()


def test_a_crash_takes_the_process_with_it():
    code = (
        "from chatvla_edge.drivers.sim.arm import SimArm, SimArmOptions\n"
        "arm = SimArm(SimArmOptions(body='fr3', faults=[{'kind': 'crash', 'after': 0}]))\n"
        "arm.open(500)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert ended.returncode == -6


# ------------------------------------------------------------------------------------------------------------- gripper


def test_a_gripper_holds_what_it_met_and_keeps_holding(clock):
    gripper = opened(clock, SimGripper, body="robotiq_2f85", object_width=0.03)
    assert gripper.holds() is False
    state = drive(gripper, clock, [0.0], 1.0)[-1]
    assert state.position == [0.03]
    assert gripper.holds() is True
    gripper.stop()
    clock.wait(1)
    assert gripper.state().position == [0.03]
    assert gripper.holds() is True
    assert drive(gripper, clock, [0.08], 1.0)[-1].position[0] == pytest.approx(0.08, abs=1e-4)
    assert gripper.holds() is False
