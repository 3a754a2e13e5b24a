"""An ARX arm through the real arx5-interface, against the CAN stand-in: what each fault looks like, what follows."""

import json
import os
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from support.arm_child import ArmError, ArmProcess

from chatvla_edge.drivers import registry
from chatvla_edge.drivers.arms import arx5, can_motors, swap
from chatvla_edge.drivers.standins.can import CanBus, environment

pytest.importorskip("arx5_interface", reason="arx5-interface is not installed (extra `arx`)")

RATE = 500
LOST = arx5.Arx5Options(model="R5").lost_after


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("can")


@pytest.fixture(scope="module")
def bus(folder):
    with CanBus(folder, "can0", "L5") as bus:
        yield bus


@pytest.fixture(scope="module")
def arm(bus, folder):
    with ArmProcess("arx5", {"model": "R5", "gravity": [0, 0, 0]}, environment(folder)) as arm:
        arm.open(RATE)
        yield arm


@pytest.fixture(autouse=True)
def well(request):
    """Every test begins with a bus that is well and an arm that has been told so."""
    yield
    if "bus" in request.fixturenames and "arm" in request.fixturenames:
        request.getfixturevalue("bus").tell(dead=False, silent=[], stuck=[], load=dict.fromkeys(arx5.MOTORS, 0))
        request.getfixturevalue("arm").call("clear")


def first(rows, **what):
    """Number of the first row of which ``what`` holds; fails where there is none."""
    ((name, wanted),) = what.items()
    for number, row in enumerate(rows):
        found = getattr(row, name, None)
        if found is not None and (wanted(found) if callable(wanted) else found == wanted):
            return number
    raise AssertionError(f"no row with {name} {wanted}; the last: {rows[-1]}")


def test_each_command_is_one_exchange_and_the_arm_goes_there(arm, bus):
    before = bus.tell()["frames"]
    rows = arm.cycles(400, RATE, by=[0.1, -0.05, 0.05, 0.1, 0.1, -0.1, 0.01])
    assert not any(row.error for row in rows)
    assert not any(row.fault for row in rows)
    # The state that follows a command asks nobody; the one before the first command makes an exchange of its own.
    assert 400 <= (bus.tell()["frames"] - before) / len(arx5.MOTORS) <= 402
    assert (np.diff([row.sequence for row in rows]) == 1).mean() > 0.9
    # Their answers' stamp lies in the exchange that brought them, or in the one before where one came late.
    assert np.mean([row.began_ns <= row.captured_ns <= row.ended_ns for row in rows]) > 0.9
    settled = arm.cycles(150, RATE)
    assert np.abs(np.subtract(settled[-1].position, settled[-1].target)).max() < 2e-3
    assert np.abs(np.subtract(settled[-1].velocity, 0)).max() < 0.1


def test_the_first_command_takes_the_arm_where_it_is(arm, bus):
    assert set(bus.tell()["kp"].values()) == {0.0}  # damped, until it is commanded
    here = arm.state().position
    rows = arm.cycles(100, RATE)
    moved = np.abs(np.subtract([row.position for row in rows], here))
    assert moved.max() < 5e-3
    assert min(bus.tell()["kp"].values()) > 4


def test_stop_holds_and_goes_on_holding(arm, bus):
    rows = arm.cycles(100, RATE, by=[0.05, 0, 0, 0, 0, 0, 0])
    arm.call("stop")
    told = bus.tell()
    time.sleep(0.05)
    for _ in range(20):
        arm.state()
    assert bus.tell()["target"] == told["target"]
    assert bus.tell()["frames"] > told["frames"]
    assert abs(arm.state().position[0] - rows[-1].target[0]) < 5e-3


@pytest.mark.parametrize("fault", [{"dead": True}, {"silent": [5]}], ids=["dead bus", "one motor silent"])
def test_silence_is_seen_in_the_stamps_at_once_and_raised_in_time(arm, bus, fault):
    rows = arm.cycles(250, RATE, by=[0.1, 0, 0, 0, 0, 0, 0], tell=fault, at=50, control=bus.control)
    since = rows[50].began_ns
    # Not a stamp, not a number newer than the fault, though the library tells positions all the time.
    assert all(row.captured_ns <= since for row in rows[51:] if not row.error)
    assert len({row.sequence for row in rows[51:] if not row.error}) == 1
    raised = first(rows, error="DeviceLostError")
    assert abs(raised - 50 - LOST * RATE) <= 2  # in exchanges: the machine may lose time, not them
    assert all(row.error for row in rows[raised:])
    assert ("[5]" in rows[raised].text) == ("silent" in fault)
    frames = bus.tell()["frames"]
    with pytest.raises(ArmError, match="have not answered"):
        arm.state()
    assert bus.tell()["frames"] > frames  # the others are still held
    # It comes back: the state lives again by itself, motion is for the operator to begin.
    bus.tell(dead=False, silent=[])
    deadline = time.monotonic() + 5
    while True:
        try:
            state = arm.state()
            break
        except ArmError:
            assert time.monotonic() < deadline
    assert state.fault == ""
    assert time.monotonic_ns() - state.captured_ns < LOST * 1e9


