"""The arbiter's modes and requests, and the part of it that touches the pages."""

from collections import deque
from dataclasses import replace

import pytest
from support.arbiter_rig import STOPS_IN, TURN, Case, Life, healthy

from chatvla_edge.runtime.arbiter import ARMING, EDGES, REDUCING, WANT, Act, Arbiter, Order, Request, State, step
from chatvla_edge.runtime.modes import ARMED, LEASE_NS, MS, Mode, S, Want
from chatvla_edge.runtime.observations import Camera
from chatvla_edge.runtime.pages import EmergencyStop, Lease
from chatvla_edge.runtime.realtime import now_ns


def named(reasons):
    return [reason.condition.name for reason in reasons]


# ------------------------------------------------------------------------------------------------------- the diagram


def test_every_mode_can_be_reached_and_left():
    reached, queue = {Mode.DISARMED}, deque([Mode.DISARMED])
    while queue:
        of = queue.popleft()
        new = {to for at, to in EDGES if at is of} - reached
        reached |= new
        queue.extend(new)
    assert reached == set(Mode)
    assert {of for of, _ in EDGES} == set(Mode)


def test_motion_has_one_door_and_a_fault_one_exit():
    assert {of for of, to in EDGES if to in ARMED and of not in ARMED} == {Mode.READY}
    assert {to for of, to in EDGES if of is Mode.FAULT} == {Mode.DISARMED}
    assert {to for of, to in EDGES if of is Mode.SOFT_STOP} == {Mode.DISARMED, Mode.FAULT}


def test_only_active_lets_tau_run():
    assert [mode for mode in Mode if WANT[mode] is Want.TRACK] == [Mode.ACTIVE]
    assert {mode for mode in Mode if WANT[mode] in (Want.REST, Want.BRAKE)} == set(Mode) - ARMED


def walk(life: Life, *turns) -> set:
    """Take turns; the edges that were taken. A turn is a list of acts, or a function on the life before a turn."""
    taken = set()
    for turn in turns:
        if callable(turn):
            turn(life)
            turn = []
        taken |= set(life.turn(*turn).moves)
    return taken


def test_every_edge_is_taken_by_somebody_and_no_other():
    arm = [Act.ARM]
    lives = [
        [[], arm, [Act.HOLD], [Act.RESUME], [], [Act.STOP], *[[]] * 12, []],
        [[], arm, [Act.HOLD], [Act.STOP], *[[]] * 12],
        [[], arm, lambda life: life.begin("device fault"), lambda life: life.end("device fault"), [Act.DISARM]],
        [[], arm, [Act.HOLD], lambda life: life.begin("servo died")],
        [[], arm, [Act.STOP], lambda life: life.begin("device died")],
        [[], lambda life: life.begin("enable released")],
    ]
    taken = {(Mode.DISARMED, Mode.READY)}  # a life begins with it
    for turns in lives:
        taken |= walk(Life(), *turns)
    assert taken == EDGES


def test_moves_within_one_step_follow_one_another():
    decision = Case(Mode.DISARMED).step(Request(Act.ARM))
    assert decision.moves == ((Mode.DISARMED, Mode.READY), (Mode.READY, Mode.ACTIVE))


# -------------------------------------------------------------------------------------------------------------- motion


def test_nothing_moves_before_arm_however_long_and_healthy():
    life = Life()
    for _ in range(500):
        decision = life.turn()
        assert decision.state.mode is Mode.READY
        assert decision.state.lease_until_ns == 0
        assert decision.order.want is Want.REST
    assert life.state.arming == 0


def test_a_lease_is_renewed_each_step_and_reaches_100_ms_ahead():
    life = Life().arm()
    for _ in range(100):
        decision = life.turn()
        assert decision.state.lease_until_ns == life.now + LEASE_NS


def test_each_arming_counts_and_a_hold_does_not():
    life = Life().arm()
    life.turn(Act.HOLD)
    life.turn(Act.RESUME)
    life.turn()
    assert (life.mode, life.state.arming) == (Mode.ACTIVE, 1)
    life.turn(Act.STOP)
    life.arm()
    assert life.state.arming == 2


