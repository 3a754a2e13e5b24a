"""Trajectory time as the servo's loop sees it: no GIL, no allocation.

    from chatvla_edge.runtime.tau cimport TauClock
"""

from libc.stdint cimport uint64_t


cdef struct TauState:
    double tau  # s along the fused trajectory
    double rate  # d tau / d host time; 1 while tracking, 0 at rest, never negative
    double acceleration  # d rate / d host time, 1/s


cdef class TauClock:
    cdef TauState state
    cdef double max_rate
    cdef double max_acceleration
    cdef double max_jerk
    cdef double longest_tick
    cdef uint64_t clipped_ticks

    cdef double c_advance(self, double dt_host, double target_rate, double tau_end) noexcept nogil
    cdef double c_stopping_tau(self) noexcept nogil
    cdef double _stopping_from(self, TauState state) noexcept nogil
    cdef TauState _stepped(self, TauState state, double target, double dt) noexcept nogil
