"""Rotations carried as two orthonormal vectors (rot6d), for loops without the GIL.

    from chatvla_edge.runtime.rot6d cimport orthonormalise, rotation_between, rotate, rotate_rate
"""

cdef int orthonormalise(double *six, double *rate) noexcept nogil
cdef void rotation_between(const double *start, const double *end, double *vector) noexcept nogil
cdef void rotate(const double *vector, const double *six, double *turned) noexcept nogil
cdef void angular_rate(const double *six, const double *rate, double *omega) noexcept nogil
cdef void rate_of(const double *six, const double *omega, double *rate) noexcept nogil
cdef void turned_rate(const double *vector, const double *vector_rate, const double *omega, double *out) noexcept nogil
cdef void vector_rate_for(const double *vector, const double *omega, const double *wanted, double *out) noexcept nogil
