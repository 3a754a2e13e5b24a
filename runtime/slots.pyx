"""Latest-value slots and counted lossy rings: how the processes of a rig talk.

Each has one writer and any number of readers. Writers never wait. A reader copies one consistent value with its
sequence number and stamps, or is told that it could not; no read takes longer than a fixed number of copies.
Protocol and memory orderings: `slots.pxd`, which is also what loops without the GIL use.

    slot = Slot.create("camera top", 480 * 640 * 3)      # supervisor; children get slot.fd by pass_fds
    writer = Slot.attach(fd, 480 * 640 * 3, write=True)  # camera process
    reader = Slot.attach(fd, 480 * 640 * 3)              # policy process

A writer that is restarted continues the sequence. Stamps are host time: CLOCK_MONOTONIC in ns.
The copies below hold the GIL on purpose: a frame takes some 0.05 ms, waiting to get the GIL back up to 5 ms.
"""

import os
from typing import NamedTuple

from cpython.buffer cimport PyBUF_C_CONTIGUOUS, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int64_t, uint64_t

from chatvla_edge.runtime.realtime cimport c_now_ns
from chatvla_edge.runtime.segments cimport HEADER_WORDS

from chatvla_edge.runtime.segments import create as create_segment


class SlotBusyError(RuntimeError):
    """The writer went round all cells during every attempt to copy one: it publishes faster than a copy takes."""


class Reading(NamedTuple):
    """What a value is worth: its number (1, 2, ...), when it was published and captured (host time, ns)."""

    sequence: int
    published_ns: int
    captured_ns: int


