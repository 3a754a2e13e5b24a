"""One chunk as the servo samples it: rows equally spaced in tau, linear or cubic between them, held past the last.

What a component is decides how it may be interpolated, so the layout is data (the manifest's action semantics):

- joints and positions: cubic Hermite with central-difference slopes (C1; local, so a noisy row disturbs two
  intervals and no more);
- grippers: the same cubic with harmonic-mean slopes (Fritsch and Butland 1984), which is monotone between rows: a
  gripper that is told 0, 0, 1, 1 never goes below 0 or above 1, where a plain cubic would open against its stop;
- rot6d: the six numbers are interpolated and then orthonormalised. Between neighbouring rows of a chunk the angle is
  a few degrees; the path on the chord differs from slerp by under angle^3 / 60, 1e-5 rad at 5 degrees. Large turns
  occur only at seams, and those go along the geodesic (fade.pyx).

Quaternions and Euler angles are no component kinds: no supported head predicts them. A quaternion would need the sign
that lies nearer the row before; Euler angles should become rot6d in the policy.
"""

from libc.math cimport fmax, fmin, isfinite
from libc.stdlib cimport calloc, free

import numpy as np

from chatvla_edge.runtime.rot6d cimport orthonormalise

KINDS = ("joint", "gripper", "xyz", "rot6d")


cdef class ActionLayout:
    """The meaning of each action component, in order.

    ``kinds``: one of "joint", "gripper", "xyz" per number, and "rot6d" six times in a row per rotation;
    ``gripper_range``: (closed, open) in either order, to which gripper components are clamped.
    Raises ValueError for an unknown kind or a rotation that is not six numbers long.
    """

    def __cinit__(self, kinds, gripper_range=(0.0, 1.0)):
        cdef int i
        kinds = tuple(kinds)
        if not 1 <= len(kinds) <= 256:
            raise ValueError(f"{len(kinds)} action components; expected 1 to 256")
        low, high = sorted(float(value) for value in gripper_range)
        if not (isfinite(low) and isfinite(high)):
            raise ValueError(f"gripper_range {gripper_range} is not finite")
        self.size = len(kinds)
        self.kind = <int *>calloc(self.size, sizeof(int))
        self.low = <double *>calloc(self.size, sizeof(double))
        self.high = <double *>calloc(self.size, sizeof(double))
        if self.kind == NULL or self.low == NULL or self.high == NULL:
            raise MemoryError
        run = 0
        for i, name in enumerate(kinds):
            if name not in KINDS:
                raise ValueError(f"component {i} is {name!r}; expected one of {', '.join(KINDS)}")
            if name != "rot6d" and run % 6:
                raise ValueError(f"the rotation before component {i} has {run % 6} numbers; rot6d has six")
            run = run + 1 if name == "rot6d" else 0
            if name == "rot6d":
                self.kind[i] = ROT6D if run % 6 == 1 else ROT6D_REST
            else:
                self.kind[i] = KINDS.index(name)
            self.low[i] = low
            self.high[i] = high
        if run % 6:
            raise ValueError(f"the last rotation has {run % 6} numbers; rot6d has six")

    def __dealloc__(self):
        free(self.kind)
        free(self.low)
        free(self.high)

    @property
    def kinds(self):
        return tuple(KINDS[min(self.kind[i], <int>ROT6D)] for i in range(self.size))


cdef int knots_prepare(Knots *knots, ActionLayout layout) noexcept nogil:
    """Clamps grippers, orthonormalises rotations, computes slopes. 0, or -1 where a rotation fixes no frame."""
    cdef int A = layout.size
    cdef int rows = knots.rows
    cdef int i, row
    cdef double before, after
    cdef double *action
    cdef double *slope
    for row in range(rows):
        action = knots.actions + row * A
        for i in range(A):
            if layout.kind[i] == GRIPPER:
                action[i] = fmin(fmax(action[i], layout.low[i]), layout.high[i])
            elif layout.kind[i] == ROT6D:
                if orthonormalise(action + i, NULL):
                    return -1
    if not knots.cubic:
        return 0
    for row in range(rows):
        action = knots.actions + row * A
        slope = knots.slopes + row * A
        for i in range(A):
            # One-sided at the ends: the three-point form would triple the noise of a single row.
            after = action[A + i] - action[i] if row + 1 < rows else 0
            before = action[i] - action[i - A] if row > 0 else after
            if row + 1 == rows:
                after = before
            if layout.kind[i] == GRIPPER:
                slope[i] = 2 * before * after / (before + after) if before * after > 0 else 0
            else:
                slope[i] = (before + after) / 2
    return 0


