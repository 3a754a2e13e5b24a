"""Random lives of an arbiter: whatever happens to the rig and whatever operators press, what is promised holds.

The rules know the promises and the design's diagram, not how the arbiter decides.
"""

from itertools import pairwise

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from support.arbiter_rig import ROWS, TROUBLES, TURN, Life

from chatvla_edge.runtime.arbiter import ARMING, EDGES, REDUCING, Act, Request
from chatvla_edge.runtime.modes import ARMED, ERRANDS, LEASE_NS, MS, Mode, Reaction, S, Want

REQUESTS = st.one_of(
    st.sampled_from([Request(act) for act in Act]),
    st.builds(Request, st.just(Act.SPEED), speed=st.floats(allow_nan=True)),
    st.builds(Request, st.just(Act.CLEAR), seen=st.integers(0, 3)),
)


MILD = [name for name in TROUBLES if ROWS[name].reaction <= Reaction.HOLD]


class Lives(RuleBasedStateMachine):
    """One rig, its troubles and its operators."""

    def __init__(self) -> None:
        super().__init__()
        self.life = Life()
        self.armed = False  # by an accepted `arm`, by nothing else
        self.armings = 0

    def turn(self, *requests: Request, after: int = TURN) -> None:
        life = self.life
        before = life.state
        decision = life.turn(*requests, after=after)
        now, state, reasons = life.now, decision.state, decision.reasons
        accepted = {reply.request.act for reply in decision.replies if reply.accepted}

        # The diagram: moves follow one another along its edges, and say truly where they begin and end.
        path = [before.mode, *(to for _, to in decision.moves)]
        assert tuple(pairwise(path)) == decision.moves
        assert set(decision.moves) <= EDGES
        assert path[-1] is state.mode

        # Motion begins with an accepted arm, which nothing stood against, and each of them counts.
        if (Mode.READY, Mode.ACTIVE) in decision.moves:
            assert accepted & ARMING
            assert not [reason for reason in decision.blocking if Act.ARM in accepted or reason.condition.of_errands]
            assert not any(request.act in REDUCING for request in requests)
            self.armed, self.armings = True, self.armings + 1
        if state.mode not in ARMED:
            self.armed = False
        assert (state.mode in ARMED) == self.armed
        assert state.arming == self.armings

        # The lease: at most 100 ms ahead, only while armed; tau runs only where nothing says otherwise.
        assert state.lease_until_ns == (now + LEASE_NS if self.armed else 0)
        worst = max((reason.condition.reaction for reason in reasons), default=Reaction.NOTE)
        if decision.order.want in ERRANDS:
            assert self.armed
            # It begins in a step that was judged without it, where what concerns the policy is told all the same.
            assert not [reason for reason in reasons if reason.condition.reaction >= Reaction.HOLD
                        and (before.errand or reason.condition.of_errands) and before.mode is Mode.ACTIVE]  # fmt: skip
        if decision.order.want is Want.TRACK:
            assert self.armed
            # An arm begins in a step that was judged unarmed, in which a refusal-only row would have refused it.
            assert worst < Reaction.HOLD
        assert decision.order.want in (Want.REST, Want.BRAKE) or self.armed
        if before.mode in ARMED and now >= before.lease_until_ns:
            assert state.mode in (Mode.SOFT_STOP, Mode.FAULT, Mode.DISARMED)
        if before.mode in ARMED and worst is Reaction.FAULT:
            assert state.mode is Mode.FAULT

        # A fault is left by an operator who could have seen it.
        if before.mode is Mode.FAULT and state.mode is not Mode.FAULT:
            assert state.mode is Mode.DISARMED
            assert accepted & {Act.DISARM, Act.CLEAR}

        # What reduces is never refused; what is refused says why.
        for reply in decision.replies:
            assert reply.accepted or reply.request.act not in REDUCING
            assert reply.text
            if not reply.accepted and reply.request.act is Act.ARM and state.mode is Mode.DISARMED:
                alone = not any(request.act in REDUCING for request in requests)
                assert not alone or set(reply.reasons) == set(decision.blocking)
        assert 0 < state.speed <= 1

        # Reasons: most severe first, each once, and every trouble that is a plain fact is among them.
        ranks = [list(ROWS).index(reason.condition.name) for reason in reasons]
        assert ranks == sorted(ranks, reverse=True)
        assert len({reason.key for reason in reasons}) == len(reasons)
        for name in life.begun:
            row = ROWS[name]
            at_once = not row.lasting_ns and not row.at_least
            if before.errand and not row.of_errands:
                assert row not in [reason.condition for reason in reasons], name
            elif at_once and before.mode in row.judged_in and name not in SPOILT:
                assert row in [reason.condition for reason in reasons], name

    @rule(after=st.sampled_from([0, 1, MS, TURN, TURN, TURN, 60 * MS, LEASE_NS - 1, LEASE_NS, 1 * S]))
    def time_passes(self, after: int) -> None:
        self.turn(after=after)

    @rule(turns=st.integers(1, 40))
    def nothing_happens(self, turns: int) -> None:
        for _ in range(turns):
            self.turn()

    @rule(requests=st.lists(REQUESTS, min_size=1, max_size=3))
    def operators_ask(self, requests: list[Request]) -> None:
        self.turn(*requests)

    @rule()
    def an_operator_insists_on_moving(self) -> None:
        self.life.begun.clear()
        self.life.stuck = False
        self.turn(Request(Act.CLEAR))
        self.turn(Request(Act.RESUME))
        for _ in range(30):
            self.turn()
        self.turn(Request(Act.ARM))

    @rule(name=st.sampled_from(sorted(TROUBLES)))
    def trouble_begins(self, name: str) -> None:
        self.life.begun.setdefault(name, self.life.now)

    @rule(name=st.sampled_from(MILD))
    def mild_trouble_begins(self, name: str) -> None:
        self.life.begun.setdefault(name, self.life.now)

    @rule(name=st.sampled_from(MILD))
    def a_long_hold(self, name: str) -> None:
        self.life.begun.setdefault(name, self.life.now)
        for _ in range(11 * S // (90 * MS)):
            self.turn(after=90 * MS)  # just in time for the lease

    @rule(data=st.data())
    def trouble_ends(self, data: st.DataObject) -> None:
        if self.life.begun:
            self.life.end(data.draw(st.sampled_from(sorted(self.life.begun))))

    @rule(stuck=st.booleans())
    def the_arm_does_not_come_to_rest(self, stuck: bool) -> None:
        self.life.stuck = stuck

    @rule(back=st.integers(1, 10 * S))
    def time_goes_back(self, back: int) -> None:
        before, now = self.life.state, self.life.now
        with pytest.raises(ValueError, match="is before the last step"):
            self.life.turn(after=-back)
        self.life.now = now
        assert self.life.state is before

    @invariant()
    def a_soft_stop_is_short(self) -> None:
        state = self.life.state
        if state.mode is Mode.SOFT_STOP:
            assert state.now_ns - state.entered_ns <= 2 * S


# Words about the current arming are void while another trouble pretends that the servo acts on an older one.
SPOILT = {"servo stopped", "command not finite", "device stopped", "servo disobeys", "parked"}

Lives.TestCase.settings = settings(
    max_examples=80, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestLives = Lives.TestCase
