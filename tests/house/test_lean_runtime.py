"""What runs on the robot imports and answers where torch and the export libraries do not exist."""

import subprocess
import sys

BLOCKED = ("torch", "transformers", "onnx", "onnxscript", "safetensors", "diffusers", "peft")

# Runs first in a fresh interpreter: the libraries are installed where the tests run, and must look as if they were not.
BLOCKER = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)
sys.meta_path.insert(0, Blocker())
"""

IMPORT_ALL = """
import importlib, pkgutil
modules = []
for room in ("runtime", "drivers", "calibration"):
    package = importlib.import_module("chatvla_edge." + room)
    modules += [found.name for found in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for name in modules:
    importlib.import_module(name)
print(*modules)
"""

COMMAND = """
import sys
from chatvla_edge.runtime.cli import main
sys.argv = ["chatvla-edge", *{arguments!r}]
main()
"""


def without_torch(program: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", BLOCKER + program], capture_output=True, text=True, timeout=120)


def test_the_blocker_blocks():
    answer = without_torch("import torch")
    assert "ModuleNotFoundError: blocked: torch" in answer.stderr


def test_every_module_of_runtime_drivers_and_calibration_imports():
    answer = without_torch(IMPORT_ALL)
    assert answer.returncode == 0, answer.stderr
    assert {"chatvla_edge.runtime.cli", "chatvla_edge.runtime.realtime"} <= set(answer.stdout.split())


def test_the_command_line_shows_every_rooms_commands():
    answer = without_torch(COMMAND.format(arguments=["--help"]))
    assert (answer.returncode, answer.stderr) == (0, "")
    assert "Usage: chatvla-edge" in answer.stdout


def test_the_compiled_clock_runs():
    answer = without_torch("from chatvla_edge.runtime.realtime import now_ns; print(now_ns())")
    assert int(answer.stdout) > 0
