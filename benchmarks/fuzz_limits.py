"""Ten million adversarial ticks through the limiter, judged by the tests' oracle; and what a tick costs.

Streams (steps, noise, NaN bursts, teleports, reversed and jumping clocks, wants at and beyond every limit) and the
oracle (vendor formulas, finite differences, Denavit-Hartenberg tables) are the tests' own, from ``tests/support``: run
this from a checkout. With ``--progress`` the run can be interrupted and goes on from that file, as long as limiter,
streams and oracle are the same; it is written after every batch.

    python -m chatvla_edge.benchmarks.fuzz_limits --progress progress.json --json fuzz_limits.json
"""

import hashlib
import importlib
import json
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from chatvla_edge.benchmarks import script
from chatvla_edge.benchmarks.method import once
from chatvla_edge.benchmarks.report import Report
from chatvla_edge.benchmarks.samples import Samples
from chatvla_edge.runtime import limits
from chatvla_edge.runtime.arm_model import load_arm
from chatvla_edge.runtime.limits import KINDS, Limiter
from chatvla_edge.runtime.realtime import now_ns
from chatvla_edge.runtime.tracking import Tracker

SUMMARY = "The limiter under ten million adversarial ticks: violations by an independent oracle, cost of a tick."

BATCH = 20_000
QUICK = 1_000_000
FULL = 10_000_000
CHECKOUT = Path(__file__).resolve().parents[1]


def support(name: str) -> ModuleType:
    """A module of ``tests/support``. Raises SystemExit where there is no checkout around this file."""
    folder = CHECKOUT / "tests"
    if not (folder / "support" / f"{name}.py").is_file():
        raise SystemExit(f"{folder}/support/{name}.py is missing: run this benchmark from a checkout")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return importlib.import_module(f"support.{name}")


