"""Rotation codecs: what a checkpoint's rotation numbers mean, taken as the manifest names it (DESIGN 4.5).

A codec is data, never a guess: the manifest names one of CODECS for each action component that is a rotation, and
`decode` turns its numbers into the tool's rotation matrix in the base frame. Each has a golden-pose test against an
independent implementation.

``rot6d_franka_droid`` is the public Franka checkpoints' own, and is *not* the rotation that its six numbers seem to
be: the data pipeline read DROID's extrinsic xyz angles as intrinsic XYZ before it kept two matrix rows, and the
evaluation inverts exactly that. So the rows are decoded to intrinsic XYZ angles, and the same three numbers are then
applied as extrinsic xyz. Taken literally, a gripper that points down would turn by twice its yaw.
"""

from libc.math cimport asin, atan2, cos, fabs, fmax, fmin, sin, sqrt

import numpy as np

CODECS = ("rot6d_rows", "rot6d_franka_droid", "euler_XYZ_intrinsic", "euler_xyz_extrinsic", "quaternion_xyzw")
CODEC_SIZES = (6, 6, 3, 3, 4)

# Two directions with a smaller sine between them (or a shorter vector) fix no frame: the rest would be rounding.
cdef double DEGENERATE = 1e-6
# Nearer than this to sin(middle angle) = +-1 the outer Euler angles turn about one axis; the last is then set to 0.
cdef double LOCKED = 1.0 - 1e-12


cdef int rot6d_to_matrix(const double *six, double *matrix) noexcept nogil:
    """Gram-Schmidt on the two rows (Zhou et al. 2019, section 4.1); comparisons are such that NaN is refused."""
    cdef double length = sqrt(six[0] * six[0] + six[1] * six[1] + six[2] * six[2])
    cdef double other = sqrt(six[3] * six[3] + six[4] * six[4] + six[5] * six[5])
    cdef double ax, ay, az, bx, by, bz, along, rest
    if not (DEGENERATE < length < 1e150 and DEGENERATE < other < 1e150):
        return -1
    ax = six[0] / length
    ay = six[1] / length
    az = six[2] / length
    bx = six[3] / other
    by = six[4] / other
    bz = six[5] / other
    along = ax * bx + ay * by + az * bz
    bx -= along * ax
    by -= along * ay
    bz -= along * az
    rest = sqrt(bx * bx + by * by + bz * bz)
    if not rest > DEGENERATE:
        return -1
    bx /= rest
    by /= rest
    bz /= rest
    matrix[0] = ax
    matrix[1] = ay
    matrix[2] = az
    matrix[3] = bx
    matrix[4] = by
    matrix[5] = bz
    matrix[6] = ay * bz - az * by
    matrix[7] = az * bx - ax * bz
    matrix[8] = ax * by - ay * bx
    return 0


cdef void euler_intrinsic_to_matrix(const double *angles, double *matrix) noexcept nogil:
    """Rx(a) Ry(b) Rz(c)."""
    cdef double ca = cos(angles[0]), sa = sin(angles[0])
    cdef double cb = cos(angles[1]), sb = sin(angles[1])
    cdef double cc = cos(angles[2]), sc = sin(angles[2])
    matrix[0] = cb * cc
    matrix[1] = -cb * sc
    matrix[2] = sb
    matrix[3] = ca * sc + sa * sb * cc
    matrix[4] = ca * cc - sa * sb * sc
    matrix[5] = -sa * cb
    matrix[6] = sa * sc - ca * sb * cc
    matrix[7] = sa * cc + ca * sb * sc
    matrix[8] = ca * cb


cdef void matrix_to_euler_intrinsic(const double *matrix, double *angles) noexcept nogil:
    angles[1] = asin(fmax(-1.0, fmin(1.0, matrix[2])))
    if fabs(matrix[2]) > LOCKED:
        angles[0] = atan2(matrix[7], matrix[4])
        angles[2] = 0.0
    else:
        angles[0] = atan2(-matrix[5], matrix[8])
        angles[2] = atan2(-matrix[1], matrix[0])


