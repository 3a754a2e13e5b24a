"""The offset that a seam leaves behind, fading in tau.

    from chatvla_edge.runtime.fade cimport Fade, fade_advance, fade_apply, fade_capture, fade_clear, fade_stand
"""

from chatvla_edge.runtime.knots cimport ActionLayout


cdef struct Fade:
    double pole  # 1/s, of the triple pole; 0: seams are left as they are
    double gripper_pole  # 1/s; 0: likewise
    double *offset  # [A]; a rotation keeps its vector in the first three of its six; a gripper its value at the seam
    double *rate  # [A], per s; a gripper keeps the share (1 -> 0) of its value at the seam
    double *curve  # [A], per s^2


cdef void fade_clear(Fade *fade, int size) noexcept nogil
cdef void fade_stand(Fade *fade, ActionLayout layout) noexcept nogil
cdef void fade_advance(Fade *fade, ActionLayout layout, double tau_step) noexcept nogil
cdef void fade_apply(const Fade *fade, ActionLayout layout, const double *base, const double *base_rate,
                     double *value, double *rate) noexcept nogil
cdef void fade_capture(Fade *fade, ActionLayout layout, const double *value, const double *value_rate,
                       const double *base, const double *base_rate) noexcept nogil
