"""`verify BUNDLE --checkpoint C`: the command, its verdict, and what it refuses."""

import json

import numpy as np
import pytest
from support import faults
from support.small_cameras import camera
from typer.testing import CliRunner

from chatvla_edge.runtime.cli import application, main


def call(*arguments):
    return CliRunner().invoke(application(), [str(argument) for argument in arguments])


def plain(text):
    return " ".join("".join(" " if "─" <= letter <= "╿" else letter for letter in text).split())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return faults.checkpoint(tmp_path_factory.mktemp("checkpoint") / "c")


@pytest.fixture(scope="module")
def bundle(checkpoint, tmp_path_factory):
    return faults.export(checkpoint, tmp_path_factory.mktemp("bundle") / "b", "int8", gates=False)


def test_a_bundle_without_probes_is_judged_by_its_checkpoint(bundle, checkpoint):
    refused = call("verify", bundle.path)
    assert refused.exit_code == 1
    assert "judge it by its checkpoint: --checkpoint" in str(refused.exception)
    out = call("verify", bundle.path, "--checkpoint", checkpoint.path, "--probes", 1, "--json")
    assert out.exit_code == 0, out.output
    verdict = json.loads(out.stdout)
    assert verdict["reference"] == str(checkpoint.path)
    assert (verdict["parts"], verdict["first_divergence"]) == (None, None)
    names = {gate["name"]: gate for gate in verdict["gates"]}
    for name in ("vision/top", "language", "rows", "condition", "denoise/rms", "units", "query/rad", "parts/language"):
        assert names[f"lowering_parity/{name}"]["verdict"] == "passed", name
    assert names["quantization_error/tokens"]["verdict"] == "reported"
    assert names["quantization_error/query/text"]["verdict"] == "reported"
    assert not any(gate["verdict"] == "failed" for gate in verdict["gates"])


def test_bisect_names_the_layer_on_the_screen_and_in_json(checkpoint, tmp_path, monkeypatch):
    with faults.planted(faults.experts_rotated(8, "2"), monkeypatch):
        wrong = faults.export(checkpoint, tmp_path / "b", "int8", gates=False)
    arguments = ("verify", wrong.path, "--checkpoint", checkpoint.path, "--probes", 1, "--bisect")
    out = call(*arguments, "--json")
    assert out.exit_code == 1
    verdict = json.loads(out.stdout)
    assert verdict["first_divergence"] == "language, layer 2, experts"
    (part,) = [part for part in verdict["parts"] if part["diverges"]]
    assert (part["stage"], part["place"], part["what"]) == ("language", "layer 2", "experts")
    assert part["rms"] > 0.5 > part["limit"]
    assert part["routing"] == 1.0
    failed = [gate for gate in verdict["gates"] if gate["verdict"] == "failed"]
    assert "lowering_parity/parts/language" in [gate["name"] for gate in failed]
    assert all("meaning" in gate for gate in failed)
    monkeypatch.setenv("COLUMNS", "160")
    shown = call(*arguments)
    assert shown.exit_code == 1
    assert "first to diverge: language, layer 2, experts" in shown.stdout
    assert "first to diverge: language, layer 2, experts" in plain(shown.stdout)
    assert "lowering_parity/parts/language: a block of this stage" in shown.stdout


def test_another_checkpoint_is_refused_by_name(bundle, tmp_path):
    faults.checkpoint(tmp_path / "other", sharpness=1.01)
    out = call("verify", bundle.path, "--checkpoint", tmp_path / "other")
    assert out.exit_code == 1
    assert f"was exported from the checkpoint 'c' ({bundle.manifest.provenance.checkpoint_sha256[:12]})" in str(
        out.exception
    )
    assert f"found {tmp_path / 'other'}" in str(out.exception)


def test_the_same_weights_under_another_configuration_are_refused(bundle, checkpoint, tmp_path):
    import shutil

    changed = tmp_path / "c"
    shutil.copytree(checkpoint.path, changed)
    config = json.loads((changed / "config.json").read_text())
    config["rms_norm_eps"] = 1e-5
    (changed / "config.json").write_text(json.dumps(config))
    out = call("verify", bundle.path, "--checkpoint", changed)
    assert out.exit_code == 1
    assert "language.rms_eps is 1e-06 in the bundle, 1e-05 in the checkpoint" in str(out.exception)


def test_layers_need_a_checkpoint(bundle):
    out = call("verify", bundle.path, "--bisect")
    assert out.exit_code == 2
    assert "--checkpoint" in plain(out.output)


def test_without_the_export_room_the_command_says_what_to_install(bundle, checkpoint, monkeypatch):
    monkeypatch.setattr("chatvla_edge.runtime.commands.entry_points", lambda group: ())
    out = call("verify", bundle.path, "--checkpoint", checkpoint.path)
    assert out.exit_code == 1
    assert "chatvla-edge[export]" in str(out.exception)


