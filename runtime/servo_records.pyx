"""The records of `servo_records.pxd` for Python: numpy dtypes of the same bytes, and the names of their codes.

    mode = np.zeros((), MODE)
    mode["wanted"], mode["arming"], mode["speed"] = WANTED.index("track"), 1, 1.0
    mode_slot.publish(mode)
"""

import numpy as np

from chatvla_edge.runtime.servo_records cimport (
    BECAUSE_ARM_FAULT, BECAUSE_BRAKE, BECAUSE_ESTOP, BECAUSE_LIMITS, BECAUSE_NO_LEASE, BECAUSE_STALLED,
    BECAUSE_STATE_STALE, BECAUSE_STOP, DEVICE_FAULT_COUNT, GIVEN_COUNT, MOST_ARMS, MOST_AXES, REASON_COUNT, WANT_PARK, WORDS,
    CommandRecord, ModeRecord, StateRecord, StatusRecord, TelemetryHeader,
)

ARMS_AT_MOST = MOST_ARMS
AXES_AT_MOST = MOST_AXES

WANTED = ("rest", "hold", "track", "stop", "brake", "home", "park")
SERVO_DOING = ("idle", "standing", "approaching", "tracking", "stopping", "braking")
REASONS = (
    "rest",  # wanted by the supervisor, as the next three
    "hold",
    "stop",
    "brake",
    "no_lease",  # expired, revoked or never granted
    "estop",  # the emergency stop is latched in its page
    "unarmed",  # nothing moves before an arming
    "start_refused",  # at the arming an arm's position was unknown or outside its limits
    "state_stale",  # an arm's state is older than its budget
    "arm_fault",  # a device reports a fault, or lets go
    "limits",  # a command was not finite, or an arm does not follow
    "stalled",  # the servo itself stood for so long that the arms have stopped without it
    "chunk_stale",  # the newest chunk's observation is older than its budget
    "starved",  # the last action of the newest chunk has been executed
    "approach",  # on the way to the first target
    "unreachable",  # no joint angles for the wanted pose: the arms go to the nearest that was found
    "damaged_mode",  # the mode record holds what no supervisor writes
    "home",  # wanted by the supervisor, as the next: on the way to that pose, or there
    "park",
)
GIVEN = ("lease", "estop", "quit")
DEVICE_DOING = ("idle", "following", "braking", "holding", "stopped")
DEVICE_FAULTS = ("silence", "lease", "estop", "command", "driver", "arm", "unanswered")

# Bits that end only with the next arming: after a fault nothing moves by itself.
LATCHING = (
    1 << BECAUSE_STOP | 1 << BECAUSE_BRAKE | 1 << BECAUSE_NO_LEASE | 1 << BECAUSE_ESTOP | 1 << BECAUSE_STATE_STALE
    | 1 << BECAUSE_ARM_FAULT | 1 << BECAUSE_LIMITS | 1 << BECAUSE_STALLED
)

MODE = np.dtype([("wanted", "<u8"), ("arming", "<u8"), ("epoch", "<u8"), ("speed", "<f8")])
COMMAND = np.dtype(
    [
        ("tick", "<u8"), ("moving", "<u8"), ("arming", "<u8"), ("axes", "<u8"), ("due_ns", "<i8"),
        ("q", "<f8", MOST_AXES), ("dq", "<f8", MOST_AXES), ("ddq", "<f8", MOST_AXES),
    ]
)
STATE = np.dtype(
    [
        ("doing", "<u8"), ("faults", "<u8"), ("faulty", "<u8"), ("arming", "<u8"), ("tick", "<u8"), ("axes", "<u8"),
        ("q", "<f8", MOST_AXES), ("dq", "<f8", MOST_AXES), ("effort", "<f8", MOST_AXES), ("sent", "<f8", MOST_AXES),
        ("target", "<f8", MOST_AXES), ("words", f"S{WORDS}"),
    ]
)
STATUS = np.dtype(
    [
        ("tick", "<u8"), ("tick_ns", "<i8"), ("wanted", "<u8"), ("mode", "<u8"), ("doing", "<u8"),
        ("standing", "<u8"), ("posed", "<u8"), ("reasons", "<u8"), ("latched", "<u8"),
        ("arming", "<u8"), ("epoch", "<u8"),
        ("tau", "<f8"), ("tau_rate", "<f8"), ("speed", "<f8"), ("path_left", "<f8"), ("chunk", "<u8"),
        ("chunk_age_ns", "<i8"), ("owed_ns", "<i8"), ("chunks_taken", "<u8"), ("chunks_refused", "<u8"),
        ("last_verdict", "<u8"),
        ("overruns", "<u8"), ("clipped_ticks", "<u8"), ("clipped_kinds", "<u8"), ("nonfinite_ticks", "<u8"),
        ("unreachable_ticks", "<u8"), ("lateness_p50_ns", "<i8"), ("lateness_p99_ns", "<i8"),
        ("lateness_max_ns", "<i8"), ("cost_p50_ns", "<i8"), ("cost_p99_ns", "<i8"), ("cost_max_ns", "<i8"),
        ("state_age_ns", "<i8", MOST_ARMS), ("arm_faults", "<u8", MOST_ARMS),
    ]
)
TELEMETRY_HEADER = [
    ("tick", "<u8"), ("tick_ns", "<i8"), ("late_ns", "<i8"), ("cost_ns", "<i8"), ("doing", "<u8"), ("reasons", "<u8"),
    ("clipped", "<u8"), ("chunk", "<u8"), ("tau", "<f8"), ("tau_rate", "<f8"),
    ("mode", "<u8"), *MODE.descr, ("given", "<u8"), ("looked_at", "<u8"), ("states", "<u8", MOST_ARMS),
]

assert len(WANTED) == WANT_PARK + 1
assert len(REASONS) == REASON_COUNT and len(GIVEN) == GIVEN_COUNT and len(DEVICE_FAULTS) == DEVICE_FAULT_COUNT
assert MODE.itemsize == sizeof(ModeRecord) and COMMAND.itemsize == sizeof(CommandRecord)
assert STATE.itemsize == sizeof(StateRecord) and STATUS.itemsize == sizeof(StatusRecord)
assert np.dtype(TELEMETRY_HEADER).itemsize == sizeof(TelemetryHeader)


def telemetry(action_dim: int, axes: int) -> np.dtype:
    """The row of a rig with ``action_dim`` action components and ``axes`` axes over all its arms."""
    return np.dtype(
        [
            *TELEMETRY_HEADER,
            ("raw", "<f8", (action_dim,)), ("fused", "<f8", (action_dim,)),
            *((name, "<f8", (axes,)) for name in ("tracked", "limited", "sent", "measured")),
        ]
    )


def names(bits: int, of: tuple[str, ...]) -> tuple[str, ...]:
    """The names of the bits that are set: ``names(status["reasons"], REASONS)``."""
    return tuple(name for bit, name in enumerate(of) if int(bits) >> bit & 1)
