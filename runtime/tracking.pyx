"""Jerk-limited online tracking: the fused target in, a command stream that limits need not touch out.

Each joint by itself is a third-order filter in discrete time. If the target can be met on the next sample, with its
velocity and acceleration, the output *is* the target: a feasible target is followed without lag and without change.
If not (a seam, a knot of a linear interpolation, a first approach) the joint takes the acceleration from which,
braking at once, it would come to rest relative to the moving target exactly on it. That is time-optimal for a target
of constant velocity up to the whole-step rounding of a stop, does not overshoot a target that stands, and ends on it
to the last bit.

Samples are one ``period`` apart and differences are backward, as in `limits`, whose stop planner this module uses;
its limits must be the tighter ones, so that clips in `limits` mean that something is wrong. At the ends of the range
that takes at least velocity * period of room: a stop is rounded to whole steps there and here.
"""

from libc.math cimport fabs, isfinite, sqrt

from chatvla_edge.runtime.limits cimport END, MOST_JOINTS, Limiter, plan_stop

import numpy as np

# The target counts as met when braking at once would end this close to it (rad): far below any encoder.
cdef double MET = 1e-10
# Bounds the cost of a tick; the acceleration found is then known to about a thousandth of what jerk leaves open.
cdef int MOST_TRIES = 9


