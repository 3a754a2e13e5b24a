"""Each row of the arbiter's table by itself, and all pairs of rows."""

from dataclasses import replace
from itertools import combinations
from math import nan

import pytest
from support.arbiter_rig import GOES_IN, PERIOD, REMEMBERED, ROWS, STOPS_IN, TROUBLES, TURN, Case, Life, device

from chatvla_edge.runtime.arbiter import Act, Request
from chatvla_edge.runtime.conditions import SETTLE_NS, TABLE
from chatvla_edge.runtime.modes import ARMED, LEASE_NS, MS, Clears, Mode, Reaction, S

NAMES = list(ROWS)
OF_AN_ARMING = {
    "operator hold", "operator stop", "hold overlong", "lease lapsed", "stop overran", "parked",
    "arming refused", "servo stopped", "device stopped", "command not finite", "vendor deviates", "not following",
}  # fmt: skip
SETTLES = 5 * S  # the fullest bucket is empty, and any condition forgotten


def named(reasons):
    return [reason.condition.name for reason in reasons]


def ranks(names):
    return [NAMES.index(name) for name in names]


def expected(mode: Mode, reactions, blocking: bool) -> Mode:
    """What the design says a mode becomes, written apart from the code."""
    worst = max(reactions, default=Reaction.NOTE)
    if mode in (Mode.DISARMED, Mode.READY):
        return Mode.DISARMED if blocking else Mode.READY
    if mode is Mode.FAULT or worst is Reaction.FAULT:
        return Mode.FAULT
    if mode is Mode.SOFT_STOP or worst is Reaction.SOFT_STOP:
        return Mode.SOFT_STOP
    return Mode.HOLD if worst is Reaction.HOLD else Mode.ACTIVE


CASES = [(row.name, mode) for row in TABLE for mode in Mode if mode in row.judged_in]
IDS = [f"{name}-{mode.value}" for name, mode in CASES]

# ---------------------------------------------------------------------------------------------------- the table itself


def test_severity_ascends_and_names_are_distinct():
    assert [row.reaction for row in TABLE] == sorted(row.reaction for row in TABLE)
    assert len(ROWS) == len(TABLE)
    assert not REMEMBERED - {"operator hold", "operator stop", "hold overlong", "stop overran", "lease lapsed"}


@pytest.mark.parametrize("row", TABLE, ids=NAMES)
def test_what_clears_a_row_follows_from_what_it_does(row):
    allowed = {
        Reaction.NOTE: {Clears.BY_ITSELF},
        Reaction.REFUSE: {Clears.BY_ITSELF},
        Reaction.HOLD: {Clears.BY_ITSELF, Clears.BY_RESUME},
        Reaction.SOFT_STOP: {Clears.BY_ARM},
        Reaction.FAULT: {Clears.BY_DISARM, Clears.BY_CLEAR},
    }
    assert row.clears in allowed[row.reaction]


@pytest.mark.parametrize("row", TABLE, ids=NAMES)
def test_a_row_says_why_and_what_to_do(row):
    assert row.why
    assert row.remedy.endswith(".")


def test_what_can_be_before_arming_stands_against_it():
    # All but the notes, and what is said of an arming that is over.
    free = {row.name for row in TABLE if not row.blocks_arming}
    assert free == OF_AN_ARMING | {row.name for row in TABLE if row.reaction is Reaction.NOTE}


# ---------------------------------------------------------------------------------------------- one condition, exactly


@pytest.mark.parametrize("mode", Mode)
def test_a_healthy_rig_stays_where_it_is(mode):
    decision = Case(mode).step()
    assert decision.reasons == ()
    assert decision.state.mode is (Mode.READY if mode is Mode.DISARMED else Mode.ACTIVE if mode is Mode.HOLD else mode)


