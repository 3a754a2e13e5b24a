"""A recording is played at its rate, newest first, once or for ever, from every kind of source."""

from importlib.util import find_spec

import cv2
import numpy as np
import pytest
from PIL import Image

from chatvla_edge.drivers import registry
from chatvla_edge.drivers.cameras.realsense_standin import stamp, stamped
from chatvla_edge.drivers.cameras.recording import Recording, RecordingOptions
from chatvla_edge.drivers.errors import DeviceLostError, DeviceNotFoundError, DeviceUnsuitableError

H, W, FRAMES = 120, 320, 12
PERIOD = 1_000_000_000 // 30


class Clock:
    """Host time that passes when somebody sleeps, or works."""

    def __init__(self):
        self.ns = 10**12

    def now(self):
        return self.ns

    def sleep(self, seconds):
        self.ns += round(1e9 * seconds)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures")
    for number in range(1, FRAMES + 1):
        Image.fromarray(stamped(number, H, W)).save(path / f"frame{number}.png")
    (path / "notes.txt").touch()
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "tape.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 30, (W, H))
    for number in range(1, FRAMES + 1):
        writer.write(cv2.cvtColor(stamped(number, H, W), cv2.COLOR_RGB2BGR))
    writer.release()
    return path


def opened(source, rate=30, **options):
    camera, clock = Recording(RecordingOptions(source=source, **options)), Clock()
    camera._now, camera._sleep = clock.now, clock.sleep
    camera.open(H, W, rate)
    return camera, clock


@pytest.fixture(params=["folder", "video"])
def source(request):
    return request.getfixturevalue(request.param)


def test_every_frame_comes_once_at_its_time(source):
    camera, clock = opened(source)
    start = clock.ns
    for number in range(1, FRAMES + 1):
        frame = camera.read(1.0)
        assert (frame.sequence, stamp(frame.image)) == (number, number)
        assert frame.captured_ns == start + (number - 1) * PERIOD
        assert 0 <= frame.received_ns - frame.captured_ns < 100
    with pytest.raises(DeviceLostError, match="is over"):
        camera.read(1.0)
    assert (camera.health().frames, camera.health().lost) == (FRAMES, 0)
    camera.close()
    with pytest.raises(DeviceLostError, match="not open"):
        camera.read(1.0)


def test_what_was_not_read_in_time_is_gone_and_counted(source):
    camera, clock = opened(source)
    assert camera.read(1.0).sequence == 1
    clock.ns += 4 * PERIOD + PERIOD // 2
    frame = camera.read(1.0)
    assert (frame.sequence, stamp(frame.image)) == (5, 5)
    assert camera.read(1.0).sequence == 6
    assert camera.health().lost == 3


def test_numbers_count_on_when_it_is_played_again(source):
    camera, clock = opened(source, loop=True)
    for number in range(1, 3 * FRAMES):
        frame = camera.read(1.0)
        assert (frame.sequence, (stamp(frame.image) - number) % FRAMES) == (number, 0)
    clock.ns += 5 * PERIOD
    assert camera.read(1.0).sequence > 3 * FRAMES
    assert camera.health().lost + camera.health().frames == 3 * FRAMES + 4


def test_a_wait_that_is_too_short_ends_in_time(source):
    camera, clock = opened(source)
    camera.read(1.0)
    before = clock.ns
    with pytest.raises(TimeoutError):
        camera.read(0.01)
    assert clock.ns - before == 10_000_000
    assert camera.read(1.0).sequence == 2


def test_pictures_of_a_folder_are_the_files_bit_by_bit(folder):
    camera, _ = opened(folder)
    for number in range(1, FRAMES + 1):
        assert np.array_equal(camera.read(1.0).image, stamped(number, H, W))


def test_sources_that_do_not_fit_are_refused(folder, video, tmp_path):
    with pytest.raises(DeviceNotFoundError, match="found no recording"):
        opened(tmp_path / "nothing")
    with pytest.raises(DeviceUnsuitableError, match="holds no picture"):
        opened(tmp_path)
    with pytest.raises(DeviceUnsuitableError, match="holds 320x120, expected 640x480"):
        registry.create("cameras", "recording", {"source": str(folder)}).open(480, 640, 30)
    with pytest.raises(DeviceUnsuitableError, match="has 30 frames per second, expected 60"):
        opened(video, rate=60)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    with pytest.raises(DeviceUnsuitableError, match="no video that OpenCV can decode"):
        opened(broken)


def test_a_broken_picture_is_a_lost_device(tmp_path):
    Image.fromarray(stamped(1, H, W)).save(tmp_path / "1.png")
    (tmp_path / "2.png").write_bytes(b"no picture")
    camera, _ = opened(tmp_path)
    camera.read(1.0)
    with pytest.raises(DeviceLostError, match=r"2\.png cannot be read"):
        camera.read(1.0)


@pytest.mark.skipif(find_spec("pyrealsense2") is None, reason="the extra `realsense` is not installed")
def test_a_realsense_file_is_given_to_its_driver(tmp_path):
    from chatvla_edge.drivers.cameras.realsense_standin import record, suffix

    path = tmp_path / f"tape{suffix()}"
    record(path, 10, H, W)
    camera = registry.create("cameras", "recording", {"source": str(path), "loop": True})
    camera.open(H, W, 30)
    sequences = [camera.read(1.0).sequence for _ in range(14)]
    assert sequences == sorted(set(sequences))
    assert sequences[-1] > 10
    assert camera.health().facts["device"] == "Stand-in camera"
    camera.close()
