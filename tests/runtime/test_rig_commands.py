"""`chatvla-edge rig`: what it shows, what it refuses, and a rig held against a bundle's manifest."""

import json

import pytest
from support import bundles
from typer.testing import CliRunner

from chatvla_edge.drivers import rig
from chatvla_edge.runtime.bundle import Manifest
from chatvla_edge.runtime.rig_commands import app
from chatvla_edge.runtime.rig_fit import bundle_problems

FRANKA = rig.find("sim_franka_robotiq").read_text()


@pytest.fixture
def run():
    def run(*arguments):
        answer = CliRunner().invoke(app, ["rig", *map(str, arguments)], catch_exceptions=False)
        return answer.exit_code, answer.stdout

    return run


CAMERAS = """
cameras:
  right: {driver: sim_camera, height: 480, width: 640, rate: 30}
  wrist: {driver: sim_camera, height: 120, width: 120, rate: 30}

"""


@pytest.fixture
def bundle(tmp_path):
    """One arm `right` in Cartesian poses with its gripper, at 15 Hz."""
    return bundles.lay(tmp_path / "bundle")


@pytest.fixture
def fitting(tmp_path):
    """The text of a rig that this bundle can drive."""
    arms = FRANKA[FRANKA.index("arms:\n") :].replace("  franka:\n", "  right:\n").replace("of: franka", "of: right")
    return FRANKA[: FRANKA.index("cameras:\n")] + CAMERAS + arms


def test_list_and_drivers_name_what_there_is(run):
    code, out = run("list", "--json")
    assert code == 0
    assert set(json.loads(out)) == set(rig.names())
    code, out = run("drivers", "--json")
    assert json.loads(out)["cameras"]["sim_camera"] == "chatvla_edge.drivers.sim.camera:SimCamera"
    assert "sim_arm" in run("drivers")[1]
    assert "sim_franka_robotiq" in run("list")[1]


def test_show_gives_the_rig_back(run, tmp_path):
    code, out = run("show", "sim_franka_robotiq", "--json")
    assert code == 0
    file = tmp_path / "again.yaml"
    file.write_text(out)  # JSON is YAML
    assert rig.load(str(file)) == rig.load("sim_franka_robotiq")
    code, out = run("show", "sim_arx_r5_bimanual")
    assert code == 0
    assert "500 Hz" in out


def test_a_good_rig_passes(run):
    assert run("check", "sim_arx_r5_bimanual") == (0, "good sim_arx_r5_bimanual: the file\n")


def test_a_wrong_rig_fails_with_every_reason(run, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(FRANKA.replace("home: [0.085]", "home: [9]").replace("of: franka", "of: nobody"))
    code, out = run("check", file, "--json")
    assert code == 1
    answer = json.loads(out)
    assert answer["ok"] is False
    assert len(answer["problems"]) == 2
    assert all(problem.startswith(f"{file}:") for problem in answer["problems"])
    code, out = run("check", file)
    assert code == 1
    assert "arms.gripper.of" in out


@pytest.mark.parametrize(
    ("chain", "words"),
    [("fr4", "no arm 'fr4'"), ("nowhere.urdf", "nowhere.urdf"), ("arx_r5", "found arx_r5 with 6 joints, expected 7")],
)
def test_kinematics_that_do_not_fit_are_found(run, tmp_path, chain, words):
    file = tmp_path / "mine.yaml"
    file.write_text(FRANKA.replace("chain: fr3", f"chain: {chain}"))
    code, out = run("check", file)
    assert code == 1
    assert "arms.franka.chain" in out
    assert words in out


def test_a_bundle_that_fits_passes(run, fitting, bundle, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(fitting)
    assert run("check", file, "--bundle", bundle) == (0, "good sim_franka_robotiq: the file and the bundle\n")


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("  wrist: {", "  wirst: {", "the camera 'wrist'"),
        ("height: 120", "height: 240", "frames of 120 x 120"),
        ("  rate: 15", "  rate: 20", "15.0 Hz"),
        ("  right:\n", "  other:\n", "the policy moves an arm 'right'; the rig's arms are other"),
        ("    chain: fr3\n", "", "chain is not stated"),
    ],
)
def test_a_bundle_that_does_not_fit_fails_with_the_reason(run, fitting, bundle, tmp_path, before, after, words):
    assert before in fitting
    text = fitting.replace(before, after, 1).replace("of: right", "of: other" if "other" in after else "of: right")
    if "chain" in before:
        text = text.replace("      workspace:\n        box: [0.2, -0.6, 0.1, 0.85, 0.6, 0.95]\n", "")
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    code, out = run("check", file, "--bundle", bundle, "--json")
    assert code == 1
    assert any(words in problem for problem in json.loads(out)["problems"]), out


def test_what_the_policy_speaks_of_must_be_on_the_rig():
    manifest = Manifest.model_validate(bundles.manifest_of_joints())
    problems = "\n".join(bundle_problems(rig.load("sim_arx_r5_bimanual"), manifest, "b"))
    assert "the policy speaks of left.joint_1; the rig's left has ('joint1'" in problems
    problems = "\n".join(bundle_problems(rig.load("sim_franka_robotiq"), manifest, "b"))
    assert "the policy moves an arm 'left'; the rig's arms are franka, gripper" in problems
