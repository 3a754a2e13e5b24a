"""How time is taken here, and the only place where it is.

Things to compare run in one process, interleaved in rounds, in an order drawn anew for each round: a machine that slows
down for a second slows all of them. After the warm-up the first of them runs against itself (A/A). What that shows is
noise, and a ratio that is no larger is reported as noise.

    timed = compare({"numpy": lambda: x.sum(), "loop": lambda: sum(x)}, seconds=1.0)
    timed.speedup("loop").text         # '0.031x [0.03, 0.032]', or 'within noise (A/A ±1.2 %)'
    timed.samples["loop"].quantile(0.99)

Each candidate gets a time budget, not a number of calls, so nanoseconds and seconds are measured alike: calls shorter
than `SHORT_S` are timed in batches, since reading the clock costs some 50 ns; longer ones one by one. What a call of
Python itself costs (some 30 ns) is not subtracted; `Comparison.call_s` states it. For less, hand in a `Batch` whose
work loops by itself. On a device that works asynchronously the work must wait for its result. A/A sees the noise of
this process only: where memory happened to be laid out changes from one process to the next, so a difference of a
percent deserves a second run.
"""

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from math import ceil
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from chatvla_edge.benchmarks.samples import Noise, Ratio, Samples, noise_floor, percent, ratio

Work = Callable[[], object]

SHORT_S = 20e-6  # a call shorter than this is timed in batches of
BATCH_S = 200e-6
ROUNDS = 51  # odd: the median is then one of the pairs
LEAST_ROUNDS = 7  # an interval of 98 % is the whole range of seven pairs; five would not do for 95 %
MOST_TURNS = 20_000
WARM_UP = 0.25  # of the budget of each candidate, and two calls at least


@dataclass(frozen=True)
class Batch:
    """Work that does its thing `of` times by itself, in a loop that is not Python's."""

    work: Work
    of: int


@dataclass(frozen=True)
class Comparison:
    """What `compare` found: samples in seconds per call, the A/A noise, and how they were taken."""

    samples: dict[str, Samples]
    baseline: str
    noise: Noise
    method: str
    call_s: float

    def ratio(self, of: str, over: str) -> Ratio:
        """The time of one over the time of another, pair by pair."""
        return ratio(self.samples[of], self.samples[over], noise=self.noise)

    def speedup(self, name: str) -> Ratio:
        """How many times as fast as the baseline `name` is: above 1 is faster."""
        return self.ratio(self.baseline, over=name)


@dataclass(frozen=True)
class _Plan:
    """One candidate's share of a round: `samples` of `calls` each. A Batch counts as `of` calls and runs at once."""

    work: Work
    of: int
    calls: int
    samples: int

    def run(self) -> list[float]:
        """Seconds per call, of each sample."""
        taken = []
        for _ in range(self.samples):
            loop, work = repeat(None, self.calls), self.work
            before = time.perf_counter_ns()
            for _ in loop:
                work()
            after = time.perf_counter_ns()
            taken.append((after - before) / 1e9 / (self.calls * self.of))
        return taken


