"""How long a camera frame takes from its receipt in the camera process to a copy in the policy process.

- hand-off: another process publishes 640x480x3 frames and, in turns with them, single words, on absolute deadlines,
  each stamped just before its publication. This one asks for the sequence numbers every 0.1 ms, as a waiting policy
  would, copies, and takes the time after the copy. What a single word takes is the machine's share (wake-ups,
  preemption), met in the same minute; the rest is the frame's. At normal priority on a busy machine that share is
  nearly all; `chrt -f 20` before the command takes the scheduler out.
- copy: publication and read of a frame in one process, in turns with numpy's copy of it: what word-wise atomic copies
  cost over memcpy.
- record: 14 doubles, published and read in one process through Python.
"""

import subprocess
import sys
from argparse import Namespace

import numpy as np

from chatvla_edge.benchmarks import script
from chatvla_edge.benchmarks.method import Comparison, compare
from chatvla_edge.benchmarks.report import Report
from chatvla_edge.benchmarks.samples import Samples
from chatvla_edge.benchmarks.units import readable
from chatvla_edge.runtime.realtime import now_ns, sleep_until_ns, timer_slack
from chatvla_edge.runtime.slots import Slot

SUMMARY = "A camera frame through shared memory: hand-off between processes, cost of a copy, of a record."

FRAME = (480, 640, 3)
FRAME_BYTES = 480 * 640 * 3
RECORD_BYTES = 14 * 8
POLL_NS = 100_000
GOAL_P99_S = 1e-3

WRITER = "import sys; from chatvla_edge.benchmarks.slots import publish_in_turns as run; run(*map(int, sys.argv[1:]))"


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


def hand_off(rounds: int, period_ns: int) -> tuple[Samples, Samples, int]:
    """Seconds from before a publication to after the copy, of frames and of words; and frames never seen."""
    slots = {"frame": Slot.create("benchmark frame", FRAME_BYTES), "word": Slot.create("benchmark word", 8)}
    targets = {"frame": np.zeros(FRAME_BYTES // 8, np.uint64), "word": np.zeros(1, np.uint64)}
    seen = dict.fromkeys(slots, 0)
    took: dict[str, list[int]] = {name: [] for name in slots}
    descriptors = [slot.fd for slot in slots.values()]
    camera = subprocess.Popen(  # noqa: S603  (this very module)
        [sys.executable, "-c", WRITER, *map(str, descriptors), str(rounds), str(period_ns)], pass_fds=descriptors
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
            took[name].append(done - found.captured_ns)
    if camera.wait() != 0:
        raise RuntimeError(f"the camera process ended with {camera.returncode}")
    frame, word = (Samples.of(f"{name} hand-off at 60 Hz", ns, scale=1e-9) for name, ns in took.items())
    return frame, word, rounds - len(took["frame"])


def copies(seconds: float) -> Comparison:
    """Publication and read of a frame and of a record beside a plain copy of the frame, in turns call by call."""
    slot = Slot.create("benchmark frame", FRAME_BYTES)
    writer = Slot.attach(slot.fd, FRAME_BYTES, write=True)
    record_slot = Slot.create("benchmark record", RECORD_BYTES)
    record_writer = Slot.attach(record_slot.fd, RECORD_BYTES, write=True)
    frame, target = np.ones(FRAME, np.uint8), np.zeros(FRAME, np.uint8)
    record, record_target = np.ones(14), np.zeros(14)
    return compare(
        {
            "frame memcpy": lambda: np.copyto(target, frame),
            "frame publish": lambda: writer.publish(frame),
            "frame read": lambda: slot.read_into(target),
            "record publish": lambda: record_writer.publish(record),
            "record read": lambda: record_slot.read_into(record_target),
        },
        seconds=seconds,
        each_call=True,
    )


def run(options: Namespace) -> Report:
    """The hand-off at 60 Hz for ten seconds or a hundred, then the copies."""
    frame, word, missed = hand_off(rounds=600 if options.quick else 6000, period_ns=1_000_000_000 // 60)
    copied = copies(1.0 if options.quick else 10.0)
    report = Report(title="A 640x480 frame from the camera process to the policy process")
    report.add(frame, curve=True)
    report.add(word, curve=True)
    for name, samples in copied.samples.items():
        # A record's ratio to a frame's copy says nothing; it takes its turn so that the frames have cooled its caches.
        atomic = name in ("frame publish", "frame read")
        report.add(samples, versus=copied.ratio(name, over="frame memcpy") if atomic else None)
    report.method.append(copied.method)
    publish, read, memcpy = (
        np.median(copied.samples[f"frame {name}"].values) for name in ("publish", "read", "memcpy")
    )
    report.figure("copy of a frame over memcpy, mean of publication and read", (publish + read) / (2 * memcpy), "x")
    report.goal(
        "frame received -> copied by the policy, p99 at 640x480",
        frame.quantile(0.99),
        "<=",
        GOAL_P99_S,
        unit="s",
        row=frame.name,
    )
    report.goal("frames never seen", missed, "==", 0)
    report.method.append(
        f"hand-off: {len(frame.values)} frames and words by turns at 60 Hz each, asked for every {POLL_NS / 1e3:.0f} µs"
    )
    share = word.quantile(0.99)
    report.note(
        f"Of the frame's p99, {readable(share, 's')} is the machine's share: what a single word took in the same time."
    )
    return report


if __name__ == "__main__":
    sys.exit(script.main(__file__))
