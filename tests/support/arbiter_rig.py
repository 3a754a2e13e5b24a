"""A rig for the arbiter to judge: healthy unless a test puts it into trouble, with a servo that obeys."""

from collections.abc import Callable
from dataclasses import replace

from chatvla_edge.runtime.arbiter import WANT, Act, Decision, Request, State, step
from chatvla_edge.runtime.assessment import Reason, Watched
from chatvla_edge.runtime.conditions import TABLE
from chatvla_edge.runtime.modes import ARMED, ERRANDS, MS, Mode, S, Want
from chatvla_edge.runtime.observations import Camera, Child, Device, Observations, Policy, Servo

ROWS = {condition.name: condition for condition in TABLE}
TURN = 20 * MS
SERVO_PERIOD = 2 * MS
STOPS_IN = 200 * MS  # how long the model's arm takes to come to rest
GOES_IN = 900 * MS  # and from anywhere to a pose

Put = Callable[[Observations, int], Observations]


def healthy(now: int, **servo) -> Observations:
    """Two arms, a required and an optional camera, everything fresh at ``now``."""
    fields = {"want": Want.REST, "arming": 0, "standing": True, **servo}
    return Observations(
        cameras=(Camera("top", True, 33_333_333, now), Camera("wrist", False, 16_666_667, now)),
        policy=Policy(300 * MS, now, ready=True),
        servo=Servo(SERVO_PERIOD, now, **fields),
        devices=(
            Device("left", 2 * MS, now, now, fields["arming"]),
            Device("right", 2 * MS, now, now, fields["arming"]),
            Device("grip", 33 * MS, now, now, fields["arming"]),
        ),
        recorder=Child(),
        enable=True,
    )


def camera(index: int, **fields) -> Put:
    def put(seen: Observations, _: int) -> Observations:
        cameras = list(seen.cameras)
        cameras[index] = replace(cameras[index], **fields)
        return replace(seen, cameras=tuple(cameras))

    return put


def device(index: int, **fields) -> Put:
    def put(seen: Observations, _: int) -> Observations:
        devices = list(seen.devices)
        devices[index] = replace(devices[index], **fields)
        return replace(seen, devices=tuple(devices))

    return put


def servo(**fields) -> Put:
    return lambda seen, _: replace(seen, servo=replace(seen.servo, **fields))


def policy(**fields) -> Put:
    return lambda seen, _: replace(seen, policy=replace(seen.policy, **fields))


def whole(**fields) -> Put:
    return lambda seen, _: replace(seen, **fields)


def policy_process(**fields) -> Put:
    return lambda seen, age: policy(process=replace(seen.policy.process, **fields))(seen, age)


def stale_camera(index: int) -> Put:
    return lambda seen, age: camera(index, received_ns=seen.cameras[index].received_ns - age)(seen, age)


DEAD = Child(alive=False, last_words="Segmentation fault")

