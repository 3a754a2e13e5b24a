"""The policy's process: the newest consistent observation in, a chunk with absolute times out, again and again.

A query that fails or is slow is a counted event; the servo goes on along the chunk that it has. Nothing here can move
an arm.
"""

import base64
import json
import logging
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chatvla_edge.drivers.rig import Rig
from chatvla_edge.runtime.bundle import open_bundle
from chatvla_edge.runtime.camera_frames import FrameReader
from chatvla_edge.runtime.daemon import mapping
from chatvla_edge.runtime.daemon.observing import Seen, StateHistory, TrajectoryClock, spread
from chatvla_edge.runtime.daemon.records import POLICY, REPORT_BYTES, REPORTS, TEXT_BYTES, packed, unpacked
from chatvla_edge.runtime.engines.onnxruntime import Threads
from chatvla_edge.runtime.mailbox import ChunkMailbox, PrefixSlot
from chatvla_edge.runtime.policy import Answer, Committed, Policy, ReasoningSettings
from chatvla_edge.runtime.realtime import now_ns
from chatvla_edge.runtime.servo_records import STATE, STATUS, telemetry
from chatvla_edge.runtime.slots import Ring, Slot, SlotBusyError

log = logging.getLogger(__name__)

MS = 1_000_000
PATIENCE = 5  # failed queries in a row, after which the process ends and is started anew
LOOK_S = 0.002  # how often a thing that is waited for is looked at


@dataclass(frozen=True)
class PolicyWires:
    """Descriptors that the policy's process inherits; ``states``: history ring of each device, in the plan's order."""

    frames: dict[str, tuple[int, int]]  # frame slot and status slot of each camera
    states: tuple[int, ...]
    state_rows: int
    status: int
    telemetry: int
    telemetry_rows: int
    chunks: int
    prefix: int | None
    instruction: int
    policy: int
    reports: int

    @property
    def fds(self) -> tuple[int, ...]:
        """For ``pass_fds``."""
        single = (self.status, self.telemetry, self.chunks, self.instruction, self.policy, self.reports)
        prefix = () if self.prefix is None else (self.prefix,)
        return (*(fd for pair in self.frames.values() for fd in pair), *self.states, *single, *prefix)


@dataclass
class Observation:
    """What one query sees. ``images``: the readers' own, in the policy's order, until their next read."""

    images: list[NDArray[np.uint8]]
    frames: dict[str, Seen]
    state: NDArray[np.float32]
    state_ns: int
    tau: float
    epoch: int


