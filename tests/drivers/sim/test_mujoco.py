"""The MuJoCo rigs: chains as published, arms that follow and hold, fingers that grasp, pictures of the present."""

import os
import subprocess
import sys
import time
import uuid
from ctypes.util import find_library
from importlib.util import find_spec
from itertools import pairwise

import numpy as np
import pytest

from chatvla_edge.drivers import registry, rig
from chatvla_edge.drivers.errors import DeviceUnsuitableError
from chatvla_edge.drivers.sim.mujoco_models import MOUNTS
from chatvla_edge.drivers.sim.mujoco_world import MujocoArtist, MujocoWorld
from chatvla_edge.runtime.arm_model import load_arm
from chatvla_edge.runtime.kinematics import Kinematics

if find_spec("mujoco") is None:  # not imported here: the way to draw is chosen when it is
    pytest.skip("the extra `sim` is not installed", allow_module_level=True)

SCENES = ["arx_r5_bimanual", "franka_robotiq"]


def base_and_tool(world, arm):
    """Pose of the tool in the arm's base: rotation [3, 3], place [3]."""
    body, site = world._data.body(arm), world._data.site(f"{arm}_tool")
    turn = body.xmat.reshape(3, 3)
    return turn.T @ site.xmat.reshape(3, 3), turn.T @ (site.xpos - body.xpos)


@pytest.mark.parametrize(
    ("scene", "arm", "chain"),
    [
        ("arx_r5_bimanual", "left", "arx_r5"),
        ("arx_r5_bimanual", "right", "arx_r5"),
        ("franka_robotiq", "franka", "fr3"),
    ],
)
def test_chains_are_those_of_the_runtime(scene, arm, chain):
    world, model = MujocoWorld(scene), load_arm(chain)
    kinematics = Kinematics(model)
    random = np.random.default_rng(3)
    first, _ = world.arms[arm]
    for _ in range(20):
        q = random.uniform(model.lower, model.upper)
        for i, value in enumerate(q):
            world._data.qpos[world._joints[first + i][0]] = value
        world._mujoco.mj_kinematics(world._model, world._data)
        rotation, place = base_and_tool(world, arm)
        expected_rotation, expected_place = kinematics.tool_pose(q)
        np.testing.assert_allclose(place, expected_place, atol=1e-9)
        np.testing.assert_allclose(rotation, np.asarray(expected_rotation).reshape(3, 3), atol=1e-9)


@pytest.mark.parametrize("scene", SCENES)
def test_arms_stand_still_until_told_and_arrive_where_told(scene):
    world = MujocoWorld(scene)
    start = world.position()
    for _ in range(500):
        world.step(start)
    np.testing.assert_allclose(world.position(), start, atol=1e-3)
    target = start + 0.2
    target[[6, 13] if scene == "arx_r5_bimanual" else 7] = 0.03  # openings
    for _ in range(750):
        world.step(target)
    np.testing.assert_allclose(world.position(), target, atol=2e-3)


def test_a_moving_joint_lags_by_its_servo_s_40_ms():
    world = MujocoWorld("franka_robotiq")
    target = world.position()
    for _ in range(500):
        target[0] += 0.5 * world.dt
        world.step(target)
    assert target[0] - world.position()[0] == pytest.approx(0.5 * 0.04, rel=0.1)


@pytest.mark.parametrize(("scene", "arm"), [("arx_r5_bimanual", "left"), ("franka_robotiq", "franka")])
def test_fingers_that_close_on_a_cube_hold_it_in_the_air(scene, arm):
    world = MujocoWorld(scene)
    gripper = world.arms["gripper" if scene == "franka_robotiq" else arm][1] - 1
    target = world.position()
    fingers = [world._data.body(f"{arm}_finger{i}") for i in (1, 2)]
    middle = (fingers[0].xpos + fingers[1].xpos) / 2
    joint = world._model.body("cube0").jntadr[0]
    at = world._model.jnt_qposadr[joint]
    world._data.qpos[at : at + 3] = middle
    world._data.qpos[at + 3 : at + 7] = world._data.body(f"{arm}_finger1").xquat
    target[gripper] = 0.0
    for _ in range(1500):
        world.step(target)
    height = world._data.body("cube0").xpos[2]
    assert height > middle[2] - 0.03
    assert world.position()[gripper] == pytest.approx(0.04, abs=0.004)
    target[gripper] = 0.08
    for _ in range(500):
        world.step(target)
    assert world._data.body("cube0").xpos[2] < 0.03


