"""What crosses between supervisor, servo, device processes and recorder, word by word.

Every record travels in a slot or ring of `slots.pxd`. All fields are 8 bytes wide, so there is no padding and the numpy
dtypes of `servo_records.pyx` are these structs exactly.

    mode        supervisor -> servo        slot, one per rig        what is wanted
    command     servo -> device            slot, one per arm        where the arm shall be
    state       device -> servo, others    slot and ring, per arm   where it is, and how the device is
    status      servo -> supervisor        slot, one per rig        how the servo is
    telemetry   servo -> recorder          ring, one row per tick   raw -> fused -> tracked -> limited
"""

from libc.stdint cimport int64_t, uint64_t

cdef enum:
    MOST_ARMS = 4
    MOST_AXES = 16  # joints of an arm and its gripper, as in `limits`
    WORDS = 128  # bytes

# What the supervisor wants (modes.Want). A word that is none of these is damage and counts as WANT_STOP.
cdef enum:
    WANT_REST = 0   # ramp to rest along the path, then command nothing
    WANT_HOLD = 1   # ramp to rest along the path, commanded; goes on from there when TRACK is wanted
    WANT_TRACK = 2  # follow the chunks
    WANT_STOP = 3   # ramp to rest along the path and stay there, commanded, until the next arming
    WANT_BRAKE = 4  # the shortest stop within limits, each axis by itself; likewise until the next arming
    WANT_HOME = 5   # ramp to rest along the path, then go to the plan's pose as slowly as in an approach, and stay
    WANT_PARK = 6   # likewise

# What the servo is doing.
cdef enum:
    SERVO_IDLE = 0        # no command flows; the arms are where they are
    SERVO_STANDING = 1    # commanded, at rest
    SERVO_APPROACHING = 2  # slowly to the first target after an arming or a hold, or to a pose; tau stands
    SERVO_TRACKING = 3    # tau runs
    SERVO_STOPPING = 4    # tau ramps to 0
    SERVO_BRAKING = 5     # every joint brakes by itself, as hard as its limits allow

# Why tau does not run at the wanted speed. Bits, in the order of REASONS. Those in LATCHING stay until the next arming.
cdef enum Reason:
    BECAUSE_REST = 0
    BECAUSE_HOLD
    BECAUSE_STOP
    BECAUSE_BRAKE
    BECAUSE_NO_LEASE
    BECAUSE_ESTOP
    BECAUSE_UNARMED
    BECAUSE_START_REFUSED
    BECAUSE_STATE_STALE
    BECAUSE_ARM_FAULT
    BECAUSE_LIMITS
    BECAUSE_STALLED
    BECAUSE_CHUNK_STALE
    BECAUSE_STARVED
    BECAUSE_APPROACH
    BECAUSE_UNREACHABLE
    BECAUSE_DAMAGED_MODE
    BECAUSE_HOME
    BECAUSE_PARK
    REASON_COUNT

# What a device does with its arm.
cdef enum:
    DEVICE_IDLE = 0       # nothing is sent
    DEVICE_FOLLOWING = 1  # the servo's commands go to the arm
    DEVICE_BRAKING = 2    # the servo is silent, or may not command any more: ramps to rest by itself
    DEVICE_HOLDING = 3    # resends the last position
    DEVICE_STOPPED = 4    # the device's stop action was taken; until the next arming

# Why, bits, in the order of DEVICE_FAULTS. All stay until the next arming.
cdef enum DeviceFault:
    FAULT_SILENCE = 0  # no new command within the budget
    FAULT_LEASE        # commands still came when the lease had been gone for the longest stop
    FAULT_ESTOP        # the emergency stop was latched
    FAULT_COMMAND      # a command that is not finite, of another arm's size, or further than a step away
    FAULT_DRIVER       # the driver raised
    FAULT_ARM          # the driver reports a fault of the arm
    FAULT_UNANSWERED   # the arm has not answered for as long as a silent servo is waited for
    DEVICE_FAULT_COUNT

cdef struct ModeRecord:
    uint64_t wanted
    uint64_t arming  # counts `arm`s; motion begins, and latched reasons end, only where it grows
    uint64_t epoch   # chunks of another epoch are refused
    double speed     # the operator's override, 0 < speed <= 1