class PolicyLoop:
    """Answers queries until told to end. ``settings``: see `main`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        wires = PolicyWires(**{**settings["wires"], "states": tuple(settings["wires"]["states"])})
        self.rig = Rig.model_validate(settings["rig"])
        path = Path(settings["bundle"])
        with open_bundle(path) as bundle:
            cpus = self.rig.cores.policy
            threads = Threads.on(cpus) if cpus else Threads(settings["threads"])
            threads.pin()
            asked = self.rig.policy
            reasoning = ReasoningSettings(
                asked.every_n_queries if asked.every_n_queries > 1 else None, asked.reasoning_max_age
            )
            self.policy = Policy(path, bundle.manifest, threads, reasoning)
        manifest = self.manifest = self.policy.manifest
        plan = mapping.servo_plan(self.rig, manifest)
        self.sync = plan.fusion.mode == "sync"
        self.cycle_ns = round(1e9 * self.rig.policy.cycle)
        self.window_ns = round(1e9 * self.rig.policy.sync_window)
        self.horizon = plan.horizon
        self.components = len(plan.components)
        self.reader = mapping.StateReader(self.rig, manifest)
        cameras = [camera.name for camera in manifest.cameras]
        sizes = {name: (self.rig.cameras[name].height, self.rig.cameras[name].width) for name in cameras}
        self.cameras = {name: FrameReader.attach(*wires.frames[name], *sizes[name]) for name in cameras}
        self.grey = [np.full((*size, 3), 128, np.uint8) for size in sizes.values()]
        self.states = {
            arm.name: StateHistory(
                Ring.attach(fd, STATE.itemsize, wires.state_rows), STATE, arm.axes, min(256, wires.state_rows)
            )
            for arm, fd in zip(plan.arms, wires.states, strict=True)
        }
        row = telemetry(self.components, plan.axes)
        ring = Ring.attach(wires.telemetry, row.itemsize, wires.telemetry_rows)
        self.clock = TrajectoryClock(ring, row, min(512, wires.telemetry_rows))
        self.status = Slot.attach(wires.status, STATUS.itemsize)
        self.chunks = ChunkMailbox.attach(wires.chunks, self.horizon, self.components, write=True)
        self.prefix = None
        if wires.prefix is not None:
            self.prefix = PrefixSlot.attach(wires.prefix, self.horizon, self.components)
        self.instruction = Slot.attach(wires.instruction, TEXT_BYTES)
        self.own = Slot.attach(wires.policy, POLICY.itemsize, write=True)
        self.reports = Ring.attach(wires.reports, REPORT_BYTES, REPORTS, write=True)
        self.said = np.zeros((), POLICY)
        self.failures = 0
        self.draft: list[int] = []
        self.used: dict[str, int] = {}
        self.quitting = False
        self.parent = int(settings["parent"])
        numbers = manifest.normalization
        self.low, self.high = (np.asarray(v, np.float64) for v in (numbers.action_min, numbers.action_max))

    # ---------------------------------------------------------------------------------------------------- observing

    def told(self) -> str:
        """The present instruction; "" before the first."""
        found = self.instruction.read()
        return "" if found is None else str((unpacked(found[0]) or {}).get("text", ""))

    def look(self) -> Observation | str:
        """The newest observation, or why there is none."""
        frames, images = {}, []
        for name, camera in self.cameras.items():
            try:
                frame = camera.newest()
            except SlotBusyError as error:
                return str(error)
            if frame is None:
                return f"no frame of {name} yet"
            images.append(frame.image)
            frames[name] = Seen(frame.sequence, frame.captured_ns, frame.received_ns)
        now = now_ns()
        for name, seen in frames.items():
            if now - seen.received_ns > round(1e9 * self.rig.cameras[name].max_age):
                return f"the newest frame of {name} is {(now - seen.received_ns) / MS:.0f} ms old"
        if (apart := spread(frames)) > self.window_ns:
            return f"the frames are {apart / MS:.0f} ms apart"
        if self.used == {name: frame.sequence for name, frame in frames.items()}:
            return "no new frame"
        pairing = self.manifest.timing.pairing
        measured, at_ns = {}, min(frame.captured_ns for frame in frames.values())
        for name, history in self.states.items():
            if pairing == "capture_time":
                position = history.at(at_ns)
                if position is None:
                    return f"the state of {name} at the frame's capture is not known"
                measured[name] = position
                continue
            newest = history.newest()
            if newest is None:
                return f"no state of {name} yet"
            measured[name], stamp = newest
            at_ns = stamp if name == next(iter(self.states)) else min(at_ns, stamp)
        if not all(np.isfinite(position).all() for position in measured.values()):
            return "a measured position is not finite"
        tau = self.clock.at(at_ns)
        status = np.zeros((), STATUS)
        if tau is None or self.status.read_into(status) is None:
            return "the servo does not tell the trajectory time yet"
        return Observation(images, frames, self.reader(measured), at_ns, tau, int(status["epoch"]))

    def committed(self, tau: float) -> Committed | None:
        """What real-time chunking holds the first rows to, normalised, with rows counted from this observation."""
        if self.prefix is None:
            return None
        found = self.prefix.read()
        if found is None:
            return None
        first = self.manifest.timing.first_step
        dt = 1.0 / self.manifest.timing.rate_hz
        shift = round((tau + first * dt - found.tau) / dt)
        rows = np.clip(np.arange(self.horizon) + shift, 0, self.horizon - 1)
        actions = 2.0 * (found.actions[rows] - self.low) / (self.high - self.low) - 1.0
        inside = (np.arange(self.horizon) + shift < self.horizon) & (np.arange(self.horizon) + shift >= 0)
        mask = np.where(inside, found.mask[rows], 0.0)
        return Committed(actions.astype(np.float32), mask.astype(np.float32))

    # ----------------------------------------------------------------------------------------------------- answering

    def answer(self, seen: Observation, instruction: str, number: int) -> Answer:
        """One query; its draft is the reasoning before."""
        return self.policy.query(
            seen.images,
            seen.state,
            instruction,
            self.policy.noise(number),
            draft=self.draft,
            committed=self.committed(seen.tau),
            observed_ns=seen.state_ns,
        )

    def turn(self, instruction: str) -> None:
        """One query from observation to chunk. Raises what the query raises."""
        seen = self.look()
        if isinstance(seen, str):
            if seen != "no new frame":
                self.said["waits"] += 1
                self.report({"wait": seen})
            time.sleep(LOOK_S)
            return
        number = int(self.said["queries"] + self.said["errors"])
        begun = now_ns()
        self.say(begun_ns=begun)
        answer = self.answer(seen, instruction, number)
        self.used = {name: frame.sequence for name, frame in seen.frames.items()}
        self.draft = answer.token_ids
        chunk = np.ascontiguousarray(answer.chunk, np.float64)
        sequence = self.chunks.publish(
            chunk,
            epoch=seen.epoch,
            tau_observation=seen.tau,
            first_step=self.manifest.timing.first_step,
            dt=1.0 / self.manifest.timing.rate_hz,
            captured_ns=min(frame.captured_ns for frame in seen.frames.values()),
        )
        done = now_ns()
        self.said["queries"] += 1
        self.failures = 0
        self.say(
            chunk=sequence,
            chunk_ns=done,
            begun_ns=0,
            needed_ns=0,
            query_ns=done - begun,
            language_ns=round(1e9 * answer.seconds.get("language", 0.0)),
            passes=answer.passes,
            tokens=len(answer.token_ids),
        )
        self.report(
            {
                "query": number,
                "chunk": sequence,
                "begun_ns": begun,
                "done_ns": done,
                "tau": seen.tau,
                "epoch": seen.epoch,
                "state_ns": seen.state_ns,
                "instruction": instruction,
                "text": answer.text,
                "passes": answer.passes,
                "accepted": answer.accepted,
                "tokens": len(answer.token_ids),
                "reasoning_age": [answer.reasoning_age_queries, answer.reasoning_age_s],
                "seconds": {stage: round(seconds, 6) for stage, seconds in answer.seconds.items()},
                "frames": {name: asdict(frame) for name, frame in seen.frames.items()},
                "state": [float(number) for number in seen.state],
                "actions": base64.b64encode(answer.chunk.astype("<f4").tobytes()).decode(),
            }
        )

    def say(self, **changes: int) -> None:
        """Publish the process's own record."""
        for name, value in changes.items():
            self.said[name] = value
        self.own.publish(self.said)

    def report(self, values: dict[str, Any]) -> None:
        """For log and screen: what a query saw and said. A text that is too long is cut, and says so."""
        try:
            record = packed(values, REPORT_BYTES)
        except ValueError:
            record = packed({**values, "text": str(values.get("text", ""))[:1000], "cut": True}, REPORT_BYTES)
        self.reports.append(record)

    def warm_up(self) -> None:
        """Two queries on grey pictures, whose answers nobody sees: the first run of an engine is a slow one."""
        state = np.asarray(self.manifest.normalization.state_mean, np.float32)
        for _ in range(2):
            self.policy.query(self.grey, state, "wait", self.policy.noise(0))

    def run(self) -> None:
        """Until `quitting`, or the death of the parent."""
        self.warm_up()
        log.info("warm")
        due = now_ns()
        while not self.quitting and os.getppid() == self.parent:
            instruction = self.told()
            self.say(ready=int(bool(instruction)))
            if not instruction or not self.due(due):
                time.sleep(LOOK_S)
                continue
            before = int(self.said["queries"])
            begun = now_ns()
            try:
                self.turn(instruction)
            except (ValueError, RuntimeError) as error:
                self.said["errors"] += 1
                self.failures += 1
                log.exception("query failed")
                self.report({"error": repr(error)[:500]})
                if self.failures >= PATIENCE:
                    raise
            if int(self.said["queries"]) > before:
                due = max(begun + self.cycle_ns, now_ns()) if not self.sync else now_ns()

    def due(self, at_ns: int) -> bool:
        """Whether it is time for the next query: after a cycle, or in sync mode when the actions have been executed."""
        if not self.sync:
            return now_ns() >= at_ns
        status = np.zeros((), STATUS)
        if self.status.read_into(status) is None:
            return False
        waiting = int(status["chunk"]) == int(self.said["chunk"]) and not status["path_left"] > 0
        if (waiting or not self.said["chunk"]) and not self.said["needed_ns"]:
            self.say(needed_ns=now_ns())
        return bool(waiting or not self.said["chunk"])


def main() -> None:
    """``python -m chatvla_edge.runtime.daemon.policy_process`` with one JSON spec on standard input.

    The spec: ``rig`` (its JSON, whose cores count more than ``threads``), ``bundle`` (path), ``wires``, ``threads``,
    ``parent``: with which it ends.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s policy %(message)s")
    settings = json.load(sys.stdin)
    loop = PolicyLoop(settings)

    def leave(*_: object) -> None:
        loop.quitting = True

    signal.signal(signal.SIGTERM, leave)
    loop.run()


if __name__ == "__main__":
    main()
