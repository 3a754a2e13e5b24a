"""Host time, absolute-deadline sleep, and the rights that a real-time loop asks for.

Host time is ``CLOCK_MONOTONIC`` in nanoseconds everywhere in this house (DESIGN 4.5): it never steps when the wall
clock is set, and it is the clock that ``clock_nanosleep`` can wait on absolutely, so that a late tick does not shift
the ticks after it. The functions for loops without the GIL stand in `realtime.pxd`.

Every right is asked for by itself and answered with a `Grant`: a machine that refuses one still runs, and says what it
runs without. A refusal never raises.
"""

import os
import resource
from dataclasses import dataclass

from libc.errno cimport errno
from libc.stdint cimport int64_t

cdef extern from "<sys/mman.h>" nogil:
    int mlockall(int flags)
    const int MCL_CURRENT
    const int MCL_FUTURE

cdef extern from "<sys/prctl.h>" nogil:
    int prctl(int option, ...)
    const int PR_SET_TIMERSLACK

CAP_IPC_LOCK = 14
_held = {}  # what has to stay open for as long as this process lives


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


@dataclass(frozen=True)
class Grant:
    """One right: ``what`` was asked for, whether it was ``obtained``, and the detail, or why not and what to do."""

    what: str
    obtained: bool
    detail: str


def _ask(what: str, remedy: str, request) -> Grant:
    try:
        return Grant(what, True, request() or "obtained")
    except OSError as error:
        return Grant(what, False, f"{error.strerror or error}; {remedy}")


def fifo(priority: int) -> Grant:
    """SCHED_FIFO for the calling thread. Not inherited by its children: only the loop that asked preempts others.

    Raises ValueError unless 1 <= priority <= 99.
    """
    if not 1 <= priority <= 99:
        raise ValueError(f"SCHED_FIFO priority {priority}; expected 1 to 99")

    def request():
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(priority))
        return f"priority {priority}"
    return _ask("SCHED_FIFO", "LimitRTPRIO=99 in the systemd unit, or `rtprio` in limits.conf", request)


def pin(cpus: set[int]) -> Grant:
    """Keep the calling thread on these CPUs."""
    def request():
        os.sched_setaffinity(0, cpus)
        return f"CPUs {sorted(cpus)}"
    return _ask("CPU affinity", f"asked for {sorted(cpus)}, see /sys/devices/system/cpu/online", request)


def lock_memory() -> Grant:
    """Lock this process's pages, present and future, in memory: a tick never waits for a page to be read back."""
    def request():
        # Under a finite limit later allocations would fail in mid-run, so a lock that may run full is not asked for.
        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        if soft != resource.RLIM_INFINITY and not _has_capability(CAP_IPC_LOCK):
            raise OSError(0, f"RLIMIT_MEMLOCK is {soft} bytes and allocations beyond it would fail")
        if mlockall(MCL_CURRENT | MCL_FUTURE):
            raise OSError(errno, os.strerror(errno))
    return _ask("mlockall", "LimitMEMLOCK=infinity in the systemd unit", request)


def hold_cpu_latency() -> Grant:
    """Keep CPUs out of deep sleep states until this process ends (wake-up p50 40 -> 17 us where it was measured)."""
    def request():
        if "cpu_dma_latency" not in _held:
            # The kernel honours the request while the file is open; unbuffered, so that it arrives now and whole.
            _held["cpu_dma_latency"] = open("/dev/cpu_dma_latency", "wb", buffering=0)
            _held["cpu_dma_latency"].write(bytes(4))
        return "0 us"
    return _ask("/dev/cpu_dma_latency", "a udev rule that gives the daemon's group write access to it", request)


def timer_slack(ns: int = 1) -> Grant:
    """How late the kernel may wake the calling thread to save power: 50 us unless told. SCHED_FIFO has none anyway."""
    def request():
        if prctl(PR_SET_TIMERSLACK, <unsigned long>ns, 0, 0, 0):
            raise OSError(errno, os.strerror(errno))
        return f"{ns} ns"
    return _ask("timer slack", "allow prctl in the sandbox", request)


def preempt_rt() -> Grant:
    """Whether the kernel is a PREEMPT_RT one. Nothing is asked for; the answer explains the tails of the others."""
    def request():
        if not os.path.exists("/sys/kernel/realtime"):
            raise OSError(0, f"kernel {os.uname().release} has no /sys/kernel/realtime")
    return _ask("PREEMPT_RT kernel", "expect rare wake-ups ms late; NVIDIA's apt repository has RT kernels", request)


def enter(priority: int, cpus: set[int] | None = None) -> list[Grant]:
    """Everything a servo or device thread asks for, called on that thread. ``cpus``: None leaves the affinity alone."""
    grants = [timer_slack(), hold_cpu_latency(), lock_memory(), fifo(priority), preempt_rt()]
    return grants if cpus is None else [*grants, pin(cpus)]


def _has_capability(number: int) -> bool:
    with open("/proc/self/status") as status:
        effective = next(line.split()[1] for line in status if line.startswith("CapEff:"))
    return bool(int(effective, 16) >> number & 1)
