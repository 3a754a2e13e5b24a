"""A camera's process publishes every frame, tells what is wrong with its camera, and can always be ended."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from support.cameras import PYTHON, CameraRun, orphan

from chatvla_edge.drivers.rig import Native
from chatvla_edge.drivers.sim import stamp
from chatvla_edge.drivers.sim.camera import SimCamera, SimCameraOptions
from chatvla_edge.runtime.camera_frames import CameraSegments, FrameWriter
from chatvla_edge.runtime.camera_process import GAVE_UP, HUNG, NO_USE

DRIVER = "support.cameras:TestCamera"


def run(fault="", **options):
    return CameraRun(DRIVER, {"fault": fault, **options})


@pytest.fixture(scope="module", autouse=True)
def hopeless():
    """Three cameras whose end takes its time: it passes while the other tests run."""
    with run("unplug", at=0, heals=False) as away, run("hang") as hung, run("spin") as deaf:
        yield {"away": away, "hung": hung, "deaf": deaf}


def test_a_frame_comes_out_of_the_slot_as_it_went_in():
    segments = CameraSegments.create("top", 33, 47)  # no multiple of a word
    writer, reader = FrameWriter(segments.frame.fd, segments.status.fd, 33, 47), segments.frames()
    assert (reader.newest(), reader.status()) == (None, None)
    image = np.random.default_rng(0).integers(0, 256, (33, 47, 3), np.uint8)
    assert writer.publish(image, 11, 22, 33, "arrival")
    frame = reader.newer()
    assert np.array_equal(frame.image, image)
    assert (frame.captured_ns, frame.received_ns, frame.sequence, frame.number) == (11, 22, 33, 1)
    assert frame.clock == "arrival"
    assert frame.published_ns <= time.monotonic_ns()
    assert reader.newer() is None
    assert reader.newest().number == 1


def test_pictures_that_are_equal_bit_by_bit_are_told():
    segments = CameraSegments.create("top", 48, 64)
    writer = FrameWriter(segments.frame.fd, segments.status.fd, 48, 64)
    image = np.zeros((48, 64, 3), np.uint8)
    assert writer.publish(image, 0, 0, 0, "device")
    assert not writer.publish(image, 0, 0, 1, "device")
    image[5, 3, 1] = 1  # in none of the rows that are looked at first
    assert writer.publish(image, 0, 0, 2, "device")
    with pytest.raises(ValueError, match=r"expected \(48, 64, 3\)"):
        writer.publish(image[:24], 0, 0, 3, "device")


def test_facts_that_do_not_fit_are_cut():
    segments = CameraSegments.create("top", 48, 64)
    writer = FrameWriter(segments.frame.fd, segments.status.fd, 48, 64)
    writer.facts({"firmware": "5.16", "long": "x" * 2000})
    writer.status("streaming", 30.0, frames=7)
    status = segments.frames().status()
    assert (status.state, status.rate, status.frames, status.facts) == ("streaming", 30.0, 7, {"firmware": "5.16"})


def test_every_frame_is_published_once_and_sigterm_ends_the_process():
    with run() as camera:
        camera.streaming()
        numbers, pairs = [], set()
        end = time.monotonic() + 1
        while time.monotonic() < end:
            if (frame := camera.reader.newer()) is not None:
                numbers.append(frame.number)
                pairs.add((frame.number, frame.sequence, int(frame.image[0, 0, 0])))
            time.sleep(0.001)
        assert all((number == sequence and pixel == sequence % 251) for number, sequence, pixel in pairs)
        assert len(set(numbers)) == len(numbers)
        assert camera.status.facts == {"kind": "test"}
        assert camera.terminate()[0] == 0


@pytest.mark.parametrize("priority", [None, 5])
def test_the_loop_runs_where_and_as_it_is_told(priority):
    with CameraRun(DRIVER, {}, cpus=[0], priority=priority, python=Path(sys.executable)) as camera:
        camera.streaming()
        tasks = Path(f"/proc/{camera.process.pid}/task").glob("*/status")
        assert any("Cpus_allowed_list:\t0\n" in task.read_text() for task in tasks)
        code, words = camera.terminate()
        assert code == 0
        # Whether FIFO is permitted depends on the machine; that it was asked for does not.
        assert ("obtained" in words or "refused" in words) == (priority is not None)


def test_silence_is_told_then_the_camera_is_opened_again():
    with run("silent") as camera:
        camera.streaming()
        silent = camera.until(lambda: camera.state() == "silent")
        assert camera.status.rate == 0
        again = camera.until(lambda: camera.status.opened == 2)
        assert silent < again + silent
        camera.streaming(20)


def test_an_unplugged_camera_is_opened_again():
    with run("unplug") as camera:
        camera.until(lambda: camera.status is not None and camera.status.opened == 2)
        camera.streaming(20)


def test_frozen_pictures_are_told_then_the_camera_is_opened_again():
    with run("frozen content") as camera:
        camera.until(lambda: (status := camera.status) is not None and status.identical > 3)
        camera.until(lambda: camera.status.opened == 2)
        camera.until(lambda: camera.status.identical == 0 and camera.status.frames > 60)


def test_a_still_picture_is_allowed_where_the_source_may_stand_still():
    with CameraRun(DRIVER, {"fault": "frozen content"}, frozen_s=None) as camera:
        camera.until(lambda: (status := camera.status) is not None and status.identical > 65)
        assert camera.status.opened == 1


def test_half_the_rate_is_told():
    with CameraRun(DRIVER, {"fault": "slow", "at": 60}) as camera:
        camera.until(lambda: (status := camera.status) is not None and status.frames >= 60)
        full = camera.status.rate
        camera.until(lambda: camera.status.frames >= 121)
        assert 0.4 < camera.status.rate / full < 0.65


def test_an_unsuitable_camera_is_not_tried_twice():
    with run("unsuitable") as camera:
        code, words = camera.ended()
        assert code == NO_USE
        assert "found a toaster" in words
        assert "opening again" not in words


def test_a_call_that_never_returns_does_not_outlive_sigterm():
    with run("hang", at=5) as camera:
        camera.streaming()
        assert camera.terminate()[0] == 0


def test_a_camera_does_not_outlive_its_supervisor():
    parent = subprocess.run([PYTHON, "-c", orphan()], stdout=subprocess.PIPE, text=True, timeout=20)
    status = Path(f"/proc/{int(parent.stdout)}/stat")
    end = time.monotonic() + 10
    while status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z":
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_killed_camera_leaves_its_last_frame_and_the_next_process_goes_on_counting():
    with run() as camera:
        camera.streaming()
        camera.process.kill()
        camera.process.wait()
        number = camera.reader.newest().number
        beat = camera.status.beat_ns
        second = CameraRun.__new__(CameraRun)
        second.segments, second.reader = camera.segments, camera.reader
        from chatvla_edge.runtime.camera_process import start_camera

        second.process = start_camera(camera.segments, DRIVER, {}, 30, stderr=subprocess.PIPE)
        with second:
            second.until(lambda: second.reader.newest().number > number + 3)
            assert second.status.beat_ns > beat


@pytest.mark.slow
def test_a_camera_that_stays_away_is_given_up_with_last_words(hopeless):
    code, words = hopeless["away"].ended()
    assert code == GAVE_UP
    assert "given up after 6 attempts: the device is gone" in words


@pytest.mark.slow
def test_a_call_that_never_returns_ends_the_process(hopeless):
    code, words = hopeless["hung"].ended()
    assert code == HUNG
    assert "read() of the driver support.cameras:TestCamera has not returned for 3 s" in words
    assert "in read" in words  # the stack


@pytest.mark.slow
def test_a_call_that_keeps_the_interpreters_lock_is_ended_by_the_kernel(hopeless):
    assert hopeless["deaf"].ended(40)[0] == -signal.SIGALRM


def test_frames_of_a_larger_device_are_scaled_as_the_rig_says_before_they_are_published():
    native = Native(height=720, width=1280, filter="bilinear_cv2")
    with CameraRun("sim_camera", {}, height=270, width=480, native=native) as camera:
        camera.streaming()
        frame = camera.reader.newest()
        assert frame.image.shape == (270, 480, 3)
        assert stamp.read(frame.image) == (frame.sequence, frame.captured_ns)
    device = SimCamera(SimCameraOptions())
    device.open(720, 1280, 30.0)
    image, _ = device._see(frame.sequence, frame.captured_ns)
    np.testing.assert_array_equal(frame.image, cv2.resize(image, (480, 270), interpolation=cv2.INTER_LINEAR))
