"""Benchmarks are found without being imported, and run the same way from both commands."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from typer.testing import CliRunner

from chatvla_edge import benchmarks
from chatvla_edge.benchmarks import script
from chatvla_edge.benchmarks.cli import app
from chatvla_edge.benchmarks.report import Report

FAKE = '''
"""A benchmark for the tests."""
import sys
from chatvla_edge.benchmarks import script
from chatvla_edge.benchmarks.report import Report

SUMMARY = "Measures nothing [at all]."

def add_arguments(parser):
    parser.add_argument("--value", type=float, default=1.0, help="what is found")

def run(options):
    report = Report(title="Nothing, quickly" if options.quick else "Nothing, slowly")
    report.figure("nothing", options.value, "s")
    report.goal("little of it", options.value, "<=", 2.0, unit="s", row="nothing")
    return report

if __name__ == "__main__":
    sys.exit(script.main(__file__))
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder whose modules are benchmarks too: one that works, one that needs what is not there, one that is none."""
    (tmp_path / "nothing.py").write_text(FAKE)
    (tmp_path / "needy.py").write_text('import no_such_library\n\nSUMMARY = "Cannot be imported."\n')
    (tmp_path / "helper.py").write_text("MEAN = 1\n")
    monkeypatch.setattr(benchmarks, "__path__", [*benchmarks.__path__, str(tmp_path)])
    yield tmp_path
    sys.modules.pop("chatvla_edge.benchmarks.nothing", None)


@pytest.fixture
def bench():
    runner = CliRunner(env={"COLUMNS": "200"})
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments])


def test_benchmarks_are_found_by_their_summary_and_not_imported(folder):
    found = script.discover()
    assert found["nothing"] == "Measures nothing [at all]."
    assert found["needy"] == "Cannot be imported."
    assert "helper" not in found
    assert "chatvla_edge.benchmarks.nothing" not in sys.modules


def test_ours_are_found():
    assert {"fuzz_limits", "peaks", "seams", "servo", "slots"} <= set(script.discover())


def test_every_committed_result_is_one_of_a_benchmark():
    results = sorted(Path(benchmarks.__path__[0], "results").glob("*.json"))
    assert {Report.read(path).benchmark for path in results} <= set(script.discover())


def test_without_a_name_all_are_listed_with_their_last_goals(folder, bench):
    (folder / "results").mkdir()
    for date, value in (("2024-01-02", 3.0), ("2023-01-02", 1.0)):
        report = Report(title="t", benchmark="nothing", machine={"date": date})
        report.goal("little of it", value, "<=", 2.0, unit="s")
        report.write(folder / "results" / f"nothing-{date}.json")
    listed = bench()
    assert listed.exit_code == 0
    assert "Measures nothing [at all]." in listed.output
    assert "2024-01-02" in listed.output
    assert "MISSED little of it: 3.00 s" in listed.output
    assert "2023-01-02" not in listed.output


def test_a_benchmark_runs_keeps_its_result_and_draws_it(folder, bench, tmp_path):
    kept, plot = tmp_path / "r.json", tmp_path / "r.svg"
    ran = bench("nothing", "--quick", "--json", kept, "--plot", plot)
    assert ran.exit_code == 0, ran.output
    report = Report.read(kept)
    assert (report.benchmark, report.quick, report.title) == ("nothing", True, "Nothing, quickly")
    assert report.machine["versions"]["python"]
    ET.fromstring(plot.read_text())
    assert "met    little of it" in ran.output


def test_a_missed_goal_exits_1_and_is_kept(folder, bench, tmp_path):
    ran = bench("nothing", "--value", 3, "--json", tmp_path / "r.json")
    assert ran.exit_code == 1
    assert json.loads((tmp_path / "r.json").read_text())["goals"][0]["ok"] is False


@pytest.mark.parametrize(
    "arguments",
    [
        ["gone"],
        ["nothing", "--no-such-option"],
        ["nothing", "--json", "/no/such/folder/r.json"],
        ["--quick", "nothing"],
        ["--draw", "/no/such/file.json"],
    ],
)
def test_wrong_usage_exits_2_before_anything_is_measured(folder, bench, arguments):
    assert bench(*arguments).exit_code == 2


def test_drawing_takes_no_name(folder, bench, tmp_path):
    Report(title="t").write(tmp_path / "r.json")
    assert bench("--draw", tmp_path / "r.json", "nothing").exit_code == 2


def test_a_kept_result_is_drawn_beside_it(bench, tmp_path):
    Report(title="kept").write(tmp_path / "r.json")
    assert bench("--draw", tmp_path / "r.json").exit_code == 0
    assert "kept" in (tmp_path / "r.svg").read_text()


def test_a_benchmark_tells_its_own_help(folder, bench):
    helped = bench("nothing", "--help")
    assert helped.exit_code == 0
    assert "--value" in helped.output
    assert "--plot" in helped.output


def test_the_module_runs_as_the_command_does(tmp_path):
    # In a process of its own, where the package's path is extended before the module runs.
    (tmp_path / "nothing.py").write_text(FAKE)
    program = (
        f"import chatvla_edge.benchmarks as b, runpy; b.__path__ = [*b.__path__, {str(tmp_path)!r}]; "
        "runpy.run_module('chatvla_edge.benchmarks.nothing', run_name='__main__')"
    )
    for value, code in ((1, 0), (3, 1)):
        ran = subprocess.run(
            [sys.executable, "-c", program, "--quick", "--value", str(value), "--json", "r.json"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert ran.returncode == code, ran.stderr
        assert Report.read(tmp_path / "r.json").goals[0].ok is (code == 0)


def test_the_room_registers_its_command_and_is_light(tmp_path):
    program = (
        "import sys; from importlib.metadata import entry_points; "
        "(found,) = entry_points(group='chatvla_edge.commands', name='benchmarks'); found.load(); "
        "assert 'numpy' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)


@pytest.mark.slow
def test_the_slots_and_the_peaks_run_quickly(tmp_path):
    for name in ("slots", "peaks"):
        kept = tmp_path / f"{name}.json"
        command = [sys.executable, "-m", f"chatvla_edge.benchmarks.{name}", "--quick", "--json", kept]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert ran.returncode in (0, 1), ran.stderr  # a busy machine may miss a goal
        assert Report.read(kept).rows
        assert kept.stat().st_size < 200_000  # a result is committed: the samples themselves stay out
