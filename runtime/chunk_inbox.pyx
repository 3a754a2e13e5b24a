"""The servo's end of the chunk mailbox. The newest accepted chunk is kept beside the fusion, which has its own copy:

- an approach needs its first target before tau runs,
- and after the approach the fused trajectory begins anew with it;
- telemetry shows it as `raw`, before anything was done to it.
"""

from libc.stdint cimport int64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from chatvla_edge.runtime.chunks cimport ACCEPTED, ChunkHeader
from chatvla_edge.runtime.fusion cimport Fusion
from chatvla_edge.runtime.histogram cimport c_record
from chatvla_edge.runtime.mailbox cimport c_take_chunk
from chatvla_edge.runtime.slots cimport CELL_NEW

# Chunks carry a tau that was read from this servo; a microsecond covers rounding on the way.
cdef double TAU_NOISE = 1e-6
# A delay longer than this (s) is no delay to compensate but a policy that hangs.
cdef double LONGEST_DELAY = 10.0


cdef class ChunkInbox:
    """``mailbox``: attached for reading; ``sync``: chunks are executed from their first action on, whenever that is."""

    def __cinit__(self, ChunkMailbox mailbox not None, bint sync):
        cdef size_t size = mailbox.box.horizon * mailbox.box.action_dim
        self.mailbox = mailbox
        self.box = mailbox.box
        self.sync = sync
        self.memory = <double *>calloc(2 * size, sizeof(double))
        if self.memory is NULL:
            raise MemoryError
        self.rows = self.memory
        self.arriving = self.memory + size
        memset(&self.age, 0, sizeof(self.age))

    def __dealloc__(self):
        free(self.memory)

    cdef int take(self, Fusion fusion, int64_t now_ns) noexcept nogil:
        """Push the newest chunk into the fused trajectory, if there is a new one. A Verdict, or NOTHING_TAKEN."""
        cdef ChunkHeader header
        cdef int verdict = NOTHING_TAKEN
        cdef double *rows
        if c_take_chunk(&self.box, &self.seen, &header, self.arriving, &self.stamp) == CELL_NEW:
            verdict = fusion.c_push(&header, self.arriving)
            if verdict == ACCEPTED:
                rows = self.rows
                self.rows = self.arriving
                self.arriving = rows
                self.header = header
                self.observed_ns = self.stamp.captured_ns
                self.has_chunk = True
                self.delay = max(0.9 * self.delay, min(1e-9 * (now_ns - self.observed_ns), LONGEST_DELAY))
        if self.has_chunk:
            c_record(&self.age, now_ns - self.observed_ns)
        return verdict

    cdef const double *due(self, double tau, bint next) noexcept nogil:
        cdef double step
        cdef int row, last = self.header.rows - 1
        if self.sync and next:
            return self.rows
        step = (tau - self.header.tau_observation) / self.header.dt - self.header.first_step
        step = min(max(step, 0.0), <double>last)
        row = <int>step
        if next and row < last and step - row > TAU_NOISE:
            row += 1
        return self.rows + row * <int>self.box.action_dim

    cdef bint ahead(self, Fusion fusion, double tau) noexcept nogil:
        if self.sync:
            return fusion.c_sequence() != self.header.sequence
        return tau + TAU_NOISE < (
            self.header.tau_observation + (self.header.first_step + self.header.rows - 1) * self.header.dt
        )
