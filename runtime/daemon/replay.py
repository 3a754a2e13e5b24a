"""A session's servo plane once more: the recorded inputs of every tick, on a virtual clock, into a servo of today.

    /ticks       when each tick was, its mode record, lease, emergency stop, and which chunk and states it acted upon
    /state/ARM   those states
    /policy      those chunks

What comes out is compared with what was recorded: bit by bit where build and machine are the recording's, else within
TOLERANCE. A servo's memory cannot be set, so behind a tick that the log does not hold nothing can be compared before
the servo was started anew, and that is said.
"""

import base64
import binascii
import hashlib
import importlib.util
import platform
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chatvla_edge.runtime import servo_plan
from chatvla_edge.runtime.daemon import log_file
from chatvla_edge.runtime.daemon.log_file import STAMPS, Message
from chatvla_edge.runtime.mailbox import ChunkMailbox
from chatvla_edge.runtime.pages import Lease
from chatvla_edge.runtime.rig_segments import RigSegments
from chatvla_edge.runtime.servo import Servo
from chatvla_edge.runtime.servo_plan import ServoPlan
from chatvla_edge.runtime.servo_records import GIVEN, MODE, STATE, names, telemetry
from chatvla_edge.runtime.slots import Slot

START_NS = 1_000_000_000  # the virtual time of a servo's first tick: no lease reaches beyond this machine's own future
TOLERANCE = 1e-9  # rad or m, between builds: other compilers contract and order sums otherwise
STAGES = ("tau", "fused", "tracked", "limited")  # compared in this order; the last one is what the arms were told
INPUTS = ("mode", *(MODE.names or ()), "given", "looked_at", "states")
# Whatever a command is computed by.
MODULES = (
    "servo", "arm_servo", "chunk_inbox", "fusion", "knots", "fade", "tau", "tracking", "limits", "kinematics",
    "rotations",
)  # fmt: skip

STAMPED = np.dtype([*STAMPS, *STATE.descr])
Row = Any  # np.void: one row of telemetry or of states


def build() -> str:
    """Architecture, C library and digest of the compiled servo: what two runs must share to agree in every bit."""
    digest = hashlib.sha256()
    for name in MODULES:
        found = importlib.util.find_spec(f"chatvla_edge.runtime.{name}")
        if found is not None and found.origin is not None:
            digest.update(Path(found.origin).read_bytes())
    return f"{platform.machine()} {' '.join(platform.libc_ver())} {digest.hexdigest()[:16]}"


@dataclass(frozen=True)
class Chunk:
    """What the policy posted: ``actions`` [H, A] float64, due from ``tau`` (s) on."""

    actions: NDArray[np.float64]
    epoch: int
    tau: float
    captured_ns: int

    @classmethod
    def of(cls, report: dict[str, Any], components: int) -> "Chunk":
        """The chunk of a query's report. Raises ValueError for a damaged one."""
        try:
            flat = np.frombuffer(base64.b64decode(report["actions"]), "<f4").astype(np.float64)
            captured = min(frame["captured_ns"] for frame in report["frames"].values())
            return cls(flat.reshape(-1, components), int(report["epoch"]), float(report["tau"]), int(captured))
        except (KeyError, TypeError, binascii.Error) as error:
            raise ValueError(f"a report of the policy lacks or damages {error}") from error


