"""Decides whether commands may flow, and lets them flow for 100 ms at a time.

`step` is the whole decision, a pure function: what the arbiter remembers, what was observed and what operators ask go
in, and what to remember, what to tell the servo and how long the lease runs come out. `Arbiter` is the thin part that
touches the pages. The reasons are rows of `conditions`; this file knows what a hold, a soft stop and a fault do, and
not what causes them.

    DISARMED <-> READY -> ACTIVE <-> HOLD
                            |         |
                            +-> SOFT_STOP -> DISARMED
                            FAULT -> DISARMED        (FAULT from ACTIVE, HOLD and SOFT_STOP)

An unarmed rig has no FAULT: what would be one stands against arming and keeps it DISARMED for as long as it lasts.

ACTIVE is for the policy's trajectory, or for an *errand*: `home` and `park` send the arms to a pose of the rig. That
needs neither policy nor cameras, so it may begin where `arm` would be refused for want of them. At home the arms stand
until `resume`; parked, they are disarmed.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from enum import Enum

from chatvla_edge.runtime.assessment import Reason, Watch, assess
from chatvla_edge.runtime.conditions import BUCKETS, Context
from chatvla_edge.runtime.modes import ARMED, LEASE_NS, Mode, Reaction, Want
from chatvla_edge.runtime.observations import Observations
from chatvla_edge.runtime.pages import EmergencyStop, Lease
from chatvla_edge.runtime.realtime import now_ns

EDGES = frozenset(
    {
        (Mode.DISARMED, Mode.READY),  # nothing stands against arming any more
        (Mode.READY, Mode.DISARMED),
        (Mode.READY, Mode.ACTIVE),  # `arm`, `home`, `park`: the only way to motion
        (Mode.ACTIVE, Mode.HOLD),
        (Mode.HOLD, Mode.ACTIVE),  # all reasons to hold have cleared
        (Mode.ACTIVE, Mode.SOFT_STOP),
        (Mode.HOLD, Mode.SOFT_STOP),
        (Mode.SOFT_STOP, Mode.DISARMED),  # the servo stands
        (Mode.ACTIVE, Mode.FAULT),
        (Mode.HOLD, Mode.FAULT),
        (Mode.SOFT_STOP, Mode.FAULT),
        (Mode.FAULT, Mode.DISARMED),  # `disarm` or `clear`
    }
)

WANT = {
    Mode.DISARMED: Want.REST,
    Mode.READY: Want.REST,
    Mode.ACTIVE: Want.TRACK,
    Mode.HOLD: Want.HOLD,
    Mode.SOFT_STOP: Want.STOP,
    Mode.FAULT: Want.BRAKE,
}


class Act(Enum):
    """What an operator can ask for."""

    ARM = "arm"
    HOME = "home"
    PARK = "park"
    DISARM = "disarm"
    STOP = "stop"
    HOLD = "hold"
    RESUME = "resume"
    SPEED = "speed"
    ESTOP = "estop"
    CLEAR = "clear"


ARMING = frozenset({Act.ARM, Act.HOME, Act.PARK})  # what motion begins with
REDUCING = frozenset({Act.DISARM, Act.STOP, Act.HOLD, Act.ESTOP})  # never refused, and first whatever the order


@dataclass(frozen=True)
class Request:
    """``speed``: factor on the rate of tau, 0 < speed <= 1. ``seen``: the e-stop count that the one who clears saw."""

    act: Act
    speed: float = 1.0
    seen: int | None = None


@dataclass(frozen=True)
class Reply:
    """A refusal carries every reason that stands against the request, most severe first."""

    request: Request
    accepted: bool
    text: str
    reasons: tuple[Reason, ...] = ()

    def sentences(self) -> list[str]:
        """For the operator, one per line."""
        return [self.text, *(reason.sentence() for reason in self.reasons)]


@dataclass(frozen=True)
class Event:
    """A line of the log. ``kind``: mode, reason, cleared or request."""

    at_ns: int
    kind: str
    name: str
    text: str


@dataclass(frozen=True)
class State:
    """What the arbiter remembers from step to step."""

    mode: Mode = Mode.DISARMED
    now_ns: int = 0
    entered_ns: int = 0  # when the mode began
    lease_until_ns: int = 0
    arming: int = 0  # counts accepted arms; a servo that sees a new one starts with a slow approach
    speed: float = 1.0
    errand: Want | None = None  # what ACTIVE is for, None: the policy's trajectory
    held: bool = False  # by the operator, until `resume`
    stop_asked: bool = False
    waiting_since_ns: int = 0  # in HOLD by no wish of the operator, 0 when not
    clipped_ns: int = 0  # leaky buckets: filled by the servo's counters, drained by time
    late_ns: int = 0
    clipped_ticks: int = 0  # the counters at the last look
    skipped_ticks: int = 0
    watch: Watch = field(default_factory=dict)
    causes: tuple[Reason, ...] = ()  # what led to the last soft stop or fault, kept until the next arm
    parts: tuple[str, ...] = ()

    @property
    def want(self) -> Want:
        """What the servo is told in this state."""
        return self.errand if self.mode is Mode.ACTIVE and self.errand is not None else WANT[self.mode]


@dataclass(frozen=True)
class Order:
    """What the servo is told."""

    want: Want
    arming: int
    speed: float


@dataclass(frozen=True)
class Decision:
    """The outcome of one step."""

    state: State
    reasons: tuple[Reason, ...]  # all that is present, most severe first
    moves: tuple[tuple[Mode, Mode], ...]  # edges taken, in order
    replies: tuple[Reply, ...]
    events: tuple[Event, ...]
    clear_estop: int | None = None  # up to this raise

    @property
    def order(self) -> Order:
        """What to tell the servo."""
        return Order(self.state.want, self.state.arming, self.state.speed)

    @property
    def blocking(self) -> tuple[Reason, ...]:
        """What stands against `arm`."""
        return tuple(reason for reason in self.reasons if reason.condition.blocks_arming)


def step(state: State, seen: Observations, requests: Iterable[Request], now_ns: int) -> Decision:
    """One decision at host time ``now_ns``, which is read after ``seen`` was gathered.

    Raises ValueError when time goes back or the rig changes its parts: the caller's mistakes, on which no decision can
    be built. Whoever catches it grants nothing.
    """
    requests = tuple(requests)
    asked = frozenset(request.act for request in requests)
    if now_ns < state.now_ns:
        raise ValueError(f"host time {now_ns} ns is before the last step at {state.now_ns} ns")
    if len(set(seen.parts)) < len(seen.parts) or state.parts not in ((), seen.parts):
        raise ValueError(f"the rig is made of {list(seen.parts)}; expected {list(state.parts) or 'distinct names'}")
    was, before = state.mode, state
    state = _counted(state, seen, now_ns)
    state = replace(
        state,
        now_ns=now_ns,
        parts=seen.parts,
        held=state.held or (was in ARMED and Act.HOLD in asked),
        stop_asked=state.stop_asked or (was in ARMED and bool(asked & {Act.STOP, Act.DISARM})),
    )
    context = Context(
        mode=was,
        now_ns=now_ns,
        arming=state.arming,
        want=state.want,
        errand=state.errand is not None,
        held=state.held,
        stop_asked=state.stop_asked,
        estop_asked=Act.ESTOP in asked,
        waiting_ns=0 if state.held else now_ns - state.waiting_since_ns,
        lapsed_ns=max(0, now_ns - state.lease_until_ns + 1),  # at its expiry a lease has expired
        stopping_ns=now_ns - state.entered_ns,
        clipped_ns=state.clipped_ns,
        late_ns=state.late_ns,
    )
    watch, reasons = assess(seen, context, state.watch)
    # With the echo beside it, "standing" will stay so: the servo stands because it was told to, not by chance.
    stands = seen.servo.standing and seen.servo.want is Want.STOP
    state = _entered(replace(state, watch=watch), _next(was, reasons, stands), reasons)
    moves = [(was, state.mode)] if state.mode is not was else []
    replies = []
    clear_estop = None
    for request in sorted(requests, key=lambda request: request.act in ARMING):  # all else is done before
        middle = state.mode
        state, reply = _answer(state, request, asked, was, seen, reasons)
        replies.append(reply)
        if middle is Mode.DISARMED and state.mode is Mode.ACTIVE:  # ready for an errand, though not for more
            moves.append((middle, middle := Mode.READY))
        if state.mode is not middle:
            moves.append((middle, state.mode))
        if request.act is Act.CLEAR and reply.accepted and seen.estop_raised:
            clear_estop = seen.estop_count
    state = replace(
        state,
        lease_until_ns=now_ns + LEASE_NS if state.mode in ARMED else 0,
        waiting_since_ns=(state.waiting_since_ns or now_ns) if state.mode is Mode.HOLD and not state.held else 0,
    )
    events = _events(before, state, reasons, moves, replies)
    return Decision(state, reasons, tuple(moves), tuple(replies), events, clear_estop)


def _counted(state: State, seen: Observations, now_ns: int) -> State:
    """``state`` with the leaky buckets at ``now_ns``."""
    servo = seen.servo
    elapsed = now_ns - state.now_ns

    def new(counter: int, before: int) -> int:
        return counter - before if counter >= before else counter  # the servo was restarted and counts from 0

    def level(name: str, before: int, ticks: int) -> int:
        bucket = BUCKETS[name]
        filled = before + ticks * servo.period_ns - int(elapsed * bucket.forgiven)
        # Twice the budget is full: however long the trouble lasted, it is forgotten in a time that one can wait for.
        return min(max(filled, 0), 2 * bucket.budget_ns)

    return replace(
        state,
        clipped_ns=level("limits clip", state.clipped_ns, new(servo.clipped_ticks, state.clipped_ticks)),
        late_ns=level("servo late", state.late_ns, new(servo.skipped_ticks, state.skipped_ticks)),
        clipped_ticks=servo.clipped_ticks,
        skipped_ticks=servo.skipped_ticks,
    )


def _next(mode: Mode, reasons: tuple[Reason, ...], stands: bool) -> Mode:
    """The mode that the reasons ask for; ``reasons`` come most severe first."""
    if mode is Mode.FAULT:
        return mode
    if mode not in ARMED:
        return Mode.DISARMED if any(reason.condition.blocks_arming for reason in reasons) else Mode.READY
    worst = reasons[0].condition.reaction if reasons else Reaction.NOTE
    if worst is Reaction.FAULT:
        return Mode.FAULT
    if mode is Mode.SOFT_STOP:
        return Mode.DISARMED if stands else mode
    return {Reaction.SOFT_STOP: Mode.SOFT_STOP, Reaction.HOLD: Mode.HOLD}.get(worst, Mode.ACTIVE)


def _entered(state: State, mode: Mode, reasons: tuple[Reason, ...]) -> State:
    """``state`` in ``mode``, with what changes at its border."""
    if mode is state.mode:
        return state
    state = replace(state, mode=mode, entered_ns=state.now_ns)
    if mode in (Mode.SOFT_STOP, Mode.FAULT):
        known = {reason.key for reason in state.causes}
        causes = (r for r in reasons if r.condition.reaction >= Reaction.HOLD and r.key not in known)
        return replace(state, causes=(*state.causes, *causes))
    if mode is Mode.DISARMED:
        return replace(state, held=False, stop_asked=False, errand=None)
    return state


def _answer(
    state: State, request: Request, asked: frozenset[Act], was: Mode, seen: Observations, reasons: tuple[Reason, ...]
) -> tuple[State, Reply]:
    """What becomes of ``request``. Those that reduce motion have had their effect as conditions already."""
    act = request.act
    blocking = tuple(reason for reason in reasons if reason.condition.blocks_arming)

    def accept(after: State, text: str, why: tuple[Reason, ...] = ()) -> tuple[State, Reply]:
        return after, Reply(request, True, text, why)

    def refuse(text: str, why: tuple[Reason, ...] = ()) -> tuple[State, Reply]:
        return state, Reply(request, False, text, why)

    if act is Act.DISARM and was is Mode.FAULT:
        return accept(_entered(state, Mode.DISARMED, reasons), "disarmed", blocking)
    if act in REDUCING:
        return accept(state, f"now {state.mode.value}" if was in ARMED else f"{state.mode.value}: nothing moved")
    if act is Act.SPEED:
        if not 0 < request.speed <= 1:
            return refuse(f"speed {request.speed:g}; expected more than 0 (to stand: `hold`) and at most 1")
        return accept(replace(state, speed=request.speed), f"speed {request.speed:g}")
    if stops := sorted(act.value for act in asked & REDUCING):
        return refuse(f"`{'`, `'.join(stops)}` came with it and counts more")
    if act is Act.CLEAR:
        if seen.estop_raised and request.seen != seen.estop_count:
            return refuse(f"the e-stop was raised {seen.estop_count} times and you saw {request.seen}: look again")
        if state.mode is Mode.FAULT and was is not Mode.FAULT:
            return refuse("the fault came this moment: look at it first", reasons)
        if state.mode is not Mode.FAULT and not seen.estop_raised:
            return refuse("nothing is latched")
        return accept(_entered(state, Mode.DISARMED, reasons), "cleared", blocking)
    if act is Act.RESUME and state.mode is Mode.ACTIVE and state.errand is not None:
        return accept(replace(state, errand=None), "back to the policy; it begins with a slow approach")
    if act is Act.RESUME:
        others = tuple(reason for reason in reasons if reason.condition.name != "operator hold")
        if state.mode is not Mode.HOLD:
            return refuse(f"{state.mode.value}: nothing is held")
        if not state.held:
            return refuse("it resumes by itself when these have cleared", others)
        return accept(replace(state, held=False), "resuming" if not others else "resuming when these clear", others)
    assert act in ARMING
    errand = None if act is Act.ARM else Want(act.value)
    if errand is not None:
        if state.mode in (Mode.ACTIVE, Mode.HOLD):
            return accept(replace(state, errand=errand, held=False), f"slowly to {act.value}")
        blocking = tuple(reason for reason in blocking if reason.condition.of_errands)
    idle = {was, state.mode} <= {Mode.DISARMED, Mode.READY}
    if state.mode is Mode.READY or (errand is not None and idle and not blocking):
        armed = replace(_entered(state, Mode.ACTIVE, reasons), arming=state.arming + 1, causes=(), errand=errand)
        return accept(armed, f"armed, arming {armed.arming}; it begins with a slow approach")
    if state.mode in ARMED:
        return refuse(f"{state.mode.value}: armed already")
    if state.mode is Mode.FAULT:
        present = {reason.key for reason in blocking}
        return refuse(
            "FAULT: `disarm` or `clear` first", blocking + tuple(r for r in state.causes if r.key not in present)
        )
    return refuse("these stand against it" if blocking else "disarmed only this moment: again", blocking)


def _events(
    before: State, state: State, reasons: tuple[Reason, ...], moves: list[tuple[Mode, Mode]], replies: list[Reply]
) -> tuple[Event, ...]:
    """What the log should hold of this step, in the order of cause and effect."""
    now_ns = state.now_ns
    had = {key: watched.reason for key, watched in before.watch.items() if watched.present}
    has = {reason.key for reason in reasons}
    lines = [("request", r.request.act.value, f"{r.request.act.value}: {r.text}") for r in replies]
    lines += [("cleared", key[0], had[key].sentence()) for key in had if key not in has]
    lines += [("reason", reason.condition.name, reason.sentence()) for reason in reasons if reason.key not in had]
    why = f": {reasons[0].sentence()}" if reasons and reasons[0].condition.reaction > Reaction.NOTE else ""
    lines += [("mode", to.value, f"{of.value} -> {to.value}{why}") for of, to in moves]
    return tuple(Event(now_ns, *line) for line in lines)


class Arbiter:
    """The one arbiter of a rig: turns decisions into a lease, an order to the servo and a latch.

    ``lease`` is attached for writing, ``estop`` is the owner's handle, ``give`` hands the order to the servo. `turn` is
    called every 20 ms: five chances to renew a lease before it runs out.
    """

    def __init__(
        self,
        lease: Lease,
        estop: EmergencyStop,
        give: Callable[[Order], None],
        clock: Callable[[], int] = now_ns,
    ) -> None:
        self.lease = lease
        self.estop = estop
        self.give = give
        self.clock = clock
        self.state = State()

    def turn(self, seen: Observations, requests: Iterable[Request] = ()) -> Decision:
        """One decision, put into effect. The latch is read here; ``seen`` need not hold it.

        Whatever goes wrong in here ends the lease, and with it the motion until the next `arm`.
        """
        requests = tuple(requests)
        if any(request.act is Act.ESTOP for request in requests):
            self.estop.raise_stop()  # before anything that could fail
        try:
            # The count first: of a stop raised in between, the operator has not seen the count that clears it.
            count = self.estop.count
            seen = replace(seen, estop_count=count, estop_raised=self.estop.raised)
            decision = step(self.state, seen, requests, self.clock())
            # Kept before it takes effect: a arming that the servo may have seen is never given out again.
            self.state = decision.state
            # Less comes before the order that explains it, more comes after the order that limits it.
            if decision.state.mode not in ARMED:
                self.lease.revoke()
            self.give(decision.order)
            if decision.state.mode in ARMED:
                self.lease.grant_until(decision.state.lease_until_ns)
            if decision.clear_estop is not None:
                self.estop.clear(decision.clear_estop)
        except BaseException:
            self.lease.revoke()
            self.state = replace(self.state, lease_until_ns=0)  # if a caller goes on: lapsed, hence a soft stop
            raise
        return decision
