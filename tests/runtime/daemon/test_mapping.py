"""Which number drives which axis, and back: the policy's words against the rig's."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatvla_edge.drivers import rig as rigs
from chatvla_edge.export.robots import load as robot
from chatvla_edge.runtime import rotations
from chatvla_edge.runtime.arm_model import load_arm
from chatvla_edge.runtime.bundle import Gripper, JointPositions, Semantics
from chatvla_edge.runtime.daemon import mapping
from chatvla_edge.runtime.daemon.mapping import MappingError, StateReader, gripper_line
from chatvla_edge.runtime.kinematics import Kinematics


class Policy:
    """As much of a manifest as the mapping reads."""

    def __init__(self, description, **changes):
        self.semantics = description.semantics.model_copy(update=changes)
        self.timing = description.timing
        self.cameras = description.cameras
        horizon = 50
        self.geometry = type("G", (), {"head": type("H", (), {"horizon": horizon})})


@pytest.fixture(scope="module")
def arx():
    return rigs.load("sim_arx_r5_bimanual"), Policy(robot("arx_r5_bimanual"))


@pytest.fixture(scope="module")
def franka():
    return rigs.load("sim_franka_robotiq"), Policy(robot("franka_robotiq"))


def test_each_joint_of_both_arms_is_driven_by_its_own_component(arx):
    plan = mapping.servo_plan(*arx)
    assert plan.components == (*["joint"] * 6, "gripper") * 2
    assert [arm.name for arm in plan.arms] == ["left", "right"]
    for number, arm in enumerate(plan.arms):
        assert {axis.axis: axis.component for axis in arm.direct} == {i: 7 * number + i for i in range(7)}
        assert all((axis.scale, axis.offset) == (1.0, 0.0) for axis in arm.direct)
    assert plan.gripper_range == (0.0, 0.088)
    assert (plan.first_step, plan.action_dt, plan.rate) == (-1, 1 / 50, 500)


def test_a_pose_and_a_gripper_of_another_device_meet_their_axes(franka):
    plan = mapping.servo_plan(*franka)
    assert plan.components == (*["xyz"] * 3, *["rot6d"] * 6, "gripper")
    arm, gripper = plan.arms
    assert (arm.pose.component, arm.pose.codec) == (0, "rot6d_franka_droid")
    assert arm.direct == ()
    (axis,) = gripper.direct
    # 0 is open, 1 is closed: the larger number closes.
    assert (axis.axis, axis.component, axis.scale, axis.offset) == (0, 9, -0.085, 0.085)
    assert plan.gripper_range == (0.0, 1.0)


def test_the_tool_includes_the_way_from_the_last_joint_to_the_flange(franka):
    plan = mapping.servo_plan(*franka)
    # The policy's TCP is the flange, so the tool is what the arm's own file says of its flange.
    assert np.allclose(plan.arms[0].pose.flange_to_tool, load_arm("fr3").tool, atol=1e-12)


def test_a_state_is_what_the_policy_was_trained_to_see(franka):
    rig, policy = franka
    read = StateReader(rig, policy)
    q = np.array([0.1, -0.5, 0.2, -2.4, 0.1, 1.8, 0.3])
    state = read({"franka": q, "gripper": np.array([0.085 / 4])})
    rotation, position = Kinematics(load_arm("fr3")).tool_pose(q)
    assert state.dtype == np.float32
    assert np.allclose(state[:3], position, atol=1e-6)
    assert np.allclose(rotations.decode("euler_xyz_extrinsic", state[3:6].astype(float)), rotation, atol=1e-6)
    assert state[6] == pytest.approx(0.75)  # a quarter open is three quarters closed


@given(q=st.lists(st.floats(-1, 1), min_size=14, max_size=14))
def test_a_joint_state_is_the_axes_in_the_policys_order(arx, q):
    read = StateReader(*arx)
    state = read({"left": np.array(q[:7]), "right": np.array(q[7:])})
    assert np.array_equal(state, np.array(q, np.float32))


@given(
    unit=st.sampled_from(["fraction", "m", "mm"]),
    polarity=st.sampled_from(["larger_opens", "larger_closes"]),
    ends=st.tuples(st.floats(-0.1, 0.1), st.floats(-0.1, 0.1)).filter(lambda pair: abs(pair[0] - pair[1]) > 1e-3),
    share=st.floats(0, 1),
)
def test_a_gripper_number_means_the_same_opening_on_every_device(unit, polarity, ends, share):
    part = Gripper(kind="gripper", arm="a", unit=unit, polarity=polarity, motion="absolute")
    axis = rigs.GripperAxis(closed=ends[0], open=ends[1])
    line = gripper_line(part, axis)
    position = axis.closed + share * (axis.open - axis.closed)
    number = line.number(position)
    assert line.scale * number + line.offset == pytest.approx(position, abs=1e-12)
    wider = line.number(axis.open) - line.number(axis.closed)
    assert (wider > 0) == (polarity == "larger_opens")
    per_metre = {"fraction": 1 / abs(axis.open - axis.closed), "m": 1.0, "mm": 1000.0}[unit]
    assert abs(wider) == pytest.approx(abs(axis.open - axis.closed) * per_metre)
    if unit == "fraction":
        assert number == pytest.approx(share if polarity == "larger_opens" else 1 - share, abs=1e-9)


def joints(arm="left", names=("joint1",)):
    return JointPositions(kind="joint_positions", arm=arm, joints=names, unit="rad", motion="absolute")


def semantics(policy, action):
    arms = policy.semantics.arms
    return Semantics.model_construct(arms=arms, action=action, state=policy.semantics.state)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ((joints(arm="middle"),), "moves an arm 'middle'; the rig's arms are left, right"),
        ((joints(names=("elbow",)),), "speaks of left.elbow; the rig's left has ('joint1'"),
        ((joints(names=("joint1", "joint2")),), "axes [0, 1] are driven; expected each of 0..6 once"),
        (
            (Gripper(kind="gripper", arm="left", unit="rad", polarity="larger_opens", motion="absolute"),),
            "found the unit 'rad', expected fraction, m or mm",
        ),
    ],
)
def test_what_does_not_fit_names_both_sides(arx, action, message):
    rig, policy = arx
    policy = Policy(robot("arx_r5_bimanual"))
    policy.semantics = semantics(policy, action)
    with pytest.raises(MappingError, match=re.escape(message)):
        mapping.servo_plan(rig, policy)


def test_a_policy_of_poses_is_refused_by_a_rig_without_its_arm(arx, franka):
    with pytest.raises(MappingError, match="moves an arm 'franka'"):
        mapping.servo_plan(arx[0], franka[1])


def test_the_devices_get_the_servos_limits(arx):
    plan = mapping.servo_plan(*arx)
    for arm, device in zip(plan.arms, mapping.device_plans(arx[0], plan), strict=True):
        assert (device.lower, device.velocity, device.rate) == (arm.limits.lower, arm.limits.velocity, 500)
