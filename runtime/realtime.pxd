"""Host time and the absolute-deadline sleep as other extensions see them: inline, without the GIL, without allocation.

    from chatvla_edge.runtime.realtime cimport c_now_ns, c_sleep_until_ns
"""

from libc.errno cimport EINTR
from libc.stdint cimport int64_t

cdef extern from "<time.h>" nogil:
    ctypedef int clockid_t
    struct timespec:
        long tv_sec
        long tv_nsec
    const clockid_t CLOCK_MONOTONIC
    const int TIMER_ABSTIME
    int clock_gettime(clockid_t clock, timespec *now)
    int clock_nanosleep(clockid_t clock, int flags, const timespec *request, timespec *remain)


cdef inline int64_t c_now_ns() noexcept nogil:
    """Host time, nanoseconds of CLOCK_MONOTONIC."""
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1_000_000_000 + now.tv_nsec


cdef inline int c_sleep_until_ns(int64_t deadline_ns) noexcept nogil:
    """Sleep until host time ``deadline_ns``; at once if it has passed. Returns 0, or the errno of a refusal."""
    cdef timespec until
    cdef int error = EINTR
    until.tv_sec = deadline_ns // 1_000_000_000
    until.tv_nsec = deadline_ns % 1_000_000_000
    # A signal wakes the sleeper early; the deadline is absolute, so asking again costs nothing and drifts nowhere.
    while error == EINTR:
        error = clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL)
    return error