def test_a_stalled_bus_is_old_stamps_and_then_well_again(arm, bus):
    rows = arm.cycles(200, RATE, tell={"stall": 0.06}, at=50, control=bus.control)
    ages = np.array([row.ended_ns - row.captured_ns for row in rows if not row.error])
    assert ages.max() > 40e6
    assert not rows[-1].error
    assert not rows[-1].fault


def test_an_error_of_a_motor_is_named_and_ends_when_cleared(arm, bus):
    rows = arm.cycles(100, RATE, tell={"error": {"5": 13}}, at=50, control=bus.control)
    reported = first(rows, fault="motor 5: lost its commands")
    assert reported - 50 <= 2
    arm.call("clear")
    assert arm.state().fault == ""
    assert set(bus.tell()["kp"].values()) == {0.0}


def test_a_motor_that_came_back_without_power_is_a_fault(arm, bus):
    arm.cycles(20, RATE)
    rows = arm.cycles(100, RATE, tell={"disabled": [4]}, at=50, control=bus.control)
    assert first(rows, fault="motor 4: not enabled") - 50 <= 2
    arm.call("clear")
    assert arm.state().fault == ""
    assert bus.tell()["enabled"]["4"]


def test_an_arm_that_pushes_too_hard_is_relieved(arm, bus):
    rows = arm.cycles(300, RATE, tell={"load": {"8": -6.0}}, at=50, control=bus.control)
    reported = first(rows, fault=lambda fault: "over-current" in fault)
    assert "gripper pushes" in rows[reported].fault
    # Held where it is, so that what it pushes against is let go of; the library heads there at its own speed.
    assert abs(rows[reported - 1].target[6] - rows[reported - 1].position[6]) > 0.01
    assert abs(rows[-1].effort[6]) < abs(rows[reported].effort[6])
    bus.tell(load={"8": 0})
    arm.call("clear")
    assert arm.state().fault == ""


def test_a_gripper_off_its_range_is_a_fault_and_no_lock_up(arm, bus):
    """Below -5 mm the library itself would never return again."""
    arm.cycles(20, RATE)
    bus.tell(stuck=[8], place={"8": -1.0})
    rows = arm.cycles(20, RATE)
    assert "its zero is lost" in rows[-1].fault
    assert not rows[-1].error
    assert rows[-1].position[6] == pytest.approx(-1.0 * 0.088 / 5.03, abs=1e-4)
    bus.tell(stuck=[], place={"8": 2.5})
    assert not arm.cycles(50, RATE)[-1].fault


def test_a_frozen_joint_is_live_on_the_bus_and_does_not_move(arm, bus):
    rows = arm.cycles(150, RATE, by=[0.2, 0, 0, 0, 0, 0, 0], tell={"stuck": [1]}, at=20, control=bus.control)
    assert len({row.position[0] for row in rows[22:]}) == 1
    assert rows[-1].sequence - rows[22].sequence > 100  # the answers are new ones
    assert abs(rows[-1].target[0] - rows[-1].position[0]) > 0.1  # which the runtime sees as not following


def test_a_foreign_node_does_not_end_the_process(arm, bus):
    for strange in (9, 0x7FF, 0x80000123):
        bus.tell(foreign=strange)
    rows = arm.cycles(100, RATE)
    assert not any(row.error or row.fault for row in rows)


def test_a_full_queue_of_the_interface_is_coasted_over(arm, bus):
    rows = arm.cycles(150, RATE, tell={"refuse": [105, 30]}, at=50, control=bus.control)
    assert not any(row.error for row in rows)
    assert len({row.sequence for row in rows[50:54]}) < 4
    assert rows[-1].ended_ns - rows[-1].captured_ns < LOST * 1e9