def test_a_target_beyond_the_range_is_driven_to_its_end():
    world = MujocoWorld("arx_r5_bimanual")
    target = world.position()
    target[4] = 9.0
    for _ in range(1500):
        world.step(target)
    assert world.position()[4] == pytest.approx(1.57, abs=1e-3)


def test_a_reset_lays_the_cubes_by_its_seed():
    world = MujocoWorld("arx_r5_bimanual")
    one, two, again = (world.tell({"reset": seed})["cubes"] for seed in (1, 2, 1))
    assert one == again
    assert one != two


def test_every_mount_has_a_rig_that_names_it():
    for scene in SCENES:
        loaded = rig.load(f"mujoco_{scene}")
        assert list(loaded.arms) == [mount.name for mount in MOUNTS[scene]]
        for name, arm in loaded.arms.items():
            assert arm.options["arm"] == name
    with pytest.raises(ValueError, match="expected one of: left, right"):
        registry.create("arms", "mujoco", {"scene": "arx_r5_bimanual", "arm": "gripper"})


@pytest.fixture
def renderer():
    try:
        MujocoArtist("franka_robotiq")._make(64, 64).close()
    except DeviceUnsuitableError as error:
        pytest.skip(f"nothing can be rendered here: {error}")


def test_where_nothing_can_be_rendered_physics_runs_and_drawing_says_what_to_install():
    code = (
        "from chatvla_edge.drivers.errors import DeviceUnsuitableError\n"
        "from chatvla_edge.drivers.sim.mujoco_world import MujocoArtist, MujocoWorld\n"
        "world = MujocoWorld('franka_robotiq')\n"
        "world.step(world.position())\n"
        "try:\n"
        "    MujocoArtist('franka_robotiq').draw(world.scene(), 270, 480)\n"
        "except DeviceUnsuitableError as error:\n"
        "    print(error)\n"
    )
    environment = {**os.environ, "MUJOCO_GL": "osmesa", "PYOPENGL_PLATFORM": "osmesa", "LD_LIBRARY_PATH": ""}
    if find_library("OSMesa"):
        pytest.skip("OSMesa is installed here")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "cannot draw here: MUJOCO_GL=osmesa" in said.stdout
    assert "apt-get install libegl1 libgl1-mesa-dri" in said.stdout


@pytest.mark.usefixtures("renderer")
def test_a_picture_shows_where_the_arms_are():
    world, artist = MujocoWorld("arx_r5_bimanual"), MujocoArtist("arx_r5_bimanual")
    before = artist.draw(world.scene(), 240, 320).copy()
    assert before.shape == (240, 320, 3)
    reds = (before[..., 0] > 150) & (before[..., 1] < 80)
    assert reds.sum() > 20  # the red cube
    target = world.position()
    target[0] += 0.5
    for _ in range(500):
        world.step(target)
    after = artist.draw(world.scene(), 240, 320)
    moved = (np.abs(after.astype(int) - before).max(axis=2) > 30).any(axis=0)
    assert moved[:160].any()
    assert not moved[200:].any()  # the right arm stands


@pytest.mark.usefixtures("renderer")
def test_arm_and_camera_meet_in_one_world_in_real_time():
    name = f"test-{uuid.uuid4().hex[:16]}"
    options = {"scene": "franka_robotiq", "world": name}
    arm = registry.create("arms", "mujoco", {**options, "arm": "franka"})
    camera = registry.create("cameras", "mujoco", options)
    arm.open(500)
    camera.open(270, 480, 30.0)
    first = arm.state()
    frames = [camera.read(5.0) for _ in range(5)]
    assert all(b.captured_ns > a.captured_ns for a, b in pairwise(frames))
    assert camera.health().facts["renderer"] == os.environ["MUJOCO_GL"]
    assert camera.health().facts["picture_ms"] > 0
    end = time.monotonic() + 10
    target = np.array(first.position)
    target[0] += 0.1
    while abs(arm.state().position[0] - target[0]) > 1e-3:
        arm.command(target)
        assert time.monotonic() < end
    last = arm.state()
    assert (last.captured_ns - first.captured_ns) / 2e6 == pytest.approx(last.sequence - first.sequence, abs=60)
    camera.close()
    arm.close()
