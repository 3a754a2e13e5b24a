"""Reports: goals, JSON there and back, tables, plots, and that they say nothing about whose machine it was."""

import getpass
import io
import json
import platform
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from rich.console import Console

from chatvla_edge.benchmarks import machine
from chatvla_edge.benchmarks.method import compare
from chatvla_edge.benchmarks.plot import draw
from chatvla_edge.benchmarks.report import Report
from chatvla_edge.benchmarks.samples import Noise, Samples, ratio
from chatvla_edge.benchmarks.units import digits, readable


def full_report() -> Report:
    chance = np.random.default_rng(0)
    base = Samples.of("plain <loop> & co", *chance.lognormal(-9, 0.1, (9, 40)))
    fast = Samples.of("fast [path]", *chance.lognormal(-9.5, 0.1, (9, 40)))
    late = Samples.of("lateness with a rather long name that takes two lines", chance.lognormal(-11, 1, 5000))
    noise = Noise(low=0.99, high=1.02, rounds=9, confidence=0.99)
    report = Report(title="A <title> & more", benchmark="fake", machine=machine.Watch().describe())
    report.add(base)
    report.add(fast, versus=ratio(fast, base, noise=noise))
    report.add(late, curve=True)
    report.figure("bandwidth", 17.9, "GB/s")
    report.figure("drift", -0.25, "mm")
    report.goal("fast enough", 1e-4, "<=", 2e-4, unit="s", row="fast [path]")
    report.goal("wide enough", 17.9, ">=", 20, unit="GB/s", row="bandwidth")
    report.goal("against cyclictest", None, "<=", 2, unit="x", reason="cyclictest is not installed")
    report.note("A note with <angles> & [brackets].")
    report.method.append("by hand")
    return report


@pytest.mark.parametrize(
    ("value", "direction", "goal", "ok"),
    [
        (1, "<=", 1, True),
        (1.01, "<=", 1, False),
        (1, ">=", 1, True),
        (0.99, ">=", 1, False),
        (0, "==", 0, True),
        (1, "==", 0, False),
    ],
)
def test_a_goal_is_met_in_its_direction(value, direction, goal, ok):
    report = Report(title="t")
    report.goal("g", value, direction, goal)
    assert report.goals[0].ok is ok
    assert report.ok is ok
    assert report.goals[0].verdict == ("met" if ok else "MISSED")


def test_a_goal_that_was_not_measured_is_not_met_and_says_why():
    report = Report(title="t")
    report.goal("g", None, "<=", 1, reason="no such device")
    assert not report.ok
    assert report.goals[0].text == "g: not measured: no such device (goal <= 1.00)"
    with pytest.raises(ValueError, match="expected one of them"):
        report.goal("g", None, "<=", 1)
    with pytest.raises(ValueError, match="expected one of them"):
        report.goal("g", 1.0, "<=", 1, reason="yet measured")


def test_goals_and_rows_of_the_same_name_or_of_none_are_refused():
    report = full_report()
    with pytest.raises(ValueError, match="found row 'gone'"):
        report.goal("g", 1.0, "<=", 1, row="gone")
    with pytest.raises(ValueError, match="second row 'bandwidth'"):
        report.figure("bandwidth", 1, "GB/s")
    with pytest.raises(ValidationError, match="expected a finite number"):
        report.figure("broken", float("nan"), "s")


def test_json_there_and_back(tmp_path):
    report = full_report()
    report.write(tmp_path / "r.json")
    assert Report.read(tmp_path / "r.json") == report
    kept = json.loads((tmp_path / "r.json").read_text())
    assert kept["schema_version"] == 1
    assert {"name", "value", "goal", "ok", "direction"} <= set(kept["goals"][0])
    assert [goal["ok"] for goal in kept["goals"]] == [True, False, None]


@pytest.mark.parametrize("text", ["", "{}", '{"title": "t", "schema_version": 2}', '{"title": "t", "more": 1}'])
def test_what_is_no_result_is_refused_by_name(tmp_path, text):
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(ValueError, match=r"broken\.json is not a benchmark's result"):
        Report.read(tmp_path / "broken.json")


