"""A Robotiq 2F-85 through pymodbus, against a Modbus server with fingers on a pseudo-terminal."""

import time

import numpy as np
import pytest

from chatvla_edge.drivers import registry
from chatvla_edge.drivers.errors import DeviceLostError, DeviceNotFoundError, DeviceUnsuitableError
from chatvla_edge.drivers.grippers import robotiq
from chatvla_edge.drivers.protocols import Gripper
from chatvla_edge.drivers.standins.control import until
from chatvla_edge.drivers.standins.robotiq import RobotiqStandIn

pytest.importorskip("pymodbus", reason="pymodbus is not installed (extra `robotiq`)")
pytestmark = pytest.mark.slow  # transactions per second are counted, which wants the machine for itself

OPEN, HALF = np.array([0.085]), np.array([0.04])
SHUT = np.array([0.0])
PATIENCE = 20.0  # s, for a test that hangs


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    with RobotiqStandIn(tmp_path_factory.mktemp("robotiq") / "port") as device:
        yield device


@pytest.fixture
def fresh(device):
    """The gripper as it is switched on, and a driver that is not open."""
    device.tell(unplug=False, silent=False, corrupt=0, lose=0, fault=0, object=None, frozen=False, deactivate=True)
    device.tell(place=100)
    gripper = registry.create("arms", "robotiq_2f85", {"port": str(device.port)})
    yield gripper
    gripper.close()


@pytest.fixture
def gripper(fresh):
    """Opened, activated, half open."""
    fresh.open(50)
    go(fresh, HALF)
    return fresh


def go(gripper, to):
    gripper.command(to)
    assert until(lambda: abs(gripper.state().position[0] - to[0]) < 1e-3, PATIENCE), gripper.state()


def lost(gripper):
    try:
        gripper.state()
    except DeviceLostError:
        return True
    return False


def test_it_is_a_gripper(fresh):
    assert isinstance(fresh, Gripper)


def test_opening_writes_nothing_and_the_first_command_activates(fresh, device):
    writes = device.tell()["writes"]
    fresh.open(50)
    state = fresh.state()
    fresh.stop()
    time.sleep(0.1)
    assert device.tell()["writes"] == writes
    assert not device.tell()["active"]
    assert fresh.holds() is None
    assert state.fault == ""
    assert state.position[0] == pytest.approx(0.085 * 130 / 227, abs=1e-4)
    go(fresh, HALF)
    assert device.tell()["active"]
    assert fresh.holds() is False


def test_commands_coalesce_and_nobody_waits_for_the_line(gripper, device):
    before = device.tell()
    began = time.monotonic()
    for step in range(1000):
        gripper.command(HALF + 0.02 * np.sin(step / 100))
    commanding = time.monotonic() - began
    assert until(lambda: gripper.state().target == gripper.state().position, PATIENCE)
    after = device.tell()
    assert after["writes"] - before["writes"] <= after["transactions"] - before["transactions"] + 1
    assert after["writes"] - before["writes"] < 200
    assert commanding < 100 * robotiq.TIMEOUT  # a thousand transactions would be 5 s of wire alone
    go(gripper, HALF)
    writes = device.tell()["writes"]
    for _ in range(100):
        gripper.command(HALF)
    time.sleep(0.1)
    assert device.tell()["writes"] == writes


def test_more_than_fifty_transactions_a_second(gripper, device):
    before, began = device.tell()["transactions"], time.monotonic()
    number = gripper.state().sequence
    for step in range(30):
        gripper.command(HALF + 0.01 * np.sin(step / 5))
        time.sleep(1 / 30)
    seconds = time.monotonic() - began
    transactions = device.tell()["transactions"] - before
    print(f"\n{transactions / seconds:.0f} transactions/s")
    assert transactions / seconds > 50
    assert gripper.state().sequence - number >= transactions - 3  # each of them is a state


def test_an_object_is_felt_and_a_stop_keeps_the_force(gripper, device):
    device.tell(object=190)
    gripper.command(SHUT)
    assert until(lambda: gripper.holds() is True, PATIENCE)
    assert gripper.state().position[0] == pytest.approx(0.085 * 40 / 227, abs=1e-3)
    writes = device.tell()["writes"]
    gripper.stop()
    gripper.stop()
    time.sleep(0.1)
    told = device.tell()
    assert told["writes"] == writes
    assert told["going"]
    assert told["requested"] > 190  # it still closes on the object


def test_a_stop_in_free_motion_stands_there(gripper, device):
    go(gripper, OPEN)
    gripper.command(SHUT)
    assert until(lambda: gripper.state().position[0] < 0.08, PATIENCE)
    gripper.stop()
    assert until(lambda: gripper.state().target[0] > 0.0, PATIENCE)
    assert until(lambda: gripper.state().target == gripper.state().position, PATIENCE)
    assert gripper.state().position[0] > 0.01


@pytest.mark.parametrize("fault", [{"corrupt": 2}, {"lose": 2}], ids=["wrong checksum", "lost answer"])
def test_two_bad_answers_are_old_stamps_and_nothing_more(gripper, device, fault):
    gripper.options.__dict__["lost_after"] = 5.0  # two time-outs, and a machine that may stall meanwhile
    before = gripper.state()
    device.tell(**fault)
    assert until(lambda: time.monotonic_ns() - gripper.state().captured_ns > 0.5e9 * robotiq.TIMEOUT, PATIENCE)
    assert gripper.state().sequence - before.sequence < 20  # no number for an answer that was not one
    assert until(lambda: time.monotonic_ns() - gripper.state().captured_ns < 0.5e9 * robotiq.TIMEOUT, PATIENCE)