def test_a_soft_stop_waits_for_the_servos_word_that_it_stands_because_it_was_told():
    case = Case(Mode.SOFT_STOP)
    for fields in ({"standing": False}, {"standing": True, "want": Want.TRACK}):
        case.seen = replace(case.seen, servo=replace(case.seen.servo, **fields))
        assert case.step().state.mode is Mode.SOFT_STOP
    case.seen = replace(case.seen, servo=replace(case.seen.servo, standing=True, want=Want.STOP))
    decision = case.step()
    assert decision.state.mode is Mode.DISARMED
    assert decision.state.lease_until_ns == 0


def test_a_rig_with_no_recorder_and_no_enabling_switch_is_judged_without_them():
    seen = replace(healthy(S), recorder=None, enable=None)
    assert step(State(), seen, (), S).state.mode is Mode.READY


@pytest.mark.parametrize("acts", [(Act.HOLD,), (Act.HOLD, Act.STOP), (Act.DISARM,)])
def test_what_was_said_before_an_arm_does_not_bind_the_motion_after_it(acts):
    for life in (Life(), Life().arm()):
        for act in acts:
            life.turn(act)
        if life.mode is Mode.HOLD:
            life.turn(Act.STOP)
        life.arm()
        life.pass_time(1 * S)
        assert life.mode is Mode.ACTIVE


def test_each_wait_has_its_own_ten_seconds():
    life = Life().arm()
    life.pass_time(30 * S)
    life.begin("policy not ready")
    assert life.until(Mode.SOFT_STOP, within=11 * S) > 10 * S


def test_causes_are_what_held_stopped_or_faulted_each_once():
    life = Life().arm()
    for name in ("optional frame stale", "policy not ready", "enable released"):
        life.begin(name)
    life.stuck = True
    life.pass_time(300 * MS)
    life.end("enable released")
    life.turn()
    assert named(life.state.causes) == ["enable released", "policy not ready"]
    life.begin("device fault")
    life.begin("enable released")
    life.turn()
    assert named(life.state.causes) == ["enable released", "policy not ready", "device fault"]


# ------------------------------------------------------------------------------------------------------------- errands

NO_POLICY = ("policy died", "policy not ready", "chunk stale", "frame stale", "camera died", "clock stepped", "gave up")


def test_home_from_the_policys_trajectory_stands_there_until_resume():
    life = Life().arm()
    assert reply(life.turn(Act.HOME)).text == "slowly to home"
    assert (life.mode, life.want, life.state.arming) == (Mode.ACTIVE, Want.HOME, 1)
    life.pass_time(20 * S)
    assert (life.mode, life.want) == (Mode.ACTIVE, Want.HOME)
    assert reply(life.turn(Act.RESUME)).accepted
    assert (life.mode, life.want, life.state.arming) == (Mode.ACTIVE, Want.TRACK, 1)


def test_park_ends_disarmed_and_the_next_arming_is_the_policys():
    life = Life().arm()
    life.turn(Act.PARK)
    assert life.until(Mode.DISARMED, Mode.READY, within=3 * S) > STOPS_IN
    assert named(life.state.causes) == ["parked"]
    assert life.want is Want.REST
    assert life.arm().want is Want.TRACK


@pytest.mark.parametrize("act", [Act.HOME, Act.PARK])
def test_an_errand_is_an_arming_that_needs_neither_policy_nor_cameras_nor_log(act):
    life = Life()
    for name in (*NO_POLICY, "recorder died"):
        life.begin(name)
    life.pass_time(2 * S)
    assert life.mode is Mode.DISARMED
    assert not reply(life.turn(Act.ARM)).accepted
    decision = life.turn(act)
    assert reply(decision).text == "armed, arming 1; it begins with a slow approach"
    assert decision.moves == ((Mode.DISARMED, Mode.READY), (Mode.READY, Mode.ACTIVE))
    life.pass_time(500 * MS)
    assert (life.mode, life.want.value) == (Mode.ACTIVE, act.value)
    # Back at the policy's trajectory, what it lacks counts again.
    life.turn(Act.RESUME)
    life.pass_time(2 * S)
    assert life.mode in (Mode.HOLD, Mode.FAULT)
    assert "policy died" in life.names


@pytest.mark.parametrize("name", ["device fault", "state stale", "enable released", "not at rest"])
def test_what_concerns_the_arms_stands_against_an_errand(name):
    life = Life()
    life.begin(name)
    life.begin("policy died")
    life.pass_time(1 * S)
    refusal = reply(life.turn(Act.PARK))
    assert not refusal.accepted
    assert named(refusal.reasons) == [name]


