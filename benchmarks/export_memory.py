"""Memory of a whole export, gates included, beside its bound: 4 GB and twice the largest tensor.

The export runs in a process of its own. `peak` is the kernel's high-water mark, in which pages of mapped files count
that the kernel drops when others need them (the checkpoint, the bundle's own files while engines load); `anonymous` is
what must be there.
"""

import os
import re
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import torch

from chatvla_edge.benchmarks import script
from chatvla_edge.benchmarks.report import Report
from chatvla_edge.export.checkpoint.reader import open_checkpoint
from chatvla_edge.export.checkpoint.synth import PRESETS, synthesize, truncated
from chatvla_edge.export.exporter import Settings, plan
from chatvla_edge.export.robots import load
from chatvla_edge.export.room import memory

SUMMARY = (
    "Peak memory of an export with gates: synthetic policies of real size, beside 4 GB + twice the largest tensor."
)

BOUND = 4e9
ROBOT = "arx_r5_bimanual"
EXPORT = "from chatvla_edge.runtime.cli import main; main()"


@dataclass(frozen=True)
class Peak:
    """Bytes of one process: its high-water mark, and the most of each kind that was seen while it ran."""

    peak: int
    anonymous: int
    file: int


def add_arguments(parser: ArgumentParser) -> None:
    """Which policy, and what to make of it."""
    parser.add_argument("--geometry", choices=sorted(PRESETS), help="default: dexvla-2b; with --quick tiny")
    parser.add_argument("--layers", type=int, help="keep only the first N decoder layers")
    parser.add_argument("--precision", nargs="+", default=["int8", "int4"])
    parser.add_argument("--max-reasoning", type=int, default=16, help="tokens; random weights never end by themselves")
    parser.add_argument("--checkpoint", type=Path, help="export this one instead of a synthetic one")


def run(options: Namespace) -> Report:
    """Export to a scratch directory, once per precision."""
    geometry = options.geometry or ("tiny" if options.quick else "dexvla-2b")
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as scratch:
        folder = Path(scratch)
        path = options.checkpoint or folder / "checkpoint"
        if options.checkpoint is None:
            spec, layout, _ = PRESETS[geometry]
            if options.layers is not None:
                spec = truncated(spec, options.layers)
            synthesize(path, spec, layout)
        checkpoint = open_checkpoint(path)
        largest = max(entry.nbytes for entry in checkpoint.entries.values())
        bound = BOUND + 2 * largest
        report = Report(title=f"memory of an export with gates: {path.name if options.checkpoint else geometry}")
        report.figure("checkpoint", checkpoint.nbytes, "B")
        report.figure("largest tensor as stored", largest, "B")
        for precision in options.precision:
            settings = Settings("cpu", precision, load(ROBOT), max_reasoning=options.max_reasoning, probes=1)
            predicted, _ = memory(plan(checkpoint, settings).graphs, checkpoint, gates=True)
            found = measure(path, folder / precision, precision, options.max_reasoning)
            report.figure(f"{precision}: predicted, anonymous", predicted, "B")
            report.figure(f"{precision}: anonymous", found.anonymous, "B")
            report.figure(f"{precision}: mapped files", found.file, "B")
            report.figure(f"{precision}: peak", found.peak, "B")
            report.goal(f"{precision}: peak within 4 GB + twice the largest tensor", found.peak, "<=", bound, unit="B")
    report.method.append(
        "a process of its own; peak: the kernel's high-water mark, the kinds: as seen every 20 ms; "
        f"{torch.get_num_threads()} threads here, one engine thread there"
    )
    report.note("random weights, one probe; what is predicted is what an export asks the machine for before it begins")
    return report


def measure(checkpoint: Path, bundle: Path, precision: str, max_reasoning: int) -> Peak:
    """Export in a child; raises CalledProcessError with what it said where it failed."""
    arguments = ["export", checkpoint, "-o", bundle, "--robot", ROBOT, "--precision", precision, "--probes", "1"]
    call = [sys.executable, "-c", EXPORT, *map(str, arguments), "--max-reasoning", str(max_reasoning)]
    most = {"VmHWM": 0, "RssAnon": 0, "RssFile": 0}
    pause = Event()
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(call, stdout=said, stderr=subprocess.STDOUT)  # noqa: S603
        while child.poll() is None:
            # Not what wait4 says: its maximum includes the process that started this one.
            text = Path(f"/proc/{child.pid}/status").read_text()
            for kind in most:
                if found := re.search(rf"{kind}:\s+(\d+) kB", text):
                    most[kind] = max(most[kind], 1024 * int(found[1]))
            pause.wait(0.02)
        if child.returncode:
            said.seek(0)
            raise ValueError(f"the export failed: {said.read().decode(errors='replace')[-2000:]}")
    return Peak(most["VmHWM"], most["RssAnon"], most["RssFile"])


if __name__ == "__main__":
    sys.exit(script.main(__file__))
