"""Adversarial streams through the limiter, judged by an oracle that shares nothing with it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import limit_fuzz, limit_oracle, limits_source

from chatvla_edge.runtime.arm_model import load_arm
from chatvla_edge.runtime.limits import KINDS, Limiter

ARMS = limit_fuzz.arms(load_arm)


def judged(module, name, seed, ticks):
    arguments, bounds, start = ARMS[name]
    rng = np.random.default_rng([seed, list(ARMS).index(name)])
    limiter = module.Limiter(**arguments)
    wanted, times, brake = limit_fuzz.stream(rng, bounds, start, ticks)
    begin = int(times[0]) - bounds.period_ns
    commands, answers = limit_fuzz.run(limiter, start, begin, wanted, times, brake)
    return limiter, commands, answers, limit_oracle.violations(bounds, start, begin, times, commands)


@pytest.mark.parametrize("name", ARMS)
def test_no_limit_is_broken_in_ten_thousand_ticks_and_the_arm_can_stop_after_them(name):
    # Nine arms and rates: 108 000 ticks in all. Ten million: benchmarks/fuzz_limits.py.
    limiter, commands, _, violations = judged(limits_source.MODULES["compiled"], name, 1, 12_000)
    assert not any(violations.values()), violations
    counted = np.frombuffer(limiter.counts, dtype=np.int64).reshape(len(KINDS), -1)
    assert (
        (counted[[KINDS.index(kind) for kind in ("position", "velocity", "nonfinite", "time")]] > 0).any(axis=1).all()
    )
    # It did move: a limiter that never lets go breaks nothing either.
    assert (np.ptp(commands, axis=0) > 0.02).all()
    now = 10**15
    for _ in range(3000):
        now += ARMS[name][1].period_ns
        limiter.brake(now)
    assert limiter.standing()


@pytest.mark.parametrize("name", ["panda@5000us+walls", "fr3@2000us", "arx@2000us"])
def test_the_interpreted_source_breaks_no_limit_either(name):
    _, _, _, violations = judged(limits_source.MODULES["interpreted"], name, 3, 1200)
    assert not any(violations.values()), violations


@pytest.mark.parametrize("name", ARMS)
def test_compiled_and_interpreted_agree_to_the_last_bit(name):
    results = [judged(module, name, 2, 1500) for module in limits_source.MODULES.values()]
    (one, first, answers, _), (two, second, same, _) = results
    assert first.tobytes() == second.tobytes()
    assert (answers == same).all()
    assert list(one.counts) == list(two.counts)
    assert list(one.speed) == list(two.speed)


@st.composite
def arms(draw):
    n = draw(st.integers(1, 4))
    number = lambda low, high: st.floats(low, high, allow_nan=False)  # noqa: E731
    lower = np.array(draw(st.lists(number(-4, 1), min_size=n, max_size=n)))
    span = np.array(draw(st.lists(number(1e-3, 5), min_size=n, max_size=n)))
    velocity = np.array(draw(st.lists(number(0.01, 6), min_size=n, max_size=n)))
    acceleration = np.array(draw(st.lists(number(0.05, 40), min_size=n, max_size=n)))
    # A jerk limit that takes at most two seconds to reach the acceleration limit.
    jerk = acceleration * np.array(draw(st.lists(number(0.5, 2000), min_size=n, max_size=n)))
    period = draw(st.sampled_from([500_000, 1_000_000, 2_000_000, 4_000_000, 10_000_000]))
    start = lower + span * np.array(draw(st.lists(st.sampled_from([0, 1e-12, 0.5, 0.99, 1]), min_size=n, max_size=n)))
    start = np.clip(start, lower, lower + span)
    return limit_oracle.Bounds(lower, lower + span, velocity, acceleration, jerk, period), start


@settings(max_examples=150, deadline=None)
@given(arms(), st.integers(0, 2**32))
def test_no_limit_of_any_arm_is_broken_by_any_stream(arm, seed):
    bounds, start = arm
    limiter = Limiter(
        *(x.tolist() for x in (bounds.lower, bounds.upper, bounds.velocity, bounds.acceleration, bounds.jerk)),
        bounds.period_ns,
    )
    wanted, times, brake = limit_fuzz.stream(np.random.default_rng(seed), bounds, start, 600)
    begin = int(times[0]) - bounds.period_ns
    commands, _ = limit_fuzz.run(limiter, start, begin, wanted, times, brake)
    violations = limit_oracle.violations(bounds, start, begin, times, commands)
    assert not any(violations.values()), violations


# ------------------------------------------------------------------------------------------ the oracle itself is tested

BOUNDS = ARMS["fr3@1000us"][1]


def feasible(count=400):
    """A slow feasible swing of all joints from rest, at the fr3's 1 kHz."""
    t = np.arange(1, count + 1)[:, None] * 1e-3
    commands = limit_fuzz.HOME + 0.02 * (1 - np.cos(2.0 * t)) * np.ones(7)
    return commands, 10**9 + np.arange(1, count + 1) * 1_000_000


