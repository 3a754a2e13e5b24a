"""One chunk as the servo samples it: knots equally spaced in tau, prepared once, sampled at any tau.

    from chatvla_edge.runtime.knots cimport ActionLayout, Knots, knots_prepare, knots_sample
"""

from libc.stdint cimport uint64_t

cdef enum Kind:
    JOINT = 0  # rad or m, cubic may pass its knots' hull between them
    GRIPPER = 1  # never leaves the hull of its neighbouring knots
    XYZ = 2  # m
    ROT6D = 3  # first of six numbers
    ROT6D_REST = 4  # the other five


cdef class ActionLayout:
    cdef readonly int size
    cdef int *kind
    cdef double *low
    cdef double *high


cdef struct Knots:
    double tau_first  # when row 0 is due, s
    double tau_last  # when the last row is due, s
    double dt  # s between rows
    int rows
    double *actions  # [rows, A]
    double *slopes  # [rows, A], change per row; unused when linear
    bint cubic
    uint64_t sequence


cdef int knots_prepare(Knots *knots, ActionLayout layout) noexcept nogil
cdef void knots_sample(const Knots *knots, ActionLayout layout, double tau, double *value, double *rate) noexcept nogil
