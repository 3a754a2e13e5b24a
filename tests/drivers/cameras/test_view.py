"""A camera that was moved, refocused or relit is told from one that was not, and from another scene."""

import cv2
import numpy as np
import pytest
from support.camera_scenes import H, W, scene, shot

from chatvla_edge.drivers.cameras.view import ViewLimits, check_view

SEEDS = range(3)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_same_view_passes_through_noise(seed):
    report = check_view(shot(seed, noise_seed=1), shot(seed, noise_seed=2))
    assert report.ok, report
    assert max(map(abs, report.shift)) < 0.5
    assert abs(report.rotation_deg) < 0.3
    assert report.structure > 0.9


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shift", [(3.0, -2.0), (14.0, 0.0), (-9.5, 21.0), (60.0, -35.0)])
def test_a_shift_is_measured_and_judged(seed, shift):
    report = check_view(shot(seed, shift=shift, noise_seed=1), shot(seed))
    assert np.abs(np.subtract(report.shift, shift)).max() < 1.0
    limits = ViewLimits()
    far = abs(shift[0]) > limits.shift * W or abs(shift[1]) > limits.shift * H
    assert any("shifted" in problem for problem in report.problems) == far
    assert report.ok != far


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rotation", [-8.0, -1.5, 2.0, 5.0])
def test_a_rotation_is_measured_and_judged(seed, rotation):
    report = check_view(shot(seed, rotation=rotation, noise_seed=1), shot(seed))
    assert abs(report.rotation_deg - rotation) < 0.8
    assert any("turned" in problem for problem in report.problems) == (abs(rotation) > 2.5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("scale", [0.9, 1.08])
def test_a_camera_nearer_or_farther_is_told(seed, scale):
    report = check_view(shot(seed, scale=scale, noise_seed=1), shot(seed))
    assert abs(report.scale - scale) < 0.02
    assert any("times as large" in problem for problem in report.problems)


@pytest.mark.parametrize("seed", SEEDS)
def test_other_things_in_a_third_of_the_scene_are_no_other_view(seed):
    big = scene(seed)
    other = big.copy()
    other[:, : big.shape[1] // 3 + 40] = scene(seed + 100)[:, : big.shape[1] // 3 + 40]
    report = check_view(shot(other, noise_seed=1), shot(big))
    assert report.structure > 0.5
    assert not [problem for problem in report.problems if "structure" in problem or "shifted" in problem]


@pytest.mark.parametrize("seed", SEEDS)
def test_another_scene_is_told(seed):
    report = check_view(shot(seed + 50), shot(seed))
    assert report.structure < 0.2
    assert "another view" in report.problems[0]


def test_a_covered_lens_is_told():
    report = check_view(np.full((H, W, 3), 3, np.uint8), shot(0))
    assert not report.ok
    assert any("another view" in problem for problem in report.problems)
    assert any("brightness" in problem for problem in report.problems)


def test_light_and_white_balance_are_told():
    reference = shot(1)
    assert "brightness" in check_view((reference * 0.6).astype(np.uint8), reference).problems[0]
    report = check_view((reference * [1.0, 1.0, 0.7]).astype(np.uint8), reference)
    assert [problem for problem in report.problems if "white balance" in problem]
    assert check_view((reference * 0.9).astype(np.uint8), reference).ok


def test_a_lens_out_of_focus_is_told():
    reference = shot(2)
    report = check_view(cv2.GaussianBlur(reference, (0, 0), 4), reference)
    assert any("focus" in problem for problem in report.problems)


def test_pictures_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match="expected one size"):
        check_view(shot(0), shot(0)[::2, ::2])
