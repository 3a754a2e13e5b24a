"""A simulated joint servo behind the driver protocol: every axis follows its command with a first-order lag."""

import math
import time

from chatvla_edge.drivers.protocols import ArmState


class LagArm:
    """Starts at ``start`` (rad), follows with time constant ``lag`` (s); ``stop`` freezes it where it is."""

    def __init__(self, start, lag=0.02):
        self.q = list(start)
        self.wanted = list(start)
        self.lag = lag
        self.then = time.monotonic()
        self.count = 0

    def open(self, rate):
        pass

    def close(self):
        pass

    def _move(self):
        now = time.monotonic()
        share = 1 - math.exp(-(now - self.then) / self.lag)
        self.then = now
        self.q = [q + share * (wanted - q) for q, wanted in zip(self.q, self.wanted, strict=True)]

    def command(self, position):
        self._move()
        self.wanted = position.tolist()

    def state(self):
        self._move()
        self.count += 1
        return ArmState(self.q, time.monotonic_ns(), self.count, target=self.wanted)

    def stop(self):
        self._move()
        self.wanted = self.q