cdef class Tracker:
    """Tracks n <= 16 joint targets with jerk-limited motion.

    ``lower``, ``upper`` (rad), ``velocity`` (rad/s), ``acceleration`` (rad/s^2) and ``jerk`` (rad/s^3) are sequences
    of n finite numbers; targets beyond the range are clamped to it. ``period_ns`` is the command period. Raises
    ValueError for anything non-finite or contradictory.
    """

    def __init__(self, lower, upper, velocity, acceleration, jerk, period_ns):
        given = [np.array(x, dtype=np.float64, ndmin=1) for x in (lower, upper, velocity, acceleration, jerk)]
        n = given[0].size
        if not 1 <= n <= MOST_JOINTS or any(x.shape != (n,) or not np.isfinite(x).all() for x in given):
            found = [x.tolist() for x in given]
            raise ValueError(f"expected limits of 1 to {MOST_JOINTS} finite numbers, found {found}")
        if not ((given[0] < given[1]).all() and all((x > 0).all() for x in given[2:])):
            raise ValueError("expected lower < upper and positive velocity, acceleration and jerk for every joint")
        if not 100_000 <= period_ns <= 100_000_000:
            raise ValueError(f"period_ns is {period_ns}; expected 100 us to 100 ms, in nanoseconds")
        self.joints = n
        self.dt = period_ns * 1e-9
        self.lower, self.upper, self.velocity, self.top = given[:4]
        self.change = given[4] * self.dt
        self.scale = 1.0
        self.target = np.full(n, np.nan)
        self.position = np.full(n, np.nan)
        self.speed = np.zeros(n)
        self.acceleration = np.zeros(n)
        self.before = np.zeros(n)
        self.pace = np.zeros(n)

    cdef void step(self) noexcept nogil:
        cdef Py_ssize_t i
        for i in range(self.joints):
            self._joint(i)

    cdef void _joint(self, Py_ssize_t i) noexcept nogil:
        cdef double q = self.position[i], v = self.speed[i], a = self.acceleration[i], dt = self.dt
        cdef double fastest = self.velocity[i] * self.scale
        cdef double top = self.top[i]
        cdef double change = self.change[i]
        cdef double target = self.before[i]
        cdef double pace, lean, asked, direct, pick, low, high, below, above, middle, value
        cdef int tries, side = 0
        if isfinite(self.target[i]):
            target = min(max(self.target[i], self.lower[i]), self.upper[i])
        else:
            self.refused += 1
        pace = (target - self.before[i]) / dt
        lean = (pace - self.pace[i]) / dt
        self.before[i] = target
        self.pace[i] = pace
        # What is faster than the joint can be is a jump of the target, which has no velocity worth matching.
        if fabs(pace) > self.velocity[i]:
            pace = 0.0
        if fabs(lean) > self.top[i]:
            lean = 0.0

        # Highest acceleration that can still be ramped to zero before the velocity limit, and its mirror image. Above
        # the limit (it was lowered) the velocity is brought back in one go as far as acceleration and jerk allow.
        if v <= fastest:
            high = change * (sqrt(1.0 + 2.0 * (fastest - v) / (dt * change)) - 1.0)
        else:
            high = (fastest - v) / dt
        if v >= -fastest:
            low = -change * (sqrt(1.0 + 2.0 * (v + fastest) / (dt * change)) - 1.0)
        else:
            low = (-fastest - v) / dt
        # A lower scale is gentler in speeding up; braking keeps its strength, or slowing down would lengthen a stop.
        high = max(min(high, top * self.scale if v >= 0.0 else top), -top)
        low = min(max(low, -top * self.scale if v <= 0.0 else -top), top)
        # Jerk has the last word: it is what the limits in force a moment ago left open.
        high = min(max(high, a - change), a + change)
        low = max(min(low, a + change), a - change)

        asked = (target - q) / dt
        direct = (asked - v) / dt
        if low <= direct <= high and fabs(self._overshoot(i, direct, target, pace, lean)) <= MET:
            self.position[i] = target
            self.speed[i] = asked
            self.acceleration[i] = direct
            return
        above = self._overshoot(i, high, target, pace, lean)
        if above <= 0.0:
            pick = high
        else:
            below = self._overshoot(i, low, target, pace, lean)
            pick = low
            if below < 0.0:
                # Regula falsi that halves the weight of an end that stays (Illinois): the function is monotone with
                # small steps where the step counts of a stop change.
                tries = 0
                while tries < MOST_TRIES and below < -MET and high - low > 1e-9 * change:
                    tries += 1
                    middle = low + (high - low) * (below / (below - above))
                    value = self._overshoot(i, middle, target, pace, lean)
                    if value > 0.0:
                        high = middle
                        above = value
                        if side > 0:
                            below *= 0.5
                        side = 1
                    else:
                        low = middle
                        below = value
                        if side < 0:
                            above *= 0.5
                        side = -1
                pick = low
        v += pick * dt
        self.acceleration[i] = pick
        self.speed[i] = v
        self.position[i] = q + v * dt

    cdef double _overshoot(self, Py_ssize_t i, double a, double target, double pace, double lean) noexcept nogil:
        """Where joint ``i`` comes to rest relative to its moving target if it takes ``a`` now and brakes then, rad."""
        cdef double v = self.speed[i] + a * self.dt
        cdef double q = self.position[i] + v * self.dt
        if not plan_stop(v - pace, a - lean, self.top[i], self.change[i], self.dt, self.stop, 0):
            return q - target
        return q + self.stop[END] - target

    cdef void adopt(self, Limiter limiter) noexcept nogil:
        cdef Py_ssize_t i
        for i in range(self.joints):
            self.position[i] = limiter.command[i]
            self.speed[i] = limiter.speed[i]
            self.acceleration[i] = limiter.acceleration[i]

    cdef void rest(self) noexcept nogil:
        cdef Py_ssize_t i
        for i in range(self.joints):
            self.position[i] = self.target[i]
            self.before[i] = self.target[i]
            self.speed[i] = 0.0
            self.acceleration[i] = 0.0
            self.pace[i] = 0.0

    cdef void slow(self, double scale) noexcept nogil:
        if 0.0 < scale <= 1.0:
            self.scale = scale

    def reset(self, position):
        """Rest at ``position`` [n] (rad). Raises ValueError where it is not finite."""
        start = np.asarray(position, dtype=np.float64)
        if start.shape != (self.joints,) or not np.isfinite(start).all():
            raise ValueError(f"expected {self.joints} finite positions, found {start.tolist()}")
        np.asarray(self.target)[:] = start
        self.rest()

    def advance(self):
        """One period towards ``target``; ``position``, ``speed`` and ``acceleration`` hold the answer."""
        self.step()

    def resume(self, Limiter limiter not None):
        """Go on from a limiter's state, as `adopt`."""
        if limiter.joints < self.joints:
            raise ValueError(f"the limiter has {limiter.joints} joints, fewer than the {self.joints} tracked")
        self.adopt(limiter)

    def set_speed(self, double scale):
        """Scale the velocity limit and the acceleration of speeding up, for slow approaches and parking.

        Braking keeps its strength. Raises ValueError outside (0, 1].
        """
        if not 0.0 < scale <= 1.0:
            raise ValueError(f"speed scale {scale} is not in (0, 1]")
        self.slow(scale)
