"""How long a camera frame takes from its receipt in the camera process to a copy in the policy process.

- hand-off: another process publishes 640x480x3 frames and, in turns with them, single words, on absolute deadlines,
  each stamped just before its publication. This one asks for the sequence numbers every 0.1 ms, as a waiting policy
  would, copies, and takes the time after the copy. What a single word takes is the machine's share (wake-ups,
  preemption), met in the same minute; the rest is the frame's. At normal priority on a busy machine that share is
  nearly all; `chrt -f 20` before the command takes the scheduler out.
- copy: publication and read of a frame in one process, in turns with numpy's copy of it: what word-wise atomic copies
  cost over memcpy.
- record: 14 doubles, published and read in one process through Python.

    python -m chatvla_edge.benchmarks.slots --quick --json out.json
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from chatvla_edge.runtime.realtime import now_ns, sleep_until_ns, timer_slack
from chatvla_edge.runtime.slots import Slot

FRAME = (480, 640, 3)
FRAME_BYTES = 480 * 640 * 3
RECORD_BYTES = 14 * 8
POLL_NS = 100_000
GOAL_P99_MS = 1.0


def publish_in_turns(frame_fd: int, word_fd: int, rounds: int, period_ns: int) -> None:
    """The camera process: a frame at the start of each period, a word in its middle. Both hold the round's number."""
    frame_slot = Slot.attach(frame_fd, FRAME_BYTES, write=True)
    word_slot = Slot.attach(word_fd, 8, write=True)
    frame, word = np.zeros(FRAME_BYTES // 8, np.uint64), np.zeros(1, np.uint64)
    start = now_ns() + 200_000_000
    for number in range(1, rounds + 1):
        frame[-1] = word[0] = number
        sleep_until_ns(start + number * period_ns)
        frame_slot.publish(frame, captured_ns=now_ns())
        sleep_until_ns(start + number * period_ns + period_ns // 2)
        word_slot.publish(word, captured_ns=now_ns())


def hand_off(rounds: int, period_ns: int) -> tuple[dict[str, NDArray[np.float64]], int]:
    """Microseconds from before a publication to after the copy, of frames and of words; and frames never seen."""
    slots = {"frame": Slot.create("benchmark frame", FRAME_BYTES), "word": Slot.create("benchmark word", 8)}
    targets = {"frame": np.zeros(FRAME_BYTES // 8, np.uint64), "word": np.zeros(1, np.uint64)}
    seen = dict.fromkeys(slots, 0)
    took: dict[str, list[float]] = {name: [] for name in slots}
    descriptors = [slot.fd for slot in slots.values()]
    camera = subprocess.Popen(  # noqa: S603  (this very module)
        [sys.executable, "-m", __spec__.name, "--writer", *map(str, descriptors), str(rounds), str(period_ns)],
        pass_fds=descriptors,
    )
    timer_slack()
    poll = now_ns()
    while min(seen.values()) < rounds and camera.poll() in (None, 0):
        poll = max(poll + POLL_NS, now_ns())
        sleep_until_ns(poll)
        for name, slot in slots.items():
            if slot.sequence == seen[name]:
                continue
            found = slot.read_into(targets[name])
            done = now_ns()
            if found is None or int(targets[name][-1]) != found.sequence:
                raise RuntimeError(f"{name} {found} holds number {targets[name][-1]}")
            seen[name] = found.sequence
            took[name].append((done - found.captured_ns) / 1e3)
    if camera.wait() != 0:
        raise RuntimeError(f"the camera process ended with {camera.returncode}")
    return {name: np.array(us) for name, us in took.items()}, rounds - len(took["frame"])


def in_turns(rounds: int, works: Sequence[Callable[[], object]]) -> list[NDArray[np.float64]]:
    """Microseconds of each call, one after the other in every round, so that all meet the same machine."""
    took = np.zeros((len(works), rounds))
    for turn in range(rounds):
        for index, work in enumerate(works):
            before = now_ns()
            work()
            took[index, turn] = (now_ns() - before) / 1e3
    return list(took)


def copies(rounds: int) -> dict[str, NDArray[np.float64]]:
    """Publication, read and plain copy of a frame, and publication and read of a record, us each."""
    slot = Slot.create("benchmark frame", FRAME_BYTES)
    writer = Slot.attach(slot.fd, FRAME_BYTES, write=True)
    record_slot = Slot.create("benchmark record", RECORD_BYTES)
    record_writer = Slot.attach(record_slot.fd, RECORD_BYTES, write=True)
    frame, target = np.ones(FRAME, np.uint8), np.zeros(FRAME, np.uint8)
    record, record_target = np.ones(14), np.zeros(14)
    names = ["frame publish", "frame read", "frame memcpy", "record publish", "record read"]
    works: list[Callable[[], object]] = [
        lambda: writer.publish(frame),
        lambda: slot.read_into(target),
        lambda: np.copyto(target, frame),
        lambda: record_writer.publish(record),
        lambda: record_slot.read_into(record_target),
    ]
    return dict(zip(names, in_turns(rounds, works), strict=True))


def main() -> int:
    """Measure, print a table and the goals, write JSON. Exit code 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="about 10 s instead of two minutes")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--writer", nargs=4, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.writer:
        publish_in_turns(*arguments.writer)
        return 0

    took, missed = hand_off(rounds=600 if arguments.quick else 6000, period_ns=1_000_000_000 // 60)
    figures = {f"{name} hand-off at 60 Hz": us for name, us in took.items()}
    figures |= copies(500 if arguments.quick else 5000)
    rows = {
        name: {"p50": float(np.percentile(us, 50)), "p99": float(np.percentile(us, 99)), "max": float(us.max())}
        for name, us in figures.items()
    }
    ratio = (rows["frame publish"]["p50"] + rows["frame read"]["p50"]) / (2 * rows["frame memcpy"]["p50"])
    p99_ms = rows["frame hand-off at 60 Hz"]["p99"] / 1e3
    goals = [
        {
            "name": "frame received -> copied by the policy, p99 ms at 640x480",
            "value": p99_ms,
            "goal": f"<= {GOAL_P99_MS}",
            "ok": p99_ms <= GOAL_P99_MS,
        },
        {"name": "frames never seen", "value": missed, "goal": "0", "ok": missed == 0},
    ]
    table = Table("us", "p50", "p99", "max", title=f"slots, {len(took['frame'])} frames, load {os.getloadavg()[0]:.1f}")
    for name, row in rows.items():
        table.add_row(name, *(f"{row[key]:.1f}" for key in ("p50", "p99", "max")))
    console = Console()
    console.print(table)
    console.print(f"a frame's copy against memcpy: {ratio:.2f}x")
    share = rows["word hand-off at 60 Hz"]["p99"] / 1e3
    console.print(
        f"of the frame's p99, {share:.3f} ms is the machine's share: what a single word took in the same minute"
    )
    for goal in goals:
        console.print(f"{'met ' if goal['ok'] else 'MISSED'} {goal['name']}: {goal['value']:.3f} (goal {goal['goal']})")
    if arguments.json:
        result = {
            "us": rows,
            "copy_over_memcpy": ratio,
            "poll_us": POLL_NS / 1e3,
            "load": os.getloadavg()[0],
            "missed": missed,
            "goals": goals,
        }
        arguments.json.write_text(json.dumps(result, indent=1))
    return int(not all(goal["ok"] for goal in goals))


if __name__ == "__main__":
    sys.exit(main())