def test_a_held_robot_whose_policy_died_can_be_parked():
    life = Life().arm()
    life.begin("policy died")
    life.turn(Act.HOLD)
    assert life.mode is Mode.HOLD
    assert reply(life.turn(Act.PARK)).accepted
    life.turn()
    assert (life.mode, life.want) == (Mode.ACTIVE, Want.PARK)
    life.until(Mode.DISARMED, within=3 * S)
    assert "parked" in named(life.state.causes)


def test_an_errand_is_held_and_goes_on():
    life = Life().arm()
    life.turn(Act.HOME)
    life.turn(Act.HOLD)
    assert life.want is Want.HOLD
    life.pass_time(15 * S)
    life.turn(Act.RESUME)
    life.turn()
    assert (life.mode, life.want) == (Mode.ACTIVE, Want.HOME)


@pytest.mark.parametrize("act", [Act.STOP, Act.ESTOP])
def test_an_errand_is_stopped_and_forgotten(act):
    life = Life().arm()
    life.turn(Act.HOME)
    life.turn(act)
    life.until(Mode.SOFT_STOP if act is Act.STOP else Mode.FAULT, within=TURN)
    life.turn(Act.DISARM)
    life.pass_time(3 * S)
    assert life.state.errand is None
    assert life.arm().want is Want.TRACK


def test_at_a_pose_that_was_not_asked_for_nothing_is_parked():
    case = Case(Mode.ACTIVE)
    case.state = replace(case.state, errand=Want.PARK)
    for want in (Want.TRACK, Want.HOME):  # the servo has not taken the order yet
        case.seen = replace(case.seen, servo=replace(case.seen.servo, want=want, posed=True))
        assert "parked" not in named(case.step().reasons)


# ------------------------------------------------------------------------------------------------------------ requests


def reply(decision):
    (one,) = decision.replies
    return one


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("act", sorted(REDUCING, key=lambda act: act.value))
def test_what_reduces_motion_is_never_refused(mode, act):
    decision = Case(mode).step(Request(act))
    assert reply(decision).accepted
    if mode not in (Mode.ACTIVE, Mode.HOLD):
        return
    stop = Mode.SOFT_STOP
    assert decision.state.mode is {Act.ESTOP: Mode.FAULT, Act.HOLD: Mode.HOLD, Act.STOP: stop, Act.DISARM: stop}[act]


@pytest.mark.parametrize("act", sorted(REDUCING, key=lambda act: act.value))
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(("mode", "other"), [(Mode.READY, Act.ARM), (Mode.HOLD, Act.RESUME), (Mode.FAULT, Act.CLEAR)])
def test_a_stop_counts_more_than_what_came_with_it(act, order, mode, other):
    case = Case(mode)
    case.state = replace(case.state, held=mode is Mode.HOLD)
    decision = case.step(*[Request(act), Request(other, seen=0)][::order])
    said = {r.request.act: r for r in decision.replies}
    assert said[act].accepted
    assert not said[other].accepted
    assert f"`{act.value}` came with it" in said[other].text
    assert decision.state.mode is not Mode.ACTIVE
    assert decision.order.want is not Want.TRACK


def test_arm_is_refused_with_every_reason_and_what_to_do():
    life = Life()
    for name in ("policy not ready", "frame stale", "device fault", "optional frame stale"):
        life.begin(name)
    life.pass_time(1 * S)
    refusal = reply(life.turn(Act.ARM))
    assert named(refusal.reasons) == ["device fault", "frame stale", "policy not ready"]  # and not the optional camera
    sentences = refusal.sentences()
    assert sentences[0] == "these stand against it"
    assert all(
        reason.condition.remedy in sentence for reason, sentence in zip(refusal.reasons, sentences[1:], strict=True)
    )


def test_arm_in_a_fault_tells_the_cause_that_is_gone_and_what_is_there_now():
    life = Life().arm()
    life.begin("device fault")
    life.turn()
    life.end("device fault")
    life.begin("camera died")
    life.pass_time(1 * S)
    refusal = reply(life.turn(Act.ARM))
    assert refusal.text == "FAULT: `disarm` or `clear` first"
    assert named(refusal.reasons) == ["camera died", "device fault"]


