"""What a device's process decides by itself, without the GIL: whether the newest command may go to the arm."""

from libc.stdint cimport int64_t, uint64_t

from chatvla_edge.runtime.histogram cimport Counts
from chatvla_edge.runtime.pages cimport EmergencyStop, Lease, LeasePage, StopPage
from chatvla_edge.runtime.servo_records cimport MOST_AXES, CommandRecord, StateRecord
from chatvla_edge.runtime.slots cimport Cells, Ring, Slot, Stamp

# What the loop shall do with the driver in this cycle.
cdef enum Act:
    ACT_NOTHING = 0  # ask for the state, no more
    ACT_COMMAND = 1  # send `target`
    ACT_STOP = 2     # the device's stop action, once

cdef class DeviceGate:
    cdef readonly object plan
    cdef Lease lease
    cdef EmergencyStop estop
    cdef Slot command_slot
    cdef LeasePage lease_page
    cdef StopPage stop_page
    cdef Cells command_cells

    cdef Py_ssize_t axes
    cdef int64_t period_ns
    cdef double period
    cdef int64_t silence_ns
    cdef int64_t longest_stop_ns
    cdef int64_t hold_ns          # from standing to the stop action; below 0: never
    cdef double reach
    cdef double lower[MOST_AXES]
    cdef double upper[MOST_AXES]
    cdef double velocity[MOST_AXES]
    cdef double top[MOST_AXES]
    cdef double change[MOST_AXES]  # of acceleration in one period of this device

    cdef CommandRecord command     # the newest good one
    cdef CommandRecord scratch
    cdef uint64_t seen
    cdef int64_t heard_ns          # host time at which it was taken
    cdef bint started
    cdef uint64_t barred           # armings up to this one are over for this device
    cdef int64_t forbidden_ns      # host time since when no motion is allowed, 0 while it is
    cdef int64_t answered_ns       # host time of the arm's newest answer, 0 before the first
    cdef bint lost                 # it did not answer while it was commanded, and has not been found again
    cdef int64_t held_ns           # host time since when the arm stands and is held
    cdef uint64_t doing
    cdef uint64_t faults
    cdef uint64_t quitting
    cdef uint64_t clearing
    cdef StateRecord state
    cdef double target[MOST_AXES]
    cdef double speed[MOST_AXES]
    cdef double acceleration[MOST_AXES]
    cdef double stops[MOST_AXES * 14]

    cdef int c_step(self, int64_t now_ns) noexcept nogil
    cdef bint _hear(self, int64_t now_ns) noexcept nogil
    cdef bint _fits(self, const CommandRecord *command, int64_t now_ns) noexcept nogil
    cdef void _brake(self, uint64_t fault) noexcept nogil
    cdef bint _braked(self) noexcept nogil
    cdef bint _apart(self) noexcept nogil
    cdef void _stay(self, int64_t now_ns) noexcept nogil

cdef class DeviceLoop:
    cdef readonly DeviceGate gate
    cdef readonly object driver
    cdef Slot state_slot
    cdef Ring history_ring
    cdef Counts lateness
    cdef Counts cost
    cdef readonly uint64_t overruns
    cdef int64_t captured_ns
    cdef object position           # [axes] float64, handed to the driver; a view of `handed`
    cdef double[::1] handed

    cdef int _drive(self, int act) except -1
    cdef int _tell(self, str words) except -1
    cdef int _measure(self, int64_t now_ns) except -1
