"""One arm inside the servo's tick: from action components to its command slot, and its state back. No GIL anywhere."""

from libc.stdint cimport int64_t, uint64_t

from chatvla_edge.runtime.kinematics cimport Kinematics
from chatvla_edge.runtime.limits cimport Limiter
from chatvla_edge.runtime.servo_records cimport MOST_AXES, CommandRecord, StateRecord
from chatvla_edge.runtime.slots cimport Cells, Slot, Stamp
from chatvla_edge.runtime.tracking cimport Tracker

# What `limit` and `brake` return beside the bits of limits.KINDS, which number fewer than 16.
cdef enum:
    NOT_STANDING = 1 << 16

cdef class ArmServo:
    cdef readonly object plan
    cdef readonly Limiter limiter
    cdef readonly Tracker tracker
    cdef readonly Kinematics kinematics
    cdef Slot command_slot
    cdef Slot state_slot
    cdef Cells command_cells
    cdef Cells state_cells
    cdef CommandRecord command
    cdef StateRecord state
    cdef StateRecord scratch
    cdef Stamp stamp
    cdef bint has_state
    cdef int64_t budget_ns

    cdef Py_ssize_t axes
    cdef int chain               # axes that the pose drives, 0 without a pose
    cdef int pose_at
    cdef int codec
    cdef int directs
    cdef int direct_axis[MOST_AXES]
    cdef int direct_component[MOST_AXES]
    cdef double direct_scale[MOST_AXES]
    cdef double direct_offset[MOST_AXES]
    cdef double solved[MOST_AXES]
    cdef double home[MOST_AXES]  # NaN without such a pose
    cdef double park[MOST_AXES]

    # Newest state, if there is a new one.
    cdef void read_state(self) noexcept nogil
    # Bits of Reason that this arm gives for not moving; `arming` is the one in force.
    cdef uint64_t condition(self, int64_t now_ns, uint64_t arming) noexcept nogil
    cdef int64_t age_ns(self, int64_t now_ns) noexcept nogil
    # Sequence number of the newest state, 0 before the first.
    cdef uint64_t state_number(self) noexcept nogil
    cdef uint64_t faults(self) noexcept nogil
    # At rest where the arm is; False if that is unknown or outside the limits.
    cdef bint start(self, int64_t tick_ns) noexcept nogil
    # Write this arm's components of `action`, such that `aim` would give the present command.
    cdef void locate(self, double *action) noexcept nogil
    # Axis targets from an action. False where no joint angles give the pose: then the nearest found.
    cdef bint aim(self, const double *action) noexcept nogil
    # Axis targets from the plan's pose, park or home, instead of `aim`. True once the arm is there.
    cdef bint head(self, bint parked) noexcept nogil
    cdef void slow(self, double scale) noexcept nogil
    # One step of the tracker towards the targets.
    cdef void track(self) noexcept nogil
    # Whether the tracker has met its target.
    cdef bint arrived(self) noexcept nogil
    # Tracked to limited. Bits of limits.KINDS, and NOT_STANDING.
    cdef int limit(self, int64_t tick_ns) noexcept nogil
    # Every axis brakes by itself instead.
    cdef int brake(self, int64_t tick_ns) noexcept nogil
    cdef void publish(self, uint64_t tick, bint moving, uint64_t arming, int64_t tick_ns, int64_t now_ns) noexcept nogil
    # Telemetry: four rows of `axes` numbers, `row` apart. Returns the axes.
    cdef Py_ssize_t report(self, double *tracked, double *limited, double *sent, double *measured) noexcept nogil
