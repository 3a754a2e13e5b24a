"""Trajectory time: bounds, stops along the path, and the exact end."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatvla_edge.runtime.tau import TauClock

JERKS = [math.inf, 40.0]
ticks = st.lists(
    st.tuples(st.floats(1e-4, 0.015), st.floats(0.0, 1.2), st.sampled_from([0.0, 0.0, 0.02, 0.3, 2.0])),
    min_size=1,
    max_size=150,
)


@pytest.mark.parametrize("jerk", JERKS)
def test_the_rate_reaches_its_target_and_stays(jerk):
    clock = TauClock(max_acceleration=4.0, max_jerk=jerk)
    for _ in range(500):
        clock.advance(0.002)
    assert (clock.rate, clock.acceleration) == (1.0, 0.0)
    before = clock.tau
    clock.advance(0.002)
    assert clock.tau - before == pytest.approx(0.002, abs=1e-15)


@pytest.mark.parametrize("jerk", JERKS)
@settings(max_examples=200, deadline=None)
@given(schedule=ticks)
def test_bounds_hold_whatever_is_asked_and_tau_never_passes_an_end_it_could_stop_before(jerk, schedule):
    clock = TauClock(max_rate=1.2, max_acceleration=4.0, max_jerk=jerk)
    end = math.inf
    for dt, target, room in schedule:
        if room:
            end = clock.tau + clock.stopping_tau() + room
        rate, acceleration, tau = clock.rate, clock.acceleration, clock.tau
        clock.advance(dt, target, end)
        assert 0 <= clock.rate <= 1.2 + 1e-12
        assert tau <= clock.tau <= end + 1e-9
        assert clock.tau - tau <= 1.2 * dt + 1e-12
        assert abs(clock.rate - rate) <= 4.0 * dt + 1e-9
        if math.isfinite(jerk):
            assert abs(clock.acceleration - acceleration) <= jerk * dt + 1e-9


@pytest.mark.parametrize("jerk", JERKS)
@settings(max_examples=100, deadline=None)
@given(end=st.floats(0.001, 1.5), dt=st.floats(0.0005, 0.01), speed=st.floats(0.05, 1.0))
def test_the_clock_comes_to_rest_exactly_at_the_end_of_the_path(jerk, end, dt, speed):
    clock = TauClock(max_acceleration=4.0, max_jerk=jerk)
    for _ in range(int((end / speed + 3.0) / dt)):
        clock.advance(dt, speed, end)
    assert (clock.tau, clock.rate, clock.acceleration) == (end, 0.0, 0.0)


@pytest.mark.parametrize("jerk", JERKS)
@settings(max_examples=100, deadline=None)
@given(cuts=st.lists(st.floats(1e-4, 0.015), min_size=2, max_size=40), target=st.floats(0, 1))
def test_the_profile_does_not_depend_on_how_time_is_cut(jerk, cuts, target):
    whole, cut = (TauClock(max_jerk=jerk, longest_tick=10.0) for _ in range(2))
    for clock in (whole, cut):
        clock.advance(0.1, 0.8)
    whole.advance(sum(cuts), target)
    for dt in cuts:
        cut.advance(dt, target)
    assert cut.tau == pytest.approx(whole.tau, abs=1e-9)
    assert cut.rate == pytest.approx(whole.rate, abs=1e-9)


@pytest.mark.parametrize("jerk", JERKS)
def test_a_stop_consumes_what_it_said_it_would(jerk):
    clock = TauClock(max_acceleration=4.0, max_jerk=jerk)
    for _ in range(70):
        clock.advance(0.002)
    expected = clock.tau + clock.stopping_tau()
    for _ in range(1000):
        clock.advance(0.002, 0.0)
    assert clock.rate == 0
    assert clock.tau == pytest.approx(expected, abs=1e-12)


def test_a_called_off_path_is_left_by_the_hardest_allowed_stop():
    clock = TauClock(max_acceleration=4.0)
    for _ in range(500):
        clock.advance(0.002)
    expected = clock.tau + 1.0 / (2 * 4.0)
    for _ in range(500):
        clock.advance(0.002, 1.0, -math.inf)
    assert clock.rate == 0
    assert clock.tau == pytest.approx(expected, abs=1e-12)


def test_time_that_stands_goes_back_or_is_nan_moves_nothing_and_a_gap_counts_as_one_long_tick():
    clock = TauClock(longest_tick=0.02)
    for _ in range(200):
        clock.advance(0.005)
    tau = clock.tau
    for dt in (0.0, -1.0, math.nan):
        assert clock.advance(dt) == tau
    assert clock.advance(3.0) == pytest.approx(tau + 0.02)
    assert clock.clipped == 1
    assert clock.advance(math.inf) == pytest.approx(tau + 0.04)
    assert clock.clipped == 2


def test_a_nan_or_negative_target_is_a_stop():
    for target in (math.nan, -1.0):
        clock = TauClock()
        for _ in range(500):
            clock.advance(0.002)
        for _ in range(500):
            clock.advance(0.002, target)
        assert clock.rate == 0


@pytest.mark.parametrize(
    "bounds",
    [
        {"max_rate": 0},
        {"max_acceleration": -1},
        {"max_acceleration": math.inf},
        {"max_jerk": 0},
        {"max_jerk": math.nan},
        {"longest_tick": math.nan},
        {"max_acceleration": 1e-4},
        {"tau": math.nan},
    ],
)
def test_bounds_that_are_none_are_refused(bounds):
    with pytest.raises(ValueError, match=r"must be|would take"):
        TauClock(**bounds)