@pytest.mark.parametrize(("name", "mode"), CASES, ids=IDS)
def test_a_condition_is_present_one_step_above_its_budget_alone(name, mode):
    decision = Case(mode).put(name).step()
    row = ROWS[name]
    assert named(decision.reasons) == [name]
    assert decision.state.mode is expected(mode, [row.reaction], row.blocks_arming)
    assert decision.state.lease_until_ns == (decision.state.now_ns + LEASE_NS if decision.state.mode in ARMED else 0)


@pytest.mark.parametrize(("name", "mode"), CASES, ids=IDS)
def test_a_condition_is_absent_at_its_budget(name, mode):
    assert Case(mode).put(name, excess=0).step().reasons == ()


@pytest.mark.parametrize(
    ("name", "mode"), [(row.name, mode) for row in TABLE for mode in Mode if mode not in row.judged_in]
)
def test_a_condition_is_not_judged_where_it_means_nothing(name, mode):
    assert name not in named(Case(mode).put(name).step().reasons)


@pytest.mark.parametrize("name", [row.name for row in TABLE if row.lasting_ns])
def test_what_must_last_is_present_only_when_it_has(name):
    life = Life().arm()
    life.begin(name)
    life.turn(after=1)  # first seen
    life.turn(after=ROWS[name].lasting_ns - 1 - 60 * MS)
    life.turn(after=60 * MS)
    assert life.names == []
    life.end(name)
    life.turn(after=1)  # interrupted: it counts anew
    life.begin(name)
    for _ in range(10):
        life.turn(after=ROWS[name].lasting_ns // 10)
        assert life.names == []
    life.turn(after=ROWS[name].lasting_ns // 10)
    assert life.names == [name]


def test_a_distance_that_is_no_number_is_too_much():
    life = Life().arm()
    for _ in range(6):
        assert life.mode is Mode.ACTIVE
        life.now += TURN
        seen = device(0, deviation=nan)(life.look(), 0)
        life.now -= TURN
        life.look = lambda seen=seen, life=life: device(0, deviation=nan)(type(life).look(life), 0)
        life.turn()
    assert life.mode is Mode.SOFT_STOP
    assert life.names == ["vendor deviates"]


@pytest.mark.parametrize("name", PERIOD)
def test_what_was_never_seen_and_what_comes_from_the_future_is_stale(name):
    row = ROWS[name]
    for age, words in ((100 * S, "never seen"), (-int(row.allowed(PERIOD[name])) - 1, "ms, allowed")):
        case = Case(next(iter(row.judged_in & {Mode.READY})))
        case.seen = TROUBLES[name](case.seen, age)  # Case begins at 100 s: the stamp is 0
        (reason,) = case.step().reasons
        assert reason.condition is row
        assert words in reason.sentence()


def test_a_policy_that_owes_no_chunk_is_not_late():
    case = Case(Mode.ACTIVE)
    case.seen = replace(case.seen, policy=replace(case.seen.policy, owed_ns=None))
    assert case.step().reasons == ()


@pytest.mark.parametrize("row", TABLE, ids=NAMES)
def test_a_sentence_names_what_of_whom_and_what_to_do(row):
    mode = Mode.ACTIVE if Mode.ACTIVE in row.judged_in else next(iter(row.judged_in))
    (reason,) = Case(mode).put(row.name).step().reasons
    sentence = reason.sentence()
    assert sentence.startswith(row.name)
    assert sentence.endswith(row.remedy)
    assert reason.subject in sentence
    assert reason.words in sentence


def test_sentences_read_well():
    assert Case(Mode.ACTIVE).put("e-stop").step().reasons[0].sentence() == "e-stop. When the cause is gone: `clear`."
    assert Case(Mode.ACTIVE).put("state stale").step().reasons[0].sentence() == (
        "state stale (right): 50 ms, allowed 50 ms. "
        "Check the arm's power and bus; it may have sunk: the next `arm` starts from where it is."
    )
    assert "vendor deviates (right): 0.200 rad or m, allowed 0.05." in (
        Case(Mode.ACTIVE).put("vendor deviates").step().reasons[0].sentence()
    )
    assert "device fault (right): motor 3: over-temperature. Repair" in (
        Case(Mode.ACTIVE).put("device fault").step().reasons[0].sentence()
    )


def test_a_condition_is_forgotten_exactly_when_it_has_settled():
    life = Life().arm()
    life.begin("camera died")
    life.turn()
    life.end("camera died")
    life.turn(after=SETTLE_NS - 14 * TURN - 1)
    life.pass_time(14 * TURN)
    assert (life.mode, life.names) == (Mode.HOLD, ["camera died"])
    life.turn(after=1)
    assert (life.mode, life.names) == (Mode.ACTIVE, [])


# --------------------------------------------------------------------------------------------------- all pairs of rows

PAIRS = list(combinations(NAMES, 2))


# A wait is not the operator's hold, a servo that refuses an arming says nothing of that arming, and one that disobeys
# is not parked. Going to a pose is not judged by what it can do without.
CONTRADICTORY = [
    {"operator hold", "hold overlong"},
    {"arming refused", "servo stopped"},
    {"arming refused", "command not finite"},
    {"parked", "servo disobeys"},
    *({"parked", row.name} for row in TABLE if not row.of_errands and Mode.ACTIVE in row.judged_in),
]


def together(a: str, b: str) -> list[Mode]:
    """The modes in which both can be."""
    if {a, b} in CONTRADICTORY:
        return []
    return [mode for mode in Mode if mode in ROWS[a].judged_in & ROWS[b].judged_in]


def test_few_pairs_exclude_each_other():
    excluded = {frozenset(pair) for pair in PAIRS if not together(*pair)}
    in_one_mode = [{"starved", "unreachable", "parked"}, {"hold overlong"}, {"stop overran"}]
    assert excluded == (
        {frozenset({"not at rest", name}) for name in OF_AN_ARMING | {"starved", "unreachable"}}
        | {frozenset({a, b}) for these, those in combinations(in_one_mode, 2) for a in these for b in those}
        | {frozenset({"stop overran", "arming refused"})}
        | {frozenset(pair) for pair in CONTRADICTORY}
    )


@pytest.mark.parametrize(("a", "b"), PAIRS, ids=[f"{a}+{b}" for a, b in PAIRS])
def test_of_two_conditions_the_more_severe_wins_and_both_are_told(a, b):
    for mode in together(a, b):
        for first, second in ((a, b), (b, a)):
            decision = Case(mode).put(first).put(second).step()
            assert named(decision.reasons) == [b, a], mode  # the table ascends, reasons descend
            rows = [ROWS[a], ROWS[b]]
            blocking = any(row.blocks_arming for row in rows)
            assert decision.state.mode is expected(mode, [row.reaction for row in rows], blocking)
            assert named(decision.blocking) == [row.name for row in reversed(rows) if row.blocks_arming]


def test_all_conditions_that_can_be_at_once_are_told_in_order():
    case = Case(Mode.ACTIVE)
    names = [row.name for row in TABLE if Mode.ACTIVE in row.judged_in and row.name not in ("arming refused", "parked")]
    for name in names:
        case.put(name)
    assert named(case.step().reasons) == names[::-1]


# --------------------------------------------------------------------- through time: within its budget, and how it ends


def onset(life: Life, name: str) -> int:
    """Begin ``name`` on an armed rig by the means that cause it; how long the arbiter may take to react."""
    row = ROWS[name]
    if name in ("operator hold", "operator stop"):
        life.turn(Act.HOLD if name == "operator hold" else Act.STOP)
        return 0
    if name == "lease lapsed":
        life.turn(after=LEASE_NS)
        return 0
    if name == "hold overlong":
        life.begin("policy not ready")
        life.turn()
        return 10 * S + TURN
    if name == "parked":
        life.turn(Act.PARK)
        return GOES_IN + 2 * TURN
    if name == "stop overran":
        life.stuck = True
        life.turn(Act.STOP)
        return 2 * S + TURN
    life.begin(name)
    if name == "limits clip":
        return 1 * S + 2 * TURN
    return int(row.allowed(PERIOD.get(name, 0))) + row.lasting_ns + 2 * TURN


def ended(life: Life, name: str) -> None:
    life.stuck = False
    life.begun.clear()


REACTING = [row.name for row in TABLE if row.reaction >= Reaction.HOLD]


@pytest.mark.parametrize("name", REACTING)
def test_an_armed_rig_reacts_within_the_budget(name):
    life = Life().arm()
    mode = {Reaction.HOLD: Mode.HOLD, Reaction.SOFT_STOP: Mode.SOFT_STOP, Reaction.FAULT: Mode.FAULT}[
        ROWS[name].reaction
    ]
    within = onset(life, name)
    life.until(mode, within=within)
    assert life.names[0] == name


@pytest.mark.parametrize("name", [row.name for row in TABLE if row.clears is Clears.BY_ITSELF and row.name in REACTING])
def test_a_hold_resumes_by_itself_when_its_reason_has_settled(name):
    life = Life().arm()
    life.until(Mode.HOLD, within=onset(life, name))
    life.pass_time(1 * S)
    assert life.mode is Mode.HOLD
    assert life.state.arming == 1
    ended(life, name)
    settle = ROWS[name].settle_ns
    took = life.until(Mode.ACTIVE, within=settle + TURN)
    assert took >= settle - TURN
    assert life.state.arming == 1  # no new approach


def test_the_operators_hold_ends_by_the_operator_only():
    life = Life().arm()
    life.turn(Act.HOLD)
    life.pass_time(60 * S)
    assert life.mode is Mode.HOLD
    assert life.turn(Act.RESUME).replies[0].accepted
    assert life.turn().state.mode is Mode.ACTIVE


@pytest.mark.parametrize("name", [row.name for row in TABLE if row.clears is Clears.BY_ARM])
def test_a_soft_stop_ends_disarmed_and_moves_again_by_arm_only(name):
    life = Life().arm()
    life.until(Mode.SOFT_STOP, within=onset(life, name))
    ended(life, name)
    assert life.until(Mode.DISARMED, Mode.READY, within=STOPS_IN + 2 * TURN) > 0
    assert name in named(life.state.causes)
    life.pass_time(SETTLES)
    assert life.mode is Mode.READY
    assert name in named(life.state.causes)  # still told, though long gone
    life.arm()
    assert life.state.arming == 2
    assert life.state.causes == ()


@pytest.mark.parametrize("name", [row.name for row in TABLE if row.reaction is Reaction.FAULT])
def test_a_fault_outlasts_its_reason_and_is_left_by_the_operator_only(name):
    life = Life().arm()
    life.until(Mode.FAULT, within=onset(life, name))
    ended(life, name)
    life.pass_time(5 * S)
    assert life.mode is Mode.FAULT
    assert life.names == []
    refusal = life.turn(Act.ARM).replies[0]
    assert not refusal.accepted
    assert name in named(refusal.reasons)  # the cause, though it is gone
    assert life.turn(Act.DISARM).replies[0].accepted
    assert life.mode is Mode.DISARMED
    assert life.arm().state.arming == 2


@pytest.mark.parametrize("row", [row for row in TABLE if not row.judged_in <= ARMED], ids=lambda row: row.name)
def test_arming_is_refused_exactly_by_the_rows_that_say_so(row):
    life = Life()
    life.until(Mode.READY, within=1 * S)
    onset(life, row.name)
    life.pass_time(1100 * MS)
    reply = life.turn(Act.ARM).replies[0]
    assert reply.accepted == (not row.blocks_arming)
    assert named(reply.reasons) == ([row.name] if row.blocks_arming else [])
    ended(life, row.name)
    life.pass_time(SETTLES)
    assert life.mode is (Mode.READY if row.blocks_arming else Mode.ACTIVE)


@pytest.mark.parametrize(
    "name", [row.name for row in TABLE if row.reaction < Reaction.HOLD and Mode.ACTIVE in row.judged_in]
)
def test_a_note_leaves_an_armed_rig_moving(name):
    life = Life().arm()
    onset(life, name)
    life.pass_time(5 * S)
    assert life.mode is Mode.ACTIVE
    assert life.names == [name]


def test_an_estop_is_cleared_by_the_count_that_was_seen_and_by_nothing_else():
    life = Life().arm()
    life.begin("e-stop")
    assert life.turn().state.mode is Mode.FAULT
    life.turn(Act.DISARM)
    life.pass_time(1 * S)
    assert (life.mode, life.names) == (Mode.DISARMED, ["e-stop"])
    for seen in (None, 0, 2):
        decision = life.turn(Request(Act.CLEAR, seen=seen))
        assert not decision.replies[0].accepted
        assert decision.clear_estop is None
    decision = life.turn(Request(Act.CLEAR, seen=1))
    assert decision.replies[0].accepted
    assert decision.clear_estop == 1


# ------------------------------------------------------------------------------------------------------------- buckets


def ticking(life: Life, counter: str, share: float, duration: int) -> None:
    """Let ``share`` of the servo's ticks be bad for ``duration``, by its own counter."""
    count = 0.0
    look = type(life).look
    for _ in range(duration // TURN):
        count += share * TURN / (2 * MS)
        life.look = lambda count=count: replace(look(life), servo=replace(look(life).servo, **{counter: int(count)}))
        life.turn()


@pytest.mark.parametrize(("counter", "share"), [("clipped_ticks", 0.5), ("skipped_ticks", 0.04)])
def test_trouble_within_its_share_goes_on_for_ever(counter, share):
    life = Life().arm()
    ticking(life, counter, share, 60 * S)
    assert life.mode is Mode.ACTIVE


@pytest.mark.parametrize(("counter", "share", "after"), [("clipped_ticks", 0.6, 5 * S), ("skipped_ticks", 0.15, 1 * S)])
def test_trouble_beyond_its_share_stops_when_the_budget_is_used_up(counter, share, after):
    life = Life().arm()
    ticking(life, counter, share, after - 5 * TURN)
    assert life.mode is Mode.ACTIVE
    life = Life().arm()
    ticking(life, counter, share, after + 5 * TURN)
    assert life.mode is Mode.SOFT_STOP or life.state.causes


def test_a_servo_that_counts_from_zero_again_is_a_new_servo():
    case = Case(Mode.ACTIVE)
    case.state = replace(case.state, skipped_ticks=10**9, clipped_ticks=10**9)
    case.seen = replace(case.seen, servo=replace(case.seen.servo, skipped_ticks=1, clipped_ticks=2))
    decision = case.step()
    assert decision.reasons == ()
    assert (decision.state.late_ns, decision.state.clipped_ns) == (1 * MS, 0)  # 2 ms less 1, 4 ms less 10


def test_a_bucket_that_ran_over_is_empty_in_a_time_one_can_wait_for():
    life = Life().arm()
    life.begin("limits clip")
    life.begin("servo late")
    life.pass_time(60 * S)
    assert (life.state.clipped_ns, life.state.late_ns) == (1 * S, 200 * MS)
    life.begun.clear()
    life.pass_time(4 * S)
    assert (life.state.clipped_ns, life.state.late_ns) == (0, 0)
    assert life.mode is Mode.READY


@pytest.mark.parametrize("fields", [{"stopped": "no_lease"}, {"nonfinite": True}])
def test_what_a_servo_says_of_an_older_arming_stops_no_new_one(fields):
    case = Case(Mode.ACTIVE)
    case.seen = replace(case.seen, servo=replace(case.seen.servo, arming=2, **fields))
    assert case.step().reasons == ()


def test_what_a_device_says_of_an_older_arming_stops_no_new_one():
    case = Case(Mode.ACTIVE)
    case.seen = device(0, arming=2, stopped="silence")(case.seen, 0)
    assert case.step().reasons == ()
