"""Host time and absolute-deadline sleep, without allocation and without the GIL in the wait.

Host time is ``CLOCK_MONOTONIC`` in nanoseconds everywhere in this house (DESIGN 4.5): it never steps when the wall
clock is set, and it is the clock that ``clock_nanosleep`` can wait on absolutely, so that a late tick does not shift
the ticks after it.
"""

from libc.stdint cimport int64_t


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
