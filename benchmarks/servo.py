"""How punctual the servo is, what a tick costs, and how soon a chunk is used.

- wake-up: the servo's own loop (14 joints, 1 kHz, SCHED_FIFO where permitted) and cyclictest take turns within seconds
  of each other, idle, beside a load on every core, and beside a Python thread that never lets go of the GIL. What
  cyclictest finds is the machine's share; pairs are compared, so a stall of the host hits both sides or neither pair.
- the same loop in Python, asleep by `time.sleep`: what the servo would be without Cython; and LeRobot's action-queue
  loop, written anew from its public source (`action_queue_loop`), at the same rate and at one that it is made for.
- tick cost: wall time of each step, taken by the servo itself, in the loop (cold after each sleep) and back to back.
- hand-off: chunks published at any time; each row of telemetry says which chunk its tick used.

A load is `stress-ng --cpu` where it is installed, spinning Python processes where it is not.
"""

import ctypes
import gc
import json
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from os import cpu_count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chatvla_edge.benchmarks import action_queue_loop, script
from chatvla_edge.benchmarks.report import Report
from chatvla_edge.benchmarks.samples import Samples, ratio
from chatvla_edge.runtime import realtime
from chatvla_edge.runtime.histogram import TOPS, Histogram
from chatvla_edge.runtime.mailbox import ChunkMailbox
from chatvla_edge.runtime.pages import Lease
from chatvla_edge.runtime.rig_segments import RigSegments
from chatvla_edge.runtime.servo import Servo
from chatvla_edge.runtime.servo_plan import ArmPlan, AxisLimits, DirectAxis, ServoPlan
from chatvla_edge.runtime.servo_records import MODE, SERVO_DOING, STATE, WANTED, telemetry
from chatvla_edge.runtime.servo_reports import STEP_NAMES
from chatvla_edge.runtime.slots import Slot

SUMMARY = "The servo: wake-up lateness beside cyclictest, cost of a tick by step, hand-off of a chunk."

RATE = 1000
PRIORITY = 80
AXES, ARMS = 7, 2
CHUNK_DT = 0.5  # s: one chunk of 50 actions lasts for a round, so the policy need not run beside it


class Rig:
    """Two arms of 7 joints that are where they are told to be, a granted lease, a servo."""

    def __init__(self) -> None:
        limits = AxisLimits((-2.0,) * AXES, (2.0,) * AXES, (2.0,) * AXES, (15.0,) * AXES, (500.0,) * AXES)
        arms = tuple(
            ArmPlan(
                f"arm{arm}",
                limits,
                tuple(DirectAxis(axis, arm * AXES + axis) for axis in range(AXES)),
                state_budget=3600.0,
            )
            for arm in range(ARMS)
        )
        self.plan = ServoPlan(RATE, ("joint",) * (ARMS * AXES), 50, arms, chunk_budget=3600.0, rest=3600.0, gap=1.0)
        self.segments = RigSegments.create(self.plan, telemetry_rows=65_536)
        wires = self.segments.servo_wires
        self.lease = Lease.attach(wires.lease, write=True)
        self.policy = ChunkMailbox.attach(wires.chunks, 50, ARMS * AXES, write=True)
        self.rows = self.segments.telemetry.reader()
        state = np.zeros((), STATE)
        state["axes"] = AXES
        for _, slot in wires.arms:
            Slot.attach(slot, STATE.itemsize, write=True).publish(state, captured_ns=realtime.now_ns())
        self.servo = Servo(self.plan, wires)
        mode = np.zeros((), MODE)
        mode["wanted"], mode["arming"], mode["speed"] = WANTED.index("track"), 1, 1.0
        Slot.attach(wires.mode, MODE.itemsize, write=True).publish(mode)
        self.ended = threading.Event()
        threading.Thread(target=self._grant, daemon=True).start()

    def _grant(self) -> None:
        while not self.ended.wait(0.1):
            self.lease.grant(900_000_000)

    def post(self) -> int:
        """A chunk of slow sines, observed now."""
        tau = float(self.servo.read_status()["tau"])
        due = tau + CHUNK_DT * np.arange(50)[:, None]
        actions = 0.2 * np.sin(0.5 * due + np.arange(ARMS * AXES))
        return self.policy.publish(
            actions, epoch=0, tau_observation=tau, first_step=0, dt=CHUNK_DT, captured_ns=realtime.now_ns()
        )

    def track(self) -> None:
        """Arm, approach, and get tau going."""
        self.lease.grant(900_000_000)
        self.post()
        while SERVO_DOING[int(self.servo.read_status()["doing"])] != "tracking":
            self.servo.run(ticks=20)
            self.post()

    def run(self, seconds: float) -> float:
        """The loop on a thread of its own for that long; CPU seconds that it took."""
        took: list[float] = []

        def body() -> None:
            realtime.enter(PRIORITY)
            before = time.thread_time()
            self.servo.run(ticks=round(seconds * RATE))
            took.append(time.thread_time() - before)

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        return took[0]

    def telemetry(self) -> NDArray[np.void]:
        """Rows since the last call."""
        rows = np.zeros(65_536, telemetry(ARMS * AXES, ARMS * AXES))
        return rows[: self.rows.read(rows)]