def test_the_screen_shows_every_row_note_and_goal_literally():
    out = io.StringIO()
    report = full_report()
    report.show(Console(file=out, width=200))
    shown = out.getvalue()
    for row in report.rows:
        assert row.name in shown
    for text in ("A note with <angles> & [brackets].", "NOT MEASURED", "MISSED", "met    fast enough", "17.9 GB/s"):
        assert text in shown
    assert shown.rstrip().endswith("(goal <= 2.00 x)")  # the goals come last


def test_the_plot_is_xml_and_mentions_every_row_goal_and_note():
    report = full_report()
    text = draw(report)
    root = ET.fromstring(text)
    said = " ".join("".join(element.itertext()) for element in root.iter() if element.tag.endswith("text"))
    for row in report.rows:
        assert all(word in said for word in row.name.split())
    for goal in report.goals:
        assert goal.name in said
    for text in (report.title, report.notes[0], "by hand", "A/A noise ±2 %", "GB/s", "by percentile"):
        assert text in said


@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0], [-1.0, 2.0], [1e-9, 1.0], [1e3, 1e6, 1e-6], [5.0], [3e-7, 3e-7]])
def test_any_values_can_be_drawn(values):
    report = Report(title="t")
    for index, value in enumerate(values):
        report.figure(f"row {index}", value, "s")
    report.add(Samples.of("samples", values), curve=True)
    root = ET.fromstring(draw(report))
    for element in root.iter():
        for name in ("x", "x1", "x2", "cx"):
            assert 0 <= float(element.get(name, 0)) <= 960


def test_an_empty_report_can_be_drawn_and_shown():
    ET.fromstring(draw(Report(title="nothing")))
    Report(title="nothing").show(Console(file=io.StringIO()))


def test_a_comparison_becomes_rows_beside_the_baseline():
    report = Report(title="t")
    report.add(compare({"A": lambda: None, "B": lambda: sum(range(1000))}, seconds=0.02))
    assert [row.name for row in report.rows] == ["A", "B"]
    assert report.rows[0].versus is None
    assert (report.rows[1].versus.of, report.rows[1].versus.over) == ("B", "A")
    assert report.rows[1].versus.noise == report.noise
    assert len(report.method) == 1


def test_a_machine_is_described_but_not_named():
    facts = machine.Watch().describe()
    assert {"date", "cpu", "memory_bytes", "kernel", "load", "versions"} <= set(facts)
    assert {"python", "numpy", "chatvla-edge"} <= set(facts["versions"])
    assert set(facts["load"]) >= {"start", "end"}
    told = json.dumps(facts)
    for secret in (platform.node(), getpass.getuser(), str(Path.home()), str(Path.cwd())):
        assert f'"{secret}' not in told
        assert f"{secret}/" not in told
    assert machine.line(facts)


def test_a_kernel_tells_its_preemption_and_not_its_builder():
    assert machine.kernel("6.6.63-rt46-v8-alice", "#1 SMP PREEMPT_RT Tue alice@build") == "6.6.63 rt PREEMPT_RT"
    assert machine.kernel("5.15.148-tegra", "#1 SMP PREEMPT Mon").startswith("5.15.148 tegra PREEMPT")
    assert machine.kernel("4.4", "#1 SMP").startswith("4.4 no preemption")


def test_figures_are_written_to_be_read():
    assert readable(25e-6, "s") == "25.0 µs"
    assert readable(0.0, "s") == "0 s"
    assert readable(3 * 2**20, "B") == "3.00 MiB"
    assert readable(-0.002, "s") == "-2.00 ms"
    assert readable(None, "s") == "-"
    assert [digits(value) for value in (0.1234, 1.234, 12.34, 1234.5, 1e-6)] == [
        "0.123",
        "1.23",
        "12.3",
        "1,234",
        "1e-06",
    ]
