"""Kinematics of one serial arm without the GIL. A pose is 12 numbers: rotation row by row, then translation (m)."""

cdef enum:
    MOST_LINKS = 8

cdef class Kinematics:
    cdef readonly Py_ssize_t joints
    # Of the last `solve`: distances left (m, rad), iterations taken.
    cdef readonly double position_residual
    cdef readonly double rotation_residual
    cdef readonly int iterations

    cdef double origins[MOST_LINKS * 12]
    cdef double axes[MOST_LINKS * 3]
    cdef double tool[12]
    cdef double lower[MOST_LINKS]
    cdef double upper[MOST_LINKS]
    cdef double posture[MOST_LINKS]
    cdef double posture_gain
    cdef double posture_step
    cdef double length
    cdef double bias
    cdef double position_tolerance
    cdef double rotation_tolerance
    cdef int most_iterations
    # Jacobian [6, joints], rows weighted; filled by `_frames`.
    cdef double jacobian[6 * MOST_LINKS]
    cdef double pose[12]

    # Tool pose at joint angles `q`.
    cdef void forward(self, const double *q, double *pose) noexcept nogil
    # Moves `q` (in: the last command, out: the answer, always finite and within the limits) towards `pose`.
    # True if the residuals are within tolerance.
    cdef bint solve(self, const double *pose, double *q) noexcept nogil

    cdef void _frames(self, const double *q, bint with_jacobian) noexcept nogil
    cdef double _error(self, const double *pose, double *error) noexcept nogil