@pytest.mark.parametrize("mode", sorted(ARMED, key=lambda mode: mode.value))
def test_who_is_armed_is_not_armed_again(mode):
    case = Case(mode)
    case.state = replace(case.state, held=mode is Mode.HOLD)
    decision = case.step(Request(Act.ARM))
    assert reply(decision).text == f"{mode.value}: armed already"
    assert decision.state.arming == 3


@pytest.mark.parametrize("act", sorted(ARMING, key=lambda act: act.value))
def test_arm_in_the_moment_in_which_a_stop_ends_is_refused(act):
    case = Case(Mode.SOFT_STOP)
    case.seen = replace(case.seen, servo=replace(case.seen.servo, standing=True))
    decision = case.step(Request(act))
    assert decision.state.mode is Mode.DISARMED
    assert reply(decision).text == "disarmed only this moment: again"


def test_arm_together_with_clear_finds_the_fault_cleared_and_itself_too_early():
    decision = Case(Mode.FAULT).step(Request(Act.ARM), Request(Act.CLEAR))
    assert [(r.request.act, r.accepted) for r in decision.replies] == [(Act.CLEAR, True), (Act.ARM, False)]
    assert decision.state.mode is Mode.DISARMED


def test_two_arms_at_once_are_one():
    decision = Case(Mode.READY).step(Request(Act.ARM), Request(Act.ARM))
    assert [r.accepted for r in decision.replies] == [True, False]
    assert decision.state.arming == 4


@pytest.mark.parametrize("speed", [1.0, 0.5, 1e-3])
def test_a_speed_up_to_one_is_taken_and_kept(speed):
    life = Life()
    assert reply(life.turn(Request(Act.SPEED, speed=speed))).accepted
    life.arm()
    assert life.decision.order.speed == speed


@pytest.mark.parametrize("speed", [0.0, -1.0, 1.0001, float("nan"), float("inf")])
def test_any_other_speed_is_refused(speed):
    decision = Case(Mode.ACTIVE).step(Request(Act.SPEED, speed=speed))
    assert not reply(decision).accepted
    assert "expected more than 0 (to stand: `hold`) and at most 1" in reply(decision).text
    assert decision.order.speed == 1.0


def test_resume_says_what_else_holds():
    life = Life().arm()
    life.begin("policy not ready")
    life.turn(Act.HOLD)
    answer = reply(life.turn(Act.RESUME))
    assert (answer.accepted, answer.text) == (True, "resuming when these clear")
    assert named(answer.reasons) == ["policy not ready"]
    assert life.turn().state.mode is Mode.HOLD
    answer = reply(life.turn(Act.RESUME))
    assert (answer.accepted, answer.text) == (False, "it resumes by itself when these have cleared")
    life.end("policy not ready")
    life.pass_time(1 * S)
    assert life.mode is Mode.ACTIVE


def test_the_operators_hold_stops_the_clock_of_a_wait():
    life = Life().arm()
    life.begin("policy not ready")
    life.pass_time(9 * S)
    life.turn(Act.HOLD)
    life.pass_time(60 * S)
    life.turn(Act.RESUME)
    life.pass_time(9 * S)
    assert life.mode is Mode.HOLD
    life.until(Mode.SOFT_STOP, within=2 * S)
    assert "hold overlong" in life.names


@pytest.mark.parametrize("mode", [mode for mode in Mode if mode is not Mode.HOLD])
def test_resume_where_nothing_is_held_is_refused(mode):
    answer = reply(Case(mode).step(Request(Act.RESUME)))
    assert not answer.accepted
    assert answer.text.endswith(": nothing is held")


def test_answers_say_what_became_of_it():
    life = Life()
    assert reply(life.turn(Act.STOP)).text == "READY: nothing moved"
    life.arm()
    assert reply(life.turn(Act.HOLD)).text == "now HOLD"
    assert reply(life.turn(Act.RESUME)).text == "resuming"
    assert reply(life.turn(Request(Act.SPEED))).text == "speed 1"


def test_clearing_a_fault_without_an_estop_clears_no_estop():
    decision = Case(Mode.FAULT).step(Request(Act.CLEAR))
    assert reply(decision).accepted
    assert decision.clear_estop is None


