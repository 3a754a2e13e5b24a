"""The words of the arbiter: its modes, its reactions, what it wants of the servo, and how long it lets anybody move."""

from enum import Enum, IntEnum

MS = 1_000_000
S = 1000 * MS

LEASE_NS = 100 * MS  # granted at a time: the longest that anything moves after the arbiter's last word


class Mode(Enum):
    """The states of the arbiter."""

    DISARMED = "DISARMED"  # something stands against arming
    READY = "READY"  # nothing does; nothing moves
    ACTIVE = "ACTIVE"  # commands flow
    HOLD = "HOLD"  # armed, tau at rest, the last command is held
    SOFT_STOP = "SOFT_STOP"  # stopping along the path; ends disarmed
    FAULT = "FAULT"  # no lease; left only by the operator


ARMED = frozenset({Mode.ACTIVE, Mode.HOLD, Mode.SOFT_STOP})  # in which a lease is granted


class Reaction(IntEnum):
    """What the arbiter does about a condition; a higher one wins."""

    NOTE = 0  # say so
    REFUSE = 1  # refuse `arm`; an armed rig goes on
    HOLD = 2
    SOFT_STOP = 3
    FAULT = 4


class Clears(Enum):
    """What it takes for motion to go on after a condition."""

    BY_ITSELF = "by itself"
    BY_RESUME = "`resume`"
    BY_ARM = "`arm`"
    BY_DISARM = "`disarm` or `clear`, then `arm`"
    BY_CLEAR = "`clear`, then `arm`"


class Want(Enum):
    """What the arbiter wants of the servo. All but TRACK, HOME and PARK only ever reduce motion."""

    REST = "rest"  # goes with a revoked lease: finish the stop that is under way, then command nothing
    HOLD = "hold"  # ramp tau to 0 and hold the last command
    TRACK = "track"  # follow the trajectory; after a new arming by a slow approach first
    HOME = "home"  # ramp tau to 0, go slowly to that pose of the rig and stay there
    PARK = "park"  # likewise
    STOP = "stop"  # ramp tau to 0 along the path and stay there until the next arming
    BRAKE = "brake"  # goes with a revoked lease: the shortest stop within limits, path or not


# ACTIVE for something else than the policy: going to a pose of the rig, for which servo and devices are enough.
ERRANDS = frozenset({Want.HOME, Want.PARK})