def compare(
    works: Mapping[str, Work | Batch],
    *,
    seconds: float = 2.0,
    each_call: bool = False,
    least_rounds: int = LEAST_ROUNDS,
    seed: int = 0,
) -> Comparison:
    """Time `works` against each other; the first is the baseline and the one that runs against itself.

    Takes about `seconds` for each of them and twice that for A/A, plus a quarter as warm-up; more where `least_rounds`
    calls take longer. With `each_call` every call is timed by itself and the turn changes after each, for whom the tail
    matters or the caches that the others leave behind; short calls then carry the clock's own cost.

    Fewer than `LEAST_ROUNDS` rounds suit a quick look at something that takes seconds; a ratio of fewer than five says
    that these are too few.
    """
    if not works or seconds <= 0 or least_rounds < 1:
        raise ValueError(f"found {len(works)} works, {seconds} s, {least_rounds} rounds; expected all above 0")
    batches = {name: work if isinstance(work, Batch) else Batch(work, 1) for name, work in works.items()}
    baseline = next(iter(batches))
    chance = random.Random(seed)  # noqa: S311  (an order, not a secret)
    with _quiet(), _progress() as progress:
        took = {name: _warm_up(batch, seconds * WARM_UP) for name, batch in batches.items()}
        most = MOST_TURNS if each_call else ROUNDS
        rounds = min(most, max(least_rounds, int(seconds / max(took.values()))))
        share = seconds / rounds
        plans = {name: _plan(batch, took[name], share, each_call) for name, batch in batches.items()}
        twins = _rounds({"A": plans[baseline], "A'": plans[baseline]}, rounds, chance, "A/A", progress)
        samples = _rounds(plans, rounds, chance, "interleaved", progress)
        call_s = min(_Plan(_nothing, 1, 1000, 5).run())
    noise = noise_floor(twins["A"], twins["A'"])
    rounds_taken = f"{rounds} {'turns' if each_call else 'rounds'}"
    method = (
        f"one process, interleaved in random order (seed {seed}), {rounds_taken}, {seconds:g} s each after "
        f"warm-up, no garbage collection; A/A {percent(noise.floor)}"
    )
    return Comparison(samples, baseline, noise, method, call_s)


def measure(name: str, work: Work | Batch, *, seconds: float = 2.0, each_call: bool = False) -> Comparison:
    """Time one thing alone, with its A/A noise: for figures that are compared with nothing but a goal."""
    return compare({name: work}, seconds=seconds, each_call=each_call)


def once(work: Callable[[], Any]) -> tuple[Any, float]:
    """The result of work that can be done only once (a load, a build) and its seconds: no interval, no noise."""
    before = time.perf_counter_ns()
    result = work()
    return result, (time.perf_counter_ns() - before) / 1e9


def _nothing() -> None:
    pass


def _warm_up(batch: Batch, seconds: float) -> float:
    """Call until `seconds` are over, twice at least; the seconds of one run of `batch.work`, of the later half."""
    taken: list[float] = []
    started = time.perf_counter_ns()
    while len(taken) < 2 or time.perf_counter_ns() - started < seconds * 1e9:
        before = time.perf_counter_ns()
        batch.work()
        taken.append((time.perf_counter_ns() - before) / 1e9)
        if len(taken) == 100_000:
            taken = taken[50_000:]
    return max(median(taken[len(taken) // 2 :]), 1e-9)


def _plan(batch: Batch, took: float, share: float, each_call: bool) -> _Plan:
    if each_call:
        return _Plan(batch.work, batch.of, 1, 1)
    calls = 1 if took >= SHORT_S else ceil(min(BATCH_S, max(share, took)) / took)
    return _Plan(batch.work, batch.of, calls, max(1, int(share / (took * calls))))


def _rounds(
    plans: Mapping[str, _Plan], count: int, chance: random.Random, what: str, progress: Progress
) -> dict[str, Samples]:
    taken: dict[str, list[list[float]]] = {name: [] for name in plans}
    order = list(plans)
    task = progress.add_task(what, total=count)
    shown = time.perf_counter_ns()
    for done in range(count):
        chance.shuffle(order)
        for name in order:
            taken[name].append(plans[name].run())
        if time.perf_counter_ns() - shown > 250_000_000:
            progress.update(task, completed=done + 1, refresh=True)
            shown = time.perf_counter_ns()
    progress.update(task, completed=count, refresh=True)
    return {name: Samples(name, tuple(np.array(values) for values in each)) for name, each in taken.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the garbage collector, which would come at a moment of its own choosing."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _progress() -> Progress:
    """A bar on stderr that is redrawn between rounds only: rich's own thread would run beside what is measured."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, auto_refresh=False, transient=True, disable=not console.is_terminal)
