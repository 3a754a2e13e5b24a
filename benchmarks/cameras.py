"""How long a frame takes from the vendor's library to the frame slot, and what a camera costs in CPU.

- into the slot: each camera has its process, as in the daemon, at 640x480 and 30 Hz, and all run at once: the real
  librealsense plays a recording that it made before (two of it), a folder of pictures is played beside them. Each frame
  says when the library handed it over and when it was published. That is the copy, the look at the pixels, and whatever
  the scheduler does between.
- through the library: frames pushed into librealsense's software device until its queue hands them to the driver.
- YUYV to RGB: a webcam's frame through our conversion; OpenCV's beside it where OpenCV is installed.
- CPU: of each process, user and system, over the time of the streams.
"""

import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from chatvla_edge.benchmarks import script
from chatvla_edge.benchmarks.method import compare
from chatvla_edge.benchmarks.report import Report
from chatvla_edge.benchmarks.samples import Samples
from chatvla_edge.drivers.cameras import pixels
from chatvla_edge.drivers.cameras.realsense import RealSense, RealSenseOptions
from chatvla_edge.drivers.cameras.realsense_standin import SoftwareCamera, record, stamp, stamped, suffix
from chatvla_edge.runtime.camera_frames import CameraSegments
from chatvla_edge.runtime.camera_process import start_camera
from chatvla_edge.runtime.realtime import now_ns, sleep_until_ns

SUMMARY = "Cameras: a frame from the vendor's library into the slot, frames lost or doubled, CPU per stream."

H, W, RATE = 480, 640, 30
TAPE = 90  # frames, played again and again
GOAL_P99_S = 1e-3
GOAL_CPU = 0.1  # of a core, for a stream of 640x480 at 30 Hz
POLL_NS = 2_000_000


class Stream:
    """One camera's process and what its reader saw."""

    def __init__(self, name: str, driver: str, options: dict[str, Any]) -> None:
        self.name = name
        segments = CameraSegments.create(name, H, W)
        self.reader = segments.frames()
        self.process = start_camera(segments, driver, options, RATE)
        self.took: list[int] = []
        self.sequences: list[int] = []
        self.wrong = 0

    def look(self) -> None:
        """Read the slot's newest frame, if it is new."""
        frame = self.reader.newer()
        if frame is not None:
            self.took.append(frame.published_ns - frame.received_ns)
            self.sequences.append(frame.sequence)
            self.wrong += (frame.sequence - 1) % TAPE + 1 != stamp(frame.image)

    def streaming(self) -> bool:
        """Whether frames come."""
        status = self.reader.status()
        return status is not None and status.frames >= 10

    def cpu_s(self) -> float:
        """CPU time of the process so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.wait()


@contextmanager
def streams(folder: Path) -> Iterator[list[Stream]]:
    """Two RealSense recordings and a folder of pictures."""
    tape, pictures = folder / f"tape{suffix()}", folder / "pictures"
    record(tape, TAPE, H, W, RATE)
    pictures.mkdir()
    from PIL import Image

    for number in range(1, TAPE + 1):
        Image.fromarray(stamped(number, H, W)).save(pictures / f"{number}.bmp")
    played = {"file": str(tape), "loop": True}
    with ExitStack() as stack:
        found = []
        for name, driver, options in (
            ("RealSense 1", "realsense", played),
            ("RealSense 2", "realsense", played),
            ("pictures", "recording", {"source": str(pictures), "loop": True}),
        ):
            found.append(Stream(name, driver, options))
            stack.callback(found[-1].end)
        yield found


def watch(found: list[Stream], seconds: float) -> dict[str, float]:
    """Read every slot for that long; the share of a core that each process took."""
    start = poll = now_ns()
    while not all(stream.streaming() for stream in found):
        if now_ns() - start > 30_000_000_000:
            raise RuntimeError("a camera does not stream within 30 s")
        sleep_until_ns(now_ns() + 50_000_000)
    start, before = now_ns(), [stream.cpu_s() for stream in found]
    while (now := now_ns()) < start + seconds * 1e9:
        for stream in found:
            stream.look()
        poll = max(poll + POLL_NS, now)
        sleep_until_ns(poll)
    wall = (now_ns() - start) * 1e-9
    return {stream.name: (stream.cpu_s() - cpu) / wall for stream, cpu in zip(found, before, strict=True)}


class Live(RealSense):
    """The driver on the library's software device."""

    def __init__(self, camera: SoftwareCamera) -> None:
        super().__init__(RealSenseOptions())
        self._camera = camera

    def _connected(self) -> list[Any]:
        return [self._camera.device]


