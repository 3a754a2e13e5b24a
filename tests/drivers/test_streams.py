"""The table of streams that a rig implies."""

import pytest

from chatvla_edge.drivers import rig
from chatvla_edge.drivers.streams import Stream, streams


def test_every_camera_and_arm_is_a_stream_with_the_rig_s_own_numbers():
    loaded = rig.load("sim_franka_robotiq")
    table = streams(loaded)
    assert list(table) == ["cameras.right", "arms.franka", "arms.gripper"]
    assert table["cameras.right"] == Stream("cameras", "right", 60.0, 0.2, True)
    assert table["arms.gripper"] == Stream("arms", "gripper", 50.0, 0.2, True)


@pytest.mark.parametrize(
    ("rate", "silent", "alive"), [(30.0, 0.33, True), (30.0, 0.34, False), (500.0, 0.1, True), (500.0, 0.11, False)]
)
def test_alive_is_within_ten_periods_or_the_age_allowed(rate, silent, alive):
    assert Stream("arms", "s", rate, 0.1, True).alive(silent) is alive


def test_fresh_is_within_the_age_allowed():
    stream = Stream("cameras", "s", 30.0, 0.2, True)
    assert stream.fresh(0.2)
    assert not stream.fresh(0.2001)


def test_on_rate_forgives_a_tenth_and_one_on_its_way():
    stream = Stream("cameras", "s", 30.0, 0.2, True)
    assert stream.on_rate(30, 1.0)
    assert stream.on_rate(26, 1.0)
    assert not stream.on_rate(25, 1.0)
    assert stream.on_rate(0, 0.03)