@pytest.mark.parametrize("mode", [mode for mode in Mode if mode is not Mode.FAULT])
def test_clear_where_nothing_is_latched_is_refused(mode):
    assert reply(Case(mode).step(Request(Act.CLEAR))).text == "nothing is latched"


def test_a_fault_cannot_be_cleared_in_the_step_that_brings_it():
    decision = Case(Mode.ACTIVE).put("device fault").step(Request(Act.CLEAR))
    assert decision.state.mode is Mode.FAULT
    assert reply(decision).text == "the fault came this moment: look at it first"
    assert named(reply(decision).reasons) == ["device fault"]


def test_disarm_in_the_step_that_brings_a_fault_does_not_acknowledge_it():
    decision = Case(Mode.ACTIVE).put("device fault").step(Request(Act.DISARM))
    assert decision.state.mode is Mode.FAULT


def test_leaving_a_fault_tells_what_still_stands_against_arming():
    decision = Case(Mode.FAULT).put("device fault").step(Request(Act.DISARM))
    assert decision.state.mode is Mode.DISARMED
    assert named(reply(decision).reasons) == ["device fault"]


# -------------------------------------------------------------------------------------------------------------- misuse


def test_time_that_goes_back_is_refused():
    case = Case(Mode.ACTIVE)
    with pytest.raises(ValueError, match="is before the last step"):
        step(case.state, case.seen, (), case.state.now_ns - 1)
    assert step(case.state, case.seen, (), case.state.now_ns).state.now_ns == case.state.now_ns


def test_a_rig_that_loses_a_part_is_refused_because_the_part_would_not_be_judged():
    case = Case(Mode.ACTIVE)
    for change in ({"cameras": case.seen.cameras[:1]}, {"devices": ()}, {"recorder": None}, {"enable": None}):
        with pytest.raises(ValueError, match=r"the rig is made of .* expected \['camera top'"):
            step(case.state, replace(case.seen, **change), (), case.now)


def test_two_parts_of_one_name_are_refused_because_one_would_hide_the_other():
    seen = healthy(S)
    with pytest.raises(ValueError, match="distinct names"):
        step(State(), replace(seen, cameras=(*seen.cameras, Camera("top", True, MS, S))), (), S)


# ----------------------------------------------------------------------------------------------------------------- log


def test_the_log_tells_request_reason_and_mode_in_the_order_of_cause_and_effect():
    life = Life().arm()
    assert [event.kind for event in life.decision.events] == []
    life.begin("device fault")
    events = life.turn().events
    assert [(event.kind, event.name) for event in events] == [("reason", "device fault"), ("mode", "FAULT")]
    assert events[1].text.startswith("ACTIVE -> FAULT: device fault (right): motor 3")
    assert all(event.at_ns == life.now for event in events)
    life.end("device fault")
    life.pass_time(1 * S)
    events = life.turn(Act.DISARM).events
    assert [(event.kind, event.text) for event in events] == [
        ("request", "disarm: disarmed"),
        ("mode", "FAULT -> DISARMED"),
    ]


def test_a_reason_is_logged_once_and_once_when_it_clears():
    life = Life().arm()
    life.begin("camera died")
    kinds = [event.kind for _ in range(50) for event in life.turn().events]
    assert kinds == ["reason", "mode"]
    life.end("camera died")
    events = [event for _ in range(50) for event in life.turn().events]
    assert [(event.kind, event.name) for event in events] == [("cleared", "camera died"), ("mode", "ACTIVE")]


def test_a_note_is_no_reason_for_a_mode():
    decision = Case(Mode.HOLD).put("optional frame stale").step()
    assert decision.events[-1].text == "HOLD -> ACTIVE"
    decision = Case(Mode.READY).put("recorder died").step()
    assert decision.events[-1].text.startswith("READY -> DISARMED: recorder died")


# -------------------------------------------------------------------------------------------------- the pages it moves


