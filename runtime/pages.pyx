"""Heartbeat, lease and emergency-stop pages: what the arbiter and the processes it watches agree on.

The supervisor creates each page and hands its ``fd`` down by ``pass_fds``; see `slots` for the same pattern. All times
are host time, CLOCK_MONOTONIC in ns.
"""

import os

from libc.stdint cimport int64_t, uint64_t

from chatvla_edge.runtime.realtime cimport c_now_ns
from chatvla_edge.runtime.segments cimport HEADER_WORDS

from chatvla_edge.runtime.segments import create as create_segment

LONGEST_LEASE_NS = LEASE_LONGEST_NS
PAGE_BYTES = 64  # one cache line holds a lease or a stop


cdef class Heartbeats(Segment):
    """One line per process of the rig, each beaten by its process and watched by the supervisor."""

    @classmethod
    def create(cls, name: str, count: int) -> Heartbeats:
        """A page of ``count`` lines that have never been beaten."""
        if count < 1:
            raise ValueError(f"{name}: {count} lines; expected at least 1")
        fd = create_segment(name, "heartbeats", (count, 0, 0), count * BEAT_WORDS * 8)
        try:
            return cls.attach(fd, count)
        finally:
            os.close(fd)

    @classmethod
    def attach(cls, int fd, size_t count) -> Heartbeats:
        """Map the page behind an inherited descriptor. Which line is whose is agreed in the rig's process table."""
        cdef Heartbeats page = cls.__new__(cls)
        page.map_segment(fd, "share", "heartbeats", (count, 0, 0), count * BEAT_WORDS * 8)
        page.page = HeartbeatPage(lines=page.words + HEADER_WORDS, count=count)
        return page

    cdef int must_have(self, Py_ssize_t line) except -1:
        if not 0 <= line < <Py_ssize_t>self.page.count:
            raise IndexError(f"{self.name}: line {line}; expected 0 to {self.page.count - 1}")
        return 0

    def beat(self, Py_ssize_t line) -> None:
        """Say that the process of ``line`` is alive now."""
        self.must_have(line)
        c_beat(&self.page, line, c_now_ns())

    def last_ns(self, Py_ssize_t line) -> int:
        """Host time of the last beat of ``line``, 0 before the first."""
        self.must_have(line)
        return c_last_beat(&self.page, line)


cdef class Lease(Segment):
    """The right to move. Granted by the arbiter for a short time, read by servo and device processes every tick."""

    @classmethod
    def create(cls, name: str) -> Lease:
        """A lease that has expired, mapped for reading."""
        fd = create_segment(name, "lease", (0, 0, 0), PAGE_BYTES)
        try:
            return cls.attach(fd)
        finally:
            os.close(fd)

    @classmethod
    def attach(cls, int fd, write: bool = False) -> Lease:
        """Map the page behind an inherited descriptor. ``write``: as the one arbiter.

        Raises BlockingIOError when there is an arbiter already.
        """
        cdef Lease lease = cls.__new__(cls)
        lease.map_segment(fd, "write" if write else "read", "lease", (0, 0, 0), PAGE_BYTES)
        lease.page = LeasePage(expires_ns=lease.words + HEADER_WORDS)
        return lease

    cdef int must_write(self) except -1:
        if not self.writable:
            raise PermissionError(f"{self.name} is attached for reading; only the arbiter attaches with write=True")
        return 0

    def grant(self, int64_t duration_ns) -> int:
        """Allow motion for ``duration_ns`` from now, whatever was granted before. Returns the expiry, host time in ns.

        Raises ValueError unless 0 < duration_ns <= LONGEST_LEASE_NS.
        """
        self.must_write()
        if not 0 < duration_ns <= LEASE_LONGEST_NS:
            raise ValueError(f"{self.name}: a lease of {duration_ns} ns; expected 1 to {LEASE_LONGEST_NS}")
        cdef int64_t expires = c_now_ns() + duration_ns
        c_lease_grant(&self.page, expires)
        return expires

    def grant_until(self, int64_t expires_ns) -> None:
        """Allow motion until host time ``expires_ns``, whatever was granted before.

        For an arbiter that decided a moment ago: whatever it was kept from doing since then shortens the lease, where
        `grant` would count from now. An instant that has passed is no lease, and no error. Raises ValueError for one
        further ahead than LONGEST_LEASE_NS.
        """
        self.must_write()
        cdef int64_t now = c_now_ns()
        if not 0 < expires_ns <= now + LEASE_LONGEST_NS:
            raise ValueError(
                f"{self.name}: a lease until {expires_ns} ns at {now} ns; expected at most {LEASE_LONGEST_NS} ahead"
            )
        c_lease_grant(&self.page, expires_ns)

    def revoke(self) -> None:
        """Forbid motion from now on."""
        self.must_write()
        c_lease_grant(&self.page, 0)

    def left_ns(self, now_ns: int | None = None) -> int:
        """Time left at host time ``now_ns`` (default: now), 0 when there is no valid lease."""
        return c_lease_left_ns(&self.page, c_now_ns() if now_ns is None else now_ns)

    def expired(self, now_ns: int | None = None) -> bool:
        """Whether motion is forbidden at host time ``now_ns`` (default: now)."""
        return self.left_ns(now_ns) == 0


