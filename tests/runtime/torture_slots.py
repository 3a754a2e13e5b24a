"""Kills writers at random instants, thousands of times, while readers check every value that they get.

    python tests/runtime/torture_slots.py --rounds 5000

Every word of a record holds the record's own number, so a torn value is one whose words differ from its sequence
number. Writers and readers are processes of their own, forked because a round must take milliseconds: a new interpreter
would make it a hundred times longer and the kills as many times rarer. Exit code 1 if anything was torn, lost or out of
order.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from chatvla_edge.runtime.slots import Ring, Slot, SlotBusyError

FRAME = 640 * 480 * 3
RECORD = 14 * 8
CAPACITY = 64


def fork(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def write_slot(fd: int, nbytes: int) -> None:
    slot = Slot.attach(fd, nbytes, write=True)
    record = np.empty(nbytes // 8, np.uint64)
    while True:
        record.fill(slot.sequence + 1)
        slot.publish(record)


def write_ring(fd: int, nbytes: int) -> None:
    ring = Ring.attach(fd, nbytes, CAPACITY, write=True)
    record = np.empty(nbytes // 8, np.uint64)
    while True:
        record.fill(ring.sequence + 1)
        ring.append(record)


class Watch:
    """A reader process: runs `check` until told to stop, then reports its tally through a pipe."""

    def __init__(self, check: Callable[[Callable[[], bool]], dict[str, int]]) -> None:
        self.report, report = os.pipe()
        go_on, self.go_on = os.pipe()

        def work() -> None:
            os.close(self.go_on)
            os.set_blocking(go_on, False)

            def running() -> bool:
                try:
                    return os.read(go_on, 1) != b""
                except BlockingIOError:
                    return True

            os.write(report, json.dumps(check(running)).encode())

        self.pid = fork(work)
        os.close(report)
        os.close(go_on)

    def stop(self) -> dict[str, int]:
        os.close(self.go_on)
        tally = os.read(self.report, 65536)
        os.close(self.report)
        os.waitpid(self.pid, 0)
        return json.loads(tally) if tally else {"crashed": 1}


def read_slot(slot: Slot, nbytes: int, running: Callable[[], bool]) -> dict[str, int]:
    tally = {"reads": 0, "busy": 0, "torn": 0, "backwards": 0}
    record = np.zeros(nbytes // 8, np.uint64)
    last = 0
    while running():
        for _ in range(20):
            try:
                found = slot.read_into(record)
            except SlotBusyError:
                tally["busy"] += 1
                continue
            if found is None:
                continue
            tally["reads"] += 1
            tally["torn"] += int((record != found.sequence).any())
            tally["backwards"] += int(found.sequence < last)
            last = found.sequence
    return tally


def read_ring(ring: Ring, nbytes: int, running: Callable[[], bool]) -> dict[str, int]:
    tally = {"reads": 0, "dropped": 0, "torn": 0, "gaps": 0, "miscounted": 0}
    records = np.zeros((16, nbytes // 8), np.uint64)
    stamps = np.zeros((16, 3), np.int64)
    reader = ring.reader()
    start = reader.cursor
    while running():
        for _ in range(20):
            got = reader.read(records, stamps)
            tally["reads"] += got
            numbers = stamps[:got, 0]
            tally["torn"] += int((records[:got] != numbers[:, None]).any())
            if got:
                tally["gaps"] += int((np.diff(numbers) != 1).any() or numbers[-1] != reader.cursor)
            tally["miscounted"] += int(tally["reads"] + reader.dropped != reader.cursor - start)
            got = ring.last(records, stamps)
            newest = stamps[16 - got :, 0]
            tally["torn"] += int((records[16 - got :] != newest[:, None]).any())
            tally["gaps"] += int((np.diff(newest) != 1).any())
    tally["dropped"] = reader.dropped
    return tally


def odd_guards(fd: int, cells: int, nbytes: int) -> int:
    stride = -(-(3 + nbytes // 8) // 8) * 64
    return sum(os.pread(fd, 8, 128 + cell * stride)[0] & 1 for cell in range(cells))


def torture(kind: str, nbytes: int, rounds: int, draw: random.Random) -> dict[str, int | str]:
    """`rounds` times: a writer starts, goes on where the last one was killed, and is killed at a random instant."""
    if kind == "slot":
        segment = Slot.create("torture", nbytes)
        watch = Watch(lambda running: read_slot(segment, nbytes, running))
    else:
        segment = Ring.create("torture", nbytes, CAPACITY)
        watch = Watch(lambda running: read_ring(segment, nbytes, running))
    cells = 3 if kind == "slot" else CAPACITY
    write = write_slot if kind == "slot" else write_ring
    record = np.zeros((1, nbytes // 8), np.uint64)
    halved = lost = 0
    try:
        for _ in range(rounds):
            before = segment.sequence
            pid = fork(lambda: write(segment.fd, nbytes))
            deadline = time.monotonic() + 10
            while segment.sequence == before and time.monotonic() < deadline:
                time.sleep(0)
            time.sleep(draw.random() * 2e-3)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            halved += odd_guards(segment.fd, cells, nbytes)
            # The writer is dead: the newest value must be there, whole, at the first attempt, and newer than before.
            after = segment.sequence
            try:
                whole = segment.read_into(record) is not None if kind == "slot" else segment.last(record) == 1
            except SlotBusyError:
                whole = False
            lost += int(not whole or after <= before or (record != after).any())
    finally:
        tally = watch.stop()
    return {
        "kind": kind, "bytes": nbytes, "rounds": rounds, "published": segment.sequence, "killed_in_mid_write": halved,
        "last_value_lost": lost, **tally,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2000, help="kills per kind of memory")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    print(f"seed {arguments.seed}")
    results = []
    for kind, nbytes in (("slot", FRAME), ("slot", RECORD), ("ring", RECORD), ("ring", 4096)):
        results.append(torture(kind, nbytes, arguments.rounds, draw))
        print(", ".join(f"{name} {value}" for name, value in results[-1].items()), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    wrong = ("torn", "backwards", "gaps", "miscounted", "last_value_lost", "crashed")
    return int(any(result.get(name, 0) for result in results for name in wrong))


if __name__ == "__main__":
    sys.exit(main())