def found(commands, ticks, bounds=BOUNDS):
    return {k for k, n in limit_oracle.violations(bounds, limit_fuzz.HOME, 10**9, ticks, commands).items() if n}


def test_the_oracle_finds_nothing_in_a_feasible_stream():
    assert found(*feasible()) == set()


@pytest.mark.parametrize(
    ("spoil", "kinds"),
    [
        (lambda q: q.__setitem__((200, 3), np.nan), {"nonfinite"}),
        (lambda q: q.__setitem__((slice(200, None), 2), q[200:, 2] + 3e-3), {"velocity", "acceleration", "jerk"}),
        (lambda q: q.__setitem__((slice(200, None), 2), q[200:, 2] + 1.2e-5), {"acceleration", "jerk"}),
        (lambda q: q.__setitem__((slice(200, None), 2), q[200:, 2] + 6e-6), {"jerk"}),
        (lambda q: q.__setitem__((slice(200, None), 5), q[200:, 5] + 3.0), {"position", "velocity"}),
    ],
)
def test_the_oracle_finds_what_is_planted(spoil, kinds):
    commands, ticks = feasible()
    spoil(commands)
    assert kinds <= found(commands, ticks)


def test_the_oracle_knows_the_velocity_curve_and_the_walls():
    t = np.arange(1, 200)[:, None] * 1e-3
    # At a constant 1.0 rad/s into the region where the FR3's second joint may do less.
    commands = np.tile(limit_fuzz.HOME, (199, 1))
    commands[:, 1] = 1.6 + t[:, 0] * 0.9
    assert "velocity" in found(commands, 10**9 + np.arange(1, 200) * 1_000_000)
    _, bounds, _ = ARMS["fr3@1000us+walls"]
    assert "workspace" in found(
        np.tile([0.0, -1.5, 0, -2.8, 0, 1.6, 0], (5, 1)), np.arange(5) * 10**6 + 2 * 10**9, bounds
    )


def test_the_oracle_knows_when_the_clock_lets_the_arm_move():
    ticks = 10**9 + np.array([1_000_000, 1_400_000, 2_000_000, 900_000, 1_900_000, 10**9, 2**62 + 1, -5])
    assert limit_oracle.advances(BOUNDS, 10**9, ticks).tolist() == (
        ["step", "repeat", "step", "brake", "step", "restart", "brake", "brake"]
    )
    commands, ticks = feasible()
    ticks[100:] -= 700_000
    assert "repeat" in found(commands, ticks)


def test_the_vendors_velocity_formula_is_the_one_in_the_arms_file():
    model = load_arm("fr3")
    q = np.random.default_rng(0).uniform(model.lower, model.upper, (2000, 7))
    lower, upper = limit_oracle.fr3_velocity(q)
    offset, deceleration, low, high = model.curve
    ahead = np.sqrt(np.maximum(0, 2 * deceleration * (high - q))) - offset
    behind = np.sqrt(np.maximum(0, 2 * deceleration * (q - low))) - offset
    np.testing.assert_allclose(upper, np.clip(ahead, 0, model.velocity), atol=1e-12)
    np.testing.assert_allclose(-lower, np.clip(behind, 0, model.velocity), atol=1e-12)
