"""The simulated camera: rate, newest-first, what can be read in the picture, faults. In virtual time."""

import cv2
import numpy as np
import pytest

from chatvla_edge.drivers.errors import DeviceLostError, DeviceNotFoundError, DeviceUnsuitableError
from chatvla_edge.drivers.protocols import Camera
from chatvla_edge.drivers.sim import stamp
from chatvla_edge.drivers.sim.camera import SimCamera, SimCameraOptions
from chatvla_edge.drivers.sim.faults import switch


class Clock:
    """Host time that goes on when somebody sleeps."""

    def __init__(self):
        self.ns = 10**12

    def __call__(self):
        return self.ns

    def sleep(self, seconds):
        self.ns += max(1, round(1e9 * seconds))


@pytest.fixture
def clock():
    return Clock()


def opened(clock, size=(480, 640), rate=30.0, **options):
    camera = SimCamera(SimCameraOptions(**options), clock, clock.sleep)
    camera.open(*size, rate)
    return camera


def test_it_is_what_the_runtime_asks_for():
    assert isinstance(SimCamera(SimCameraOptions()), Camera)


def test_frames_come_at_the_native_rate_none_lost_none_doubled(clock):
    camera = opened(clock, rate=60.0)
    begin = clock.ns
    frames = [camera.read(1.0) for _ in range(120)]
    assert [frame.sequence for frame in frames] == list(range(120))
    assert (clock.ns - begin) * 1e-9 == pytest.approx(0.03 + 119 / 60, abs=1e-3)
    assert all(0 <= frame.received_ns - frame.captured_ns - 30_000_000 < 1_000_000 for frame in frames)
    assert (camera.health().frames, camera.health().lost) == (120, 0)


def test_what_was_not_read_in_time_is_gone_and_counted(clock):
    camera = opened(clock)
    camera.read(1.0)
    clock.sleep(1.0)
    late = camera.read(0.0)
    assert late.sequence == 30
    assert camera.health().lost == 29
    assert camera.read(1.0).sequence == 31


def test_a_frame_not_yet_due_is_not_waited_for_longer_than_asked(clock):
    camera = opened(clock)
    camera.read(1.0)
    before = clock.ns
    with pytest.raises(TimeoutError):
        camera.read(0.01)
    assert clock.ns - before == pytest.approx(10_000_000, rel=0.1)


@pytest.mark.parametrize("size", [(480, 640), (720, 1280), (376, 672), (64, 64)])
def test_number_and_time_can_be_read_in_the_picture(clock, size):
    frame = opened(clock, size).read(1.0)
    assert stamp.read(frame.image) == (frame.sequence, frame.captured_ns)


@pytest.mark.parametrize("size", [(240, 320), (252, 308), (270, 480)])
def test_the_stamp_survives_what_happens_on_the_way_to_a_policy(clock, size):
    frame = opened(clock).read(1.0)
    small = cv2.resize(frame.image, size[::-1])
    _, file = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 70])
    assert stamp.read(cv2.imdecode(file, cv2.IMREAD_COLOR)) == (frame.sequence, frame.captured_ns)


def test_a_picture_without_a_stamp_reads_as_none():
    random = np.random.default_rng(1)
    assert stamp.read(random.integers(0, 256, (480, 640, 3), np.uint8)) is None
    assert stamp.read(np.zeros((480, 640, 3), np.uint8)) is None
    assert stamp.read(np.zeros((8, 8, 3), np.uint8)) is None


def test_the_picture_below_the_stamp_moves(clock):
    camera = opened(clock)
    first = camera.read(1.0).image[60:].copy()
    second = camera.read(1.0).image[60:]
    assert (first != second).mean() > 0.3


def test_a_frozen_camera_looks_alive_by_its_numbers_only(clock, tmp_path):
    camera = opened(clock, fault_switch=tmp_path / "fault")
    old = camera.read(1.0)
    shown = old.image.copy()
    switch(tmp_path / "fault", "frozen")
    new = camera.read(1.0)
    assert new.sequence == old.sequence + 1
    assert new.captured_ns > old.captured_ns
    np.testing.assert_array_equal(new.image, shown)
    switch(tmp_path / "fault", "")
    assert stamp.read(camera.read(1.0).image)[0] == 2


def test_the_other_faults_show_as_what_they_are(clock, tmp_path):
    file = tmp_path / "fault"
    camera = opened(clock, fault_switch=file)
    camera.read(1.0)
    switch(file, "black")
    assert not camera.read(1.0).image.any()
    switch(file, "clock_step")
    stepped = camera.read(1.0)
    assert stepped.received_ns - stepped.captured_ns > 1_000_000_000
    switch(file, "silent")
    with pytest.raises(TimeoutError):
        camera.read(0.5)
    switch(file, "error")
    with pytest.raises(RuntimeError, match="on purpose"):
        camera.read(0.5)
    switch(file, "slow")
    numbers = [camera.read(1.0).sequence for _ in range(4)]
    assert np.diff(numbers).tolist() == [4, 4, 4]


def test_an_unplugged_camera_is_lost_until_it_is_opened_again(clock, tmp_path):
    file = tmp_path / "fault"
    camera = opened(clock, fault_switch=file)
    switch(file, "unplugged")
    with pytest.raises(DeviceLostError):
        camera.read(1.0)
    with pytest.raises(DeviceNotFoundError):
        camera.open(480, 640, 30.0)
    switch(file, "")
    with pytest.raises(DeviceLostError):
        camera.read(1.0)
    camera.close()
    camera.close()
    camera.open(480, 640, 30.0)
    assert camera.read(1.0).sequence == 0


def test_a_picture_too_small_for_its_stamp_is_refused(clock):
    with pytest.raises(DeviceUnsuitableError, match="found 32x64"):
        opened(clock, (32, 64))