# ------------------------------------------------------------------------------------------------- which command


def test_a_checkpoint_where_a_bundle_belongs_is_told_its_commands(checkpoint):
    for command in ("inspect", "verify", "infer"):
        out = call(command, checkpoint.path)
        assert out.exit_code == 1
        assert f"chatvla-edge inspect-checkpoint {checkpoint.path}" in str(out.exception)
        assert f"chatvla-edge export {checkpoint.path} -o BUNDLE" in str(out.exception)


def test_a_bundle_where_a_checkpoint_belongs_is_told_its_command(bundle, tmp_path):
    out = call("inspect-checkpoint", bundle.path)
    assert out.exit_code == 1
    assert f"use `chatvla-edge inspect {bundle.path}`" in str(out.exception)
    out = call("export", bundle.path, "-o", tmp_path / "b", "--robot", "arx_r5_bimanual")
    assert "pass the checkpoint it came from" in str(out.exception)


def test_both_inspections_say_the_same_thing_in_the_same_words(bundle, checkpoint, monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")

    def rows(command, path):
        lines = call(command, path).stdout.partition("└")[0].splitlines()  # the first table
        cells = [line.split("│") for line in lines if line.startswith("│")]
        return {cell[1].strip(): cell[2].strip() for cell in cells if len(cell) == 4}

    one, other = rows("inspect", bundle.path), rows("inspect-checkpoint", checkpoint.path)
    same = ["variant", "experts", "language", "vision", "head", "conditioning"]
    assert [one[name] for name in same] == [other[name] for name in same]
    assert one["chunk"] == f"{other['chunk']}; at 50 Hz, first step -1"
    assert one["state"].startswith("left.joint1 ... left.joint6 [rad], left.gripper [m]")


# ---------------------------------------------------------------------------------------------------------- infer


@pytest.fixture(scope="module")
def question(tmp_path_factory):
    folder = tmp_path_factory.mktemp("question")
    top = camera("top")
    frame = np.random.default_rng(0).integers(0, 256, (top.height, top.width, 3), dtype=np.uint8)
    np.save(folder / "top.npy", frame)
    (folder / "state.json").write_text(json.dumps([0.0] * 14))
    return ["--image", f"top={folder / 'top.npy'}", "--state", folder / "state.json", "--instruction", "Pick it."]


def test_an_answer_tells_its_actions_by_name_and_unit(bundle, question):
    out = call("infer", bundle.path, *question)
    assert out.exit_code == 0, out.output
    text = plain(out.stdout)
    for words in (
        "50 actions",
        "first, at -0.02 s",
        "last, at +0.96 s",
        "left.joint1",
        "rad",
        "experts visited",
        "memory",
    ):
        assert words in text, words


def test_the_memory_of_the_process_is_stated(bundle, question):
    found = json.loads(call("infer", bundle.path, *question, "--json").stdout)
    memory = found["memory"]
    assert 0 < memory["anonymous"] < memory["resident"] <= memory["peak"]
    assert memory["anonymous"] + memory["file"] <= memory["resident"]
    assert found["reasoning_age"] == {"queries": 0, "seconds": 0.0}


@pytest.mark.parametrize(
    ("left", "message"),
    [
        ("--image", "expected one for each camera: --image top=FILE"),
        ("--state", "expected a file of 14 numbers: left.joint1 ... left.joint6 [rad]"),
        ("--instruction", "say what the robot should do"),
    ],
)
def test_an_option_left_out_is_explained_by_what_the_bundle_wants(bundle, question, left, message, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    at = question.index(left)
    out = call("infer", bundle.path, *question[:at], *question[at + 2 :])
    assert out.exit_code == 2
    assert message in plain(out.output)


def test_a_frame_of_another_size_names_its_camera(bundle, question, tmp_path):
    np.save(tmp_path / "small.npy", np.zeros((30, 40, 3), np.uint8))
    out = call("infer", bundle.path, f"--image=top={tmp_path / 'small.npy'}", *question[2:])
    assert out.exit_code == 1
    assert str(out.exception).startswith("camera top: expected a frame of 60 x 90")


def test_failed_gates_that_were_allowed_are_shown_at_every_load(checkpoint, question, tmp_path, monkeypatch, capfd):
    with faults.planted(faults.experts_rotated(8), monkeypatch):
        wrong = faults.export(checkpoint, tmp_path / "b", "fp32", allow_failed_gates=True)
    monkeypatch.setattr("sys.argv", ["chatvla-edge", "infer", str(wrong.path), *map(str, question)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    said = plain(capfd.readouterr().err)
    assert "warning" in said
    assert "lowering_parity/language" in said
