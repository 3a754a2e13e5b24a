"""What the servo says of itself, without the GIL: status, telemetry, the committed prefix, and where its time goes."""

from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from chatvla_edge.runtime.fusion cimport Fusion
from chatvla_edge.runtime.histogram cimport Counts, Histogram, c_percentile, c_record
from chatvla_edge.runtime.mailbox cimport PrefixHeader, c_publish_prefix
from chatvla_edge.runtime.realtime cimport c_now_ns
from chatvla_edge.runtime.servo_records cimport StatusRecord, TelemetryHeader
from chatvla_edge.runtime.slots cimport c_publish

from chatvla_edge.runtime.servo_records import STATUS, telemetry

STEP_NAMES = ("gate", "chunk", "tau", "fuse", "kinematics", "track", "limit", "command", "state", "report")
assert len(STEP_NAMES) == STEP_COUNT

# Percentiles in the status are taken anew this often, one at a time; one takes about a microsecond.
cdef uint64_t REFRESH = 64


cdef class ServoReports:
    """Attached to its segments for writing. ``plan``: a `ServoPlan`; ``wires``: a `ServoWires`."""

    def __cinit__(self, plan, wires):
        cdef size_t H = plan.horizon
        cdef size_t A = len(plan.components)
        cdef size_t J = plan.axes
        self.status_slot = Slot.attach(wires.status, STATUS.itemsize, write=True)
        self.status_cells = self.status_slot.cells
        if wires.telemetry is not None:
            row_bytes = telemetry(A, J).itemsize
            self.telemetry_ring = Ring.attach(wires.telemetry, row_bytes, wires.telemetry_rows, write=True)
            self.telemetry_cells = self.telemetry_ring.cells
            self.has_telemetry = True
        if wires.prefix is not None:
            self.prefix_slot = PrefixSlot.attach(wires.prefix, H, A, write=True)
            self.prefix_box = self.prefix_slot.box
            self.has_prefix = True
        # A policy reads it when a query begins, so it need not be newer than some 10 ms of its 100 or more.
        self.prefix_ticks = max(1, round(0.01 * plan.rate))
        self.first_step = plan.first_step
        self.action_dt = plan.action_dt
        # One block: prefix and mask, then the telemetry row.
        self.memory = <double *>calloc(H * A + H + sizeof(TelemetryHeader) // 8 + 2 * A + 4 * J, sizeof(double))
        if self.memory is NULL:
            raise MemoryError
        self.prefix = self.memory
        self.mask = self.prefix + H * A
        self.row = <TelemetryHeader *>(self.mask + H)
        self.raw = <double *>(self.row + 1)
        self.fused = self.raw + A
        self.tracked = self.fused + A
        self.clear()

    def __dealloc__(self):
        free(self.memory)

    cdef int64_t account(self, int step, int64_t since_ns) noexcept nogil:
        cdef int64_t now = c_now_ns()
        c_record(&self.steps[step], now - since_ns)
        return now

    cdef void publish_status(self, StatusRecord *status, int64_t now_ns) noexcept nogil:
        cdef uint64_t turn = status.tick // REFRESH % 4
        status.lateness_max_ns = self.lateness.largest
        status.cost_max_ns = self.cost.largest
        if status.tick % REFRESH == 0:
            if turn == 0:
                status.lateness_p50_ns = c_percentile(&self.lateness, 0.5)
            elif turn == 1:
                status.lateness_p99_ns = c_percentile(&self.lateness, 0.99)
            elif turn == 2:
                status.cost_p50_ns = c_percentile(&self.cost, 0.5)
            else:
                status.cost_p99_ns = c_percentile(&self.cost, 0.99)
        c_publish(&self.status_cells, status, now_ns, status.tick_ns)

    cdef void publish_telemetry(self, const StatusRecord *status, int clipped, int64_t now_ns) noexcept nogil:
        if not self.has_telemetry:
            return
        self.row.tick = status.tick
        self.row.tick_ns = status.tick_ns
        self.row.late_ns = now_ns - status.tick_ns
        self.row.doing = status.doing
        self.row.reasons = status.reasons
        self.row.clipped = <uint64_t>clipped
        self.row.chunk = status.chunk
        self.row.tau = status.tau
        self.row.tau_rate = status.tau_rate
        c_publish(&self.telemetry_cells, self.row, now_ns, status.tick_ns)

    cdef void publish_prefix(
        self, Fusion fusion, const StatusRecord *status, double delay, int64_t now_ns
    ) noexcept nogil:
        """For an observation made now, if it is time for one. ``delay``: host seconds from observation to use."""
        cdef PrefixHeader header
        if not self.has_prefix or status.tick % self.prefix_ticks:
            return
        fusion.c_committed_prefix(
            status.tau, self.first_step, self.action_dt, <int>self.prefix_box.horizon, delay * status.tau_rate,
            self.prefix, self.mask,
        )
        header.epoch = status.epoch
        header.tau = status.tau + self.first_step * self.action_dt
        header.dt = self.action_dt
        c_publish_prefix(&self.prefix_box, &header, self.prefix, self.mask, now_ns, now_ns)

    def clear(self):
        """Forget what was counted so far."""
        memset(&self.lateness, 0, sizeof(Counts))
        memset(&self.cost, 0, sizeof(Counts))
        memset(self.steps, 0, sizeof(self.steps))

    def histograms(self):
        """Copies: ``lateness``, ``cost``, and one for each of STEP_NAMES, in ns."""
        cdef int i
        found = {"lateness": copied(&self.lateness), "cost": copied(&self.cost)}
        for i, name in enumerate(STEP_NAMES):
            found[name] = copied(&self.steps[i])
        return found


cdef Histogram copied(const Counts *counts):
    cdef Histogram histogram = Histogram()
    memcpy(&histogram.counts, counts, sizeof(Counts))
    return histogram
