"""The servo's loop as benchmarks and tests drive it without the GIL."""

from libc.stdint cimport int64_t, uint64_t

from chatvla_edge.runtime.chunk_inbox cimport ChunkInbox
from chatvla_edge.runtime.fusion cimport Fusion
from chatvla_edge.runtime.pages cimport EmergencyStop, Lease, LeasePage, StopPage
from chatvla_edge.runtime.servo_records cimport MOST_ARMS, ModeRecord, StatusRecord
from chatvla_edge.runtime.servo_reports cimport ServoReports
from chatvla_edge.runtime.slots cimport Cells, Slot
from chatvla_edge.runtime.tau cimport TauClock

cdef class Servo:
    cdef readonly object plan
    cdef readonly list arms
    cdef readonly Fusion fusion
    cdef readonly TauClock clock
    cdef ChunkInbox inbox
    cdef ServoReports reports
    cdef Lease lease
    cdef EmergencyStop estop
    cdef Slot mode_slot

    # The same for code without the GIL: plain data behind the objects above.
    cdef void *arm[MOST_ARMS]
    cdef int arm_count
    cdef int actions          # components of an action
    cdef Py_ssize_t axes
    cdef LeasePage lease_page
    cdef StopPage stop_page
    cdef Cells mode_cells

    cdef int64_t period_ns
    cdef double period
    cdef int64_t gap_ns
    cdef int64_t chunk_budget_ns
    cdef uint64_t rest_ticks
    cdef double approach_speed

    cdef ModeRecord mode
    cdef ModeRecord mode_scratch
    cdef uint64_t mode_seen
    cdef uint64_t quitting
    cdef StatusRecord status
    cdef int64_t last_tick_ns
    cdef bint moving          # commands flow
    cdef bint approach        # the next motion is an approach
    cdef bint approaching
    cdef bint posing          # on the way to a pose of the plan, or there
    cdef bint there           # the commands are those of that pose
    cdef bint braking
    cdef bint standing        # every axis
    cdef uint64_t stood       # ticks for which tau has stood
    cdef int64_t answered_ns  # host time of the newest chunk that the policy is credited with
    cdef double *fused        # the action wanted now, in the telemetry row
    cdef double *fused_rate

    cdef void c_tick(self, int64_t tick_ns, int64_t now_ns) noexcept nogil
    cdef void c_run(self, int64_t first_ns, uint64_t ticks) noexcept nogil

    cdef uint64_t _gate(self, int64_t tick_ns, int64_t now_ns) noexcept nogil
    cdef uint64_t _arm(self, int64_t tick_ns) noexcept nogil
    cdef uint64_t _take_chunk(self, int64_t now_ns) noexcept nogil
    cdef double _wanted_rate(self, uint64_t reasons) noexcept nogil
    cdef uint64_t _fuse(self) noexcept nogil
    cdef void _head(self, uint64_t reasons) noexcept nogil
    cdef int _limit(self, int64_t tick_ns) noexcept nogil
    cdef void _finish_approach(self) noexcept nogil
    cdef uint64_t _doing(self, double wanted_rate) noexcept nogil
    cdef void _report(
        self, int64_t tick_ns, int64_t now_ns, uint64_t reasons, double wanted_rate, int clipped
    ) noexcept nogil
