"""The soft mask: the paper's numbers, and the shapes around them."""

import math

import numpy as np
import pytest

from chatvla_edge.runtime.prefix import prefix_weights


def test_the_linear_mask_of_two_committed_of_six():
    expected = [1, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5, 0, 0, 0, 0]
    np.testing.assert_allclose(prefix_weights(10, 2, 6, "linear"), expected)


def test_equation_5_of_the_paper():
    d, H, s = 3, 12, 4
    weights = prefix_weights(H, d, H - s, "exp")
    for i in range(H):
        if i < d:
            expected = 1.0
        elif i < H - s:
            c = (H - s - i) / (H - s - d + 1)
            expected = c * (math.exp(c) - 1) / (math.e - 1)
        else:
            expected = 0.0
        assert weights[i] == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("schedule", ["smooth", "exp", "linear", "hard"])
def test_masks_fall_from_one_to_zero(schedule):
    for committed in range(12):
        for overlap in range(14):
            weights = prefix_weights(10, committed, overlap, schedule)
            assert (np.diff(weights) <= 0).all()
            assert (weights[: min(committed, overlap)] == 1).all()
            assert (weights[overlap:] == 0).all()


def test_the_smooth_mask_leaves_one_and_reaches_zero_without_a_slope():
    weights = prefix_weights(300, 50, 250, "smooth")
    assert abs(np.diff(weights)[[49, 248, 249]]).max() < 1e-4
    assert abs(np.diff(prefix_weights(300, 50, 250, "exp"))[49]) > 5e-3


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="negative"):
        prefix_weights(10, -1, 3)
    with pytest.raises(ValueError, match="expected smooth"):
        prefix_weights(10, 1, 3, "square")  # type: ignore[arg-type]
