"""Ten million adversarial ticks through the limiter, judged by the tests' oracle; and what a tick costs.

Streams (steps, noise, NaN bursts, teleports, reversed and jumping clocks, wants at and beyond every limit) and the
oracle (vendor formulas, finite differences, Denavit-Hartenberg tables) are the tests' own, from ``tests/support``: run
this from a checkout. With ``--json`` the run can be interrupted and goes on from that file, as long as limiter and
oracle are the same; progress is written after every batch.

    python -m chatvla_edge.benchmarks.fuzz_limits --ticks 10000000 --json fuzz.json
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from chatvla_edge.runtime import limits
from chatvla_edge.runtime.arm_model import load_arm
from chatvla_edge.runtime.limits import KINDS, Limiter
from chatvla_edge.runtime.tracking import Tracker

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


def digest() -> str:
    """What a run's result depends on: the limiter's source and binary, the streams, the oracle."""
    files = [CHECKOUT / "runtime" / "limits.py", Path(limits.__file__)]
    files += [CHECKOUT / "tests" / "support" / f"{name}.py" for name in ("limit_fuzz", "limit_oracle")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def run_batch(number: int) -> tuple[str, dict[str, int], dict[str, int], bool, float]:
    """One batch: arm, violations by kind, clips by kind, whether it could stop at the end, seconds in the limiter."""
    fuzz, oracle = support("limit_fuzz"), support("limit_oracle")
    arms = fuzz.arms(load_arm)
    name = list(arms)[number % len(arms)]
    arguments, bounds, start = arms[name]
    limiter = Limiter(**arguments)
    wanted, ticks, brake = fuzz.stream(np.random.default_rng([number, 2026]), bounds, start, BATCH)
    begin = int(ticks[0]) - bounds.period_ns
    clock = time.perf_counter()
    commands, _ = fuzz.run(limiter, start, begin, wanted, ticks, brake)
    seconds = time.perf_counter() - clock
    violations = oracle.violations(bounds, start, begin, ticks, commands)
    now = 1 << 61
    for _ in range(4000):
        now += bounds.period_ns
        limiter.brake(now)
    clips = np.asarray(limiter.counts).reshape(len(KINDS), -1).sum(axis=1)
    return name, violations, dict(zip(KINDS, clips.tolist(), strict=True)), limiter.standing(), seconds


def fuzz_run(ticks: int, file: Path | None, console: Console) -> dict[str, Any]:
    """Batches until ``ticks`` are done, going on from ``file`` where it holds the same limiter's progress."""
    state: dict[str, Any] = {"digest": digest(), "ticks": 0, "seconds": 0.0, "stuck": 0, "violations": {}, "clips": {}}
    if file is not None and file.is_file():
        found = json.loads(file.read_text()).get("fuzz", {})
        if found.get("digest") == state["digest"]:
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
            if file is not None:
                file.write_text(json.dumps({"fuzz": state}, indent=1))
    return state


def tick_cost(ticks: int) -> dict[str, dict[str, float]]:
    """Microseconds of tracking and limits for 14 joints (two FR3 arms, walls on) per kind of target, timer included."""
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
    costs: dict[str, dict[str, float]] = {}
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
        clock = time.perf_counter_ns
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
        micro = took / 1e3
        costs[name] = {
            "tracking_p50": float(np.percentile(micro[:, 0], 50)),
            "limits_p50": float(np.percentile(micro[:, 1], 50)),
            "both_p50": float(np.percentile(micro.sum(axis=1), 50)),
            "both_p99": float(np.percentile(micro.sum(axis=1), 99)),
            "clipped": float(clipped),
        }
    return costs


def main(arguments: list[str] | None = None) -> int:
    """Fuzz, time, print tables and goals; exit code 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} ticks; under a minute")
    parser.add_argument("--ticks", type=int, help=f"default {FULL}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="result, and progress to go on from")
    options = parser.parse_args(arguments)
    console = Console()
    ticks = options.ticks or (QUICK if options.quick else FULL)
    state = fuzz_run(ticks, options.json, console)
    costs = tick_cost(3000 if options.quick else 20_000)

    table = Table(title=f"{state['ticks']} fuzzed ticks: clips by reason, thousands of joint ticks")
    table.add_column("reason")
    for name in state["clips"]:
        table.add_column(name.replace("+", " "), justify="right")
    for kind in KINDS:
        table.add_row(kind, *(f"{clips[kind] / 1e3:.1f}" for clips in state["clips"].values()))
    console.print(table)
    table = Table(title="14 joints, microseconds per tick, calls from Python included")
    for head in ("target", "tracking p50", "limits p50", "both p50", "both p99", "ticks clipped"):
        table.add_column(head, justify="left" if head == "target" else "right")
    for name, cost in costs.items():
        table.add_row(name, *(f"{cost[key]:.2f}" for key in list(cost)[:4]), f"{cost['clipped']:.0f}")
    console.print(table)

    total = sum(state["violations"].values())
    goals = [
        {"name": "ticks fuzzed", "value": state["ticks"], "goal": FULL, "ok": state["ticks"] >= FULL},
        {"name": "limit violations by the oracle", "value": total, "goal": 0, "ok": total == 0},
        {"name": "streams from whose end the arm could not stop", "value": state["stuck"], "goal": 0}
        | {"ok": state["stuck"] == 0},
    ]
    for goal in goals:
        mark = "[green]met[/]" if goal["ok"] else "[red]not met[/]"
        console.print(f"{goal['name']}: {goal['value']} (goal {goal['goal']}) {mark}")
    if options.json is not None:
        options.json.write_text(json.dumps({"fuzz": state, "tick_us": costs, "goals": goals}, indent=1))
    return 0 if all(goal["ok"] for goal in goals) else 1


if __name__ == "__main__":
    sys.exit(main())
