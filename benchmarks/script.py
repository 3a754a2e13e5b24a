"""How a benchmark is written, found and run.

A benchmark is a module `benchmarks/<name>.py` with

    SUMMARY = "One line: what it measures."                 # a literal: it is read without importing the module

    def add_arguments(parser): ...                          # optional: arguments of its own
    def run(options) -> Report: ...                         # options.quick, and its own arguments

    if __name__ == "__main__":
        sys.exit(script.main(__file__))

`python -m chatvla_edge.benchmarks.<name> --quick` and `chatvla-edge bench <name> --quick` are then the same. Exit
codes: 0 every goal met, 1 a goal missed or not measured, 2 wrong usage.
"""

import argparse
import ast
import importlib
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from importlib.machinery import FileFinder, ModuleSpec
from pathlib import Path
from pkgutil import iter_modules
from typing import Protocol, cast

from rich.console import Console

from chatvla_edge import benchmarks
from chatvla_edge.benchmarks.machine import Watch
from chatvla_edge.benchmarks.plot import draw
from chatvla_edge.benchmarks.report import Report


class Benchmark(Protocol):
    """What a benchmark's module offers."""

    SUMMARY: str

    def run(self, options: Namespace) -> Report:
        """Measure. With `options.quick` in less than a minute."""


def discover() -> dict[str, str]:
    """Names of all benchmarks with their summaries, by name. Imports none of them: some need torch."""
    found = {}
    for module in iter_modules(benchmarks.__path__):
        finder = module.module_finder
        spec = finder.find_spec(module.name) if isinstance(finder, FileFinder) else None
        if spec is not None and (summary := _summary(spec)) is not None:
            found[module.name] = summary
    return dict(sorted(found.items()))


def _summary(spec: ModuleSpec) -> str | None:
    """The literal that is assigned to SUMMARY at the top level of the module's source; None where there is none."""
    if spec.origin is None or not spec.origin.endswith(".py"):
        return None
    for statement in ast.parse(Path(spec.origin).read_text()).body:
        match statement:
            case ast.Assign(targets=[ast.Name(id="SUMMARY")], value=ast.Constant(value=str(summary))):
                return summary
    return None


def last_result(name: str) -> Report | None:
    """The newest committed result of a benchmark: `benchmarks/results/*.json` of a checkout; a wheel has none."""
    reports = [Report.read(path) for folder in benchmarks.__path__ for path in Path(folder, "results").glob("*.json")]
    dated = [report for report in reports if report.benchmark == name]
    return max(dated, key=lambda report: str(report.machine.get("date", "")), default=None)


def main(file: str) -> int:
    """For the foot of a benchmark: run it with the command line's arguments; returns the exit code."""
    return run(Path(file).stem, None, f"python -m chatvla_edge.benchmarks.{Path(file).stem}")


def run(name: str, arguments: Sequence[str] | None, program: str) -> int:
    """Run benchmark `name`: print its tables, write JSON and plot where asked. 1 where a goal is not met."""
    if name not in (known := discover()):
        raise ValueError(f"found no benchmark {name!r}, expected one of: {', '.join(known) or 'none is installed'}")
    module = cast(Benchmark, importlib.import_module(f"{benchmarks.__name__}.{name}"))
    parser = ArgumentParser(program, description=known[name])
    parser.add_argument("--quick", action="store_true", help="less than a minute, wider intervals")
    parser.add_argument("--json", type=_writable, metavar="FILE", help="keep the result")
    parser.add_argument("--plot", type=_writable, metavar="FILE.svg", help="draw the result")
    if (add_arguments := getattr(module, "add_arguments", None)) is not None:
        add_arguments(parser)
    options = parser.parse_args(arguments)
    watch = Watch()
    report = module.run(options)
    report.benchmark, report.quick, report.machine = name, options.quick, watch.describe()
    report.show(Console())
    # The JSON first: a defect in the drawing must not cost the measurement.
    if options.json:
        report.write(options.json)
    if options.plot:
        options.plot.write_text(draw(report))
    return 0 if report.ok else 1


def _writable(text: str) -> Path:
    """A file to write. Its folder is looked for now and not after an hour of measuring."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.parent} is no folder")
    return path