cdef void euler_extrinsic_to_matrix(const double *angles, double *matrix) noexcept nogil:
    """Rz(c) Ry(b) Rx(a): about the fixed x, then y, then z."""
    cdef double ca = cos(angles[0]), sa = sin(angles[0])
    cdef double cb = cos(angles[1]), sb = sin(angles[1])
    cdef double cc = cos(angles[2]), sc = sin(angles[2])
    matrix[0] = cc * cb
    matrix[1] = cc * sb * sa - sc * ca
    matrix[2] = cc * sb * ca + sc * sa
    matrix[3] = sc * cb
    matrix[4] = sc * sb * sa + cc * ca
    matrix[5] = sc * sb * ca - cc * sa
    matrix[6] = -sb
    matrix[7] = cb * sa
    matrix[8] = cb * ca


cdef void matrix_to_euler_extrinsic(const double *matrix, double *angles) noexcept nogil:
    angles[1] = -asin(fmax(-1.0, fmin(1.0, matrix[6])))
    if fabs(matrix[6]) > LOCKED:
        angles[0] = atan2(-matrix[5], matrix[4])
        angles[2] = 0.0
    else:
        angles[0] = atan2(matrix[7], matrix[8])
        angles[2] = atan2(matrix[3], matrix[0])


cdef int quaternion_to_matrix(const double *xyzw, double *matrix) noexcept nogil:
    """Any length but zero: it is normalised."""
    cdef double x = xyzw[0], y = xyzw[1], z = xyzw[2], w = xyzw[3]
    cdef double square = x * x + y * y + z * z + w * w
    cdef double two
    if not DEGENERATE * DEGENERATE < square < 1e300:
        return -1
    two = 2.0 / square
    matrix[0] = 1.0 - two * (y * y + z * z)
    matrix[1] = two * (x * y - z * w)
    matrix[2] = two * (x * z + y * w)
    matrix[3] = two * (x * y + z * w)
    matrix[4] = 1.0 - two * (x * x + z * z)
    matrix[5] = two * (y * z - x * w)
    matrix[6] = two * (x * z - y * w)
    matrix[7] = two * (y * z + x * w)
    matrix[8] = 1.0 - two * (x * x + y * y)
    return 0


cdef void matrix_to_quaternion(const double *matrix, double *xyzw) noexcept nogil:
    """Shepperd's choice: the largest of the four squares is divided by, so no pose is ill-conditioned. w >= 0."""
    cdef double trace = matrix[0] + matrix[4] + matrix[8]
    cdef double best, sign, length
    cdef int i
    if trace >= matrix[0] and trace >= matrix[4] and trace >= matrix[8]:
        xyzw[3] = 1.0 + trace
        xyzw[0] = matrix[7] - matrix[5]
        xyzw[1] = matrix[2] - matrix[6]
        xyzw[2] = matrix[3] - matrix[1]
    elif matrix[0] >= matrix[4] and matrix[0] >= matrix[8]:
        xyzw[3] = matrix[7] - matrix[5]
        xyzw[0] = 1.0 + matrix[0] - matrix[4] - matrix[8]
        xyzw[1] = matrix[1] + matrix[3]
        xyzw[2] = matrix[2] + matrix[6]
    elif matrix[4] >= matrix[8]:
        xyzw[3] = matrix[2] - matrix[6]
        xyzw[0] = matrix[1] + matrix[3]
        xyzw[1] = 1.0 - matrix[0] + matrix[4] - matrix[8]
        xyzw[2] = matrix[5] + matrix[7]
    else:
        xyzw[3] = matrix[3] - matrix[1]
        xyzw[0] = matrix[2] + matrix[6]
        xyzw[1] = matrix[5] + matrix[7]
        xyzw[2] = 1.0 - matrix[0] - matrix[4] + matrix[8]
    best = xyzw[0] * xyzw[0] + xyzw[1] * xyzw[1] + xyzw[2] * xyzw[2] + xyzw[3] * xyzw[3]
    sign = -1.0 if xyzw[3] < 0.0 else 1.0
    length = sign / sqrt(best)
    for i in range(4):
        xyzw[i] *= length


cdef void rotation_between(const double *here, const double *there, double *vector) noexcept nogil:
    cdef double turn[9]
    cdef double q[4]
    cdef double length, scale
    cdef int i, j
    for i in range(3):
        for j in range(3):
            turn[3 * i + j] = (
                there[3 * i] * here[3 * j] + there[3 * i + 1] * here[3 * j + 1] + there[3 * i + 2] * here[3 * j + 2]
            )
    matrix_to_quaternion(turn, q)
    length = sqrt(q[0] * q[0] + q[1] * q[1] + q[2] * q[2])
    # angle / sin(angle / 2); the series' next term is below 1e-14 here.
    scale = 2.0 if length < 1e-7 else 2.0 * atan2(length, q[3]) / length
    for i in range(3):
        vector[i] = scale * q[i]


