"""The servo's end of the chunk mailbox: takes the newest chunk, hands it to the fusion, keeps its rows."""

from libc.stdint cimport int64_t, uint64_t

from chatvla_edge.runtime.chunks cimport ChunkHeader
from chatvla_edge.runtime.fusion cimport Fusion
from chatvla_edge.runtime.histogram cimport Counts
from chatvla_edge.runtime.mailbox cimport ChunkBox, ChunkMailbox
from chatvla_edge.runtime.slots cimport Stamp

# What `take` returns where there was nothing new; else a Verdict.
cdef enum:
    NOTHING_TAKEN = -1

cdef class ChunkInbox:
    cdef ChunkMailbox mailbox
    cdef ChunkBox box
    cdef bint sync
    cdef uint64_t seen
    cdef Stamp stamp
    cdef double *memory
    cdef double *arriving

    cdef bint has_chunk       # accepted, and not called off since
    cdef ChunkHeader header   # of the newest accepted chunk
    cdef double *rows         # its actions
    cdef int64_t observed_ns  # host time of its observation
    cdef double delay         # s from observation to use, decaying maximum
    cdef Counts age           # of the newest accepted chunk's observation, each tick

    cdef int take(self, Fusion fusion, int64_t now_ns) noexcept nogil
    # The action due next at tau (`next`), or due last.
    cdef const double *due(self, double tau, bint next) noexcept nogil
    # Whether there are actions left to approach.
    cdef bint ahead(self, Fusion fusion, double tau) noexcept nogil
