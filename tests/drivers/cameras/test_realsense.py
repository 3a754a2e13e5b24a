"""The real librealsense plays recordings and software devices through the driver, and every refusal says what to do."""

import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from itertools import pairwise

import numpy as np
import pytest

from chatvla_edge.drivers import registry
from chatvla_edge.drivers.cameras import realsense
from chatvla_edge.drivers.cameras.realsense import RealSense, RealSenseOptions, l515_on_usb, numbers, sdk
from chatvla_edge.drivers.cameras.realsense_standin import SoftwareCamera, record, recording, stamp, stamped, suffix
from chatvla_edge.drivers.errors import (
    DeviceLostError,
    DeviceNotFoundError,
    DeviceUnsuitableError,
    MissingLibraryError,
)

pytestmark = pytest.mark.skipif(find_spec("pyrealsense2") is None, reason="the extra `realsense` is not installed")

H, W = 120, 320
FRAMES = 30


@pytest.fixture(scope="module")
def tape(tmp_path_factory):
    """One second at 30 Hz."""
    path = tmp_path_factory.mktemp("tape") / f"tape{suffix()}"
    record(path, FRAMES, H, W)
    return path


def opened(**options):
    camera = registry.create("cameras", "realsense", options)
    camera.open(H, W, 30)
    return camera


def everything(camera, seconds=10.0):
    """Frames until the camera is lost; what was read of each."""
    seen = []
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            frame = camera.read(1.0)
            seen.append((frame.sequence, stamp(frame.image), frame.captured_ns, frame.received_ns))
    except DeviceLostError as error:
        return seen, str(error)
    return seen, ""


def test_a_picture_carries_its_number():
    for number in (0, 1, 255, 123456, 2**32 - 1):
        assert stamp(stamped(number, H, W)) == number


def test_a_recording_is_played_once_with_every_frame_once(tape):
    camera = opened(file=str(tape))
    seen, last_words = everything(camera)
    health = camera.health()
    assert all(sequence == number for sequence, number, _, _ in seen)
    assert len({sequence for sequence, *_ in seen}) == len(seen) == health.frames
    assert health.frames + health.lost == seen[-1][0]
    assert health.lost <= 0.1 * FRAMES  # the host's own stalls
    assert "is over" in last_words
    camera.close()
    camera.close()


def test_captures_follow_the_recorded_stamps_and_never_lie_in_the_future(tape):
    camera = opened(file=str(tape))
    seen, _ = everything(camera)
    camera.close()
    captured = np.array([row[2] for row in seen])
    assert all(row[2] <= row[3] for row in seen)
    steps = np.diff(captured) / np.diff([row[0] for row in seen])
    assert np.median(np.abs(steps - 1e9 / 30)) < 1e6
    assert camera.health().clock_steps == 0


def test_a_recording_that_is_played_again_counts_on(tape):
    camera = opened(file=str(tape), loop=True)
    seen, last_words = everything(camera, 2.7)
    health = camera.health()
    camera.close()
    assert last_words == ""
    sequences = [row[0] for row in seen]
    assert sequences[-1] > 2 * FRAMES
    assert all(later > sooner for sooner, later in pairwise(sequences))
    assert all((sequence - 1) % FRAMES + 1 == number for sequence, number, *_ in seen)
    assert health.clock_steps == 0


def test_a_camera_opens_again_after_close(tape):
    camera = opened(file=str(tape))
    camera.read(1.0)
    camera.close()
    camera.open(H, W, 30)
    assert camera.read(1.0).sequence <= 3
    assert camera.health().frames == 1
    camera.close()
    with pytest.raises(DeviceLostError, match="not open"):
        camera.read(0.1)


def test_a_shape_that_the_device_does_not_offer_is_refused_with_what_it_offers(tape):
    with pytest.raises(DeviceUnsuitableError, match="offers 320x120 at 30, expected 320x120 at 60"):
        registry.create("cameras", "realsense", {"file": str(tape)}).open(H, W, 60)


def test_a_file_that_is_none_is_refused(tmp_path):
    with pytest.raises(DeviceNotFoundError, match="found no recording"):
        opened(file=str(tmp_path / "nothing.bag"))
    broken = tmp_path / f"broken{suffix()}"
    broken.write_bytes(b"no recording")
    with pytest.raises(DeviceUnsuitableError, match="cannot be played"):
        opened(file=str(broken))


# ------------------------------------------------------------------------------------------------------------ live path


