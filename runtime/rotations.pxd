"""Rotation arithmetic without the GIL: matrices are 9 numbers row by row, quaternions x y z w, angles rad."""

# Codecs, see CODECS in rotations.pyx; the numbers are the positions in that tuple.
cdef enum:
    ROT6D_ROWS = 0
    ROT6D_FRANKA_DROID = 1
    EULER_XYZ_INTRINSIC = 2
    EULER_XYZ_EXTRINSIC = 3
    QUATERNION_XYZW = 4

# 0, or -1 where the numbers fix no rotation (then the output is not written).
cdef int decode_rotation(int codec, const double *numbers, double *matrix) noexcept nogil
# `matrix` must be a rotation. `numbers` receives what CODEC_SIZES says.
cdef void encode_rotation(int codec, const double *matrix, double *numbers) noexcept nogil

cdef int rot6d_to_matrix(const double *six, double *matrix) noexcept nogil
cdef void euler_intrinsic_to_matrix(const double *angles, double *matrix) noexcept nogil
cdef void matrix_to_euler_intrinsic(const double *matrix, double *angles) noexcept nogil
cdef void euler_extrinsic_to_matrix(const double *angles, double *matrix) noexcept nogil
cdef void matrix_to_euler_extrinsic(const double *matrix, double *angles) noexcept nogil
cdef int quaternion_to_matrix(const double *xyzw, double *matrix) noexcept nogil
cdef void matrix_to_quaternion(const double *matrix, double *xyzw) noexcept nogil
# Rotation vector (axis times angle, rad, |angle| <= pi) that turns `here` into `there`, in the common base frame.
cdef void rotation_between(const double *here, const double *there, double *vector) noexcept nogil