def stride_words(record_bytes: int) -> int:
    """Words from one cell to the next: guard, stamps and payload, rounded up to whole cache lines."""
    words = CELL_WORDS + -(-record_bytes // 8)
    return -(-words // LINE_WORDS) * LINE_WORDS


def body_bytes(record_bytes: int, count: int) -> int:
    """Bytes behind the segment header: a line for `latest`, then the cells."""
    return 8 * (LINE_WORDS + count * stride_words(record_bytes))


def create_cells(name: str, kind: str, record_bytes: int, count: int) -> int:
    """A new segment of ``count`` empty cells. Returns its descriptor."""
    if record_bytes < 1:
        raise ValueError(f"{name}: a record of {record_bytes} bytes; expected at least 1")
    if count < 2:
        # With a single cell a writer killed in mid-write would take the last good value with it.
        raise ValueError(f"{name}: {count} cells; expected at least 2")
    geometry = (record_bytes, count, stride_words(record_bytes))
    return create_segment(name, kind, geometry, body_bytes(record_bytes, count))


cdef class CellSegment(Segment):
    """A segment that holds cells."""

    cdef int map_cells(self, int fd, str mode, str kind, tuple geometry, size_t record_bytes, size_t count) except -1:
        self.map_segment(fd, mode, kind, geometry, body_bytes(record_bytes, count))
        self.cells.latest = self.words + HEADER_WORDS
        self.cells.first = self.words + HEADER_WORDS + LINE_WORDS
        self.cells.stride = stride_words(record_bytes)
        self.cells.count = count
        self.cells.nbytes = record_bytes
        if self.writable:
            c_recover(&self.cells)
        return 0

    cdef int must_write(self) except -1:
        if not self.writable:
            raise PermissionError(f"{self.name} is attached for reading; its one writer attaches with write=True")
        return 0

    @property
    def sequence(self) -> int:
        """Number of the newest publication, 0 before the first."""
        return c_latest(&self.cells)


cdef class Slot(CellSegment):
    """Latest-value slot for records of ``nbytes`` bytes."""

    @classmethod
    def create(cls, name: str, nbytes: int, cells: int = 3) -> Slot:
        """A new, empty slot, mapped for reading. ``fd`` goes to writer and readers by ``pass_fds``.

        Three cells: the newest value, the one being written, and one that a slow reader may still be copying.
        """
        fd = create_cells(name, "slot", nbytes, cells)
        try:
            return cls.attach(fd, nbytes, cells=cells)
        finally:
            os.close(fd)

    @classmethod
    def attach(cls, int fd, size_t nbytes, write: bool = False, cells: int = 3) -> Slot:
        """Map the slot behind an inherited descriptor. ``write``: as its one writer, continuing the sequence.

        Raises ValueError when size or layout differ from what was created, BlockingIOError when it has a writer.
        """
        cdef Slot slot = cls.__new__(cls)
        slot.map_cells(
            fd, "write" if write else "read", "slot", (nbytes, cells, stride_words(nbytes)), nbytes, cells
        )
        return slot

    def publish(self, record, captured_ns: int | None = None) -> int:
        """Make ``record`` (a contiguous buffer of exactly ``nbytes``) the latest value. Returns its sequence number.

        ``captured_ns``: host time at which the content was true; left out, the time of this call.
        """
        self.must_write()
        return publish(&self.cells, self.name, record, captured_ns)

    def read_into(self, target) -> Reading | None:
        """Copy the latest value into ``target`` (writable, contiguous, ``nbytes`` long); None before the first one.

        One copy, from the shared memory to the target. Raises SlotBusyError, after which the target is undefined.
        """
        cdef Py_buffer view
        cdef Stamp stamp
        cdef int outcome
        PyObject_GetBuffer(target, &view, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE)
        try:
            same_size(self.name, view.len, self.cells.nbytes)
            outcome = c_read_latest(&self.cells, 0, view.buf, &stamp)
        finally:
            PyBuffer_Release(&view)
        return reading(self.name, outcome, &stamp)

    def read(self) -> tuple[bytes, Reading] | None:
        """The latest value as bytes, for small records and tools; see `read_into`."""
        cdef bytearray target = bytearray(self.cells.nbytes)
        found = self.read_into(target)
        return None if found is None else (bytes(target), found)


cdef class Ring(CellSegment):
    """Counted lossy ring of ``capacity`` records: state history, telemetry.

    The writer overwrites the oldest; each reader counts what it missed.
    """

    @classmethod
    def create(cls, name: str, record_bytes: int, capacity: int) -> Ring:
        """A new, empty ring, mapped for reading."""
        fd = create_cells(name, "ring", record_bytes, capacity)
        try:
            return cls.attach(fd, record_bytes, capacity)
        finally:
            os.close(fd)

    @classmethod
    def attach(cls, int fd, size_t record_bytes, size_t capacity, write: bool = False) -> Ring:
        """Map the ring behind an inherited descriptor; see `Slot.attach`."""
        cdef Ring ring = cls.__new__(cls)
        ring.map_cells(
            fd, "write" if write else "read", "ring", (record_bytes, capacity, stride_words(record_bytes)),
            record_bytes, capacity,
        )
        return ring

    def append(self, record, captured_ns: int | None = None) -> int:
        """Write one record (a contiguous buffer of ``record_bytes``). Returns its number, from 1."""
        self.must_write()
        return publish(&self.cells, self.name, record, captured_ns)

    def reader(self, from_oldest: bool = False) -> RingReader:
        """A cursor into this ring: behind the newest record, or at the oldest that is left."""
        return RingReader(self, from_oldest)

    def last(self, target, stamps=None) -> int:
        """The newest records, oldest first, without a gap, at the **end** of ``target``. Returns how many.

        ``target``: writable, contiguous, k whole records. ``stamps``: [k, 3] int64, filled with sequence, published_ns,
        captured_ns. Fewer than k when fewer were written, or the oldest were overwritten during the copy.
        """
        return batch(self, NULL, NULL, target, stamps)


cdef class RingReader:
    """Reads a ring batch by batch. ``cursor``: number of the last record passed; ``dropped``: how many were lost."""

    def __init__(self, Ring ring, from_oldest: bool = False):
        cdef uint64_t newest = c_latest(&ring.cells)
        self.ring = ring
        self.cursor = newest
        if from_oldest:
            self.cursor = newest - min(newest, ring.cells.count)

    def read(self, target, stamps=None) -> int:
        """Copy the records after the cursor to the start of ``target``, oldest first. Returns how many.

        A batch has no gap inside: what was lost before its first record has been added to ``dropped``.
        ``target`` and ``stamps`` as in `Ring.last`.
        """
        return batch(self.ring, &self.cursor, &self.dropped, target, stamps)


cdef size_t batch(Ring ring, uint64_t *cursor, uint64_t *dropped, target, stamps) except? 0:
    """`c_ring_read` with a cursor, `c_ring_last` without, into Python buffers."""
    cdef Py_buffer view
    cdef int64_t[:, ::1] rows_of_stamps = stamps
    cdef Stamp *stamp = NULL
    cdef size_t rows
    PyObject_GetBuffer(target, &view, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE)
    try:
        rows = <size_t>view.len // ring.cells.nbytes
        if rows * ring.cells.nbytes != <size_t>view.len:
            raise ValueError(
                f"{ring.name}: a target of {view.len} bytes; expected whole records of {ring.cells.nbytes} bytes"
            )
        if rows_of_stamps is not None:
            if <size_t>rows_of_stamps.shape[0] != rows or rows_of_stamps.shape[1] != 3:
                raise ValueError(
                    f"{ring.name}: stamps of shape {tuple(stamps.shape)}; expected {(rows, 3)} for this target"
                )
            if rows:
                stamp = <Stamp *>&rows_of_stamps[0, 0]
        if cursor is NULL:
            return c_ring_last(&ring.cells, view.buf, stamp, rows)
        return c_ring_read(&ring.cells, cursor, dropped, view.buf, stamp, rows)
    finally:
        PyBuffer_Release(&view)


cdef int same_size(str name, Py_ssize_t found, size_t expected) except -1:
    if <size_t>found != expected:
        raise ValueError(f"{name}: a buffer of {found} bytes; expected {expected}")
    return 0


cdef uint64_t publish(const Cells *cells, str name, record, captured_ns) except 0:
    cdef Py_buffer view
    cdef int64_t now, captured
    PyObject_GetBuffer(record, &view, PyBUF_C_CONTIGUOUS)
    try:
        same_size(name, view.len, cells.nbytes)
        now = c_now_ns()
        captured = now if captured_ns is None else captured_ns
        return c_publish(cells, view.buf, now, captured)
    finally:
        PyBuffer_Release(&view)


cdef object reading(str name, int outcome, const Stamp *stamp):
    if outcome == CELL_BUSY:
        raise SlotBusyError(
            f"{name}: no consistent value in {READ_ATTEMPTS} copies; its writer publishes faster than one copy takes"
        )
    if outcome != CELL_NEW:
        return None
    return Reading(stamp.sequence, stamp.published_ns, stamp.captured_ns)