class Live(RealSense):
    """The driver with a software device where the library would list connected cameras."""

    def __init__(self, camera, **options):
        super().__init__(RealSenseOptions(**options))
        self.camera = camera

    def _connected(self):
        return [self.camera.device]


class Feed:
    """Pushes frames at 30 Hz from a thread; `stamps(number)` gives time in ms and domain."""

    def __init__(self, camera, stamps, numbers=None, rate=30):
        self.pushed = {}
        self.camera, self.stamps, self.numbers, self.rate = camera, stamps, numbers or (lambda k: k), rate
        self.ends = threading.Event()
        self.thread = threading.Thread(target=self.run)

    def run(self):
        start, k = time.monotonic(), 0
        while not self.ends.wait(max(0.0, start + k / self.rate - time.monotonic())):
            k += 1
            number = self.numbers(k)
            stamp_ms, domain = self.stamps(k)
            self.pushed.setdefault(number, time.monotonic_ns())
            self.camera.push(number, stamp_ms, domain=domain)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ends.set()
        self.thread.join()


def hardware(k):
    return 5000 + 1000 * k / 30, "hardware_clock"


def read_live(driver, count):
    return [(frame := driver.read(0.5), stamp(frame.image))[0] for _ in range(count)]


def test_the_live_path_delivers_soon_and_once():
    camera = SoftwareCamera(H, W, 30)
    driver = Live(camera)
    driver.open(H, W, 30)
    with Feed(camera, hardware) as feed:
        frames = []
        for _ in range(30):
            frame = driver.read(2.0)
            assert stamp(frame.image) == frame.sequence
            frames.append(frame)
        driver.close()
    delays = [frame.received_ns - feed.pushed[frame.sequence] for frame in frames]
    assert np.median(delays) < 5e6
    sequences = [frame.sequence for frame in frames]
    assert sequences == sorted(set(sequences))
    assert driver.health().facts["usb"] == "3.2"
    assert {frame.clock for frame in frames} == {"device"}


def test_a_frame_number_that_stands_still_is_not_handed_out():
    camera = SoftwareCamera(H, W, 30)
    driver = Live(camera)
    driver.open(H, W, 30)
    with Feed(camera, hardware, numbers=lambda k: min(k, 10)):
        with pytest.raises(TimeoutError):
            read_live(driver, 20)
        driver.close()
    assert driver.health().repeated > 3
    assert driver.health().frames <= 10


def test_lost_numbers_are_counted_and_a_counter_that_begins_anew_goes_on():
    camera = SoftwareCamera(H, W, 30)
    driver = Live(camera)
    driver.open(H, W, 30)
    sequences = []
    for number in (1, 2, 5, 6, 1, 2):
        camera.push(number, 5000.0 + 33 * len(sequences))
        sequences.append(driver.read(1.0).sequence)
    driver.close()
    assert sequences == [1, 2, 5, 6, 7, 8]
    assert driver.health().lost == 2


def test_wall_stamps_become_host_time_with_the_whole_delay():
    camera = SoftwareCamera(H, W, 30)
    driver = Live(camera)
    driver.open(H, W, 30)
    errors = []
    for number in range(1, 20):
        exposed = time.monotonic_ns() - 40_000_000
        camera.push(number, (time.time_ns() - 40_000_000) / 1e6, domain="global_time")
        frame = driver.read(1.0)
        errors.append(abs(frame.captured_ns - exposed))
        assert frame.clock == "device"
    driver.close()
    assert np.median(errors) < 1_000_000


def test_stamps_of_arrival_are_said_to_be_so():
    camera = SoftwareCamera(H, W, 30)
    driver = Live(camera)
    driver.open(H, W, 30)
    camera.push(1, time.time_ns() / 1e6, domain="system_time")
    frame = driver.read(1.0)
    driver.close()
    assert (frame.clock, frame.captured_ns) == ("arrival", frame.received_ns)


