"""Every reason to hold, to stop, to fault or to refuse `arm`: one table, severity ascending.

A condition says what it looks at, how much of it is allowed and why that much, what the arbiter does about it, and how
it ends. `assessment` holds what was observed against the table; `arbiter` turns the answer into a mode. Nothing here
reads a clock, a page or a file, so a test can put any rig into any trouble.

All times are host time (CLOCK_MONOTONIC) in ns. A stamp of 0 means "never".
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from math import inf
from typing import NamedTuple

from chatvla_edge.runtime.modes import ARMED, LEASE_NS, MS, Clears, Mode, Reaction, S, Want
from chatvla_edge.runtime.observations import Child, Observations, Policy

# A stop along the path ramps tau to rest in 0.5 s at the gentlest setting (2 1/s), and braking a joint from 5 rad/s at
# 5 rad/s^2 takes 1 s. Twice the longer one; whoever is not standing by then is not stopping.
LONGEST_STOP_NS = 2 * S

# A condition that clears and returns within this time is one condition: the arm rests instead of stuttering.
SETTLE_NS = 300 * MS

ALWAYS = frozenset(Mode)


@dataclass(frozen=True)
class Context:
    """What the arbiter remembers and a condition may look at."""

    mode: Mode
    now_ns: int
    arming: int = 0  # of the last accepted arm
    want: Want = Want.REST  # what the servo was told last
    errand: bool = False  # ACTIVE is, or will be again, for going to a pose
    held: bool = False  # the operator said hold
    stop_asked: bool = False
    estop_asked: bool = False
    waiting_ns: int = 0  # in HOLD, by no wish of the operator
    lapsed_ns: int = 0  # since the last lease ran out, with nobody having said so
    stopping_ns: int = 0  # in SOFT_STOP
    clipped_ns: int = 0  # leaky buckets, see `arbiter`
    late_ns: int = 0


# ----------------------------------------------------------------------------------------------------------- the table


class Finding(NamedTuple):
    """One amount to hold against a budget."""

    subject: str
    amount: float
    period_ns: int = 0
    words: str = ""


class Unit(Enum):
    """What an amount is."""

    TIME = "ms"
    LENGTH = "rad"  # m for a gripper
    FACT = ""


Sense = Callable[[Observations, Context], Iterable[Finding]]


@dataclass(frozen=True)
class Condition:
    """One row. Present when an amount exceeds ``allowed`` for ``lasting_ns``, until it has not for ``settle_ns``."""

    name: str
    reaction: Reaction
    sense: Sense
    remedy: str
    why: str  # of the budget
    unit: Unit = Unit.FACT
    at_least: float = 0  # of the unit, times in ns
    periods: int = 0  # of the stream that is looked at
    lasting_ns: int = 0
    settle_ns: int = SETTLE_NS
    clears: Clears = Clears.BY_ITSELF
    judged_in: frozenset[Mode] = ALWAYS
    of_errands: bool = True  # False: about what going to a pose can do without

    @property
    def blocks_arming(self) -> bool:
        """Whether it stands against `arm`: all that is more than a note and can be while nothing is armed."""
        return self.reaction > Reaction.NOTE and not self.judged_in <= ARMED

    def allowed(self, period_ns: int) -> float:
        """The budget for a stream with this period."""
        return max(self.at_least, self.periods * period_ns)


def _age(stamp_ns: int, now_ns: int) -> float:
    """Distance of a stamp from now. One from the future is damage, and as wrong as one as old."""
    return abs(now_ns - stamp_ns) if stamp_ns else inf


def _owed(policy: Policy, context: Context) -> float:
    return 0 if policy.owed_ns is None else _age(policy.owed_ns, context.now_ns)


def _fact(true: bool, subject: str = "", words: str = "") -> Finding:
    return Finding(subject, int(true), words=words)


def _died(child: Child, subject: str = "") -> Finding:
    return _fact(not child.alive, subject, child.last_words)


def _frames(required: bool) -> Sense:
    return lambda seen, context: [
        Finding(camera.name, _age(camera.received_ns, context.now_ns), camera.period_ns)
        for camera in seen.cameras
        if camera.required is required
    ]


def _camera_died(required: bool) -> Sense:
    return lambda seen, _: [_died(c.process, c.name) for c in seen.cameras if c.required is required]


def _given_up(seen: Observations, _: Context) -> list[Finding]:
    needed = [("policy", seen.policy.process), *((c.name, c.process) for c in seen.cameras if c.required)]
    return [_fact(child.given_up, name, child.last_words) for name, child in needed]


@dataclass(frozen=True)
class Bucket:
    """A leaky one: bad ticks fill it with their time, and a share of all time is forgotten."""

    budget_ns: int
    forgiven: float


BUCKETS = {
    # Clipping without pause is a second's patience; a policy that brushes a limit now and then is none.
    "limits clip": Bucket(500 * MS, 0.5),
    # One tick in twenty may be skipped; a single stall may take as long as a lease.
    "servo late": Bucket(LEASE_NS, 0.05),
}

FRAME_WHY = "USB loses a frame or two, not five; a policy that takes 300 ms sees no difference below half of that"

TABLE: tuple[Condition, ...] = (
    Condition(
        "optional frame stale",
        Reaction.NOTE,
        _frames(required=False),
        "The policy goes on without it; check the camera's cable.",
        FRAME_WHY,
        Unit.TIME,
        at_least=150 * MS,
        periods=5,
        of_errands=False,
    ),
    Condition(
        "optional camera died",
        Reaction.NOTE,
        _camera_died(required=False),
        "It is being restarted.",
        "a process lives or does not",
        of_errands=False,
    ),
    Condition(
        "starved",
        Reaction.NOTE,
        lambda seen, _: [_fact(seen.servo.starved)],
        "The arm waits at the end of its path for the next chunk.",
        "the servo has come to rest by itself; in sync mode this is every chunk's end",
        judged_in=frozenset({Mode.ACTIVE}),
        of_errands=False,
    ),
    Condition(
        "unreachable",
        Reaction.NOTE,
        lambda seen, _: [_fact(seen.servo.unreachable)],
        "The policy wants a pose without joint angles; the arm goes to the nearest.",
        "tau stands meanwhile, and a pose that stays out of reach ends as limits clip or chunk stale",
        judged_in=frozenset({Mode.ACTIVE}),
    ),
    Condition(
        "recorder died",
        Reaction.REFUSE,
        lambda seen, _: [_died(seen.recorder)] if seen.recorder else [],
        "It is being restarted; check the disk.",
        "a lost log stops no motion, and no motion starts without one",
        of_errands=False,
    ),
    Condition(
        "not at rest",
        Reaction.REFUSE,
        lambda seen, _: [_fact(not seen.servo.standing)],
        "Wait until the arm stands.",
        "an approach begins from rest",
        judged_in=ALWAYS - ARMED,
    ),
    Condition(
        "chunk stale",
        Reaction.HOLD,
        lambda seen, context: [
            Finding("", _owed(seen.policy, context), seen.policy.cycle_ns),
        ],
        "See `status` for the policy's query times.",
        "one query may fail and the next still be in time",
        Unit.TIME,
        at_least=500 * MS,
        periods=3,
        of_errands=False,
    ),
    Condition(
        "policy not ready",
        Reaction.HOLD,
        lambda seen, _: [_fact(not seen.policy.ready)],
        "It loads, warms up or waits for an instruction.",
        "it says so itself",
        of_errands=False,
    ),
    Condition(
        "policy died",
        Reaction.HOLD,
        lambda seen, _: [_died(seen.policy.process)],
        "It is being restarted.",
        "a process lives or does not",
        of_errands=False,
    ),
    Condition(
        "frame stale",
        Reaction.HOLD,
        _frames(required=True),
        "Check the camera's cable and the rate in `status`.",
        FRAME_WHY,
        Unit.TIME,
        at_least=150 * MS,
        periods=5,
        of_errands=False,
    ),
    Condition(
        "camera died",
        Reaction.HOLD,
        _camera_died(required=True),
        "It is being restarted.",
        "a process lives or does not",
        of_errands=False,
    ),
    Condition(
        "clock stepped",
        Reaction.HOLD,
        lambda seen, _: [Finding("", abs(seen.clock_step_ns))],
        "Device stamps are being converted anew; let chrony or ntpd slew instead of step.",
        "NTP slews 0.5 ms a second; a step of 10 ms puts an image a third of a frame beside its state",
        Unit.TIME,
        at_least=10 * MS,
        settle_ns=1 * S,  # the cameras learn the new offset from a second of frames
        of_errands=False,
    ),
    Condition(
        "operator hold",
        Reaction.HOLD,
        lambda _, context: [_fact(context.held)],
        "`resume` to go on.",
        "at once",
        settle_ns=0,
        clears=Clears.BY_RESUME,
        judged_in=ARMED,
    ),
    Condition(
        "hold overlong",
        Reaction.SOFT_STOP,
        lambda _, context: [Finding("", context.waiting_ns)],
        "Remove what it held for, make sure that nobody is near, `arm`.",
        "a camera reset takes 5 s; beyond 10 s somebody may have stepped up to an arm that seems off",
        Unit.TIME,
        at_least=10 * S,
        settle_ns=0,
        clears=Clears.BY_ARM,
        judged_in=frozenset({Mode.HOLD}),
    ),
    Condition(
        "limits clip",
        Reaction.SOFT_STOP,
        lambda _, context: [Finding("", context.clipped_ns)],
        "The policy asks for what the arm may not do: check bundle and rig, look at raw and limited in the log.",
        "clipped time, half of all time forgiven: clipping without pause stops after 1 s",
        Unit.TIME,
        at_least=BUCKETS["limits clip"].budget_ns,
        clears=Clears.BY_ARM,
    ),
    Condition(
        "servo late",
        Reaction.SOFT_STOP,
        lambda _, context: [Finding("", context.late_ns)],
        "See `doctor`: real-time rights, isolated core, power mode.",
        "skipped time, 5 % of all time forgiven: above one tick in twenty the motion is not what was planned",
        Unit.TIME,
        at_least=BUCKETS["servo late"].budget_ns,
        clears=Clears.BY_ARM,
    ),
    Condition(
        "vendor deviates",
        Reaction.SOFT_STOP,
        lambda seen, _: [Finding(d.name, d.deviation) for d in seen.devices],
        "The vendor's controller heads elsewhere: its limits are tighter than the rig's, or another client is at work.",
        "2.6 rad/s for two 10 ms cycles of a vendor's interpolator, for 100 ms",
        Unit.LENGTH,
        at_least=0.05,
        lasting_ns=100 * MS,
        clears=Clears.BY_ARM,
        judged_in=ARMED,
    ),
    Condition(
        "state stale",
        Reaction.SOFT_STOP,
        lambda seen, context: [Finding(d.name, _age(d.state_ns, context.now_ns), d.period_ns) for d in seen.devices],
        "Check the arm's power and bus; it may have sunk: the next `arm` starts from where it is.",
        "a lost bus read or three are coasted over; at 2 rad/s 50 ms are 0.1 rad unseen",
        Unit.TIME,
        at_least=50 * MS,
        periods=5,
        clears=Clears.BY_ARM,
    ),
    Condition(
        "arming refused",
        Reaction.SOFT_STOP,
        lambda seen, context: [_fact(seen.servo.arming != context.arming, words=seen.servo.stopped)],
        "Bring the arm within its limits and see that its state arrives, then `arm`.",
        "an arming takes a tick; a servo that still refuses it after a lease must not begin when nobody expects it",
        lasting_ns=LEASE_NS,
        clears=Clears.BY_ARM,
        judged_in=frozenset({Mode.ACTIVE, Mode.HOLD}),
    ),
    Condition(
        "servo stopped",
        Reaction.SOFT_STOP,
        # Said of an older arming it is the reason of the stop before this one.
        lambda seen, context: [
            _fact(bool(seen.servo.stopped) and seen.servo.arming == context.arming, words=seen.servo.stopped)
        ],
        "`arm` when the reason is gone.",
        "the servo may always reduce on its own; it does not start again on its own",
        clears=Clears.BY_ARM,
        judged_in=ARMED,
    ),
    Condition(
        "lease lapsed",
        Reaction.SOFT_STOP,
        lambda _, context: [Finding("", context.lapsed_ns)],
        "The supervisor stood still: see the log for what the machine did.",
        "every process has stopped by itself; nobody may restart it unasked",
        Unit.TIME,
        settle_ns=0,
        clears=Clears.BY_ARM,
        judged_in=ARMED,
    ),
    Condition(
        "enable released",
        Reaction.SOFT_STOP,
        lambda seen, _: [_fact(seen.enable is False)],
        "Press the enabling switch, then `arm`.",
        "at once; pressing it again moves nothing",
        settle_ns=0,
        clears=Clears.BY_ARM,
    ),
    Condition(
        "parked",
        Reaction.SOFT_STOP,
        lambda seen, context: [_fact(context.want is seen.servo.want is Want.PARK and seen.servo.posed)],
        "The daemon may end now; `arm` to go on.",
        "what `park` was for: it ends disarmed where it was sent",
        settle_ns=0,
        clears=Clears.BY_ARM,
        judged_in=frozenset({Mode.ACTIVE}),
    ),
    Condition(
        "operator stop",
        Reaction.SOFT_STOP,
        lambda _, context: [_fact(context.stop_asked)],
        "`arm` to go on.",
        "at once",
        settle_ns=0,
        clears=Clears.BY_ARM,
        judged_in=ARMED,
    ),
    Condition(
        "gave up",
        Reaction.FAULT,
        _given_up,
        "Read its last words, repair, restart the daemon.",
        "the supervisor restarts a child with backoff and counts",
        clears=Clears.BY_DISARM,
        of_errands=False,
    ),
    Condition(
        "stop overran",
        Reaction.FAULT,
        lambda _, context: [Finding("", context.stopping_ns)],
        "Press the hardware stop and look at the arm.",
        "twice the longest stop of a rig within limits",
        Unit.TIME,
        at_least=LONGEST_STOP_NS,
        settle_ns=0,
        clears=Clears.BY_DISARM,
        judged_in=frozenset({Mode.SOFT_STOP}),
    ),
    Condition(
        "not following",
        Reaction.FAULT,
        lambda seen, _: [_fact(d.lagging, d.name) for d in seen.devices],
        "The arm met something, or a motor has no power. Free it, then `disarm`.",
        "the limiter brakes at the first tick; a lag of 100 ms is no flexing of a joint",
        lasting_ns=100 * MS,
        clears=Clears.BY_DISARM,
        judged_in=ARMED,  # unarmed, an arm may be moved by hand
    ),
    Condition(
        "command not finite",
        Reaction.FAULT,
        lambda seen, context: [_fact(seen.servo.nonfinite and seen.servo.arming == context.arming)],
        "A defect of this software: keep the log and report it.",
        "chunks with NaN are refused long before; here it can only be our mistake",
        clears=Clears.BY_DISARM,
        judged_in=ARMED,
    ),
    Condition(
        "device stopped",
        Reaction.FAULT,
        lambda seen, context: [
            _fact(bool(d.stopped) and d.arming == context.arming, d.name, d.stopped) for d in seen.devices
        ],
        "It left the servo's path on its own: look at the arm, then `disarm`.",
        "one arm that no longer follows stops all",
        clears=Clears.BY_DISARM,
        judged_in=ARMED,
    ),
    Condition(
        "servo lost",
        Reaction.FAULT,
        lambda seen, context: [
            Finding("", _age(seen.servo.beat_ns, context.now_ns), seen.servo.period_ns),
        ],
        "The devices stopped by themselves. Restart the daemon.",
        "nobody who is silent for a lease is trusted to hold one",
        Unit.TIME,
        at_least=LEASE_NS,
        periods=5,
        clears=Clears.BY_DISARM,
    ),
    Condition(
        "device lost",
        Reaction.FAULT,
        lambda seen, context: [Finding(d.name, _age(d.beat_ns, context.now_ns), d.period_ns) for d in seen.devices],
        "Its vendor library hangs. Support the arm, then restart the daemon.",
        "as for the servo; five passes of a serial gripper",
        Unit.TIME,
        at_least=LEASE_NS,
        periods=5,
        clears=Clears.BY_DISARM,
    ),
    Condition(
        "servo disobeys",
        Reaction.FAULT,
        lambda seen, context: [_fact(seen.servo.want is not context.want, words=f"it acts on {seen.servo.want.value}")],
        "A defect of this software: keep the log and report it. Restart the daemon.",
        "an order takes one pass of the arbiter and one tick; without effect for a lease it will have none",
        lasting_ns=LEASE_NS,
        clears=Clears.BY_DISARM,
    ),
    Condition(
        "servo died",
        Reaction.FAULT,
        lambda seen, _: [_died(seen.servo.process)],
        "The devices stopped by themselves. Restart the daemon.",
        "a process lives or does not",
        clears=Clears.BY_DISARM,
    ),
    Condition(
        "device died",
        Reaction.FAULT,
        lambda seen, _: [_died(d.process, d.name) for d in seen.devices],
        "Support the arm: it may sink. It is restarted by the operator only, since that re-enables motors.",
        "a process lives or does not",
        clears=Clears.BY_DISARM,
    ),
    Condition(
        "device fault",
        Reaction.FAULT,
        lambda seen, _: [_fact(bool(d.fault), d.name, d.fault) for d in seen.devices],
        "Repair what the device names, then `clear`.",
        "reported by the arm itself",
        clears=Clears.BY_DISARM,
    ),
    Condition(
        "e-stop",
        Reaction.FAULT,
        lambda seen, context: [_fact(seen.estop_raised or context.estop_asked)],
        "When the cause is gone: `clear`.",
        "at once; servo and devices read the latch themselves",
        settle_ns=0,
        clears=Clears.BY_CLEAR,
    ),
)
