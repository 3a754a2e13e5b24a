"""Latest-value slots, counted lossy rings, chunk mailbox and committed-prefix slot: how processes of a rig talk.

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

import numpy as np

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


class PostedChunk(NamedTuple):
    """A chunk as it lay in the mailbox; ``actions[i]`` is due at ``tau_observation + (i + first_step) * dt``.

    ``actions``: [n, A] float64, a copy. ``tau_observation``, ``dt``: s of trajectory time. Stamps: host time in ns,
    where ``captured_ns`` is that of the observation.
    """

    sequence: int
    published_ns: int
    captured_ns: int
    epoch: int
    tau_observation: float
    first_step: int
    dt: float
    actions: np.ndarray


class Prefix(NamedTuple):
    """What the servo is committed to: ``actions`` [H, A] float64, row 0 due at ``tau`` (s), ``dt`` s between rows.

    ``mask``: [H] float64, 1 committed ... 0 free.
    """

    sequence: int
    published_ns: int
    captured_ns: int
    epoch: int
    tau: float
    dt: float
    actions: np.ndarray
    mask: np.ndarray


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

    def last(self, target, stamps: np.ndarray | None = None) -> int:
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

    def read(self, target, stamps: np.ndarray | None = None) -> int:
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


cdef class ChunkMailbox(CellSegment):
    """Policy to servo: the newest chunk of up to ``horizon`` actions of ``action_dim`` components; newest wins."""

    @classmethod
    def create(cls, name: str, horizon: int, action_dim: int) -> ChunkMailbox:
        """A new, empty mailbox, mapped for reading."""
        fd = create_segment(
            name, "chunk mailbox", (horizon, action_dim, 3), body_bytes(chunk_bytes(horizon, action_dim), 3)
        )
        try:
            return cls.attach(fd, horizon, action_dim)
        finally:
            os.close(fd)

    @classmethod
    def attach(cls, int fd, size_t horizon, size_t action_dim, write: bool = False) -> ChunkMailbox:
        """Map the mailbox behind an inherited descriptor; see `Slot.attach`."""
        cdef ChunkMailbox mailbox = cls.__new__(cls)
        mailbox.map_cells(
            fd, "write" if write else "read", "chunk mailbox", (horizon, action_dim, 3),
            chunk_bytes(horizon, action_dim), 3,
        )
        mailbox.box = ChunkBox(cells=mailbox.cells, horizon=horizon, action_dim=action_dim)
        return mailbox

    def publish(
        self,
        const double[:, ::1] actions,
        *,
        epoch: int,
        tau_observation: float,
        first_step: int,
        dt: float,
        captured_ns: int,
    ) -> int:
        """Post a chunk: ``actions`` [n, A] float64, 1 <= n <= horizon. Returns its sequence number.

        ``captured_ns`` is the host time of the observation that it answers; the other fields as in `PostedChunk`.
        """
        cdef uint64_t number
        cdef ChunkHeader header = ChunkHeader(
            epoch=epoch, tau_observation=tau_observation, first_step=first_step, dt=dt,
            n_actions=actions.shape[0], action_dim=actions.shape[1],
        )
        self.must_write()
        if actions.shape[0] == 0 or actions.shape[1] == 0:
            raise ValueError(f"{self.name}: an empty chunk; expected 1 action or more")
        number = c_publish_chunk(&self.box, &header, &actions[0, 0], c_now_ns(), captured_ns)
        if number == 0:
            raise ValueError(
                f"{self.name}: a chunk of shape {(actions.shape[0], actions.shape[1])}; the mailbox takes up to "
                f"{(self.box.horizon, self.box.action_dim)}"
            )
        return number

    def take(self, uint64_t seen = 0) -> PostedChunk | None:
        """The newest chunk, or None when there is none or its sequence number is ``seen``. Raises SlotBusyError."""
        cdef ChunkHeader header
        cdef Stamp stamp
        actions = np.empty((self.box.horizon, self.box.action_dim))
        cdef double[:, ::1] rows = actions
        cdef int outcome = c_take_chunk(&self.box, &seen, &header, &rows[0, 0], &stamp)
        found = reading(self.name, outcome, &stamp)
        if found is None:
            return None
        return PostedChunk(
            *found, header.epoch, header.tau_observation, header.first_step, header.dt, actions[: header.n_actions]
        )


cdef class PrefixSlot(CellSegment):
    """Servo to policy: the actions that will be executed whatever the next chunk says."""

    @classmethod
    def create(cls, name: str, horizon: int, action_dim: int) -> PrefixSlot:
        """A new, empty prefix slot, mapped for reading."""
        fd = create_segment(
            name, "prefix slot", (horizon, action_dim, 3), body_bytes(prefix_bytes(horizon, action_dim), 3)
        )
        try:
            return cls.attach(fd, horizon, action_dim)
        finally:
            os.close(fd)

    @classmethod
    def attach(cls, int fd, size_t horizon, size_t action_dim, write: bool = False) -> PrefixSlot:
        """Map the prefix slot behind an inherited descriptor; see `Slot.attach`."""
        cdef PrefixSlot slot = cls.__new__(cls)
        slot.map_cells(
            fd, "write" if write else "read", "prefix slot", (horizon, action_dim, 3),
            prefix_bytes(horizon, action_dim), 3,
        )
        slot.box = PrefixBox(cells=slot.cells, horizon=horizon, action_dim=action_dim)
        return slot

    def publish(
        self, const double[:, ::1] actions, const double[::1] mask, *, epoch: int, tau: float, dt: float
    ) -> int:
        """Publish ``actions`` [H, A] and ``mask`` [H], both float64 and of the slot's full horizon."""
        cdef PrefixHeader header = PrefixHeader(epoch=epoch, tau=tau, dt=dt)
        cdef int64_t now = c_now_ns()
        self.must_write()
        found = (actions.shape[0], actions.shape[1], mask.shape[0])
        expected = (self.box.horizon, self.box.action_dim, self.box.horizon)
        if found != expected:
            raise ValueError(f"{self.name}: actions {found[:2]} with mask ({found[2]},); expected {expected[:2]}")
        return c_publish_prefix(&self.box, &header, &actions[0, 0], &mask[0], now, now)

    def read(self) -> Prefix | None:
        """The newest committed prefix, None before the first. Raises SlotBusyError."""
        cdef PrefixHeader header
        cdef Stamp stamp
        actions = np.empty((self.box.horizon, self.box.action_dim))
        mask = np.empty(self.box.horizon)
        cdef double[:, ::1] rows = actions
        cdef double[::1] weights = mask
        cdef int outcome = c_read_prefix(&self.box, &header, &rows[0, 0], &weights[0], &stamp)
        found = reading(self.name, outcome, &stamp)
        if found is None:
            return None
        return Prefix(*found, header.epoch, header.tau, header.dt, actions, mask)


def chunk_bytes(horizon: int, action_dim: int) -> int:
    """Payload of a mailbox cell. Raises ValueError for an empty shape."""
    if horizon < 1 or action_dim < 1:
        raise ValueError(f"a chunk of shape {(horizon, action_dim)}; expected at least one action of one component")
    return sizeof(ChunkHeader) + 8 * horizon * action_dim


def prefix_bytes(horizon: int, action_dim: int) -> int:
    """Payload of a prefix cell. Raises ValueError for an empty shape."""
    if horizon < 1 or action_dim < 1:
        raise ValueError(f"a prefix of shape {(horizon, action_dim)}; expected at least one action of one component")
    return sizeof(PrefixHeader) + 8 * horizon * (action_dim + 1)


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
