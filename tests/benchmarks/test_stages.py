"""The benchmarks of stages and experts run through and say what they promise; their figures are not looked at."""

from argparse import Namespace

import pytest

from chatvla_edge.benchmarks import experts, peers, resident, stages
from chatvla_edge.benchmarks.report import Report


def options(**changes):
    return Namespace(quick=True, seconds=0.01, threads=[1], **changes)


def again(report: Report) -> Report:
    return Report.model_validate_json(report.model_dump_json())


@pytest.mark.slow
def test_queries_drafts_and_memory_of_tiny_are_in_the_report(tmp_path):
    report = again(stages.run(options(parts=["tiny", "memory"], work=tmp_path, rounds=7, without=[])))
    rows = {row.name: row for row in report.rows}
    for name in ("eager fp32", "eager bf16", "fp32", "int8", "int8-row", "int4", "int4-row"):
        assert rows[f"tiny, 1 thread: query: {name}"].p50 > 0
    for precision in ("fp32", "int8", "int8-row", "int4", "int4-row"):
        told = f"tiny, 1 thread: reasoning {precision}"
        assert rows[f"{told}: plain: passes"].p50 == stages.TOKENS
        assert rows[f"{told}: right draft: passes"].p50 == 1
        assert rows[f"{told}: draft with 3 wrong tokens: passes"].p50 == 4
        assert rows[f"tiny, {precision}, without torch: resident after one query"].p50 > 10 << 20
    assert len(report.goals) == 3


@pytest.mark.slow
def test_the_price_of_a_layer_comes_from_two_sizes(tmp_path, monkeypatch):
    small = stages.PRESETS["tiny"][0]

    def shortened(layers, blocks, head):
        follows = small.head.reasoning.model_copy(update={"start": head // 2, "stop": head})
        return small.model_copy(
            update={
                "vision": small.vision.model_copy(update={"depth": blocks}),
                "language": small.language.model_copy(update={"layers": layers}),
                "head": small.head.model_copy(update={"depth": head, "reasoning": follows}),
            }
        )

    monkeypatch.setattr(stages, "shortened", shortened)
    monkeypatch.setattr(stages, "READ_BYTES", 1 << 20)
    chosen = ["int8", "int8-row", "int4"]
    report = again(stages.run(options(parts=["real"], work=tmp_path, rounds=7, without=[], precisions=chosen)))
    names = {row.name for row in report.rows}
    for stage in stages.STAGES:
        for size in ("half", "whole"):
            assert f"{stage}, 1 thread: {size}: eager fp32" in names
            assert f"{stage}, 1 thread: {size}: int4" in names
        assert f"{stage}, 1 thread: int8: extrapolated" in names
    assert "query of 50 tokens, 1 thread: int8: extrapolated" in names
    assert "query with a right draft, 1 thread: int8-row: extrapolated, at most" in names
    assert len(report.goals) == 4


@pytest.mark.slow
def test_experts_are_compared_with_the_loop_and_with_bandwidth(monkeypatch):
    monkeypatch.setattr(experts, "NARROW", 128)
    report = again(experts.run(options(work=None)))
    names = {row.name for row in report.rows}
    assert {"decode, 1 thread: int4", "256 rows, 1 thread: eager bf16", "one map, int8, 1 thread: two rows"} <= names
    assert [goal.ok for goal in report.goals] == [None, None], "caches hold narrow experts"


@pytest.mark.slow
def test_peers_compute_the_same_and_a_missing_one_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda _name: None)
    report = again(peers.run(options(work=tmp_path)))
    names = {row.name for row in report.rows}
    for stage in peers.STAGES:
        assert {f"{stage}, 1 thread: {name}" for name in ("eager fp32", "int8-row", "plain ONNX, all experts")} <= names
    assert peers.OPENVINO in report.notes
    # All experts or the chosen ones: the same sums.
    feed = peers.feeds(peers.PRESETS["tiny"][0])["decode"]
    found = [peers.ort(tmp_path / f"language_{kind}.onnx", 1)(feed) for kind in ("all", "chosen")]
    assert peers.difference(found[1]["hidden"], found[0]["hidden"]) <= 1e-5


def test_a_right_price_is_linear_in_layers():
    assert stages.Price(base=2.0, layer=0.5).of(27) == 15.5


def test_the_robots_side_is_measured_without_torch():
    import subprocess
    import sys

    code = "import sys, chatvla_edge.benchmarks.resident; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert resident.INSTRUCTION
