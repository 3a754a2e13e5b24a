"""Cameras at their native rate into the frame slots, for half a minute, and what a fault of a live one looks like.

The real librealsense plays a recording, and runs its software device; each camera has its own process, as in the
daemon. The host's own stalls may cost a frame: it must then be counted.
"""

import time
from importlib.util import find_spec
from itertools import pairwise

import pytest
from PIL import Image
from support.cameras import CameraRun

from chatvla_edge.drivers.cameras.realsense_standin import record, stamp, stamped, suffix

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("pyrealsense2") is None, reason="the extra `realsense` is not installed"),
]

RATE, SECONDS, TAPE = 30, 30.0, 90


class Seen:
    """What a reader of one camera's slot got."""

    def __init__(self, run):
        self.run = run
        self.numbers, self.sequences, self.stamps, self.captured, self.published = [], [], [], [], []

    def look(self):
        frame = self.run.reader.newer()
        if frame is None:
            return
        self.numbers.append(frame.number)
        self.sequences.append(frame.sequence)
        self.stamps.append(stamp(frame.image))
        self.captured.append(frame.captured_ns)
        self.published.append(frame.published_ns - frame.received_ns)


def test_two_cameras_keep_their_rate_and_no_frame_is_lost_unseen_or_doubled(tmp_path):
    tape, folder = tmp_path / f"tape{suffix()}", tmp_path / "pictures"
    record(tape, TAPE, rate=RATE)
    folder.mkdir()
    for number in range(1, TAPE + 1):
        Image.fromarray(stamped(number, 480, 640)).save(folder / f"{number}.bmp")
    shape = {"height": 480, "width": 640, "rate": RATE}
    with (
        CameraRun("realsense", {"file": str(tape), "loop": True}, **shape) as played,
        CameraRun("recording", {"source": str(folder), "loop": True}, **shape) as shown,
    ):
        cameras = [Seen(played), Seen(shown)]
        for camera in cameras:
            camera.run.streaming()
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            for camera in cameras:
                camera.look()
            time.sleep(0.002)
        ends = [(camera.run.reader.newest().sequence, camera.run.status) for camera in cameras]
    for camera, (last, status) in zip(cameras, ends, strict=True):
        # Nothing doubled, and numbers and pictures go on together (where a tape begins anew, its end may be missing).
        assert camera.sequences == sorted(set(camera.sequences))
        for before, after in pairwise(zip(camera.sequences, camera.stamps, strict=True)):
            assert after[1] <= before[1] or after[0] - before[0] == after[1] - before[1]
        # Nothing lost unseen: what was published and what is counted as lost make up the device's numbers.
        assert abs(status.frames + status.lost - last) <= 3
        assert status.lost <= 0.05 * status.frames
        assert (status.clock_steps, status.opened) == (0, 1)
        span = (camera.captured[-1] - camera.captured[0]) * 1e-9
        assert (camera.sequences[-1] - camera.sequences[0]) / span == pytest.approx(RATE, rel=0.05)


# --------------------------------------------------------------------------------------- faults of a live camera's link

LIVE = "support.live_realsense:LiveRealSense"
FAULTS = ("frozen counter", "frozen content", "slow", "unplug", "domain", "clock")


@pytest.fixture(scope="module")
def faulty():
    """One process for each fault, all at once; the faults begin 2 s after the stream."""
    shape = {"height": 120, "width": 320, "rate": RATE}
    runs = {fault: CameraRun(LIVE, {"fault": fault}, **shape) for fault in FAULTS}
    histories = {fault: [] for fault in FAULTS}
    try:
        for run in runs.values():
            run.streaming()
        end = time.monotonic() + 8
        while time.monotonic() < end:
            for fault, run in runs.items():
                frame, status = run.reader.newest(), run.status
                histories[fault].append((time.monotonic_ns(), frame.captured_ns, frame.received_ns, status))
            time.sleep(0.02)
    finally:
        for run in runs.values():
            run.__exit__()
    return histories


def states(history):
    return {status.state for *_, status in history}


@pytest.mark.parametrize("fault", ["frozen counter", "unplug"])
def test_a_camera_without_new_frames_is_silent_then_opened_again(faulty, fault):
    history = faulty[fault]
    assert {"streaming", "silent", "lost"} <= states(history)
    silent = next(now for now, _, _, status in history if status.state == "silent")
    last = max(received for now, _, received, _ in history if now < silent)
    assert 0.4e9 < silent - last < 2e9
    after = history[-1][3]
    assert (after.state, after.opened) == ("streaming", 2)
    assert after.rate > 0.8 * RATE
    if fault == "frozen counter":
        assert after.repeated > 20  # the library went on delivering the same frame


def test_a_camera_that_shows_the_same_picture_is_told_by_its_pixels_then_opened_again(faulty):
    history = faulty["frozen content"]
    assert max(status.identical for *_, status in history) >= 0.7 * RATE
    assert (history[-1][3].opened, history[-1][3].identical, history[-1][3].repeated) == (2, 0, 0)


def test_a_camera_at_half_its_rate_is_told_by_its_rate(faulty):
    status = faulty["slow"][-1][3]
    assert status.rate == pytest.approx(RATE / 2, rel=0.2)
    assert (status.state, status.opened, status.lost) == ("streaming", 1, 0)


@pytest.mark.parametrize("fault", ["domain", "clock"])
def test_a_clock_that_jumps_is_counted_and_no_capture_leaves_the_present(faulty, fault):
    history = faulty[fault]
    assert history[-1][3].clock_steps == 1
    assert history[-1][3].opened == 1
    assert all(0 <= received - captured < 0.5e9 for _, captured, received, _ in history)