def test_guided_by_hand_it_is_soft_and_refuses_commands(arm, bus):
    arm.cycles(20, RATE)
    arm.call("guide", True)
    assert set(bus.tell()["kp"].values()) == {0.0}
    with pytest.raises(ArmError, match="guided by hand"):
        arm.call("command", [0.0] * 7)
    bus.tell(place={"1": 0.5})
    arm.call("guide", False)
    arm.state()
    assert bus.tell()["target"]["1"] == pytest.approx(0.5, abs=0.01)
    assert bus.tell()["kp"]["1"] > 50
    bus.tell(place={"1": 0.5})


def test_numbers_that_are_none_never_reach_the_library(arm, bus):
    frames = bus.tell()["frames"]
    with pytest.raises(ArmError, match="expected seven finite numbers"):
        arm.call("command", [float("nan")] * 7)
    assert bus.tell()["frames"] == frames


# ------------------------------------------------------------------------------------------------- before it is enabled


@pytest.fixture
def another(folder):
    """A second bus and an arm on it that is not opened: (bus, options -> arm)."""
    arms = []

    def make(motors="L5", **options):
        bus = CanBus(folder, "can1", motors).start()
        arm = ArmProcess("arx5", {"interface": "can1", "model": "R5"} | options, environment(folder))
        arms.extend((arm, bus))
        return bus, arm

    yield make
    for one in arms:
        one.__exit__() if isinstance(one, ArmProcess) else one.close()


def test_the_wrong_model_is_refused_before_a_motor_is_enabled(another):
    bus, arm = another("L5", model="X5")
    with pytest.raises(ArmError, match=r"\[1, 2, 4\]; this looks like an L5 or R5"):
        arm.open(RATE)
    assert not any(bus.tell()["enabled"].values())
    assert bus.tell()["kp"] == dict.fromkeys(map(str, arx5.MOTORS), 0.0)


def test_an_x5_is_known_by_its_own_protocol(another):
    bus, arm = another("X5", model="X5")
    arm.open(RATE)
    rows = arm.cycles(200, RATE, by=[0.1, 0.05, 0.05, 0, 0, 0, 0])
    assert not any(row.error or row.fault for row in rows)
    assert np.abs(np.subtract(arm.cycles(100, RATE)[-1].position, rows[-1].target)).max() < 5e-3
    bus.tell(silent=[2])
    assert {row.error for row in arm.cycles(200, RATE)} == {"", "DeviceLostError"}
    assert bus.tell(silent=[], error={"4": 3})["frames"] > 0
    deadline = time.monotonic() + 5
    while True:
        try:
            assert arm.state().fault == "motor 4: error 3"
            break
        except (ArmError, AssertionError):
            assert time.monotonic() < deadline


def test_what_is_not_there_or_not_ours_is_said(another, tmp_path):
    bus, arm = another(adapter="A1")
    with pytest.raises(ArmError, match="the arms may be swapped"):
        arm.open(RATE)
    arm.__exit__()
    with ArmProcess("arx5", {"interface": "can1", "model": "R5"}, environment(bus.control.parent)) as arm:
        bus.tell(silent=[7])
        with pytest.raises(ArmError, match=r"no answer from \[7\]"):
            arm.open(RATE)
        bus.tell(silent=[], place={"8": -1.0})
        with pytest.raises(ArmError, match="found the gripper at -17 mm"):
            arm.open(RATE)
        with pytest.raises(ArmError, match="expected at most 500"):
            arm.open(600)
    missing = ArmProcess("arx5", {"interface": "can7", "model": "R5"}, environment(bus.control.parent))
    with missing as arm, pytest.raises(ArmError, match="DeviceNotFoundError: can7: found no such CAN interface"):
        arm.open(RATE)


def test_closing_damps_and_lets_the_arm_sink(another):
    bus, arm = another(gravity=[0, 0, 0])
    arm.open(RATE)
    arm.cycles(20, RATE)
    assert bus.tell()["kp"]["1"] > 50
    arm.call("close")
    assert set(bus.tell()["kp"].values()) == {0.0}
    arm.call("close")
    with pytest.raises(ArmError, match="is not open"):
        arm.state()


def test_left_and_right_are_told_apart_without_enabling_anybody(another, bus, arm, folder, monkeypatch):
    other, _ = another()
    script = (
        "import sys; from chatvla_edge.drivers.arms import swap; import json\n"
        "print(json.dumps(swap.positions(sys.argv[1])))"
    )

    def ask(interface):
        return subprocess.run(
            [sys.executable, "-c", script, interface],
            env=os.environ | environment(folder),
            capture_output=True,
            text=True,
        )

    before = json.loads(ask("can1").stdout)
    other.tell(place={"2": 0.9})
    after = json.loads(ask("can1").stdout)
    assert swap.moved({"left": before, "right": before}, {"left": after, "right": before}) == "left"
    assert not any(other.tell()["enabled"].values())
    with pytest.raises(ValueError, match="expected one arm that moved"):
        swap.moved({"left": before, "right": before}, {"left": before, "right": before})
    assert "hold the arm" in ask("can0").stderr  # which another process drives