@pytest.mark.parametrize(
    ("fault", "cure"),
    [({"silent": True}, {"silent": False}), ({"corrupt": -1}, {"corrupt": 0}), ({"unplug": True}, {"unplug": False})],
    ids=["silent", "every checksum wrong", "port gone"],
)
def test_a_lost_line_is_raised_and_comes_back_by_itself_without_a_motion(gripper, device, fault, cure):
    device.tell(**fault)
    last = gripper.state()
    assert until(lambda: lost(gripper), PATIENCE)
    age = (time.monotonic_ns() - last.captured_ns) / 1e9
    assert age > gripper.options.lost_after
    assert gripper.holds() is None
    with pytest.raises(DeviceLostError, match="check cable and power"):
        gripper.command(OPEN)
    writes = device.tell()["writes"]
    device.tell(**cure)
    assert until(lambda: not lost(gripper), PATIENCE)
    time.sleep(0.1)
    assert device.tell()["writes"] == writes
    assert gripper.state().position[0] == pytest.approx(HALF[0], abs=1e-3)
    go(gripper, OPEN)


def test_a_gripper_that_lost_its_power_is_a_fault_until_cleared(gripper, device):
    writes = device.tell(deactivate=True)["writes"]
    assert until(lambda: gripper.state().fault == "no longer activated: it has lost its power", PATIENCE)
    gripper.command(OPEN)
    time.sleep(0.1)
    assert device.tell()["writes"] == writes  # an activation is a motion
    gripper.clear()
    assert gripper.state().fault == ""
    assert not device.tell()["active"]
    go(gripper, OPEN)


def test_the_fault_register_is_named_and_cleared(gripper, device):
    device.tell(fault=0xE)
    assert until(lambda: gripper.state().fault == "over-current", PATIENCE)
    gripper.clear()
    assert gripper.state().fault == ""
    device.tell(fault=0x9)  # minor: nobody spoke to it
    time.sleep(0.1)
    assert gripper.state().fault == ""


def test_frozen_fingers_are_live_on_the_line(gripper, device):
    device.tell(frozen=True)
    asked = gripper.state().sequence
    assert until(lambda: gripper.state().sequence > asked + 3, PATIENCE)
    first = gripper.state()
    gripper.command(OPEN)
    assert until(lambda: gripper.state().sequence > first.sequence + 30, PATIENCE)
    state = gripper.state()
    assert state.position == first.position
    assert abs(state.target[0] - state.position[0]) > 0.04


def test_what_is_not_there_is_said(device, tmp_path, monkeypatch):
    monkeypatch.setattr(robotiq, "OPENING", 0.3)
    with pytest.raises(DeviceNotFoundError, match=r"found no .*expected the gripper's serial adapter"):
        registry.create("arms", "robotiq_2f85", {"port": str(tmp_path / "none")}).open(50)
    device.tell(silent=False, corrupt=0)
    with pytest.raises(DeviceNotFoundError, match="no answer of unit 3 at 115200 baud"):
        registry.create("arms", "robotiq_2f85", {"port": str(device.port), "unit": 3}).open(50)


def test_the_latency_timer_is_set_or_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(robotiq, "SERIAL_DEVICES", tmp_path)
    robotiq._check_latency("ttyS0", 1)  # no FTDI adapter
    timer = tmp_path / "ttyUSB0" / "latency_timer"
    timer.parent.mkdir()
    timer.write_text("16\n")
    robotiq._check_latency("ttyUSB0", 16)
    assert timer.read_text() == "16\n"
    robotiq._check_latency("ttyUSB0", 1)
    assert timer.read_text() == "1\n"
    timer.write_text("16\n")
    monkeypatch.setattr(type(timer), "write_text", lambda *_: (_ for _ in ()).throw(PermissionError("refused")))
    with pytest.raises(DeviceUnsuitableError, match="found a latency timer of 16 ms, expected at most 1"):
        robotiq._check_latency("ttyUSB0", 1)


def test_registers_are_those_of_the_manual():
    # 09 10 03E8 0003 06 0900 00FF FFFF: close; 09 04 07D0 0003, answers B9 .. BD (holds) and F9 .. 0D (open)
    assert robotiq.outputs(robotiq.ACTIVATE | robotiq.GO, 255, 255, 255) == [0x0900, 0x00FF, 0xFFFF]
    held = robotiq.status_of([0xB900, 0x00FF, 0xBD00], 0, 1)
    assert (held.activation, held.met, held.requested, held.position, held.going) == (3, 2, 255, 0xBD, True)
    opened = robotiq.status_of([0xF900, 0x0000, 0x0D00], 0, 1)
    assert (opened.activation, opened.met, opened.position) == (3, 3, 0x0D)
    assert robotiq.status_of([0x1100, 0, 0], 0, 1).activation == 1
    assert robotiq.status_of([0x0000, 0x0E00, 0], 0, 1).fault == 0xE


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "port"),
        ({"port": "/dev/x", "speed": 256}, "speed"),
        ({"port": "/dev/x", "closed_count": 2}, "closed_count"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(options, said):
    with pytest.raises(ValueError, match=said):
        registry.create("arms", "robotiq_2f85", options)
