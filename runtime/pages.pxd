"""Heartbeats, motion lease and emergency stop: single words that every process of a rig reads itself, without the GIL.

    from chatvla_edge.runtime.pages cimport LeasePage, StopPage, c_lease_valid, c_stop_raised
    cdef LeasePage lease_page = lease.page      # keep `lease` alive while it is used

Each fact is one 64-bit word, so no reader can see half of it, and a process killed anywhere leaves a fact, not a lock.
"""

from libc.stdint cimport int64_t, uint64_t

from chatvla_edge.runtime.segments cimport Segment

cdef extern from "atomics.h" nogil:
    uint64_t load_relaxed(const uint64_t *word)
    uint64_t load_acquire(const uint64_t *word)
    void store_relaxed(uint64_t *word, uint64_t value)
    void store_release(uint64_t *word, uint64_t value)
    uint64_t add_release(uint64_t *word, uint64_t value)

cdef enum:
    # The arbiter grants 100 ms at a time. A word that promises more than this ahead is no lease but damage, and is
    # treated as expired.
    LEASE_LONGEST_NS = 1_000_000_000
    BEAT_WORDS = 8       # one cache line per process: two processes that beat never share one

cdef struct HeartbeatPage:
    uint64_t *lines
    uint64_t count

cdef struct LeasePage:
    uint64_t *expires_ns

cdef struct StopPage:
    uint64_t *raised     # how often anybody has raised it
    uint64_t *cleared    # the count that the owner cleared last; latched while the two differ
    uint64_t *raised_ns  # host time and process of a raiser, for the message to the operator only
    uint64_t *raised_by


cdef inline void c_beat(const HeartbeatPage *page, uint64_t line, int64_t now_ns) noexcept nogil:
    """Say that the owner of ``line`` was alive at ``now_ns``. Release: what it did before is visible with the beat."""
    store_release(page.lines + line * BEAT_WORDS, <uint64_t>now_ns)


cdef inline int64_t c_last_beat(const HeartbeatPage *page, uint64_t line) noexcept nogil:
    """Host time of the last beat of ``line``, 0 before the first."""
    return <int64_t>load_acquire(page.lines + line * BEAT_WORDS)


cdef inline void c_lease_grant(const LeasePage *page, int64_t expires_ns) noexcept nogil:
    """Allow motion until host time ``expires_ns``; 0 revokes. The caller is the arbiter, the only one who grants."""
    store_release(page.expires_ns, <uint64_t>expires_ns)


cdef inline int64_t c_lease_left_ns(const LeasePage *page, int64_t now_ns) noexcept nogil:
    """Time left on the lease at host time ``now_ns``, 0 when it has expired, was revoked or was never granted."""
    # Subtracted unsigned: a damaged word may hold anything, and signed overflow is undefined.
    cdef int64_t left = <int64_t>(load_acquire(page.expires_ns) - <uint64_t>now_ns)
    return left if 0 < left <= LEASE_LONGEST_NS else 0


cdef inline bint c_lease_valid(const LeasePage *page, int64_t now_ns) noexcept nogil:
    """Whether motion is allowed at host time ``now_ns``."""
    return c_lease_left_ns(page, now_ns) > 0


cdef inline void c_stop_raise(const StopPage *page, int64_t now_ns, uint64_t pid) noexcept nogil:
    """Latch the emergency stop; any process may. The count alone decides; the stamps may be another raiser's."""
    store_relaxed(page.raised_ns, <uint64_t>now_ns)
    store_relaxed(page.raised_by, pid)
    add_release(page.raised, 1)


cdef inline bint c_stop_raised(const StopPage *page) noexcept nogil:
    """Whether the emergency stop is latched.

    `cleared` is read before `raised`, and acquired so that it stays before: both only grow and cleared <= raised, so
    equal values prove a moment at which nothing was latched. Read the other way round, a press between two loads and a
    clear of the older press would hide a stop that stood all the while.
    """
    cdef uint64_t cleared = load_acquire(page.cleared)
    return load_acquire(page.raised) != cleared


# ------------------------------------------------------------------------------------------------------ Python handles

cdef class Heartbeats(Segment):
    cdef HeartbeatPage page

    cdef int must_have(self, Py_ssize_t line) except -1

cdef class Lease(Segment):
    cdef LeasePage page

    cdef int must_write(self) except -1

cdef class EmergencyStop(Segment):
    cdef StopPage page
    cdef readonly bint owner
