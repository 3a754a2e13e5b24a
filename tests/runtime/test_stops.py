"""A stop: three phases of whole steps that end at rest, judged by walking through them sample by sample."""

import itertools
import math
import random
from array import array

import pytest
from support import limits_source

limits = limits_source.MODULES["interpreted"]


def plan(v, a, top, change, dt, at=0):
    out = array("d", [math.nan] * (at + limits.STOP_SIZE))
    return out if limits.plan_stop(v, a, top, change, dt, out, at) else None


def walk(stop, v, a, dt):
    """Velocities, accelerations, displacements of all samples, the start included."""
    speeds, accelerations, way = [v], [a], [0.0]
    for steps, slope in [(limits.STEPS_1, stop[limits.SLOPE_1]), (limits.STEPS_2, None)]:
        for _ in range(int(stop[steps])):
            a = a + slope if slope is not None else stop[limits.HOLD]
            v += a * dt
            speeds.append(v)
            accelerations.append(a)
            way.append(way[-1] + v * dt)
    for _ in range(int(stop[limits.STEPS_3])):
        a += stop[limits.SLOPE_3]
        v += a * dt
        speeds.append(v)
        accelerations.append(a)
        way.append(way[-1] + v * dt)
    return speeds, accelerations, way


def cases(count, seed):
    rng = random.Random(seed)
    for _ in range(count):
        top = 10 ** rng.uniform(-1, 2)
        change = top * 10 ** rng.uniform(-1.7, 1.5)
        dt = 10 ** rng.uniform(-3.5, -1)
        a = rng.choice([rng.uniform(-1, 1) * top, 0.0, top, -top, rng.uniform(-1, 1) * min(change, top)])
        v = rng.choice([rng.uniform(-3, 3), rng.gauss(0, 30) * top * dt, 0.0, -a * dt * rng.randint(0, 5) / 2])
        if abs(v) / top / dt < 2000:
            yield v, a, top, change, dt


def time_to_stop(v, a, top, jerk):
    """Least time, s, to bring v and a to zero under |a| <= top and |j| <= jerk, in continuous time."""
    if v + a * abs(a) / (2 * jerk) < 0:
        v, a = -v, -a
    peak = min(top, math.sqrt(max(0.0, jerk * v + a * a / 2)))
    return (
        (a + peak) / jerk + peak / jerk + max(0.0, (v + a * a / (2 * jerk) - peak * peak / jerk) / peak if peak else 0)
    )


def test_a_stop_ends_at_rest_within_its_limits_where_it_said_it_would():
    missed = total = 0
    for v, a, top, change, dt in cases(4000, seed=1):
        total += 1
        stop = plan(v, a, top, change, dt)
        if stop is None:
            missed += 1
            continue
        speeds, accelerations, way = walk(stop, v, a, dt)
        scale = max(abs(v), abs(a) * dt, 1e-9)
        length = scale * dt * len(way)
        assert max(map(abs, accelerations)) <= top * (1 + 1e-9)
        assert all(abs(y - x) <= change * (1 + 1e-9) for x, y in itertools.pairwise(accelerations))
        assert abs(speeds[-1]) <= 1e-7 * scale
        assert abs(accelerations[-1]) <= 1e-9 * top
        assert stop[limits.END] == pytest.approx(way[-1], abs=1e-7 * length)
        assert stop[limits.AHEAD] == pytest.approx(max(way), abs=1e-7 * length)
        assert stop[limits.BEHIND] == pytest.approx(min(way), abs=1e-7 * length)
        assert stop[limits.FASTEST] == pytest.approx(max(0.0, *speeds), abs=1e-7 * scale)
        assert stop[limits.SLOWEST] == pytest.approx(min(0.0, *speeds), abs=1e-7 * scale)
        first, second = int(stop[limits.STEPS_1]), int(stop[limits.STEPS_2])
        assert stop[limits.RAMPED] == pytest.approx(way[first], abs=1e-7 * length)
        assert stop[limits.ENTRY] == pytest.approx(speeds[first], abs=1e-7 * scale)
        assert stop[limits.EXIT] == pytest.approx(speeds[first + second], abs=1e-7 * scale)
    assert missed <= total * 1e-3


def test_a_stop_takes_hardly_more_steps_than_the_least_time():
    late = {}
    for v, a, top, change, dt in cases(4000, seed=2):
        stop = plan(v, a, top, change, dt)
        if stop is not None:
            steps = stop[limits.STEPS_1] + stop[limits.STEPS_2] + stop[limits.STEPS_3]
            extra = math.ceil(steps - time_to_stop(v, a, top, change / dt) / dt)
            late[extra] = late.get(extra, 0) + 1
    assert max(late) <= 8, late
    assert sum(late[k] for k in late if k <= 2) >= 0.99 * sum(late.values()), late


def test_a_stop_is_found_also_where_braking_is_nearly_done():
    # Around the states from which releasing the brake at full jerk ends at rest, whole steps fit worst.
    rng = random.Random(3)
    missed, late, total = 0, 0, 20000
    for _ in range(total):
        top = 10 ** rng.uniform(-1, 2)
        change = top * rng.uniform(0.03, 1)
        dt = 10 ** rng.uniform(-3.5, -1)
        a = rng.uniform(-1, 1) * top
        v = -a * abs(a) / change * dt / 2 * rng.uniform(0.8, 1.6)
        stop = plan(v, a, top, change, dt)
        if stop is None:
            missed += 1
        else:
            steps = stop[limits.STEPS_1] + stop[limits.STEPS_2] + stop[limits.STEPS_3]
            late += steps - time_to_stop(v, a, top, change / dt) / dt > 3
    assert missed <= 1e-3 * total
    assert late <= 0.02 * total


def test_a_stop_from_rest_goes_nowhere():
    stop = plan(0.0, 0.0, 10.0, 1.0, 0.002)
    assert [stop[k] for k in (limits.END, limits.AHEAD, limits.BEHIND, limits.FASTEST, limits.SLOWEST)] == [0.0] * 5
    assert stop[limits.HOLD] == 0.0


def test_a_stop_is_written_where_it_was_asked_for_and_nowhere_else():
    out = plan(1.0, 2.0, 10.0, 1.0, 0.002, at=3)
    assert all(math.isnan(x) for x in out[:3])
    assert out[3:] == plan(1.0, 2.0, 10.0, 1.0, 0.002)


def test_no_stop_is_invented_where_the_counts_do_not_settle():
    # Rare: every holding acceleration that fits the velocity misses one of the ramps.
    assert plan(-0.0049718750658171475, 1.064964384745813, 10.512270849343023, 0.0486118202011784, 4.371e-4) is None


def test_the_least_time_of_the_reference_is_what_a_fine_search_finds():
    # The yardstick of the test above, against brute force over the peak in continuous time.
    v, a, top, jerk = 0.3, 2.0, 4.0, 50.0
    best = math.inf
    for k in range(1, 4001):
        peak = top * k / 4000
        gained = v + a * a / (2 * jerk) - peak * peak / jerk
        if gained >= 0:
            best = min(best, (a + peak) / jerk + peak / jerk + gained / peak)
    assert time_to_stop(v, a, top, jerk) == pytest.approx(best, rel=1e-3)
