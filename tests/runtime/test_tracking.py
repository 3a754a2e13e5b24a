"""Tracking: feasible targets come out unchanged, others are met as fast as the limits allow, and limits are kept."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatvla_edge.runtime.limits import KINDS, Limiter
from chatvla_edge.runtime.tracking import Tracker

T = 2_000_000
DT = 0.002
LIMITS = {"lower": -2.0, "upper": 2.0, "velocity": 1.5, "acceleration": 8.0, "jerk": 400.0}


def tracker(joints=1, period_ns=T, **changes):
    return Tracker(*([value] * joints for value in (LIMITS | changes).values()), period_ns)


def follow(tracked, targets):
    """Positions [k, n] for targets [k, n]."""
    target, position = np.asarray(tracked.target), np.asarray(tracked.position)
    out = []
    for row in np.reshape(targets, (len(targets), -1)):
        target[:] = row
        tracked.advance()
        out.append(position.copy())
    return np.array(out)


def differences(positions, start=0.0, dt=DT):
    q = np.vstack([np.broadcast_to(start, (3, positions.shape[1])), positions])
    v = np.diff(q, axis=0) / dt
    a = np.diff(v, axis=0) / dt
    return np.abs(v).max(), np.abs(a).max(), np.abs(np.diff(a, axis=0)).max() / dt


def kept(positions, start=0.0, dt=DT, **limits):
    v, a, j = differences(positions, start, dt)
    bound = LIMITS | limits
    assert v <= bound["velocity"] * (1 + 1e-6) + 1e-9
    assert a <= bound["acceleration"] * (1 + 1e-6) + 1e-6
    assert j <= bound["jerk"] * (1 + 1e-6) + 1e-3


def fresh(joints=1, at=0.0, **changes):
    tracked = tracker(joints, **changes)
    tracked.reset([at] * joints)
    return tracked


def test_a_feasible_target_comes_out_unchanged():
    t = np.arange(1, 3000)[:, None] * DT
    u = np.clip(t / [1.2, 2.0, 3.0], 0, 1)
    targets = [0.9, -0.6, 1.8] * u**3 * (10 - 15 * u + 6 * u * u) + 0.02 * t - 0.02 * np.sin(t)
    positions = follow(fresh(3), targets)
    assert (positions == targets).all()


@pytest.mark.parametrize("goal", [1.5, -0.7, 0.05, -1e-3, 1e-5])
def test_a_step_is_met_exactly_in_near_least_time_and_without_overshoot(goal):
    tracked = fresh()
    positions = follow(tracked, [goal] * 2000)[:, 0]
    kept(positions[:, None])
    met = int(np.nonzero(positions == goal)[0][0])
    assert (positions[met:] == goal).all()
    assert (tracked.speed[0], tracked.acceleration[0]) == (0.0, 0.0)
    # Rest to rest: v, a and j limits as far as each is reached.
    d, v, a, j = abs(goal), LIMITS["velocity"], LIMITS["acceleration"], LIMITS["jerk"]
    if d > v * v / a + v * a / j:
        least = d / v + v / a + a / j
    elif d > 2 * a**3 / j**2:
        least = a / j + math.sqrt((a / j) ** 2 + 4 * d / a)
    else:
        least = (32 * d / j) ** (1 / 3)
    assert met * DT <= least + 0.02
    assert (np.sign(goal) * (positions - goal)).max() <= 5e-5


def test_a_moving_target_is_caught_and_then_followed_without_lag():
    t = np.arange(1, 2500) * DT
    for targets in (0.3 + 0.5 * t, 0.4 + 0.5 * np.sin(1.5 * t), np.where(t < 2, 0, 0.3) + 0.4 * np.sin(t)):
        targets = np.clip(targets, -2, 1.9)
        positions = follow(fresh(), targets)
        kept(positions)
        quiet = slice(-400, None)
        assert (positions[quiet, 0] == targets[quiet]).all()


def test_linear_interpolation_between_actions_is_rounded_off_and_kept_close():
    knots = 0.5 * np.sin(np.arange(300) * 0.02 * 2)
    targets = np.interp(np.arange(1, 2900) * DT, np.arange(300) * 0.02, knots)
    positions = follow(fresh(), targets)[:, 0]
    kept(positions[:, None])
    assert np.abs(positions - targets)[500:].max() < 4e-4


def test_targets_beyond_the_range_are_taken_to_its_end():
    for side in (1, -1):
        positions = follow(fresh(), [side * 9.0] * 2500)
        assert positions[-1, 0] == side * 2.0
        assert abs(positions).max() <= 2.0 + 1e-4
        kept(positions)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_target_that_is_no_number_is_not_followed_but_counted(bad):
    tracked = fresh(2)
    follow(tracked, [[0.5, 0.5]] * 40)
    positions = follow(tracked, [[bad, 0.5]] * 400)
    assert tracked.refused == 400
    assert (positions[:, 0] == positions[:, 1]).all()
    assert positions[-1, 0] == 0.5


def test_slow_motion_is_slow_in_velocity_and_acceleration_and_still_arrives():
    tracked = fresh()
    tracked.set_speed(0.1)
    positions = follow(tracked, [0.3] * 3000)
    kept(positions, velocity=0.15)
    steps = np.diff(np.concatenate([[[0.0]], positions]), axis=0)[:, 0] / DT
    assert steps.max() == pytest.approx(0.15, rel=1e-3)
    assert np.diff(steps).max() / DT == pytest.approx(0.8, rel=1e-3)
    assert positions[-1, 0] == 0.3


def test_slowing_down_in_motion_and_speeding_up_again_keeps_acceleration_and_jerk():
    tracked = fresh()
    first = follow(tracked, [1.9] * 250)
    tracked.set_speed(0.1)
    second = follow(tracked, [1.9] * 400)
    assert np.diff(second[-50:, 0]).max() == pytest.approx(0.15 * DT, rel=1e-6)
    tracked.set_speed(1.0)
    third = follow(tracked, [1.9] * 1500)
    kept(np.concatenate([first, second, third]))
    assert third[-1, 0] == 1.9


def test_it_goes_on_from_the_limiters_state():
    # The arm lags too far behind for a while, so the limiter brakes; then it may go on.
    limiter = Limiter([-2.01], [2.01], [1.6], [8.5], [440.0], T, lag=[0.1])
    limiter.reset([0.0], 10**9)
    tracked = fresh()
    measured = np.asarray(limiter.measured)
    now, sent, answers = 10**9, [], []
    for k in range(1500):
        now += T
        np.asarray(limiter.wanted)[0] = follow(tracked, [1.0])[0, 0]
        measured[0] = limiter.command[0] - (0.2 if 150 <= k < 210 else 0.0)
        answers.append(limiter.tick(now))
        if answers[-1]:
            tracked.resume(limiter)
        sent.append(limiter.command[0])
    assert set(answers[150:210]) == {1 << KINDS.index("following")}
    assert set(answers[:150] + answers[210:]) == {0}
    assert max(sent) <= 1.0 + 5e-5
    assert sent[-1] == 1.0


def test_a_limiter_that_is_the_slower_one_is_not_fought():
    # A mistake in a rig: it costs swings, which stay bounded, and clips, which are counted.
    limiter = Limiter([-2.0], [2.0], [0.5], [4.0], [200.0], T)
    limiter.reset([0.0], 10**9)
    tracked = fresh()
    now, sent = 10**9, []
    for _ in range(2500):
        now += T
        np.asarray(limiter.wanted)[0] = follow(tracked, [1.0])[0, 0]
        if limiter.tick(now):
            tracked.resume(limiter)
        sent.append(limiter.command[0])
    assert max(sent) <= 1.0 + 0.03
    assert abs(sent[-1] - 1.0) < 0.01


def test_within_wider_limits_nothing_is_clipped():
    rng = np.random.default_rng(0)
    limiter = Limiter([-2.005] * 3, [2.005] * 3, [1.6] * 3, [8.5] * 3, [440.0] * 3, T)
    limiter.reset([0.0] * 3, 10**9)
    tracked = fresh(3)
    targets = rng.uniform(-2.5, 2.5, (60, 3)).repeat(rng.integers(1, 300, 60), axis=0)
    wanted, now = np.asarray(limiter.wanted), 10**9
    for row in targets:
        now += T
        wanted[:] = follow(tracked, [row])[0]
        limiter.tick(now)
    counts = np.asarray(limiter.counts).reshape(len(KINDS), -1).sum(axis=1)
    assert dict(zip(KINDS, counts.tolist(), strict=True)) == dict.fromkeys(KINDS, 0)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from([500_000, 1_000_000, 2_000_000, 5_000_000]),
    st.floats(0.1, 4),
    st.floats(0.5, 30),
    st.floats(2, 2000),
)
def test_any_stream_of_targets_keeps_the_limits(seed, period, velocity, acceleration, ratio):
    rng = np.random.default_rng(seed)
    limits = {"velocity": velocity, "acceleration": acceleration, "jerk": acceleration * ratio}
    tracked = fresh(2, period_ns=period, **limits)
    pieces = [
        rng.uniform(-2, 2, (1, 2)).repeat(rng.integers(1, 200), axis=0),
        rng.normal(0, 1, (150, 2)),
        rng.normal(0, 0.003, (200, 2)).cumsum(axis=0),
        np.sin(np.arange(200)[:, None] * rng.uniform(0.001, 0.5, 2)),
        np.where(np.arange(160)[:, None] // 20 % 2, 1.9, -1.9) * np.ones(2),
    ]
    order = rng.permutation(len(pieces))
    positions = follow(tracked, np.concatenate([pieces[k] for k in order]))
    dt = period * 1e-9
    v, a, j = differences(positions, dt=dt)
    rounding = 4e-15
    assert v <= velocity * (1 + 1e-9) + rounding / dt
    assert a <= acceleration * (1 + 1e-9) + rounding / dt**2
    assert j <= limits["jerk"] * (1 + 1e-9) + rounding / dt**3


def test_misuse_is_refused():
    for changes, message in [
        ({"jerk": math.nan}, "finite"),
        ({"velocity": 0.0}, "positive velocity"),
        ({"lower": 2.0}, "lower < upper"),
        ({"period_ns": 50_000}, "period_ns is 50000"),
    ]:
        with pytest.raises(ValueError, match=message):
            tracker(**changes)
    with pytest.raises(ValueError, match="finite numbers"):
        Tracker([0.0], [1.0, 2.0], [1.0], [1.0], [1.0], T)
    tracked = fresh(2)
    with pytest.raises(ValueError, match="expected 2 finite positions"):
        tracked.reset([0.0])
    with pytest.raises(ValueError, match="finite positions"):
        tracked.reset([0.0, math.nan])
    for scale in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="speed scale"):
            tracked.set_speed(scale)
    with pytest.raises(ValueError, match="fewer than the 2 tracked"):
        tracked.resume(Limiter([-1.0], [1.0], [1.0], [1.0], [1.0], T))
    with pytest.raises(TypeError):
        tracked.resume(None)
