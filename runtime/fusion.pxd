"""The fused trajectory as the servo's loop uses it: no GIL, no allocation, no Python object.

    from chatvla_edge.runtime.fusion cimport Fusion, SAMPLE_STARVED
    from chatvla_edge.runtime.chunks cimport ChunkHeader

One tick:  verdict = fusion.c_push(&header, rows)          when the mailbox has a new chunk
           tau = clock.c_advance(dt_host, rate, fusion.c_path_end())
           flags = fusion.c_sample(tau, value, rate)
"""

from libc.stdint cimport uint64_t

from chatvla_edge.runtime.chunks cimport ChunkCounters, ChunkHeader
from chatvla_edge.runtime.fade cimport Fade
from chatvla_edge.runtime.history cimport History
from chatvla_edge.runtime.knots cimport ActionLayout, Knots


cdef enum Mode:
    SWITCH = 0
    BLEND = 1
    ENSEMBLE = 2
    RTC = 3
    SYNC = 4


cdef enum Schedule:
    SMOOTH = 0
    EXP = 1
    LINEAR = 2
    HARD = 3


cdef enum SampleFlags:
    SAMPLE_SEAM = 1  # the set of chunks in use changed in this tick
    SAMPLE_STARVED = 2  # at or past the last due action: no more path
    SAMPLE_HOLDING = 4  # no chunk since the last reset: the reset's position
    SAMPLE_UNANCHORED = 8  # never reset: nothing was written


cdef class Fusion:
    cdef readonly ActionLayout layout
    cdef readonly int horizon
    cdef int mode
    cdef int capacity
    cdef int sync_actions
    cdef int schedule
    cdef bint anchored
    cdef bint orphaned
    cdef bint stood
    cdef uint64_t epoch_now
    cdef double tau_now
    cdef double newest_observation
    cdef ChunkCounters counters

    cdef int slot_count
    cdef Knots *slots
    cdef bint *played
    cdef int *queue
    cdef int queued
    cdef int *active
    cdef int active_count
    cdef int *chosen
    cdef double *weights

    cdef double *memory
    cdef double *fused
    cdef double *fused_rate
    cdef double *base
    cdef double *base_rate
    cdef double *part
    cdef double *part_rate
    cdef Fade fade
    cdef Fade ahead

    cdef History history

    cdef int c_reset(self, uint64_t epoch, double tau, const double *position) noexcept nogil
    cdef int c_set_epoch(self, uint64_t epoch) noexcept nogil
    cdef int c_push(self, const ChunkHeader *header, const double *actions) noexcept nogil
    cdef double c_path_end(self) noexcept nogil
    cdef int c_sample(self, double tau, double *value, double *rate) noexcept nogil
    cdef int c_committed_prefix(self, double tau_observation, int first_step, double dt, int rows,
                                double expected_delay, double *prefix, double *mask) noexcept nogil
    cdef uint64_t c_sequence(self) noexcept nogil

    cdef int _free_slot(self) noexcept nogil
    cdef int _verdict(self, const ChunkHeader *header, const double *actions) noexcept nogil
    cdef void _make_room(self, double tau_observation) noexcept nogil
    cdef void _unqueue(self, int place) noexcept nogil
    cdef int _choose(self, double begun, double unfinished) noexcept nogil
    cdef void _base_of(self, const int *slots, int count, double tau, double *value, double *rate) noexcept nogil
    cdef bint _move(self, double tau) noexcept nogil
    cdef void _change(self, int count, double tau) noexcept nogil
    cdef double _last_due(self) noexcept nogil
