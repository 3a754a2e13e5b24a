"""Host time and absolute-deadline sleep, without allocation and without the GIL in the wait.

Host time is ``CLOCK_MONOTONIC`` in nanoseconds everywhere in this house (DESIGN 4.5): it never steps when the wall
clock is set, and it is the clock that ``clock_nanosleep`` can wait on absolutely, so that a late tick does not shift
the ticks after it.
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
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1_000_000_000 + now.tv_nsec


cdef inline int c_sleep_until_ns(int64_t deadline_ns) noexcept nogil:
    cdef timespec until
    cdef int error = EINTR
    until.tv_sec = deadline_ns // 1_000_000_000
    until.tv_nsec = deadline_ns % 1_000_000_000
    # A signal wakes the sleeper early; the deadline is absolute, so asking again costs nothing and drifts nowhere.
    while error == EINTR:
        error = clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL)
    return error


def now_ns() -> int:
    """Host time, nanoseconds of CLOCK_MONOTONIC."""
    return c_now_ns()


def sleep_until_ns(int64_t deadline_ns) -> int:
    """Sleep until host time ``deadline_ns``; a deadline in the past returns at once.

    The GIL is released while waiting. Returns the lateness of the wake-up in ns (>= 0).
    Raises OSError when the kernel refuses the deadline (negative time).
    """
    cdef int error
    cdef int64_t now
    with nogil:
        error = c_sleep_until_ns(deadline_ns)
        now = c_now_ns()
    if error:
        raise OSError(error, f"clock_nanosleep refused the deadline {deadline_ns} ns")
    return now - deadline_ns
