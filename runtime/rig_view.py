"""The servo plane as the arbiter sees it, and the arbiter's orders as the servo reads them.

    view, orders = RigView(plan, devices, segments), Orders(segments)
    arbiter = Arbiter(Lease.attach(segments.lease.fd, write=True), segments.estop, orders)
    every 20 ms: arbiter.turn(view.observe(...), requests)

`servo_seen`, `policy_seen` and `device_seen` are pure: a record and its stamps in, a part of `Observations` out. Servo
and devices publish in every tick and cycle, whatever happens, so the stamp of a record is its writer's heartbeat; a
record that cannot be read is as old as the one before.
"""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chatvla_edge.runtime.arbiter import Order
from chatvla_edge.runtime.device_plan import DevicePlan
from chatvla_edge.runtime.limits import KINDS
from chatvla_edge.runtime.modes import Want
from chatvla_edge.runtime.observations import Camera, Child, Device, Observations, Policy, Servo
from chatvla_edge.runtime.rig_segments import RigSegments
from chatvla_edge.runtime.servo_plan import ServoPlan
from chatvla_edge.runtime.servo_records import (
    DEVICE_DOING,
    DEVICE_FAULTS,
    LATCHING,
    MODE,
    REASONS,
    SERVO_DOING,
    STATE,
    STATUS,
    WANTED,
    names,
)
from chatvla_edge.runtime.slots import Reading, Slot, SlotBusyError

Record = NDArray[np.void]

NEVER = Reading(0, 0, 0)
ALIVE = Child()
NONFINITE = KINDS.index("nonfinite")


def _bits(*reasons: str) -> int:
    return sum(1 << REASONS.index(reason) for reason in reasons)


# Reasons of the servo's own, as against what it was told.
OWN = (LATCHING | _bits("start_refused")) & ~_bits("stop", "brake")
COMMANDED = {DEVICE_DOING.index(doing) for doing in ("following", "braking", "holding")}


def servo_seen(status: Record, beat_ns: int, period_ns: int, process: Child = ALIVE) -> Servo:
    """``status``: a STATUS record, published at host time ``beat_ns`` (0: never, and the record is empty)."""
    idle = int(status["doing"]) == SERVO_DOING.index("idle")
    reasons = int(status["reasons"])
    # Since the arming while commands flow; without an arming in force, what stands in its way now.
    own = (reasons if idle else int(status["latched"])) & OWN
    return Servo(
        period_ns=period_ns,
        beat_ns=beat_ns,
        want=Want(WANTED[int(status["wanted"])]),
        arming=int(status["arming"]),
        standing=bool(status["standing"]),
        posed=bool(status["posed"]),
        starved=bool(reasons & _bits("starved")),
        unreachable=bool(reasons & _bits("unreachable")),
        clipped_ticks=int(status["clipped_ticks"]),
        skipped_ticks=int(status["overruns"]),
        nonfinite=bool(int(status["clipped_kinds"]) >> NONFINITE & 1),
        stopped=", ".join(names(own, REASONS)),
        process=process,
    )


def policy_seen(status: Record, cycle_ns: int, ready: bool, process: Child = ALIVE) -> Policy:
    """What the servo says of the policy's chunks. ``cycle_ns``: between chunks, as the bundle declares it."""
    owed = int(status["owed_ns"])
    return Policy(cycle_ns, None if owed < 0 else owed, ready, process)


def device_seen(
    plan: DevicePlan, lag: Sequence[float] | None, state: Record, reading: Reading, process: Child = ALIVE
) -> Device:
    """``state``: a STATE record with its stamps. ``lag``: how far (rad, m) an axis may be from its command."""
    axes = slice(plan.axes)
    measured, sent, target = (state[name][axes].tolist() for name in ("q", "sent", "target"))
    lagging = (
        lag is not None
        and int(state["doing"]) in COMMANDED
        # So written, what is no number lags.
        and not all(abs(q - told) <= most for q, told, most in zip(measured, sent, lag, strict=True))
    )
    apart = (abs(told - heads) for told, heads in zip(sent, target, strict=True) if isfinite(told) and isfinite(heads))
    words = state["words"].item().decode(errors="replace")
    stopped = ", ".join(names(int(state["faults"]), DEVICE_FAULTS))
    return Device(
        name=plan.name,
        period_ns=plan.period_ns,
        state_ns=reading.captured_ns,
        beat_ns=reading.published_ns,
        arming=int(state["arming"]),
        lagging=lagging,
        deviation=max(apart, default=0.0),
        fault=words or "it reports a fault" if state["faulty"] else "",
        stopped=f"{stopped} ({words})" if stopped and words else stopped,
        process=process,
    )


class _Record:
    """The newest record of a slot that could be read."""

    def __init__(self, slot: Slot, dtype: np.dtype[Any]) -> None:
        self._slot = slot
        self._scratch = np.zeros((), dtype)
        self.value = np.zeros((), dtype)
        self.reading = NEVER

    def read(self) -> None:
        try:
            found = self._slot.read_into(self._scratch)
        except SlotBusyError:
            return
        if found is not None:
            self.value, self._scratch = self._scratch, self.value
            self.reading = found


class RigView:
    """What a rig's segments say. ``devices``: the plan of each device's process, in the order of the plan's arms."""

    def __init__(self, plan: ServoPlan, devices: Sequence[DevicePlan], segments: RigSegments) -> None:
        if [device.name for device in devices] != [arm.name for arm in plan.arms]:
            raise ValueError(
                f"devices {[device.name for device in devices]}; expected {[arm.name for arm in plan.arms]}, the arms"
            )
        self.plan = plan
        self.devices = tuple(devices)
        self._status = _Record(segments.status, STATUS)
        self._states = [_Record(slot, STATE) for slot in segments.states]

    def observe(
        self,
        *,
        cameras: Sequence[Camera],
        cycle_ns: int,
        policy_ready: bool,
        children: Mapping[str, Child],
        recorder: Child | None = None,
        enable: bool | None = None,
        clock_step_ns: int = 0,
    ) -> Observations:
        """All that one decision looks at, gathered now.

        ``children``: how the processes are, by ``servo``, ``policy`` and the devices' names; the rest as in
        `Observations`. The emergency stop is the arbiter's to read.
        """
        for record in (self._status, *self._states):
            record.read()
        status = self._status.value
        return Observations(
            cameras=tuple(cameras),
            policy=policy_seen(status, cycle_ns, policy_ready, children["policy"]),
            servo=servo_seen(status, self._status.reading.published_ns, self.plan.period_ns, children["servo"]),
            devices=tuple(
                device_seen(device, arm.limits.lag, record.value, record.reading, children[device.name])
                for device, arm, record in zip(self.devices, self.plan.arms, self._states, strict=True)
            ),
            recorder=recorder,
            enable=enable,
            clock_step_ns=clock_step_ns,
        )


class Orders:
    """Hands an arbiter's orders to the servo. ``epoch``: of the instruction; chunks of an older one are refused."""

    def __init__(self, segments: RigSegments) -> None:
        self._slot = Slot.attach(segments.mode.fd, MODE.itemsize, write=True)
        self._record = np.zeros((), MODE)
        self.epoch = 0

    def __call__(self, order: Order) -> None:
        """Publish; the servo's next tick acts on it."""
        self._record["wanted"] = WANTED.index(order.want.value)
        self._record["arming"] = order.arming
        self._record["epoch"] = self.epoch
        self._record["speed"] = order.speed
        self._slot.publish(self._record)
