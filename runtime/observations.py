"""What the supervisor sees of a rig, in one record: the streams, the children, and what they say of themselves.

The arbiter decides on nothing else. Plain values, so a test can put any rig into any trouble. All times are host time
(CLOCK_MONOTONIC) in ns; a stamp of 0 means "never".
"""

from dataclasses import dataclass

from chatvla_edge.runtime.modes import Want


@dataclass(frozen=True)
class Child:
    """A child process as the supervisor's wait() knows it."""

    alive: bool = True
    given_up: bool = False  # restarted too often; the supervisor has stopped trying
    last_words: str = ""


@dataclass(frozen=True)
class Camera:
    """One camera of the rig."""

    name: str
    required: bool
    period_ns: int
    received_ns: int  # arrival of the newest frame that differs from the one before: a frozen counter is no new frame
    process: Child = Child()


@dataclass(frozen=True)
class Policy:
    """The policy process. ``cycle_ns`` is the time between chunks that the bundle declares for this target."""

    cycle_ns: int
    # Since when a chunk is owed: the acceptance of the newest one; in sync mode the end of its actions. None while none
    # is, which an arm that is held in the middle of a sync chunk is for as long as it is held.
    owed_ns: int | None
    ready: bool
    process: Child = Child()


@dataclass(frozen=True)
class Servo:
    """The servo process: its status record and its heartbeat."""

    period_ns: int
    beat_ns: int
    want: Want  # the order it acts on, echoed: trails what it was told by a tick
    arming: int  # the arming it acts on
    standing: bool  # tau and all joints at rest
    posed: bool = False  # standing at the pose that it acts on
    starved: bool = False  # the fused trajectory has ended
    unreachable: bool = False  # no joint angles for the wanted pose: it goes to the nearest
    clipped_ticks: int = 0  # counters only grow, and restart at 0 with the process
    skipped_ticks: int = 0
    nonfinite: bool = False  # since the arming it acts on, a command was NaN or infinite
    stopped: str = ""  # why it stopped by its own decision since that arming, or why it would not begin
    process: Child = Child()


@dataclass(frozen=True)
class Device:
    """The process of one arm or gripper."""

    name: str
    period_ns: int
    state_ns: int  # newest state that the device itself sent; a vendor library's clock does not count
    beat_ns: int
    arming: int  # the arming it acts on
    lagging: bool = False  # measured position further from the command than the rig allows
    deviation: float = 0.0  # between what we sent and what the vendor's controller heads for: rad, m for a gripper
    fault: str = ""  # what is wrong with it now
    stopped: str = ""  # why it stopped by its own decision since the arming it acts on
    process: Child = Child()


@dataclass(frozen=True)
class Observations:
    """All that one decision looks at. Gathered first; the time of the decision is read afterwards."""

    cameras: tuple[Camera, ...]
    policy: Policy
    servo: Servo
    devices: tuple[Device, ...]
    recorder: Child | None = None  # None: this run keeps no record, by the operator's choice
    enable: bool | None = None  # an enabling switch, None where the rig has none
    clock_step_ns: int = 0  # change of wall time against host time since the last look
    estop_raised: bool = False
    estop_count: int = 0

    @property
    def parts(self) -> tuple[str, ...]:
        """What the rig is made of; it cannot change while the daemon runs."""
        named = [*(f"camera {c.name}" for c in self.cameras), *(f"device {d.name}" for d in self.devices)]
        return (*named, f"recorder {self.recorder is not None}", f"enable {self.enable is not None}")
