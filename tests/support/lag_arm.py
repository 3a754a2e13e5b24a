"""A simulated joint servo behind the driver protocol: every axis follows its command with a first-order lag."""

import math
import time


class LagArm:
    """Starts at ``start`` (rad), follows with time constant ``lag`` (s); ``stop`` freezes it where it is."""

    def __init__(self, start, lag=0.02):
        self.q = list(start)
        self.wanted = list(start)
        self.lag = lag
        self.then = time.monotonic()

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
        return self.q, None, None, None, False

    def stop(self):
        self._move()
        self.wanted = self.q
