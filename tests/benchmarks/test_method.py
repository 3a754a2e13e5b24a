"""Timing: what is called how often and in which order, against a clock that stands still unless work moves it."""

import gc
import itertools
import re
from pathlib import Path

import pytest

from chatvla_edge import benchmarks
from chatvla_edge.benchmarks import method
from chatvla_edge.benchmarks.method import Batch, compare, measure, once


@pytest.fixture
def clock(monkeypatch):
    """A clock in ns that only work moves, so that what is measured is known."""

    class Clock:
        ns = 0

        def costs(self, ns: float, log: list | None = None, name: str = ""):
            def work():
                self.ns += ns
                if log is not None:
                    log.append(name)

            return work

    clock = Clock()
    # Reading the clock costs a little: a warm-up of free work would never end.
    monkeypatch.setattr(method.time, "perf_counter_ns", lambda: setattr(clock, "ns", clock.ns + 20) or clock.ns)
    return clock


@pytest.mark.parametrize("ns", [50, 5e3, 5e6, 2e9])
def test_from_nanoseconds_to_seconds_a_fifth_is_found(clock, ns):
    timed = compare({"A": clock.costs(ns), "B": clock.costs(1.25 * ns)}, seconds=0.1)
    assert timed.speedup("B").value == pytest.approx(0.8, rel=0.01)
    assert timed.ratio("B", over="A").difference
    assert timed.samples["A"].quantile(0.5) == pytest.approx(ns * 1e-9, rel=0.01)


def test_the_same_work_is_noise(clock):
    wobble = itertools.cycle([1e6, 1.1e6, 0.95e6, 1.02e6, 1.3e6])

    def work():
        clock.ns += next(wobble)

    timed = compare({"A": work, "B": work}, seconds=0.5)
    assert timed.speedup("B").text.startswith("within noise")
    assert timed.noise.floor >= 0
    assert "A/A ±" in timed.method


def test_the_budget_is_kept(clock):
    compare({"A": clock.costs(1e4), "B": clock.costs(1e6)}, seconds=1.0)
    assert clock.ns * 1e-9 == pytest.approx(2 * 1.25 + 2, rel=0.2)  # both with warm-up, and A/A


def test_candidates_alternate_in_an_order_that_the_seed_decides(clock):
    def order(seed):
        log = []
        compare({"A": clock.costs(1e8, log, "A"), "B": clock.costs(1e8, log, "B")}, seconds=1.0, seed=seed)
        return log[-14:]

    assert order(0) == order(0) != order(1)
    rounds = [set(pair) for pair in zip(order(0)[::2], order(0)[1::2], strict=True)]
    assert rounds == [{"A", "B"}] * 7


def test_the_baseline_runs_against_itself_first(clock):
    log = []
    compare({"A": clock.costs(1e9, log, "A"), "B": clock.costs(1e9, log, "B")}, seconds=0.1)
    # Two calls each to warm up, then seven rounds of A against A, then seven of both.
    assert log[:18] == ["A"] * 2 + ["B"] * 2 + ["A"] * 14
    assert sorted(log[18:]) == ["A"] * 7 + ["B"] * 7


def test_each_call_is_timed_by_itself_where_the_tail_matters(clock):
    costs = itertools.cycle([1e3] * 999 + [1e6])

    def work():
        clock.ns += next(costs)

    timed = measure("spiky", work, seconds=0.2, each_call=True)
    assert timed.samples["spiky"].values.max() == pytest.approx(1e-3, rel=0.01)
    assert len(timed.samples["spiky"].rounds) > 1000


def test_a_batch_counts_as_many_as_it_does(clock):
    timed = compare({"one": clock.costs(1e6), "thousand": Batch(clock.costs(1e6), of=1000)}, seconds=0.1)
    assert timed.speedup("thousand").value == pytest.approx(1000, rel=0.01)


def test_the_garbage_collector_rests_meanwhile_and_returns(clock):
    seen = []

    def work():
        clock.ns += 1e8
        seen.append(gc.isenabled())
        if len(seen) > 5:
            raise RuntimeError("work fails")

    with pytest.raises(RuntimeError, match="work fails"):
        measure("x", work)
    assert not any(seen)
    assert gc.isenabled()


def test_once_returns_the_result_and_its_time(clock):
    assert once(clock.costs(5e8))[1] == pytest.approx(0.5, rel=1e-6)
    assert once(lambda: 7)[0] == 7


@pytest.mark.parametrize(("works", "more"), [({}, {}), ({"A": int}, {"seconds": 0}), ({"A": int}, {"least_rounds": 0})])
def test_nothing_to_measure_is_refused(works, more):
    with pytest.raises(ValueError, match="expected all above 0"):
        compare(works, **more)


def test_real_time_is_taken():
    timed = compare({"short": lambda: sum(range(10)), "long": lambda: sum(range(10_000))}, seconds=0.05)
    assert timed.ratio("long", over="short").value > 5
    assert 0 < timed.call_s < 1e-3


def test_only_the_method_reads_a_clock():
    # Stamps that cross processes (`now_ns`) are samples from elsewhere.
    clocks = re.compile(r"\b(perf_counter|monotonic|process_time|timeit|time\.time|clock_gettime)")
    sources = [path for folder in benchmarks.__path__ for path in Path(folder).glob("*.py")]
    assert [path.name for path in sources if clocks.search(path.read_text())] == ["method.py"]
