"""What was fused in the recent past, by tau: a ring that committed prefixes read.

An observation is tens of milliseconds old when the policy asks what it must continue, and with ``first_step`` -1 its
first action is older still. Entries are spaced in tau, so that the ring reaches equally far back at any servo rate
and a robot that stands adds none. Linear between entries: at 4 ms and 10 rad/s^2 that is 2e-5 rad off.
"""

from libc.string cimport memcpy

from chatvla_edge.runtime.knots cimport ROT6D, ActionLayout
from chatvla_edge.runtime.rot6d cimport orthonormalise


cdef void history_add(History *history, int A, double tau, const double *value) noexcept nogil:
    cdef int newest = (history.next + history.size - 1) % history.size
    if history.count and tau - history.tau[newest] < history.spacing:
        return
    history.tau[history.next] = tau
    memcpy(history.values + history.next * A, value, A * sizeof(double))
    history.next = (history.next + 1) % history.size
    history.count = min(history.count + 1, history.size)


cdef void history_at(const History *history, ActionLayout layout, double tau, double latest_tau, const double *latest,
                     double *value) noexcept nogil:
    """``value`` [A] at a past tau; ``latest`` is what is fused now. The oldest entry, where tau lies before it."""
    cdef int A = layout.size
    cdef int i, back, index
    cdef double later_tau = latest_tau
    cdef const double *later = latest
    cdef const double *earlier
    cdef double share, span
    for back in range(1, history.count + 1):
        index = (history.next + history.size - back) % history.size
        earlier = history.values + index * A
        if history.tau[index] <= tau:
            span = later_tau - history.tau[index]
            share = (tau - history.tau[index]) / span if span > 0 else 0
            for i in range(A):
                value[i] = earlier[i] + share * (later[i] - earlier[i])
            break
        later_tau = history.tau[index]
        later = earlier
    else:
        memcpy(value, later, A * sizeof(double))
    for i in range(A):
        if layout.kind[i] == ROT6D and orthonormalise(value + i, NULL):
            memcpy(value + i, later + i, 6 * sizeof(double))
