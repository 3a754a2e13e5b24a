"""The checkpoint commands as a user types them."""

import json

import pytest
from typer.testing import CliRunner

from chatvla_edge.export.checkpoint.reader import open_checkpoint
from chatvla_edge.runtime.cli import application

runner = CliRunner()


def plain(text):
    """What the tables say, without their frames and line breaks."""
    return " ".join("".join(" " if "─" <= letter <= "╿" else letter for letter in text).split())


def call(*arguments):
    return runner.invoke(application(), [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cli") / "tiny"
    assert call("synth", "tiny", "-o", directory).exit_code == 0
    return directory


def test_inspect_says_geometry_variant_routing_bytes_and_meaning(tiny):
    out = call("inspect-checkpoint", tiny)
    assert out.exit_code == 0
    for words in (
        "ChatVLA-2 (reasoning-following)",
        "dynamic, 8 experts, top-2",
        "blocks 2..3 follow the reasoning",
        "50 actions of 14",
        "[rad]",
        "active per token",
        "int4",
    ):
        assert words in plain(out.stdout), words


def test_inspect_as_json_is_json_and_holds_the_whole_spec(tiny):
    facts = json.loads(call("inspect-checkpoint", tiny, "--json").stdout)
    assert facts["spec"]["language"]["experts"]["routed"] == 8
    assert facts["parameters"]["total"] == sum(facts["parameters"]["parts"].values())
    assert facts["bytes"]["bf16"] == 2 * facts["parameters"]["total"] == facts["stored_bytes"]


def test_check_reads_every_tensor(tiny):
    assert call("inspect-checkpoint", tiny, "--check").exit_code == 0


def test_synth_lists_its_geometries():
    out = call("synth", "list")
    assert out.exit_code == 0
    assert "11,264,814,062" in out.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("synth", "huge", "-o", "x"), "expected one of tiny"),
        (("synth", "tiny"), "--output"),
        (("inspect-checkpoint", "/nowhere/at/all"), "does not exist"),
        (("synth", "tiny", "-o", "x", "--precision", "int3"), "bf16 or fp32"),
        (("synth", "tiny", "-o", "x", "--layers", "9"), "1..2"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what_was_expected(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = call(*arguments)
    assert out.exit_code == 2
    assert message in plain(out.output)
    assert not list(tmp_path.iterdir())


def test_upcycle_of_a_checkpoint_that_has_experts_exits_with_1_and_says_why(tiny, tmp_path):
    out = call("upcycle", tiny, "-o", tmp_path / "c")
    assert out.exit_code != 0
    assert "only a dense checkpoint" in str(out.exception or out.output)


def test_upcycle_writes_a_checkpoint_with_the_experts_asked_for(tmp_path):
    from chatvla_edge.export.checkpoint.synth import PRESETS, synthesize
    from chatvla_edge.export.spec import ExpertsSpec

    spec, layout, _ = PRESETS["tiny"]
    dense = spec.model_copy(update={"language": spec.language.model_copy(update={"experts": ExpertsSpec()})})
    synthesize(tmp_path / "dense", dense, layout)
    out = call("upcycle", tmp_path / "dense", "-o", tmp_path / "c", "--experts", 4, "--top-k", 2, "--shared", 1)
    assert out.exit_code == 0, out.output
    assert "does not compute what its parent does" in " ".join(out.stdout.split())
    assert open_checkpoint(tmp_path / "c").spec.language.experts == ExpertsSpec(routed=4, top_k=2, shared=1)


def test_truncated_geometry(tmp_path):
    assert call("synth", "tiny", "-o", tmp_path / "c", "--layers", 1, "--precision", "fp32").exit_code == 0
    assert open_checkpoint(tmp_path / "c").spec.language.layers == 1


def test_the_demo_runs_and_says_what_was_not_real():
    out = call("demo", "--reference")
    assert out.exit_code == 0, out.output
    assert "same tokens: True" in out.stdout
    assert "the weights are random" in " ".join(out.stdout.split())