cdef struct CommandRecord:
    uint64_t tick    # the servo's tick, 1, 2, ...
    uint64_t moving  # 0: nothing may be sent to the arm
    uint64_t arming
    uint64_t axes
    int64_t due_ns   # deadline of the tick, host time
    double q[MOST_AXES]    # rad, or m for a gripper
    double dq[MOST_AXES]   # backward differences at the servo's period
    double ddq[MOST_AXES]

cdef struct StateRecord:
    uint64_t doing   # DEVICE_*
    uint64_t faults  # bits, since the arming
    uint64_t faulty  # 1: something is wrong now
    uint64_t arming  # of the last command taken
    uint64_t tick    # of the last command that went to the arm
    uint64_t axes
    double q[MOST_AXES]       # measured, rad or m
    double dq[MOST_AXES]      # NaN where the arm does not say
    double effort[MOST_AXES]  # Nm or N, NaN where the arm does not say
    double sent[MOST_AXES]    # what the arm was told last, NaN before the first
    double target[MOST_AXES]  # where the vendor's controller heads for, NaN where it does not say
    char words[WORDS]         # what is wrong, or was last since the arming: UTF-8, filled up with 0

cdef struct StatusRecord:
    uint64_t tick
    int64_t tick_ns     # deadline of the tick, host time
    uint64_t wanted     # acted upon: WANT_*
    uint64_t mode       # sequence number of the mode record acted upon
    uint64_t doing      # SERVO_*
    uint64_t standing   # 1: tau and every axis at rest
    uint64_t posed      # WANT_HOME or WANT_PARK: standing there, because that is wanted; else 0
    uint64_t reasons    # bits, now
    uint64_t latched    # bits, since the arming; those of LATCHING hold the robot
    uint64_t arming     # acted upon
    uint64_t epoch      # acted upon
    double tau          # s, at this tick
    double tau_rate
    double speed        # acted upon
    double path_left    # s of tau to the last due action
    uint64_t chunk      # mailbox number of the newest chunk in use, 0 for none
    int64_t chunk_age_ns  # since its observation, -1 for none
    int64_t owed_ns     # host time since when the policy owes a chunk, 0 before the first, -1 while none is owed
    uint64_t chunks_taken
    uint64_t chunks_refused
    uint64_t last_verdict  # of the newest chunk, by chunks.VERDICT_NAMES
    uint64_t overruns   # deadlines skipped, each one counted
    uint64_t clipped_ticks
    uint64_t clipped_kinds  # bits by limits.KINDS, since the arming
    uint64_t nonfinite_ticks
    uint64_t unreachable_ticks
    int64_t lateness_p50_ns  # wake-up after deadline, over all ticks so far; refreshed every REFRESH ticks
    int64_t lateness_p99_ns
    int64_t lateness_max_ns
    int64_t cost_p50_ns      # of a tick, likewise
    int64_t cost_p99_ns
    int64_t cost_max_ns
    int64_t state_age_ns[MOST_ARMS]  # -1 before the first state
    uint64_t arm_faults[MOST_ARMS]   # as the device says

# What a tick was given beside its chunk and the arms' states: bits of TelemetryHeader.given.
cdef enum Given:
    GIVEN_LEASE = 0  # it was valid
    GIVEN_ESTOP      # it was raised
    GIVEN_QUIT       # the servo was told to end
    GIVEN_COUNT

# A row of the telemetry ring: this header, then float64 raw [A], fused [A], tracked [J], limited [J], sent [J] and
# measured [J], where J counts the axes of all arms in order. The last two are as the device reported last: what the
# arm was really told, and where it was.
cdef struct TelemetryHeader:
    uint64_t tick
    int64_t tick_ns
    int64_t late_ns     # wake-up after the deadline
    int64_t cost_ns     # of the tick before: a tick cannot report its own end
    uint64_t doing
    uint64_t reasons
    uint64_t clipped    # bits by limits.KINDS, all arms
    uint64_t chunk      # mailbox number
    double tau
    double tau_rate
    # The inputs of the tick, so that it can be computed again (`chatvla-edge replay`): the mode record as it was read,
    # even a damaged one, whose sequence number is 0 before the first; bits of Given; the mailbox number of the newest
    # chunk looked at, taken or refused; and the sequence number of each arm's state, which the next tick acts upon.
    uint64_t mode
    ModeRecord wish
    uint64_t given
    uint64_t looked_at
    uint64_t states[MOST_ARMS]