def test_without_the_filter_a_foreign_frame_aborts_the_library(another, folder):
    """What the filter is for: should a release of the library end this, the filter may go."""
    bus, _ = another()
    script = (
        "import arx5_interface as a, sys\n"
        "arm = a.Arx5JointController('L5', 'can1')\n"
        "sys.stderr.write('up\\n'); sys.stderr.flush(); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], env=os.environ | environment(folder), stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    ) as alone:  # fmt: skip
        while b"up" not in alone.stderr.readline():
            assert alone.poll() is None
        bus.tell(foreign=9)
        assert alone.wait(10) == -6
        alone.stdin.close()


# ---------------------------------------------------------------------------------------------------- without a process


def test_the_librarys_limits_are_these():
    import arx5_interface

    for model in ("L5", "X5"):
        robot = arx5_interface.RobotConfigFactory.get_instance().get_config(model)
        own = arx5_interface.ControllerConfigFactory.get_instance().get_config("joint_controller", 6)
        np.testing.assert_array_equal(robot.joint_pos_min, arx5.LOWER)
        np.testing.assert_array_equal(robot.joint_pos_max, arx5.UPPER)
        np.testing.assert_array_equal(robot.joint_vel_max, arx5.VELOCITY)
        np.testing.assert_array_equal(robot.joint_torque_max, arx5.TORQUE)
        np.testing.assert_array_equal(own.default_kp, arx5.STIFFNESS)
        np.testing.assert_array_equal(own.default_kd, arx5.DAMPING)
        assert (*robot.motor_id, robot.gripper_motor_id) == arx5.MOTORS
        assert (robot.gripper_width, robot.gripper_open_readout) == (0.088, 5.03)
        assert (robot.gripper_vel_max, robot.gripper_torque_max) == (arx5.GRIPPER_VELOCITY, arx5.GRIPPER_TORQUE)
        assert own.over_current_cnt_max == arx5.OVER_CURRENT_CYCLES
        ec = tuple(n for n, kind in zip(robot.motor_id, robot.motor_type, strict=True) if kind.name == "EC_A4310")
        assert ec == arx5.EC_JOINTS[model]


def test_frames_survive_their_way():
    for position, velocity, torque in ((0.0, 0.0, 0.0), (12.4, -17.0, 3.0), (-7.25, 3.5, -17.9)):
        for make, kind in ((can_motors.damiao_reply, "damiao"), (can_motors.ec_reply, "ec")):
            reply = can_motors.reply_of(*make(5, 1, position, velocity, torque))
            assert (reply.motor, reply.family, reply.status) == (5, kind, 1)
            assert (reply.position, reply.velocity, reply.torque) == pytest.approx(
                (position, velocity, torque), abs=0.012
            )
    assert can_motors.reply_of(3, bytes(8)) is None  # a request
    assert can_motors.reply_of(9, bytes(8)) is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "model"),
        ({"model": "R7"}, "model"),
        ({"model": "R5", "stiffness": [0, 1, 1, 1, 1, 1]}, "above 0"),
        ({"model": "R5", "gripper_open": 0.0}, "gripper_open"),
        ({"model": "R5", "interface": "../can0"}, "interface"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(options, said):
    with pytest.raises(ValueError, match=said):
        registry.create("arms", "arx5", options)


def test_a_newer_gripper_turns_the_other_way():
    arm = registry.create("arms", "arx5", {"model": "R5", "gripper_open": -3.4, "gripper_width": 0.082})
    assert arm._opening(-3.4) == pytest.approx(0.082)
    assert arm.bounds().upper[-1] == 0.082


def test_the_adapters_serial_number_is_read_above_the_interface(tmp_path, monkeypatch):
    monkeypatch.setattr(arx5, "NETWORK", tmp_path)
    usb = tmp_path / "usb" / "1-1" / "1-1:1.0"
    usb.mkdir(parents=True)
    (usb.parent / "serial").write_text("207F33\n")
    (tmp_path / "can0").mkdir()
    (tmp_path / "can0" / "device").symlink_to(usb)
    assert arx5.adapter_of("can0") == "207F33"
    assert arx5.adapter_of("can1") is None
    assert struct.calcsize("=IB3x8s") == can_motors.FRAME.size == 16
