"""Cartesian actions: an FR3 with a gripper follows tool poses, and leaves as limited joints."""

import numpy as np
import pytest
from support import limit_oracle
from support.virtual_rig import VirtualRig

from chatvla_edge.runtime.arm_model import load_arm
from chatvla_edge.runtime.kinematics import Kinematics
from chatvla_edge.runtime.rotations import decode, encode
from chatvla_edge.runtime.servo_plan import ArmPlan, AxisLimits, DirectAxis, PoseAction, ServoPlan

HOME = np.array([0.0, -0.785, 0.0, -2.356, 0.0, 1.571, 0.785])
CODEC = "rot6d_rows"
STEP = 1 / 15


def fr3_plan(**limits):
    model = load_arm("fr3")
    gripper = {"lower": 0.0, "upper": 0.085, "velocity": 0.15, "acceleration": 2.0, "jerk": 60.0}
    found = {name: (*getattr(model, name).tolist(), value) for name, value in gripper.items()}
    curve = tuple((*row, 0.0) for row in model.curve.tolist())
    arm = ArmPlan(
        name="fr3",
        limits=AxisLimits(**found, curve=curve, **limits),
        pose=PoseAction(component=0, codec=CODEC),
        # DROID's gripper counts closure from 0 to 1; the device takes a width.
        direct=(DirectAxis(axis=7, component=9, scale=-0.085, offset=0.085),),
        chain="fr3",
    )
    return ServoPlan(
        rate=500.0, components=("xyz",) * 3 + ("rot6d",) * 6 + ("gripper",), horizon=16, arms=(arm,),
        approach_speed=0.5, chunk_budget=2.0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def chain():
    return Kinematics(load_arm("fr3"))


def circle(chain, tau, radius=0.05, closure=0.5):
    """A chunk [16, 10]: the tool on a circle about its home, its rotation kept, the gripper half closed."""
    rotation, position = chain.tool_pose(HOME)
    angle = 1.2 * (tau + STEP * np.arange(16))
    xyz = position + radius * np.stack([np.cos(angle) - 1, np.sin(angle), 0 * angle], axis=1)
    six = np.tile(encode(CODEC, rotation), (16, 1))
    return np.hstack([xyz, six, np.full((16, 1), closure)])


def track(rig, chain, seconds):
    rig.start_tracking(circle(chain, 0), dt=STEP)
    for _ in range(round(seconds / 0.2)):
        rig.post(circle(chain, rig.tau), dt=STEP)
        rig.seconds(0.2)


def violations(rig):
    model = load_arm("fr3")
    bounds = limit_oracle.Bounds(
        model.lower, model.upper, model.velocity, model.acceleration, model.jerk, rig.period,
        velocity_at=limit_oracle.fr3_velocity,
    )  # fmt: skip
    sent = np.array(rig.commands[0])[:, :7]
    found = limit_oracle.violations(bounds, sent[0], rig.sent_at[0][0], rig.sent_at[0][1:], sent[1:])
    return {kind: n for kind, n in found.items() if n}


def test_the_tool_goes_where_the_action_says(chain):
    rig = VirtualRig(fr3_plan(), start=[*HOME, 0.085])
    track(rig, chain, 3.0)
    rows = rig.telemetry()
    rows = rows[(rows["doing"] == 3) & (rows["tau"] > 1.0)][::25]
    for row in rows:
        rotation, position = chain.tool_pose(row["limited"][:7])
        angle = 1.2 * row["tau"]
        centre = chain.tool_pose(HOME)[1]
        wanted = centre + 0.05 * np.array([np.cos(angle) - 1, np.sin(angle), 0])
        # Cubic between actions 67 ms apart: about 0.1 mm of it is interpolation.
        assert np.linalg.norm(position - wanted) < 2e-3
        np.testing.assert_allclose(rotation, chain.tool_pose(HOME)[0], atol=5e-3)
        np.testing.assert_allclose(decode(CODEC, row["fused"][3:9]), rotation, atol=5e-3)
    assert rig.command()[7] == pytest.approx(0.0425, abs=1e-4)
    assert int(rig.status["unreachable_ticks"]) == 0
    assert violations(rig) == {}


def test_the_first_command_of_a_pose_arm_is_where_it_is(chain):
    rig = VirtualRig(fr3_plan(), start=[*HOME, 0.085])
    rig.want("hold", arm=True)
    rig.seconds(1.0)
    np.testing.assert_array_equal(rig.commands[0][0], [*HOME, 0.085])
    np.testing.assert_array_equal(rig.command(), [*HOME, 0.085])


def test_a_pose_out_of_reach_is_said_and_breaks_no_limit(chain):
    rig = VirtualRig(fr3_plan(), start=[*HOME, 0.085])
    track(rig, chain, 1.0)
    far = circle(chain, rig.tau)
    far[:, 0] += 2.0
    for _ in range(10):
        rig.post(far, dt=STEP)
        rig.seconds(0.2)
    assert int(rig.status["unreachable_ticks"]) > 0
    assert np.isfinite(np.array(rig.commands[0])).all()
    assert violations(rig) == {}


def test_the_workspace_holds_the_tool(chain):
    low, high = (0.25, -0.4, 0.2), (0.65, 0.02, 0.8)  # the circle reaches y = 0.05
    rig = VirtualRig(fr3_plan(box=(*low, *high)), start=[*HOME, 0.085])
    track(rig, chain, 4.0)
    tool = np.array([chain.tool_pose(q[:7])[1] for q in rig.commands[0][::10]])
    assert (tool >= low).all()
    assert (tool <= high).all()
    assert tool[:, 1].max() > 0.015  # and it went as far as it may
    assert violations(rig) == {}