def sources() -> str:
    """SHA-256 of what a run's result depends on: the limiter's source, the streams, the oracle."""
    files = [CHECKOUT / "runtime" / f"limits.{suffix}" for suffix in ("py", "pxd")]
    files += [CHECKOUT / "tests" / "support" / f"{name}.py" for name in ("limit_fuzz", "limit_oracle")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def library() -> str:
    """SHA-256 of the limiter as it was imported: the compiled library, or the source where it is interpreted."""
    return hashlib.sha256(Path(limits.__file__).read_bytes()).hexdigest()


def run_batch(number: int) -> tuple[str, dict[str, int], dict[str, int], bool, float]:
    """One batch: arm, violations by kind, clips by kind, whether it could stop at the end, seconds in the limiter."""
    fuzz, oracle = support("limit_fuzz"), support("limit_oracle")
    arms = fuzz.arms(load_arm)
    name = list(arms)[number % len(arms)]
    arguments, bounds, start = arms[name]
    limiter = Limiter(**arguments)
    wanted, ticks, brake = fuzz.stream(np.random.default_rng([number, 2026]), bounds, start, BATCH)
    begin = int(ticks[0]) - bounds.period_ns
    (commands, _), seconds = once(lambda: fuzz.run(limiter, start, begin, wanted, ticks, brake))
    violations = oracle.violations(bounds, start, begin, ticks, commands)
    now = 1 << 61
    for _ in range(4000):
        now += bounds.period_ns
        limiter.brake(now)
    clips = np.asarray(limiter.counts).reshape(len(KINDS), -1).sum(axis=1)
    return name, violations, dict(zip(KINDS, clips.tolist(), strict=True)), limiter.standing(), seconds


def fuzz_run(ticks: int, progress_file: Path | None) -> dict[str, Any]:
    """Batches until ``ticks`` are done, going on from ``progress_file`` where it holds the same limiter's progress."""
    state: dict[str, Any] = {"sources": sources(), "library": library(), "ticks": 0, "seconds": 0.0, "stuck": 0}
    state |= {"violations": {}, "clips": {}}
    console = Console(stderr=True)
    if progress_file is not None and progress_file.is_file():
        found = json.loads(progress_file.read_text())
        if (found.get("sources"), found.get("library")) == (state["sources"], state["library"]):
            state = found
            console.print(f"going on after {state['ticks']} ticks")
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("ticks", total=ticks, completed=state["ticks"])
        while state["ticks"] < ticks:
            name, violations, clips, stopped, seconds = run_batch(state["ticks"] // BATCH)
            state["ticks"] += BATCH
            state["seconds"] += seconds
            state["stuck"] += not stopped
            for total, counts in ((state["violations"], violations), (state["clips"].setdefault(name, {}), clips)):
                for kind, count in counts.items():
                    total[kind] = total.get(kind, 0) + count
            progress.advance(task, BATCH)
            if progress_file is not None:
                whole = progress_file.with_name(f"{progress_file.name}.part")
                whole.write_text(json.dumps(state, indent=1))
                whole.replace(progress_file)
    return state


def tick_cost(report: Report, ticks: int) -> None:
    """Rows: tracking and limits of 14 joints (two FR3 arms, walls on), per kind of target, timer and calls included."""
    fuzz = support("limit_fuzz")
    model = load_arm("fr3")
    period = 2_000_000
    t = np.arange(1, ticks + 1)[:, None] * period * 1e-9
    knots = np.arange(0, t[-1, 0] + 0.04, 0.02)
    swing = 0.15 * np.sin(2.0 * knots)
    targets = {
        "smooth": fuzz.HOME + 0.15 * np.sin(2.0 * t) * np.ones(7),
        "linear interpolation of 50 Hz": fuzz.HOME + np.interp(t[:, 0], knots, swing)[:, None] * np.ones(7),
        "jumps every 100 ms": fuzz.HOME + 0.15 * np.sign(np.sin(2.0 * np.pi * 5.0 * t)) * np.ones(7),
    }
    for name, rows in targets.items():
        arms = []
        for _ in range(2):
            box = [0.0, -0.6, 0.1, 0.9, 0.6, 1.1]
            limiter = Limiter(**fuzz.limiter_arguments(model, period), box=box)
            limiter.reset(fuzz.HOME.tolist(), 10**9)
            tracker = Tracker(
                model.lower + 0.05, model.upper - 0.05, model.velocity / 2, [8.0] * 7, [1000.0] * 7, period
            )
            tracker.reset(fuzz.HOME)
            arms.append((tracker, np.asarray(tracker.target), np.asarray(tracker.position), limiter))
        took = np.zeros((ticks, 2))
        clipped = 0
        clock = now_ns
        for k, row in enumerate(rows):
            for tracker, target, position, limiter in arms:
                target[:] = row
                begin = clock()
                tracker.advance()
                between = clock()
                np.asarray(limiter.wanted)[:] = position
                again = clock()
                answer = limiter.tick(10**9 + (k + 1) * period)
                took[k] += (between - begin, clock() - again)
                if answer:
                    clipped += 1
                    tracker.resume(limiter)
        for step, values in (("tracking", took[:, 0]), ("limits", took[:, 1]), ("both", took.sum(axis=1))):
            report.add(Samples.of(f"{step}, {name}", values, scale=1e-9))
        report.figure(f"ticks clipped, {name}", clipped, "")


def add_arguments(parser: ArgumentParser) -> None:
    """How long, and where progress is kept."""
    parser.add_argument("--ticks", type=int, help=f"default {FULL}, with --quick {QUICK}")
    parser.add_argument("--progress", type=Path, metavar="FILE", help="kept after every batch, and gone on from")


def run(options: Namespace) -> Report:
    """Fuzz, then time."""
    report = Report(title="The limiter under adversarial targets and clocks")
    state = fuzz_run(options.ticks or (QUICK if options.quick else FULL), options.progress)
    report.figure("ticks fuzzed", state["ticks"], "")
    report.figure("time in the limiter", state["seconds"], "s")
    for kind in KINDS:
        report.figure(f"clipped for {kind}", sum(clips[kind] for clips in state["clips"].values()), "joint ticks")
    for name, clips in state["clips"].items():
        report.note(f"{name}, clipped joint ticks: {_listed(clips)}")
    report.note(f"violations: {_listed(state['violations'])}")
    tick_cost(report, 3000 if options.quick else 20_000)
    report.method.append(
        f"streams of {BATCH} ticks over {len(state['clips'])} arms and rates; commands judged by the oracle, "
        "each stream's end by 4000 ticks of braking"
    )
    report.method.append(f"limiter, streams and oracle: sha256 {state['sources']}; library: sha256 {state['library']}")
    report.method.append("tick cost: two FR3 arms with walls at 500 Hz, timer and calls from Python included")
    report.goal("ticks fuzzed", state["ticks"], ">=", FULL)
    report.goal("limit violations by the oracle", sum(state["violations"].values()), "==", 0)
    report.goal("streams from whose end the arm could not stop", state["stuck"], "==", 0)
    return report


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in counts.items())


if __name__ == "__main__":
    sys.exit(script.main(__file__))
