"""What a chunk is on its way from the policy to the servo, and what the servo may answer.

    from chatvla_edge.runtime.chunks cimport ChunkHeader, Verdict, ChunkCounters
"""

from libc.stdint cimport int32_t, uint64_t


cdef struct ChunkHeader:  # 40 bytes, no padding: the mailbox carries it, in words, in front of the rows
    uint64_t epoch
    uint64_t sequence  # the mailbox's number, carried into the log; not used to order chunks
    double tau_observation  # s
    double dt  # s between rows
    int32_t first_step  # actions[i] is due at tau_observation + (i + first_step) * dt
    int32_t rows


cdef enum Verdict:
    ACCEPTED = 0
    UNANCHORED = 1
    MALFORMED = 2
    OLD_EPOCH = 3
    FUTURE_EPOCH = 4
    FUTURE = 5
    OUT_OF_ORDER = 6
    STALE = 7
    EARLY = 8
    NOT_FINITE = 9
    DEGENERATE_ROTATION = 10
    VERDICTS = 11


cdef struct ChunkCounters:
    uint64_t verdict[11]  # by Verdict
    uint64_t short_chunks  # accepted with fewer rows than the horizon
    uint64_t superseded  # accepted, replaced before any tick used it
    uint64_t evicted  # left an ensemble for want of room
    uint64_t seams
    uint64_t starved_ticks  # ticks at or past the last due action


cdef int header_verdict(const ChunkHeader *header, int horizon) noexcept nogil
cdef int rows_verdict(const double *actions, int count) noexcept nogil