def cyclictest(seconds: float) -> NDArray[np.float64] | None:
    """Its lateness samples (us), None where it is not installed."""
    found = shutil.which("cyclictest")
    if found is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        subprocess.run(  # noqa: S603
            [found, "-q", "-m", "-t1", f"-p{PRIORITY}", f"-i{1_000_000 // RATE}", f"-l{round(seconds * RATE)}",
             "-h", "50000", f"--json={result}"],
            check=True, capture_output=True,
        )  # fmt: skip
        histogram = json.loads(result.read_text())["thread"]["0"]["histogram"]
    return np.repeat([float(us) for us in histogram], list(histogram.values()))


def python_loop(seconds: float) -> NDArray[np.float64]:
    """Lateness (us) of the loop that one would write in Python."""
    late: list[int] = []

    def body() -> None:
        realtime.enter(PRIORITY)
        period = 1_000_000_000 // RATE
        deadline = realtime.now_ns() + period
        for _ in range(round(seconds * RATE)):
            time.sleep(max(0, deadline - realtime.now_ns()) / 1e9)
            now = realtime.now_ns()
            late.append(now - deadline)
            deadline += period * (1 + max(0, now - deadline) // period)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    return np.array(late) / 1e3


def peers(report: Report, seconds: float) -> None:
    """Rows of LeRobot's loop: at the servo's rate and at 50 Hz, idle and beside a GIL hog."""
    try:
        action_queue_loop.run(ARMS * AXES, 50.0, 20, 0.1)
    except ImportError:
        report.note("LeRobot's loop was not measured: it needs torch, which is not installed.")
        return
    for beside, condition in (("idle", nothing), ("GIL hog", gil_hog)):
        for rate, multiplier in ((50.0, RATE // 50), (50.0, 1)):
            found: list[tuple[NDArray[np.float64], NDArray[np.float64], float]] = []

            def body(rate: float = rate, multiplier: int = multiplier) -> None:
                realtime.enter(PRIORITY)
                found.append(action_queue_loop.run(ARMS * AXES, rate, multiplier, seconds))  # noqa: B023

            with condition():
                thread = threading.Thread(target=body)
                thread.start()
                thread.join()
            ((late, work, held),) = found
            name = f"LeRobot's loop at {rate * multiplier:.0f} Hz, {beside}"
            report.add(Samples.of(f"{name}: wake-up", late))
            report.add(Samples.of(f"{name}: work of a tick", work))
            report.figure(f"{name}: rate held", held, "Hz")
    report.note(
        "LeRobot's loop is a re-implementation of what its source does per tick (see action_queue_loop), without "
        "cameras and processors. It is made for 30 to 60 Hz; at the servo's rate it is out of its element, and shown "
        "there because a tick is compared with a tick. Its tick neither limits nor blends."
    )


@contextmanager
def gil_hog() -> Iterator[None]:
    """A Python thread of this process that never sleeps."""
    ended = False

    def spin() -> None:
        while not ended:
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        yield
    finally:
        ended = True
        thread.join()


@contextmanager
def load() -> Iterator[None]:
    """Every core busy at normal priority."""
    cores = cpu_count() or 1
    stress = shutil.which("stress-ng")
    command = [stress, "--cpu", str(cores), "--quiet"] if stress else [sys.executable, "-c", "while True: pass"]
    children = [subprocess.Popen(command) for _ in range(1 if stress else cores)]  # noqa: S603
    time.sleep(0.2)
    try:
        yield
    finally:
        for child in children:
            child.terminate()
            child.wait()


@contextmanager
def nothing() -> Iterator[None]:
    """Idle, as far as the machine is."""
    yield


def wake_ups(
    rig: Rig, beside: str, pairs: int, seconds: float, chance: random.Random
) -> tuple[Samples, Samples | None]:
    """Lateness of servo and cyclictest in pairs, in a random order within each."""
    conditions = {"idle": nothing, "load": load, "GIL hog": gil_hog}
    ours: list[NDArray[np.float64]] = []
    theirs: list[NDArray[np.float64] | None] = []
    with conditions[beside]():
        for _ in range(pairs):
            turns = ["servo", "cyclictest"]
            chance.shuffle(turns)
            for turn in turns:
                if turn == "servo":
                    rig.post()
                    rig.telemetry()
                    rig.run(seconds)
                    ours.append(rig.telemetry()["late_ns"] / 1e3)
                else:
                    theirs.append(cyclictest(seconds))
    found = [values for values in theirs if values is not None]
    servo = Samples.of(f"servo wake-up, {beside}", *ours, scale=1e-6)
    return servo, Samples.of(f"cyclictest, {beside}", *found, scale=1e-6) if found else None


def expanded(name: str, histogram: Histogram) -> Samples:
    """A histogram's counts as samples, each at its bucket's upper end (at most 1/32 too high)."""
    return Samples.of(name, np.repeat(TOPS, histogram.snapshot()["bucket"].astype(np.int64)), scale=1e-9)


def hand_offs(rig: Rig, count: int) -> tuple[Samples, int]:
    """Seconds from a chunk's publication to the start of the tick that used it; and chunks not used by that tick."""
    published: list[tuple[int, int]] = []

    def post() -> None:
        for _ in range(count):
            number = rig.post()
            posted = rig.segments.chunks.take()
            assert posted is not None
            published.append((number, posted.published_ns))
            time.sleep(0.01 + 0.0013 * (number % 7))

    rig.telemetry()
    thread = threading.Thread(target=post)
    thread.start()
    rig.run(count * 0.02)
    thread.join()
    rows = rig.telemetry()
    starts = rows["tick_ns"] + rows["late_ns"]
    took, missed = [], 0
    for number, when in published:
        after = np.nonzero(starts > when)[0]
        if len(after) == 0:
            continue  # published when the last tick had begun
        missed += int(rows["chunk"][after[0]] < number)
        took.append(starts[after[0]] - when)
    return Samples.of("chunk published -> tick that uses it begins", took, scale=1e-9), missed


def allocated(rig: Rig, ticks: int) -> int | None:
    """Bytes that malloc gave out during so many ticks, beyond what one tick's call takes; None without glibc 2.33."""

    class Mallinfo(ctypes.Structure):
        _fields_ = tuple((name, ctypes.c_size_t) for name in "abcdefghij")

    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return None
    mallinfo2.restype = Mallinfo

    def growth(ticks: int) -> int:
        before = mallinfo2()
        rig.servo.run(ticks=ticks)
        after = mallinfo2()
        return int(after.h + after.e - before.h - before.e)

    gc.disable()
    try:
        growth(1)
        return growth(ticks) - growth(1)
    finally:
        gc.enable()


def run(options: Namespace) -> Report:
    """Pairs first, so that they meet the machine as it is; then costs and hand-off."""
    pairs, seconds = (9, 0.8) if options.quick else (15, 3.0)
    chance = random.Random(0)  # noqa: S311  (an order, not a secret)
    rig = Rig()
    rig.track()
    rig.run(0.3)
    report = Report(title=f"The servo: {ARMS * AXES} joints at {RATE} Hz")

    punctual: tuple[float, float] | None = None
    for beside in ("idle", "load", "GIL hog"):
        took = pairs if beside == "GIL hog" else max(3, pairs // 3)
        servo, machine = wake_ups(rig, beside, took, seconds, chance)
        report.add(servo, curve=True, versus=ratio(servo, machine) if machine else None)
        if machine:
            report.add(machine, curve=True)
            above = servo.by_round() - machine.by_round()
            tails = servo.by_round(0.99) / machine.by_round(0.99)
            if beside == "GIL hog":
                punctual = float(np.median(above)), float(np.median(tails))
    report.add(Samples.of("Python loop, idle", python_loop(2 * seconds), scale=1e-6))
    with gil_hog():
        report.add(Samples.of("Python loop, GIL hog", python_loop(2 * seconds), scale=1e-6))
    peers(report, 2 * seconds)

    rig.post()
    rig.servo.clear_histograms()
    cpu = rig.run(5 * seconds) / (5 * seconds * RATE)
    costs = rig.servo.histograms()
    tick = expanded("tick, in the loop", costs["cost"])
    report.add(tick, curve=True)
    for name in STEP_NAMES:
        report.add(expanded(f"step {name}", costs[name]))
    report.figure("CPU time of a tick, sleep and wake-up included", 1e6 * cpu, "µs")

    rig.servo.clear_histograms()
    begin = realtime.now_ns()
    for number in range(2000):  # ticked by hand in rising time: no sleep between them, so caches stay warm
        rig.servo.tick(begin + number * rig.plan.period_ns, begin)
    report.add(expanded("tick, back to back", rig.servo.histograms()["cost"]))
    rig.ended.set()

    fresh = Rig()
    fresh.track()
    took_by, missed = hand_offs(fresh, 100 if options.quick else 500)
    report.add(took_by, curve=True)
    taken = allocated(fresh, 500)
    fresh.ended.set()

    no_cyclictest = "cyclictest is not installed (apt-get install rt-tests)"
    goals = [("wake-up p50 above cyclictest's, GIL hog, median of the pairs", 10e-6, "s", 0)]
    for name, goal, unit, place in [
        *goals,
        ("wake-up p99 over cyclictest's, GIL hog, median of the pairs", 2.0, "x", 1),
    ]:
        if punctual is None:
            report.goal(name, None, "<=", goal, unit=unit, reason=no_cyclictest)
        else:
            report.goal(name, punctual[place], "<=", goal, unit=unit)
    middle = tick.quantile(0.5)
    assert middle is not None
    report.goal(f"a tick of {ARMS * AXES} joints in the loop, p50", middle, "<=", 10e-6, unit="s", row=tick.name)
    if taken is None:
        report.goal("bytes allocated in 500 ticks", None, "==", 0, reason="mallinfo2 needs glibc 2.33")
    else:
        report.goal("bytes allocated in 500 ticks", taken, "==", 0)
    report.goal("chunks not used by the first tick that starts after them", missed, "==", 0)
    report.method.append(
        f"wake-up: {pairs} pairs beside the GIL hog, {max(3, pairs // 3)} else, {seconds:g} s a side, order drawn anew"
    )
    grants = ", ".join(f"{g.what} {'obtained' if g.obtained else 'refused'}" for g in grants_here())
    report.method.append(f"real-time rights: {grants}")
    if punctual is None:
        report.note(f"{no_cyclictest}: the machine's share of the lateness is unknown.")
    return report


def grants_here() -> list[realtime.Grant]:
    """What this machine permits, asked on a thread that ends."""
    found: list[realtime.Grant] = []
    thread = threading.Thread(target=lambda: found.extend(realtime.enter(PRIORITY)))
    thread.start()
    thread.join()
    return found


if __name__ == "__main__":
    sys.exit(script.main(__file__))
