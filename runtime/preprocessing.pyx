# distutils: depends = runtime/resampling.h runtime/resampling_passes.h
"""From a camera frame to the patches of the vision tower, with the numbers of the libraries used in training.

A `Pipeline` is compiled once per camera from its ordered list of steps; tables and buffers are made then. `run` takes
a frame, releases the GIL and allocates nothing, except in a JPEG round trip, which belongs to its codec (`jpeg.py`).

    pipeline = Pipeline(manifest.cameras["top"].preprocessing, height=480, width=640)
    patches = np.empty((pipeline.n_patches, FOLDED), np.float32)
    pipeline.run(frame, patches)

Every resize is exact to the last grey level: Pillow's bicubic (across, then down: Pillow 13 turned that round for
some shapes, after the checkpoints were trained), PyTorch's antialiased bilinear on floats as its x86-64 builds compute
it with AVX2, OpenCV's bilinear. The arithmetic is in `taps.py` and `resampling.h`.
"""

cimport numpy as cnp
from libc.stdint cimport int32_t, uint8_t
from libc.stdlib cimport free, realloc
from libc.string cimport memset

import numpy as np

from chatvla_edge.runtime import jpeg, taps

cnp.import_array()

FOLDED = 3 * SIDE * SIDE
"""Values in a patch when both temporal slices are one: channel, row, column. The vision stage's weights are folded."""

UNFOLDED = 2 * FOLDED
"""Values in a patch as Qwen2-VL's processor writes it: channel, temporal slice, row, column."""

# CLIP's statistics, as Qwen2-VL's processor uses them.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def normalised_grey_levels():
    """[3, 256] float32: what each grey level of each channel becomes.

    The processor's own order: rescaled in float64, rounded once to float32, then normalised in float32.
    """
    scaled = (np.arange(256, dtype=np.float64) * (1.0 / 255.0)).astype(np.float32)
    return np.ascontiguousarray((scaled[:, None] - MEAN) / STD).T.copy()