cdef void knots_sample(const Knots *knots, ActionLayout layout, double tau, double *value, double *rate) noexcept nogil:
    """``value`` [A] at tau and its rate of change in tau, [A] per s. Held, with rate 0, outside the knots.

    At the last row itself the rate is still that of the arrival: a chunk that ends on a tick moves until that tick.
    """
    cdef int A = layout.size
    cdef int i, row
    cdef double x = (tau - knots.tau_first) / knots.dt
    cdef double u, step, curve, per_second = 1 / knots.dt
    cdef const double *here
    cdef const double *there
    cdef const double *slope
    cdef const double *next_slope
    if knots.rows == 1 or not knots.tau_first <= tau <= knots.tau_last:
        here = knots.actions + (0 if tau < knots.tau_first else knots.rows - 1) * A
        for i in range(A):
            value[i] = here[i]
            rate[i] = 0
        return
    if tau == knots.tau_last:  # where a starved clock rests, and where the division may fall a rounding short
        row = knots.rows - 2
        u = 1
    else:
        row = min(<int>x, knots.rows - 2)
        u = fmin(x - row, 1)
    here = knots.actions + row * A
    there = here + A
    if knots.cubic:
        slope = knots.slopes + row * A
        next_slope = slope + A
        for i in range(A):
            step = there[i] - here[i]
            curve = slope[i] + next_slope[i] - 2 * step
            value[i] = here[i] + u * (slope[i] + u * (step - slope[i] - curve + u * curve))
            rate[i] = (slope[i] + u * (2 * (step - slope[i] - curve) + 3 * u * curve)) * per_second
    else:
        for i in range(A):
            step = there[i] - here[i]
            value[i] = here[i] + u * step
            rate[i] = step * per_second
    if u == 1:  # the polynomial misses its end by a rounding
        for i in range(A):
            value[i] = there[i]
    for i in range(A):
        if layout.kind[i] == GRIPPER:
            # Monotone by construction; the clamp takes the last bit of rounding.
            value[i] = fmin(fmax(value[i], fmin(here[i], there[i])), fmax(here[i], there[i]))
        elif layout.kind[i] == ROT6D:
            if orthonormalise(value + i, rate + i):
                # Only halfway between opposite rotations, where no direction is the shorter one: take the nearer row.
                hold_rotation(here + i if u < 0.5 else there + i, value + i, rate + i)


cdef inline void hold_rotation(const double *six, double *value, double *rate) noexcept nogil:
    cdef int i
    for i in range(6):
        value[i] = six[i]
        rate[i] = 0


def sample(ActionLayout layout, actions, double dt, taus, *, bint cubic=True):
    """``actions`` [H, A], the first due at tau 0 -> (values [T, A], rates [T, A] per s) at ``taus`` [T].

    The servo's own interpolation, for tests, plots and the policy side. Raises ValueError for a wrong shape or a
    rotation that fixes no frame.
    """
    cdef double[:, ::1] rows = np.array(actions, dtype=np.float64, order="C", ndmin=2)
    cdef double[::1] times = np.ascontiguousarray(taus, dtype=np.float64)
    cdef Knots knots
    cdef int t
    if rows.shape[1] != layout.size or not rows.shape[0] or not dt > 0 or not np.isfinite(np.asarray(rows)).all():
        raise ValueError(f"actions {np.shape(actions)}, dt {dt}; expected finite [H, {layout.size}] and dt > 0")
    cdef double[:, ::1] slopes = np.zeros((rows.shape[0], layout.size))
    cdef double[:, ::1] values = np.empty((times.shape[0], layout.size))
    cdef double[:, ::1] rates = np.empty((times.shape[0], layout.size))
    knots.tau_first = 0
    knots.dt = dt
    knots.rows = <int>rows.shape[0]
    knots.tau_last = (knots.rows - 1) * dt
    knots.actions = &rows[0, 0]
    knots.slopes = &slopes[0, 0]
    knots.cubic = cubic
    knots.sequence = 0
    if knots_prepare(&knots, layout):
        raise ValueError("a rotation's two vectors are zero or parallel and fix no frame")
    for t in range(times.shape[0]):
        knots_sample(&knots, layout, times[t], &values[t, 0], &rates[t, 0])
    return np.asarray(values), np.asarray(rates)
