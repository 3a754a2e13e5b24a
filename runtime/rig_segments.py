"""Every segment that a rig's servo plane talks through, created once by whoever starts its processes.

    segments = RigSegments.create(plan)
    Popen([...], pass_fds=segments.servo_fds)      # and segments.servo_wires as the numbers
    Popen([...], pass_fds=segments.device_fds(0))

Held by the supervisor for as long as the rig runs; the segments go with their last holder.
"""

from dataclasses import dataclass, fields

from chatvla_edge.runtime.histogram import SNAPSHOT
from chatvla_edge.runtime.mailbox import ChunkMailbox, PrefixSlot
from chatvla_edge.runtime.pages import EmergencyStop, Lease
from chatvla_edge.runtime.servo_plan import ServoPlan, ServoWires
from chatvla_edge.runtime.servo_records import COMMAND, MODE, STATE, STATUS, telemetry
from chatvla_edge.runtime.slots import Ring, Slot

HISTOGRAMS = ("lateness", "cost", "chunk_age")  # in this order in the histogram slot


@dataclass(frozen=True)
class DeviceWires:
    """Descriptors that a device's process inherits."""

    lease: int
    estop: int
    command: int
    state: int
    history: int
    history_rows: int


@dataclass(frozen=True)
class RigSegments:
    """The segments; command, state and history per arm in the plan's order."""

    lease: Lease
    estop: EmergencyStop
    mode: Slot
    status: Slot
    chunks: ChunkMailbox
    prefix: PrefixSlot
    telemetry: Ring
    telemetry_rows: int
    histograms: Slot
    commands: tuple[Slot, ...]
    states: tuple[Slot, ...]
    histories: tuple[Ring, ...]
    history_rows: int
    prefix_used: bool  # only real-time chunking reads it, and it costs the servo some 10 us each time

    @classmethod
    def create(cls, plan: ServoPlan, *, telemetry_rows: int = 4096, history_rows: int = 2048) -> "RigSegments":
        """Empty segments of the plan's shape: an expired lease, a stop that is not raised, no mode."""
        actions = len(plan.components)
        return cls(
            lease=Lease.create("lease"),
            estop=EmergencyStop.create("emergency stop"),
            mode=Slot.create("mode", MODE.itemsize),
            status=Slot.create("servo status", STATUS.itemsize),
            chunks=ChunkMailbox.create("chunks", plan.horizon, actions),
            prefix=PrefixSlot.create("committed prefix", plan.horizon, actions),
            telemetry=Ring.create("telemetry", telemetry(actions, plan.axes).itemsize, telemetry_rows),
            telemetry_rows=telemetry_rows,
            histograms=Slot.create("histograms", len(HISTOGRAMS) * SNAPSHOT.itemsize),
            commands=tuple(Slot.create(f"command {arm.name}", COMMAND.itemsize) for arm in plan.arms),
            states=tuple(Slot.create(f"state {arm.name}", STATE.itemsize) for arm in plan.arms),
            histories=tuple(Ring.create(f"history {arm.name}", STATE.itemsize, history_rows) for arm in plan.arms),
            history_rows=history_rows,
            prefix_used=plan.fusion.mode == "rtc",
        )

    @property
    def servo_wires(self) -> ServoWires:
        """What the servo's process attaches to."""
        return ServoWires(
            lease=self.lease.fd,
            estop=self.estop.fd,
            mode=self.mode.fd,
            status=self.status.fd,
            chunks=self.chunks.fd,
            arms=tuple((command.fd, state.fd) for command, state in zip(self.commands, self.states, strict=True)),
            prefix=self.prefix.fd if self.prefix_used else None,
            telemetry=self.telemetry.fd,
            telemetry_rows=self.telemetry_rows,
            histograms=self.histograms.fd,
        )

    def device_wires(self, arm: int) -> DeviceWires:
        """What the process of that arm attaches to."""
        return DeviceWires(
            lease=self.lease.fd,
            estop=self.estop.fd,
            command=self.commands[arm].fd,
            state=self.states[arm].fd,
            history=self.histories[arm].fd,
            history_rows=self.history_rows,
        )

    @property
    def servo_fds(self) -> tuple[int, ...]:
        """For ``pass_fds`` of the servo's process."""
        single = (self.lease, self.estop, self.mode, self.status, self.chunks, self.prefix, self.telemetry)
        return tuple(segment.fd for segment in (*single, self.histograms, *self.commands, *self.states))

    def device_fds(self, arm: int) -> tuple[int, ...]:
        """For ``pass_fds`` of that arm's process."""
        wires = self.device_wires(arm)
        return tuple(getattr(wires, field.name) for field in fields(wires) if field.name != "history_rows")
