"""Home and park: from wherever the robot is to a pose of the plan, slowly and within limits, on virtual arms."""

from dataclasses import replace

import numpy as np
import pytest
from support.virtual_rig import VirtualRig, joint_plan

HOME = (0.6, -0.4, 0.2)
PARK = (-1.0, 1.2, 2.0)  # the last at the very end of its range
ROWS = np.arange(50) * 0.02


def plan(arms=1, home=HOME, park=PARK, **changes):
    made = joint_plan(arms=arms, approach_speed=0.5, **changes)
    first = replace(made.arms[0], home=home, park=park)
    return replace(made, arms=(first, *made.arms[1:]))


def wave(tau):
    return np.stack([0.4 * np.sin(1.5 * (tau + ROWS) + 0.3 * i) for i in range(3)], axis=1)


def moving(**changes):
    rig = VirtualRig(plan(**changes))
    rig.start_tracking(wave(0))
    for _ in range(8):
        rig.post(wave(rig.tau))
        rig.seconds(0.1)
    assert rig.doing == "tracking"
    return rig


def posed(rig):
    return int(rig.status["posed"])


@pytest.mark.parametrize(("wanted", "pose"), [("home", HOME), ("park", PARK)])
def test_from_full_motion_it_stops_along_its_path_and_goes_there_slowly(wanted, pose):
    rig = moving()
    begin = len(rig.commands[0])
    rig.want(wanted)
    rig.until(lambda: rig.doing == "approaching", at_most=1.0)
    left = len(rig.commands[0])
    tau = rig.tau
    assert not posed(rig)
    rig.until(lambda: posed(rig))
    assert rig.status["posed"] == rig.status["wanted"]
    np.testing.assert_allclose(rig.command(), pose, atol=5e-3)
    assert rig.doing == "standing"
    assert rig.tau == tau
    sent = np.array(rig.commands[0][left - 1 :])
    limit = rig.plan.approach_speed * rig.plan.arms[0].limits.velocity[0]
    assert np.max(np.abs(np.diff(sent, axis=0))) * rig.plan.rate <= limit * 1.001
    # Along the path until it stood: what it did until then is the wave at tau, so no axis had left it.
    rows = rig.telemetry()
    stopping = rows[(rows["tick"] > begin) & (rows["doing"] == 4) & (rows["tau_rate"] > 0)]
    np.testing.assert_allclose(stopping["limited"], [wave(t)[0] for t in stopping["tau"]], atol=2e-3)
    held = rig.command()
    rig.seconds(1.0)
    np.testing.assert_array_equal(rig.command(), held)
    assert rig.violations() == {}


def test_it_needs_no_policy():
    rig = VirtualRig(plan(), start=[0.1, 0.2, 0.3])
    rig.want("park", arm=True)
    rig.until(lambda: posed(rig))
    np.testing.assert_allclose(rig.command(), PARK, atol=5e-3)
    assert rig.violations() == {}


def test_after_it_the_robot_approaches_its_path_anew():
    rig = moving()
    rig.want("home")
    rig.until(lambda: posed(rig))
    rig.want("track")
    before = len(rig.commands[0])
    tau = rig.tau

    def tracking():
        if len(rig.statuses) % 50 == 1:
            rig.post(wave(tau))
        return rig.doing == "tracking"

    rig.until(tracking)
    sent = np.array(rig.commands[0][before:])
    limit = rig.plan.approach_speed * rig.plan.arms[0].limits.velocity[0]
    assert np.max(np.abs(np.diff(sent, axis=0))) * rig.plan.rate <= limit * 1.001
    np.testing.assert_allclose(rig.command(), wave(tau)[0], atol=5e-3)
    assert rig.violations() == {}


@pytest.mark.parametrize("wanted", ["hold", "stop", "brake", "rest"])
def test_on_its_way_it_can_be_stopped(wanted):
    rig = moving()
    rig.want("park")
    rig.until(lambda: rig.doing == "approaching")
    rig.seconds(0.4)
    rig.want(wanted)
    rig.until(lambda: bool(rig.status["standing"]), at_most=0.5)
    assert not posed(rig)
    held = rig.command()
    rig.seconds(0.3)
    np.testing.assert_array_equal(rig.command(), held)
    assert rig.violations() == {}


def test_a_lapsed_lease_ends_it_for_good():
    rig = moving()
    rig.want("park")
    rig.until(lambda: rig.doing == "approaching")
    rig.granting = False
    rig.seconds(0.6)
    assert rig.status["standing"]
    held = rig.command()
    rig.granting = True
    rig.seconds(0.5)
    np.testing.assert_array_equal(rig.command(), held)
    assert not posed(rig)
    assert rig.violations() == {}


def test_from_one_pose_to_the_other():
    rig = VirtualRig(plan())
    rig.want("home", arm=True)
    rig.until(lambda: posed(rig))
    rig.want("park")
    rig.tick()
    assert not posed(rig)
    rig.until(lambda: posed(rig))
    np.testing.assert_allclose(rig.command(), PARK, atol=5e-3)
    assert rig.violations() == {}


def test_an_arm_without_the_pose_stays_where_it_is():
    rig = VirtualRig(plan(arms=2), start=[0.0, 0.0, 0.0, 0.3, -0.3, 0.1])
    rig.want("home", arm=True)
    rig.until(lambda: posed(rig))
    np.testing.assert_allclose(rig.command(0), HOME, atol=5e-3)
    np.testing.assert_array_equal(rig.command(1), [0.3, -0.3, 0.1])
    assert rig.violations() == {}


def test_unarmed_nothing_goes_anywhere():
    rig = VirtualRig(plan())
    rig.want("home")
    rig.seconds(0.3)
    assert rig.commands[0] == []
    assert "unarmed" in rig.reasons


@pytest.mark.parametrize(
    ("poses", "words"),
    [
        ({"home": (0.0, 0.0)}, "home has 2 numbers; expected 3"),
        ({"park": (0.0, 0.0, 2.1)}, r"park of axis 2 is 2\.1; expected -2\.0 to 2\.0"),
    ],
)
def test_a_pose_that_is_none_is_refused(poses, words):
    with pytest.raises(ValueError, match=words):
        plan(**poses)