def test_a_domain_that_changes_is_counted_and_no_capture_leaves_the_present():
    camera = SoftwareCamera(H, W, 30)
    driver = Live(camera)
    driver.open(H, W, 30)

    def stamps(k):
        return hardware(k) if (k // 10) % 2 == 0 else (time.time_ns() / 1e6, "global_time")

    with Feed(camera, stamps):
        frames = read_live(driver, 35)
        driver.close()
    assert driver.health().clock_steps >= 3
    assert all(0 <= frame.received_ns - frame.captured_ns < 1e9 for frame in frames)
    captured = [frame.captured_ns for frame in frames]
    assert max(abs(np.diff(captured))) < 1e9


def test_usb_2_is_refused_unless_allowed():
    with pytest.raises(DeviceUnsuitableError, match=r"connected by USB 2\.1, expected USB 3"):
        Live(SoftwareCamera(H, W, 30, usb="2.1")).open(H, W, 30)
    driver = Live(SoftwareCamera(H, W, 30, usb="2.1"), usb2="allow")
    driver.open(H, W, 30)
    assert driver.health().facts["usb"] == "2.1"
    driver.close()


def test_cameras_are_told_apart_by_serial():
    with pytest.raises(DeviceNotFoundError, match=r"Stand-in camera 7 .*expected number 8"):
        Live(SoftwareCamera(H, W, 30, serial="7"), serial="8").open(H, W, 30)
    driver = Live(SoftwareCamera(H, W, 30, serial="8"), serial="8")
    driver.open(H, W, 30)
    driver.close()


def test_no_camera_is_said_with_the_release():
    with pytest.raises(DeviceNotFoundError, match=r"found no RealSense camera \(pyrealsense2 2\.\d+"):
        opened()


class Stubborn(Live):
    """Whose stream starts only after ``failures`` attempts."""

    failures = 1

    def _start(self, device, height, width, rate):
        if self.failures:
            self.failures -= 1
            raise RuntimeError("failed to set power state")
        super()._start(device, height, width, rate)


class Resettable:
    """A software device that can be reset; pybind's cannot."""

    def __init__(self, device):
        self.device, self.resets = device, 0

    def __getattr__(self, name):
        return getattr(self.device, name)

    def hardware_reset(self):
        self.resets += 1


def test_a_stream_that_does_not_start_is_reset_once(monkeypatch):
    monkeypatch.setattr(realsense, "RESET_SECONDS", 0.01)
    camera = SoftwareCamera(H, W, 30)
    camera.device = Resettable(camera.device)
    driver = Stubborn(camera)
    driver.open(H, W, 30)
    assert camera.device.resets == 1
    driver.close()
    driver.failures = 2
    with pytest.raises(DeviceLostError, match=r"does not start .*power state.*nor after a reset"):
        driver.open(H, W, 30)
    driver = Stubborn(camera, reset=False)
    with pytest.raises(DeviceLostError, match="does not start: failed to set power state"):
        driver.open(H, W, 30)
    assert camera.device.resets == 2


def test_an_exposure_that_cannot_be_set_is_refused():
    with pytest.raises(DeviceUnsuitableError, match="has no control"):
        Live(SoftwareCamera(H, W, 30), exposure=100.0).open(H, W, 30)


class Controls:
    """A sensor's controls as librealsense shows them; a software device's are read-only."""

    def __init__(self, rs, told):
        self.ranges = {rs.option.exposure: (1, 10000), rs.option.gain: (0, 128), rs.option.white_balance: (2800, 6500)}
        self.values = {rs.option.exposure: 166.0, rs.option.gain: 64.0, rs.option.white_balance: 4600.0}
        self.values |= {rs.option.enable_auto_exposure: 1.0, rs.option.enable_auto_white_balance: 1.0}
        self.told = told

    def supports(self, option):
        return option in self.values

    def get_option_range(self, option):
        bounds = type("Range", (), {})()
        bounds.min, bounds.max = self.ranges[option]
        return bounds

    def get_option(self, option):
        return self.values[option]

    def set_option(self, option, value):
        self.values[option] = value

    def supports_frame_metadata(self, key):
        return key.name in self.told

    def get_frame_metadata(self, key):
        return self.told[key.name]


def controlled(told, **options):
    rs = sdk()
    driver = RealSense(RealSenseOptions(**options))
    driver._rs, driver._facts = rs, {"device": "D405"}
    driver._sensor = driver._frame = Controls(rs, told)
    driver._settle = lambda: None
    driver._expose(H, W)
    return driver._sensor.values, rs.option


def test_a_fixed_exposure_switches_the_automatic_off_first():
    values, option = controlled({}, exposure=120.0, gain=30.0, white_balance=5000.0)
    assert (values[option.enable_auto_exposure], values[option.enable_auto_white_balance]) == (0, 0)
    assert (values[option.exposure], values[option.gain], values[option.white_balance]) == (120, 30, 5000)
    with pytest.raises(DeviceUnsuitableError, match=r"xposure 20000, expected 1 to 10000"):
        controlled({}, exposure=20000.0)


def test_what_the_automatic_found_is_frozen_where_the_sensor_tells_it():
    values, option = controlled({"actual_exposure": 8123, "gain_level": 20}, exposure="freeze")
    assert (values[option.enable_auto_exposure], values[option.exposure], values[option.gain]) == (0, 8123, 20)


@pytest.mark.parametrize("told", [{}, {"actual_exposure": 166, "gain_level": 64}])
def test_what_a_sensor_does_not_tell_is_not_frozen(told):
    """An RGB module repeats its manual values, whatever its automatic control does."""
    with pytest.raises(DeviceUnsuitableError, match="cannot be frozen; expected a number"):
        controlled(told, exposure="freeze")


# ------------------------------------------------------------------------------------------------------------- the L515


def usb_tree(folder, vendor, product):
    device = folder / "2-1"
    device.mkdir()
    (device / "idVendor").write_text(vendor + "\n")
    (device / "idProduct").write_text(product + "\n")
    (folder / "usb1").mkdir()
    return folder


def test_an_l515_that_the_release_cannot_see_is_named(tmp_path, monkeypatch):
    usb_tree(tmp_path, "8086", "0b64")
    assert l515_on_usb(tmp_path)
    monkeypatch.setattr(realsense, "l515_on_usb", lambda: True)
    monkeypatch.setattr(realsense, "sdk_version", lambda rs: (2, 59, 1))
    with pytest.raises(
        DeviceUnsuitableError, match=r"found an L515 on USB and pyrealsense2 2\.[\d.]+, expected 2\.54\.x"
    ):
        opened()


def test_another_camera_is_no_l515(tmp_path):
    assert not l515_on_usb(usb_tree(tmp_path, "8086", "0b07"))


def test_an_l515_with_old_firmware_is_told_what_it_lacks():
    camera = SoftwareCamera(480, 640, 60)
    driver = Live(camera)
    driver._rs = camera.rs

    class L515:
        def __getattr__(self, name):
            return getattr(camera.device, name)

        def get_info(self, which):
            facts = {"name": "Intel RealSense L515", "firmware_version": "1.5.1.0", "serial_number": "f0"}
            return facts.get(str(which).rpartition(".")[2], "3.2")

    with pytest.raises(DeviceUnsuitableError, match=r"firmware 1\.5\.8\.1, found 1\.5\.1\.0"):
        driver._choose(L515(), 480, 640, 30)


def test_versions_are_compared_as_numbers():
    assert numbers("2.59.1.11053") == (2, 59, 1, 11053)
    assert numbers("01.05.08.01") == (1, 5, 8, 1)
    assert numbers("beta") == (0,)


# -------------------------------------------------------------------------------------------------------- the library


def without(monkeypatch, *, error):
    def missing(name):
        raise error

    monkeypatch.setattr(realsense, "import_module", missing)


def test_a_missing_library_is_said_with_its_extra(monkeypatch):
    without(monkeypatch, error=ModuleNotFoundError("no", name="pyrealsense2"))
    with pytest.raises(MissingLibraryError, match=r"pip install 'chatvla-edge\[realsense\]'"):
        opened()


def test_a_library_that_does_not_load_is_said_with_what_it_lacks(monkeypatch):
    without(monkeypatch, error=ImportError("libudev.so.1: cannot open shared object file"))
    with pytest.raises(MissingLibraryError, match=r"does not load: libudev\.so\.1"):
        opened()


def test_the_module_does_not_import_the_library():
    program = "import sys; import chatvla_edge.drivers.cameras.realsense; print('pyrealsense2' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "False"


@pytest.mark.parametrize(
    "options",
    [{"file": "a.bag", "serial": "1"}, {"loop": True}, {"gain": 3.0}, {"usb2": "maybe"}, {"exposure": "manual"}],
)
def test_options_that_contradict_are_refused(options):
    with pytest.raises(ValueError, match="validation error"):
        registry.options("cameras", "realsense", options)


def test_a_gap_in_a_recording_is_counted_as_lost(tmp_path):
    path = tmp_path / f"gap{suffix()}"
    for number in recording(path, 20, H, W):
        if number == 10:
            time.sleep(0.5)
    camera = opened(file=str(path))
    seen, _ = everything(camera)
    camera.close()
    received = np.diff([row[3] for row in seen])
    assert received.max() > 0.3e9  # the pause is played as it was