cdef int decode_rotation(int codec, const double *numbers, double *matrix) noexcept nogil:
    cdef double angles[3]
    cdef int i
    if codec == ROT6D_ROWS:
        return rot6d_to_matrix(numbers, matrix)
    if codec == ROT6D_FRANKA_DROID:
        if rot6d_to_matrix(numbers, matrix) != 0:
            return -1
        matrix_to_euler_intrinsic(matrix, angles)
        euler_extrinsic_to_matrix(angles, matrix)
        return 0
    if codec == QUATERNION_XYZW:
        return quaternion_to_matrix(numbers, matrix)
    for i in range(3):
        if not fabs(numbers[i]) < 1e6:
            return -1
    if codec == EULER_XYZ_INTRINSIC:
        euler_intrinsic_to_matrix(numbers, matrix)
    else:
        euler_extrinsic_to_matrix(numbers, matrix)
    return 0


cdef void encode_rotation(int codec, const double *matrix, double *numbers) noexcept nogil:
    cdef double other[9]
    cdef double angles[3]
    cdef int i
    if codec == ROT6D_ROWS:
        for i in range(6):
            numbers[i] = matrix[i]
    elif codec == ROT6D_FRANKA_DROID:
        matrix_to_euler_extrinsic(matrix, angles)
        euler_intrinsic_to_matrix(angles, other)
        for i in range(6):
            numbers[i] = other[i]
    elif codec == EULER_XYZ_INTRINSIC:
        matrix_to_euler_intrinsic(matrix, numbers)
    elif codec == EULER_XYZ_EXTRINSIC:
        matrix_to_euler_extrinsic(matrix, numbers)
    else:
        matrix_to_quaternion(matrix, numbers)


def codec_number(str codec):
    """The number that `decode_rotation` knows a codec by. Raises ValueError for an unknown name."""
    if codec not in CODECS:
        raise ValueError(f"unknown rotation codec {codec!r}; known: {', '.join(CODECS)}")
    return CODECS.index(codec)


def decode(str codec, numbers):
    """Rotation matrix [3, 3] float64 in the base frame from a codec's numbers [CODEC_SIZES].

    Raises ValueError for an unknown codec, a wrong count, or numbers that fix no rotation (zero, parallel, non-finite).
    """
    cdef int number = codec_number(codec)
    cdef double[::1] given = np.ascontiguousarray(numbers, dtype=np.float64)
    cdef double[::1] matrix = np.empty(9)
    if given.shape[0] != CODEC_SIZES[number]:
        raise ValueError(f"{codec} takes {CODEC_SIZES[number]} numbers, found {given.shape[0]}")
    if decode_rotation(number, &given[0], &matrix[0]) != 0:
        raise ValueError(f"{codec} {np.asarray(given).tolist()} fixes no rotation")
    return np.asarray(matrix).reshape(3, 3)


def encode(str codec, matrix):
    """A codec's numbers, float64 [CODEC_SIZES], for a rotation matrix [3, 3]. Raises ValueError if it is not one."""
    cdef int number = codec_number(codec)
    given = np.ascontiguousarray(matrix, dtype=np.float64)
    if given.shape != (3, 3) or not np.allclose(given @ given.T, np.eye(3), atol=1e-6) or np.linalg.det(given) < 0:
        raise ValueError(f"not a rotation matrix: {given.tolist()}")
    cdef double[::1] flat = given.ravel()
    cdef double[::1] numbers = np.empty(CODEC_SIZES[number])
    encode_rotation(number, &flat[0], &numbers[0])
    return np.asarray(numbers)


def between(here, there):
    """Rotation vector (rad, [3]) that turns rotation ``here`` [3, 3] into ``there``, in the base frame."""
    cdef double[::1] a = np.ascontiguousarray(here, dtype=np.float64).ravel()
    cdef double[::1] b = np.ascontiguousarray(there, dtype=np.float64).ravel()
    cdef double[::1] vector = np.empty(3)
    if a.shape[0] != 9 or b.shape[0] != 9:
        raise ValueError("expected two matrices [3, 3]")
    rotation_between(&a[0], &b[0], &vector[0])
    return np.asarray(vector)