cdef class Pipeline:
    """The steps of one camera for frames of exactly [height, width, 3] uint8 RGB.

    steps    objects with the fields of a manifest's steps: `step` and, by its value, `quality` and `swapped`, `ratio`,
             `about`, or `height`, `width` and `filter`
    kernels  "auto", or "plain" to do without the processor's wide instructions: the same numbers, slower
    patches  False for a pipeline that only makes pictures, of any size

    Raises ValueError when the steps cannot be done on such frames or do not end in a picture to be cut into patches.

    One pipeline serves one thread at a time, since the buffers are its own; a call that meets another is refused.
    """

    def __cinit__(self):
        self.operations = NULL
        self.n_operations = 0
        self.busy = False

    def __dealloc__(self):
        free(self.operations)

    def __init__(self, steps, *, int height, int width, str kernels = "auto", bint patches = True):
        if kernels not in ("auto", "plain"):
            raise ValueError(f"kernels {kernels!r}; expected 'auto' or 'plain'")
        if height < 1 or width < 1:
            raise ValueError(f"a camera of {height} x {width} pixels; expected at least 1 x 1")
        if self.buffers is not None:
            raise RuntimeError("a pipeline is compiled once; make another one for other steps")
        self.kernels = choose_kernels(kernels == "auto" and has_wide_kernels())
        self.buffers, self.packed, self.decoded = [], [], []
        self.table = normalised_grey_levels()
        self.source_height, self.source_width = height, width
        for number, step in enumerate(steps, 1):
            try:
                height, width = self.compile(step, height, width)
            except (ValueError, AttributeError) as error:
                raise ValueError(f"preprocessing step {number}: {error}") from error
        self.for_patches = patches
        if patches and (height % (SIDE * MERGE) or width % (SIDE * MERGE)):
            raise ValueError(
                f"the preprocessing leaves {height} x {width} pixels, which cannot be cut into merged patches: both "
                f"sides must be multiples of {SIDE * MERGE}; end it with a resize to such a size"
            )
        self.last_height, self.last_width = height, width

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.last_height // SIDE, self.last_width // SIDE

    @property
    def n_patches(self) -> int:
        """P: rows * columns. Four of them make one image token."""
        return (self.last_height // SIDE) * (self.last_width // SIDE)

    def run(self, frame, out) -> None:
        """Preprocess ``frame`` into ``out``.

        frame  [height, width, 3] uint8 RGB, with any strides (a view of BGR turned round will do); it is only read
        out    [n_patches, FOLDED or UNFOLDED] float32, contiguous
        """
        cdef View view
        cdef float *target
        cdef int slices
        self.check_out(out)
        target = <float *> cnp.PyArray_DATA(out)
        slices = cnp.PyArray_DIM(out, 1) // FOLDED
        self.begin(frame, &view)
        try:
            with nogil:
                self.follow(&view)
                cut(&view, &self.table[0, 0], slices, target)
        finally:
            self.busy = False

    def picture(self, frame):
        """[height, width, 3] uint8, a new array: what the patches of ``frame`` are cut from, for eyes and tests."""
        cdef View view
        found = np.empty((self.last_height, self.last_width, 3), np.uint8)
        cdef uint8_t *target = <uint8_t *> cnp.PyArray_DATA(found)
        self.begin(frame, &view)
        try:
            with nogil:
                self.follow(&view)
                pack(&view, target)
        finally:
            self.busy = False
        return found

    cdef int begin(self, frame, View *view) except -1:
        """Take the pipeline, and look at a frame that fits it. The flag is safe: it changes under the GIL only."""
        if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise ValueError(
                f"expected an RGB frame [{self.source_height}, {self.source_width}, 3] uint8, found {described(frame)}"
                + ("; of BGRA, frame[..., 2::-1] is RGB" if getattr(frame, "shape", ())[2:] == (4,) else "")
            )
        if cnp.PyArray_DIM(frame, 0) != self.source_height or cnp.PyArray_DIM(frame, 1) != self.source_width:
            raise ValueError(
                f"expected a frame of {self.source_height} x {self.source_width} pixels, for which this preprocessing "
                f"was compiled, found {frame.shape[0]} x {frame.shape[1]}; set the camera to that size"
            )
        if self.busy:
            raise RuntimeError("this pipeline is at work in another thread; give each thread its own")
        self.busy = True
        view.origin = <const uint8_t *> cnp.PyArray_DATA(frame)
        view.row = cnp.PyArray_STRIDE(frame, 0)
        view.column = cnp.PyArray_STRIDE(frame, 1)
        view.channel = cnp.PyArray_STRIDE(frame, 2)
        view.height, view.width = self.source_height, self.source_width
        return 0

    cdef int check_out(self, out) except -1:
        if not self.for_patches:
            raise ValueError("a pipeline that was made with patches=False makes pictures only; call picture()")
        if (
            not isinstance(out, np.ndarray) or out.dtype != np.float32 or out.ndim != 2
            or out.shape[0] != self.n_patches or out.shape[1] not in (FOLDED, UNFOLDED)
        ):
            raise ValueError(
                f"expected room for [{self.n_patches}, {FOLDED}] or [{self.n_patches}, {UNFOLDED}] float32 patches, "
                f"found {described(out)}"
            )
        if not out.flags.carray:
            raise ValueError("the room for patches must be contiguous, aligned and writable")
        return 0

    cdef int follow(self, View *view) except -1 nogil:
        """Do all steps. ``view`` comes as the frame and leaves as the picture to be cut."""
        cdef int index
        cdef Operation *operation
        for index in range(self.n_operations):
            operation = &self.operations[index]
            if operation.kind == CROP:
                view.origin += operation.down * view.row + operation.right * view.column
            elif operation.kind == FLIP:
                view.origin += (view.height - 1) * view.row + (view.width - 1) * view.column
                view.row, view.column = -view.row, -view.column
            elif operation.kind == JPEG:
                with gil:
                    self.round_trip(index, view)
            else:
                if operation.kind == RESIZE:
                    operation.resize(view, &operation.resizing)
                else:
                    lay_out(view, operation.down, operation.right, operation.out, operation.stride)
                view.origin, view.row, view.column, view.channel = operation.out, operation.stride, 4, 1
            view.height, view.width = operation.height, operation.width
        return 0

    cdef int round_trip(self, int index, View *view) except -1:
        """Through the codec and back; ``view`` becomes the decoded picture, which is kept until the next frame."""
        cdef Operation *operation = &self.operations[index]
        given = self.packed[index]
        if operation.swapped:
            view.origin += 2 * view.channel
            view.channel = -view.channel
        pack(view, <uint8_t *> cnp.PyArray_DATA(given))
        decoded = np.ascontiguousarray(self.codec(given, operation.quality))
        if decoded.shape != given.shape or decoded.dtype != np.uint8:
            raise RuntimeError(f"the JPEG codec was given {described(given)} and returned {described(decoded)}")
        self.decoded[index] = decoded
        view.origin = <const uint8_t *> cnp.PyArray_DATA(decoded)
        view.row, view.column, view.channel = 3 * operation.width, 3, 1
        if operation.swapped:
            view.origin += 2
            view.channel = -1
        return 0

    cdef tuple compile(self, step, int height, int width):
        """Append what ``step`` does to a picture of height x width; returns the size of what it leaves."""
        cdef Operation *operation
        if step.step == "center_crop":
            (top, bottom), (left, right) = kept(height, step.ratio), kept(width, step.ratio)
            if not 0 < step.ratio <= 1 or top >= bottom or left >= right:
                raise ValueError(
                    f"a crop to {step.ratio} of {height} x {width} pixels; expected a ratio above 0, at most 1, that "
                    "leaves a pixel"
                )
            operation = self.add(CROP, bottom - top, right - left)
            operation.down, operation.right = top, left
        elif step.step == "rotate_180":
            if step.about not in ("centre", "pixel"):
                raise ValueError(f"rotation about {step.about!r}; expected 'centre' or 'pixel'")
            operation = self.add(FLIP, height, width)
            if step.about == "pixel":
                # About pixel (h // 2, w // 2), which is half a pixel past the centre of an even side: turned about
                # the centre, the picture is moved by one along such sides. The uncovered edge stays black.
                operation = self.add(LAY_OUT, height, width)
                operation.down, operation.right = 1 - height % 2, 1 - width % 2
                self.add_picture(operation)
        elif step.step == "resize":
            operation = self.add(RESIZE, step.height, step.width)
            self.add_picture(operation)
            self.compile_resize(operation, step.filter, height, width)
        elif step.step == "jpeg":
            if not 1 <= step.quality <= 100:
                raise ValueError(f"JPEG quality {step.quality}; expected 1 to 100")
            operation = self.add(JPEG, height, width)
            operation.quality, operation.swapped = step.quality, step.swapped
            self.codec = self.codec or jpeg.load()
            self.packed[self.n_operations - 1] = np.empty((height, width, 3), np.uint8)
        else:
            raise ValueError(f"{step.step!r} is unknown; expected center_crop, jpeg, resize or rotate_180")
        return operation.height, operation.width

    cdef Operation *add(self, Kind kind, int32_t height, int32_t width) except NULL:
        """One more operation, zeroed. Pointers to earlier ones are void after this call."""
        if height < 1 or width < 1:
            raise ValueError(f"{height} x {width} pixels; expected at least 1 x 1")
        cdef size_t nbytes = (self.n_operations + 1) * sizeof(Operation)
        cdef Operation *grown = <Operation *> realloc(self.operations, nbytes)
        if grown == NULL:
            raise MemoryError
        self.operations = grown
        grown += self.n_operations
        memset(grown, 0, sizeof(Operation))
        grown.kind, grown.height, grown.width = kind, height, width
        self.n_operations += 1
        self.packed.append(None)
        self.decoded.append(None)
        return grown

    cdef int add_picture(self, Operation *operation) except -1:
        """Room for the picture that the operation leaves: RGBX, rows of whole LANES."""
        operation.stride = (4 * operation.width + LANES - 1) // LANES * LANES
        operation.out = <uint8_t *> self.room(np.zeros((operation.height, operation.stride), np.uint8))
        return 0

    cdef int compile_resize(self, Operation *operation, str name, int32_t height, int32_t width) except -1:
        if name == "bicubic":
            operation.resize, dtype = self.kernels.bicubic, np.uint8
            across, down = taps.bicubic(width, operation.width), taps.bicubic(height, operation.height)
        elif name == "bilinear_float":
            operation.resize, dtype = self.kernels.bilinear_float, np.float32
            across, down = taps.bilinear_float(width, operation.width), taps.bilinear_float(height, operation.height)
        elif name == "bilinear_cv2":
            operation.resize, dtype = self.kernels.bilinear_cv2, np.int16
            across = taps.bilinear_cv2(width, operation.width, keeps_fraction=False)
            down = taps.bilinear_cv2(height, operation.height, keeps_fraction=True)
        else:
            raise ValueError(f"filter {name!r} is unknown; expected bicubic, bilinear_float or bilinear_cv2")
        self.compile_axis(&operation.resizing.across, across)
        self.compile_axis(&operation.resizing.down, down)
        operation.resizing.block = <uint8_t *> self.room(np.zeros((width, LANES), np.uint8))
        # Rows are worked on four at a time; the padding is zeroed once, so that no NaN lingers in it.
        operation.resizing.middle = self.room(np.zeros(((height + 3) // 4 * 4, operation.stride), dtype))
        operation.resizing.out, operation.resizing.stride = operation.out, operation.stride
        return 0

    cdef int compile_axis(self, Taps *axis, found) except -1:
        first, count, weight = found
        axis.size, axis.span = weight.shape
        axis.first = <const int32_t *> self.room(first.astype(np.int32))
        axis.count = <const int32_t *> self.room(count.astype(np.int32))
        if weight.dtype == np.float32:
            axis.real = <const float *> self.room(np.ascontiguousarray(weight))
        else:
            axis.whole = <const int32_t *> self.room(np.ascontiguousarray(weight))
        return 0

    cdef void *room(self, array) except NULL:
        """The memory of an array that lives as long as the pipeline."""
        self.buffers.append(array)
        return cnp.PyArray_DATA(array)


def kept(size: int, ratio: float) -> tuple[int, int]:
    """First row or column that a centre crop keeps, and the first that it does not: the scripts' own roundings."""
    return int(size * (1 - ratio) / 2), int(size * (1 + ratio) / 2)


def described(thing) -> str:
    """What was found instead of an array."""
    return f"{thing.dtype} {list(thing.shape)}" if isinstance(thing, np.ndarray) else type(thing).__name__
