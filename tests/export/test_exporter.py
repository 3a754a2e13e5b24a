"""The main job's first half, end to end: checkpoint -> bundle -> answers without torch, equal to the reference."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from chatvla_edge.export.checkpoint.reader import open_checkpoint
from chatvla_edge.export.checkpoint.synth import PRESETS, synthesize
from chatvla_edge.export.exporter import GateError, Settings, export, plan
from chatvla_edge.export.model.images import Preprocessing
from chatvla_edge.export.model.policy import Observation
from chatvla_edge.export.robots import load
from chatvla_edge.runtime.bundle import open_bundle
from chatvla_edge.runtime.cli import application
from chatvla_edge.runtime.engines.onnxruntime import Threads
from chatvla_edge.runtime.policy import Policy

ROBOT = load("arx_r5_bimanual")
INSTRUCTION = "Solve the equation and point out the correct answer."


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint") / "c"
    spec, layout, _ = PRESETS["tiny"]
    synthesize(directory, spec, layout, dtype=torch.float32)
    return open_checkpoint(directory)


def settings(precision, **changes):
    return Settings(target="cpu", precision=precision, robot=ROBOT, max_reasoning=16, probes=1, **changes)


@pytest.fixture(scope="module", params=["fp32", "int8", "int8-row", "int4"])
def bundle(request, checkpoint, tmp_path_factory):
    destination = tmp_path_factory.mktemp(request.param) / "bundle"
    return export(checkpoint, destination, settings(request.param), lambda _name, _count: None)


@pytest.fixture(scope="module")
def policy(bundle):
    return Policy(bundle.path, bundle.manifest, Threads(1))


def observe(seed):
    rng = np.random.default_rng(seed)
    frame = rng.integers(0, 256, (480, 640, 3), dtype=np.uint8)
    return [frame], rng.standard_normal(14).astype(np.float32), rng.standard_normal((50, 14)).astype(np.float32)


def test_the_bundle_holds_what_was_exported_and_passed_its_gates(bundle, checkpoint):
    manifest = bundle.manifest
    assert manifest.geometry.language.experts.routed == checkpoint.spec.language.experts.routed
    assert manifest.timing.first_step == -1
    results = manifest.gates.results
    assert {result.verdict for result in results if result.kind == "lowering_parity"} == {"passed"}
    assert {result.verdict for result in results if result.kind == "quantization_error"} == {"reported"}
    with open_bundle(bundle.path) as again:
        assert again.seal == bundle.seal


def test_in_fp32_the_answer_is_the_references(checkpoint, bundle, policy):
    if bundle.manifest.stages.language.precision != "fp32":
        pytest.skip("another precision has another answer")
    reference = checkpoint.policy([Preprocessing(camera.preprocessing) for camera in ROBOT.cameras])
    for seed in range(4):
        frames, state, noise = observe(seed)
        expected = reference.query(Observation(frames, state), INSTRUCTION, torch.from_numpy(noise), max_tokens=16)
        answer = policy.query(frames, state, INSTRUCTION, noise)
        assert answer.token_ids == expected.token_ids
        assert answer.text == expected.text
        np.testing.assert_array_equal(answer.routing, expected.routing)
        np.testing.assert_allclose(answer.normalized, expected.normalized, atol=1e-4)
        np.testing.assert_allclose(answer.chunk, expected.chunk, atol=2e-4)


def test_a_draft_never_changes_the_answer(policy):
    rng = np.random.default_rng(0)
    draft: list[int] = []
    for seed in range(12):
        frames, state, noise = observe(seed // 3)
        plain = policy.query(frames, state, INSTRUCTION, noise)
        tried = policy.query(frames, state, INSTRUCTION, noise, draft=draft)
        assert tried.token_ids == plain.token_ids
        np.testing.assert_array_equal(tried.normalized, plain.normalized)
        np.testing.assert_array_equal(tried.routing, plain.routing)
        assert tried.passes <= plain.passes
        draft = plain.token_ids if seed % 2 else rng.integers(0, 256, 20).tolist()


def test_verify_and_infer_run_where_torch_cannot_be_imported(bundle, tmp_path):
    frames, state, noise = observe(1)
    np.save(tmp_path / "top.npy", frames[0])
    np.save(tmp_path / "noise.npy", noise)
    (tmp_path / "state.json").write_text(json.dumps(state.tolist()))
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'transformers', 'onnx', 'safetensors'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "from chatvla_edge.runtime.cli import main\n"
        "main()\n"
    )
    infer = [
        "infer", bundle.path, "--image", f"top={tmp_path / 'top.npy'}", "--state", tmp_path / "state.json",
        "--instruction", INSTRUCTION, "--noise", tmp_path / "noise.npy", "--json",
    ]  # fmt: skip
    out = subprocess.run(
        [sys.executable, "-c", code, *map(str, infer)], capture_output=True, text=True, timeout=120, check=False
    )
    assert out.returncode == 0, out.stderr
    facts = json.loads(out.stdout)
    expected = Policy(bundle.path, bundle.manifest, Threads(1)).query(frames, state, INSTRUCTION, noise)
    assert facts["token_ids"] == expected.token_ids
    # What a process holds that never imported torch: the libraries alone would be several times as much.
    assert facts["memory"]["peak"] < 400e6
    np.testing.assert_array_equal(np.asarray(facts["normalized"], np.float32), expected.normalized)


def test_verify_repeats_the_gates_on_this_machine(bundle):
    out = CliRunner().invoke(application(), ["verify", str(bundle.path), "--json"])
    assert out.exit_code == 0, out.output
    verdict = json.loads(out.stdout)
    assert verdict["reference"] == "the probes in the bundle"
    # The same gates as at export, but for those that need the reference itself.
    repeated = [result.name for result in bundle.manifest.gates.results if "/parts/" not in result.name]
    assert [gate["name"] for gate in verdict["gates"]] == repeated


def test_a_wrong_expert_order_fails_the_gates_and_leaves_nothing_that_loads(checkpoint, tmp_path, monkeypatch):
    from chatvla_edge.export.lower import onnxruntime as lowering

    right = lowering._expert
    count = checkpoint.spec.language.experts.routed
    monkeypatch.setattr(lowering, "_expert", lambda weight, index: right(weight, (index + 1) % count))
    with pytest.raises(GateError, match="lowering_parity/language"):
        export(checkpoint, tmp_path / "b", settings("fp32"), lambda _name, _count: None)
    (left,) = tmp_path.iterdir()
    with pytest.raises(ValueError, match="did not finish"):
        open_bundle(left)
    # What took long is kept: allowing the failure costs no more than the judging.
    said: list[str] = []
    allowed = settings("fp32", allow_failed_gates=True)
    export(checkpoint, tmp_path / "b", allowed, lambda _name, _count: None, said.append)
    assert sum("finished earlier" in line for line in said) == len(plan(checkpoint, allowed).graphs) + 1


def test_failed_gates_may_be_allowed_and_are_then_written(checkpoint, tmp_path, monkeypatch):
    from chatvla_edge.export.lower import onnxruntime as lowering

    right = lowering._expert
    count = checkpoint.spec.language.experts.routed
    monkeypatch.setattr(lowering, "_expert", lambda weight, index: right(weight, (index + 1) % count))
    allowed = settings("fp32", allow_failed_gates=True)
    bundle = export(checkpoint, tmp_path / "b", allowed, lambda _name, _count: None)
    assert "lowering_parity/language" in bundle.manifest.gates.allowed_failed_gates


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"target": "orin-jp72"}, "expected cpu or cuda"), ({"precision": "int2"}, "no precision 'int2'")],
)
def test_what_the_target_cannot_run_is_refused_before_anything_is_written(checkpoint, changes, message):
    from dataclasses import replace

    with pytest.raises(ValueError, match=message):
        plan(checkpoint, replace(settings("fp32"), **changes))


def test_the_commands_tell_one_story(tmp_path):
    runner = CliRunner()
    app = application()
    assert runner.invoke(app, ["synth", "tiny", "-o", str(tmp_path / "c"), "--precision", "fp32"]).exit_code == 0
    arguments = ["export", str(tmp_path / "c"), "-o", str(tmp_path / "b"), "--robot", "arx_r5_bimanual"]
    dry = runner.invoke(app, [*arguments, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert "peak memory, predicted" in dry.stdout
    assert not (tmp_path / "b").exists()
    done = runner.invoke(app, [*arguments, "--max-reasoning", "8", "--probes", "1"])
    assert done.exit_code == 0, done.output
    shown = runner.invoke(app, ["inspect", str(tmp_path / "b")])
    assert shown.exit_code == 0
    assert "lowering_parity/language" in shown.stdout
    again = runner.invoke(app, arguments)
    assert again.exit_code == 1


def test_a_robot_that_does_not_exist_is_refused_with_the_names_that_do(tmp_path):
    with pytest.raises(ValueError, match="arx_r5_bimanual, franka_robotiq"):
        load("spot")
    (tmp_path / "half.yaml").write_text("timing: {rate_hz: 50, first_step: -1}\n")
    with pytest.raises(ValueError, match=r"timing\.pairing.*"):
        load(str(tmp_path / "half.yaml"))