cdef class EmergencyStop(Segment):
    """A latch that any process may raise, all read, and only the process that created it clears."""

    @classmethod
    def create(cls, name: str) -> EmergencyStop:
        """A stop that is not raised. The handle returned is the owner's."""
        cdef EmergencyStop stop
        fd = create_segment(name, "emergency stop", (0, 0, 0), PAGE_BYTES)
        try:
            stop = cls.attach(fd)
        finally:
            os.close(fd)
        stop.owner = True
        return stop

    @classmethod
    def attach(cls, int fd) -> EmergencyStop:
        """Map the page behind an inherited descriptor: may raise and read, not clear."""
        cdef EmergencyStop stop = cls.__new__(cls)
        stop.map_segment(fd, "share", "emergency stop", (0, 0, 0), PAGE_BYTES)
        stop.page = StopPage(
            raised=stop.words + HEADER_WORDS,
            cleared=stop.words + HEADER_WORDS + 1,
            raised_ns=stop.words + HEADER_WORDS + 2,
            raised_by=stop.words + HEADER_WORDS + 3,
        )
        return stop

    def raise_stop(self) -> None:
        """Latch the stop."""
        c_stop_raise(&self.page, c_now_ns(), os.getpid())

    @property
    def raised(self) -> bool:
        """Whether the stop is latched."""
        return c_stop_raised(&self.page)

    @property
    def count(self) -> int:
        """How often the stop was raised so far: what `clear` wants to hear."""
        return load_acquire(self.page.raised)

    def clear(self, uint64_t seen) -> bool:
        """Clear all raises up to number ``seen`` (`count`, as the operator saw it). Returns whether none is left.

        A stop raised between the look and the clear stays latched. Raises PermissionError for all but the owner,
        ValueError for a count that was never reached or was cleared before.
        """
        cdef uint64_t count = load_acquire(self.page.raised)
        if not self.owner:
            raise PermissionError(f"{self.name}: only the process that created the stop clears it")
        if not load_relaxed(self.page.cleared) <= seen <= count:
            raise ValueError(
                f"{self.name}: clearing up to raise {seen}; expected {load_relaxed(self.page.cleared)} to {count}"
            )
        store_release(self.page.cleared, seen)
        return not c_stop_raised(&self.page)

    def last_raise(self) -> tuple[int, int] | None:
        """Host time in ns and process id of a raise, None before the first; of two at once, either or a mix of both."""
        if load_acquire(self.page.raised) == 0:
            return None
        return load_relaxed(self.page.raised_ns), load_relaxed(self.page.raised_by)
