"""Worlds that several device processes share: what they see, and what happens when one of them is killed."""

import mmap
import os
import signal
import subprocess
import sys
import time
import uuid
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from support.plain_world import Painter

from chatvla_edge.drivers.errors import DeviceLostError, DeviceUnsuitableError, MissingLibraryError
from chatvla_edge.drivers.sim.faults import switch
from chatvla_edge.drivers.sim.shared import WorldArm, WorldArmOptions, WorldCamera, WorldCameraOptions
from chatvla_edge.drivers.sim.world import Link, Record, WorldSpec

TESTS = Path(__file__).parents[2]


@pytest.fixture
def spec(monkeypatch):
    """A world that nobody else on this machine has; it ends by itself when its devices are closed."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    return WorldSpec(kind="support.plain_world:PlainWorld", name=f"test-{uuid.uuid4().hex[:16]}")


@pytest.fixture
def arm(spec):
    arms = []

    def arm(name="left", **options):
        arms.append(WorldArm(name, spec, WorldArmOptions(**options)))
        arms[-1].open(500)
        return arms[-1]

    yield arm
    for one in arms:
        one.close()


@pytest.fixture
def camera(spec):
    camera = WorldCamera(spec, WorldCameraOptions(), Painter)
    camera.open(64, 96, 100.0)
    yield camera
    camera.close()


def until(holds, seconds=10.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.01)


def test_arms_and_camera_share_one_world(arm, camera):
    left, right = arm("left"), arm("right")
    left.command(np.array([0.5, -0.5]))
    right.command(np.array([0.1, 0.2]))
    until(lambda: left.state().position == pytest.approx([0.5, -0.5]))
    assert right.state().position == pytest.approx([0.1, 0.2])
    assert left.state().target == [0.5, -0.5]
    assert camera.read(1.0).image[0, 0, 0] == 50
    assert camera.health().facts["painter"] == "plain"


def test_the_world_steps_in_real_time_whoever_asks(arm):
    left = arm()
    first, begin = left.state(), time.monotonic_ns()
    time.sleep(0.5)
    last, end = left.state(), time.monotonic_ns()
    # The steps between two states are the time between their stamps, and the stamps are the host's time.
    assert (last.captured_ns - first.captured_ns) / 2e6 == pytest.approx(last.sequence - first.sequence, abs=60)
    assert first.captured_ns <= begin
    assert last.captured_ns <= end


def test_a_camera_says_when_what_it_shows_was(camera):
    frames = [camera.read(1.0) for _ in range(10)]
    stamps = [frame.captured_ns for frame in frames]
    assert stamps == sorted(stamps)
    assert all(frame.captured_ns <= frame.received_ns for frame in frames)
    assert all(b.sequence > a.sequence for a, b in pairwise(frames))


def test_an_arm_has_one_driver_at_a_time(arm):
    arm("left")
    with pytest.raises(DeviceUnsuitableError, match="driven by another process"):
        arm("left")
    with pytest.raises(DeviceUnsuitableError, match="expected one of: left, right"):
        arm("middle")


def test_devices_that_mean_different_worlds_are_told(arm, spec):
    arm()
    other = WorldSpec(kind=spec.kind, name=spec.name, arguments={"start": 1.0})
    with pytest.raises(DeviceUnsuitableError, match="runs already, with other options"):
        Link(other, "camera", "top")


def test_a_world_that_cannot_be_made_says_why(spec):
    with pytest.raises(DeviceUnsuitableError, match="no such table"):
        Link(WorldSpec(kind="support.plain_world:Failing", name=spec.name), "camera", "top")
    with pytest.raises(MissingLibraryError, match="no_such_physics"):
        Link(WorldSpec(kind="no_such_physics:World", name=spec.name), "camera", "top")


def test_a_word_to_the_world_changes_it_and_it_stays(arm):
    left = arm()
    left.command(np.array([0.3, 0.3]))
    until(lambda: left.state().position == pytest.approx([0.3, 0.3]))
    assert left.tell(reset=2.0)["axes"] == [2.0] * 4
    time.sleep(0.05)
    assert left.state().position == [2.0, 2.0]


CHILD = """
import sys, time, numpy as np
from chatvla_edge.drivers.sim.shared import WorldArm, WorldArmOptions
from chatvla_edge.drivers.sim.world import WorldSpec
arm = WorldArm("left", WorldSpec.model_validate_json(sys.argv[1]), WorldArmOptions())
arm.open(500)
print("open", flush=True)
while True:
    arm.command(np.array([9.0, 9.0]))
"""


@pytest.mark.parametrize("attempt", range(2))
def test_an_arm_s_process_killed_while_it_writes_costs_nobody_else_anything(arm, spec, attempt):
    right = arm("right")
    child = subprocess.Popen([sys.executable, "-c", CHILD, spec.model_dump_json()], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"open\n"
    time.sleep(0.05)
    child.kill()
    child.wait()
    before = right.state().sequence
    until(lambda: right.state().sequence > before + 10)
    # It can be driven again, goes on from where it is, and what was half written counts for nothing.
    again = []

    def reopened():
        try:
            again.append(arm("left"))
        except DeviceUnsuitableError:  # the world has not noticed yet
            return False
        return True

    until(reopened)
    left = again[0]
    left.command(np.array([0.0, 0.0]))
    until(lambda: left.state().target == [0.0, 0.0])


def test_a_world_that_was_killed_is_lost_and_a_new_one_made(arm, spec):
    left = arm()
    left.command(np.array([0.4, 0.4]))
    until(lambda: left.state().position == pytest.approx([0.4, 0.4]))
    os.kill(left.tell(pid=True)["pid"], signal.SIGKILL)

    def lost():
        try:
            left.state()
        except DeviceLostError:
            return True
        return False

    until(lost)
    with pytest.raises(DeviceLostError):
        left.command(np.zeros(2))
    left.close()
    left.open(500)
    assert left.state().position == [0.0, 0.0]


def test_a_world_without_devices_ends(spec, monkeypatch):
    monkeypatch.setenv("CHATVLA_EDGE_WORLD_LINGER", "0.2")
    arm = WorldArm("left", spec, WorldArmOptions())
    arm.open(500)
    pid = arm.tell(pid=True)["pid"]
    arm.close()

    def ended():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        return False

    until(ended)


def test_a_record_is_read_whole_or_not_at_all():
    memory = mmap.mmap(-1, 4096)
    record = Record(memory, 64, 5)
    assert record.read() is None
    record.write(7, 123, np.arange(5.0))
    sequence, time_ns, values = record.read()
    assert (sequence, time_ns, values.tolist()) == (7, 123, [0.0, 1.0, 2.0, 3.0, 4.0])
    memory[64 + 24 + 3] ^= 1  # as after half a write
    assert record.read() is None


def test_faults_are_those_of_every_simulated_arm(arm, tmp_path):
    left = arm("left", fault_switch=tmp_path / "fault")
    switch(tmp_path / "fault", "silent")
    old = left.state()
    time.sleep(0.02)
    assert left.state().sequence == old.sequence
    switch(tmp_path / "fault", "frozen")
    left.command(np.array([1.0, 1.0]))
    time.sleep(0.05)
    frozen = left.state()
    assert frozen.sequence > old.sequence
    assert frozen.position == old.position
    switch(tmp_path / "fault", "")
    left.command(np.array([1.0, 1.0]))
    until(lambda: left.state().position[0] > 0.05)
    left.stop()
    at = left.state().position
    time.sleep(0.1)
    assert left.state().position == pytest.approx(at, abs=0.02)
