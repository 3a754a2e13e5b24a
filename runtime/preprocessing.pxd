"""A compiled preprocessing and the C loops under it; what they compute stands in `resampling.h` and `taps.py`."""

from libc.stddef cimport ptrdiff_t
from libc.stdint cimport int32_t, uint8_t


cdef extern from "resampling.h" nogil:
    enum:
        LANES
        SIDE
        MERGE

    ctypedef struct View:
        const uint8_t *origin
        ptrdiff_t row
        ptrdiff_t column
        ptrdiff_t channel
        int32_t height
        int32_t width

    ctypedef struct Taps:
        int32_t size
        int32_t span
        const int32_t *first
        const int32_t *count
        const int32_t *whole
        const float *real

    ctypedef struct Resizing:
        Taps across
        Taps down
        uint8_t *block
        void *middle
        uint8_t *out
        ptrdiff_t stride

    ctypedef struct Kernels:
        void (*bicubic)(const View *, const Resizing *) noexcept nogil
        void (*bilinear_float)(const View *, const Resizing *) noexcept nogil
        void (*bilinear_cv2)(const View *, const Resizing *) noexcept nogil

    bint has_wide_kernels()
    Kernels choose_kernels(bint wide)
    void lay_out(const View *view, int32_t down, int32_t right, uint8_t *out, ptrdiff_t stride)
    void pack(const View *view, uint8_t *out)
    void cut(const View *view, const float *table, int slices, float *out)


cdef enum Kind:
    CROP
    FLIP
    LAY_OUT
    RESIZE
    JPEG


cdef struct Operation:
    Kind kind
    # CROP: first row and column kept. LAY_OUT: rows and columns to move by.
    int32_t down
    int32_t right
    # The picture after this operation, [height, width]; RGBX with `stride` bytes a row where it has a buffer.
    int32_t height
    int32_t width
    uint8_t *out
    ptrdiff_t stride
    # RESIZE
    void (*resize)(const View *, const Resizing *) noexcept nogil
    Resizing resizing
    # JPEG
    int32_t quality
    bint swapped


cdef class Pipeline:
    cdef Operation *operations
    cdef int n_operations
    cdef Kernels kernels
    cdef float[:, ::1] table
    cdef list buffers         # numpy arrays behind the pointers above
    cdef list packed          # per operation: what the codec is given, [h, w, 3]
    cdef list decoded         # per operation: what it returned for the frame at work
    cdef object codec
    cdef int32_t source_height
    cdef int32_t source_width
    cdef int32_t last_height
    cdef int32_t last_width
    cdef bint busy
    cdef bint for_patches

    cdef int begin(self, frame, View *view) except -1
    cdef int check_out(self, out) except -1
    cdef int follow(self, View *view) except -1 nogil
    cdef int round_trip(self, int index, View *view) except -1
    cdef tuple compile(self, step, int height, int width)
    cdef Operation *add(self, Kind kind, int32_t height, int32_t width) except NULL
    cdef int add_picture(self, Operation *operation) except -1
    cdef int compile_resize(self, Operation *operation, str name, int32_t height, int32_t width) except -1
    cdef int compile_axis(self, Taps *axis, found) except -1
    cdef void *room(self, array) except NULL
