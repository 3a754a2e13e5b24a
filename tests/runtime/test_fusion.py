"""The fused trajectory against an independent account of what is due when (chunk_oracle.py)."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from chatvla_edge.runtime.chunks import COUNTER_NAMES, HEADER_DTYPE, Chunk
from chatvla_edge.runtime.fusion import MODES, SCHEDULES, Fusion
from chatvla_edge.runtime.knots import ActionLayout
from chatvla_edge.runtime.prefix import prefix_weights
from chatvla_edge.runtime.rot6d import turn_between, turned
from chatvla_edge.runtime.tau import TauClock

from . import chunk_oracle as oracle

DT = 0.02
SERVO = 0.002
JOINT = ActionLayout(["joint", "joint"])


class Stream:
    """A random life of a servo: chunks late, lost, reordered, broken; pauses, speed changes, epochs, restarts."""

    def __init__(self, seed, horizon, values, *, short=True, wild=True, restarts=True):
        self.rng = np.random.default_rng(seed)
        self.horizon = horizon
        self.values = values  # (rng, due times [H]) -> actions [H, 2]
        self.short = short
        self.wild = wild
        self.restarts = restarts and wild
        self.first_step = int(self.rng.choice([-1, 0, 1, 3]))
        self.delay_limit = int(0.6 * horizon * DT / SERVO)

    def run(self, fusion, ticks, on_tick):
        """Drives ``fusion`` and calls on_tick(tau, moved, fused, accepted, arrivals) once per tick."""
        rng, clock = self.rng, TauClock()
        fusion.reset(self.hold(0.0))
        epoch, target, flying, arrivals, accepted = 0, 1.0, [], [], []
        wanted = dict.fromkeys(COUNTER_NAMES, 0)
        next_query = 0
        for tick in range(ticks):
            if self.wild and rng.random() < 0.01:
                target = float(rng.choice([0.0, 0.3, 1.0, 1.0]))
            if self.restarts and rng.random() < 0.002:
                epoch += 1
                fusion.set_epoch(epoch)
                arrivals.clear()
                accepted.clear()
            if self.restarts and rng.random() < 0.002:
                epoch += 1
                fusion.reset(self.hold(clock.tau), epoch=epoch, tau=clock.tau)
                arrivals.clear()
                accepted.clear()
            if tick >= next_query:
                flying.append((tick + int(rng.integers(1, self.delay_limit)), self.observe(clock.tau, epoch)))
                next_query = tick + int(rng.integers(5, self.delay_limit))
            for item in [item for item in flying if item[0] <= tick]:
                flying.remove(item)
                if self.wild and rng.random() < 0.1:
                    continue  # lost
                chunk = self.spoil(item[1]) if self.wild else item[1]
                arrivals.append(oracle.Arrival(chunk, tick, clock.tau, epoch))
                expected = oracle.verdict(arrivals, len(arrivals) - 1, self.horizon)
                assert fusion.push(chunk) == expected
                wanted[expected] += 1
                if expected == "accepted":
                    accepted.append(chunk)
                    wanted["short"] += len(chunk.actions) < self.horizon
            before = clock.tau
            clock.advance(SERVO, target, fusion.path_end())
            fused = fusion.sample(clock.tau)
            wanted["starved_ticks"] += fused.starved
            on_tick(clock.tau, clock.tau > before, fused, accepted)
        counts = fusion.counts
        for name, value in wanted.items():
            if name not in ("superseded", "evicted", "seams"):
                assert counts[name] == value, name
        return counts

    def hold(self, tau):
        return self.values(self.rng, np.array([tau]))[0]

    def observe(self, tau, epoch):
        rows = int(self.rng.integers(5, self.horizon + 1)) if self.short and self.rng.random() < 0.1 else self.horizon
        due = tau + (np.arange(rows) + self.first_step) * DT
        return Chunk(self.values(self.rng, due), tau, DT, self.first_step, epoch)

    def spoil(self, chunk):
        kind = self.rng.random()
        if kind < 0.05:
            actions = chunk.actions.copy()
            actions[self.rng.integers(len(actions)), 0] = self.rng.choice([np.nan, np.inf, -np.inf, 1e9])
            return replace(chunk, actions=np.where(actions == 1e9, np.inf, actions))
        if kind < 0.08:
            return replace(chunk, tau_observation=chunk.tau_observation + 50.0)
        if kind < 0.11:
            return replace(chunk, tau_observation=chunk.tau_observation - 50.0)
        if kind < 0.14:
            return replace(chunk, epoch=chunk.epoch + 7)
        if kind < 0.17:
            return replace(chunk, actions=np.zeros((self.horizon + 3, 2)))
        if kind < 0.19:
            return replace(chunk, actions=np.zeros((0, 2)))
        return chunk


def clockwork(rng, due):
    """Actions whose value is the tau at which they are due: any misalignment shows as a difference."""
    return np.stack([due, -due], axis=1)


def noise(rng, due):
    return rng.normal(0, 1, (len(due), 2))


seeds = st.integers(0, 2**32)


@pytest.mark.parametrize("mode", ["switch", "blend", "ensemble", "rtc"])
@settings(max_examples=50, deadline=None)
@given(seed=seeds, cubic=st.booleans())
def test_every_action_is_executed_at_the_tau_it_is_due(mode, seed, cubic):
    stream = Stream(seed, 30, clockwork)
    fusion = Fusion(JOINT, 30, mode=mode, cubic=cubic, fade=0.0)

    def check(tau, moved, fused, accepted):
        chunk = oracle.newest(accepted, tau)
        if moved and chunk is not None and tau <= oracle.due(chunk)[-1]:
            assert abs(fused.value - [tau, -tau]).max() / DT < 1e-9

    stream.run(fusion, 1500, check)


def test_the_streams_of_these_tests_are_lives_worth_living():
    """Against a vacuous pass: what twenty of them contain."""
    moved_ticks, totals = [0], dict.fromkeys(COUNTER_NAMES, 0)
    for seed in range(20):
        stream = Stream(seed, 30, clockwork)

        def count(tau, moved, fused, accepted):
            moved_ticks[0] += moved and bool(accepted)

        for name, value in stream.run(Fusion(JOINT, 30), 1500, count).items():
            totals[name] += value
    assert moved_ticks[0] > 4000
    assert totals["accepted"] > 150
    for name in (
        "malformed",
        "old_epoch",
        "future_epoch",
        "future",
        "out_of_order",
        "not_finite",
        "superseded",
        "short",
    ):
        assert totals[name] > 0, name


@pytest.mark.parametrize("mode", ["blend", "ensemble", "rtc"])
@settings(max_examples=50, deadline=None)
@given(seed=seeds, cubic=st.booleans())
def test_a_seam_between_chunks_that_agree_leaves_no_trace(mode, seed, cubic):
    """Pauses, speeds, delays, losses and reorders included: where predictions agree, the fade has nothing to fade."""
    stream = Stream(seed, 30, clockwork, short=False, restarts=False)
    stream.first_step = min(stream.first_step, 0)
    fusion = Fusion(JOINT, 30, mode=mode, cubic=cubic)

    def check(tau, moved, fused, accepted):
        assert abs(fused.value - [tau, -tau]).max() / DT < 1e-9

    stream.run(fusion, 1500, check)


@pytest.mark.parametrize("mode", ["switch", "ensemble"])
@settings(max_examples=30, deadline=None)
@given(seed=seeds)
def test_without_a_fade_the_output_is_the_definition(mode, seed):
    stream = Stream(seed, 30, noise)
    fusion = Fusion(JOINT, 30, mode=mode, cubic=False, fade=0.0, gripper_fade=0.0, capacity=64, ensemble_decay=0.1)

    def check(tau, moved, fused, accepted):
        if not moved:
            return
        if mode == "switch":
            chunk = oracle.newest(accepted, tau)
            expected = None if chunk is None else oracle.linear(chunk, tau)
        else:
            expected = oracle.act_average(replaced(accepted), tau, 0.1)
        if expected is not None:
            np.testing.assert_allclose(fused.value, expected, atol=1e-9)

    stream.run(fusion, 1200, check)


def replaced(accepted):
    """One chunk per observation tau: the last look of a robot that stood."""
    return list({chunk.tau_observation: chunk for chunk in accepted}.values())


def test_the_ensemble_is_acts_when_every_step_is_queried():
    """ACT as published: a query per step, row t of the table is the chunk of step t, column the step acted on."""
    rng = np.random.default_rng(5)
    H, T, m, dt = 10, 60, 0.2, 1 / 32  # dt of few bits: a due time is the same number however it is added up
    table = np.full((T, T + H, 2), np.nan)
    fusion = Fusion(JOINT, H, mode="ensemble", fade=0.0, capacity=H, ensemble_decay=m)
    fusion.reset(np.zeros(2))
    for t in range(T):
        chunk = rng.normal(size=(H, 2))
        table[t, t : t + H] = chunk
        fusion.sample(t * dt - 1e-9)
        assert fusion.push(Chunk(chunk, t * dt, dt, 0)) == "accepted"
        populated = table[:, t][~np.isnan(table[:, t, 0])]
        weights = np.exp(-m * np.arange(len(populated)))
        expected = (populated * weights[:, None]).sum(0) / weights.sum()
        if t:  # at t = 0 the robot has not moved yet and holds
            np.testing.assert_allclose(fusion.sample(t * dt).value, expected, atol=1e-12)
    assert fusion.counts["evicted"] == 0


@pytest.mark.parametrize("mode", ["blend", "ensemble", "rtc"])
@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_position_is_continuous_and_the_velocity_step_bounded_at_every_seam(mode, seed):
    rng = np.random.default_rng(seed)
    wave = rng.uniform(0.5, 3, 2)

    def near(_, due):
        return np.sin(np.outer(due, wave)) + rng.normal(0, 0.02, 2) + rng.normal(0, 0.001, (len(due), 2))

    stream = Stream(seed, 30, near, wild=False, short=False)
    stream.first_step = min(stream.first_step, 0)
    fusion = Fusion(JOINT, 30, mode=mode)
    last = [None]

    def check(tau, moved, fused, accepted):
        if last[0] is not None:
            value, rate, tau_before = last[0]
            step = tau - tau_before
            # Mean of the rates at both ends, as the trapezoid has it; acceleration times step squared is the rest.
            assert np.abs(fused.value - value - step * (rate + fused.rate) / 2).max() < 3e-4
            assert np.abs(fused.value - value).max() < 10 * SERVO
        last[0] = (fused.value, fused.rate, tau)

    stream.run(fusion, 1500, check)


def test_a_robot_that_stands_keeps_its_output_to_the_bit_whatever_arrives():
    for mode in MODES:
        fusion = Fusion(JOINT, 30, mode=mode, sync_actions=10)
        fusion.reset([0.3, -0.3])
        held = fusion.sample(0.0).value
        for k in range(5):
            fusion.push(Chunk(np.full((30, 2), float(k)), 0.0, DT, -1))
            np.testing.assert_array_equal(fusion.sample(0.0).value, held)


def test_a_late_first_chunk_does_not_make_the_robot_lunge():
    fusion, clock = Fusion(JOINT, 30), TauClock()
    fusion.reset([0.0, 0.0])
    ramp = np.linspace(0, 1, 30)[:, None] * [1.0, 1.0]
    for _ in range(10_000):  # 20 s of thinking
        clock.advance(SERVO, 1.0, fusion.path_end())
        assert fusion.sample(clock.tau).starved
    assert clock.tau == 0
    assert fusion.push(Chunk(ramp, 0.0, DT, 0)) == "accepted"
    clock.advance(SERVO, 1.0, fusion.path_end())
    fused = fusion.sample(clock.tau)
    assert not fused.starved
    assert np.abs(fused.value).max() < 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_a_starved_robot_comes_to_rest_on_its_last_action(mode):
    fusion, clock = Fusion(JOINT, 30, mode=mode, sync_actions=30), TauClock()
    fusion.reset([0.0, 0.0])
    ramp = np.linspace(0, 1, 30)[:, None] * [1.0, 2.0]
    fusion.push(Chunk(ramp, 0.0, DT, 0))
    values = []
    for _ in range(1000):
        clock.advance(SERVO, 1.0, fusion.path_end())
        values.append(fusion.sample(clock.tau))
    assert values[-1].starved
    assert clock.rate == 0
    np.testing.assert_allclose(values[-1].value, [1.0, 2.0], atol=1e-5)
    step = np.abs(np.diff([value.value[1] for value in values], 2)) / SERVO
    assert step.max() < 4.0 * SERVO * 2 / (29 * DT) * 1.5 + 0.1


@settings(max_examples=40, deadline=None)
@given(seed=seeds, n=st.integers(1, 20), first_step=st.sampled_from([-1, 0, 2]))
def test_sync_executes_exactly_the_first_n_actions_of_each_chunk_and_waits(seed, n, first_step):
    rng = np.random.default_rng(seed)
    fusion, clock = Fusion(JOINT, 20, mode="sync", sync_actions=n, cubic=bool(seed % 2)), TauClock()
    fusion.reset([0.0, 0.0])
    held = np.zeros(2)
    for _ in range(4):
        start = clock.tau
        assert fusion.path_end() == start
        chunk = Chunk(rng.normal(size=(20, 2)), start, DT, first_step)
        assert fusion.push(chunk) == "accepted"
        early = Chunk(rng.normal(size=(20, 2)), start, DT, first_step)
        seen = []
        for tick in range(2000):
            clock.advance(SERVO, 1.0, fusion.path_end())
            seen.append((clock.tau, fusion.sample(clock.tau).value))
            if tick == 3:
                assert fusion.push(early) == "early"
        times, values = np.array([tau for tau, _ in seen]), np.array([value for _, value in seen])
        assert clock.rate == 0
        assert clock.tau == pytest.approx(start + n * DT, abs=1e-12)
        np.testing.assert_array_equal(values[-1], chunk.actions[n - 1])
        knots = np.vstack([held, chunk.actions[:n]])
        if not seed % 2:
            for column in range(2):
                expected = np.interp(times, start + np.arange(n + 1) * DT, knots[:, column])
                np.testing.assert_allclose(values[:, column], expected, atol=1e-9)
        held = chunk.actions[n - 1]
    assert fusion.counts["early"] == 4


@settings(max_examples=40, deadline=None)
@given(seed=seeds, mode=st.sampled_from(["switch", "blend", "ensemble", "rtc"]))
def test_a_gripper_never_leaves_the_hull_of_what_it_was_told(seed, mode):
    rng = np.random.default_rng(seed)
    fusion = Fusion(ActionLayout(["gripper"]), 20, mode=mode)
    fusion.reset([0.5])
    tau, told, last, at_seam = 0.0, [], 0.5, 0.5
    for _ in range(400):
        if rng.random() < 0.05:
            chunk = Chunk(rng.choice([0.0, 0.2, 1.0, 1.4], (20, 1)), tau, DT, -1)
            if fusion.push(chunk) == "accepted":
                told.append(chunk)
        tau += SERVO
        fused = fusion.sample(tau)
        value = fused.value[0]
        at_seam = last if fused.seam else at_seam
        neighbours = [at_seam]
        for chunk in told:
            x = np.clip((tau - oracle.due(chunk)[0]) / DT, 0, 19)
            neighbours += list(np.clip(chunk.actions[[math.floor(x), math.ceil(x)], 0], 0, 1))
        assert min(neighbours) - 1e-9 <= value <= max(neighbours) + 1e-9
        last = value


def pose(rng, turn, n):
    rows = []
    for _ in range(n):
        turn = Rotation.from_rotvec(rng.normal(0, 0.02, 3)) * turn
        rows.append(turn.as_matrix()[:, :2].T.ravel())
    return np.array(rows)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, mode=st.sampled_from(["switch", "blend", "ensemble", "rtc"]), cubic=st.booleans())
def test_rotations_stay_orthonormal_and_continuous_through_any_seam(seed, mode, cubic):
    rng = np.random.default_rng(seed)
    fusion = Fusion(ActionLayout(["rot6d"] * 6), 20, mode=mode, cubic=cubic)
    turn = Rotation.random(random_state=rng)
    fusion.reset(turn.as_matrix()[:, :2].T.ravel())
    tau, last = 0.0, None
    for _ in range(300):
        if rng.random() < 0.05:
            # Predictions up to 20 degrees apart; a policy whose rotations differ by more has no mean.
            seen = Rotation.from_rotvec(rng.normal(0, 0.1, 3)) * turn
            fusion.push(Chunk(pose(rng, seen, 20), tau, DT, -1))
        tau += SERVO
        value = fusion.sample(tau).value
        a, b = value[:3], value[3:]
        assert abs(a @ a - 1) + abs(b @ b - 1) + abs(a @ b) < 1e-9
        if last is not None and mode != "switch":
            assert np.linalg.norm(turn_between(last, value)) < 0.03
        last = value


def test_a_seam_between_opposite_rotations_goes_along_the_geodesic():
    fusion = Fusion(ActionLayout(["rot6d"] * 6), 50, fade=0.4)
    start = np.array([1.0, 0, 0, 0, 1, 0])
    axis = np.array([0.0, 0, 1])
    fusion.reset(start)
    fusion.push(Chunk(np.repeat(turned(3.0 * axis, start)[None], 50, 0), 0.0, DT, 0))
    angles = []
    for tick in range(1, 450):
        value = fusion.sample(tick * SERVO).value
        turn = turn_between(start, value)
        assert np.linalg.norm(np.cross(turn, axis)) < 1e-6
        angles.append(turn[2])
    assert (np.diff(angles) > -1e-9).all()
    assert angles[-1] == pytest.approx(3.0, abs=0.01)


def test_the_ensemble_of_rotations_is_near_the_chordal_mean():
    rng = np.random.default_rng(7)
    layout = ActionLayout(["rot6d"] * 6)
    for _ in range(50):
        base = Rotation.random(random_state=rng)
        turns = [Rotation.from_rotvec(rng.normal(0, np.radians(8), 3)) * base for _ in range(3)]
        fusion = Fusion(layout, 10, mode="ensemble", fade=0.0, ensemble_decay=0.0)
        fusion.reset(turns[0].as_matrix()[:, :2].T.ravel())
        for k, turn in enumerate(turns):
            fusion.push(Chunk(np.repeat(turn.as_matrix()[:, :2].T.ravel()[None], 10, 0), k * 1e-3, DT, 0))
            value = fusion.sample((k + 1) * 1e-3).value
        mean = Rotation.concatenate(turns).mean().as_matrix()[:, :2].T.ravel()
        assert np.degrees(np.linalg.norm(turn_between(mean, value))) < 2.0


def test_an_old_epochs_path_is_the_one_to_stop_on_and_a_new_chunk_continues_from_there():
    fusion, clock = Fusion(JOINT, 50), TauClock()
    fusion.reset([0.0, 0.0])
    fusion.push(Chunk(clockwork(None, np.arange(50) * DT), 0.0, DT, 0))
    for _ in range(200):
        clock.advance(SERVO, 1.0, fusion.path_end())
        fusion.sample(clock.tau)
    fusion.set_epoch(1)
    assert fusion.path_end() == -math.inf
    for _ in range(200):
        clock.advance(SERVO, 1.0, fusion.path_end())
        fused = fusion.sample(clock.tau)
        assert fused.value[0] == pytest.approx(clock.tau, abs=1e-9)
        assert fused.starved
    assert clock.rate == 0
    assert fusion.push(Chunk(np.zeros((50, 2)), clock.tau, DT, 0, epoch=0)) == "old_epoch"
    assert fusion.push(Chunk(np.zeros((50, 2)), clock.tau, DT, 0, epoch=1)) == "accepted"
    clock.advance(SERVO, 1.0, fusion.path_end())
    assert fusion.sample(clock.tau).value[0] == pytest.approx(fused.value[0], abs=1e-4)
    with pytest.raises(ValueError, match="not newer"):
        fusion.set_epoch(1)


@pytest.mark.parametrize("mode", ["blend", "ensemble", "rtc"])
def test_the_committed_prefix_is_what_is_then_executed(mode):
    rng = np.random.default_rng(11)
    fusion, clock = Fusion(JOINT, 50, mode=mode), TauClock()
    fusion.reset([0.0, 0.0])
    sent = []
    chunks = {0: 0.0, 100: 0.1, 230: 0.2}
    for tick in range(400):
        if tick in chunks:
            fusion.push(Chunk(rng.normal(0, 0.05, (50, 2)), clock.tau, DT, -1))
        clock.advance(SERVO, 1.0, fusion.path_end())
        sent.append((clock.tau, *fusion.sample(clock.tau).value))
    observed = clock.tau - 0.05
    prefix = fusion.committed_prefix(observed, -1, DT, 0.3)
    for _ in range(250):
        clock.advance(SERVO, 1.0, fusion.path_end())
        sent.append((clock.tau, *fusion.sample(clock.tau).value))
    times, values = np.array(sent)[:, 0], np.array(sent)[:, 1:]
    due = observed + (np.arange(50) - 1) * DT
    assert prefix.committed == 17  # due at -0.02 ... 0.28 s, and the one after the arrival
    for row in range(prefix.committed):
        executed = [np.interp(due[row], times, values[:, k]) for k in range(2)]
        np.testing.assert_allclose(prefix.actions[row], executed, atol=2e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_servos_mask_is_the_policys(schedule):
    fusion = Fusion(JOINT, 40, mode="rtc", prefix_schedule=schedule)
    fusion.reset([0.0, 0.0])
    fusion.push(Chunk(np.zeros((40, 2)), 0.0, DT, 0))
    fusion.sample(0.2)
    for delay, committed in [(0.0, 1), (0.1, 6), (0.11, 7), (5.0, 30), (math.nan, 1)]:
        prefix = fusion.committed_prefix(0.2, 0, DT, delay)
        assert prefix.committed == committed
        np.testing.assert_allclose(prefix.mask, prefix_weights(40, committed, 30, schedule), atol=1e-15)


def test_nothing_is_committed_without_a_plan():
    fusion = Fusion(JOINT, 20, mode="rtc")
    prefix = fusion.committed_prefix(0.0, -1, DT, 0.3)
    assert (prefix.committed, prefix.mask.any(), prefix.actions.any()) == (0, False, False)
    fusion.reset([1.0, 2.0])
    prefix = fusion.committed_prefix(0.0, -1, DT, 0.3)
    assert (prefix.committed, prefix.mask.any()) == (0, False)
    np.testing.assert_array_equal(prefix.actions, np.tile([1.0, 2.0], (20, 1)))
    fusion.push(Chunk(np.ones((20, 2)), 0.0, DT, 0))
    fusion.sample(0.01)
    assert fusion.committed_prefix(0.0, -1, DT, 0.1).committed > 0
    fusion.set_epoch(3)
    assert not fusion.committed_prefix(0.0, -1, DT, 0.1).mask.any()


def test_a_chunk_that_waits_for_tau_to_move_is_the_plan_already():
    fusion = Fusion(JOINT, 20, mode="rtc", fade=0.0)
    fusion.reset([0.0, 0.0])
    fusion.push(Chunk(np.ones((20, 2)), 0.0, DT, 0))
    prefix = fusion.committed_prefix(0.0, 0, DT, 0.1)
    assert prefix.committed == 6
    np.testing.assert_array_equal(prefix.actions[1:], np.ones((19, 2)))


def test_what_is_wrong_with_a_chunk_is_counted_by_name():
    layout = ActionLayout(["rot6d"] * 6)
    fusion = Fusion(layout, 5)
    good = np.tile([1.0, 0, 0, 0, 1, 0], (5, 1))
    ask = [
        ("unanchored", Chunk(good, 0.0, DT, 0)),
        None,
        ("malformed", Chunk(good, math.nan, DT, 0)),
        ("malformed", Chunk(good, 0.0, 0.0, 0)),
        ("malformed", Chunk(good, 0.0, math.nan, 0)),
        ("malformed", Chunk(good, 0.0, DT, 6)),
        ("malformed", Chunk(np.zeros((0, 6)), 0.0, DT, 0)),
        ("future_epoch", Chunk(good, 0.0, DT, 0, epoch=5)),
        ("old_epoch", Chunk(good, 0.0, DT, 0, epoch=3)),
        ("future", Chunk(good, 1.0, DT, 0, epoch=4)),
        ("degenerate_rotation", Chunk(np.ones((5, 6)), 0.0, DT, 0, epoch=4)),
        ("not_finite", Chunk(good * 1e7, 0.0, DT, 0, epoch=4)),
        ("accepted", Chunk(good[:3], 0.0, DT, 0, epoch=4)),
        ("accepted", Chunk(good, 0.0, DT, 0, epoch=4)),
        ("out_of_order", Chunk(good, -0.01, DT, 0, epoch=4)),
    ]
    for item in ask:
        if item is None:
            fusion.reset(good[0], epoch=4)
        else:
            assert fusion.push(item[1]) == item[0]
    fusion.sample(0.2)
    assert fusion.push(Chunk(good, 0.1, DT, 0, epoch=4)) == "stale"
    counts = fusion.counts
    assert counts["malformed"] == 5
    assert counts["accepted"] == 2
    assert (counts["short"], counts["superseded"], counts["seams"]) == (1, 1, 1)
    assert {name for name, value in counts.items() if value == 0} == {"early", "evicted"}


def test_a_degenerate_chunk_costs_no_good_one():
    fusion = Fusion(ActionLayout(["rot6d"] * 6), 5)
    good = np.tile([1.0, 0, 0, 0, 1, 0], (5, 1))
    fusion.reset(good[0])
    for k in range(20):
        assert fusion.push(Chunk(good, 0.0, DT, 0, sequence=k + 1)) == "accepted"
        assert fusion.push(Chunk(np.ones((5, 6)), 0.0, DT, 0)) == "degenerate_rotation"
    fusion.sample(0.001)
    assert fusion.sequence == 20


def test_an_ensemble_with_more_chunks_than_room_keeps_the_newest():
    fusion = Fusion(JOINT, 50, mode="ensemble", capacity=3, fade=0.0, ensemble_decay=0.0)
    fusion.reset([0.0, 0.0])
    for k in range(6):
        fusion.push(Chunk(np.full((50, 2), float(k)), k * DT, DT, 0))
        value = fusion.sample((k + 1) * DT).value[0]
        assert value == pytest.approx(np.mean(range(max(0, k - 2), k + 1)))
    assert fusion.counts["evicted"] == 3


def test_arguments_out_of_range_are_refused():
    for arguments, message in [
        ({"horizon": 0}, "horizon is 0"),
        ({"mode": "guess"}, "fusion mode 'guess'"),
        ({"fade": -1.0}, "fade -1"),
        ({"fade": math.nan}, "fade nan"),
        ({"gripper_fade": 11.0}, "gripper_fade 11"),
        ({"ensemble_decay": -0.1}, "ensemble_decay"),
        ({"capacity": 0}, "capacity is 0"),
        ({"mode": "sync"}, "sync_actions is 0"),
        ({"history": 0.0}, "history is 0"),
        ({"prefix_schedule": "cube"}, "prefix_schedule 'cube'"),
    ]:
        with pytest.raises(ValueError, match=message):
            Fusion(JOINT, **{"horizon": 10, **arguments})
    fusion = Fusion(JOINT, 10)
    with pytest.raises(RuntimeError, match="before reset"):
        fusion.sample(0.0)
    with pytest.raises(ValueError, match="no position"):
        fusion.reset([0.0, math.nan])
    with pytest.raises(ValueError, match="2 components"):
        fusion.reset([0.0])
    fusion.reset([0.0, 0.0])
    with pytest.raises(ValueError, match="3 components"):
        fusion.push(Chunk(np.zeros((4, 3)), 0.0, DT, 0))


def test_the_header_is_the_record_the_mailbox_carries():
    header = Chunk(np.zeros((7, 2)), 1.5, DT, -1, epoch=3, sequence=9).header()
    assert header.tobytes() == np.array((3, 9, 1.5, DT, -1, 7), HEADER_DTYPE).tobytes()
    np.testing.assert_allclose(Chunk(np.zeros((3, 2)), 1.5, DT, -1).due(), [1.48, 1.5, 1.52])
