"""The offset that a seam leaves behind, fading in tau: align + fade.

At a seam the new base trajectory starts somewhere else, and at another velocity, than what is being executed. The
difference becomes an offset, so that fused = base + offset is continuous in position and velocity, and the offset
then decays in tau as a critically damped triple pole:

- a linear filter with memory, not a ramp that restarts: with a ramp, chunks that arrive faster than it fades would
  reset it for ever and the robot would never follow its policy;
- a triple pole, so that the offset's acceleration is continuous too. A double pole steps the acceleration by
  pole^2 * offset at the seam, which is exactly what the seam metric counts;
- in tau, so a robot that stands keeps its offset and its position.

Rotations: the offset is the turn that takes the base frame to the executed one, as a rotation vector, and that vector
fades. The way back is the geodesic, whatever the angle; blending six numbers and orthonormalising would speed up in
its middle and has no direction at 180 degrees.
Grippers: an added offset could leave the range of both chunks (old says open, new opens now: the sum says 2), so
they take a convex mix of the value at the seam and the base, its share falling as a single exponential. The mix stays
in the hull of the two; its velocity steps at the seam, which a gripper's own controller smooths.
"""

from libc.math cimport exp

from chatvla_edge.runtime.knots cimport GRIPPER, ROT6D, ROT6D_REST
from chatvla_edge.runtime.rot6d cimport angular_rate, rate_of, rotate, rotation_between, turned_rate, vector_rate_for


cdef void fade_clear(Fade *fade, int size) noexcept nogil:
    cdef int i
    for i in range(size):
        fade.offset[i] = 0
        fade.rate[i] = 0
        fade.curve[i] = 0


cdef void fade_stand(Fade *fade, ActionLayout layout) noexcept nogil:
    """The offset as it is, at rest."""
    cdef int i
    for i in range(layout.size):
        fade.curve[i] = 0
        if layout.kind[i] != GRIPPER:
            fade.rate[i] = 0


cdef void fade_advance(Fade *fade, ActionLayout layout, double tau_step) noexcept nogil:
    """Exact for any step: p(t) = (c0 + c1 t + c2 t^2) exp(-pole t)."""
    cdef double pole = fade.pole
    cdef double left = exp(-pole * tau_step)
    cdef double gripper_left = exp(-fade.gripper_pole * tau_step)
    cdef double p, v, c1, c2, line, slope
    cdef int i, kind
    for i in range(layout.size):
        kind = layout.kind[i]
        if kind == GRIPPER:
            fade.rate[i] *= gripper_left
            continue
        p = fade.offset[i]
        v = fade.rate[i]
        c1 = v + pole * p
        c2 = (fade.curve[i] + pole * (2 * v + pole * p)) / 2
        line = p + tau_step * (c1 + tau_step * c2)
        slope = c1 + 2 * tau_step * c2
        fade.offset[i] = left * line
        fade.rate[i] = left * (slope - pole * line)
        fade.curve[i] = left * (2 * c2 - pole * (2 * slope - pole * line))


cdef void fade_apply(const Fade *fade, ActionLayout layout, const double *base, const double *base_rate,
                     double *value, double *rate) noexcept nogil:
    """fused = base + offset, [A] and per s of tau."""
    cdef double omega[3]
    cdef double total[3]
    cdef double share
    cdef int i, kind
    for i in range(layout.size):
        kind = layout.kind[i]
        if kind == GRIPPER:
            share = fade.rate[i]
            value[i] = (1 - share) * base[i] + share * fade.offset[i]
            rate[i] = (1 - share) * base_rate[i] - fade.gripper_pole * share * (fade.offset[i] - base[i])
        elif kind == ROT6D:
            rotate(fade.offset + i, base + i, value + i)
            angular_rate(base + i, base_rate + i, omega)
            turned_rate(fade.offset + i, fade.rate + i, omega, total)
            rate_of(value + i, total, rate + i)
        elif kind != ROT6D_REST:
            value[i] = base[i] + fade.offset[i]
            rate[i] = base_rate[i] + fade.rate[i]


cdef void fade_capture(Fade *fade, ActionLayout layout, const double *value, const double *value_rate,
                       const double *base, const double *base_rate) noexcept nogil:
    """Set the offset so that a new base continues ``value`` in position and velocity.

    The curve is kept: it is the offset's own acceleration, and taking over the difference of the bases' accelerations
    (noise divided by dt squared) would throw the offset wide.
    """
    cdef double omega[3]
    cdef double wanted[3]
    cdef int i, kind
    for i in range(layout.size):
        kind = layout.kind[i]
        if kind == GRIPPER:
            fade.offset[i] = value[i]
            fade.rate[i] = 1 if fade.gripper_pole > 0 else 0
        elif fade.pole == 0:
            fade.offset[i] = 0
            fade.rate[i] = 0
        elif kind == ROT6D:
            rotation_between(base + i, value + i, fade.offset + i)
            angular_rate(base + i, base_rate + i, omega)
            angular_rate(value + i, value_rate + i, wanted)
            vector_rate_for(fade.offset + i, omega, wanted, fade.rate + i)
        elif kind != ROT6D_REST:
            fade.offset[i] = value[i] - base[i]
            fade.rate[i] = value_rate[i] - base_rate[i]
