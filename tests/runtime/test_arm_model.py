"""Arm files: the chains that come with the runtime, and what is refused in somebody else's URDF."""

import numpy as np
import pytest

from chatvla_edge.runtime.arm_model import ArmModelError, arm_names, load_arm, parse_arm, read_arm, rpy_matrix


def test_the_arms_of_the_two_public_robots_are_here():
    assert arm_names() == ["arx_l5", "arx_r5", "arx_x5", "fr3", "panda"]
    for name in arm_names():
        model = load_arm(name)
        assert model.name == name
        n = 7 if name in ("fr3", "panda") else 6
        assert len(model.joints) == n
        assert model.origins.shape == (n, 12)
        assert (model.lower < model.upper).all()
        assert (model.curve is not None) == (name == "fr3")
        assert np.isfinite(model.jerk).all() == (n == 7)
    with pytest.raises(ArmModelError, match="no arm 'ur5' here; known: arx_l5"):
        load_arm("ur5")


def test_frankas_published_limits_stand_in_the_files():
    panda, fr3 = load_arm("panda"), load_arm("fr3")
    assert panda.velocity.tolist() == [2.175] * 4 + [2.61] * 3
    assert panda.acceleration.tolist() == [15, 7.5, 10, 12.5, 15, 20, 20]
    assert panda.jerk.tolist() == [7500, 3750, 5000, 6250, 7500, 10000, 10000]
    assert panda.lower.tolist() == [-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973]
    assert panda.upper.tolist() == [2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973]
    assert fr3.velocity.tolist() == [2.62] * 4 + [5.26, 4.18, 5.26]
    assert fr3.acceleration.tolist() == [10] * 7
    assert fr3.jerk.tolist() == [5000] * 7
    assert fr3.lower.tolist() == [-2.7437, -1.7837, -2.9007, -3.0421, -2.8065, 0.5445, -3.0159]
    assert fr3.upper.tolist() == [2.7437, 1.7837, 2.9007, -0.1518, 2.8065, 4.5169, 3.0159]


def test_roll_pitch_yaw_turn_about_fixed_axes_in_that_order():
    from scipy.spatial.transform import Rotation

    for angles in np.random.default_rng(0).uniform(-3, 3, (50, 3)):
        np.testing.assert_allclose(rpy_matrix(*angles), Rotation.from_euler("xyz", angles).as_matrix(), atol=1e-12)


JOINT = """
<joint name="{name}" type="{kind}"><parent link="{parent}"/><child link="{child}"/>
{inside}</joint>"""
LIMIT = '<limit lower="-1" upper="1" velocity="2"/>'


def urdf(*joints):
    return ("<robot name='some'>" + "".join(JOINT.format(**joint) for joint in joints) + "</robot>").encode()


def joint(parent, child, inside=LIMIT, kind="revolute"):
    return {"name": f"{parent}-{child}", "kind": kind, "parent": parent, "child": child, "inside": inside}


def test_fixed_joints_are_folded_in_and_branches_ignored(tmp_path):
    text = urdf(
        joint("base", "stand", '<origin xyz="0 0 1" rpy="0 0 1.5707963267948966"/>', "fixed"),
        joint("stand", "camera", '<origin xyz="9 9 9"/>', "fixed"),
        joint("stand", "arm", '<origin xyz="1 0 0"/><axis xyz="0 2 0"/>' + LIMIT),
        joint("arm", "hand", LIMIT),
        joint("hand", "plate", '<origin xyz="0 0 0.1"/>', "fixed"),
        joint("plate", "tool", '<origin xyz="0 0 0.2"/>', "fixed"),
    )
    (tmp_path / "some.urdf").write_bytes(text)
    model = read_arm(tmp_path / "some.urdf")
    assert model.joints == ("stand-arm", "arm-hand")
    np.testing.assert_allclose(model.origins[0, 9:], [0, 1, 1], atol=1e-15)
    np.testing.assert_allclose(model.origins[0, :9].reshape(3, 3) @ [1, 0, 0], [0, 1, 0], atol=1e-15)
    assert model.axes.tolist() == [[0, 1, 0], [1, 0, 0]]
    np.testing.assert_allclose(model.tool[9:], [0, 0, 0.3], atol=1e-15)
    assert np.isnan(model.acceleration).all()
    assert model.curve is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"<robot", "not XML"),
        (b"", "not XML"),
        (b"<sdf/>", "root element is <sdf>; expected <robot>"),
        (b"<robot name='r'/>", "no chain of joints leads from link 'base' to link 'tool'"),
        (b'<!DOCTYPE x [<!ENTITY a "b">]><robot/>', "document type declaration"),
        (urdf(joint("base", "tool", kind="fixed")), "no revolute joint"),
        (urdf(joint("base", "tool", kind="prismatic")), "is 'prismatic'; expected revolute or fixed"),
        (urdf(joint("base", "tool"), joint("other", "tool")), "two parents"),
        (urdf(joint("a", "tool"), joint("tool", "a")), "no chain of joints"),
        (urdf(joint("base", "tool", "")), "no <limit>"),
        (urdf(joint("base", "tool", '<limit lower="0" upper="1"/>')), "<limit> has no velocity"),
        (urdf(joint("base", "tool", '<limit lower="1" upper="0" velocity="1"/>')), "expected lower < upper"),
        (urdf(joint("base", "tool", '<limit lower="0" upper="1" velocity="0"/>')), "velocity > 0"),
        (urdf(joint("base", "tool", '<limit lower="nan" upper="1" velocity="1"/>')), "expected lower < upper"),
        (urdf(joint("base", "tool", '<limit lower="x" upper="1" velocity="1"/>')), "lower='x' is not a number"),
        (urdf(joint("base", "tool", LIMIT + '<axis xyz="0 0 0"/>')), "expected a direction"),
        (urdf(joint("base", "tool", LIMIT + '<axis xyz="0 0"/>')), "expected three finite numbers"),
        (urdf(joint("base", "tool", LIMIT + '<origin xyz="0 0 inf"/>')), "expected three finite numbers"),
        (urdf(joint("base", "tool", LIMIT + '<origin rpy="0 0 up"/>')), "could not convert"),
        (urdf(joint("base", "tool", LIMIT + '<position_based_velocity_limits lower="1"/>')), "has no velocity_offset"),
        (b"<robot><joint name='j' type='fixed'><child link='tool'/></joint></robot>", "names no parent link"),
        (b"<robot><joint name='j' type='fixed'/></robot>", "names no child link"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_name(text, message):
    with pytest.raises(ArmModelError, match="some.urdf.*" + message.replace("<", ".")):
        parse_arm(text, "some.urdf")