def through_the_library(frames: int) -> Samples:
    """Seconds from before a frame is pushed to its receipt by the driver, one at a time."""
    camera = SoftwareCamera(H, W, RATE)
    driver = Live(camera)
    driver.open(H, W, RATE)
    picture = stamped(1, H, W)
    took = []
    start = now_ns()
    for number in range(1, frames + 1):
        sleep_until_ns(start + number * 1_000_000_000 // RATE)
        pushed = now_ns()
        camera.push(number, 1e6 + 1e3 * number / RATE, picture)
        took.append(driver.read(1.0).received_ns - pushed)
    driver.close()
    return Samples.of("librealsense, pushed -> received", took, scale=1e-9)


def run(options: Namespace) -> Report:
    """30 s of streams, or 8; then the library alone, then the conversion."""
    seconds = 8.0 if options.quick else 30.0
    report = Report(title="A 640x480 frame from the camera's library into its slot")
    with tempfile.TemporaryDirectory() as folder, streams(Path(folder)) as found:
        cpu = watch(found, seconds)
        statuses = [stream.reader.status() for stream in found]
    for stream in found:
        samples = Samples.of(f"{stream.name}: received -> published", stream.took, scale=1e-9)
        report.add(samples, curve=True)
        report.goal(
            f"{stream.name}: received -> in the slot, p99", samples.quantile(0.99), "<=", GOAL_P99_S, unit="s",
            row=samples.name,
        )  # fmt: skip
    for stream, status in zip(found, statuses, strict=True):
        assert status is not None
        doubled = len(stream.sequences) - len(set(stream.sequences))
        report.figure(f"{stream.name}: rate", status.rate, "Hz")
        report.figure(f"{stream.name}: CPU", cpu[stream.name], "of a core")
        report.goal(f"{stream.name}: CPU of a core", cpu[stream.name], "<=", GOAL_CPU)
        report.goal(f"{stream.name}: frames lost by the device's number", status.lost, "==", 0)
        report.goal(f"{stream.name}: frames doubled, or of another number", doubled + stream.wrong, "==", 0)
    report.add(through_the_library(100 if options.quick else 300))
    conversion(report, 1.0 if options.quick else 5.0)
    report.method.append(
        f"{len(found)} camera processes at once at {RATE} Hz for {seconds:g} s, normal priority, one reader of all "
        f"slots every {POLL_NS / 1e6:g} ms; librealsense plays {TAPE} frames again and again"
    )
    report.note("No camera was connected: librealsense reads a file or its software device, not USB.")
    return report


def conversion(report: Report, seconds: float) -> None:
    """YUYV to RGB, ours and OpenCV's on one thread."""
    packed = np.random.default_rng(0).integers(0, 256, (H, W, 2), np.uint8)
    target = np.empty((H, W, 3), np.uint8)
    work: dict[str, Callable[[], Any]] = {"YUYV to RGB, ours": lambda: pixels.yuyv_to_rgb(packed, 2 * W, 0, target)}
    try:
        import cv2
    except ModuleNotFoundError:
        report.note("OpenCV is not installed: its conversion was not measured.")
    else:
        cv2.setNumThreads(1)
        work["YUYV to RGB, OpenCV"] = lambda: cv2.cvtColor(packed, cv2.COLOR_YUV2RGB_YUY2, target)
    compared = compare(work, seconds=seconds)
    for samples in compared.samples.values():
        report.add(samples)
    report.method.append(compared.method)


if __name__ == "__main__":
    sys.exit(script.main(__file__))
