"""What cameras deliver, as RGB: packed YUV 4:2:2 (BT.601, studio range, 20-bit fixed point, as OpenCV), and BGRA."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int32_t, uint8_t

cdef enum:
    SHIFT = 20
    HALF = 1 << 19
    CY = 1220542
    CUB = 2116026
    CUG = -409993
    CVG = -852492
    CVR = 1673527


cdef inline uint8_t clip(int32_t value) noexcept nogil:
    return <uint8_t> (0 if value < 0 else 255 if value > 255 else value)


cdef void convert(const uint8_t* source, size_t line, size_t height, size_t width, uint8_t* target) noexcept nogil:
    cdef size_t row, _pair
    cdef int32_t u, v, red, green, blue, first, second
    cdef const uint8_t* four
    for row in range(height):
        four = source + row * line
        for _pair in range(width // 2):
            u = <int32_t> four[1] - 128
            v = <int32_t> four[3] - 128
            red = HALF + CVR * v
            green = HALF + CVG * v + CUG * u
            blue = HALF + CUB * u
            first = (four[0] - 16 if four[0] > 16 else 0) * CY
            second = (four[2] - 16 if four[2] > 16 else 0) * CY
            target[0] = clip((first + red) >> SHIFT)
            target[1] = clip((first + green) >> SHIFT)
            target[2] = clip((first + blue) >> SHIFT)
            target[3] = clip((second + red) >> SHIFT)
            target[4] = clip((second + green) >> SHIFT)
            target[5] = clip((second + blue) >> SHIFT)
            four += 4
            target += 6


def yuyv_to_rgb(source, line: int, column: int, target) -> None:
    """Fill ``target`` `[H, W, 3]` uint8 (contiguous, W even) from the picture in ``source`` (bytes, Y0 U Y1 V ...).

    ``line``: bytes from one row of the source to the next. ``column``: of the source's pixels, even, where the target's
    first one is. Raises ValueError where the source is too short for that.
    """
    cdef Py_buffer from_, to
    cdef size_t height = target.shape[0], width = target.shape[1], stride = line, start = 2 * column
    if target.ndim != 3 or target.shape[2] != 3 or target.dtype != "uint8" or width % 2 or column % 2 or column < 0:
        raise ValueError(
            f"found a target of {target.shape} {target.dtype} from column {column}, expected [H, W, 3] uint8, W and "
            "column even"
        )
    PyObject_GetBuffer(source, &from_, PyBUF_SIMPLE)
    try:
        if line < start + 2 * width or from_.len < <Py_ssize_t> ((height - 1) * stride + start + 2 * width):
            raise ValueError(
                f"found {from_.len} bytes in lines of {line}, expected {height} lines of {start + 2 * width} at least"
            )
        PyObject_GetBuffer(target, &to, PyBUF_SIMPLE | PyBUF_WRITABLE)
        try:
            with nogil:
                convert(<const uint8_t*> from_.buf + start, stride, height, width, <uint8_t*> to.buf)
        finally:
            PyBuffer_Release(&to)
    finally:
        PyBuffer_Release(&from_)


def bgra_to_rgb(source, target) -> None:
    """Fill ``target`` `[H, W, 3]` uint8 (contiguous) from ``source`` `[H, W, 4]` uint8, whose lines may be padded."""
    cdef Py_buffer to
    cdef const uint8_t[:, :, :] four
    cdef uint8_t* out
    cdef const uint8_t* pixel
    cdef Py_ssize_t row, _column, height = source.shape[0], width = source.shape[1]
    if source.dtype != "uint8" or source.shape[2:] != (4,) or target.shape != (height, width, 3):
        raise ValueError(
            f"found {source.shape} {source.dtype} for {target.shape}, expected [H, W, 4] uint8 for [H, W, 3]"
        )
    if source.strides[1:] != (4, 1):
        raise ValueError(f"found strides of {source.strides}, expected whole lines of pixels")
    four = source
    PyObject_GetBuffer(target, &to, PyBUF_SIMPLE | PyBUF_WRITABLE)
    try:
        out = <uint8_t*> to.buf
        with nogil:
            for row in range(height):
                pixel = &four[row, 0, 0]
                for _column in range(width):
                    out[0] = pixel[2]
                    out[1] = pixel[1]
                    out[2] = pixel[0]
                    pixel += 4
                    out += 3
    finally:
        PyBuffer_Release(&to)
