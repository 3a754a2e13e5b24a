"""The ten million ticks: an interrupted run goes on, another limiter's starts anew, the kept result is of this one."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from chatvla_edge.benchmarks import fuzz_limits
from chatvla_edge.benchmarks.report import Report

pytestmark = pytest.mark.skipif(
    not (fuzz_limits.CHECKOUT / "tests").is_dir(), reason="the tests run outside a checkout"
)
RESULT = Path(fuzz_limits.__file__).parent / "results" / "fuzz_limits.json"


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(fuzz_limits, "BATCH", 400)
    monkeypatch.setattr(fuzz_limits, "tick_cost", lambda report, ticks: None)
    ran = []
    batch = fuzz_limits.run_batch
    monkeypatch.setattr(fuzz_limits, "run_batch", lambda number: ran.append(number) or batch(number))
    return ran


def options(progress, ticks):
    return Namespace(quick=True, ticks=ticks, progress=progress)


def test_an_interrupted_run_goes_on_to_the_same_counts(small, tmp_path):
    fuzz_limits.run(options(tmp_path / "parts.json", 800))
    report = fuzz_limits.run(options(tmp_path / "parts.json", 2000))
    whole = fuzz_limits.run(options(None, 2000))
    assert small == [0, 1, 2, 3, 4, *range(5)]
    assert report.notes == whole.notes
    assert [goal.ok for goal in report.goals] == [False, True, True]  # not the ten million, and none broken


def test_progress_of_another_limiter_is_not_gone_on_from(small, tmp_path):
    progress = tmp_path / "progress.json"
    fuzz_limits.run(options(progress, 400))
    progress.write_text(json.dumps(json.loads(progress.read_text()) | {"sources": "another"}))
    fuzz_limits.run(options(progress, 400))
    assert small == [0, 0]


def test_the_kept_result_is_of_this_limiter_these_streams_this_oracle():
    assert fuzz_limits.sources() in " ".join(Report.read(RESULT).method), (
        "the limiter, the streams or the oracle changed: run the ten million ticks again (head of fuzz_limits.py)"
    )
