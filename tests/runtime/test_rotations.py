"""Rotation codecs against scipy's rotations, and golden poses that a person can check with one hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from chatvla_edge.runtime import rotations

NUMBERS = {
    "rot6d_rows": lambda r: r.as_matrix()[:2].ravel(),
    "euler_XYZ_intrinsic": lambda r: r.as_euler("XYZ"),
    "euler_xyz_extrinsic": lambda r: r.as_euler("xyz"),
    "quaternion_xyzw": lambda r: r.as_quat(canonical=True),
    # Facts about the public pipeline: extrinsic angles, read as intrinsic ones, two rows kept.
    "rot6d_franka_droid": lambda r: Rotation.from_euler("XYZ", r.as_euler("xyz")).as_matrix()[:2].ravel(),
}


def some_rotations(count, seed):
    return [r for r in Rotation.random(count, random_state=seed) if abs(r.as_matrix()[2, 0]) < 0.999]


def test_there_is_an_oracle_for_every_codec():
    assert set(NUMBERS) == set(rotations.CODECS)
    assert [rotations.codec_number(codec) for codec in rotations.CODECS] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("codec", NUMBERS)
def test_every_codec_decodes_and_encodes_as_scipy_does(codec):
    for r in some_rotations(300, 1):
        numbers = NUMBERS[codec](r)
        np.testing.assert_allclose(rotations.decode(codec, numbers), r.as_matrix(), atol=1e-9)
        back = rotations.encode(codec, r.as_matrix())
        if codec == "quaternion_xyzw":
            assert back[3] >= 0
            back, numbers = back * np.sign(back @ numbers), numbers
        np.testing.assert_allclose(back, numbers, atol=1e-9)


# What a person sees: rows of the tool's frame. The gripper that points straight down with its fingers along y, then
# turned by a yaw of 30 degrees.
DOWN = Rotation.from_euler("xyz", [180, 0, 0], degrees=True)
GOLDEN = [
    ("rot6d_rows", [1, 0, 0, 0, -1, 0], DOWN),
    ("rot6d_rows", [2, 0, 0, 0.5, -3, 0], DOWN),
    ("euler_xyz_extrinsic", [np.pi, 0, np.pi / 6], Rotation.from_euler("z", 30, degrees=True) * DOWN),
    ("euler_XYZ_intrinsic", [np.pi, 0, np.pi / 6], Rotation.from_euler("z", -30, degrees=True) * DOWN),
    ("quaternion_xyzw", [1, 0, 0, 0], DOWN),
    ("quaternion_xyzw", [0, 0, 3, 3], Rotation.from_euler("z", 90, degrees=True)),
    # The literal rows of a downward gripper yawed by -30 degrees mean one yawed by +30 degrees.
    (
        "rot6d_franka_droid",
        [np.cos(np.pi / 6), -np.sin(np.pi / 6), 0, -np.sin(np.pi / 6), -np.cos(np.pi / 6), 0],
        Rotation.from_euler("z", 30, degrees=True) * DOWN,
    ),
    ("rot6d_franka_droid", [1, 0, 0, 0, -1, 0], DOWN),
]


@pytest.mark.parametrize(("codec", "numbers", "rotation"), GOLDEN)
def test_golden_poses(codec, numbers, rotation):
    np.testing.assert_allclose(rotations.decode(codec, numbers), rotation.as_matrix(), atol=1e-12)


def test_the_franka_codec_taken_literally_would_turn_a_downward_gripper_by_twice_its_yaw():
    for yaw in (10, 30, -45):
        true = Rotation.from_euler("z", yaw, degrees=True) * DOWN
        numbers = rotations.encode("rot6d_franka_droid", true.as_matrix())
        literal = rotations.decode("rot6d_rows", numbers)
        turn = rotations.between(true.as_matrix(), literal)
        np.testing.assert_allclose(np.degrees(turn), [0, 0, -2 * yaw], atol=1e-9)


@pytest.mark.parametrize("codec", ["euler_XYZ_intrinsic", "euler_xyz_extrinsic"])
@pytest.mark.parametrize("middle", [np.pi / 2, -np.pi / 2])
def test_a_locked_gimbal_still_gives_the_same_rotation(codec, middle):
    for outer in (0.3, -2.0):
        matrix = rotations.decode(codec, [outer, middle, 0.7])
        angles = rotations.encode(codec, matrix)
        assert angles[2] == 0.0
        np.testing.assert_allclose(rotations.decode(codec, angles), matrix, atol=1e-7)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=6, max_size=6))
def test_rot6d_is_renormalised_to_a_rotation_that_keeps_the_first_direction(six):
    a, b = np.array(six[:3]), np.array(six[3:])
    norms = np.linalg.norm(a), np.linalg.norm(b)
    if min(norms) < 1e-3 or np.linalg.norm(np.cross(a, b)) < 1e-3 * norms[0] * norms[1]:
        return
    matrix = rotations.decode("rot6d_rows", six)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-9)
    assert np.linalg.det(matrix) > 0.999
    np.testing.assert_allclose(matrix[0], a / norms[0], atol=1e-12)
    assert matrix[1] @ b > 0
    assert abs(np.cross(a, b) @ matrix[1]) < 1e-9 * norms[0] * norms[1]


@pytest.mark.parametrize(
    ("codec", "numbers"),
    [
        ("rot6d_rows", [0, 0, 0, 0, 1, 0]),
        ("rot6d_rows", [1, 0, 0, 0, 0, 0]),
        ("rot6d_rows", [1, 2, 3, 2, 4, 6]),
        ("rot6d_rows", [1, 0, 0, 0, np.nan, 0]),
        ("rot6d_franka_droid", [np.inf, 0, 0, 0, 1, 0]),
        ("rot6d_franka_droid", [1, 0, 0, 1, 0, 1e-9]),
        ("quaternion_xyzw", [0, 0, 0, 0]),
        ("quaternion_xyzw", [0, 0, np.nan, 1]),
        ("euler_XYZ_intrinsic", [0, np.inf, 0]),
        ("euler_xyz_extrinsic", [0, 0, np.nan]),
    ],
)
def test_numbers_that_fix_no_rotation_are_refused(codec, numbers):
    with pytest.raises(ValueError, match="fixes no rotation"):
        rotations.decode(codec, numbers)


def test_misuse_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown rotation codec 'rot6d'; known: rot6d_rows"):
        rotations.decode("rot6d", [1, 0, 0, 0, 1, 0])
    with pytest.raises(ValueError, match="takes 6 numbers, found 3"):
        rotations.decode("rot6d_rows", [1, 0, 0])
    for not_one in (np.zeros((3, 3)), np.diag([1.0, 1, -1]), np.eye(4)):
        with pytest.raises(ValueError, match="not a rotation matrix"):
            rotations.encode("rot6d_rows", not_one)
    with pytest.raises(ValueError, match="two matrices"):
        rotations.between(np.eye(2), np.eye(3))


def test_the_turn_between_two_rotations_is_scipys_also_near_zero_and_half_a_turn():
    rng = np.random.default_rng(2)
    for angle in (0.0, 1e-9, 1e-6, 0.3, 3.0, np.pi - 1e-6):
        for _ in range(20):
            axis = rng.normal(size=3)
            here = Rotation.random(random_state=rng.integers(1000))
            turn = Rotation.from_rotvec(axis / np.linalg.norm(axis) * angle)
            got = rotations.between(here.as_matrix(), (turn * here).as_matrix())
            np.testing.assert_allclose(got, turn.as_rotvec(), atol=1e-9)


def test_quaternions_are_accurate_whatever_their_largest_part():
    for largest in np.eye(4):
        r = Rotation.from_quat(largest + 0.01 * np.array([1, -2, 3, 4]))
        np.testing.assert_allclose(
            rotations.encode("quaternion_xyzw", r.as_matrix()), r.as_quat(canonical=True), atol=1e-12
        )
