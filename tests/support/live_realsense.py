"""The RealSense driver on the library's software device, fed at its rate in the same process, with faults."""

import threading
import time
from typing import Literal

import numpy as np

from chatvla_edge.drivers.cameras.realsense import RealSense, RealSenseOptions
from chatvla_edge.drivers.cameras.realsense_standin import SoftwareCamera, stamped


class LiveOptions(RealSenseOptions):
    """``fault`` begins at frame ``at`` of the first opening; a camera that is opened again is well."""

    fault: Literal["", "frozen counter", "frozen content", "slow", "unplug", "domain", "clock"] = ""
    at: int = 60


class LiveRealSense(RealSense):
    OPTIONS = LiveOptions
    openings = 0

    def open(self, height, width, rate):
        self.shape, self.period = (height, width), 1 / rate
        self.camera = SoftwareCamera(height, width, int(rate))
        super().open(height, width, rate)
        self.openings += 1
        self.ends = threading.Event()
        self.feed = threading.Thread(target=self._feed, daemon=True)
        self.feed.start()

    def _connected(self):
        return [self.camera.device]

    def _feed(self):
        start, k, late = time.monotonic(), 0, 0.0
        pictures = [stamped(number, *self.shape) for number in range(64)]
        while not self.ends.wait(max(0.0, start + k * self.period + late - time.monotonic())):
            k += 1
            fault = self.options.fault if self.openings == 1 and k > self.options.at else ""
            if fault == "unplug":
                return
            late += self.period * (fault == "slow")
            number = self.options.at if fault == "frozen counter" else k
            picture = pictures[0 if fault == "frozen content" else number % 64]
            stamp_ms, domain = 1e6 + 1e3 * k * self.period, "hardware_clock"
            if fault == "clock":
                stamp_ms -= 5e5
            if fault == "domain":
                stamp_ms, domain = time.time_ns() / 1e6, "global_time"
            self.camera.push(number, stamp_ms, np.ascontiguousarray(picture), domain)

    def close(self):
        if hasattr(self, "ends"):
            self.ends.set()
            self.feed.join()
        super().close()
