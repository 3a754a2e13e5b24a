"""Device time to host time (CLOCK_MONOTONIC, ns). Arithmetic on integers that are handed in; no clock is read here
but by `wall_and_host`.

`DeviceClock` is for a counter in the camera: its offset is unknown, and each frame's arrival is late by a delay that is
never negative. The least late arrivals of a window show the offset, a line through them shows the drift. The constant
part of the delay (readout, USB) cannot be seen this way: `captured` is later than the exposure by the shortest delay.

`WallClock` is for stamps that a library has already brought to the host's wall clock (RealSense global time, ZED): they
are converted with the difference of the two host clocks of this instant, so the whole delay stands in them. When the
wall clock is set, the library's stamps follow now or seconds later; until then the delay from before is used.
"""

import time
from collections import deque
from collections.abc import Callable
from statistics import median

MS = 1_000_000
SECOND = 1_000_000_000

MAX_DRIFT = 300e-6  # of one crystal against another; more is no drift


class DeviceClock:
    """Host time of stamps of a device's own counter.

    Attributes:
        steps: how often the counter jumped against the host's clock. Then everything learned before is forgotten.
    """

    BUCKET_NS = SECOND
    BUCKETS = 10  # the window: long against stalls of the host, short against changes of temperature
    SETTLED = 30  # arrivals after which the least late one is taken for the shortest delay
    EARLY_NS = 20 * MS  # an arrival earlier than the shortest delay by this is a jump forward
    LATE_NS = 100 * MS  # later than the shortest delay by this, for LATE_FOR_NS without an exception: a jump back
    LATE_FOR_NS = 1 * SECOND

    def __init__(self, wrap_ns: int | None = None) -> None:
        """``wrap_ns``: where the counter starts again from zero, as 2^32 us counters do after 71.6 min."""
        self.steps = 0
        self._wrap = wrap_ns
        self._turns = 0
        self._last_raw: int | None = None
        self._forget()

    def _forget(self) -> None:
        self._minima: deque[tuple[int, int, int]] = deque(maxlen=self.BUCKETS)  # host bucket, device ns, offset
        self._count = 0
        self._last_device: int | None = None
        self._late_since: int | None = None
        self._slope = 0.0

    def captured_ns(self, device_ns: int, received_ns: int) -> int:
        """Host time of a stamp, never after ``received_ns``. To be called for each frame, in order of arrival."""
        device_ns = self._unwrapped(device_ns)
        offset = received_ns - device_ns
        if self._jumped(device_ns, offset, received_ns):
            self.steps += 1
            self._forget()
        self._learn(device_ns, offset, received_ns)
        return min(device_ns + self._offset(device_ns), received_ns)

    def restart(self) -> None:
        """The counter is known to begin anew, as when a recording is played again: no step."""
        self._turns, self._last_raw = 0, None
        self._forget()

    def _unwrapped(self, raw: int) -> int:
        if self._wrap is not None and self._last_raw is not None and self._last_raw - raw > self._wrap // 2:
            self._turns += 1
        self._last_raw = raw
        return raw + self._turns * (self._wrap or 0)

    def _jumped(self, device_ns: int, offset: int, received_ns: int) -> bool:
        back = self._last_device is not None and device_ns < self._last_device
        self._last_device = device_ns
        if back:
            return True
        if self._count < self.SETTLED:
            return False
        late = offset - self._offset(device_ns)
        if late < -self.EARLY_NS:
            return True
        if late < self.LATE_NS:
            self._late_since = None
        elif self._late_since is None:
            self._late_since = received_ns
        return self._late_since is not None and received_ns - self._late_since > self.LATE_FOR_NS

    def _learn(self, device_ns: int, offset: int, received_ns: int) -> None:
        self._last_device = device_ns
        self._count += 1
        bucket = received_ns // self.BUCKET_NS
        if not self._minima or self._minima[-1][0] != bucket:
            self._minima.append((bucket, device_ns, offset))
            self._slope = self._drift()
        elif offset < self._minima[-1][2]:
            self._minima[-1] = (bucket, device_ns, offset)

    def _drift(self) -> float:
        """Median slope between the buckets' minima; the newest bucket has barely begun and is left out."""
        whole = list(self._minima)[:-1]
        if len(whole) < 4:
            return 0.0
        slopes = [
            (later[2] - sooner[2]) / (later[1] - sooner[1])
            for place, sooner in enumerate(whole)
            for later in whole[place + 1 :]
            if later[1] > sooner[1]
        ]
        return max(-MAX_DRIFT, min(MAX_DRIFT, median(slopes))) if slopes else 0.0

    def _offset(self, device_ns: int) -> int:
        """The lowest of the minima, each carried to ``device_ns`` along the drift."""
        return min(offset + round(self._slope * (device_ns - at)) for _, at, offset in self._minima)


def wall_and_host() -> tuple[int, int]:
    """CLOCK_REALTIME and CLOCK_MONOTONIC of one instant, ns; of three tries the one that was interrupted least."""
    best: tuple[int, int, int] | None = None
    for _ in range(3):
        before = time.monotonic_ns()
        wall = time.time_ns()
        after = time.monotonic_ns()
        if best is None or after - before < best[0]:
            best = (after - before, wall, (before + after) // 2)
    assert best is not None
    return best[1], best[2]


class WallClock:
    """Host time of stamps in the host's wall clock.

    Attributes:
        steps: how often the wall clock was set, or the stamps left it.
    """

    STEP_NS = 5 * MS  # the wall clock is slewed by 500 ppm at most: 17 us from one 30 Hz frame to the next
    LONGEST_DELAY_NS = 1 * SECOND  # from exposure to arrival, for any camera that works
    UNUSUAL_NS = 10 * MS  # how far the delay may differ from the usual one while the stamps may not have followed
    UNCERTAIN_NS = 30 * SECOND  # how long that is; librealsense's regression needs some 15 s
    USUAL_OF = 30  # frames

    def __init__(self, now: Callable[[], tuple[int, int]] = wall_and_host) -> None:
        """``now``: wall and host time of one instant, ns."""
        self.steps = 0
        self._now = now
        self._last: int | None = None
        self._delays: deque[int] = deque(maxlen=self.USUAL_OF)
        self._uncertain_until: int | None = None
        self._lost = False

    def captured_ns(self, wall_ns: int, received_ns: int) -> int:
        """Host time of a stamp, never after ``received_ns``. To be called for each frame, soon after its arrival."""
        wall, host = self._now()
        ahead = wall - host
        if self._last is not None and abs(ahead - self._last) > self.STEP_NS:
            self.steps += 1
            self._uncertain_until = received_ns + self.UNCERTAIN_NS
            self._lost = True  # what follows belongs to the step that has just been counted
        self._last = ahead
        delay = received_ns - (wall_ns - ahead)
        if not self._believed(delay, received_ns):
            if not self._lost:
                self.steps += 1
            self._lost = True
            return received_ns - self.usual_delay_ns
        self._lost = False
        self._delays.append(max(delay, 0))
        return received_ns - max(delay, 0)

    @property
    def usual_delay_ns(self) -> int:
        """Median delay of the last frames whose stamp was believed; 0 before the first."""
        return round(median(self._delays)) if self._delays else 0

    def _believed(self, delay: int, received_ns: int) -> bool:
        if not -self.STEP_NS <= delay <= self.LONGEST_DELAY_NS:
            return False
        if self._uncertain_until is None or not self._delays:
            return True
        if received_ns > self._uncertain_until:
            self._uncertain_until = None
            return True
        return abs(delay - self.usual_delay_ns) <= self.UNUSUAL_NS
