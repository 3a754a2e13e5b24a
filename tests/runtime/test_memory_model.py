"""The slot protocol on a model of C11's memory, with what x86 cannot show: loads that return old values, out of order.

The model is the view semantics of C11's relaxed, release and acquire accesses and fences. Each location keeps all
values that were ever stored, in order; a thread's *view* says below which of them it can no longer see. A relaxed load
may return any value from the view on, a store carries the view of the last release fence (a release store: the current
one), and an acquire joins the view of what was read. For a thread that only stores and threads that only load, which is
what a slot has, that is all that C11 allows, and it allows what Arm does.

So the writer runs once, and every choice of every load of a reader is tried.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

CELLS = 2
WORDS = 2  # payload words of a cell
PUBLICATIONS = 5

# Steps as numbered in runtime/slots.pxd, with the order that each has there. W2 and R3 are the fences.
ORDERS = {
    "W1": "relaxed", "W2": "release", "W3": "relaxed", "W4": "release", "W5": "release",
    "R0": "acquire", "R1": "acquire", "R2": "relaxed", "R3": "acquire", "R4": "relaxed",
}  # fmt: skip

View = dict[str, int]  # location -> index of the oldest store that is still visible


def join(*views: View) -> View:
    joined: View = {}
    for view in views:
        for location, at in view.items():
            joined[location] = max(joined.get(location, 0), at)
    return joined


@dataclass
class Memory:
    stores: dict[str, list[tuple[int, View]]] = field(default_factory=dict)

    def of(self, location: str) -> list[tuple[int, View]]:
        return self.stores.setdefault(location, [(0, {})])  # memory starts as zeros that all have seen


class Writer:
    """Publishes as `c_publish` does; every word of a record is its number. Stops dead after `steps` of them."""

    def __init__(self, memory: Memory, orders: dict[str, str], view: View | None = None, steps: int = 10**9) -> None:
        self.memory, self.orders, self.steps = memory, orders, steps
        self.view: View = dict(view or {})
        self.fenced: View = {}

    def store(self, location: str, value: int, order: str) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise SystemExit
        stores = self.memory.of(location)
        self.view = join(self.view, {location: len(stores)})
        carried = self.view if order == "release" else join(self.fenced, {location: len(stores)})
        stores.append((value, dict(carried)))

    def publish(self, number: int, value: int | None = None) -> None:
        cell = number % CELLS
        self.store(f"guard{cell}", 2 * number - 1, self.orders["W1"])
        if self.orders["W2"] == "release":
            self.fenced = dict(self.view)
        for word in range(WORDS):
            self.store(f"word{cell}{word}", number if value is None else value, self.orders["W3"])
        self.store(f"guard{cell}", 2 * number, self.orders["W4"])
        self.store("latest", number, self.orders["W5"])

    def recover(self) -> int:
        """`c_recover`; returns the next number. A new process sees all that the dead one stored."""
        number = self.memory.of("latest")[-1][0] + 1
        if self.memory.of(f"guard{number % CELLS}")[-1][0] == 2 * number:
            self.store("latest", number, "release")
            number += 1
        return number


@dataclass(frozen=True)
class Reader:
    memory: Memory
    view: tuple[tuple[str, int], ...] = ()
    pending: tuple[tuple[str, int], ...] = ()  # views of relaxed loads, which an acquire fence joins

    def load(self, location: str, order: str) -> Iterator[tuple[int, "Reader"]]:
        view = dict(self.view)
        for at, (value, carried) in enumerate(self.memory.of(location)):
            if at < view.get(location, 0):
                continue
            seen = join(view, {location: at}, carried if order == "acquire" else {})
            yield value, Reader(self.memory, tuple(seen.items()), tuple(join(dict(self.pending), carried).items()))

    def fence(self, order: str) -> "Reader":
        if order != "acquire":
            return self
        return Reader(self.memory, tuple(join(dict(self.view), dict(self.pending)).items()), self.pending)


def outcomes(memory: Memory, orders: dict[str, str]) -> Iterator[tuple[int, str, tuple[int, ...]]]:
    """Every way one attempt of `c_read_cell` can end: the number it wanted, how it went, the words it got.

    For a slot that is the latest number, for a ring any that its cells may still hold.
    """
    for latest, reader in Reader(memory).load("latest", orders["R0"]):
        if latest == 0:
            yield latest, "empty", ()
        for number in range(max(1, latest - CELLS + 1), latest + 1):
            yield from attempt(reader, number, orders)


def attempt(reader: Reader, number: int, orders: dict[str, str]) -> Iterator[tuple[int, str, tuple[int, ...]]]:
    """Every way in which `reader`, having loaded `latest`, can fare with publication `number`."""
    cell = number % CELLS
    for guard, entered in reader.load(f"guard{cell}", orders["R1"]):
        if guard != 2 * number:
            yield number, "late" if guard > 2 * number else "too early", ()
            continue
        copies = [((), entered)]
        for word in range(WORDS):
            copies = [
                ((*words, value), after)
                for words, before in copies
                for value, after in before.load(f"word{cell}{word}", orders["R2"])
            ]
        for words, copied in copies:
            for again, _ in copied.fence(orders["R3"]).load(f"guard{cell}", orders["R4"]):
                yield number, "read" if again == 2 * number else "changed", words


def wrong(memory: Memory, orders: dict[str, str]) -> set[str]:
    """What goes wrong in any execution: `torn`, or `missing` (told to retry although nothing overwrote the value)."""
    found = set()
    for number, how, words in outcomes(memory, orders):
        if how == "read" and words != (number,) * WORDS:
            found.add("torn")
        if how == "too early":
            found.add("missing")
    return found


def written(orders: dict[str, str]) -> Memory:
    memory = Memory()
    writer = Writer(memory, orders)
    for number in range(1, PUBLICATIONS + 1):
        writer.publish(number)
    return memory


def test_the_protocol_never_tears():
    memory = written(ORDERS)
    assert wrong(memory, ORDERS) == set()
    # The model does try executions: reads of every number, rejected ones, and late ones.
    seen = {(number, how) for number, how, _ in outcomes(memory, ORDERS)}
    assert {(number, "read") for number in range(1, PUBLICATIONS + 1)} <= seen
    assert {how for _, how in seen} == {"empty", "read", "changed", "late"}


@pytest.mark.parametrize(
    ("relaxed", "harm"),
    [
        ("W2", "torn"),
        ("R3", "torn"),
        ("R0 R1", "torn"),
        ("W4 W5", "torn"),
        ("W4 R0", "torn"),
        ("R1 W5", "torn"),
        ("W5", "missing"),
        ("R0", "missing"),
    ],
)
def test_each_missing_order_does_its_harm(relaxed, harm):
    orders = {**ORDERS, **dict.fromkeys(relaxed.split(), "relaxed")}
    assert harm in wrong(written(orders), orders)


def test_an_acquire_load_does_not_replace_the_readers_fence():
    orders = {**ORDERS, "R3": "relaxed", "R4": "acquire"}
    assert "torn" in wrong(written(orders), orders)


@pytest.mark.parametrize("relaxed", ["R0", "R1", "W4", "W5"])
def test_either_of_the_two_release_acquire_pairs_keeps_a_value_whole(relaxed):
    orders = {**ORDERS, relaxed: "relaxed"}
    assert "torn" not in wrong(written(orders), orders)


def test_a_writer_killed_after_any_store_and_its_successor_tear_nothing():
    stores = PUBLICATIONS * (WORDS + 3)
    for steps in range(stores):
        memory = Memory()
        dying = Writer(memory, ORDERS, steps=steps)
        try:
            for number in range(1, PUBLICATIONS + 1):
                dying.publish(number)
        except SystemExit:
            pass
        # While nobody writes: the newest number is there, whole, for a reader that has caught up.
        newest = memory.of("latest")[-1][0]
        if newest:
            assert (newest, "read", (newest,) * WORDS) in set(outcomes(memory, ORDERS))
        assert wrong(memory, ORDERS) == set(), f"killed after {steps} stores"
        heir = Writer(memory, ORDERS, view={location: len(at) - 1 for location, at in memory.stores.items()})
        number = heir.recover()
        assert number in (newest + 1, newest + 2)
        for further in range(number, number + 3):
            heir.publish(further)
        assert wrong(memory, ORDERS) == set(), f"killed after {steps} stores, then restarted"


@pytest.mark.parametrize("recovers", [True, False])
def test_a_number_is_never_given_twice_because_one_guard_would_stand_for_two_values(recovers):
    memory = Memory()
    dying = Writer(memory, ORDERS, steps=3 * (WORDS + 3) - 1)  # all of the third publication but its W5
    dying.publish(1)
    dying.publish(2)
    with pytest.raises(SystemExit):
        dying.publish(3)
    heir = Writer(memory, ORDERS, view=dying.view)
    number = heir.recover() if recovers else 3
    heir.publish(number, value=number + 30)
    # Seen by a reader that rests on the guard alone; one that acquires `latest` has the second safeguard.
    orders = {**ORDERS, "R0": "relaxed"}
    values = {words for _, how, words in outcomes(memory, orders) if how == "read"}
    assert ({len(set(words)) for words in values} == {1}) == recovers