class Pages:
    """An arbiter on real pages, in virtual time close to the real one."""

    def __init__(self) -> None:
        self.lease = Lease.create("lease")
        self.estop = EmergencyStop.create("estop")
        self.log: list[tuple] = []
        self.order = Order(Want.REST, 0, 1.0)
        self.start = now_ns()
        self.ahead = 0
        self.broken: Exception | None = None
        self.arbiter = Arbiter(Lease.attach(self.lease.fd, write=True), self.estop, self.give, lambda: self.now)
        self.turn()

    @property
    def now(self) -> int:
        return self.start + self.ahead

    def give(self, order) -> None:
        if self.broken:
            raise self.broken
        self.log.append((order.want, self.lease.left_ns(self.now) > 0))
        self.order = order

    def turn(self, *requests: Request):
        self.ahead += TURN
        seen = healthy(self.now, want=self.order.want, arming=self.order.arming)
        return self.arbiter.turn(seen, requests)

    def left(self) -> int:
        return self.lease.left_ns(self.now)


def test_a_lease_is_in_the_page_exactly_while_armed():
    pages = Pages()
    assert pages.left() == 0
    pages.turn(Request(Act.ARM))
    assert pages.left() == LEASE_NS
    pages.turn(Request(Act.HOLD))
    assert pages.left() == LEASE_NS
    pages.turn(Request(Act.STOP))
    assert pages.left() == LEASE_NS
    pages.turn()
    assert pages.arbiter.state.mode is Mode.DISARMED
    assert pages.left() == 0


def test_less_comes_before_the_order_and_more_after_it():
    pages = Pages()
    pages.log.clear()
    pages.turn(Request(Act.ARM))
    pages.turn()
    pages.turn(Request(Act.HOLD))
    pages.turn(Request(Act.ESTOP))
    # In between there is no instant without a lease: the servo would stop for it.
    assert pages.log == [(Want.TRACK, False), (Want.TRACK, True), (Want.HOLD, True), (Want.BRAKE, False)]


def test_an_estop_asked_for_is_latched_and_cleared_by_its_count():
    pages = Pages()
    pages.turn(Request(Act.ARM))
    decision = pages.turn(Request(Act.ESTOP))
    assert pages.estop.raised
    assert decision.state.mode is Mode.FAULT
    assert not pages.turn(Request(Act.CLEAR, seen=0)).replies[0].accepted
    assert pages.estop.raised
    assert pages.turn(Request(Act.CLEAR, seen=1)).replies[0].accepted
    assert not pages.estop.raised
    assert pages.turn().state.mode is Mode.READY


def test_an_estop_raised_by_another_process_is_seen_at_the_next_turn():
    pages = Pages()
    pages.turn(Request(Act.ARM))
    EmergencyStop.attach(pages.estop.fd).raise_stop()
    decision = pages.turn()
    assert named(decision.reasons) == ["e-stop"]
    assert pages.left() == 0


@pytest.mark.parametrize("how", ["give", "time"])
def test_whatever_goes_wrong_ends_the_lease_and_needs_a_new_arm(how):
    pages = Pages()
    pages.turn(Request(Act.ARM))
    pages.turn()
    if how == "give":
        pages.broken = OSError("no servo")
    else:
        pages.ahead -= 10 * TURN
    with pytest.raises((OSError, ValueError)):
        pages.turn()
    assert pages.left() == 0
    pages.broken = None
    pages.ahead += 10 * TURN
    decision = pages.turn()
    assert named(decision.reasons) == ["lease lapsed"]
    assert pages.turn().state.mode is Mode.DISARMED


def test_an_estop_is_latched_even_if_the_decision_fails():
    pages = Pages()
    pages.ahead -= 10 * TURN
    with pytest.raises(ValueError, match="is before the last step"):
        pages.turn(Request(Act.ESTOP))
    assert pages.estop.raised


def test_an_arming_that_failed_half_way_is_not_counted_twice():
    pages = Pages()
    pages.broken = OSError("no servo")
    with pytest.raises(OSError, match="no servo"):
        pages.turn(Request(Act.ARM))
    pages.broken = None
    pages.turn()
    pages.turn()
    pages.turn(Request(Act.ARM))
    assert pages.order.arming == 2


def test_an_arbiter_kept_from_granting_grants_less():
    pages = Pages()
    real = pages.give
    pages.turn(Request(Act.ARM))
    decided = pages.now + TURN

    def give(order):
        pages.ahead += 60 * MS
        real(order)

    pages.arbiter.give = give
    pages.turn()
    assert pages.left() == decided + LEASE_NS - pages.now