@dataclass
class Comparison:
    """What the replay of a session found.

    ``first``: of each stage with a difference, the first one: tick, axis (or component), recorded, replayed.
    ``different``: numbers that differ, by stage. ``largest``: the largest difference of each stage.
    ``stops``: ticks from which on nothing could be compared, and why.
    """

    same_build: bool
    ticks: int = 0  # in the log
    replayed: int = 0
    compared: int = 0  # numbers of `limited`
    moving: int = 0  # replayed ticks in which commands flowed
    different: dict[str, int] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    first: dict[str, dict[str, Any]] = field(default_factory=dict)
    stops: list[dict[str, Any]] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether every command that was compared is the recorded one."""
        return not self.different.get("limited")

    @property
    def complete(self) -> bool:
        """Whether every tick of the log was compared."""
        return self.replayed == self.ticks

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {"equal": self.equal, "complete": self.complete, **asdict(self)}

    def judge(self, recorded: Row, replayed: Row, axes: list[str]) -> None:
        """Compare one tick."""
        self.replayed += 1
        self.moving += bool(recorded["doing"])
        for stage in STAGES:
            was, now = (np.atleast_1d(row[stage]) for row in (recorded, replayed))
            if stage == "limited":
                self.compared += len(was)
            if was.tobytes() == now.tobytes():
                continue
            with np.errstate(invalid="ignore"):
                away = np.abs(was - now)
            alike = (np.isnan(was) & np.isnan(now)) | (was == now)
            if not self.same_build:
                alike |= away <= TOLERANCE
            if alike.all():
                continue
            self.different[stage] = self.different.get(stage, 0) + int((~alike).sum())
            worst = float(np.max(np.where(alike, 0.0, np.where(np.isnan(away), np.inf, away))))
            self.largest[stage] = max(self.largest.get(stage, 0.0), worst)
            if stage not in self.first:
                place = int(np.argmin(alike))
                name = axes[place] if len(was) == len(axes) and stage in ("tracked", "limited") else str(place)
                self.first[stage] = {
                    "tick": int(recorded["tick"]),
                    "axis": name,
                    "recorded": float(was[place]),
                    "replayed": float(now[place]),
                }


class MissingError(Exception):
    """An input of a tick that is not in the log."""


class Plane:
    """A servo and all that it reads, fed tick by tick. ``shift_ns``: added to every time of the log."""

    def __init__(self, plan: ServoPlan, shift_ns: int) -> None:
        self.plan = plan
        self.shift_ns = shift_ns
        self.segments = RigSegments.create(plan, telemetry_rows=64)
        wires = self.segments.servo_wires
        self.lease = Lease.attach(wires.lease, write=True)
        self.mode = Slot.attach(wires.mode, MODE.itemsize, write=True)
        self.chunks = ChunkMailbox.attach(wires.chunks, plan.horizon, len(plan.components), write=True)
        self.states = [Slot.attach(state, STATE.itemsize, write=True) for _, state in wires.arms]
        self.reader = self.segments.telemetry.reader()
        self.servo = Servo(plan, wires)
        self.row = np.zeros(1, telemetry(len(plan.components), plan.axes))
        self.mode_number = 0
        self.unknown: set[str] = {arm.name for arm in plan.arms}  # whose state of the tick before is not known
        self.state_numbers = [0] * len(plan.arms)

    def tick(self, row: Row, chunk: Chunk | None, states: list[Row | None]) -> Row:
        """One tick with the inputs of ``row``. ``chunk``, ``states``: those that are new in it. Returns its row."""
        given = names(row["given"], GIVEN)
        at = int(row["tick_ns"]) + self.shift_ns
        now = at + int(row["late_ns"])
        if int(row["mode"]) != self.mode_number:
            record = np.zeros((), MODE)
            for name in MODE.names or ():
                record[name] = row[name]
            self.mode.publish(record)
            self.mode_number = int(row["mode"])
        if now > time.monotonic_ns():
            raise ValueError("the session lasts longer than this machine has been up; replay it later")
        if "lease" in given:
            self.lease.grant_until(now + 1)
        else:
            self.lease.revoke()
        estop = self.segments.estop
        if "estop" in given and not estop.raised:
            estop.raise_stop()
        elif "estop" not in given and estop.raised:
            estop.clear(estop.count)
        if "quit" in given:
            self.servo.quit()
        # The mailbox counts as it did then; of what the servo never saw, only the number matters.
        while chunk is not None and self.chunks.sequence < int(row["looked_at"]):
            self.chunks.publish(
                chunk.actions,
                epoch=chunk.epoch,
                tau_observation=chunk.tau,
                first_step=self.plan.first_step,
                dt=self.plan.action_dt,
                captured_ns=chunk.captured_ns + self.shift_ns,
            )
        for slot, state in zip(self.states, states, strict=True):
            if state is not None:
                slot.publish(state.tobytes()[-STATE.itemsize :], int(state["captured_ns"]) + self.shift_ns)
        self.servo.tick(at, now)
        assert self.reader.read(self.row) == 1
        return self.row[0]


class Replay:
    """One session. Raises ValueError for a log that holds no ticks, or none with their inputs.

    ``plan``: another servo than the session's own, to see what a changed limit would have done.
    """

    def __init__(self, session: Path, plan: ServoPlan | None = None) -> None:
        self.session = session
        about = log_file.metadata(session)
        if plan is None and "plan" not in about:
            raise ValueError(f"{session}: the log does not hold the servo's plan, expected one of `chatvla-edge run`")
        self.plan = servo_plan.from_json(about["plan"]) if plan is None else plan
        self.found = Comparison(same_build=about.get("build", "").strip('"') == build())
        self.axes = [f"{arm.name}.{axis}" for arm in self.plan.arms for axis in range(arm.axes)]
        self.arms = {f"/state/{arm.name}": arm.name for arm in self.plan.arms}
        self.state_rows: dict[str, dict[int, Row]] = {arm: {} for arm in self.arms.values()}
        self.newest_state = dict.fromkeys(self.arms.values(), 0)
        self.chunks: dict[int, Chunk] = {}
        self.newest_chunk = 0
        self.plane: Plane | None = None
        self.looked_at = 0
        self.last_tick = 0

    def run(self) -> Comparison:
        """Every tick of the log."""
        waiting: deque[Row] = deque()
        for message in log_file.messages(self.session, {"/ticks", "/policy", *self.arms}):
            if message.topic == "/ticks":
                waiting.extend(self._ticks(message))
            else:
                self._keep(message)
            # States and chunks stand in the log after the ticks that acted upon them, by up to a turn of the recorder.
            while waiting and self._has_come(waiting[0]):
                self._step(waiting.popleft())
        for row in waiting:
            self._step(row)
        if not self.found.ticks:
            raise ValueError(f"{self.session}: found no ticks, expected the log of a run")
        return self.found

    def _ticks(self, message: Message) -> Iterator[Row]:
        rows = message.rows()
        here = telemetry(len(self.plan.components), self.plan.axes)
        if lacking := [name for name in INPUTS if name not in (rows.dtype.names or ())]:
            raise ValueError(
                f"{self.session}: the ticks lack {', '.join(lacking)}; expected a log of a version that records the "
                "servo's inputs with each tick. Older sessions cannot be replayed"
            )
        if rows.dtype != here:
            raise ValueError(f"{self.session}: rows of {rows.dtype.itemsize} bytes; the plan's have {here.itemsize}")
        self.found.ticks += len(rows)
        return iter(rows)

    def _keep(self, message: Message) -> None:
        if (arm := self.arms.get(message.topic)) is not None:
            rows = message.rows()
            if rows.dtype != STAMPED:
                raise ValueError(f"{self.session}: states with {rows.dtype.names}, expected {STAMPED.names}")
            self.state_rows[arm].update(zip(rows["sequence"].tolist(), rows, strict=True))
            self.newest_state[arm] = max(self.newest_state[arm], int(rows["sequence"][-1]))
            return
        report = message.json()
        if "chunk" in report:
            number = int(report["chunk"])
            self.chunks[number] = Chunk.of(report, len(self.plan.components))
            self.newest_chunk = max(self.newest_chunk, number)

    def _has_come(self, row: Row) -> bool:
        states = zip(row["states"].tolist(), self.newest_state.values(), strict=False)
        return int(row["looked_at"]) <= self.newest_chunk and all(number <= newest for number, newest in states)

    def _step(self, row: Row) -> None:
        tick = int(row["tick"])
        anew = tick <= self.last_tick  # the servo was started again, and counts from its first tick
        begins = self.last_tick == 0 or anew
        follows = tick == self.last_tick + 1
        self.last_tick = tick
        try:
            if begins:
                self.plane = None
                if tick != 1 and (row["doing"] or row["arming"] or row["tau"]):
                    raise MissingError("the log begins when the servo had been armed already")
                # Before its first arming a servo remembers nothing that a later tick depends on.
                self.plane = Plane(self.plan, START_NS - int(row["tick_ns"]))
                self.looked_at = 0
            elif self.plane is None:
                return
            elif not follows:
                raise MissingError("ticks before this one are missing: see /gaps")
            chunk, states = self._inputs(row, self.plane)
        except MissingError as missing:
            self.plane = None
            self.found.stops.append({"tick": tick, "why": str(missing)})
            return
        self.found.judge(row, self.plane.tick(row, chunk, states), self.axes)

    def _inputs(self, row: Row, plane: Plane) -> tuple[Chunk | None, list[Row | None]]:
        """The chunk and the states that are new in this tick. Raises MissingError."""
        if plane.unknown and row["doing"]:
            raise MissingError(
                f"the state of {', '.join(sorted(plane.unknown))} that this tick acted upon is not in the log"
            )
        chunk = None
        if (number := int(row["looked_at"])) != self.looked_at:
            chunk = self.chunks.get(number)
            if chunk is None and row["doing"]:
                raise MissingError(f"chunk {number} is not in the log")
            self.looked_at = number
            self.chunks = {other: kept for other, kept in self.chunks.items() if other >= number}
        states: list[Row | None] = []
        at = 0
        for place, arm in enumerate(self.plan.arms):
            axes = slice(at, at + arm.axes)
            at += arm.axes
            number = int(row["states"][place])
            state = None
            if number != plane.state_numbers[place]:
                rows = self.state_rows[arm.name]
                state = rows.get(number)
                for old in range(plane.state_numbers[place], number):
                    rows.pop(old, None)
                plane.state_numbers[place] = number
                # The two rings are counted apart: a device killed between them is a count behind ever after.
                if state is not None and state["q"][: arm.axes].tobytes() != row["measured"][axes].tobytes():
                    state = None
                (plane.unknown.discard if state is not None else plane.unknown.add)(arm.name)
            states.append(state)
        return chunk, states


def replay(session: Path, plan: ServoPlan | None = None) -> Comparison:
    """A session's ticks once more: see `Replay`."""
    return Replay(session, plan).run()
