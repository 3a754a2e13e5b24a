"""What was fused in the recent past, by tau.

    from chatvla_edge.runtime.history cimport History, history_add, history_at
"""

from chatvla_edge.runtime.knots cimport ActionLayout


cdef struct History:
    int size  # entries there is room for
    int count
    int next
    double spacing  # s of tau between entries
    double *tau  # [size]
    double *values  # [size, A]


cdef void history_add(History *history, int A, double tau, const double *value) noexcept nogil
cdef void history_at(const History *history, ActionLayout layout, double tau, double latest_tau, const double *latest,
                     double *value) noexcept nogil
