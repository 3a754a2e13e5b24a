"""Cameras that do what a test asks, behind the driver protocol, and their processes."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from chatvla_edge.drivers.errors import DeviceLostError, DeviceUnsuitableError
from chatvla_edge.drivers.protocols import CameraHealth, Frame, Options
from chatvla_edge.runtime.camera_frames import CameraSegments
from chatvla_edge.runtime.camera_process import start_camera

TESTS = Path(__file__).resolve().parents[1]


class TestCameraOptions(Options):
    """``fault`` happens at frame number ``at`` of each opening; ``heals``: only of the first."""

    fault: str = ""
    at: int = 10
    heals: bool = True
    __test__ = False


class TestCamera:
    """Frames on time; each pixel holds the frame's number, modulo 251."""

    OPTIONS = TestCameraOptions
    __test__ = False

    def __init__(self, options):
        self.options = options
        self.openings = self.number = 0

    def open(self, height, width, rate):
        if self.options.fault == "unsuitable":
            raise DeviceUnsuitableError("found a toaster, expected a camera")
        self.openings += 1
        self.period = 1 / rate
        self.image = np.zeros((height, width, 3), np.uint8)
        self.due = time.monotonic()
        self.count = 0

    @property
    def faulty(self):
        return self.count >= self.options.at and (self.openings == 1 or not self.options.heals)

    def read(self, timeout):
        fault = self.options.fault if self.faulty else ""
        if fault == "unplug":
            raise DeviceLostError("the device is gone")
        if fault == "hang":
            time.sleep(3600)
        if fault == "spin":
            ctypes.PyDLL(None).sleep(3600)  # a call in C that keeps the interpreter's lock
        if fault in ("silent", "frozen counter"):
            time.sleep(timeout)
            raise TimeoutError
        self.due += self.period * (2 if fault == "slow" else 1)
        time.sleep(max(0.0, self.due - time.monotonic()))
        self.number += 1
        self.count += 1
        if fault != "frozen content":
            self.image[:] = self.number % 251
        now = time.monotonic_ns()
        return Frame(self.image, now, now, self.number, "device")

    def health(self):
        return CameraHealth(frames=self.number, facts={"kind": "test"})

    def close(self):
        if self.options.fault == "hang":
            time.sleep(3600)


class CameraRun:
    """A camera's process; use as a context manager, which ends it."""

    def __init__(self, driver, options, *, height=48, width=64, rate=60, **more):
        os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        self.segments = CameraSegments.create("test", height, width)
        self.reader = self.segments.frames()
        self.process = start_camera(self.segments, driver, options, rate, stderr=subprocess.PIPE, **more)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        self.process.stderr.close()

    def until(self, condition, seconds=20.0):
        """Seconds until it held."""
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < seconds, (self.status, self.process.poll())
            time.sleep(0.005)
        return time.monotonic() - began

    @property
    def status(self):
        return self.reader.status()

    def state(self):
        status = self.status
        return status.state if status else None

    def streaming(self, frames=5):
        return self.until(lambda: (status := self.status) is not None and status.frames >= frames)

    def ended(self, seconds=20.0):
        """Exit code and last words."""
        code = self.process.wait(seconds)
        return code, self.process.stderr.read().decode()

    def terminate(self):
        self.process.send_signal(signal.SIGTERM)
        return self.ended()


def orphan(driver="support.cameras:TestCamera"):
    """A program that starts a camera, prints its pid and is killed."""
    return (
        "import os, sys; from chatvla_edge.runtime.camera_frames import CameraSegments;"
        "from chatvla_edge.runtime.camera_process import start_camera;"
        f"s = CameraSegments.create('orphan', 48, 64); p = start_camera(s, {driver!r}, {{}}, 30);"
        "print(p.pid, flush=True); os.kill(os.getpid(), 9)"
    )


PYTHON = sys.executable
