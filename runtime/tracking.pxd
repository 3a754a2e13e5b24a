"""Jerk-limited tracking without the GIL."""

from chatvla_edge.runtime.limits cimport Limiter

cdef class Tracker:
    # `target` is written before each step, the others are read after it; n numbers each.
    cdef readonly double[::1] target
    cdef readonly double[::1] position
    cdef readonly double[::1] speed
    cdef readonly double[::1] acceleration
    cdef readonly Py_ssize_t joints
    cdef readonly double dt
    # Targets that were not finite, and were therefore not followed.
    cdef readonly long long refused

    cdef double scale
    cdef double[::1] lower, upper, velocity, top, change, before, pace
    cdef double stop[14]

    # One period towards `target`.
    cdef void step(self) noexcept nogil
    # Go on from where the limiter really is; to be called after every tick that it clipped, repeated or braked.
    cdef void adopt(self, Limiter limiter) noexcept nogil
    # Rest at `target`.
    cdef void rest(self) noexcept nogil
    # Scale the velocity limit and the acceleration of speeding up from the next step on, 0 < scale <= 1.
    cdef void slow(self, double scale) noexcept nogil

    cdef void _joint(self, Py_ssize_t i) noexcept nogil
    cdef double _overshoot(self, Py_ssize_t i, double a, double target, double pace, double lean) noexcept nogil
