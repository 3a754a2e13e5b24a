"""Rotations carried as two orthonormal vectors (rot6d): renormalising them, turning them, and their rates.

The six numbers are two vectors a, b of three. Whether they are rows or columns of the rotation matrix is the
manifest's business: a turn is applied to the vectors themselves and its angle is the same either way, so nothing here
depends on it (Zhou et al. 2019, "On the Continuity of Rotation Representations", section 4.1 for the codec).

Turns are rotation vectors (axis times angle, rad). The six numbers' rate is always that of a rotation: omega x a,
omega x b.
"""

from libc.math cimport atan2, cos, fabs, sin, sqrt

import numpy as np

# Two unit vectors this close to parallel (sine of their angle) fix no frame: below it the third axis is rounding.
cdef double PARALLEL = 1e-6
# Below this angle the Rodrigues and Jacobian coefficients are taken from their series; the next term is 1e-14.
cdef double SMALL = 1e-3


cdef inline double dot(const double *a, const double *b) noexcept nogil:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


cdef inline void cross(const double *a, const double *b, double *out) noexcept nogil:
    out[0] = a[1] * b[2] - a[2] * b[1]
    out[1] = a[2] * b[0] - a[0] * b[2]
    out[2] = a[0] * b[1] - a[1] * b[0]


cdef int orthonormalise(double *six, double *rate) noexcept nogil:
    """Gram-Schmidt in place; ``rate`` (NULL for none) becomes the rate of the result. 0, or -1 where no frame is fixed.

    Written so that a non-finite input is refused as well: every comparison with NaN is false.
    """
    cdef double *a = six
    cdef double *b = six + 3
    cdef double *da
    cdef double *db
    cdef double length_a, length_b, along, along_rate, scale
    cdef int i
    length_a = sqrt(dot(a, a))
    length_b = sqrt(dot(b, b))
    if not (length_a > 1e-9 and length_b > 1e-9 and length_a < 1e9 and length_b < 1e9):
        return -1
    if rate != NULL:
        da = rate
        db = rate + 3
    for i in range(3):
        a[i] /= length_a
    if rate != NULL:
        scale = dot(a, da)
        for i in range(3):
            da[i] = (da[i] - a[i] * scale) / length_a
    along = dot(a, b)
    if rate != NULL:
        along_rate = dot(da, b) + dot(a, db)
        for i in range(3):
            db[i] -= along_rate * a[i] + along * da[i]
    for i in range(3):
        b[i] -= along * a[i]
    along = sqrt(dot(b, b))
    if not along > PARALLEL * length_b:
        return -1
    for i in range(3):
        b[i] /= along
    if rate != NULL:
        scale = dot(b, db)
        for i in range(3):
            db[i] = (db[i] - b[i] * scale) / along
    return 0


cdef void rotation_between(const double *start, const double *end, double *vector) noexcept nogil:
    """The turn that takes frame ``start`` to frame ``end`` (both orthonormal), angle in [0, pi]."""
    cdef double s[9]
    cdef double e[9]
    cdef double m[3][3]
    cdef double q[4]
    cdef double trace, scale, sine, angle
    cdef int i, j
    for i in range(6):
        s[i] = start[i]
        e[i] = end[i]
    cross(s, s + 3, s + 6)
    cross(e, e + 3, e + 6)
    for i in range(3):
        for j in range(3):
            m[i][j] = e[i] * s[j] + e[3 + i] * s[3 + j] + e[6 + i] * s[6 + j]
    # Quaternion by its largest component: accurate for every angle, pi included.
    trace = m[0][0] + m[1][1] + m[2][2]
    i = 0
    if m[1][1] > m[0][0]:
        i = 1
    if m[2][2] > m[i][i]:
        i = 2
    if trace > m[i][i]:
        q[0] = 1 + trace
        q[1] = m[2][1] - m[1][2]
        q[2] = m[0][2] - m[2][0]
        q[3] = m[1][0] - m[0][1]
    else:
        j = (i + 1) % 3
        q[0] = m[3 - i - j][j] - m[j][3 - i - j]
        q[1 + i] = 1 + 2 * m[i][i] - trace
        q[1 + j] = m[i][j] + m[j][i]
        q[4 - i - j] = m[i][3 - i - j] + m[3 - i - j][i]
    sine = sqrt(q[1] * q[1] + q[2] * q[2] + q[3] * q[3])
    angle = 2 * atan2(sine, fabs(q[0]))
    scale = angle / sine if sine > 1e-150 else 0
    if q[0] < 0:
        scale = -scale
    for i in range(3):
        vector[i] = q[1 + i] * scale