# How each condition that is *seen* looks after ``age`` ns. Of the devices it is the second, so "any of them" is tested.
TROUBLES: dict[str, Put] = {
    "optional frame stale": stale_camera(1),
    "optional camera died": camera(1, process=DEAD),
    "starved": servo(starved=True),
    "unreachable": servo(unreachable=True),
    "recorder died": whole(recorder=DEAD),
    "not at rest": servo(standing=False),
    "chunk stale": lambda seen, age: policy(owed_ns=seen.policy.owed_ns - age)(seen, age),
    "policy not ready": policy(ready=False),
    "policy died": policy_process(alive=False),
    "frame stale": stale_camera(0),
    "camera died": camera(0, process=DEAD),
    "clock stepped": whole(clock_step_ns=-50 * MS),
    "limits clip": lambda seen, age: servo(clipped_ticks=age // SERVO_PERIOD)(seen, age),
    "servo late": lambda seen, age: servo(skipped_ticks=age // SERVO_PERIOD)(seen, age),
    "vendor deviates": device(1, deviation=0.2),
    "state stale": lambda seen, age: device(1, state_ns=seen.devices[1].state_ns - age)(seen, age),
    "arming refused": servo(arming=2),
    "servo stopped": servo(stopped="the lease had run out"),
    "parked": servo(want=Want.PARK, posed=True),
    "enable released": whole(enable=False),
    "gave up": policy_process(given_up=True, last_words="out of memory"),
    "not following": device(1, lagging=True),
    "command not finite": servo(nonfinite=True),
    "device stopped": device(1, stopped="no new command within 100 ms"),
    "servo lost": lambda seen, age: servo(beat_ns=seen.servo.beat_ns - age)(seen, age),
    "device lost": lambda seen, age: device(1, beat_ns=seen.devices[1].beat_ns - age)(seen, age),
    "servo disobeys": lambda seen, age: servo(want=Want.HOLD if seen.servo.want is Want.TRACK else Want.TRACK)(
        seen, age
    ),
    "servo died": servo(process=DEAD),
    "device died": device(1, process=DEAD),
    "device fault": device(1, fault="motor 3: over-temperature"),
    "e-stop": whole(estop_raised=True, estop_count=1),
}
# The others stand in the arbiter's memory.
REMEMBERED = set(ROWS) - set(TROUBLES)

PERIOD = {
    "optional frame stale": 16_666_667,
    "frame stale": 33_333_333,
    "chunk stale": 300 * MS,
    "servo lost": SERVO_PERIOD,
    "state stale": 2 * MS,
    "device lost": 2 * MS,
}


class Case:
    """A healthy rig one turn after ``mode`` was decided, into which conditions can be put at an exact excess."""

    def __init__(self, mode: Mode) -> None:
        self.now = 100 * S
        seen = healthy(self.now, want=WANT[mode], arming=3, standing=mode not in (Mode.ACTIVE, Mode.SOFT_STOP))
        self.seen = seen
        self.state = State(
            mode=mode,
            now_ns=self.now - TURN,
            entered_ns=self.now - 1 * S,
            lease_until_ns=self.now + 80 * MS if mode in ARMED else 0,
            waiting_since_ns=self.now - 1 * S if mode is Mode.HOLD else 0,
            arming=3,
            parts=seen.parts,
        )

    def put(self, name: str, excess: int = 1) -> "Case":
        """Put condition ``name`` in, ``excess`` ns above its budget; a fact is true for any excess above 0."""
        row, now = ROWS[name], self.now
        allowed = int(row.allowed(PERIOD.get(name, 0)))
        remember: dict[str, dict[str, object]] = {
            "operator hold": {"held": excess > 0},
            "operator stop": {"stop_asked": excess > 0},
            "parked": {"errand": Want.PARK},
            "hold overlong": {"waiting_since_ns": now - allowed - excess},
            "stop overran": {"entered_ns": now - allowed - excess},
            "lease lapsed": {"lease_until_ns": now + 1 - excess},
            # What drains until this step is put in on top.
            "limits clip": {"clipped_ns": allowed + TURN // 2 + excess},
            "servo late": {"late_ns": allowed + TURN // 20 + excess},
        }
        if name in remember:
            self.state = replace(self.state, **remember[name])
        if name == "parked":
            self.seen = replace(self.seen, servo=replace(self.seen.servo, want=Want.PARK, posed=excess > 0))
        elif name in remember:
            pass
        elif name in PERIOD:
            self.seen = TROUBLES[name](self.seen, allowed + excess)
        elif name == "clock stepped":
            self.seen = replace(self.seen, clock_step_ns=-(allowed + excess))
        elif excess > 0:
            self.seen = TROUBLES[name](self.seen, 0)
        if row.lasting_ns:
            subject = "right" if name in ("vendor deviates", "not following") else ""
            reason = Reason(row, subject, 1, 0, "", now - row.lasting_ns)
            watch = {**self.state.watch, reason.key: Watched(reason, now - TURN, False)}
            self.state = replace(self.state, watch=watch)
        return self

    def step(self, *requests: Request) -> Decision:
        return step(self.state, self.seen, requests, self.now)


class Life:
    """A rig and its arbiter through time. The servo takes an order a turn later and stands 200 ms after a stop."""

    def __init__(self) -> None:
        self.now = 1000 * S
        self.state = State()
        self.begun: dict[str, int] = {}
        self.want, self.arming = Want.REST, 0
        self.moved_ns = 0
        self.sent_ns = 0
        self.stuck = False  # never comes to rest
        self.decision: Decision
        self.turn()

    @property
    def mode(self) -> Mode:
        return self.state.mode

    @property
    def names(self) -> list[str]:
        return [reason.condition.name for reason in self.decision.reasons]

    def begin(self, name: str) -> None:
        self.begun[name] = self.now

    def end(self, name: str) -> None:
        del self.begun[name]

    def look(self) -> Observations:
        standing = self.now - self.moved_ns >= STOPS_IN and not self.stuck
        posed = self.want in ERRANDS and self.now - self.sent_ns >= GOES_IN
        seen = healthy(self.now, want=self.want, arming=self.arming, standing=standing or posed, posed=posed)
        for name, onset in self.begun.items():
            seen = TROUBLES[name](seen, self.now - onset)
        return seen

    def turn(self, *acts: Act | Request, after: int = TURN) -> Decision:
        """The next decision, ``after`` ns later."""
        self.now += after
        requests = [act if isinstance(act, Request) else Request(act) for act in acts]
        self.decision = step(self.state, self.look(), requests, self.now)
        self.state = self.decision.state
        order = self.decision.order
        if order.want is not self.want:
            self.sent_ns = self.now
        self.want, self.arming = order.want, order.arming
        if order.want is Want.TRACK or (order.want in ERRANDS and self.now - self.sent_ns < GOES_IN):
            self.moved_ns = self.now
        return self.decision

    def pass_time(self, duration: int) -> None:
        for _ in range(-(-duration // TURN)):
            self.turn()

    def until(self, *modes: Mode, within: int) -> int:
        """Turn until one of ``modes``; how long that took. Fails after ``within`` ns."""
        began = self.now
        while self.mode not in modes:
            assert self.now - began <= within, f"{self.mode} after {within / MS} ms: {self.names}"
            self.turn()
        return self.now - began

    def arm(self) -> "Life":
        self.until(Mode.READY, within=3 * S)
        assert self.turn(Act.ARM).replies[0].accepted
        assert self.mode is Mode.ACTIVE
        self.turn()
        return self
