"""Lease, emergency stop and heartbeats: what each promises, across processes too."""

import os
import subprocess
import sys
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatvla_edge.runtime.pages import LONGEST_LEASE_NS, EmergencyStop, Heartbeats, Lease
from chatvla_edge.runtime.realtime import now_ns

MS = 1_000_000


def arbiter_and_servo() -> tuple[Lease, Lease]:
    servo = Lease.create("lease")
    return Lease.attach(servo.fd, write=True), servo


# ------------------------------------------------------------------------------------------------------------- lease


def test_a_lease_that_was_never_granted_has_expired():
    _, servo = arbiter_and_servo()
    assert servo.expired()
    assert servo.left_ns() == 0


def test_a_granted_lease_runs_out_at_its_instant():
    arbiter, servo = arbiter_and_servo()
    expiry = arbiter.grant(100 * MS)
    assert not servo.expired()
    assert 0 < servo.left_ns() <= 100 * MS
    assert servo.left_ns(expiry - 1) == 1
    assert not servo.expired(expiry - 1)
    assert servo.expired(expiry)
    assert servo.expired(expiry + 10**15)


def test_a_grant_replaces_the_one_before_and_a_revocation_ends_it():
    arbiter, servo = arbiter_and_servo()
    long = arbiter.grant(100 * MS)
    short = arbiter.grant(1 * MS)
    assert short < long
    assert servo.expired(short)
    arbiter.grant(100 * MS)
    arbiter.revoke()
    assert servo.expired()


def test_a_lease_until_an_instant_is_not_prolonged_by_a_late_grant():
    arbiter, servo = arbiter_and_servo()
    decided = now_ns()
    arbiter.grant_until(decided + 100 * MS)
    assert servo.left_ns(decided) == 100 * MS
    arbiter.grant_until(decided)  # as if it had been kept from granting for a whole lease
    assert servo.expired()


@pytest.mark.parametrize("ahead", [2 * LONGEST_LEASE_NS, -(10**19)])
def test_an_instant_too_far_ahead_or_before_time_is_refused(ahead):
    arbiter, servo = arbiter_and_servo()
    with pytest.raises((ValueError, OverflowError)):
        arbiter.grant_until(now_ns() + ahead)
    with pytest.raises(ValueError, match="expected at most"):
        arbiter.grant_until(0)
    with pytest.raises(PermissionError, match="only the arbiter"):
        servo.grant_until(now_ns())
    assert servo.expired()


@pytest.mark.parametrize("duration", [0, -1, LONGEST_LEASE_NS + 1])
def test_a_lease_longer_than_any_reaction_is_not_granted(duration):
    arbiter, servo = arbiter_and_servo()
    with pytest.raises(ValueError, match="expected 1 to 1000000000"):
        arbiter.grant(duration)
    assert servo.expired()


@settings(deadline=None)  # a shared machine stalls for longer than any example takes
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**62))
def test_a_damaged_word_is_no_lease(word, now):
    _, servo = arbiter_and_servo()
    os.pwrite(servo.fd, word.to_bytes(8, "little"), 64)
    assert servo.expired(now) == (not 0 < word - now <= LONGEST_LEASE_NS)


def test_only_the_one_arbiter_grants():
    arbiter, servo = arbiter_and_servo()
    with pytest.raises(PermissionError, match="only the arbiter"):
        servo.grant(MS)
    with pytest.raises(PermissionError, match="only the arbiter"):
        servo.revoke()
    with pytest.raises(BlockingIOError, match="lease has a writer already"):
        Lease.attach(servo.fd, write=True)
    assert arbiter.writable


# ---------------------------------------------------------------------------------------------------- emergency stop

RAISE = """
import sys
from chatvla_edge.runtime.pages import EmergencyStop
EmergencyStop.attach(int(sys.argv[1])).raise_stop()
"""


def test_any_process_raises_the_stop_and_everybody_sees_it():
    owner = EmergencyStop.create("stop")
    other = EmergencyStop.attach(owner.fd)
    assert not owner.raised
    assert owner.last_raise() is None
    before = now_ns()
    subprocess.run([sys.executable, "-c", RAISE, str(owner.fd)], pass_fds=[owner.fd], check=True)
    assert owner.raised
    assert other.raised
    at_ns, pid = other.last_raise()
    assert before <= at_ns <= now_ns()
    assert pid != os.getpid()


def test_only_the_owner_clears_and_only_explicitly():
    owner = EmergencyStop.create("stop")
    other = EmergencyStop.attach(owner.fd)
    other.raise_stop()
    with pytest.raises(PermissionError, match="only the process that created the stop"):
        other.clear(1)
    assert owner.raised
    assert owner.clear(owner.count)
    assert not owner.raised
    assert not other.raised


def test_a_stop_pressed_between_the_look_and_the_clear_stays():
    owner = EmergencyStop.create("stop")
    owner.raise_stop()
    seen = owner.count
    EmergencyStop.attach(owner.fd).raise_stop()
    assert not owner.clear(seen)
    assert owner.raised
    assert owner.clear(owner.count)


def test_a_count_that_was_never_reached_clears_nothing():
    owner = EmergencyStop.create("stop")
    with pytest.raises(ValueError, match="clearing up to raise 1; expected 0 to 0"):
        owner.clear(1)
    owner.raise_stop()
    owner.clear(1)
    with pytest.raises(ValueError, match="clearing up to raise 0; expected 1 to 1"):
        owner.clear(0)


@pytest.mark.parametrize(("order", "sound"), [(("cleared", "raised"), True), (("raised", "cleared"), False)])
def test_the_order_of_the_two_loads_matters(order, sound):
    """A reader's two loads anywhere between: press, press again, clear the first press. The stop stands throughout."""
    history = [{"raised": 1, "cleared": 0}, {"raised": 2, "cleared": 0}, {"raised": 2, "cleared": 1}]
    moments = [*combinations(range(3), 2), *((at, at) for at in range(3))]
    looks = [history[first][order[0]] != history[second][order[1]] for first, second in moments]
    assert all(looks) == sound


# -------------------------------------------------------------------------------------------------------- heartbeats


def test_each_process_beats_its_own_line():
    watched = Heartbeats.create("heartbeats", 3)
    child = Heartbeats.attach(watched.fd, 3)
    assert [watched.last_ns(line) for line in range(3)] == [0, 0, 0]
    before = now_ns()
    child.beat(1)
    assert watched.last_ns(0) == watched.last_ns(2) == 0
    assert before <= watched.last_ns(1) <= now_ns()


@pytest.mark.parametrize("line", [-1, 3, 10**6])
def test_a_line_outside_the_page_is_refused(line):
    page = Heartbeats.create("heartbeats", 3)
    with pytest.raises(IndexError, match=rf"heartbeats: line {line}; expected 0 to 2"):
        page.beat(line)
    with pytest.raises(IndexError):
        page.last_ns(line)


def test_both_sides_agree_on_the_number_of_lines():
    page = Heartbeats.create("heartbeats", 3)
    with pytest.raises(ValueError, match=r"geometry \(3, 0, 0\)"):
        Heartbeats.attach(page.fd, 4)
    with pytest.raises(ValueError, match="0 lines"):
        Heartbeats.create("none", 0)
