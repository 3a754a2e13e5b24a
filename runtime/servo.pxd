"""The servo's loop as benchmarks and tests drive it without the GIL."""

from libc.stdint cimport int64_t, uint64_t

from chatvla_edge.runtime.chunks cimport ChunkHeader
from chatvla_edge.runtime.fusion cimport Fusion
from chatvla_edge.runtime.histogram cimport Counts
from chatvla_edge.runtime.mailbox cimport ChunkBox, ChunkHeader as PostedHeader, ChunkMailbox, PrefixBox, PrefixSlot
from chatvla_edge.runtime.pages cimport EmergencyStop, Lease, LeasePage, StopPage
from chatvla_edge.runtime.servo_records cimport MOST_ARMS, ModeRecord, StatusRecord, TelemetryHeader
from chatvla_edge.runtime.slots cimport Cells, Ring, Slot, Stamp
from chatvla_edge.runtime.tau cimport TauClock

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

cdef class Servo:
    cdef readonly object plan
    cdef readonly list arms
    cdef readonly Fusion fusion
    cdef readonly TauClock clock
    cdef ChunkMailbox mailbox
    cdef PrefixSlot prefix_slot
    cdef Lease lease
    cdef EmergencyStop estop
    cdef Slot mode_slot
    cdef Slot status_slot
    cdef Ring telemetry_ring

    # The same for code without the GIL: plain data behind the objects above.
    cdef void *arm[MOST_ARMS]
    cdef int arm_count
    cdef int actions          # components of an action
    cdef Py_ssize_t axes
    cdef ChunkBox box
    cdef PrefixBox prefix_box
    cdef LeasePage lease_page
    cdef StopPage stop_page
    cdef Cells mode_cells
    cdef Cells status_cells
    cdef Cells telemetry_cells

    cdef int64_t period_ns
    cdef double period
    cdef int64_t gap_ns
    cdef int64_t chunk_budget_ns
    cdef uint64_t rest_ticks
    cdef uint64_t prefix_ticks
    cdef double approach_speed
    cdef int first_step       # of the manifest, for the committed prefix
    cdef double action_dt
    cdef bint sync

    cdef ModeRecord mode
    cdef ModeRecord mode_scratch
    cdef uint64_t mode_seen
    cdef uint64_t quitting
    cdef StatusRecord status
    cdef int64_t last_tick_ns
    cdef bint moving          # commands flow
    cdef bint approach        # the next motion is an approach
    cdef bint approaching
    cdef bint braking
    cdef bint standing
    cdef uint64_t stood       # ticks for which tau has stood

    cdef PostedHeader posted
    cdef Stamp posted_stamp
    cdef uint64_t chunk_seen
    cdef bint has_chunk       # since the arming or the epoch
    cdef ChunkHeader header   # of the newest accepted chunk, whose actions are in `rows`
    cdef int64_t observed_ns
    cdef double delay         # s from observation to use, decaying maximum
    cdef double *memory
    cdef double *rows
    cdef double *inbox
    cdef double *fused
    cdef double *fused_rate
    cdef double *prefix
    cdef double *mask
    cdef TelemetryHeader *row

    cdef Counts lateness
    cdef Counts cost
    cdef Counts chunk_age
    cdef Counts steps[STEP_COUNT]

    cdef void c_tick(self, int64_t tick_ns, int64_t now_ns) noexcept nogil
    cdef void c_run(self, int64_t first_ns, uint64_t ticks) noexcept nogil

    cdef uint64_t _gate(self, int64_t tick_ns, int64_t now_ns) noexcept nogil
    cdef uint64_t _arm(self, int64_t tick_ns) noexcept nogil
    cdef uint64_t _take_chunk(self, int64_t now_ns) noexcept nogil
    cdef double _wanted_rate(self, uint64_t reasons) noexcept nogil
    cdef uint64_t _fuse(self) noexcept nogil
    cdef int _limit(self, int64_t tick_ns) noexcept nogil
    cdef void _finish_approach(self) noexcept nogil
    cdef uint64_t _doing(self, double wanted_rate) noexcept nogil
    cdef void _publish_prefix(self, int64_t now_ns) noexcept nogil
    cdef void _publish_status(self, int64_t tick_ns, int64_t now_ns) noexcept nogil
    cdef void _publish_telemetry(self, int64_t tick_ns, int64_t now_ns, int clipped) noexcept nogil
    cdef bint _ahead(self) noexcept nogil
    cdef int _due_row(self, double tau, bint next) noexcept nogil
    cdef int64_t _account(self, int step, int64_t since_ns) noexcept nogil
