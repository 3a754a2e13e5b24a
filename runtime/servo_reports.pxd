"""What the servo says of itself: status every tick, telemetry every tick, the committed prefix now and then."""

from libc.stdint cimport int64_t, uint64_t

from chatvla_edge.runtime.fusion cimport Fusion
from chatvla_edge.runtime.histogram cimport Counts
from chatvla_edge.runtime.mailbox cimport PrefixBox, PrefixSlot
from chatvla_edge.runtime.servo_records cimport StatusRecord, TelemetryHeader
from chatvla_edge.runtime.slots cimport Cells, Ring, Slot

# Where a tick's time goes, in the order in which it is spent; names in STEP_NAMES.
cdef enum Step:
    STEP_GATE
    STEP_CHUNK
    STEP_TAU
    STEP_FUSE
    STEP_KINEMATICS
    STEP_TRACK
    STEP_LIMIT
    STEP_COMMAND
    STEP_STATE
    STEP_REPORT
    STEP_COUNT

cdef class ServoReports:
    cdef Slot status_slot
    cdef Ring telemetry_ring
    cdef PrefixSlot prefix_slot
    cdef Cells status_cells
    cdef Cells telemetry_cells
    cdef PrefixBox prefix_box
    cdef bint has_telemetry
    cdef bint has_prefix
    cdef uint64_t prefix_ticks
    cdef int first_step       # of the manifest
    cdef double action_dt
    cdef double *memory
    cdef double *prefix
    cdef double *mask

    # The telemetry row: the servo writes its header, the arms their part behind `raw` and `fused`.
    cdef TelemetryHeader *row
    cdef double *raw
    cdef double *fused
    cdef double *tracked
    cdef Counts lateness
    cdef Counts cost
    cdef Counts steps[STEP_COUNT]

    # Counts the time since `since_ns` for `step`; returns now.
    cdef int64_t account(self, int step, int64_t since_ns) noexcept nogil
    cdef void publish_status(self, StatusRecord *status, int64_t now_ns) noexcept nogil
    cdef void publish_telemetry(self, const StatusRecord *status, int clipped, int64_t now_ns) noexcept nogil
    cdef void publish_prefix(
        self, Fusion fusion, const StatusRecord *status, double delay, int64_t now_ns
    ) noexcept nogil
