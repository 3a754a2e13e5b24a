"""Who may import whom: the contracts hold, and each of them would catch a violation."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOMS = ("export", "runtime", "drivers", "calibration", "benchmarks")
CONFIG = Path(__file__).parents[2] / "pyproject.toml"
PROGRAM = "from importlinter.cli import lint_imports_command as run; run()"


def room(name: str) -> Path:
    return Path(importlib.util.find_spec(f"chatvla_edge.{name}").origin).parent


def lint_imports(packages: Path | None = None) -> subprocess.CompletedProcess:
    path = {} if packages is None else {"PYTHONPATH": str(packages)}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, "--no-logo", "--no-cache", "--config", CONFIG],
        env=os.environ | path,
        cwd=packages,
        capture_output=True,
        text=True,
    )


def test_the_contracts_hold():
    verdict = lint_imports()
    assert verdict.returncode == 0, verdict.stdout + verdict.stderr
    assert " 0 broken" in verdict.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The package's Python sources, under its import name, in a folder of their own."""
    packages = tmp_path_factory.mktemp("packages")
    for name in ROOMS:
        shutil.copytree(
            room(name), packages / "chatvla_edge" / name, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    return packages


EXPORT = "export knows calibration, runtime.bundle and runtime.gates only"


@pytest.mark.parametrize(
    ("culprit", "statement", "contract"),
    [
        ("drivers", "import chatvla_edge.runtime.install", "drivers know nothing of ours"),
        ("runtime", "from chatvla_edge.export import cli", "runtime knows drivers only"),
        ("runtime", "from chatvla_edge import calibration", "runtime knows drivers only"),
        ("calibration", "import chatvla_edge.export", "calibration knows runtime and drivers only"),
        ("export", "import chatvla_edge.drivers", EXPORT),
        (
            "export",
            "from chatvla_edge.runtime.install import conflicts",
            EXPORT,
        ),
        # The bundle's face alone: how it is divided inside is its own business.
        (
            "export",
            "from chatvla_edge.runtime.bundle import manifest",
            EXPORT,
        ),
        ("drivers", "import chatvla_edge.benchmarks", "drivers know nothing of ours"),
        ("runtime", "def late():\n    import torch", "what runs on the robot never imports torch"),
        ("drivers", "import safetensors.numpy", "what runs on the robot never imports torch"),
        ("calibration", "from onnx import helper", "what runs on the robot never imports torch"),
    ],
)
def test_a_violation_is_caught_by_its_contract(copy, culprit, statement, contract):
    intruder = copy / "chatvla_edge" / culprit / "intruder.py"
    intruder.write_text(statement + "\n")
    try:
        verdict = lint_imports(copy)
    finally:
        intruder.unlink()
    assert verdict.returncode == 1, verdict.stdout + verdict.stderr
    assert re.search(rf"^{re.escape(contract)}.* BROKEN\b", verdict.stdout, re.MULTILINE), verdict.stdout
    assert f"chatvla_edge.{culprit}.intruder" in verdict.stdout


def test_export_may_read_bundles(copy):
    reader = copy / "chatvla_edge" / "export" / "reader.py"
    reader.write_text("from chatvla_edge.runtime import bundle\nfrom chatvla_edge.runtime.bundle import Contents\n")
    try:
        verdict = lint_imports(copy)
    finally:
        reader.unlink()
    assert verdict.returncode == 0, verdict.stdout + verdict.stderr


# The import linter reads Python alone. The same rules for Cython, by the line:
NEVER = {
    "drivers": ("export", "runtime", "calibration", "benchmarks"),
    "runtime": ("export", "calibration", "benchmarks"),
    "calibration": ("export", "benchmarks"),
    "export": ("drivers", "benchmarks"),
    "benchmarks": (),
}
MENTION = r"^\s*(?:from|import|cimport)\s+(?:chatvla_edge\s+c?import\s+|chatvla_edge\.)(?:{})\b"


def test_cython_sources_keep_the_rules_too():
    for name in ROOMS:
        rule = re.compile(MENTION.format("|".join(NEVER[name]) or "(?!)"), re.MULTILINE)
        for source in (path for path in room(name).rglob("*.p[yx][xd]")):
            assert not (found := rule.search(source.read_text())), f"{source}: {found.group().strip()}"


def test_the_cython_rule_sees_each_form():
    rule = re.compile(MENTION.format("export"), re.MULTILINE)
    for line in (
        "from chatvla_edge.export.a cimport b",
        "from chatvla_edge import export",
        "    cimport chatvla_edge.export",
        "from chatvla_edge cimport export",
    ):
        assert rule.search("pass\n" + line)
    assert not rule.search("from chatvla_edge.exporter import a")