cdef void rotate(const double *vector, const double *six, double *turned) noexcept nogil:
    """``six`` turned by the rotation vector (Rodrigues). ``turned`` may not be ``six``."""
    cdef double square = dot(vector, vector)
    cdef double angle = sqrt(square)
    cdef double first, second
    cdef double once[3]
    cdef double twice[3]
    cdef int i, j
    if angle < SMALL:
        first = 1 - square / 6
        second = 0.5 - square / 24
    else:
        first = sin(angle) / angle
        second = (1 - cos(angle)) / square
    for j in range(0, 6, 3):
        cross(vector, six + j, once)
        cross(vector, once, twice)
        for i in range(3):
            turned[j + i] = six[j + i] + first * once[i] + second * twice[i]


cdef void angular_rate(const double *six, const double *rate, double *omega) noexcept nogil:
    """Angular velocity of an orthonormal frame from the rates of its two vectors: half the sum of x cross x'."""
    cdef double third[3]
    cdef double third_rate[3]
    cdef double part[3]
    cdef int i
    cross(six, six + 3, third)
    cross(rate, six + 3, third_rate)
    cross(six, rate + 3, part)
    for i in range(3):
        third_rate[i] += part[i]
    cross(six, rate, omega)
    cross(six + 3, rate + 3, part)
    for i in range(3):
        omega[i] += part[i]
    cross(third, third_rate, part)
    for i in range(3):
        omega[i] = (omega[i] + part[i]) / 2


cdef void rate_of(const double *six, const double *omega, double *rate) noexcept nogil:
    cross(omega, six, rate)
    cross(omega, six + 3, rate + 3)


cdef void turned_rate(const double *vector, const double *vector_rate, const double *omega, double *out) noexcept nogil:
    """Angular velocity of exp(vector) R, where R turns with ``omega``: J_l(vector) vector' + exp(vector) omega."""
    cdef double square = dot(vector, vector)
    cdef double angle = sqrt(square)
    cdef double first, second, third
    cdef double once[3]
    cdef double twice[3]
    cdef int i
    if angle < SMALL:
        first = 1 - square / 6
        second = 0.5 - square / 24
        third = 1.0 / 6 - square / 120
    else:
        first = sin(angle) / angle
        second = (1 - cos(angle)) / square
        third = (1 - first) / square
    cross(vector, vector_rate, once)
    cross(vector, once, twice)
    for i in range(3):
        out[i] = vector_rate[i] + second * once[i] + third * twice[i]
    cross(vector, omega, once)
    cross(vector, once, twice)
    for i in range(3):
        out[i] += omega[i] + first * once[i] + second * twice[i]


cdef void vector_rate_for(const double *vector, const double *omega, const double *wanted, double *out) noexcept nogil:
    """The rate of ``vector`` with which exp(vector) R turns at ``wanted``: the inverse of turned_rate."""
    cdef double zero[3]
    cdef double square = dot(vector, vector)
    cdef double half = sqrt(square) / 2
    cdef double last
    cdef double once[3]
    cdef double twice[3]
    cdef int i
    for i in range(3):
        zero[i] = 0
    turned_rate(vector, zero, omega, out)
    for i in range(3):
        out[i] = wanted[i] - out[i]
    # J_l^-1 = I - [v]/2 + (1 - half cot half) / angle^2 [v]^2
    last = 1.0 / 12 + square / 720 if half < SMALL else (1 - half * cos(half) / sin(half)) / square
    cross(vector, out, once)
    cross(vector, once, twice)
    for i in range(3):
        out[i] += -once[i] / 2 + last * twice[i]


cdef double[::1] vector_of(values, int n):
    array = np.ascontiguousarray(values, dtype=np.float64).reshape(-1)
    if array.shape[0] != n:
        raise ValueError(f"found {array.shape[0]} numbers, expected {n}")
    return array


def orthonormal(six):
    """[6] -> [6] float64, the frame nearest in the sense of Gram-Schmidt (the first vector keeps its direction).

    Raises ValueError where the two vectors fix no frame (zero, parallel, or not finite).
    """
    cdef double[::1] data = vector_of(np.array(six, dtype=np.float64), 6)
    if orthonormalise(&data[0], NULL):
        raise ValueError(f"{np.asarray(six).tolist()} fixes no frame: a vector is zero, parallel or not finite")
    return np.asarray(data)


def turn_between(start, end):
    """[6], [6] orthonormal -> [3] float64 rad: the rotation vector that takes the frame ``start`` to ``end``."""
    cdef double[::1] s = vector_of(start, 6)
    cdef double[::1] e = vector_of(end, 6)
    cdef double[::1] out = np.empty(3)
    rotation_between(&s[0], &e[0], &out[0])
    return np.asarray(out)


def turned(vector, six):
    """[3] rad, [6] -> [6] float64: the frame ``six`` turned by a rotation vector."""
    cdef double[::1] v = vector_of(vector, 3)
    cdef double[::1] s = vector_of(six, 6)
    cdef double[::1] out = np.empty(6)
    rotate(&v[0], &s[0], &out[0])
    return np.asarray(out)
