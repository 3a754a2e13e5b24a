"""Sampling one chunk: exact at its rows, no overshoot where it must not, rotations stay rotations."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial.transform import Rotation

from chatvla_edge.runtime.knots import ActionLayout, sample
from chatvla_edge.runtime.rot6d import orthonormal, turn_between, turned

DT = 0.02
columns = hnp.arrays(np.float64, st.integers(2, 20), elements=st.floats(-2, 2))


def frames(rng, n, step=0.1):
    turn = Rotation.random(random_state=rng)
    rows = []
    for _ in range(n):
        turn = Rotation.from_rotvec(rng.normal(0, step, 3)) * turn
        rows.append(turn.as_matrix()[:, :2].T.ravel())
    return np.array(rows)


@pytest.mark.parametrize("cubic", [True, False])
@settings(max_examples=100, deadline=None)
@given(column=columns)
def test_every_action_is_hit_exactly_and_the_last_one_is_held(cubic, column):
    times = np.arange(len(column)) * DT
    values, rates = sample(ActionLayout(["joint"]), column[:, None], DT, [*times, 99.0, -99.0], cubic=cubic)
    np.testing.assert_allclose(values[:-2, 0], column, atol=1e-12)
    assert values[-2, 0] == column[-1]
    assert values[-1, 0] == column[0]
    assert not rates[-2:].any()


@pytest.mark.parametrize("cubic", [True, False])
@settings(max_examples=200, deadline=None)
@given(column=columns)
def test_a_gripper_never_leaves_the_hull_of_its_neighbours_nor_its_range(cubic, column):
    u = np.linspace(0, (len(column) - 1) * DT, 173)
    values, _ = sample(ActionLayout(["gripper"], (1.0, -0.5)), column[:, None], DT, u, cubic=cubic)
    clamped = np.clip(column, -0.5, 1.0)
    row = np.minimum((u / DT).astype(int), len(column) - 2)
    # A tau within rounding of a row may count to either side: both neighbourhoods contain the row itself.
    low = np.minimum(clamped[row], clamped[row + 1])
    high = np.maximum(clamped[row], clamped[row + 1])
    assert (values[:, 0] >= low - 1e-9).all()
    assert (values[:, 0] <= high + 1e-9).all()


def test_a_plain_cubic_would_have_opened_against_its_stop():
    column = np.array([[0.0], [0.0], [1.0], [1.0]])
    u = np.linspace(0, 3 * DT, 100)
    assert sample(ActionLayout(["joint"]), column, DT, u)[0].max() > 1.01
    assert sample(ActionLayout(["gripper"]), column, DT, u)[0].max() == 1.0


@pytest.mark.parametrize("cubic", [True, False])
def test_the_rate_is_the_derivative(cubic):
    rng = np.random.default_rng(0)
    layout = ActionLayout(["joint"] * 2 + ["rot6d"] * 6 + ["gripper"])
    actions = np.hstack([rng.normal(size=(9, 2)), frames(rng, 9), rng.uniform(0, 1, (9, 1))])
    u = rng.uniform(0.001, 8 * DT - 0.001, 300)
    u = u[np.abs(u / DT - np.round(u / DT)) > 1e-3]
    h = 1e-7
    _, rates = sample(layout, actions, DT, u, cubic=cubic)
    numeric = (
        sample(layout, actions, DT, u + h, cubic=cubic)[0] - sample(layout, actions, DT, u - h, cubic=cubic)[0]
    ) / (2 * h)
    np.testing.assert_allclose(rates, numeric, atol=1e-4)


def test_the_cubic_has_no_step_in_velocity():
    rng = np.random.default_rng(1)
    layout = ActionLayout(["joint"] * 3 + ["gripper"])
    actions = rng.uniform(0, 1, (12, 4))
    inner = np.arange(1, 11) * DT
    before, after = (sample(layout, actions, DT, inner + side)[1] for side in (-1e-9, 1e-9))
    np.testing.assert_allclose(before, after, atol=1e-3)


@pytest.mark.parametrize("cubic", [True, False])
def test_rotations_stay_orthonormal_and_near_the_geodesic(cubic):
    rng = np.random.default_rng(2)
    layout = ActionLayout(["rot6d"] * 6)
    actions = frames(rng, 30, step=0.05)
    u = rng.uniform(0, 29 * DT, 500)
    values, _ = sample(layout, actions, DT, u, cubic=cubic)
    a, b = values[:, :3], values[:, 3:]
    np.testing.assert_allclose((a * a).sum(1), 1, atol=1e-12)
    np.testing.assert_allclose((b * b).sum(1), 1, atol=1e-12)
    np.testing.assert_allclose((a * b).sum(1), 0, atol=1e-12)
    if not cubic:
        for tau, value in zip(u, values, strict=True):
            row = min(int(tau / DT), 28)
            turn = turn_between(actions[row], actions[row + 1])
            on_geodesic = turned(turn * (tau / DT - row), actions[row])
            assert np.linalg.norm(turn_between(on_geodesic, value)) < np.linalg.norm(turn) ** 2 / 8


def test_turns_agree_with_scipy_at_every_angle():
    rng = np.random.default_rng(3)
    for angle in [0.0, 1e-12, 1e-5, 9e-4, 1.1e-3, 0.5, 2.0, 3.1, np.pi - 1e-9]:
        for _ in range(20):
            start = Rotation.random(random_state=rng)
            axis = rng.normal(size=3)
            vector = angle * axis / np.linalg.norm(axis)
            end = Rotation.from_rotvec(vector) * start
            six = [turn.as_matrix()[:, :2].T.ravel() for turn in (start, end)]
            np.testing.assert_allclose(turned(vector, six[0]), six[1], atol=1e-12)
            np.testing.assert_allclose(turn_between(*six), vector, atol=1e-6 if angle > 3.1 else 1e-10)


@pytest.mark.parametrize("bad", [[0, 0, 0, 0, 1, 0], [1, 0, 0, 2, 0, 0], [np.nan] * 6, [1, 0, 0, np.inf, 0, 0]])
def test_vectors_that_fix_no_frame_are_refused(bad):
    with pytest.raises(ValueError, match="fixes no frame"):
        orthonormal(bad)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ([], "0 action components"),
        (["elbow"], "component 0 is 'elbow'"),
        (["rot6d"] * 5, "the last rotation has 5"),
        (["rot6d"] * 7 + ["joint"], "before component 7 has 1"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(kinds, message):
    with pytest.raises(ValueError, match=message):
        ActionLayout(kinds)


def test_a_layout_says_what_it_is():
    kinds = ["xyz"] * 3 + ["rot6d"] * 12 + ["gripper", "joint"]
    assert ActionLayout(kinds).kinds == tuple(kinds)


def test_sampling_refuses_what_is_no_chunk():
    with pytest.raises(ValueError, match="expected finite"):
        sample(ActionLayout(["joint"]), np.zeros((3, 2)), DT, [0.0])
    with pytest.raises(ValueError, match="no frame"):
        sample(ActionLayout(["rot6d"] * 6), np.zeros((3, 6)), DT, [0.0])
